"""How does a model tuned in 4 bits become a whole one? Adapters are added to the weights that the 4 bits stand for.

Merging into 4-bit weights would round them anew. Here they are unpacked first, W = dequantised(4 bits), and the merged
weight W + scaling B A is rounded once, to the type that the model below is stored in; so the folder computes what was
tuned and measured, is as large as that model, and loads in plain transformers. (Merging into the original weights, as
is often done, gives another model: they are not the ones that the adapters were trained on.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbhelpers import attention, facts, masked_adapters, memory, models, quantization
from nbhelpers.architecture import is_supported

TEXT = "The model was loaded from its folder, and this is the text on which both are compared."


def merge(
    folder: str | Path, out: str | Path, *, device: str | None = None, row: Mapping[str, torch.Tensor] | None = None
) -> dict[str, Any]:
    """Write the model of a folder of adapters, merged, to `out` (new or empty); returns what it is, and its facts.

    row: {input_ids, labels} on which the tuned model and what was written are compared; None = a sentence. ValueError
    for a folder without adapters, for ones that respect a mask, for 8-bit weights, and where merged weights would not
    be finite. `out` stays where the comparison fails: the fact says so.
    """
    adapters_below = models.check_adapters(str(folder))
    if adapters_below["quantization"] == "8bit":
        raise ValueError(
            f"{str(folder)!r} belongs on 8-bit weights, which cannot be merged: tune it in 4 bits or whole"
        )

    def load(name: str) -> models.LoadedModel:
        return models.load_model(name, device=device, dtype="stored")

    with memory.loaded(lambda: load(str(folder))) as tuned:
        row = _row(tuned.tokenizer) if row is None else row
        before = facts.logits(tuned.model, [row])
        with memory.loaded(lambda: load(tuned.model.nbhelpers_loaded["model"]).model) as whole:
            with torch.no_grad():
                for name, weight, linear in _weights(tuned.model):
                    _write(whole, name, weight, linear)
            if is_supported(whole) and (closed := attention.closed_heads(tuned.model)):
                attention.close_heads(whole, closed)
            allowed = max(facts.tolerance(tuned.model), facts.tolerance(whole))
            memory.release(tuned.model)
            models.save_model(whole, tuned.tokenizer, out)
            found = {
                "folder": str(folder),
                "model_dir": str(out),
                "base": adapters_below["model"],
                "parameters": models.parameters(whole),
                "dtype": str(next(whole.parameters()).dtype).removeprefix("torch."),
                "bytes": sum(path.stat().st_size for path in Path(out).glob("*.safetensors")),
            }
            where = str(next(whole.parameters()).device)
    name, says = "merged_model_computes_the_same", "the merged folder gives the logits of the model that was tuned"
    fact = facts.saved_logits_are_the_same(name, says, out, row, before, where, allowed)
    return found | {"facts": [fact.as_dict()], "all_facts_hold": fact.ok}


def _row(tokenizer: Any) -> dict[str, torch.Tensor]:
    ids = torch.tensor(tokenizer(TEXT)["input_ids"])
    return {"input_ids": ids, "labels": ids}


def _weights(tuned: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name in the model without adapters, merged weight, whether it is (out, in) however the model stores it) of all
    that were adapted or packed."""
    adapted = masked_adapters.layers(tuned)
    for name, layer in adapted.items():
        if masked_adapters.is_packed(layer):
            yield name, quantization.dequantised(layer.get_base_layer()).float() + masked_adapters.delta(layer), True
        else:
            yield name, masked_adapters.merged_weight(layer), False
    for path, module in tuned.named_modules():
        packed = type(module).__name__ == "Linear4bit" and not path.endswith(".base_layer")
        if packed and f"{path}.weight" not in adapted:
            yield f"{path}.weight", quantization.dequantised(module), True


def _write(whole: nn.Module, name: str, weight: torch.Tensor, linear: bool) -> None:
    if not torch.isfinite(weight).all():
        raise ValueError(f"merging {name} gives weights that are not finite: the adapters are broken, train them again")
    transposed = type(whole.get_submodule(name.rpartition(".")[0])).__name__ == "Conv1D"  # it is a linear one in 4 bits
    whole.get_parameter(name).copy_(weight.t() if linear and transposed else weight)
