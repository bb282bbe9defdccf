"""Where does a model keep its attention heads?

One row an architecture, geometry always from the config (never from a model's name): which modules attend, which
projection their heads are written into, and which rows of which projection make a head's query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nbhelpers.registry import unknown


class Architecture(NamedTuple):
    """Names of the parts of one attention module, and how its query projection is laid out."""

    attention: str  # dotted tail of an attention module's name after the layer number
    output: str  # projection that the heads' outputs enter, heads side by side in its input
    query: str  # projection that holds the queries
    layout: str  # "rows": queries first, a head's rows together; "per_head": q, k, v of one head together (GPT-NeoX)


ARCHITECTURES: dict[str, Architecture] = {
    "gpt2": Architecture("attn", "c_proj", "c_attn", "rows"),
    "opt": Architecture("self_attn", "out_proj", "q_proj", "rows"),
    "gpt_neox": Architecture("attention", "dense", "query_key_value", "per_head"),
    "llama": Architecture("self_attn", "o_proj", "q_proj", "rows"),
    "mistral": Architecture("self_attn", "o_proj", "q_proj", "rows"),
    "mixtral": Architecture("self_attn", "o_proj", "q_proj", "rows"),
    "qwen2": Architecture("self_attn", "o_proj", "q_proj", "rows"),
    "qwen3": Architecture("self_attn", "o_proj", "q_proj", "rows"),
    "phi3": Architecture("self_attn", "o_proj", "qkv_proj", "rows"),
}


@dataclass(frozen=True)
class Geometry:
    """Counts of heads: `heads` query heads a layer, `kv_heads` key/value heads a layer, `head_dim` numbers a head."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def total(self) -> int:
        return self.layers * self.heads

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head (1 without grouped-query attention)."""
        return self.heads // self.kv_heads


def is_supported(model: nn.Module) -> bool:
    return model.config.model_type in ARCHITECTURES


def architecture(model: nn.Module) -> Architecture:
    """The row of this model; LookupError with the list of known ones."""
    kind = model.config.model_type
    if kind not in ARCHITECTURES:
        raise LookupError(unknown("architecture for head pruning", kind, ARCHITECTURES))
    return ARCHITECTURES[kind]


def geometry(config) -> Geometry:
    """Head counts from a transformers config (`num_key_value_heads` and `head_dim` only where the config has them)."""
    heads = config.num_attention_heads
    return Geometry(
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def model_geometry(model: nn.Module) -> Geometry:
    """The geometry of a model whose layers all have what its config says.

    ValueError for one from which heads were removed so that its config cannot say it (nbhelpers.compact): such a model
    predicts and writes, but no gates can be set on it.
    """
    geo = geometry(model.config)
    for layer, module in enumerate(attention_modules(model)):
        projection = base_layer(output_projection(model, module))
        reads = projection.weight.shape[0] if is_transposed(projection) else getattr(projection, "in_features", 0)
        if reads != geo.heads * geo.head_dim:
            raise ValueError(
                f"layer {layer} has {reads // geo.head_dim} heads and its config says {geo.heads}: heads were removed "
                "from this model; prune the model it was made from to a higher level"
            )
    return geo


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention modules in layer order, also inside a PEFT wrapper. RuntimeError if one is not found."""
    arch = architecture(model)
    found = {
        module.layer_idx: module
        for name, module in model.named_modules()
        if name.split(".")[-1] == arch.attention and hasattr(module, arch.output) and hasattr(module, "layer_idx")
    }
    expected = model.config.num_hidden_layers
    if sorted(found) != list(range(expected)):
        raise RuntimeError(
            f"found attention modules for layers {sorted(found)}, expected 0 to {expected - 1} ({arch.attention})"
        )
    return [found[layer] for layer in range(expected)]


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers in order: the modules that hold the attention modules."""
    names = {module: name for name, module in model.named_modules()}
    return [model.get_submodule(names[module].rsplit(".", 1)[0]) for module in attention_modules(model)]


def output_projection(model: nn.Module, attention: nn.Module) -> nn.Module:
    """The projection a layer's heads are written into: its input holds the heads side by side, head_dim each."""
    return getattr(attention, architecture(model).output)


def is_transposed(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, whose weight is (in, out) where Linear's is (out, in)."""
    return type(base_layer(module)).__name__ == "Conv1D"


def is_quantised(module: nn.Module) -> bool:
    """True for 8- and 4-bit weights, whatever type they are stored in."""
    weight = base_layer(module).weight
    return not weight.is_floating_point() or hasattr(weight, "quant_state")


def base_layer(module: nn.Module) -> nn.Module:
    """The layer itself, without the PEFT layer around it."""
    return module.base_layer if hasattr(module, "base_layer") else module


def output_weight(model: nn.Module, attention: nn.Module) -> torch.Tensor:
    """The output projection as (out, heads * head_dim), a view: writing to it writes to the model.

    ValueError for 8- and 4-bit weights, whose columns cannot be read or zeroed in place.
    """
    layer = base_layer(output_projection(model, attention))
    if is_quantised(layer):
        raise ValueError(
            "head pruning needs 16- or 32-bit weights, got a quantised model; load it without quantisation"
        )
    return layer.weight.T if is_transposed(layer) else layer.weight


def query_rows(model: nn.Module, attention: nn.Module, head: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One head's query weights (head_dim, in) and bias (head_dim) or None, as views into the model."""
    arch, geo = architecture(model), geometry(model.config)
    layer = base_layer(getattr(attention, arch.query))
    weight = layer.weight.T if is_transposed(layer) else layer.weight
    stride = 3 * geo.head_dim if arch.layout == "per_head" else geo.head_dim
    rows = slice(head * stride, head * stride + geo.head_dim)
    return weight[rows], None if layer.bias is None else layer.bias[rows]


def head_columns(geo: Geometry, head: int) -> slice:
    """Columns of the output projection's input that belong to one head."""
    return slice(head * geo.head_dim, (head + 1) * geo.head_dim)
