"""How is a head closed? One gated attention function for every architecture.

transformers' attention registry lets one function serve all models: it calls the stock one (sdpa), which returns
(batch, queries, heads, head_dim) before the output projection, and multiplies by the module's gate. A closed head
therefore adds exactly 0 to the residual stream, in training, evaluation and generation alike.

Gates are buffers named `head_gate` on the attention modules, None where every head of a layer is open. They are no
parameters: no optimizer, weight decay or adapter can open them again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from nbhelpers.architecture import (
    architecture,
    attention_modules,
    decoder_layers,
    geometry,
    head_columns,
    is_quantised,
    is_transposed,
    model_geometry,
    output_projection,
)

IMPLEMENTATION = "nbhelpers"
QUERY_BLOCK = 128  # rows of attention weights held at a time while entropy is measured

Head = tuple[int, int]  # (layer, head), both from 0


def apply_gate(output: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """output: (batch, queries, heads, head_dim); gate: (heads) or, a row of its own each, (batch, heads)."""
    return output * gate.to(output.dtype).view(-1, 1, output.shape[2], 1)


def gated_attention(module: nn.Module, query, key, value, attention_mask, **kwargs):
    """Stock sdpa attention, then the gate of this module. Shapes as in transformers' attention interface."""
    observer = getattr(module, "attention_observer", None)
    if observer is not None:
        observer(module, query, key, attention_mask, kwargs.get("scaling"))
    output, weights = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    gate = getattr(module, "head_gate", None)
    return (output if gate is None else apply_gate(output, gate)), weights


AttentionInterface.register(IMPLEMENTATION, gated_attention)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def install(model: nn.Module) -> None:
    """Let a model attend through gates, all open: its logits stay bit for bit those of sdpa. LookupError if unknown."""
    modules = attention_modules(model)
    model.set_attn_implementation(IMPLEMENTATION)
    for module in modules:
        if "head_gate" not in module._buffers:
            module.register_buffer("head_gate", None, persistent=False)


def is_installed(model: nn.Module) -> bool:
    return model.config._attn_implementation == IMPLEMENTATION


def _require_installed(model: nn.Module) -> None:
    architecture(model)
    if not is_installed(model):
        raise RuntimeError("this model does not attend through gates; call attention.install(model) first")


def check_heads(model: nn.Module, heads: Iterable[Sequence[int]]) -> list[Head]:
    """Sorted unique (layer, head) pairs; ValueError names the first one that this model does not have."""
    geo = model_geometry(model)
    result = sorted({(int(layer), int(head)) for layer, head in heads})
    for layer, head in result:
        if not (0 <= layer < geo.layers and 0 <= head < geo.heads):
            raise ValueError(f"head ({layer}, {head}) does not exist: {geo.layers} layers with {geo.heads} heads each")
    return result


def windows(model: nn.Module) -> dict[str, int | None]:
    """Tokens that each kind of attention layer sees back, by the model's own names of the kinds; {} where all see all.

    A model of one kind has the one name "all".
    """
    text = model.config.get_text_config()
    window = getattr(text, "sliding_window", None) if getattr(text, "use_sliding_window", True) else None
    kinds = set(getattr(text, "layer_types", None) or [])
    if window is None or (kinds and "sliding_attention" not in kinds):
        return {}
    if not kinds:
        return {"all": window}
    return {kind: window if kind == "sliding_attention" else None for kind in sorted(kinds)}


def visible(model: nn.Module, mask: torch.Tensor, queries: torch.Tensor, keys: torch.Tensor) -> dict[str, Any]:
    """The attention_mask argument that lets each query see exactly the keys of `mask`, as far as a sliding window goes.

    mask: bool (batch, queries, keys); queries, keys: their positions (batch, length). A dict of masks for models whose
    layers see different windows; added numbers instead of booleans where attention is eager.
    """
    kinds = windows(model)
    if not kinds:
        return {"attention_mask": _as_attention_takes_it(model, mask)}
    near = {
        kind: mask if window is None else mask & (queries[:, :, None] - keys[:, None, :] < window)
        for kind, window in kinds.items()
    }
    made = {kind: _as_attention_takes_it(model, part) for kind, part in near.items()}
    return {"attention_mask": made.get("all", made)}


def _as_attention_takes_it(model: nn.Module, mask: torch.Tensor) -> torch.Tensor:
    if model.config._attn_implementation in (IMPLEMENTATION, "sdpa"):
        return mask[:, None]
    dtype = next(model.parameters()).dtype
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)[:, None]


def close_heads(model: nn.Module, heads: Iterable[Sequence[int]]) -> None:
    """Close exactly these (layer, head) pairs and open all others."""
    _require_installed(model)
    closed, geo = check_heads(model, heads), model_geometry(model)
    with torch.inference_mode(False):  # a gate made in inference mode could not be trained through afterwards
        for layer, module in enumerate(attention_modules(model)):
            here = [head for other, head in closed if other == layer]
            device = next(output_projection(model, module).parameters()).device
            module.head_gate = torch.ones(geo.heads, device=device) if here else None
            if here:
                module.head_gate[here] = 0.0


def closed_heads(model: nn.Module) -> list[Head]:
    """The (layer, head) pairs whose gate is 0, sorted; [] for a model without gates."""
    if not is_installed(model):
        return []
    return [
        (layer, head)
        for layer, module in enumerate(attention_modules(model))
        if module.head_gate is not None
        for head in (module.head_gate == 0).nonzero().flatten().tolist()
    ]


@contextmanager
def heads_closed(model: nn.Module, heads: Iterable[Sequence[int]]) -> Iterator[None]:
    """Close these heads as well as those already closed; afterwards, also after an error, all is as before."""
    before = closed_heads(model)
    close_heads(model, [*before, *check_heads(model, heads)])
    try:
        yield
    finally:
        close_heads(model, before)


@contextmanager
def differentiable_gates(model: nn.Module, batch: int) -> Iterator[list[torch.Tensor]]:
    """Gates that a backward pass reaches: a list of (batch, heads), one a layer, with the present values.

    A row of the batch has its own gates, so that one backward gives the gradient of every row's own loss. Only the
    gates require gradients meanwhile; parameters take theirs back afterwards.
    """
    _require_installed(model)
    modules, heads = attention_modules(model), model_geometry(model).heads
    kept = [module.head_gate for module in modules]
    frozen = [parameter for parameter in model.parameters() if parameter.requires_grad]
    gates = []
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        for module, gate in zip(modules, kept, strict=True):
            device = next(output_projection(model, module).parameters()).device
            start = torch.ones(heads, device=device) if gate is None else gate
            module.head_gate = start.expand(batch, heads).clone().requires_grad_()
            gates.append(module.head_gate)
        yield gates
    finally:
        for module, gate in zip(modules, kept, strict=True):
            module.head_gate = gate
        for parameter in frozen:
            parameter.requires_grad_(True)


class EntropyMeter:
    """Sums of each head's attention entropy, every row divided by the most it could have: log(keys it may see)."""

    def __init__(self, layers: int, heads: int) -> None:
        self.sums = torch.zeros(layers, heads, dtype=torch.float64)
        self.rows = torch.zeros(layers, 1, dtype=torch.float64)
        self.real_queries: torch.Tensor | None = None  # (batch, queries) bool, False for padding

    @torch.no_grad()
    def __call__(self, module: nn.Module, query, key, attention_mask, scaling: float | None) -> None:
        key = repeat_kv(key, query.shape[1] // key.shape[1])
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        for start in range(0, query.shape[2], QUERY_BLOCK):
            block = slice(start, min(start + QUERY_BLOCK, query.shape[2]))
            visible, bias = _visible_keys(attention_mask, block, query.shape[2], key)
            scores = (query[:, :, block].float() @ key.float().transpose(-1, -2)) * scaling + bias
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
            entropy = -torch.xlogy(weights, weights).sum(-1)  # (batch, heads, rows) in nats
            seen = visible.sum(-1)  # (batch or 1, 1, rows)
            counts = (seen > 1).expand(query.shape[0], 1, -1)
            if self.real_queries is not None:
                counts = counts & self.real_queries[:, None, block]
            share = torch.where(counts, entropy / seen.clamp(min=2).log(), 0.0)
            self.sums[module.layer_idx] += share.sum((0, 2)).double().cpu()
            self.rows[module.layer_idx] += counts.sum().double().cpu()

    def mean(self) -> torch.Tensor:
        """(layers, heads) in [0, 1]: 1 = attends evenly to everything visible, 0 = to a single token."""
        return self.sums / self.rows.clamp(min=1)


def _visible_keys(mask: torch.Tensor | None, block: slice, queries: int, key: torch.Tensor):
    """(visible, bias): bool (batch or 1, 1, rows, keys) and what a floating-point mask adds to the scores."""
    keys = key.shape[2]
    if mask is None:
        at = torch.arange(keys - queries + block.start, keys - queries + block.stop, device=key.device)
        return (torch.arange(keys, device=key.device)[None, :] <= at[:, None])[None, None], 0.0
    mask = mask[:, :, block, :keys]
    if mask.dtype == torch.bool:
        return mask, 0.0
    visible = mask > torch.finfo(mask.dtype).min / 2
    return visible, torch.where(visible, mask, 0.0).float()


@contextmanager
def entropy_meter(model: nn.Module) -> Iterator[EntropyMeter]:
    """Measure attention entropy during the forward passes inside, in query blocks: no (batch, heads, T, T) is kept."""
    _require_installed(model)
    modules, geo = attention_modules(model), model_geometry(model)
    meter = EntropyMeter(geo.layers, geo.heads)
    try:
        for module in modules:
            module.attention_observer = meter
        yield meter
    finally:
        for module in modules:
            module.attention_observer = None


@contextmanager
def head_outputs(model: nn.Module) -> Iterator[torch.Tensor]:
    """What reaches the output projection from each head: a (layers, heads) tensor, filled by the forward passes inside
    with the largest absolute value seen. Read by hooks on the projections, so it knows nothing of gates."""
    geo = model_geometry(model)
    largest = torch.zeros(geo.layers, geo.heads)

    def hook(layer: int):
        def read(_module, inputs):
            per_head = inputs[0].detach().abs().unflatten(-1, (geo.heads, geo.head_dim))
            peak = per_head.amax(dim=(*range(per_head.dim() - 2), -1)).float().cpu()
            largest[layer] = torch.maximum(largest[layer], peak)

        return read

    handles = [
        output_projection(model, module).register_forward_pre_hook(hook(layer))
        for layer, module in enumerate(attention_modules(model))
    ]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def reusable_layers(model: nn.Module) -> Iterator[Callable]:
    """The first forward pass inside is remembered layer by layer; `with reuse_below(n):` gives later passes over the
    same batch the remembered outputs of the layers before n instead of computing them again. Bit for bit the same."""
    layers = decoder_layers(model)
    remembered: list = [None] * len(layers)

    def remember(layer: int):
        def read(_module, _inputs, output):
            if remembered[layer] is None:
                remembered[layer] = output

        return read

    @contextmanager
    def reuse_below(first: int) -> Iterator[None]:
        own = [layer.__dict__.get("forward") for layer in layers[:first]]  # device maps set one
        try:
            for layer, output in zip(layers[:first], remembered[:first], strict=True):
                layer.forward = lambda *_inputs, _output=output, **_options: _output
            yield
        finally:
            for layer, forward in zip(layers[:first], own, strict=True):
                layer.__dict__.pop("forward", None)
                if forward is not None:
                    layer.forward = forward

    handles = [layer.register_forward_hook(remember(number)) for number, layer in enumerate(layers)]
    try:
        yield reuse_below
    finally:
        for handle in handles:
            handle.remove()


def state_dict_without_closed_heads(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights as they are saved: output projections with the closed heads' inputs zeroed, the model untouched.

    Plain transformers, which knows no gates, then computes the same function. Quantised weights, and an adapter that is
    not merged on a projection with closed heads, raise ValueError.
    """
    state, geo = dict(model.state_dict()), geometry(model.config)
    names = {module: name for name, module in model.named_modules()}
    modules = attention_modules(model)
    for layer in sorted({layer for layer, _ in closed_heads(model)}):
        projection = output_projection(model, modules[layer])
        name = f"{names[projection]}.weight"
        if name not in state:
            raise ValueError(f"{names[projection]} carries an adapter; merge it before saving closed heads")
        if is_quantised(projection):
            raise ValueError(
                "a quantised model with closed heads cannot be saved for plain transformers; dequantise it"
            )
        weight = state[name] = state[name].clone()
        columns = weight.T if is_transposed(projection) else weight
        for other, head in closed_heads(model):
            if other == layer:
                columns[:, head_columns(geo, head)] = 0
    return state
