"""Does lm-evaluation-harness get the same answers from our adapter as from its own model, for all kinds of requests?"""

from __future__ import annotations

import builtins
import copy
import importlib.util
import json
import os
from types import SimpleNamespace

import pytest
import torch

from nbhelpers import lmeval, models, scoring
from nbhelpers.tracking import Interrupted

REASON = "lm-evaluation-harness is not installed: pip install 'nbhelpers[lmeval]'"
ROWS = [
    {"text": "Jane has the", "choices": ["bell", "red coat"], "gold": 0},
    {"text": "One morning Leo", "choices": ["ran", "sat down with Rosa"], "gold": 1},
    {"text": "The dog", "choices": ["ran", "ran away"], "gold": 1},
]
TASKS = {
    "choosing": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "writing": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], max_gen_toks: 12, do_sample: false, temperature: 0.0}
metric_list: [{metric: exact_match}]
""",
    "reading": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}]
""",
    "guessing": """
output_type: loglikelihood
doc_to_text: "{{text}}"
doc_to_target: " {{choices[gold]}}"
metric_list: [{metric: perplexity}, {metric: acc}]
""",
    "sampling": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["."], do_sample: true, temperature: 0.7}
metric_list: [{metric: exact_match}]
""",
}


@pytest.fixture(scope="module")
def harness():
    """The harness; skips, with the reason, where it is not installed, fails where NBHELPERS_REQUIRE_LMEVAL=1."""
    if importlib.util.find_spec("lm_eval") is None:
        if os.environ.get("NBHELPERS_REQUIRE_LMEVAL") == "1":
            pytest.fail(f"{REASON} (NBHELPERS_REQUIRE_LMEVAL=1 makes this a failure)", pytrace=False)
        pytest.skip(REASON)
    import lm_eval

    return lm_eval


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("tiny-llama", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Task files on local rows."""
    place = tmp_path_factory.mktemp("tasks")
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {place / 'rows.jsonl'}}}}}\ntest_split: test\n"
    for name, text in TASKS.items():
        (place / f"{name}.yaml").write_text(f"task: local_{name}\n{data}{text.lstrip()}")
    return place


def own(loaded, batch: int = 2):
    """The harness's own model of the one in memory."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=batch)


@pytest.mark.slow
def test_all_kinds_of_tasks_give_the_harness_s_own_results(harness, loaded, folder):
    from lm_eval.tasks import TaskManager

    names = [f"local_{name}" for name in TASKS if name != "sampling"]
    found = lmeval.evaluate_with_harness(
        loaded.model, loaded.tokenizer, names, include_path=folder, bootstrap_iters=0, limit=3
    )
    expected = harness.simple_evaluate(
        own(loaded), tasks=names, limit=3, bootstrap_iters=0, task_manager=TaskManager(include_path=str(folder))
    )
    assert set(found["results"]) == set(names)
    for name in names:
        ours, theirs = found["results"][name], expected["results"][name]
        numbers = {key: value for key, value in theirs.items() if isinstance(value, float)}
        assert numbers and {key: ours[key] for key in numbers} == pytest.approx(numbers, rel=1e-4)
        assert [s["doc_id"] for s in found["samples"][name]] == [0, 1, 2]


@pytest.mark.slow
def test_an_unknown_task_and_one_that_samples_are_refused_with_advice(harness, loaded, folder):
    with pytest.raises(LookupError, match="task 'boolqq' is unknown to lm-evaluation-harness"):
        lmeval.evaluate_with_harness(loaded.model, loaded.tokenizer, ["boolqq"])
    with pytest.raises(ValueError, match="greedily here, the task asks for .*0.7.*gen_kwargs"):
        lmeval.evaluate_with_harness(
            loaded.model, loaded.tokenizer, ["local_sampling"], include_path=folder, bootstrap_iters=0
        )


def requests(*pairs) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def test_choices_of_one_context_are_read_together_and_answered_in_the_order_asked(harness, loaded):
    pairs = [("The dog", " ran"), ("Jane", " has"), ("The dog", " sat"), ("", "Jane"), ("The dog", " ran")]
    seen = []
    handle = loaded.model.register_forward_pre_hook(
        lambda _m, _a, kw: seen.append(len(kw["input_ids"])), with_kwargs=True
    )
    try:
        found = lmeval.harness_model(loaded.model, loaded.tokenizer).loglikelihood(requests(*pairs))
    finally:
        handle.remove()
    assert sum(seen) == 3, "one row for each of the three contexts"
    expected = own(loaded).loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([float(value) for value, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [bool(greedy) for _, greedy in expected]


def test_what_the_model_would_have_written_is_called_greedy(harness, loaded):
    answering = lmeval.harness_model(loaded.model, loaded.tokenizer)
    (text,) = answering.generate_until(requests(("One morning Leo", {"max_gen_toks": 3})))
    found = answering.loglikelihood(requests(("One morning Leo", text), ("One morning Leo", " zebra")))
    assert [greedy for _, greedy in found] == [True, False]


def test_long_texts_are_read_in_windows_as_the_harness_reads_them(harness, loaded):
    texts = [("Jane has the bell and the red coat. " * 120,), ("The dog ran.",), ("",)]
    found = lmeval.harness_model(loaded.model, loaded.tokenizer).loglikelihood_rolling(requests(*texts))
    expected = own(loaded, batch=1).loglikelihood_rolling(requests(*texts), disable_tqdm=True)
    assert found == pytest.approx([float(value) for value in expected], abs=1e-2)
    assert len(loaded.tokenizer(texts[0][0])["input_ids"]) > 2 * scoring.longest_text(loaded.model)


def test_windows_score_each_token_once_and_the_last_one_reaches_back():
    made = scoring.windows(range(1, 11), start=0, limit=4)
    assert [(list(one.context), list(one.choices[0])) for one in made] == [
        ([0], [1, 2, 3, 4]),
        ([4], [5, 6, 7, 8]),
        ([6, 7, 8], [9, 10]),
    ]
    assert scoring.windows([], start=0, limit=4) == []


def test_texts_stop_where_each_request_says(harness, loaded):
    asked = [
        ("One morning Leo", {"until": ["."], "max_gen_toks": 20, "do_sample": False}),
        ("The dog", {"until": " the", "max_gen_toks": 8}),
        ("Jane", {"until": ["."], "max_gen_toks": 20, "do_sample": False}),
    ]
    found = lmeval.harness_model(loaded.model, loaded.tokenizer).generate_until(requests(*copy.deepcopy(asked)))
    assert found == own(loaded, batch=1).generate_until(requests(*copy.deepcopy(asked)), disable_tqdm=True)


def test_a_text_that_is_written_with_its_first_token_gets_no_second_one(harness, loaded):
    start = loaded.tokenizer.bos_token
    pairs = [(f"{start}The dog", " ran"), ("The dog", " ran")]
    found = lmeval.harness_model(loaded.model, loaded.tokenizer).loglikelihood(requests(*pairs))
    expected = own(loaded).loglikelihood(requests(*pairs), disable_tqdm=True)
    assert [value for value, _ in found] == pytest.approx([float(value) for value, _ in expected], abs=1e-4)
    with_start, without = scoring.encode(loaded.tokenizer, [f"{start}The dog", "The dog"])
    assert with_start.count(loaded.tokenizer.bos_token_id) == 1 and with_start[-len(without) :] == without


def test_stop_is_heard(harness, loaded):
    answering = lmeval.harness_model(loaded.model, loaded.tokenizer, should_stop=lambda: True)
    with pytest.raises(Interrupted):
        answering.loglikelihood(requests(("The dog", " ran")))


def test_a_missing_harness_is_said_with_the_command_that_installs_it(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "lm_eval":
            raise ModuleNotFoundError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'nbhelpers\[lmeval\]'"):
        lmeval.evaluate_with_harness(torch.nn.Linear(1, 1), None, ["boolq"])


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, ((), 256)),
        ({"until": "x", "max_gen_toks": 5}, (("x",), 5)),
        ({"until": ["a", "b"], "max_new_tokens": 7, "do_sample": False, "temperature": 0.0}, (("a", "b"), 7)),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, ((), 256)),
    ],
)
def test_settings_of_writing_are_read_as_the_harness_reads_them(settings, expected):
    assert lmeval._writing(settings) == expected


@pytest.mark.parametrize("settings", [{"temperature": 0.7}, {"do_sample": True}, {"num_beams": 4}])
def test_settings_that_are_not_greedy_are_refused(settings):
    with pytest.raises(ValueError, match="texts are written greedily here"):
        lmeval._writing(settings)
