"""Does a comparison ask, tune and ask again what it says, on unseen dialogues, once, and report a fault in itself?"""

from __future__ import annotations

import csv
import json
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from nbhelpers import (
    catalogue,
    comparison_answers,
    comparison_before,
    comparison_data,
    comparison_pace,
    comparison_said,
    generated,
    generated_dialogues,
    kept_answers,
    merging,
    model_card,
    models,
    prompts,
)
from nbhelpers.commands_comparison import show_comparison
from nbhelpers.comparison import Comparison
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.runs import read_run
from nbhelpers.tracking import Interrupted

CANARY = "zanzibar-canary-7"
SMALL = {
    "llm_models": "small-llama",
    "slm_models": "tiny-llama",
    "max_train_samples": 24,
    "max_eval_samples": 18,
    "method": "full",
    "learning_rate": 2e-3,
    "epochs": 1,
    "window": 256,
    "new_tokens": 6,
    "latency_requests": 2,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def dialogues_file(tmp_path_factory):
    """84 bundled dialogues of the labels that have most, as a user's csv; each names the canary."""
    rows = generated_dialogues.rows()
    often = sorted({row["ICD10"] for row in rows}, key=lambda code: -sum(row["ICD10"] == code for row in rows))[:6]
    path = tmp_path_factory.mktemp("dialogues") / "talks.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([" Dialogue", "ICD10"])
        for code in often:
            for row in [row for row in rows if row["ICD10"] == code][:14]:
                writer.writerow([f"{row['Dialogue']}\nDoctor: Thank you, {CANARY}.", code])
    return path


def config(file, **fields) -> ComparisonConfig:
    return ComparisonConfig(**({"data": str(file)} | SMALL | fields))


@pytest.fixture(scope="session")
def done(dialogues_file, tmp_path_factory):
    """(config, result, root) of a small whole comparison."""
    root = tmp_path_factory.mktemp("comparisons")
    asked = config(dialogues_file, break_even_points=1, ensemble=True)
    heard = []
    return asked, Comparison.run(asked, root=root, progress=heard.append), root, heard


def results(result) -> dict:
    with open(f"{result['run_dir']}/results.json", encoding="utf-8") as file:
        return json.load(file)


def lines_of(result, key="SLM_tiny-llama_finetuned") -> list[dict]:
    with open(f"{result['run_dir']}/models/{key}/predictions.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def no_model(*_, **__):
    raise AssertionError("a model was loaded")


# ------------------------------------------------------------------------------------------------ what it leaves


def test_results_have_an_entry_for_each_state_and_baseline(done):
    _, result, _, _ = done
    assert set(results(result)) == {
        "LLM_small-llama_untrained",
        "SLM_tiny-llama_zero_shot",
        "SLM_tiny-llama_finetuned",
        "BASELINE_majority",
        "BASELINE_nearest",
        "BASELINE_tfidf_linear",
        "ENSEMBLE_small-llama_tiny-llama",
    }
    together = results(result)["ENSEMBLE_small-llama_tiny-llama"]
    assert together["model"] == "small-llama + tiny-llama"
    assert together["exact_match_accuracy"] is together["no_valid_answer"] is None, "it ranks, and writes nothing"


def test_an_entry_says_what_it_is_and_what_was_measured(done):
    entry = results(done[1])["SLM_tiny-llama_finetuned"]
    assert (entry["model_type"], entry["training_status"], entry["precision"]) == ("SLM", "finetuned", "float32")
    assert entry["n_samples"] == 18 and entry["training_metrics"]["rows"] == 24
    assert entry["parameters"] == 430_944 and entry["model_size"] == "431K parameters"
    assert entry["performance"]["latency"]["n"] == 2 and entry["performance"]["dialogues_per_second"] > 0
    assert entry["memory"]["weights_bytes"] == 4 * 430_944
    assert entry["performance"]["came"] == "measured" and "(cpu)" in entry["performance"]["device"]
    assert results(done[1])["LLM_small-llama_untrained"]["training_metrics"] is None
    assert results(done[1])["BASELINE_majority"]["memory"] is None, "what was not measured is null"


def test_every_state_answered_the_same_documents_in_the_same_order(done):
    _, result, _, _ = done
    ids = {}
    for key, entry in result["models"].items():
        if entry["predictions"] is not None:
            with open(f"{result['run_dir']}/{entry['predictions']}", encoding="utf-8") as file:
                ids[key] = [json.loads(line)["id"] for line in file]
    assert len(ids) == 6 and len({tuple(one) for one in ids.values()}) == 1


def test_all_facts_hold_and_the_tuning_was_as_the_asking(done):
    _, result, _, _ = done
    assert result["all_facts_hold"]
    names = {(fact.get("model"), fact["name"]) for fact in result["facts"]}
    tuned = "SLM_tiny-llama_finetuned"
    for name in ("trained_as_asked", "loss_is_the_models_own", "saved_model_is_the_same", "choices_score_as_alone"):
        assert (tuned, name) in names
    assert (None, "test_is_unseen") in names


def test_the_verdict_stands_with_its_interval_beside_the_baselines(done):
    answer = done[1]["answer"]
    assert answer["answer"] in ("yes", "no", "cannot tell") and answer["n"] == 18
    assert answer["difference"]["low"] <= answer["difference"]["mean"] <= answer["difference"]["high"]
    assert answer["baselines"]["best"].startswith("BASELINE_")


def test_the_break_even_curve_goes_from_no_dialogues_to_all(done):
    curve = done[1]["break_even"]
    assert [point["rows"] for point in curve["points"]] == [0, 12, 24]
    assert curve["large"]["accuracy"] == done[1]["models"]["LLM_small-llama_untrained"]["top_1_accuracy"]


def test_validation_dialogues_that_chose_the_steps_are_said_beside_the_curve(done):
    curve, validation = done[1]["break_even"], done[1]["data"]["rows"]["validation"]
    assert (curve["validation_rows"], curve["shots"]) == (validation, 0) and 0 < validation <= 64
    assert f"Plus {validation} validation dialogues" in curve["sentence"]


def test_the_estimate_of_a_tuning_is_of_one_micro_batch_and_the_models_own_rank(dialogues_file):
    def estimated(micro_batch: int | None, rank: int | None) -> int:
        small = [{"name": "tiny-llama", "lora_rank": rank}]
        asked = config(dialogues_file, slm_models=small, method="lora", batch_size=8, micro_batch_size=micro_batch)
        made = Comparison(comparison_data.prepared(asked), None, None, None)
        (model,) = asked.slm_models
        tuning = made._tuning(model, made.on.train)
        asking = comparison_answers.Asking("k", model, made.on.prompts(model), {}, (), tuning)
        return made._estimated(asking)["bytes"]

    logits = 14 * models.load_config("tiny-llama").vocab_size * 256  # bytes of one row of 256 tokens
    assert estimated(None, None) - estimated(1, None) > 7 * logits
    assert estimated(8, None) == estimated(None, None)
    assert estimated(1, 64) > estimated(1, None) == estimated(1, 16)


def test_progress_names_the_phase_and_the_model_at_work(done):
    stages = [(now["stage"], now.get("key")) for now in done[3]]
    order = [key for stage, key in stages if stage == "answered"]
    assert order[:3] == ["BASELINE_majority", "BASELINE_nearest", "BASELINE_tfidf_linear"]
    small = ["SLM_tiny-llama_zero_shot", "SLM_tiny-llama_finetuned", "SLM_tiny-llama_on_12"]
    assert order[3:] == ["LLM_small-llama_untrained", *small]
    answering = [now for now in done[3] if now["stage"] == "answering" and now["key"] == "SLM_tiny-llama_finetuned"]
    right = sum(line["ranked"][0] in line["gold"] for line in lines_of(done[1]))
    assert (answering[-1]["right"], answering[-1]["asked"]) == (right, 18)
    assert ("tuning", "SLM_tiny-llama_finetuned") in stages


def test_the_tuned_model_loads_in_plain_transformers(done):
    from transformers import AutoModelForCausalLM

    folder = done[1]["models"]["SLM_tiny-llama_finetuned"]["model_dir"]
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 430_944


@pytest.fixture(scope="session")
def in_4_bits(dialogues_file, tmp_path_factory):
    """The result of a small model tuned in 4 bits, twice: the second one's answers come from before."""
    pytest.importorskip("bitsandbytes")
    root, small = tmp_path_factory.mktemp("in_4_bits"), [{"name": "tiny-llama", "load_in_4bit": True}]
    asked = config(dialogues_file, experiment="training", slm_models=small, max_eval_samples=6)
    return [Comparison.run(asked, root=root) for _ in range(2)]


def test_the_best_small_model_is_handed_over_whole_where_it_was_tuned_in_4_bits(in_4_bits):
    from transformers import AutoModelForCausalLM

    result, key = in_4_bits[0], "SLM_tiny-llama_finetuned"
    assert result["merged"]["key"] == key and result["all_facts_hold"], result["facts"]
    assert "merged_model_computes_the_same" in {fact["name"] for fact in result["facts"]}
    folder = Path(result["run_dir"]) / "models" / key / "merged"
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 430_944
    card = (folder / "README.md").read_text()
    assert "a whole model, for plain transformers" in card and "AutoModelForCausalLM.from_pretrained" in card
    assert "models.load_model('.')" in (folder.parent / "model" / "README.md").read_text()
    assert comparison_said.left(result).endswith(f"models/{key}/merged")


def test_a_run_whose_answers_come_from_before_merges_nothing_and_has_the_same_results(in_4_bits):
    assert "merged" not in in_4_bits[1] and results(in_4_bits[0]) == results(in_4_bits[1])


def test_where_the_disk_is_full_the_adapters_stand_alone_and_it_is_said(dialogues_file, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")

    def full(*_, **__):
        raise OSError("cannot write model folder: No space left on device")

    monkeypatch.setattr(merging, "merge", full)
    small = [{"name": "tiny-llama", "load_in_4bit": True}]
    asked = config(dialogues_file, experiment="training", slm_models=small, max_eval_samples=6)
    result = Comparison.run(asked, root=tmp_path)
    assert "No space left on device" in result["merged"]["error"]
    assert (Path(result["run_dir"]) / "models" / result["merged"]["key"] / "model" / "adapter_config.json").is_file()
    assert "not merged, adapters alone: cannot write model folder" in show_comparison(result)
    assert [event["kind"] for event in read_run(result["run_dir"]).events].count("merging_failed") == 1


def test_no_dialogue_stands_in_what_a_run_leaves(done):
    root = done[2]
    for path in root.rglob("*"):
        if path.is_file():
            assert CANARY.encode() not in path.read_bytes(), path


# ------------------------------------------------------------------------------------------------ answers from before


def test_a_second_run_loads_no_model_and_gives_the_identical_results(done, monkeypatch):
    asked, first, root, _ = done
    monkeypatch.setattr(models, "load_model", no_model)
    second = Comparison.run(asked, root=root)
    assert second["run_dir"] != first["run_dir"]
    assert results(second) == results(first)
    assert {phase["came"] for phase in second["phases"] if phase["name"] != "baselines"} == {"cached"}


@pytest.mark.parametrize(
    "change",
    [
        {"system_prompt": "Say the code."},
        {"shots": 1, "window": 400},
        {"new_tokens": 7},
        {"cache": False},
        {"window": 200},
    ],
)
def test_what_decides_an_answer_is_asked_anew(done, dialogues_file, monkeypatch, change):
    _, _, root, _ = done
    monkeypatch.setattr(models, "load_model", no_model)
    with pytest.raises(AssertionError, match="a model was loaded"):
        Comparison.run(config(dialogues_file, **change), root=root)


@pytest.mark.parametrize("change", [{"epochs": 2}, {"learning_rate": 1e-3}, {"seed": 1}, {"max_train_samples": 20}])
def test_another_training_is_not_answered_from_before(done, dialogues_file, change):
    asked, _, _, _ = done
    other = config(dialogues_file, **change)
    identities = []
    for one in (asked, other):
        on = comparison_data.prepared(one)
        tuning = comparison_answers.Tuning(on.train, on.validation, one.training(one.slm_models[0], len(on.train)))
        asking = comparison_answers.Asking("k", one.slm_models[0], on.prompts(one.slm_models[0]), {}, (), tuning)
        identities.append(comparison_answers.identity(asking, one)["tuning"])
    assert identities[0] != identities[1]


def test_answers_that_are_too_old_or_torn_do_not_serve(done, tmp_path):
    _, _, root, _ = done
    place = sorted((root / ".predictions").glob("coding-*"))[0]
    assert kept_answers.read(place) is not None
    assert kept_answers.read(place, oldest_days=1e-9) is None
    copy = tmp_path / place.name
    copy.mkdir()
    for file in place.iterdir():
        (copy / file.name).write_bytes(file.read_bytes()[:-20])
    assert kept_answers.read(copy) is None


def test_answers_of_a_tuned_model_that_is_gone_do_not_serve(done, tmp_path):
    root = done[2]
    kept = [kept_answers.read(place) for place in sorted((root / ".predictions").glob("coding-*"))]
    (tuned,) = [one for one in kept if one.about["model_dir"]]
    tuning = comparison_answers.Tuning((), (), None)
    asking = comparison_answers.Asking("k", None, None, {}, (), tuning)
    assert comparison_answers._lost_model(asking, tuned) is None
    tuned.about["model_dir"] = str(tmp_path / "gone")
    assert comparison_answers._lost_model(asking, tuned) == str(tmp_path / "gone")


def test_clearing_deletes_kept_answers_and_nothing_else(tmp_path):
    (tmp_path / ".predictions" / "coding-1").mkdir(parents=True)
    (tmp_path / ".predictions" / "other.json").write_text("{}")
    assert kept_answers.clear(tmp_path, older_than_days=1) == 0
    assert kept_answers.clear(tmp_path) == 1
    assert [path.name for path in (tmp_path / ".predictions").iterdir()] == ["other.json"]


# ------------------------------------------------------------------------------------------------ stopped, and gone on


def test_a_run_that_was_stopped_goes_on_and_ends_as_one_that_was_not(done, dialogues_file, tmp_path):
    asked, whole, _, _ = done
    seen = []

    def stop() -> bool:
        return len(seen) > 60

    with pytest.raises(Interrupted):
        Comparison.run(asked, run_dir=tmp_path / "run", progress=seen.append, should_stop=stop)
    assert not (tmp_path / "run" / "result.json").exists()
    again = Comparison.run(asked, run_dir=tmp_path / "run", resume=True)
    for key, entry in results(whole).items():
        for name in ("top_1_accuracy", "exact_match_accuracy", "macro_f1", "errors"):
            assert results(again)[key][name] == entry[name], (key, name)


def test_a_run_whose_disk_was_full_at_its_model_cards_is_not_finished_and_resumes_to_them(tiny, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError("No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(model_card, "write", full)
        with pytest.raises(OSError, match="No space left"):
            Comparison.run(tiny, run_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists() and read_run(tmp_path / "run").status == "failed"
    monkeypatch.setattr("nbhelpers.training.fine_tune", no_model)
    Comparison.run(tiny, run_dir=tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "models" / "SLM_tiny-llama_finetuned" / "model" / "README.md").is_file()


# ------------------------------------------------------------------------------------------------ sabotage


@pytest.fixture
def tiny(dialogues_file):
    return config(
        dialogues_file,
        experiment="training",
        baselines="majority",
        break_even_points=0,
        max_train_samples=8,
        max_eval_samples=6,
        answers="ranking",
        latency_requests=1,
        cache=False,
    )


def test_a_prompt_that_differs_in_training_is_reported_as_failed(tiny, tmp_path, monkeypatch):
    honest = prompts.Prompts.row

    def other(self, dialogue, label):
        return honest(self, dialogue.replace("Doctor:", "D:"), label)

    monkeypatch.setattr(prompts.Prompts, "row", other)
    result = Comparison.run(tiny, root=tmp_path)
    assert not result["all_facts_hold"]
    assert [fact["name"] for fact in result["facts"] if not fact["ok"]] == ["trained_as_asked"]


def test_a_prompt_in_the_loss_is_reported_as_failed(tiny, tmp_path, monkeypatch):
    honest = prompts.Prompts.row
    monkeypatch.setattr(
        prompts.Prompts,
        "row",
        lambda self, dialogue, label: (row := honest(self, dialogue, label)) | {"labels": row["input_ids"].clone()},
    )
    result = Comparison.run(tiny, root=tmp_path)
    failed = {fact["name"] for fact in result["facts"] if not fact["ok"]}
    assert failed == {"trained_as_asked", "loss_is_on_the_completion_alone"}


def test_answers_whose_facts_fail_are_not_kept(tiny, tmp_path, monkeypatch):
    honest = prompts.Prompts.row
    monkeypatch.setattr(prompts.Prompts, "row", lambda self, dialogue, label: honest(self, dialogue + " x", label))
    Comparison.run(tiny, root=tmp_path)
    assert len(list((tmp_path / ".predictions").glob("coding-*"))) == 1, "the untuned model's alone"


# ------------------------------------------------------------------------------------------------ one side, budget


def test_one_side_alone_decides_nothing(tiny, tmp_path):
    result = Comparison.run(tiny, root=tmp_path)
    assert not any(key.startswith("LLM") for key in result["models"])
    assert "the other side was not evaluated, so nothing is decided" in result["verdict"]
    assert result["answer"]["answer"] == "cannot tell" and result["break_even"] is None


def test_a_budget_chooses_rows_and_says_what_they_can_tell(dialogues_file, tmp_path):
    asked = config(dialogues_file, budget="10m", epochs=2, break_even_points=0, baselines="majority", answers="ranking")
    result = Comparison.run(asked, root=tmp_path)
    assert result["budget"]["test_rows"] == 18 and result["budget"]["epochs"] == 2
    assert "the smallest difference" in result["budget"]["text"]
    expected = {phase["model"]: phase["estimated_seconds"] for phase in result["phases"]}
    assert expected["SLM_tiny-llama_finetuned"] > expected["SLM_tiny-llama_zero_shot"] > 0
    assert expected["BASELINE_majority"] is None
    with pytest.raises(ValueError, match="a budget of .* is too short"):
        Comparison.run(asked.model_copy(update={"budget": "1s"}), run_dir=tmp_path / "short" / "run")
    assert not (tmp_path / "short").exists(), "a refused budget leaves nothing that would refuse the next try"
    again = Comparison.run(asked, run_dir=tmp_path / "short" / "run")
    assert Path(again["run_dir"], "budget.json").is_file() and again["budget"]["test_rows"] == 18


def test_a_folder_that_is_taken_is_refused_before_rates_are_measured(dialogues_file, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("x")
    monkeypatch.setattr(models, "load_model", no_model)
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        Comparison.run(config(dialogues_file, budget="9m"), run_dir=tmp_path)


def test_the_same_budget_again_chooses_from_before_and_loads_no_model(dialogues_file, tmp_path, monkeypatch):
    asked = config(
        dialogues_file, experiment="baseline", budget="9m", baselines="majority", answers="ranking", max_eval_samples=6
    )
    first = Comparison.run(asked, root=tmp_path)
    monkeypatch.setattr(models, "load_model", no_model)
    second = Comparison.run(asked, root=tmp_path)
    assert second["budget"] == first["budget"] and results(second) == results(first)


def test_stop_while_rates_are_measured_is_an_interruption(dialogues_file, tmp_path):
    heard = []
    with pytest.raises(Interrupted):
        Comparison.run(
            config(dialogues_file, budget="9m"),
            root=tmp_path,
            progress=heard.append,
            should_stop=lambda: bool(heard) and heard[-1]["stage"] == "measuring rates",
        )


@pytest.fixture(params=[1, 3])
def labels_each(request, tmp_path):
    """(number of labels that each dialogue has, what is asked of those dialogues)."""
    file, labels = tmp_path / "several.jsonl", ["ache", "burn", "cold"]
    rows = [
        {"dialogue": f"Patient: It is number {n}, {n} times.", "label": (labels[n % 3 :] + labels)[: request.param]}
        for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return request.param, config(file, several="any", answers="ranking", batch_size=2, experiment="training")


def test_a_training_dialogue_is_expected_to_take_as_long_as_all_its_labels(labels_each, monkeypatch):
    number, asked = labels_each
    made = comparison_data.prepared(asked)
    monkeypatch.setattr(comparison_pace, "time", SimpleNamespace(perf_counter=count().__next__))  # a step, a second
    assert comparison_pace.rates(made, lambda *_, **__: None).training_seconds == {"SLM_tiny-llama": number / 2}
    pace = comparison_before._Pace(asked, "tiny-llama", made.data)
    pace.read, pace.kernels = 1.0, 0.0  # seconds
    steps, validations = 8 * (1 + comparison_before.durations.BACKWARD), 2 * 5  # one epoch, validated before and after
    assert pace.tuning(8, 5) == pytest.approx(number * (steps + validations))


def test_training_alone_tunes_each_model_once(tiny, tmp_path):
    result = Comparison.run(tiny.model_copy(update={"break_even_points": 2}), root=tmp_path)
    assert [phase["name"] for phase in result["phases"]] == ["baselines", "slm_zero_shot", "slm_finetuning"]


def test_large_models_can_be_tuned_too(dialogues_file, tmp_path):
    asked = config(
        dialogues_file,
        experiment="baseline",
        fine_tune_llms=True,
        llm_models="tiny-opt",
        baselines="majority",
        answers="ranking",
        max_train_samples=8,
        max_eval_samples=6,
        latency_requests=1,
    )
    result = Comparison.run(asked, root=tmp_path)
    tuned = result["models"]["LLM_tiny-opt_finetuned"]
    assert tuned["training_status"] == "finetuned" and tuned["training_metrics"]["rows"] == 8


def test_shots_stand_in_every_prompt_and_are_not_taught(dialogues_file):
    on = comparison_data.prepared(config(dialogues_file, shots=2, window=512, slm_models="tiny-llama"))
    assert len(on.train) == 24 - 2 and not set(on.shots) & {*on.train, *on.validation, *on.test}
    assert all(row.text in on.prompts(on.config.slm_models[0]).text("x") for row in on.shots)


def test_a_shot_of_a_row_with_several_labels_shows_its_first(tmp_path):
    file = tmp_path / "several.jsonl"
    rows = [
        {"dialogue": f"Patient: It is number {n}, {n} times.", "label": ["b", "a"][:: 1 - 2 * (n % 2)]}
        for n in range(12)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    on = comparison_data.prepared(config(file, shots=2, several="any", max_train_samples=None, window=400))
    assert [label for _, label in on.wording().shots] == [row.labels[0] for row in on.shots]


# ------------------------------------------------------------------------------------------------ a list of labels


@pytest.fixture(scope="session")
def listed(dialogues_file, tmp_path_factory):
    """A text file with the six codes of the dialogues and one that no row has."""
    codes = sorted({row.labels[0] for row in comparison_data.prepared(config(dialogues_file)).data.rows})
    path = tmp_path_factory.mktemp("labels") / "codes.txt"
    path.write_text("\n".join([*codes, "Z99.9"]))
    return path


def test_every_label_of_the_list_is_ranked_also_one_that_no_row_has(dialogues_file, listed, tmp_path):
    asked = config(dialogues_file, labels=str(listed), experiment="baseline", answers="ranking", max_eval_samples=4)
    result = Comparison.run(asked, root=tmp_path)
    assert result["data"]["labels"] == 7 and result["data"]["chance"] == pytest.approx(1 / 7)
    for key in ("LLM_small-llama_untrained", "BASELINE_nearest"):
        assert all(len(line["ranked"]) == 7 and "Z999" in line["ranked"] for line in lines_of(result, key))
    assert "1 of the labels given stand at no row" in " ".join(result["data"]["cleaning"]["says"])
    run = read_run(result["run_dir"])
    assert run.config["labels"] == str(listed) and "labels" in run.manifest["fingerprints"]


def test_another_label_list_is_not_answered_from_before(dialogues_file, listed):
    identities = []
    for one in (config(dialogues_file), config(dialogues_file, labels=str(listed))):
        on = comparison_data.prepared(one)
        asking = comparison_answers.Asking("k", one.slm_models[0], on.prompts(one.slm_models[0]), {}, ())
        identities.append(comparison_answers.identity(asking, one)["prompts"]["answers"])
    assert identities[0] != identities[1]


# ------------------------------------------------------------------------------------------------ licences and gates


def test_licence_and_gate_are_those_of_the_catalogue_and_unknown_where_it_has_none(tmp_path):
    (tmp_path / "own").symlink_to(models.locate("tiny-llama")[1])
    names = ["Llama-3.1-8B-Instruct", "owner/model", str(tmp_path / "own")]
    found = comparison_data.licences(ComparisonConfig(llm_models=names, slm_models="tiny-llama"))
    assert found == {
        "Llama-3.1-8B-Instruct": {"licence": "llama3.1", "gated": True},
        "owner/model": {"licence": "unknown", "gated": None},
        str(tmp_path / "own"): {"licence": "unknown", "gated": False},
        "tiny-llama": {"licence": "mit", "gated": False},
    }
    assert "owner/model" not in comparison_data.licences(ComparisonConfig(llm_models=names, experiment="training"))


@pytest.mark.parametrize(
    ("name", "token", "reason", "offered"),
    [
        ("Llama-3.1-8B-Instruct", "absent", "cannot load it", True),
        ("owner/model", "absent", "You are trying to access a gated repo", True),
        ("Llama-3.1-8B-Instruct", "present", "cannot load it", False),
        ("owner/model", "absent", "no such repository", False),
        ("Qwen2.5-7B-Instruct", "absent", "no connection", False),
    ],
)
def test_a_gated_model_without_a_token_is_refused_with_what_is_open(monkeypatch, name, token, reason, offered):
    def refused(_):
        raise ValueError(reason)

    monkeypatch.setattr(models, "load_config", refused)
    monkeypatch.setattr(catalogue, "token_state", lambda: token)
    with pytest.raises(ValueError, match=reason) as error:
        comparison_data.prepared(ComparisonConfig(llm_models=name))
    free = [model.name for role in ("llm", "slm") for model in catalogue.open_set(role)]
    assert ("set HF_TOKEN" in str(error.value)) is offered and all((one in str(error.value)) is offered for one in free)


# ------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"label_column": "code"}, "code"),
        ({"labels": "nowhere.txt"}, "nowhere.txt"),
        ({"llm_models": "smal-llama"}, "Did you mean 'small-llama'"),
        ({"data": "talks.pdf"}, "talks.pdf"),
        ({"shots": 20, "max_train_samples": 200, "data": "bundled", "window": 256}, "give fewer shots"),
        ({"window": 40}, "leaves nothing of a window of 40"),
        ({"max_train_samples": 2, "shots": 3}, "shots must be fewer than the 2 training dialogues, got 3"),
    ],
)
def test_what_cannot_be_run_is_said_before_a_run_directory_exists(dialogues_file, tmp_path, monkeypatch, fields, says):
    monkeypatch.setattr(models, "load_model", no_model)
    with pytest.raises((ValueError, LookupError, OSError)) as error:
        Comparison.run(config(dialogues_file, **fields), root=tmp_path)
    assert says in str(error.value) and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ seen before


def test_that_the_large_model_has_not_read_the_test_is_checked(done):
    (fact,) = [fact for fact in done[1]["facts"] if fact["name"] == "large_models_have_not_read_it"]
    assert fact["ok"] and fact["values"] == {"documents": 3000, "shared": 0}


def test_a_test_dialogue_out_of_the_large_models_training_text_is_reported_as_failed(tmp_path):
    """One label's dialogues are stories that small-llama was trained on."""
    stories = generated.documents(12, generated.MODEL_SEED)
    file = tmp_path / "read.csv"
    with file.open("w", newline="", encoding="utf-8") as target:
        writer = csv.writer(target)
        writer.writerow(["dialogue", "label"])
        writer.writerows([[text, "story"] for text in stories])
        writer.writerows([[f"Doctor: How is number {n}?\nPatient: It aches {n} times.", "pain"] for n in range(12)])
    asked = config(file, experiment="baseline", baselines="majority", answers="ranking", max_eval_samples=None)
    result = Comparison.run(asked, root=tmp_path / "runs")
    assert [fact["name"] for fact in result["facts"] if not fact["ok"]] == ["large_models_have_not_read_it"]


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """Three dialogues of each of four labels: two to train on, none to choose by, one to test."""
    path = tmp_path_factory.mktemp("few") / "few.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["dialogue", "label"])
        for label in ("cold", "pain", "rash", "sleep"):
            writer.writerows([[f"Patient: It is {label} number {n}, {n} days now.", label] for n in range(3)])
    return path


def test_too_few_dialogues_a_label_to_tune_on_are_refused_and_large_models_can_be_asked(few, tmp_path):
    with pytest.raises(ValueError, match="no label of .* has 4 dialogues or more"):
        Comparison.run(config(few), root=tmp_path / "tuned")
    result = Comparison.run(config(few, experiment="baseline", answers="ranking"), root=tmp_path / "asked")
    assert result["models"]["LLM_small-llama_untrained"]["n_samples"] == 4
    assert result["models"]["BASELINE_tfidf_linear"]["top_1_accuracy"] is not None
