"""Is nonsense in a comparison's config refused before anything is loaded, by name and with the way out?"""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from nbhelpers import yaml_files
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig, seconds_of
from nbhelpers.errors import one_line
from nbhelpers.redaction import Redactor


def refused(**fields) -> str:
    with pytest.raises((ValidationError, LookupError)) as error:
        ComparisonConfig(**fields)
    return one_line(error.value)


def test_models_may_be_given_by_name_as_a_list_or_as_one_text():
    listed = ComparisonConfig(llm_models=["small-llama"], slm_models="tiny-llama, tiny-opt")
    assert listed.llm_models == (ModelInstanceConfig(name="small-llama"),)
    assert [model.name for model in listed.slm_models] == ["tiny-llama", "tiny-opt"]
    whole = ComparisonConfig(slm_models=[{"name": "a/b", "load_in_4bit": True, "lora_rank": 4}])
    assert whole.slm_models[0].quantization == "4bit" and whole.slm_models[0].short == "b"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"lora_rnak": 4}, "Did you mean 'lora_rank'"),
        ({"llm_models": [{"name": "x", "load_in_4bits": True}]}, "Did you mean 'load_in_4bit'"),
        ({"llm_models": []}, "llm_models must name at least one model for experiment 'full'"),
        ({"experiment": "training", "slm_models": []}, "slm_models must name at least one model"),
        ({"slm_models": ["a/x", "b/x"]}, "'a/x' and 'b/x' are both called 'x' in results"),
        ({"slm_models": [{"name": "x", "load_in_8bit": True}]}, "8-bit weights cannot be fine-tuned"),
        (
            {"experiment": "baseline", "fine_tune_llms": True, "llm_models": [{"name": "x", "load_in_8bit": True}]},
            "8-bit weights cannot be fine-tuned",
        ),
        ({"llm_models": [{"name": "x", "load_in_8bit": True, "load_in_4bit": True}]}, "choose one"),
        ({"baselines": "majority,tfidf_liner"}, "Did you mean 'tfidf_linear'"),
        ({"budget": "90"}, "budget must be a time such as 90m or 2h, got '90'"),
        ({"ensemble": True, "answers": "writing"}, "ensemble combines rankings of both sides"),
        ({"epochs": 0}, "epochs"),
        ({"llm_models": 5}, "llm_models must be a list of names, or of entries with a name, got 5"),
        ({"slm_models": [5, "x"]}, "slm_models must be a list of names, or of entries with a name, got 5"),
        ({"llm_models": {"name": "x"}}, "llm_models must be a list of names, or of entries with a name, got {'name'"),
        ({"baselines": 5}, "baselines must be a list of names (majority, nearest, tfidf_linear), got 5"),
        ({"baselines": {"majority": True}}, "baselines must be a list of names (majority, nearest, tfidf_linear), got"),
        ({"baselines": None}, "baselines must be a list of names (majority, nearest, tfidf_linear), got None"),
        ({"labels": ["a", "b"]}, "labels must be a valid string, got ['a', 'b']"),
        ({"price_per_hour": -1}, "price_per_hour"),
    ],
)
def test_what_cannot_be_meant_is_refused_with_the_way_out(fields, says):
    assert says in refused(**fields)


@pytest.mark.parametrize(("text", "seconds"), [("45s", 45), ("90m", 5400), ("1.5h", 5400), ("1d", 86_400)])
def test_a_budget_is_a_number_and_a_unit(text, seconds):
    assert seconds_of(text) == seconds


def test_steps_are_epochs_times_rows_over_the_batch_rounded_up_and_validated_once_an_epoch():
    training = ComparisonConfig(epochs=3, batch_size=8).training(ModelInstanceConfig(name="x"), rows=20)
    assert (training.steps, training.eval_every) == (8, 3)  # 60 rows in batches of 8; 20 rows are 3 steps


def test_a_models_own_adapters_win_and_4bit_models_are_tuned_by_qlora():
    config = ComparisonConfig(lora_rank=16, lora_alpha=32)
    own = ModelInstanceConfig(name="x", load_in_4bit=True, lora_rank=4, lora_alpha=8, lora_targets=("q_proj",))
    training = config.training(own, 10)
    assert (training.method, training.lora_rank, training.lora_alpha) == ("qlora", 4, 8)
    assert training.lora_targets == ("q_proj",)
    assert config.training(ModelInstanceConfig(name="y"), 10).lora_rank == 16


def test_a_window_beyond_the_models_positions_is_refused():
    config = ComparisonConfig(window=1024)
    with pytest.raises(ValueError, match="window must be at most 512 tokens for tiny-llama, got 1024"):
        config.window_of(ModelInstanceConfig(name="tiny-llama"))
    assert ComparisonConfig().window_of(ModelInstanceConfig(name="tiny-gpt2")) == 256


@pytest.mark.parametrize(
    "file", sorted((Path(__file__).parent.parent / "examples").glob("compare_*.yaml")), ids=lambda file: file.name
)
def test_the_examples_are_configs_that_can_be_meant(file):
    assert ComparisonConfig(**yaml_files.read(file)).slm_models


def test_a_key_of_a_model_whose_name_ends_in_hf_is_not_taken_for_a_token():
    short = ModelInstanceConfig(name="meta-llama/Llama-2-7b-hf").short
    assert short == "Llama-2-7b"
    key = f"SLM_{short}_finetuned"
    assert Redactor().text(key) == key


@pytest.mark.parametrize(
    ("answers", "measure"),
    [("both", "top_1_accuracy"), ("ranking", "top_1_accuracy"), ("writing", "exact_match_accuracy")],
)
def test_rankings_decide_the_verdict_wherever_labels_are_ranked(answers, measure):
    assert ComparisonConfig(answers=answers).headline == measure


def test_a_micro_batch_above_the_batch_is_refused_before_anything_is_loaded():
    with pytest.raises(ValueError, match="micro_batch_size must be at most batch_size 2, got 8"):
        ComparisonConfig(batch_size=2, micro_batch_size=8)
