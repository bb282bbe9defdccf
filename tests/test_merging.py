"""Is a model tuned in 4 bits, written as a whole one, the model that was tuned?"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from nbhelpers import adapters, attention, cli, facts, merging, models, quantization
from nbhelpers.records import read_json, write_json
from nbhelpers.training import TrainingConfig, fine_tune

pytest.importorskip("bitsandbytes")
ROWS = [{"input_ids": ids, "labels": ids} for ids in torch.arange(96).view(4, 24)]
SETTINGS = {"method": "qlora", "learning_rate": 2e-2, "steps": 3, "batch_size": 4, "keep_best": False}
CLOSED = [(0, 1), (2, 3)]


def tuned(name: str, folder: Path, closed=()) -> Path:
    """A folder of adapters that a few steps on `name` in 4 bits have left."""
    base = name
    if closed:
        pruned = models.load_model(name, device="cpu")
        attention.close_heads(pruned.model, closed)
        base = str(models.save_model(pruned.model, pruned.tokenizer, folder / "pruned"))
    loaded = models.load_model(base, device="cpu", quantization="4bit")
    fine_tune(loaded.model, ROWS, ROWS, TrainingConfig(**SETTINGS), output_dir=folder / "checkpoints")
    return models.save_model(loaded.model, loaded.tokenizer, folder / "adapters")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tuned("tiny-llama", tmp_path_factory.mktemp("llama"), CLOSED)


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("name", ["tiny-gpt2", "tiny-opt", "tiny-pythia"])  # Conv1D, biases, one matrix for q, k and v
def test_plain_transformers_gives_the_logits_of_the_tuned_model(name, tmp_path):
    from transformers import AutoModelForCausalLM

    folder = tuned(name, tmp_path)
    found = merging.merge(folder, tmp_path / "whole", device="cpu")
    adapted = models.load_model(str(folder), device="cpu").model
    wanted = facts.logits(adapted, ROWS)
    adapters.unload(adapted)
    assert apart(facts.logits(adapted, ROWS), wanted) > 1e-2, "the adapters do something"
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", local_files_only=True).eval()
    assert apart(facts.logits(whole, ROWS), wanted) < 1e-5
    assert found["all_facts_hold"] and found["facts"][0]["values"]["difference"] < 1e-5
    assert (found["dtype"], found["parameters"]) == ("float32", models.parameters(whole))


def test_closed_heads_stay_closed_and_a_gated_model_is_merged_as_well(llama, tmp_path):
    found = merging.merge(llama, tmp_path / "whole", device="cpu", row=ROWS[1])
    assert found["all_facts_hold"], found["facts"]
    whole = models.load_model(str(tmp_path / "whole"), device="cpu").model
    assert attention.closed_heads(whole) == CLOSED and not adapters.are_on(whole)
    wanted = facts.logits(models.load_model(str(llama), device="cpu").model, ROWS)
    assert apart(facts.logits(whole, ROWS), wanted) < 1e-5


def test_the_original_weights_with_the_adapters_would_be_another_model(llama, tmp_path):
    """Why the 4 bits are unpacked: what they lost is part of what was tuned and measured."""
    merging.merge(llama, tmp_path / "whole", device="cpu")
    name = "model.layers.1.mlp.up_proj.weight"
    original = models.load_model("tiny-llama", device="cpu").model.get_parameter(name)
    packed = models.load_model("tiny-llama", device="cpu", quantization="4bit").model
    unpacked = quantization.dequantised(packed.get_submodule(name.removesuffix(".weight")))
    lora = load_file(llama / adapters.WEIGHTS)
    up, down = (lora[f"base_model.model.{name.removesuffix('.weight')}.lora_{part}.weight"] for part in "BA")
    config = read_json(llama / adapters.CONFIG)
    delta = up @ down * config["lora_alpha"] / config["r"]
    merged = models.load_model(str(tmp_path / "whole"), device="cpu").model.get_parameter(name)
    assert torch.allclose(merged, unpacked + delta, atol=1e-6)
    assert not torch.allclose(merged, original + delta, atol=1e-3)


def test_a_merged_folder_that_computes_something_else_is_reported(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(merging.masked_adapters, "delta", lambda layer: 0.0)
    found = merging.merge(llama, tmp_path / "whole", device="cpu")
    [fact] = found["facts"]
    assert not found["all_facts_hold"] and not fact["ok"] and fact["values"]["difference"] > 1e-3


def test_a_merge_that_ends_in_an_error_holds_no_model(llama, tmp_path, monkeypatch):
    loaded, honest = [], models.load_model

    def load_model(*args, **options):
        loaded.append(honest(*args, **options))
        return loaded[-1]

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(models, "load_model", load_model)
    monkeypatch.setattr(merging, "_write", full)
    with pytest.raises(OSError, match="No space left"):
        merging.merge(llama, tmp_path / "whole", device="cpu")
    assert len(loaded) > 1 and not any(one.numel() for each in loaded for one in each.model.parameters())


def test_what_cannot_be_merged_is_refused_and_nothing_is_written(llama, tmp_path):
    out = tmp_path / "whole"
    with pytest.raises(ValueError, match="adapter must be a local folder with adapter_config.json, got 'tiny-llama'"):
        merging.merge("tiny-llama", out)
    eight = Path(shutil.copytree(llama, tmp_path / "eight"))
    write_json(eight / adapters.BASE, read_json(eight / adapters.BASE) | {"quantization": "8bit"})
    with pytest.raises(ValueError, match="belongs on 8-bit weights, which cannot be merged"):
        merging.merge(eight, out)
    masked = Path(shutil.copytree(llama, tmp_path / "masked"))
    (masked / adapters.MASK).touch()
    with pytest.raises(ValueError, match="respect a mask"):
        merging.merge(masked, out)
    broken = Path(shutil.copytree(llama, tmp_path / "broken"))
    tensors = load_file(broken / adapters.WEIGHTS)
    name = next(name for name in sorted(tensors) if "lora_B" in name)
    tensors[name][0, 0] = float("nan")
    save_file(tensors, broken / adapters.WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="gives weights that are not finite: the adapters are broken"):
        merging.merge(broken, out, device="cpu")
    assert not out.exists()


def test_the_command_merges_says_what_it_made_and_takes_no_folder_with_content(llama, tmp_path):
    words = ["merge", str(llama), "--out", str(tmp_path / "whole"), "--device", "cpu", "--json"]
    result = CliRunner().invoke(cli.build(words), words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout.splitlines()[-1])
    assert found["parameters"] == 430_944 and found["bytes"] > 4 * 430_944
    again = CliRunner().invoke(cli.build(words[:-1]), words[:-1])
    assert again.exit_code == 2 and "is not empty; choose another one" in again.stderr
