"""Which MLP channels can be taken out for good? Closing, choosing and removing them, and what that gains in speed.

A **channel** is one of the numbers between an MLP's two layers: a row of the up projection (with its bias, and of the
gate where there is one) coupled with a column of the down projection. It is **closed** when its column of the down
projection is zero: it then adds exactly 0, also what a bias alone would have made it add (act(b) times its column). The
down projection's own bias belongs to no channel and stays.

Removal takes equally many out of every layer, so that the config can say it and plain transformers loads the result.
Narrower products sum in another order, so equal means: the logits differ from those of the closed model by at most 1e-5
of the largest in float32 (1e-12 in float64), with the same greedy tokens. Experts have channels of their own: each
gives up equally many.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nbhelpers import adapters, evaluate
from nbhelpers.architecture import base_layer, decoder_layers, is_quantised, is_transposed
from nbhelpers.mask_selection import count
from nbhelpers.registry import unknown


class Mlp(NamedTuple):
    """Names of an MLP's parts. `ups`: what makes a channel; `fused`: gates first, then ups, in one weight."""

    place: str  # of the module that holds them, after the layer's name; "" where the layer itself does
    ups: tuple[str, ...]
    down: str
    field: str  # of the config, that says how many channels a layer has
    fused: bool = False


_GATED = Mlp("mlp", ("gate_proj", "up_proj"), "down_proj", "intermediate_size")
MLPS: dict[str, Mlp] = {
    "gpt2": Mlp("mlp", ("c_fc",), "c_proj", "n_inner"),
    "opt": Mlp("", ("fc1",), "fc2", "ffn_dim"),
    "gpt_neox": Mlp("mlp", ("dense_h_to_4h",), "dense_4h_to_h", "intermediate_size"),
    "llama": _GATED,
    "mistral": _GATED,
    "mixtral": Mlp("mlp.experts", ("gate_up_proj",), "down_proj", "intermediate_size", fused=True),
    "qwen2": _GATED,
    "qwen3": _GATED,
    "phi3": Mlp("mlp", ("gate_up_proj",), "down_proj", "intermediate_size", fused=True),
}

EXPERT_MULTIPLE = 8  # the grouped product of experts wants rows of whole 16 bytes: 8 numbers of 2 bytes, 4 of 4

Channels = tuple[tuple[tuple[int, ...], ...], ...]  # by layer and expert (one where an MLP has none), from 0, sorted


@dataclass(frozen=True)
class Geometry:
    """`channels` of each expert of each layer; experts is 1 for a plain MLP."""

    layers: int
    experts: int
    channels: int


@dataclass(frozen=True)
class Removal:
    """What was taken out of a model: `channels` of each expert before, and the numbers of those kept."""

    channels: int
    kept: Channels

    def as_dict(self) -> dict:
        """For a record."""
        return {"channels": self.channels, "kept": [[list(one) for one in layer] for layer in self.kept]}


# Where they are -------------------------------------------------------------------------------------------------------


def mlp(model: nn.Module) -> Mlp:
    """The row of this model; LookupError with the list of known ones."""
    kind = model.config.model_type
    if kind not in MLPS:
        raise LookupError(unknown("architecture for channel removal", kind, MLPS))
    return MLPS[kind]


def channel_geometry(model: nn.Module) -> Geometry:
    """How many channels there are. ValueError for adapters, quantised weights, or layers of unequal width."""
    row, widths = mlp(model), set()
    if adapters.are_on(model):
        raise ValueError("the model carries adapters that are not merged: merge them before channels are chosen")
    for holder in _holders(model):
        if not isinstance(getattr(holder, row.down), nn.Parameter) and is_quantised(getattr(holder, row.down)):
            raise ValueError("channels cannot be removed from quantised weights; load the model without quantization")
        widths.add(tuple(_down(holder, row).shape[::2]))
    if len(widths) != 1:
        raise ValueError(f"layers must have equally many channels, got {sorted(width for _, width in widths)}")
    ((experts, channels),) = widths
    return Geometry(len(_holders(model)), experts, channels)


def coupled(model: nn.Module) -> list[dict[str, int]]:
    """Per layer the weights of its MLP, the down projection last: parameter -> how often each channel is in it.

    2 where gates and ups are fused (channel c is at c and at channels + c), else 1.
    """
    row, names = mlp(model), {id(parameter): name for name, parameter in model.named_parameters()}
    return [
        {names[id(_weight(holder, part))]: 1 + (row.fused and part != row.down) for part in (*row.ups, row.down)}
        for holder in _holders(model)
    ]


def _holders(model: nn.Module) -> list[nn.Module]:
    """The modules that hold the projections, in layer order."""
    place = mlp(model).place
    return [layer.get_submodule(place) if place else layer for layer in decoder_layers(model)]


def _weight(holder: nn.Module, part: str) -> nn.Parameter:
    found = getattr(holder, part)
    return found if isinstance(found, nn.Parameter) else base_layer(found).weight


def _matrices(holder: nn.Module, part: str) -> torch.Tensor:
    """A weight as (experts, outputs, inputs), a view."""
    weight = _weight(holder, part).detach()
    if weight.ndim == 3:
        return weight
    return (weight.T if is_transposed(getattr(holder, part)) else weight)[None]


def _down(holder: nn.Module, row: Mlp) -> torch.Tensor:
    """(experts, outputs, channels), a view."""
    return _matrices(holder, row.down)


# Which ones -----------------------------------------------------------------------------------------------------------


def channel_scores(model: nn.Module, scores: Iterable[tuple[str, torch.Tensor]]) -> torch.Tensor:
    """(layers, experts, channels), float64: the sum of the scores of all weights that a channel couples.

    scores: of importance.scores(model, ...); weights that are in no MLP are passed over. For gradient_squared and
    taylor_squared a sum is what the strategy means; for the others it is a convention. ValueError names what lacks.
    """
    geo, row, holders = channel_geometry(model), mlp(model), _holders(model)
    places = {name: (layer, part) for layer, parts in enumerate(coupled(model)) for name, part in parts.items()}
    downs = {id(_weight(holder, row.down)) for holder in holders}
    total = torch.zeros(geo.layers, geo.experts, geo.channels, dtype=torch.float64)
    for name, score in scores:
        if name not in places:
            continue
        layer, side_by_side = places.pop(name)
        matrix = score.double() if score.ndim == 3 else score.double()[None]
        if score.ndim == 2 and is_transposed(getattr(holders[layer], row.down)):
            matrix = matrix.mT
        sums = matrix.sum(1 if id(model.get_parameter(name)) in downs else 2)
        total[layer] += sums.view(geo.experts, side_by_side, geo.channels).sum(1)
    if places:
        raise ValueError(f"scores lack {', '.join(sorted(places))}: a channel needs those of all that it couples")
    return total


def choose_channels(scores: torch.Tensor, level: float, *, multiple_of: int | None = None) -> Channels:
    """The channels that stay when the share `level` of each layer's (each expert's) least important ones goes.

    scores: (layers, experts, channels). Exact: round-half-even of the decimal level times the channels go; ties by
    number; levels are nested. multiple_of: as many more stay as make their number a multiple of it (None:
    EXPERT_MULTIPLE for experts, else 1); GPUs are fastest with multiples of 64. ValueError for a level outside [0, 1],
    or where none would be left.
    """
    if not 0 <= level <= 1:
        raise ValueError(f"level must be in [0, 1], got {level}")
    channels, multiple_of = scores.shape[-1], multiple_of or (EXPERT_MULTIPLE if scores.shape[1] > 1 else 1)
    gone = count(level, channels)
    if gone == channels:
        raise ValueError(f"level {level} would close all {channels} channels of every layer; lower it")
    stay = min(channels, -(-(channels - gone) // multiple_of) * multiple_of)
    order = scores.argsort(dim=-1, stable=True)[..., channels - stay :].sort(dim=-1).values
    return tuple(tuple(map(tuple, layer)) for layer in order.tolist())


def others(kept: Channels, channels: int) -> Channels:
    """The channels that are not among these."""
    return tuple(tuple(tuple(sorted(set(range(channels)) - set(one))) for one in layer) for layer in kept)


# Closing and removing -------------------------------------------------------------------------------------------------


@torch.no_grad()
def prune_channels(model: nn.Module, channels: Sequence[Sequence[Sequence[int]]]) -> None:
    """Close these channels, by layer and expert, in place: their columns of the down projection become 0."""
    row = mlp(model)
    for holder, layer in zip(_holders(model), _checked(channel_geometry(model), channels), strict=True):
        for expert, gone in enumerate(layer):
            _down(holder, row)[expert][:, list(gone)] = 0


def closed_channels(model: nn.Module) -> Channels:
    """The channels whose whole column of the down projection is 0: they can go, and nothing changes."""
    channel_geometry(model)
    row = mlp(model)
    closed = [(_down(holder, row) == 0).all(1) for holder in _holders(model)]
    return tuple(tuple(tuple(one.nonzero().flatten().tolist()) for one in layer) for layer in closed)


def remove_channels(model: nn.Module, kept: Sequence[Sequence[Sequence[int]]]) -> nn.Module:
    """A copy of the model with only these channels, by layer and expert, equally many everywhere.

    It computes what the model computes with the others closed, whether or not they are. The given model stays as it is;
    all tensors but those of the MLPs are shared between the two. Its config says the new width, so plain transformers
    loads what is saved. ValueError for unequal numbers, none, or what the model does not have.
    """
    geo, row = channel_geometry(model), mlp(model)
    found = _checked(geo, kept)
    counts = sorted({len(one) for layer in found for one in layer})
    if len(counts) > 1:
        raise ValueError(
            f"every layer and expert must keep equally many channels, got from {counts[0]} to {counts[-1]}: no config "
            "can say that; choose with choose_channels, or only close them"
        )
    if counts == [0]:
        raise ValueError("at least one channel must stay in every layer")
    if geo.experts > 1 and counts[0] % EXPERT_MULTIPLE:
        raise ValueError(
            f"experts must keep a multiple of {EXPERT_MULTIPLE} channels, got {counts[0]}: their grouped product wants "
            "rows of whole 16 bytes; choose with choose_channels, or only close them"
        )
    narrow = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    with torch.inference_mode(False):  # weights made in inference mode could not be trained
        for holder, layer in zip(_holders(narrow), found, strict=True):
            _narrow(holder, row, torch.tensor(layer), geo.channels)
    setattr(narrow.config, row.field, counts[0])
    narrow.nbhelpers_channels = Removal(geo.channels, found)
    return narrow


def removal(model: nn.Module) -> Removal | None:
    """What remove_channels took out of this model, None for one that it did not make (a loaded one too)."""
    return getattr(model, "nbhelpers_channels", None)


def _narrow(holder: nn.Module, row: Mlp, kept: torch.Tensor, channels: int) -> None:
    """kept: (experts, channels that stay)."""
    outputs = torch.cat([kept, channels + kept], dim=1) if row.fused else kept
    for part in row.ups:
        _keep(holder, part, outputs, of_outputs=True)
    _keep(holder, row.down, kept, of_outputs=False)
    for name in ("intermediate_size", "intermediate_dim"):
        if hasattr(holder, name):
            setattr(holder, name, kept.shape[1])


def _keep(holder: nn.Module, part: str, index: torch.Tensor, *, of_outputs: bool) -> None:
    """Keep these outputs (with their biases), or these inputs, of one projection."""
    layer, weight = getattr(holder, part), _weight(holder, part)
    index = index.to(weight.device)
    if weight.ndim == 3:
        pairs = zip(weight.detach(), index, strict=True)
        new = torch.stack([one.index_select(0 if of_outputs else 1, its) for one, its in pairs])
        setattr(holder, part, nn.Parameter(new, requires_grad=weight.requires_grad))
        return
    transposed = is_transposed(layer)
    dim = int(of_outputs) if transposed else 1 - int(of_outputs)
    layer.weight = nn.Parameter(weight.detach().index_select(dim, index[0]), requires_grad=weight.requires_grad)
    if of_outputs and layer.bias is not None:
        bias = layer.bias
        layer.bias = nn.Parameter(bias.detach().index_select(0, index[0]), requires_grad=bias.requires_grad)
    names = ("nf", "nx") if transposed else ("out_features", "in_features")
    setattr(layer, names[0] if of_outputs else names[1], len(index[0]))


def _checked(geo: Geometry, channels: Sequence[Sequence[Sequence[int]]]) -> Channels:
    """Sorted, each once; ValueError for another number of layers or experts, or a channel that is not there."""
    found = tuple(tuple(tuple(sorted({int(at) for at in one})) for one in layer) for layer in channels)
    if len(found) != geo.layers or any(len(layer) != geo.experts for layer in found):
        raise ValueError(
            f"channels must be listed for {geo.layers} layers of {geo.experts} experts each (1 where there are none), "
            f"got {[len(layer) for layer in found]}"
        )
    wrong = [at for layer in found for one in layer for at in one if not 0 <= at < geo.channels]
    if wrong:
        raise ValueError(f"channel {wrong[0]} does not exist: {geo.channels} channels, from 0")
    return found


# What it gains --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """Tokens a second of the whole model, with channels closed (masks alone), and without them, measured in turn."""

    whole_tokens_per_second: float
    closed_tokens_per_second: float
    removed_tokens_per_second: float

    @property
    def masks_alone(self) -> float:
        """How many times as fast zeros in the weights make it: 1, but for the noise of the measurement."""
        return self.closed_tokens_per_second / self.whole_tokens_per_second

    @property
    def removal(self) -> float:
        """How many times as fast removal makes it."""
        return self.removed_tokens_per_second / self.whole_tokens_per_second

    def line(self) -> str:
        return (
            f"removal: {self.removal:.2f} times as fast; masks alone: none (measured {self.masks_alone:.2f}, a zero "
            "costs as much as any other number)"
        )


def measured_speed(
    model: nn.Module,
    kept: Sequence[Sequence[Sequence[int]]],
    rows: Sequence[dict],
    *,
    passes: int = 5,
    should_stop: Callable[[], bool] | None = None,
) -> Speed:
    """Read the rows with the model, with a copy whose other channels are closed, and with one without them, in turn.

    The model stays as it is; copies share all but MLP weights. See evaluate.tokens_per_second.
    """
    geo, row = channel_geometry(model), mlp(model)
    mine = {id(_weight(holder, row.down)) for holder in _holders(model)}
    shared = {id(parameter): parameter for parameter in model.parameters() if id(parameter) not in mine}
    closed = copy.deepcopy(model, shared)
    prune_channels(closed, others(_checked(geo, kept), geo.channels))
    three = [model, closed, remove_channels(model, kept)]
    return Speed(*evaluate.tokens_per_second(three, rows, passes=passes, should_stop=should_stop))
