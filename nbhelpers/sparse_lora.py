"""How does LoRA keep a pruned model pruned? Its delta respects the mask in every forward pass, and merging is proved.

dense: no mask. sparse_to_dense: the weights are masked to zero, the delta is free, so merging fills the zeros again.
sparse_to_sparse: every forward pass computes x (W + scaling (B A) . M), so the merged model computes what was trained
and has exactly the zeros of the mask. Masks alone make nothing faster: a zero is multiplied like any other number.

A mask is a dict: name of a parameter as in `model.named_parameters()` of the model without adapters -> bool tensor of
its stored shape, True where a weight is kept. Weights in 4 bits cannot be set to zero: they must be zero there already,
as those are of a model that was masked before it was quantised.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import nn

from nbhelpers import adapters, evaluate, mask_files, masked_adapters, masks, models, projections, records, runtime
from nbhelpers.facts import Fact, tolerance
from nbhelpers.masked_adapters import BUFFER, StoredMask, base_parameter, inner, layers
from nbhelpers.quantization import dequantised
from nbhelpers.registry import unknown

Mode = Literal["dense", "sparse_to_dense", "sparse_to_sparse"]
Mask = Mapping[str, torch.Tensor]
COMPARED = 16  # tokens of the row on which merged and unmerged logits are compared


def put_on(
    model: nn.Module,
    mask: Mask | None,
    mode: Mode,
    *,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    targets: Iterable[str] | None = None,
    seed: int,
) -> nn.Module:
    """The model wrapped by peft, with LoRA adapters that begin at zero, drawn from the seed.

    Weights that are not 4-bit are set to zero, in place, where the mask says so. targets: names of the parameters that
    get an adapter; without it all of the mask, or in dense mode all projections. Everything but the adapters is frozen.
    ValueError: an unknown mode, a mask that does not fit the model or the mode, a masked weight that LoRA cannot
    reach, or in 4 bits and not zero. LookupError: a name that is not in the model.
    """
    if mode not in get_args(Mode):
        raise ValueError(unknown("mode", mode, get_args(Mode)))
    if (mode == "dense") != (not mask):
        raise ValueError(f"mode {mode!r} {'takes no mask' if mask else 'needs a mask'}, got {len(mask or ())} masks")
    if adapters.are_on(model):
        raise ValueError("the model carries adapters already: merge them or take them out first")
    mask = dict(mask or {})
    _check_mask(model, mask)
    names = list(targets) if targets is not None else list(mask) or _all_projections(model)
    _check_targets(model, names, mask, mode, dropout)
    masked_adapters.remember(model, StoredMask.of(mode, mask) if mask else None)
    zero(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    adapted = _with_adapters(model, names, rank, alpha, dropout, seed)
    attach(model)
    return adapted


@torch.no_grad()
def _check_mask(model: nn.Module, mask: Mask) -> None:
    """LookupError, ValueError: names and shapes are those of the model's parameters, and 4-bit weights zero there."""
    parameters = dict(model.named_parameters())
    for name, kept in mask.items():
        if name not in parameters:
            raise LookupError(unknown("parameter in the mask", name, parameters))
        weight, shape = parameters[name], _shape(parameters[name])
        if kept.dtype != torch.bool or tuple(kept.shape) != shape:
            got = f"{kept.dtype} of {tuple(kept.shape)}; was it made for another model?"
            raise ValueError(f"the mask of {name} must be bool of shape {shape}, got {got}")
        layer = model.get_submodule(name.rpartition(".")[0])
        if hasattr(weight, "quant_state") and (alive := _alive(layer, weight, kept)):
            raise ValueError(
                f"{alive:,} of {int((~kept).sum()):,} weights that the mask leaves out of {name} are not zero, and in "
                "4 bits cannot be made it: mask the float model (nbhelpers masks apply), then load that in 4 bits"
            )


def _alive(layer: nn.Module, weight: torch.Tensor, kept: torch.Tensor) -> int:
    """How many weights of a layer, unpacked from 4 bits, are not zero where the mask leaves them out, NaN included."""
    values = dequantised(layer) if hasattr(weight, "quant_state") else weight
    return int((values[~kept.to(values.device)] != 0).sum())


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """As the weight was before it was packed to 4 bits."""
    return tuple(getattr(getattr(parameter, "quant_state", None), "shape", None) or parameter.shape)


def _all_projections(model: nn.Module) -> list[str]:
    """Every projection; of a quantised model every linear layer but the output embedding."""
    if getattr(model, "quantization_method", None) is None:
        return [one.name for one in projections.projections(model, accept_low_coverage=True).covered]
    head = model.get_output_embeddings()
    found = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [f"{name}.weight" for name, module in found if module is not head]


def _check_targets(model: nn.Module, names: list[str], mask: Mask, mode: str, dropout: float) -> None:
    """ValueError: no targets, one that LoRA cannot reach (with its share), or that has no mask and needs one."""
    if not names:
        raise ValueError("targets must name at least one parameter, got none")
    parameters = dict(model.named_parameters())
    total = sum(prod(_shape(parameters[name])) for name in names if name in parameters)
    for name in names:
        if name not in parameters:
            raise LookupError(unknown("target", name, parameters))
        why = _not_reached(model, name, dropout)
        if mode != "dense" and name not in mask:
            why = "it has no mask, so it would not be sparse"
        if why:
            share = prod(_shape(parameters[name])) / total
            raise ValueError(f"{name} ({share:.1%} of the targets) cannot have an adapter: {why}; leave it out")


def _not_reached(model: nn.Module, name: str, dropout: float) -> str:
    """Why peft can put no (masked) adapter on this parameter; empty where it can."""
    from transformers.pytorch_utils import Conv1D

    path, _, own = name.rpartition(".")
    module, parameter = model.get_submodule(path), model.get_parameter(name)
    if parameter.dtype == torch.int8:
        return "8-bit weights are not supported, load the model with quantization='4bit' or None"
    if own == "weight" and isinstance(module, nn.Linear | Conv1D):
        return ""
    if parameter.ndim == 3 and type(module).__name__.endswith("Experts"):
        return "experts in 3-D cannot have dropout, set it to 0" if dropout else ""
    return f"LoRA does not know {type(module).__name__}"


def _with_adapters(model: nn.Module, names: list[str], rank: int, alpha: float, dropout: float, seed: int) -> nn.Module:
    from peft import LoraConfig, TaskType, get_peft_model

    experts = [name for name in names if model.get_parameter(name).ndim == 3]
    matrices = [name.removesuffix(".weight") for name in names if name not in experts]
    conv = any(masked_adapters.is_transposed(model.get_submodule(name)) for name in matrices)
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=matrices,
        target_parameters=experts or None,
        fan_in_fan_out=conv,  # GPT-2: (in, out) weights
    )
    with adapters.quiet_peft(), runtime.seeded(seed):
        adapted = get_peft_model(model, settings)
    missing = set(names) ^ set(layers(model))
    if missing:
        raise RuntimeError(f"peft put adapters elsewhere than asked: {sorted(missing)[:3]} differ")
    return adapted


def attach(model: nn.Module) -> int:
    """Mask the deltas of a model in mode sparse_to_sparse by its stored mask. Returns how many layers have one."""
    around = layers(model) if _mode(model) == "sparse_to_sparse" else {}
    for name, layer in around.items():
        masked_adapters.attach(layer, masked_adapters.stored_mask(model).bits[name])
    return len(around)


@torch.no_grad()
def zero(model: nn.Module) -> None:
    """Set masked weights to zero by the model's stored mask; 4-bit ones are zero there already, or refused before."""
    for _, _, weight, kept in _masked(model):
        if weight.is_floating_point() and not hasattr(weight, "quant_state"):
            weight.data[~kept.to(weight.device)] = 0


def _masked(model: nn.Module):
    """(name, layer it is in, weight, mask) of every parameter that was masked, with adapters on the model or not."""
    stored, around = masked_adapters.stored_mask(model), layers(model)
    for name in stored.bits if stored is not None else ():
        path, _, own = name.rpartition(".")
        layer = around[name].get_base_layer() if name in around else inner(model).get_submodule(path)
        yield name, layer, getattr(layer, own), stored.kept(name)


@torch.no_grad()
def violations(model: nn.Module) -> dict[str, int]:
    """Name of each masked parameter -> how many of its masked weights are not zero, NaN included; 4-bit ones unpacked.

    By the stored mask, on the model as it is, with adapters or after `adapters.unload`. Empty where nothing is masked.
    ValueError for 8-bit weights.
    """
    found = {}
    for name, layer, weight, kept in _masked(model):
        if weight.dtype == torch.int8:
            raise ValueError(f"{name} is in 8 bits, so its zeros cannot be counted: load the model in 4 bits or float")
        found[name] = _alive(layer, weight, kept)
    return found


# Merging --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Merged:
    """What merging did, and the facts that were checked while it did it."""

    mode: str
    layers: int  # with an adapter
    masked_layers: int  # whose masked weights were counted
    violations: int  # masked weights that are not zero; expected in sparse_to_dense
    difference: float  # largest |logit change| / largest |logit|
    withheld: float  # share of the free delta's norm that the mask took away, 0-1: how far s2s is from s2d
    facts: tuple[Fact, ...]

    @property
    def ok(self) -> bool:
        return all(fact.ok for fact in self.facts)

    def record(self) -> dict:
        return {**vars(self), "facts": [fact.as_dict() for fact in self.facts]}


@torch.no_grad()
def merge(model: nn.Module, row: Mapping[str, torch.Tensor]) -> Merged:
    """Write W + scaling (B A) . M into the weights, keep what stood there for `unmerge`, and prove that it is right.

    row: one with "input_ids", on whose last tokens the logits before and after are compared. A proof that fails is a
    fact that is not ok; the caller says what follows. `adapters.unload` then leaves the merged model. ValueError: no
    adapters, merged already, 8- or 4-bit weights, weights that would not be finite (nothing is merged then).
    """
    around, mode = layers(model), _mode(model)
    if not around:
        raise ValueError("the model carries no adapters to merge; put them on first")
    if any(layer.merged or "kept_base" in vars(layer) for layer in around.values()):
        raise ValueError("the adapters are merged already; unmerge them first")
    if any(map(masked_adapters.is_packed, around.values())):
        raise ValueError("merging rounds 8- and 4-bit weights anew: dequantise the model first, or keep the adapters")
    before = _logits(model, row)
    withheld = _withheld(around)
    try:
        for name, layer in around.items():
            _write_merged(name, layer)
    except BaseException:
        _put_back(around)
        raise
    after = _logits(model, row)
    difference = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
    found = violations(model)
    facts = [_computes_the_same(difference, tolerance(inner(model)), len(around))]
    if mode == "sparse_to_sparse":
        facts += [_stayed_zero(found), _the_stored_mask(model, around)]
    return Merged(mode, len(around), len(found), sum(found.values()), difference, withheld, tuple(facts))


def _write_merged(name: str, layer: nn.Module) -> None:
    weight, merged = base_parameter(layer), masked_adapters.merged_weight(layer)
    if not torch.isfinite(merged).all():
        raise ValueError(f"merging {name} gives weights that are not finite: the adapters are broken, train them again")
    layer.kept_base = weight.data.cpu()  # beside the merged ones they would need the device's memory twice
    weight.data = merged
    layer.merged_adapters.append(masked_adapters.ADAPTER)


def unmerge(model: nn.Module) -> int:
    """Put the weights back that `merge` kept, bit for bit. Returns how many; ValueError where nothing is merged."""
    count = _put_back(layers(model))
    if not count:
        raise ValueError("the adapters are not merged; nothing to put back")
    return count


def _put_back(around: Mapping[str, nn.Module]) -> int:
    merged = [layer for layer in around.values() if "kept_base" in vars(layer)]
    for layer in merged:
        parameter = base_parameter(layer)
        parameter.data = vars(layer).pop("kept_base").to(parameter.device)
        layer.merged_adapters.clear()
    return len(merged)


def _mode(model: nn.Module) -> str:
    return getattr(masked_adapters.stored_mask(model), "mode", "dense")


@torch.no_grad()
def _logits(model: nn.Module, row: Mapping[str, torch.Tensor]) -> torch.Tensor:
    ids = row["input_ids"][None, -COMPARED:].to(next(model.parameters()).device)
    with evaluate.evaluation_mode(model):
        return model(input_ids=ids, use_cache=False).logits.float()


def _withheld(around: Mapping[str, nn.Module]) -> float:
    """sqrt(sum of squares of the delta where it is masked / everywhere) over the layers; 0 without masks."""
    away = total = 0.0
    for layer in around.values():
        free = masked_adapters.delta(layer)
        total += float(free.square().sum())
        if hasattr(layer, BUFFER):
            away += float(free.masked_fill(masked_adapters.kept_by(layer), 0).square().sum())
    return (away / total) ** 0.5 if total else 0.0


def _computes_the_same(difference: float, allowed: float, count: int) -> Fact:
    return Fact(
        "merged_model_computes_the_same",
        difference <= allowed and count > 0,
        "the merged model gives the logits of the model that was trained",
        f"largest relative difference {difference:.1e}, allowed {allowed:g}, {count} layers",
        {"relative_difference": difference, "tolerance": allowed, "layers": count},
    )


def _stayed_zero(found: Mapping[str, int]) -> Fact:
    total, broken = sum(found.values()), [name for name, count in found.items() if count]
    return Fact(
        "masked_weights_are_zero_after_merging",
        total == 0 and len(found) > 0,
        "every weight that the mask leaves out is zero in the merged model",
        f"{total:,} violations in {len(found)} layers" + (f", first in {broken[0]}" if broken else ""),
        {"violations": total, "layers": len(found)},
    )


def _the_stored_mask(model: nn.Module, around: Mapping[str, nn.Module]) -> Fact:
    """What the layers masked their deltas by is what was stored; a layer without a mask counts as another one."""
    stored = masked_adapters.stored_mask(model)
    used = {name: getattr(layer, BUFFER, torch.empty(0)).cpu() for name, layer in around.items()}
    other = [name for name, bits in used.items() if not torch.equal(bits, stored.bits[name])]
    sha256 = mask_files.sha256(_packed(stored))
    return Fact(
        "deltas_were_masked_by_the_stored_mask",
        not other and len(around) > 0,
        "every layer masks its delta by the stored mask",
        f"{len(around) - len(other)} of {len(around)} layers, sha256 {sha256[:12]}",
        {"layers": len(around), "others": other[:3], "sha256": sha256},
    )


# Saving ---------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, folder: str | Path) -> Path:
    """The adapters in PEFT's own format with the mask beside them, whole or not at all.

    Plain PEFT loads them without their mask: load them here. ValueError: merged, or a model that load_model did not
    load. FileExistsError: the folder is not empty.
    """
    folder, model = Path(folder), inner(model)
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"adapter folder {str(folder)!r} is not empty; choose another one")
    if any(layer.merged for layer in layers(model).values()):
        raise ValueError("the adapters are merged: unmerge them first, or save the model itself")
    loaded = getattr(model, "nbhelpers_loaded", None)
    files = models.files_fingerprint(loaded["model"]) if loaded else None
    beside = folder.with_name(folder.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir(parents=True)
        adapters.save(model, beside, None if files is None else records.sha256_json(files), masked=True)
        stored = masked_adapters.stored_mask(model)
        if stored is not None:
            mask_files.save(beside / adapters.MASK, _packed(stored), importance=None, mode=stored.mode)
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    return folder


def load(model: nn.Module, folder: str | Path) -> nn.Module:
    """Put saved adapters and their mask on the model they were trained on, in place; its masked weights become zero.

    For evaluation and merging: nothing is left trainable. ValueError: adapters or mask do not fit, the mask is not the
    one that was saved, or the model is in 4 bits and was not masked before.
    """
    path, found = Path(folder) / adapters.MASK, None
    if path.is_file():
        found = mask_files.load(path)
        mask, mode = found.levels.mask(), found.header.get("mode")
        if mode not in get_args(Mode):
            raise ValueError(f"mask file '{path}' is refused: {unknown('mode', mode, get_args(Mode))}")
        _check_mask(model, mask)
    adapters.put_on(model, folder, masked=True)
    masked_adapters.remember(model, StoredMask.of(mode, mask) if found is not None else None)
    zero(model)
    attach(model)
    return model.eval()


def _packed(stored: StoredMask) -> masks.Levels:
    return masks.pack({name: stored.kept(name) for name in stored.bits})
