"""Older configs and results come over whole: renamed, completed with nulls, and what has no place is said."""

from __future__ import annotations

import json

import pytest
import yaml

from nbhelpers import migration
from nbhelpers.comparison_config import ComparisonConfig

OLD = {
    "paths": {"data_dir": "/somewhere/data"},
    "data": {"dataset_name": "Ahmad0067/MedSynth", "dataset_split_seed": 42, "max_sequence_length": 512}
    | {"train_ratio": 0.7, "batch_size": 8},
    "model": {
        "baseline_llms": [
            {"name": "mistralai/Mistral-7B-Instruct-v0.3", "size": "7B", "description": "larger", "load_in_4bit": True},
            {"name": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "dtype": "torch.float16", "revision": "abc"},
        ],
        "slm_name": "meta-llama/Llama-3.2-3B-Instruct",
        "slm_dtype": "bf16",
        "slm_load_in_4bit": False,
        "max_new_tokens": 32,
        "temperature": 0.7,
    },
    "training": {"num_epochs": 2, "learning_rate": 1e-4, "per_device_train_batch_size": 4, "seed": 42}
    | {"gradient_accumulation_steps": 4, "lora_r": 8, "lora_alpha": 16, "lora_target_modules": ["q_proj", "v_proj"]}
    | {"use_lora": True, "gradient_checkpointing": True, "weight_decay": 0.01},
    "evaluation": {"max_eval_samples": 100, "evaluate_top_k": [1, 3, 5]},
    "experiment": {"experiment_name": "first", "seed": 42, "run_baseline_llm": True, "run_finetuned_slm": True},
}
RESULTS = {
    "Baseline_LLM_Llama-3.1-8B-Instruct": {"accuracy": 3.42, "f1_weighted": 0.021, "n_samples": 1537},
    "Baseline_Mistral-7B-Instruct-v0.3": {"exact_match": 2.05, "f1": 0.012, "num_samples": 1537},
    "Finetuned_SLM": {"model_name": "meta-llama/Llama-3.2-3B-Instruct", "accuracy": 0.20, "category_accuracy": 0.5},
    "Finetuned_Qwen2.5-3B-Instruct": {"metrics": {"exact_match": 0.0}, "training_metrics": {"train_loss": 1.5}},
    "SLM_zero_shot": {"model": "tiny", "accuracy": None, "top_3": 0.25},
}


# configs --------------------------------------------------------------------------------------------------------------


def test_an_older_config_in_sections_says_the_same_in_todays_fields_and_runs_today():
    found = migration.migrate(OLD)
    assert found.kind == "config"
    assert found.document == {
        "llm_models": [
            {"name": "mistralai/Mistral-7B-Instruct-v0.3", "size": "7B", "description": "larger", "load_in_4bit": True},
            {"name": "Qwen/Qwen2.5-3B-Instruct", "load_in_4bit": True, "dtype": "float16"},
        ],
        "slm_models": [
            {
                "name": "meta-llama/Llama-3.2-3B-Instruct",
                "load_in_4bit": False,
                "dtype": "bfloat16",
                "lora_targets": ["q_proj", "v_proj"],
            }
        ],
        "data": "Ahmad0067/MedSynth",
        "window": 512,
        "new_tokens": 32,
        "epochs": 2,
        "learning_rate": 1e-4,
        "batch_size": 16,
        "micro_batch_size": 4,
        "lora_rank": 8,
        "lora_alpha": 16,
        "method": "lora",
        "gradient_checkpointing": True,
        "max_eval_samples": 100,
        "name": "first",
        "experiment": "full",
        "seed": 42,
    }
    config = ComparisonConfig(**found.document)
    assert (config.lora_rank, config.slm_models[0].lora_targets) == (8, ("q_proj", "v_proj"))
    assert not [note for note in found.notes if "refuses" in note]


def test_what_has_no_place_today_is_kept_as_it_stood_and_named_in_a_note():
    found = migration.migrate(OLD)
    assert found.unknown == {
        "paths.data_dir": "/somewhere/data",
        "data.train_ratio": 0.7,
        "data.batch_size": 8,
        "model.temperature": 0.7,
        "training.weight_decay": 0.01,
        "evaluation.evaluate_top_k": [1, 3, 5],
        "baseline_llms[Qwen/Qwen2.5-3B-Instruct].revision": "abc",
    }
    for key, value in found.unknown.items():
        assert f"{key} has no place today and is left out: it was {json.dumps(value)}" in found.notes


def test_every_setting_of_the_old_file_is_in_the_new_one_or_among_the_unknown():
    """Change each old setting on its own: something must come out otherwise."""
    whole = migration.migrate(OLD)
    same = []
    for section, settings in OLD.items():
        for key in settings:
            without = {name: dict(values) for name, values in OLD.items()}
            del without[section][key]
            found = migration.migrate(without)
            if (found.document, found.unknown) == (whole.document, whole.unknown):
                same.append(key)
    # three seeds of one value and the switches that are on by default decide nothing alone
    assert set(same) <= {"seed", "dataset_split_seed", "run_baseline_llm", "run_finetuned_slm"}


@pytest.mark.parametrize("given", ["gpt2", ["gpt2"], [{"name": "gpt2"}]])
@pytest.mark.parametrize("key", ["baseline_llms", "baseline_llm", "baseline_llm_names"])
def test_large_models_come_as_a_name_as_names_or_as_entries(given, key):
    found = migration.migrate({key: given, "slm_name": "distilgpt2", "slm_size": "82M"})
    assert found.document["llm_models"] == [{"name": "gpt2"}]
    assert found.document["slm_models"] == [{"name": "distilgpt2", "size": "82M"}]
    assert any(note.startswith("gpt2: load_in_4bit is not in the old file") for note in found.notes)


def test_4_bits_that_stand_once_beside_the_models_hold_for_each_that_does_not_say_otherwise():
    old = {"baseline_llms": ["a", {"name": "b", "load_in_8bit": True}], "slm_name": "c", "load_in_4bit": True}
    found = migration.migrate(old)
    assert found.document["llm_models"] == [{"name": "a", "load_in_4bit": True}, {"name": "b", "load_in_8bit": True}]
    assert found.document["slm_models"] == [{"name": "c", "load_in_4bit": True}]
    assert "load_in_4bit: true stands at each of llm_models now that had neither: a" in found.notes
    assert not found.unknown and not [note for note in found.notes if "not in the old" in note or "no place" in note]
    own = migration.migrate({"llm_models": ["a"], "slm_models": ["c"], "slm_load_in_4bit": False, "model": old})
    assert own.document["llm_models"][0] == {"name": "a", "load_in_4bit": True}
    assert migration.migrate({"slm_name": "c", "slm_load_in_4bit": False, "load_in_4bit": True}).document[
        "slm_models"
    ] == [{"name": "c", "load_in_4bit": False}], "its own setting counts"


def test_the_batches_of_the_old_data_loader_are_not_those_of_training():
    found = migration.migrate({"slm_name": "a", "data": {"batch_size": 64}})
    assert "batch_size" not in found.document and found.unknown == {"data.batch_size": 64}


def test_seeds_that_differ_are_told_and_the_experiments_own_counts():
    found = migration.migrate({"slm_name": "a", "experiment": {"seed": 1}, "training": {"seed": 2}})
    assert found.document["seed"] == 1
    assert "there is one seed now, 1; the old file had experiment.seed 1, training.seed 2" in found.notes


@pytest.mark.parametrize(
    ("switches", "experiment"),
    [
        ({"run_baseline_llm": True, "run_finetuned_slm": False}, "baseline"),
        ({"run_baseline_llm": False, "run_finetuned_slm": True}, "training"),
        ({"run_finetuned_slm": True}, "full"),
    ],
)
def test_the_old_switches_are_one_experiment(switches, experiment):
    assert migration.migrate({"slm_name": "a", "experiment": switches}).document["experiment"] == experiment


def test_a_config_that_would_compare_nothing_is_refused():
    with pytest.raises(ValueError, match="are both false: nothing would be compared"):
        migration.migrate({"slm_name": "a", "run_baseline_llm": False, "run_finetuned_slm": False})


def test_what_todays_config_refuses_is_said_in_a_note():
    found = migration.migrate({"slm_name": "a", "lora_r": -1})
    assert found.document["lora_rank"] == -1
    assert any(note.startswith("today's config refuses it: lora_rank must be greater") for note in found.notes)


def test_a_config_of_today_stays_as_it_is():
    today = {"llm_models": [{"name": "gpt2", "load_in_4bit": True}], "slm_models": ["distilgpt2"], "epochs": 2.0}
    assert migration.migrate(today).document == today


def test_an_entry_without_a_name_is_refused():
    with pytest.raises(
        ValueError, match=r"baseline_llms must hold names or entries with a name, got \{\"size\": \"7B\""
    ):
        migration.migrate({"baseline_llms": [{"size": "7B"}]})


# results --------------------------------------------------------------------------------------------------------------


def test_old_result_keys_get_the_names_of_today():
    found = migration.migrate(RESULTS)
    assert found.kind == "results"
    assert list(found.document) == [
        "LLM_Llama-3.1-8B-Instruct_untrained",
        "LLM_Mistral-7B-Instruct-v0.3_untrained",
        "SLM_Llama-3.2-3B-Instruct_finetuned",
        "SLM_Qwen2.5-3B-Instruct_finetuned",
        "SLM_tiny_zero_shot",
    ]
    entry = found.document["SLM_Llama-3.2-3B-Instruct_finetuned"]
    assert (entry["model_type"], entry["training_status"], entry["came"]) == ("SLM", "finetuned", "migrated")
    assert found.document["SLM_Qwen2.5-3B-Instruct_finetuned"]["training_metrics"] == {"train_loss": 1.5}


def test_percent_is_told_from_fractions_for_all_accuracies_of_a_file_together_and_said():
    """0.20 beside 3.42 is 0.20 %, not 20 %, and so is a top-3 of 0.25; the f1 of the same file are fractions."""
    found = migration.migrate(RESULTS)
    exact = [entry["exact_match_accuracy"] for entry in found.document.values()]
    assert exact == pytest.approx([0.0342, 0.0205, 0.0020, 0.0, None])
    assert [entry["f1"] for entry in found.document.values()][:2] == [0.021, 0.012]
    accuracies = "exact_match_accuracy, category_accuracy, top_3_accuracy"
    assert f"{accuracies}: read as percent, 0-100, the largest value is 3.42" in found.notes
    assert "f1: read as fractions, 0-1, the largest value is 0.021" in found.notes


def test_whoever_knows_says_whether_shares_are_percent():
    found = migration.migrate({"Baseline_a": {"accuracy": 0.2}}, percent=True)
    assert found.document["LLM_a_untrained"]["exact_match_accuracy"] == pytest.approx(0.002)
    with pytest.raises(ValueError, match="exact_match_accuracy has a value of 3.42, which is no fraction"):
        migration.migrate(RESULTS, percent=False)


def test_what_was_not_measured_is_null_never_0_and_0_stays_0():
    document = migration.migrate(RESULTS).document
    entry = document["SLM_Qwen2.5-3B-Instruct_finetuned"]
    assert entry["exact_match_accuracy"] == 0.0
    for measure in ("f1", "macro_f1", "top_1_accuracy", "category_accuracy", "n_samples", "performance", "memory"):
        assert entry[measure] is None
    assert document["SLM_tiny_zero_shot"]["top_3_accuracy"] == 0.0025
    assert document["SLM_tiny_zero_shot"]["exact_match_accuracy"] is None


def test_weighted_recall_is_dropped_where_it_is_the_accuracy_and_kept_where_it_is_not():
    old = {"Baseline_a": {"accuracy": 0.5, "recall": 0.5}, "Baseline_b": {"accuracy": 0.5, "recall": 0.4}}
    found = migration.migrate(old)
    assert "recall" not in found.document["LLM_a_untrained"]["unknown"]
    assert "Baseline_a: recall is dropped, weighted recall equals the accuracy" in found.notes
    assert found.document["LLM_b_untrained"]["unknown"] == {"recall": 0.4}


def test_measures_without_a_place_are_kept_and_a_metrics_precision_is_no_precision_of_weights():
    old = {"Baseline_a": {"accuracy": 0.5, "precision": 0.4, "latency": 12}, "timestamp": "2025-01-01"}
    found = migration.migrate(old)
    entry = found.document["LLM_a_untrained"]
    assert entry["precision"] is None and entry["unknown"] == {"precision": 0.4, "latency": 12}
    assert found.unknown == {"timestamp": "2025-01-01"}
    assert "Baseline_a: precision, latency have no place today and are kept under 'unknown'" in found.notes
    assert 'timestamp is no result of a model and is left out: it was "2025-01-01"' in found.notes
    assert migration.migrate({"Baseline_a": {"precision": "4bit"}}).document["LLM_a_untrained"]["precision"] == "4bit"


def test_two_names_of_one_measure_that_differ_are_told():
    found = migration.migrate({"Baseline_a": {"exact_match": 0.4, "accuracy": 0.5}})
    entry = found.document["LLM_a_untrained"]
    assert (entry["exact_match_accuracy"], entry["unknown"]) == (0.4, {"accuracy": 0.5})
    assert "Baseline_a: exact_match_accuracy was taken from exact_match; accuracy differs" in found.notes


def test_a_small_model_without_a_name_gets_the_one_that_is_given_or_is_called_unnamed():
    old = {"Baseline_SLM": {"accuracy": 0.1}, "Finetuned_SLM": {"accuracy": 0.2}}
    named = migration.migrate(old, slm_name="Qwen/Qwen2.5-3B-Instruct")
    assert list(named.document) == ["SLM_Qwen2.5-3B-Instruct_zero_shot", "SLM_Qwen2.5-3B-Instruct_finetuned"]
    unnamed = migration.migrate(old)
    assert list(unnamed.document) == ["SLM_unnamed_zero_shot", "SLM_unnamed_finetuned"]
    assert unnamed.document["SLM_unnamed_finetuned"]["model"] is None
    assert sum("does not say which model it is" in note for note in unnamed.notes) == 2


def test_results_in_a_wrapper_are_found_and_what_stands_beside_them_is_kept():
    found = migration.migrate({"results": {"Baseline_a": {"accuracy": 0.5}}, "config": {"seed": 1}})
    assert list(found.document) == ["LLM_a_untrained"] and found.unknown == {"config": {"seed": 1}}


def test_results_of_today_stay_as_they_are():
    today = {"LLM_a_untrained": {"exact_match_accuracy": 0.5}, "BASELINE_majority": {"top_1_accuracy": 0.1}}
    assert migration.migrate(today).document == today
    old = migration.migrate({"Baseline_majority": {"accuracy": 0.1}}).document
    assert old["BASELINE_majority"]["model_type"] == "BASELINE"


def test_two_results_that_would_be_one_are_refused():
    with pytest.raises(ValueError, match="two results are both 'LLM_a_untrained' today, one of them 'Baseline_LLM_a'"):
        migration.migrate({"Baseline_a": {"accuracy": 0.5}, "Baseline_LLM_a": {"accuracy": 0.5}})


@pytest.mark.parametrize("value", [101, -0.1, "0.5", True, [0.5]])
def test_a_share_that_is_none_is_refused_by_its_name(value):
    with pytest.raises(ValueError, match=r"Baseline_a.accuracy must be a share, 0-1 or 0-100, got"):
        migration.migrate({"Baseline_a": {"accuracy": value}})


# files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", [{"loss": 1}, {}, [1, 2], "text", None, {"results": {"x": 1}}])
def test_what_is_neither_is_refused_with_what_was_looked_for(document):
    looked = "neither an older config nor older results: looked for baseline_llms, slm_name"
    with pytest.raises(ValueError, match=looked):
        migration.migrate(document)


def test_the_new_file_lies_beside_the_old_one_which_is_not_touched(tmp_path):
    old = tmp_path / "config.yaml"
    old.write_text(yaml.safe_dump(OLD), encoding="utf-8")
    before = old.read_bytes()
    path, found = migration.write(old)
    assert path == tmp_path / "config.yaml.migrated.json" and old.read_bytes() == before
    assert ComparisonConfig(**migration.read(path)).name == "first"
    notes = migration.read(tmp_path / "config.yaml.migrated.notes.json")
    assert (notes["kind"], notes["unknown"]) == ("config", found.unknown) and notes["notes"] == list(found.notes)
    with pytest.raises(FileExistsError, match="is there already: move it away"):
        migration.write(old)


def test_json_and_yaml_say_the_same_and_yaml_runs_no_code(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULTS), encoding="utf-8")
    (tmp_path / "a.yml").write_text(yaml.safe_dump(RESULTS, sort_keys=False), encoding="utf-8")
    assert migration.read(tmp_path / "a.json") == migration.read(tmp_path / "a.yml")
    (tmp_path / "b.yaml").write_text("slm_name: !!python/object/apply:os.system ['exit 3']", encoding="utf-8")
    with pytest.raises(ValueError, match=r"is not valid YAML \(line 1, .*: could not determine a constructor"):
        migration.read(tmp_path / "b.yaml")
    (tmp_path / "d.yaml").write_text("slm_name: a\nseed: 1\nseed: 2\n", encoding="utf-8")
    with pytest.raises(ValueError, match="'seed' stands there twice"):
        migration.read(tmp_path / "d.yaml")
    (tmp_path / "c.json").write_text('{"Baseline_a": {"accuracy": NaN}}', encoding="utf-8")
    with pytest.raises(ValueError, match="is not valid JSON"):
        migration.read(tmp_path / "c.json")
