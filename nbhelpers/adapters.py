"""How are adapters kept beside a model that they cannot be merged into? PEFT's format, and what they belong on.

Merging into 4- or 8-bit weights would round them anew and change the function, so a model fine-tuned by QLoRA is saved
as its adapters alone; loading them loads the model below, quantised in the same way.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import nn

from nbhelpers import records

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BASE = "nbhelpers_base.json"  # what PEFT's own file cannot say: how the model below was loaded
MASK = "adapter_mask.safetensors"  # beside adapters whose delta respects a mask (sparse_lora.py)
MASKED = "kept_bits"  # buffer of a layer whose delta is masked
FORMAT = 1
PREFIX = "base_model.model."  # of every weight in a file written by PEFT


def are_on(model: nn.Module) -> bool:
    """Whether the model carries adapters that are not merged."""
    return bool(_layers(model))


def _layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    import sys

    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


@contextmanager
def quiet_peft() -> Iterator[None]:
    """peft 0.21 asks transformers for a property under its old name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.* is deprecated", FutureWarning)
        yield


def unload(model: nn.Module) -> None:
    """Take adapters that were not merged out again: the weights are then those without them."""
    for name, module in reversed(_layers(model)):  # inner ones first: experts carry an adapter around another one
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.get_base_layer())
    model.__dict__.pop("peft_config", None)


def save(model: nn.Module, folder: Path, files: str | None = None, *, masked: bool = False) -> None:
    """Write the adapters of a model as PEFT does, and beside them what they belong on (ValueError: unknown).

    files: sha256 over the files of the model below, None for a hub model. masked: the caller writes the mask that the
    adapters respect; ValueError where they respect one and nobody would.
    """
    from safetensors.torch import save_file

    if not masked and any(name.endswith(f".{MASKED}") for name in model.state_dict()):
        raise ValueError("the adapters respect a mask: merge them, or save them with sparse_lora.save")
    below = getattr(model, "nbhelpers_loaded", None)
    if below is None:
        raise ValueError("a model with adapters can be saved only where it was loaded by load_model; merge them first")
    config = model.peft_config["default"]
    config.base_model_name_or_path, config.inference_mode = below["model"], True
    config.save_pretrained(str(folder))
    state = {name: tensor for name, tensor in model.state_dict().items() if ".lora_" in name}
    tensors = {
        PREFIX + name.replace(".default", ""): tensor.detach().cpu().contiguous() for name, tensor in state.items()
    }
    save_file(tensors, str(folder / WEIGHTS), metadata={"format": "pt"})
    records.write_json(folder / BASE, {"format": FORMAT, **below, "files": files})


def base_of(folder: str | Path) -> dict | None:
    """{"model", "quantization", "dtype"} that a folder's adapters belong on; None for a folder without adapters."""
    folder = Path(folder)
    if not (folder / CONFIG).is_file():
        return None
    if not (folder / BASE).is_file():  # written by PEFT itself
        return {"model": records.read_json(folder / CONFIG).get("base_model_name_or_path"), "quantization": None}
    content = records.read_json(folder / BASE)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{str(folder / BASE)!r} has another format than {FORMAT}; copy the model again")
    return {name: content.get(name) for name in ("model", "quantization", "dtype", "files")}


def put_on(model: nn.Module, folder: str | Path, *, masked: bool = False) -> None:
    """Put the adapters of a folder on the model they belong on, in place. ValueError if they do not fit, or respect a
    mask that the caller does not put on too (`masked`)."""
    from peft import PeftModel
    from safetensors import safe_open

    if not masked and (Path(folder) / MASK).exists():
        raise ValueError(f"the adapters in {str(folder)!r} respect a mask: load them with sparse_lora.load")
    with safe_open(str(Path(folder) / WEIGHTS), "pt") as file:
        names = set(file.keys())
    try:
        with quiet_peft():
            PeftModel.from_pretrained(model, str(folder), is_trainable=False)
    except (RuntimeError, ValueError) as error:
        unload(model)
        raise ValueError(
            f"the adapters in {str(folder)!r} do not fit the model: {str(error).splitlines()[0]}"
        ) from error
    there = {PREFIX + name.replace(".default", "") for name in model.state_dict() if ".lora_" in name}
    if names != there:
        raise ValueError(f"the adapters in {str(folder)!r} do not fit the model: {sorted(names ^ there)[:3]} differ")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
