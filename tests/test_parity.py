"""Are our numbers those of lm-evaluation-harness itself, document by document, on real and on awkward rows?"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbhelpers import attention, evaluation, generation, models, scoring, tasks

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent
HERE = importlib.util.find_spec("lm_eval") is not None
STORIES = "stories260K"
ROWS = {"boolq": 24, "hellaswag": 24, "gsm8k": 3}
REASON = "lm-evaluation-harness is not installed: pip install 'nbhelpers[lmeval]'"


@pytest.fixture(scope="module", autouse=True)
def needs_the_harness():
    if HERE:
        return
    if os.environ.get("NBHELPERS_REQUIRE_LMEVAL") == "1":
        pytest.fail(f"{REASON} (NBHELPERS_REQUIRE_LMEVAL=1 makes this a failure)", pytrace=False)
    pytest.skip(REASON)


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", ROOT / "benchmarks" / "parity.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(parity, data_dir, tmp_path_factory):
    """The harness's own tasks, their rows those of the data folder."""
    files = {task: data_dir / name for task, name in parity.FILES.items()}
    shots = {task: data_dir / name for task, name in parity.SHOTS.items()}
    return parity.task_folder(tmp_path_factory.mktemp("harness"), files, shots)


def load(name: str, data_dir: Path):
    place = str(data_dir / "models" / "stories260K-hf") if name == STORIES else name
    return models.load_model(place, device="cpu", dtype="float32")


@pytest.mark.parametrize("task", sorted(ROWS))
@pytest.mark.parametrize("name", [*models.bundled_names(), STORIES])
def test_real_rows_give_the_harness_s_prompts_predictions_and_measures(name, task, parity, folder, data_dir):
    loaded = load(name, data_dir)
    found = parity.pair(loaded.model, loaded.tokenizer, task, folder, data_dir, ROWS[task])
    assert found["rows"] == ROWS[task] and found["prompts_differ"] == 0
    assert found["delta"] is None or found["delta"] <= 1e-3
    assert found["flips"] == 0 and parity.equal(found), found


@pytest.mark.parametrize(
    "task, limit, expected",
    [("hellaswag", 100, {"acc,none": 0.21, "acc_norm,none": 0.22}), ("boolq", 60, {"acc,none": 0.4833})],
)
def test_stories260k_has_the_accuracies_that_are_known_of_it(task, limit, expected, parity, data_dir):
    loaded = load(STORIES, data_dir)
    found = parity.ours(loaded.model, loaded.tokenizer, task, data_dir / parity.FILES[task], None, limit)
    assert found["results"] == pytest.approx(expected, abs=5e-5)


@pytest.mark.parametrize("task", ["hellaswag", "gsm8k"])
def test_a_model_with_closed_heads_is_judged_as_the_harness_judges_it(task, parity, folder, data_dir):
    loaded = load("tiny-llama", data_dir)
    geo = attention.model_geometry(loaded.model)
    heads = [(layer, head) for layer in range(geo.layers) for head in range(0, geo.heads, 2)]
    open_ = parity.ours(loaded.model, loaded.tokenizer, "hellaswag", data_dir / parity.FILES["hellaswag"], None, 4)
    with attention.heads_closed(loaded.model, heads):
        found = parity.pair(loaded.model, loaded.tokenizer, task, folder, data_dir, ROWS[task])
        closed = parity.ours(loaded.model, loaded.tokenizer, "hellaswag", data_dir / parity.FILES["hellaswag"], None, 4)
    assert parity.equal(found), found
    assert open_["documents"][0]["loglikelihoods"] != closed["documents"][0]["loglikelihoods"]


# Awkward rows, request by request -------------------------------------------------------------------------------------

LONG = "Jane has the bell and the red coat. " * 120
PAIRS = {
    "unicode": ("Ünïcödé 🙂 naïve — 東京 \u200d", [" 🙂", " 東京です", " cafe\u0301", " café"]),
    "no context": ("", ["The dog ran away.", "Jane", " Jane"]),
    "spaces at the end": ("The dog  ", ["ran", " ran", "sat down"]),
    "one ending begins another": ("The dog", [" ran", " ran away", " ran away from Jane", " r"]),
    "ties": ("The dog", [" ran", " sat", " ran", " sat"]),
    "cut on the left": (LONG, [" ran", " ran away from Jane and the red coat", " sat"]),
    "longer than the model with each ending": (LONG * 2, [" ran", " sat down with " + "the bell " * 30]),
    "line ends": ("Question: who?\n\n", ["\nAnswer", "Answer:\n", "\n\n"]),
}


def by_harness(loaded, pairs, batch: int = 4):
    from lm_eval.models.huggingface import HFLM

    peer = HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=batch)
    requests = [SimpleNamespace(args=pair) for pair in pairs]
    return [(float(value), bool(greedy)) for value, greedy in peer.loglikelihood(requests, disable_tqdm=True)]


@pytest.mark.parametrize("name", models.bundled_names())
def test_awkward_rows_score_as_in_the_harness(name):
    loaded = models.load_model(name, device="cpu", dtype="float32")
    pairs = [(context, choice) for context, choices in PAIRS.values() for choice in choices]
    theirs = dict(zip(pairs, by_harness(loaded, pairs), strict=True))
    asked = [scoring.question(loaded.tokenizer, context, choices) for context, choices in PAIRS.values()]
    for number, values, greedy in scoring.judged(loaded.model, asked):
        context, choices = list(PAIRS.values())[number]
        for choice, value, likeliest in zip(choices, values, greedy, strict=True):
            expected, said = theirs[context, choice]
            assert value == pytest.approx(expected, abs=1e-3), (context[:20], choice)
            assert likeliest == said, (context[:20], choice)


def test_equal_choices_have_equal_numbers_and_the_first_one_wins():
    loaded = models.load_model("tiny-llama", device="cpu", dtype="float32")
    asked = scoring.question(loaded.tokenizer, *PAIRS["ties"])
    ((_, values),) = scoring.loglikelihoods(loaded.model, [asked])
    assert values[0] == values[2] and values[1] == values[3]
    line = evaluation.choice_line(tasks.Asked(0, 0, *map_ties()), values)
    assert line["prediction"] in (0, 1) and line["prediction"] == values.index(max(values))


def map_ties():
    context, choices = PAIRS["ties"]
    return context, tuple(choices), 0


@pytest.mark.parametrize("name", [*models.bundled_names(), STORIES])
def test_texts_are_as_likely_as_in_the_harness_windows_of_long_ones_too(name, data_dir, tmp_path):
    from lm_eval.models.huggingface import HFLM

    loaded = load(name, data_dir)
    whole = (data_dir / "wikitext2_test_raw.txt").read_text(encoding="utf-8")
    texts = [whole[:3000], whole[5000:5200], PAIRS["unicode"][0]]
    path = tmp_path / "texts.json"
    path.write_text(json.dumps([{"text": text} for text in texts]))
    peer = HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=1)
    theirs = peer.loglikelihood_rolling([SimpleNamespace(args=(text,)) for text in texts], disable_tqdm=True)
    found = evaluation.evaluate(loaded.model, loaded.tokenizer, "perplexity", path)
    for line, expected in zip(found["predictions"], theirs, strict=True):
        assert line["loglikelihood"] == pytest.approx(float(expected), abs=1e-3 * max(1, line["tokens"] / 100))


@pytest.mark.parametrize("name", models.bundled_names())
def test_texts_are_those_of_the_harness_from_long_and_unicode_prompts_on(name):
    from lm_eval.models.huggingface import HFLM

    loaded = models.load_model(name, device="cpu", dtype="float32")
    prompts = ["The dog", LONG, "Ünïcödé 🙂 naïve", "Question: Jane has 3 bells. How many?\nAnswer:", "Q"]
    stops = [" the", "\n\n"]
    peer = HFLM(pretrained=loaded.model, tokenizer=copy.deepcopy(loaded.tokenizer), batch_size=1)
    settings = {"until": stops, "do_sample": False, "max_gen_toks": 40}
    requests = [SimpleNamespace(args=(prompt, dict(settings))) for prompt in prompts]
    theirs = peer.generate_until(requests, disable_tqdm=True)
    found = generation.continuations(loaded.model, loaded.tokenizer, prompts, stops=stops, max_new_tokens=40)
    assert [text for _, text in sorted(found)] == theirs


def test_a_difference_in_prompt_prediction_or_number_is_seen(parity):
    right = {"prompt": "a", "loglikelihoods": [-1.0, -2.0], "metrics": {"acc": 1.0}}
    mine = {"results": {"acc,none": 1.0}, "documents": [right]}
    assert parity.equal(parity.compare(mine, mine))
    for wrong in (
        right | {"prompt": "b"},
        right | {"loglikelihoods": [-1.002, -2.0]},
        right | {"loglikelihoods": [-2.0, -1.0]},
        right | {"loglikelihoods": [float("nan"), -2.0]},
        right | {"metrics": {"acc": 0.0}},
    ):
        assert not parity.equal(parity.compare(mine, {"results": {"acc,none": 1.0}, "documents": [wrong]})), wrong
    assert not parity.equal(parity.compare(mine, {"results": {"acc,none": 0.5}, "documents": [right]}))


def test_boolq_answers_become_the_labels_that_the_harness_reads(parity, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "q", "passage": "p", "answer": True}) + "\n")
    (tmp_path / "out").mkdir()
    assert json.loads(parity._with_labels(path, tmp_path / "out").read_text())["label"] == 1
