"""How are closed heads taken out for good? A narrower model that computes what the gated one computes.

The rows of the query, key and value projections that made a closed head, and the columns of the output projection that
read it, go. A layer that lost all its heads still adds its output projection's bias and still counts positions in the
KV cache. Narrower products sum in another order, so equal means: the logits differ by at most 1e-5 of the largest in
float32 (1e-12 in float64), with the same greedy tokens.

Where every layer keeps equally many heads and the architecture reads `head_dim` from its config, the result is a plain
transformers model with a smaller config. Anything else keeps its config and loads through models.load_model alone, by
the record that lies beside the weights; plain transformers refuses those files for their shapes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nbhelpers import attention, records
from nbhelpers.architecture import (
    Architecture,
    Geometry,
    architecture,
    attention_modules,
    geometry,
    is_quantised,
    is_transposed,
    model_geometry,
)
from nbhelpers.attention import Head

RECORD_FILE = "compact_heads.json"
RECORD_FORMAT = 1
PLAIN, OURS = "plain transformers", "nbhelpers"  # what loads a compact model
SAYS_HEAD_DIM = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "phi3")  # the heads need not fill the hidden size

Kept = tuple[tuple[int, ...], ...]  # per layer the heads that are left, numbered as they were before


@dataclass(frozen=True)
class Removal:
    """What was taken out of a model. `heads`, `kv_heads`: of each layer before; `loads_with`: PLAIN or OURS."""

    heads: int
    kv_heads: int
    head_dim: int
    kept: Kept
    loads_with: str

    def as_dict(self) -> dict:
        kept = [list(heads) for heads in self.kept]
        return {"format": RECORD_FORMAT, **vars(self), "kept": kept}


# May these heads go? --------------------------------------------------------------------------------------------------


def check_whole_groups(geo: Geometry, kv_groups: bool) -> None:
    """ValueError where heads share keys and values but are not chosen in whole groups: only gating is possible then.

    Single heads could by luck leave every group with equally many; a run must not depend on that.
    """
    if geo.group_size > 1 and not kv_groups:
        raise ValueError(
            f"remove needs whole KV groups, and here {geo.group_size} heads share each key/value head: add --kv-groups "
            "(kv_groups=True), or leave remove off and only close the heads"
        )


def kept_heads(geo: Geometry, closed: Iterable[Head]) -> Kept:
    """The heads that are left in each layer; ValueError for what no narrower projection can compute.

    A layer's KV groups must keep equally many of their heads, or none: every key/value head serves the same number.
    """
    gone, size = {tuple(head) for head in closed}, geo.group_size
    kept = tuple(tuple(h for h in range(geo.heads) if (layer, h) not in gone) for layer in range(geo.layers))
    for layer, heads in enumerate(kept):
        left = {group: sum(head // size == group for head in heads) for group in range(geo.kv_heads)}
        most = max(left.values())
        odd = next((group for group, number in left.items() if 0 < number < most), None)
        if odd is not None:
            raise ValueError(
                f"heads cannot be removed: in layer {layer} KV group {odd} keeps {left[odd]} of {size} heads and "
                f"another keeps {most}; close whole groups (--kv-groups), or only close the heads"
            )
    return kept


def _removal(config, kept: Kept) -> Removal:
    geo = geometry(config)
    loads_with = OURS if _smaller_config(config, kept) is None else PLAIN
    return Removal(geo.heads, geo.kv_heads, geo.head_dim, kept, loads_with)


def _smaller_config(config, kept: Kept) -> dict[str, int] | None:
    """The config fields that say what is left, {} where nothing went; None where no config of this kind can say it."""
    from huggingface_hub.errors import StrictDataclassError

    geo = geometry(config)
    counts = {(len(heads), len(_groups(geo, heads))) for heads in kept}
    if counts == {(geo.heads, geo.kv_heads)}:
        return {}
    if len(counts) > 1 or (0, 0) in counts or config.model_type not in SAYS_HEAD_DIM:
        return None
    ((heads, kv_heads),) = counts
    fields = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": geo.head_dim}
    try:
        type(config).from_dict({**config.to_dict(), **fields})
    except (StrictDataclassError, ValueError):  # Llama's wants heads that divide the hidden size
        return None
    return fields


# Removal --------------------------------------------------------------------------------------------------------------


def removal(model: nn.Module) -> Removal | None:
    """What was removed from this model, None for a whole one."""
    return getattr(model, "nbhelpers_removal", None)


def remove_heads(model: nn.Module) -> nn.Module:
    """A compact copy of a gated model: the heads that are closed are not there any more, no gate is left.

    The given model stays as it is. All tensors but those of the narrowed projections are shared between the two (no
    memory for a second model is needed): train or release one of them only when the other is not needed any more.
    ValueError where the heads cannot go (see kept_heads), and for quantised weights or an unmerged adapter.
    """
    model_geometry(model)
    kept = kept_heads(geometry(model.config), attention.closed_heads(model))
    _check_weights(model)
    narrow = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with torch.inference_mode(False):  # weights made in inference mode could not be trained
        apply_removal(narrow, _removal(model.config, kept))
    return narrow


def _check_weights(model: nn.Module) -> None:
    for module in attention_modules(model):
        for name, layer in module.named_children():
            if hasattr(layer, "base_layer"):
                raise ValueError(f"{name} carries an adapter; merge it before heads are removed")
            if hasattr(layer, "weight") and is_quantised(layer):
                raise ValueError("heads cannot be removed from quantised weights; load the model without quantisation")


def apply_removal(model: nn.Module, found: Removal) -> None:
    """Narrow a model in place, its weights or, before they are loaded, their shapes alone (meta device)."""
    arch, geo = architecture(model), geometry(model.config)
    fields = _smaller_config(model.config, found.kept) if found.loads_with == PLAIN else None
    names = {module: name for name, module in model.named_modules()}
    for module, heads in zip(attention_modules(model), found.kept, strict=True):
        if len(heads) == geo.heads:
            continue
        if heads:
            _narrow(module, arch, geo, heads)
            if fields is None and arch.query == "qkv_proj":  # Phi-3's forward asks the config for the number of heads
                module.config = _LayerConfig(module.config, len(heads))
        else:
            parent, _, last = names[module].rpartition(".")
            setattr(model.get_submodule(parent), last, NoHeads(module, arch.output))
    for name, value in (fields or {}).items():
        setattr(model.config, name, value)
    model.nbhelpers_removal = found


def _narrow(module: nn.Module, arch: Architecture, geo: Geometry, heads: Sequence[int]) -> None:
    """Keep these heads, and the key/value heads that serve them, of one attention module."""
    groups = _groups(geo, heads)
    for name, rows in _projection_rows(arch, geo, heads, groups).items():
        _keep_outputs(getattr(module, name), rows)
    _keep_inputs(getattr(module, arch.output), _numbers(heads, geo.head_dim))
    counts = {
        "num_heads": len(heads),
        "split_size": len(heads) * geo.head_dim,
        "num_key_value_heads": len(groups),
        "num_key_value_groups": len(heads) // len(groups),
    }
    for name, value in counts.items():
        if hasattr(module, name):
            setattr(module, name, value)
    if "head_gate" in module._buffers:
        module.head_gate = None


def _groups(geo: Geometry, heads: Iterable[int]) -> list[int]:
    return sorted({head // geo.group_size for head in heads})


def _projection_rows(
    arch: Architecture, geo: Geometry, heads: Sequence[int], groups: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Per projection the outputs that stay: queries of these heads, keys and values of these groups."""
    queries, keys = _numbers(heads, geo.head_dim), _numbers(groups, geo.head_dim)
    if arch.layout == "per_head":
        return {arch.query: _numbers(heads, 3 * geo.head_dim)}
    if arch.query == "q_proj":
        return {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    first_key = geo.heads * geo.head_dim  # fused: all queries, then all keys, then all values
    first_value = first_key + geo.kv_heads * geo.head_dim
    return {arch.query: torch.cat([queries, first_key + keys, first_value + keys])}


def _numbers(blocks: Sequence[int], size: int) -> torch.Tensor:
    """The positions in these blocks of `size`: ([0, 2], 3) -> 0 1 2 6 7 8."""
    return torch.tensor([block * size + at for block in blocks for at in range(size)], dtype=torch.long)


def _keep_outputs(layer: nn.Module, rows: torch.Tensor) -> None:
    _select(layer, "weight", 1 if is_transposed(layer) else 0, rows)
    if layer.bias is not None:
        _select(layer, "bias", 0, rows)
    setattr(layer, "nf" if is_transposed(layer) else "out_features", len(rows))


def _keep_inputs(layer: nn.Module, columns: torch.Tensor) -> None:
    _select(layer, "weight", 0 if is_transposed(layer) else 1, columns)
    setattr(layer, "nx" if is_transposed(layer) else "in_features", len(columns))


def _select(layer: nn.Module, name: str, dim: int, index: torch.Tensor) -> None:
    old = getattr(layer, name)
    new = old.detach().index_select(dim, index.to(old.device))
    setattr(layer, name, nn.Parameter(new, requires_grad=old.requires_grad))


class NoHeads(nn.Module):
    """Attention of a layer without heads: adds the output projection's bias, and an entry to the KV cache.

    The entry is one number a token: a cache reads how far it is from its first layer, whichever that is.
    """

    def __init__(self, attention_module: nn.Module, output: str) -> None:
        super().__init__()
        self.layer_idx = attention_module.layer_idx
        self.output = output
        self.resid_dropout = getattr(attention_module, "resid_dropout", nn.Identity())
        setattr(self, output, _Bias(getattr(attention_module, output)))
        self.register_buffer("head_gate", None, persistent=False)

    def forward(self, hidden_states, *_inputs, past_key_values=None, layer_past=None, **_options):
        cache = past_key_values if past_key_values is not None else layer_past
        if cache is not None:
            entry = hidden_states.new_zeros(hidden_states.shape[0], 1, hidden_states.shape[1], 1)
            cache.update(entry, entry, self.layer_idx)
        bias = getattr(self, self.output).bias
        added = torch.zeros_like(hidden_states)
        return self.resid_dropout(added if bias is None else added + bias), None


class _Bias(nn.Module):
    """What is left of an output projection that reads nothing. Its empty weight is saved too: plain transformers then
    sees a wrong shape and refuses, where it would fill in a missing one at random."""

    def __init__(self, projection: nn.Module) -> None:
        super().__init__()
        weight = projection.weight
        shape = (0, weight.shape[1]) if is_transposed(projection) else (weight.shape[0], 0)
        self.weight = nn.Parameter(weight.new_empty(shape), requires_grad=weight.requires_grad)
        self.bias = projection.bias


class _LayerConfig:
    """A model's config as one layer sees it, with its own number of heads; all else is the model's."""

    def __init__(self, config, heads: int) -> None:
        self.__dict__.update(shared=config, num_attention_heads=heads)

    def __getattr__(self, name: str):
        if name.startswith("__") or name == "shared":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.shared, name)


# The record beside the weights ----------------------------------------------------------------------------------------


def save_record(model: nn.Module, folder: str | Path) -> None:
    """Write what was removed beside the weights; nothing for a whole model."""
    if found := removal(model):
        records.write_json(Path(folder) / RECORD_FILE, found.as_dict())


def load_record(folder: str | Path, config) -> Removal | None:
    """What was removed from the model in this folder, None for a whole one.

    ValueError in one line for a record that is damaged or does not belong to this config.
    """
    path = Path(folder) / RECORD_FILE
    if not path.is_file():
        return None
    content = records.read_json(path)
    found = content.get("format") if isinstance(content, dict) else None
    if found != RECORD_FORMAT:
        raise ValueError(f"{str(path)!r} has format {found!r}, expected {RECORD_FORMAT}; copy the model again")
    if fault := _fault(content, geometry(config)):
        raise ValueError(f"{str(path)!r} {fault}; copy the model again")
    kept = tuple(map(tuple, content["kept"]))
    return Removal(content["heads"], content["kv_heads"], content["head_dim"], kept, content["loads_with"])


def _fault(content: dict, geo: Geometry) -> str | None:
    """What is wrong with a record, for a config of this geometry."""
    unknown = sorted(set(content) ^ {"format", "heads", "kv_heads", "head_dim", "kept", "loads_with"})
    if unknown:
        return f"lacks or should not have {', '.join(map(repr, unknown))}"
    for name in ("heads", "kv_heads", "head_dim"):
        if type(content[name]) is not int or content[name] < 1:
            return f"needs a count {name!r}, got {content[name]!r}"
    if content["heads"] % content["kv_heads"]:
        return f"has {content['heads']} heads, no multiple of its {content['kv_heads']} key/value heads"
    if content["loads_with"] not in (PLAIN, OURS):
        return f"needs 'loads_with' to be {PLAIN!r} or {OURS!r}, got {content['loads_with']!r}"
    kept = content["kept"]
    if not isinstance(kept, list) or len(kept) != geo.layers:
        return f"needs 'kept' to list the heads of {geo.layers} layers, got {kept!r:.60}"
    before = Geometry(geo.layers, content["heads"], content["kv_heads"], content["head_dim"])
    for layer, heads in enumerate(kept):
        if not isinstance(heads, list) or any(type(h) is not int or not 0 <= h < before.heads for h in heads):
            return f"needs numbers in [0, {before.heads}) as kept heads of layer {layer}, got {heads!r:.60}"
        if heads != sorted(set(heads)):
            return f"needs the kept heads of layer {layer} in order and once each, got {heads!r:.60}"
    if content["loads_with"] == OURS and before != geo:
        return (
            f"is for {before.heads} heads ({before.kv_heads} key/value heads) of {before.head_dim}, the model's config "
            f"says {geo.heads} ({geo.kv_heads}) of {geo.head_dim}"
        )
    if content["loads_with"] == PLAIN and any(len(heads) != geo.heads for heads in kept):
        return f"does not keep the {geo.heads} heads in every layer that the model's config says"
    gone = [(layer, h) for layer, heads in enumerate(kept) for h in range(before.heads) if h not in heads]
    try:
        kept_heads(before, gone)
    except ValueError as error:
        return f"is for no model ({error})"
    return None


def loader(config, found: Removal | None) -> type:
    """The class whose from_pretrained loads the model: AutoModelForCausalLM, or one that is built as narrow as that."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if found is None or found.loads_with == PLAIN:
        return AutoModelForCausalLM
    whole = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]

    def build(self, config, *inputs, **options) -> None:
        whole.__init__(self, config, *inputs, **options)
        apply_removal(self, found)
        self.__class__ = whole

    return type(whole.__name__, (whole,), {"__init__": build, "__module__": whole.__module__})
