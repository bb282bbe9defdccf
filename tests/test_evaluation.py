"""Does an evaluation say what the model answers, keep each answer, go on after a stop, and use old answers rightly?"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nbhelpers import adapters, answer_cache, attention, evaluation, models, predictions, preparation, scoring
from nbhelpers.evaluation import EvaluationConfig, EvaluationExperiment, evaluate
from nbhelpers.records import read_lines
from nbhelpers.runs import read_run
from nbhelpers.tracking import Interrupted
from nbhelpers.training import TrainingConfig

pytest_plugins = ["model_fixtures"]
STORIES = [
    ("Leo had a bell.", "he", ["rang it.", "sat.", "went to the inn and ate a cup.", "ran."], 0),
    ("Rosa saw the sea.", "she", ["swam.", "sat down in the red coat.", "ran.", "was a bell."], 1),
    ("The dog ran.", "the dog", ["sat.", "sat down.", "was red.", "had nothing."], 2),
    ("Dora had a cup.", "she", ["had nothing.", "sat.", "ran.", "went."], 3),
    ("It was cold.", "leo", ["wore a coat.", "swam.", "sang.", "sat."], 0),
]


@pytest.fixture(scope="module")
def stories(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "stories.jsonl"
    rows = [
        {"ind": at + 10, "activity_label": "Story", "ctx_a": a, "ctx_b": b, "endings": endings, "label": label}
        for at, (a, b, endings, label) in enumerate(STORIES)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def problems(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "problems.jsonl"
    rows = [{"question": f"What is {n} and {n}?", "answer": f"{n} and {n} is {2 * n}.\n#### {2 * n}"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, data, **changes) -> EvaluationConfig:
    return EvaluationConfig(**{"model": str(model), "task": "hellaswag", "data": str(data), "device": "cpu", **changes})


def by_hand(model, tokenizer) -> list[list[float]]:
    """Each ending after its story in a row of its own, summed log-probabilities."""
    found = []
    for a, b, endings, _ in STORIES:
        context = f"Story: {a} {b.capitalize()}"
        found.append([])
        for ending in endings:
            start, ids = tokenizer(context)["input_ids"], tokenizer(f"{context} {ending}")["input_ids"]
            with torch.inference_mode():
                logs = model(input_ids=torch.tensor([ids[:-1]])).logits[0].log_softmax(-1)
            found[-1].append(sum(logs[at - 1, ids[at]].item() for at in range(len(start), len(ids))))
    return found


def test_accuracy_is_that_of_endings_scored_one_by_one(model_folders, stories):
    loaded = models.load_model(str(model_folders["llama"]), device="cpu")
    result = evaluate(loaded.model, loaded.tokenizer, "hellaswag", stories)
    expected = by_hand(loaded.model, loaded.tokenizer)
    for line, values in zip(result["predictions"], expected, strict=True):
        assert line["loglikelihoods"] == pytest.approx(values, abs=1e-4)
    best = [values.index(max(values)) for values in expected]
    normed = [
        [v / len(e) for v, e in zip(values, s[2], strict=True)] for values, s in zip(expected, STORIES, strict=True)
    ]
    gold = [story[3] for story in STORIES]
    assert result["acc"] == sum(one == other for one, other in zip(best, gold, strict=True)) / 5
    assert [line["prediction_norm"] for line in result["predictions"]] == [n.index(max(n)) for n in normed]
    assert result["n"] == 5 and result["protocol"]["rows"] == 5 and result["protocol"]["dtype"] == "float32"


def test_closed_heads_change_the_answers_of_the_model_in_memory(model_folders, stories):
    loaded = models.load_model(str(model_folders["llama"]), device="cpu")
    before = evaluate(loaded.model, loaded.tokenizer, "hellaswag", stories)["predictions"][0]["loglikelihoods"]
    attention.close_heads(loaded.model, [(0, 0), (1, 3)])
    assert evaluate(loaded.model, loaded.tokenizer, "hellaswag", stories)["predictions"][0]["loglikelihoods"] != before


def test_a_run_leaves_its_answers_in_the_order_of_the_data_and_numbers_that_follow_from_them(
    model_folders, stories, tmp_path
):
    result = EvaluationExperiment.run(config(model_folders["gpt2"], stories), run_dir=tmp_path / "run")
    lines, torn = read_lines(tmp_path / "run" / "predictions.jsonl")
    assert not torn and [line["id"] for line in lines] == [10, 11, 12, 13, 14]
    assert set(lines[0]) == {"id", "gold", "loglikelihoods", "prediction", "prediction_norm"}
    assert result["acc"] == sum(line["prediction"] == line["gold"] for line in lines) / 5
    assert result["acc_norm"] == sum(line["prediction_norm"] == line["gold"] for line in lines) / 5
    assert result["protocol"]["came"] == "measured" and result["all_facts_hold"]
    assert result["facts"][0]["name"] == "choices_score_as_alone"
    assert not (tmp_path / "run" / evaluation.PARTIAL).exists()
    assert read_run(tmp_path / "run").status == "finished"


def test_written_answers_are_kept_with_both_readings(model_folders, problems, tmp_path):
    settings = config(model_folders["llama"], problems, task="gsm8k", shots=0)
    with pytest.raises(ValueError, match="max_new_tokens must be less than the model's 64 tokens, got 256"):
        EvaluationExperiment.run(settings, run_dir=tmp_path / "long")
    line = evaluation.text_line(
        evaluation.tasks.Asked("a", 0, "Question", (), "1 and 1 is 2.\n#### 2"), " It is 2.\n#### 3. Or 2"
    )
    assert (line["strict"], line["flexible"]) == (False, True)
    assert (line["strict_answer"], line["flexible_answer"], line["id"]) == ("3.", "2", "a")


def test_a_stopped_run_goes_on_with_the_documents_that_have_no_answer(model_folders, stories, tmp_path, monkeypatch):
    whole = EvaluationExperiment.run(config(model_folders["llama"], stories, cache=False), run_dir=tmp_path / "whole")
    settings, done = config(model_folders["llama"], stories, cache=False, batch_tokens=1), []
    with pytest.raises(Interrupted, match="stopped after 2 of 5 documents; --resume goes on"):
        EvaluationExperiment.run(
            settings, run_dir=tmp_path / "run", progress=done.append, should_stop=lambda: len(done) > 2
        )
    assert len(read_lines(tmp_path / "run" / evaluation.PARTIAL)[0]) == 2
    asked, score = [], scoring.loglikelihoods
    monkeypatch.setattr(scoring, "loglikelihoods", lambda m, q, **kw: asked.append(len(q)) or score(m, q, **kw))
    result = EvaluationExperiment.run(settings, run_dir=tmp_path / "run", resume=True)
    assert asked[-1] == 3
    assert result["acc"] == whole["acc"] and result["n"] == 5
    lines, _ = read_lines(tmp_path / "run" / "predictions.jsonl")
    expected, _ = read_lines(tmp_path / "whole" / "predictions.jsonl")
    for one, other in zip(lines, expected, strict=True):
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)


# Answers from before --------------------------------------------------------------------------------------------------


@pytest.fixture
def own_model(model_folders, tmp_path) -> Path:
    """A copy that a test may change."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in model_folders["llama"].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def came(settings: EvaluationConfig, tmp_path: Path) -> str:
    number = len(list(tmp_path.glob("run-*")))
    return EvaluationExperiment.run(settings, run_dir=tmp_path / f"run-{number}")["protocol"]["came"]


def test_the_same_question_to_the_same_weights_is_answered_without_loading_them(
    own_model, stories, tmp_path, monkeypatch
):
    assert came(config(own_model, stories), tmp_path) == "measured"

    def load(*_args, **_options):
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(models, "load_model", load)
    assert came(config(own_model, stories, name="another name", batch_tokens=8), tmp_path) == "cached"
    first, second = (read_run(tmp_path / f"run-{n}").result for n in (0, 1))
    assert first["acc"] == second["acc"] and first["acc_interval"] == second["acc_interval"]
    assert second["documents_per_second"] is None


@pytest.mark.parametrize("change", ["weights", "tokenizer", "gates", "rows", "limit", "dtype", "cache off"])
def test_whatever_decides_the_answers_makes_old_ones_useless(change, own_model, stories, tmp_path):
    assert came(config(own_model, stories), tmp_path) == "measured"
    rows, settings = stories, {}
    if change == "weights":
        state = load_file(own_model / "model.safetensors")
        state["model.norm.weight"] = state["model.norm.weight"] * 1.5
        save_file(state, own_model / "model.safetensors", metadata={"format": "pt"})
    elif change == "tokenizer":
        content = json.loads((own_model / "tokenizer_config.json").read_text()) | {"changed": 1}
        (own_model / "tokenizer_config.json").write_text(json.dumps(content))
    elif change == "gates":
        loaded = models.load_model(str(own_model), device="cpu")
        attention.close_heads(loaded.model, [(0, 0)])
        models.save_gates(loaded.model, own_model)
    elif change == "rows":
        rows = tmp_path / "stories.jsonl"
        rows.write_text(stories.read_text().replace("a bell.", "a cup."))
    else:
        settings = {"limit": {"limit": 3}, "dtype": {"dtype": "bfloat16"}, "cache off": {"cache": False}}[change]
    assert came(config(own_model, rows, **settings), tmp_path) == "measured"


def test_a_cached_file_that_is_torn_is_not_used(own_model, stories, tmp_path):
    assert came(config(own_model, stories), tmp_path) == "measured"
    (path,) = (tmp_path / answer_cache.FOLDER).glob("*.json")
    path.write_text(path.read_text()[:-20])
    assert came(config(own_model, stories), tmp_path) == "measured"


def test_other_weights_under_the_same_name_do_not_go_on_with_old_answers(own_model, stories, tmp_path):
    settings, done = config(own_model, stories, batch_tokens=1), []
    with pytest.raises(Interrupted):
        EvaluationExperiment.run(
            settings, run_dir=tmp_path / "run", progress=done.append, should_stop=lambda: len(done) > 2
        )
    state = load_file(own_model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, own_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="answers"):
        EvaluationExperiment.run(settings, run_dir=tmp_path / "run", resume=True)


def test_answers_of_a_run_whose_facts_failed_are_not_used_again(own_model, stories, tmp_path, monkeypatch):
    visible = attention.visible
    monkeypatch.setattr(attention, "visible", lambda m, mask, q, k: visible(m, torch.ones_like(mask).tril(), q, k))
    results = [EvaluationExperiment.run(config(own_model, stories), run_dir=tmp_path / f"{n}") for n in (0, 1)]
    assert [(r["all_facts_hold"], r["protocol"]["came"]) for r in results] == [(False, "measured")] * 2


def test_cached_answers_come_with_the_facts_and_the_precision_they_were_made_with(own_model, stories, tmp_path):
    first, second = (EvaluationExperiment.run(config(own_model, stories), run_dir=tmp_path / f"{n}") for n in (0, 1))
    assert second["protocol"]["came"] == "cached" and second["facts"] == first["facts"] != []
    assert second["protocol"]["dtype"] == first["protocol"]["dtype"] == "float32"


def test_rows_that_are_asked_cannot_be_shots(model_folders, problems):
    with pytest.raises(ValueError, match="4 rows of .* are asked too, so their solutions would stand among the shots"):
        EvaluationExperiment.run(config(model_folders["llama"], problems, task="gsm8k", shots_data=str(problems)))


# What can go wrong ----------------------------------------------------------------------------------------------------


def test_log_likelihoods_that_are_no_numbers_choose_nothing_and_are_counted():
    document = evaluation.tasks.Asked(1, 0, "", (" a", " b"), 0)
    line = evaluation.choice_line(document, [float("nan"), -1.0])
    assert line["prediction"] is None and line["prediction_norm"] is None
    found = evaluation.measures([line, evaluation.choice_line(document, [-1.0, -2.0])], ["acc"])
    assert (found["n"], found["invalid"], found["acc"]) == (2, 1, 0.5)
    with pytest.raises(FloatingPointError, match="all 1 documents have log-likelihoods that are no numbers"):
        evaluation.measures([line], ["acc"])


def test_a_model_without_numbers_is_an_error_and_no_accuracy(own_model, stories, tmp_path):
    state = load_file(own_model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * float("nan")
    save_file(state, own_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FloatingPointError, match="no numbers"):
        EvaluationExperiment.run(config(own_model, stories), run_dir=tmp_path / "run")
    assert read_run(tmp_path / "run").status in ("failed", "diverged")


def test_of_equal_choices_the_first_one_is_taken():
    document = evaluation.tasks.Asked(1, 0, "", (" ab", " ab", " abcd"), 1)
    line = evaluation.choice_line(document, [-2.0, -2.0, -4.0])
    assert (line["prediction"], line["prediction_norm"]) == (0, 0)


def test_a_mask_through_which_choices_see_each_other_is_a_violation(model_folders, stories, tmp_path, monkeypatch):
    visible = attention.visible
    monkeypatch.setattr(attention, "visible", lambda m, mask, q, k: visible(m, torch.ones_like(mask).tril(), q, k))
    result = EvaluationExperiment.run(config(model_folders["llama"], stories), run_dir=tmp_path / "run")
    assert not result["all_facts_hold"] and result["facts"][0]["values"]["difference"] > 1e-2


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"task": "hellasawg"}, LookupError, "Did you mean 'hellaswag'"),
        ({"data": "nothing.jsonl"}, LookupError, "nothing.jsonl"),
        ({"model": "tiny-lama"}, LookupError, "Did you mean 'tiny-llama'"),
        ({"task": "gsm8k"}, ValueError, "needs a field 'question'"),
    ],
)
def test_what_cannot_run_is_said_before_a_run_directory_exists(changes, error, message, stories, tmp_path):
    settings = {"model": "tiny-llama", "data": str(stories), "task": "hellaswag"} | changes
    with pytest.raises(error, match=message):
        EvaluationExperiment.run(EvaluationConfig(**settings), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_from_a_folder_are_put_on_the_model(own_model, stories, tmp_path):
    loaded = models.load_model(str(own_model), device="cpu")
    trained = preparation.with_adapters(loaded.model, TrainingConfig(method="lora"))
    with torch.no_grad():
        for name, parameter in trained.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.05)
    folder = tmp_path / "adapter"
    folder.mkdir()
    adapters.save(loaded.model, folder)
    expected = evaluate(loaded.model.eval(), loaded.tokenizer, "hellaswag", stories)["predictions"]
    settings = config(own_model, stories, adapter=str(folder))
    EvaluationExperiment.run(settings, run_dir=tmp_path / "run")
    found, _ = read_lines(tmp_path / "run" / "predictions.jsonl")
    plain = evaluate(models.load_model(str(own_model), device="cpu").model, loaded.tokenizer, "hellaswag", stories)
    for one, other, without in zip(found, expected, plain["predictions"], strict=True):
        assert one["loglikelihoods"] == pytest.approx(other["loglikelihoods"], abs=1e-4)
        assert one["loglikelihoods"] != pytest.approx(without["loglikelihoods"], abs=1e-4)


def test_adapters_on_other_weights_others_and_folders_without_any_are_refused(own_model, stories, tmp_path):
    loaded = models.load_model(str(own_model), device="cpu")
    preparation.with_adapters(loaded.model, TrainingConfig(method="lora"))
    models.save_model(loaded.model, loaded.tokenizer, tmp_path / "adapter")
    settings = config(own_model, stories, adapter=str(tmp_path / "adapter"))
    assert EvaluationExperiment.run(settings, run_dir=tmp_path / "fits")["n"] == 5
    with pytest.raises(ValueError, match="carries adapters already"):
        EvaluationExperiment.run(
            config(tmp_path / "adapter", stories, adapter=str(tmp_path / "adapter")), run_dir=tmp_path / "twice"
        )
    with pytest.raises(ValueError, match="adapter must be a local folder with adapter_config.json"):
        EvaluationExperiment.run(config(own_model, stories, adapter=str(own_model)), run_dir=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    state = load_file(own_model / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, own_model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="were trained on other weights"):
        EvaluationExperiment.run(settings, run_dir=tmp_path / "changed")
    with pytest.raises(ValueError, match="were trained on other weights"):
        models.load_model(str(tmp_path / "adapter"), device="cpu")


# ------------------------------------------------------------------------------------------------ perplexity


def nats_by_hand(loaded, text: str) -> tuple[float, int]:
    """Summed nats and number of the tokens of a short text behind the first token, from the model's own logits."""
    ids = loaded.tokenizer(text)["input_ids"]
    with torch.inference_mode():
        logs = loaded.model(input_ids=torch.tensor([[scoring.first_token(loaded.tokenizer), *ids]])).logits
    logs = logs[0].double().log_softmax(-1)
    return -sum(logs[at, token].item() for at, token in enumerate(ids)), len(ids)


def test_perplexity_is_exp_of_all_nats_per_token_byte_and_word(model_folders, tmp_path):
    loaded = models.load_model(str(model_folders["llama"]), device="cpu", dtype="float32")
    texts = ["Leo had a bell. He rang it.", "Dora \u00fcbt  in the sea.", "Ran."]
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    found = evaluate(loaded.model, loaded.tokenizer, "perplexity", path)
    nats, tokens = zip(*(nats_by_hand(loaded, text) for text in texts), strict=True)
    assert [line["tokens"] for line in found["predictions"]] == list(tokens)
    assert [-line["loglikelihood"] for line in found["predictions"]] == pytest.approx(nats, abs=1e-4)
    assert (found["bytes"], found["words"]) == (27 + 22 + 4, 7 + 5 + 1)
    for name, units in (("perplexity", sum(tokens)), ("byte_perplexity", 53), ("word_perplexity", 13)):
        assert found[name] == pytest.approx(math.exp(sum(nats) / units), rel=1e-5)
        assert found[f"{name}_interval"]["low"] <= found[name] <= found[f"{name}_interval"]["high"]
        assert found[f"{name}_interval"]["over"] == "documents"


def test_a_text_longer_than_the_model_is_scored_to_its_last_token(model_folders, tmp_path):
    loaded = models.load_model(str(model_folders["gpt2"]), device="cpu", dtype="float32")
    path = tmp_path / "long.txt"
    path.write_text("The dog ran to the sea. " * 100)
    (line,) = evaluate(loaded.model, loaded.tokenizer, "perplexity", path)["predictions"]
    tokens = len(loaded.tokenizer(path.read_text())["input_ids"])
    assert line["tokens"] == tokens > 2 * scoring.longest_text(loaded.model)


def test_a_run_of_perplexity_says_on_how_many_tokens_and_a_second_model_is_compared_on_the_same_texts(
    own_model, tmp_path
):
    runs = [tmp_path / "a", tmp_path / "b"]
    first = EvaluationExperiment.run(
        EvaluationConfig(model=str(own_model), task="perplexity", data="bundled", limit=6, device="cpu"),
        run_dir=runs[0],
    )
    assert first["protocol"]["generated"] and first["n"] == 6 and first["tokens"] > 100
    assert first["all_facts_hold"] and first["facts"][0]["name"] == "texts_score_as_the_model_reads_them"
    assert "perplexity" in first["verdict"] and "6 documents" in first["verdict"]
    weights = load_file(own_model / "model.safetensors")
    save_file(
        {name: tensor * 1.1 for name, tensor in weights.items()},
        own_model / "model.safetensors",
        metadata={"format": "pt"},
    )
    second = EvaluationExperiment.run(
        EvaluationConfig(model=str(own_model), task="perplexity", data="bundled", limit=6, device="cpu"),
        run_dir=runs[1],
    )
    tests, problems = predictions.compare_runs(runs)
    assert not problems and {test["measure"] for test in tests} == {"perplexity", "byte_perplexity", "word_perplexity"}
    for test in tests:
        name = test["measure"]
        assert (test["a"], test["b"]) == pytest.approx((first[name], second[name]))
        assert test["difference"]["mean"] == pytest.approx(first[name] - second[name]) != 0
        assert "mcnemar_p" not in test


def test_texts_without_a_number_have_no_perplexity_and_texts_without_words_are_refused(model_folders, tmp_path):
    loaded = models.load_model(str(model_folders["gpt2"]), device="cpu", dtype="float32")
    with torch.no_grad():
        next(loaded.model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="2 of 2 texts, the first with id 0"):
        evaluate(loaded.model, loaded.tokenizer, "perplexity", "bundled", limit=2)
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "The dog."}\n{"text": "  "}\n')
    with pytest.raises(ValueError, match="line 2 needs a text that is not empty"):
        evaluate(loaded.model, loaded.tokenizer, "perplexity", path)
    with pytest.raises(ValueError, match="takes no shots, got 2"):
        evaluate(loaded.model, loaded.tokenizer, "perplexity", "bundled", shots=2)
