"""Are adapters on 4-bit weights trained, kept beside them, never merged, and loaded again as they were?"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from nbhelpers import adapters, attention, evaluate, generated, models
from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment
from nbhelpers.records import read_json
from nbhelpers.training import TrainingConfig, fine_tune

pytest.importorskip("bitsandbytes")
QUICK = {"method": "qlora", "window": 32, "evaluation_windows": 8, "batch_size": 4, "sample_tokens": 4, "steps": 4}
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(4, 24)]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory) -> dict:
    """A model with two closed heads, fine-tuned by QLoRA."""
    folder = tmp_path_factory.mktemp("qlora")
    text = folder / "text.jsonl"
    text.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    pruned = models.load_model("tiny-llama", device="cpu")
    attention.close_heads(pruned.model, [(0, 1), (2, 3)])
    models.save_model(pruned.model, pruned.tokenizer, folder / "pruned")
    config = FineTuningConfig(model=str(folder / "pruned"), data=str(text), device="cpu", learning_rate=1e-3, **QUICK)
    return FineTuningExperiment.run(config, run_dir=folder / "run")


def test_a_qlora_run_trains_adapters_alone_and_all_its_facts_hold(tuned):
    assert tuned["all_facts_hold"], tuned["facts"]
    names = {fact["name"] for fact in tuned["facts"]}
    assert {"peft_computes_the_same", "closed_heads_add_nothing_after_fine_tuning"} <= names
    whole = models.parameters(models.load_model("tiny-llama", device="cpu").model)
    assert tuned["parameters"] == whole and 0 < tuned["trainable_parameters"] < whole / 5
    assert tuned["fine_tuned"]["perplexity"] < tuned["baseline"]["perplexity"]


def test_what_is_saved_is_the_adapter_in_pefts_format_with_what_it_belongs_on(tuned):
    folder = Path(tuned["model_dir"])
    assert not (folder / "model.safetensors").exists()
    assert read_json(folder / adapters.BASE)["quantization"] == "4bit"
    assert read_json(folder / adapters.CONFIG)["base_model_name_or_path"].endswith("pruned")
    assert sum(p.stat().st_size for p in folder.glob("*.safetensors")) < 8 * tuned["trainable_parameters"]


def test_the_folder_loads_as_the_4_bit_model_with_its_adapters_and_its_closed_heads(tuned):
    loaded = models.load_model(tuned["model_dir"], device="cpu")
    assert adapters.are_on(loaded.model) and loaded.model.is_loaded_in_4bit
    assert attention.closed_heads(loaded.model) == [(0, 1), (2, 3)]
    again = evaluate.perplexity(loaded.model, ROWS).nll
    adapters.unload(loaded.model)
    assert not adapters.are_on(loaded.model)
    assert evaluate.perplexity(loaded.model, ROWS).nll != again


def test_merging_into_4_bit_weights_does_not_happen(tuned):
    record = read_json(Path(tuned["run_dir"]) / "artefacts" / "training_fine_tuned.json")
    assert record["merge_difference"] is None


def test_adapters_whose_model_is_gone_say_which_one_is_missing(tuned, tmp_path):
    for path in Path(tuned["model_dir"]).iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    below = read_json(tmp_path / adapters.BASE) | {"model": "./gone"}
    (tmp_path / adapters.BASE).write_text(json.dumps(below))
    with pytest.raises(LookupError, match="belong on a model that is not here: .*'./gone' does not exist"):
        models.load_model(str(tmp_path))


def test_adapters_do_not_go_on_a_model_that_is_quantised_otherwise(tuned):
    with pytest.raises(ValueError, match="belong on a model with quantization '4bit', got '8bit'"):
        models.load_model(tuned["model_dir"], device="cpu", quantization="8bit")


@pytest.mark.parametrize(
    "method, quantization, message",
    [
        ("qlora", None, "load the model with quantization='4bit'"),
        ("lora", "4bit", "load the model with quantization=None, or use 'qlora'"),
        ("full", "4bit", "cannot train 8- or 4-bit weights"),
    ],
)
def test_a_method_and_weights_that_do_not_fit_are_refused(method, quantization, message, tmp_path):
    model = models.load_model("tiny-llama", device="cpu", quantization=quantization).model
    with pytest.raises(ValueError, match=message):
        fine_tune(model, ROWS, ROWS, TrainingConfig(method=method, steps=1), output_dir=tmp_path)
    assert not adapters.are_on(model)


def test_an_error_while_adapters_are_trained_leaves_the_model_without_them(tmp_path):
    model = models.load_model("tiny-llama", device="cpu", quantization="4bit").model

    def broken(*_):
        raise RuntimeError("no sample today")

    with pytest.raises(RuntimeError, match="no sample today"):
        fine_tune(model, ROWS, ROWS, TrainingConfig(method="qlora", steps=1), output_dir=tmp_path, sampler=broken)
    assert not adapters.are_on(model)


def test_evaluating_a_4_bit_model_leaves_its_weights_as_they_are():
    """bitsandbytes packs them anew on some CPUs, scales rounded, unless it is told not to."""
    model = models.load_model("tiny-llama", device="cpu", quantization="4bit").model
    before = models.fingerprint(model)
    evaluate.perplexity(model, ROWS)
    assert models.fingerprint(model) == before
    assert not any(getattr(module, "support_avx512bf16_for_cpu", False) for module in model.modules())


def test_a_model_with_adapters_that_load_model_did_not_load_is_not_saved(tuned, tmp_path):
    loaded = models.load_model(tuned["model_dir"], device="cpu")
    del loaded.model.nbhelpers_loaded
    with pytest.raises(ValueError, match="only where it was loaded by load_model"):
        models.save_model(loaded.model, loaded.tokenizer, tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_qlora_learns_with_a_paged_optimizer_and_resumes(tmp_path):
    def model():
        return models.load_model("tiny-llama", device="cuda", quantization="4bit").model

    settings = {"method": "qlora", "learning_rate": 1e-2, "eval_every": 5, "checkpoint_every": 5, "keep_best": False}
    half = fine_tune(model(), ROWS, ROWS, TrainingConfig(steps=5, **settings), output_dir=tmp_path / "half")
    whole = fine_tune(model(), ROWS, ROWS, TrainingConfig(steps=10, **settings), output_dir=tmp_path / "whole")
    assert half.validation_nlls[-1][1] < half.validation_nlls[0][1] and whole.steps == 10
    again = fine_tune(
        model(), ROWS, ROWS, TrainingConfig(steps=10, **settings), output_dir=tmp_path / "whole", resume=True
    )
    assert again.train_losses == whole.train_losses


def test_the_paged_optimizer_is_bitsandbytes_own_with_the_same_groups():
    from bitsandbytes.optim import PagedAdamW32bit

    from nbhelpers.optimization import adamw

    parameters = {"matrix": torch.nn.Parameter(torch.zeros(2, 2)), "bias": torch.nn.Parameter(torch.zeros(2))}
    found = adamw(parameters, 1e-3, 0.1, torch.device("cpu"), paged=True)
    assert isinstance(found, PagedAdamW32bit)
    assert [group["weight_decay"] for group in found.param_groups] == [0.1, 0.0]


@pytest.mark.parametrize("method", ["qlora", "lora"])
def test_activation_checkpointing_gives_the_same_losses(method, tmp_path):
    curves = []
    for checkpointing in (False, True):
        quantization = "4bit" if method == "qlora" else None
        model = models.load_model("tiny-llama", device="cpu", quantization=quantization).model
        config = TrainingConfig(method=method, steps=3, batch_size=4, gradient_checkpointing=checkpointing)
        curves.append(fine_tune(model, ROWS, ROWS, config, output_dir=tmp_path).train_losses)
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], abs=1e-6)


@pytest.mark.parametrize("method", ["full", "lora", "qlora"])
def test_a_model_that_carries_adapters_is_not_trained_on(method, tuned, tmp_path):
    model = models.load_model(tuned["model_dir"], device="cpu").model
    with pytest.raises(ValueError, match="carries adapters, which training would drop|cannot train 8- or 4-bit"):
        fine_tune(model, ROWS, ROWS, TrainingConfig(method=method, steps=1), output_dir=tmp_path)
    assert adapters.are_on(model)
