"""How does a training keep to a mask, and how is it proved? What `training.fine_tune` does with `sparse`.

sparse: (mask, mode), or None. LoRA is masked in every forward pass and merged with proofs (sparse_lora.py). Full
fine-tuning is masked once (sparse_to_dense), or again after every optimizer step (sparse_to_sparse, cerebras.py).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from nbhelpers import cerebras, mask_files, masked_adapters, masks, sparse_lora
from nbhelpers.facts import Fact

Sparse = tuple[Mapping[str, torch.Tensor] | None, str] | None


def adapters_for(config: Any, sparse: Sparse) -> Callable[[nn.Module], nn.Module] | None:
    """What puts adapters on that respect a mask; None where there is no mask to respect."""
    if sparse is None or config.method != "lora":
        return None
    settings = {"rank": config.lora_rank, "alpha": config.lora_alpha, "dropout": config.lora_dropout}
    return lambda model: sparse_lora.put_on(model, *sparse, **settings, seed=config.seed)


def identity(sparse: Sparse) -> dict[str, Any]:
    """What of a mask a checkpoint must have been made with; nothing where there is none."""
    if sparse is None:
        return {}
    mask, mode = sparse
    return {"sparse": [mode, mask_files.sha256(masks.pack(mask)) if mask else None]}


def callback(model: nn.Module, config: Any, sparse: Sparse) -> cerebras.SparseMaskCallback | None:
    """Full fine-tuning: the model is masked now, and by what is returned after every optimizer step."""
    if sparse is None or not sparse[0] or config.method != "full":
        return None
    mask, mode = sparse
    device = next(model.parameters()).device
    unpacked = {name: mask[name].to(device) for name in mask}  # it is used in every step
    return cerebras.SparseMaskCallback(cerebras.prepare_sparse_model(model, unpacked, mode))


def merge(trainable: nn.Module, row: Mapping[str, Any]) -> dict[str, Any]:
    """Merge, take it back, merge for good: what that did, and whether taking back gave the weights bit for bit."""
    before = _digests(trainable)
    sparse_lora.merge(trainable, row)
    sparse_lora.unmerge(trainable)
    again = _digests(trainable)
    found = sparse_lora.merge(trainable, row).record()
    changed = [name for name in before if again[name] != before[name]]
    return found | {"facts": [*found["facts"], _unmerged(len(before), changed).as_dict()]}


def _digests(trainable: nn.Module) -> dict[str, str]:
    """Name of each weight with an adapter -> sha256 of its bytes as they are now."""
    found = {}
    for name, layer in masked_adapters.layers(trainable).items():
        weight = masked_adapters.base_parameter(layer).detach().cpu().contiguous()
        found[name] = hashlib.sha256(weight.view(-1).view(torch.uint8).numpy().data).hexdigest()
    return found


def _unmerged(layers: int, changed: Sequence[str]) -> Fact:
    return Fact(
        "unmerging_gives_back_the_weights",
        not changed and layers > 0,
        "taking the adapters out again gives back the weights bit for bit",
        f"{layers - len(changed)} of {layers} weights with the same sha256"
        + (f", not {changed[0]}" if changed else ""),
        {"layers": layers, "changed": list(changed[:3])},
    )


def proofs(tuned: Any, mode: str) -> list[Fact]:
    """What a finished training (training.TrainingResult) under a mask proved while it merged, or after its steps."""
    found = [] if tuned.merged is None else [Fact(**fact) for fact in tuned.merged["facts"]]
    if tuned.masked is not None and mode == "sparse_to_sparse":
        found.append(_zero_after_every_step(tuned.masked, tuned.steps))
    return found


def _zero_after_every_step(seen: Mapping[str, Any], steps: int) -> Fact:
    """What the callback of full fine-tuning saw. steps: of the whole training, earlier attempts included."""
    steps -= seen["from_step"]
    return Fact(
        "masked_weights_were_zero_after_every_step",
        seen["violations"] == 0 and seen["steps"] == steps,
        "after every optimizer step the weights that the mask leaves out were set to zero again",
        f"{seen['violations']:,} violations after {seen['steps']} steps; {seen['changed']:,} weights had moved in "
        f"{seen['steps_with_changes']} of them",
        {**seen, "expected_steps": steps},
    )
