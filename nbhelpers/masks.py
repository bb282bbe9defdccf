"""Which weights of a model are kept at each sparsity? Masks are made, applied, checked, and read off zeros.

A **mask** is a dict {name of the parameter: bool tensor of its stored shape, True = kept}, in the order of
`projections(model).covered`. Masks of several sparsities are nested and made together: `Levels` holds at how many of
them each weight is kept, packed. How many go is exact, and ties are broken as `mask_selection` states, the same for
every number format and device. The denominator of a sparsity is the weights of the covered projections: embeddings,
output head and norms are in none. A mask alone makes nothing faster: a zero costs as much as any other number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

import torch
from torch import nn

from nbhelpers import mask_selection
from nbhelpers.mask_patterns import DIMENSIONS, PATTERNS, SCOPES, Request
from nbhelpers.mask_selection import count, exact
from nbhelpers.projections import Projections, projections
from nbhelpers.registry import unknown

__all__ = ["Levels", "apply", "ascending", "count", "create", "how", "levels", "pack", "read_off", "verify", "weights"]

Mask = Mapping[str, torch.Tensor]
Scores = Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]] | Callable[[], Iterable]
READ_OFF = "zeros of a checkpoint"  # the pattern of a mask that nobody chose


@dataclass(frozen=True, eq=False)
class Levels:
    """Nested masks, packed: 4 bits a weight (at how many of the levels it is kept), a single one 1 bit (kept or not).

    sparsities: ascending; shapes: of each parameter as it is stored; packed: uint8 on the CPU, laid out as
    `mask_selection.pack` says; how: pattern, scope and what else chose the weights.
    """

    sparsities: tuple[float, ...]
    shapes: Mapping[str, tuple[int, ...]]
    packed: Mapping[str, torch.Tensor]
    how: Mapping[str, Any] = field(default_factory=dict)

    @property
    def bits(self) -> int:
        return mask_selection.bits_for(len(self.sparsities))

    @property
    def numbers(self) -> int:
        """Weights that the masks reach: the denominator of their sparsities."""
        return sum(map(prod, self.shapes.values()))

    def mask(self, sparsity: float | None = None, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """The mask of one sparsity, a byte a weight; without one, of the only one there is. LookupError: no such."""
        return {name: self.kept(name, sparsity, device) for name in self.shapes}

    def lazily(self, sparsity: float | None = None) -> Mask:
        """The same as a mapping that unpacks a projection each time it is asked for it."""
        self._level(sparsity)
        return _Lazily(self, sparsity)

    def kept(self, name: str, sparsity: float | None = None, device: str | torch.device = "cpu") -> torch.Tensor:
        """The mask of one projection."""
        level, shape = self._level(sparsity), self.shapes[name]
        found = mask_selection.kept(self.packed[name].numpy(), prod(shape), self.bits, level)
        return torch.from_numpy(found).view(shape).to(device)

    def gone(self) -> dict[str, tuple[int, ...]]:
        """Of each projection how many weights go at each sparsity."""
        found = {}
        for name, shape in self.shapes.items():
            codes = mask_selection.unpack(self.packed[name].numpy(), prod(shape), self.bits)
            counted = torch.bincount(torch.from_numpy(codes), minlength=len(self.sparsities) + 1)
            found[name] = tuple(counted.cumsum(0)[:-1].tolist())
        return found

    def _level(self, sparsity: float | None) -> int:
        if sparsity is None and len(self.sparsities) == 1:
            return 0
        known = [exact(one) for one in self.sparsities]
        if sparsity is None:
            told = ", ".join(map(str, self.sparsities))
            raise LookupError(f"the masks are of several sparsities, {told}: choose one (--sparsity)")
        if exact(sparsity) not in known:
            raise LookupError(unknown("sparsity", sparsity, map(str, self.sparsities)))
        return known.index(exact(sparsity))


class _Lazily(Mapping):
    def __init__(self, levels: Levels, sparsity: float | None) -> None:
        self.levels, self.sparsity = levels, sparsity

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.levels.kept(name, self.sparsity)

    def __iter__(self) -> Iterator[str]:
        return iter(self.levels.shapes)

    def __len__(self) -> int:
        return len(self.levels.shapes)


# Creation -------------------------------------------------------------------------------------------------------------


def create(
    model: nn.Module,
    scores: Scores,
    sparsities: float | Sequence[float],
    *,
    pattern: str = "unstructured",
    scope: str | None = None,
    dimension: str | None = None,
    group: int | None = None,
    absolute: bool = False,
    accept_low_coverage: bool = False,
) -> Levels:
    """Nested masks of a model at these sparsities, the lowest scores gone. See mask_patterns for the patterns.

    scores: of every covered projection, of its stored shape, in float32, bfloat16 or float16: a mapping, pairs in the
    order of the projections, or a function that begins such pairs anew. scope `global` reads them three times.
    scope, dimension, group: see `how`. absolute: compare |score|: magnitude straight from `weights(model)`. The model
    may lie on the meta device. ValueError for scores that do not fit or hold NaN, and for wrong options; LookupError
    for unknown names.
    """
    chosen = how(pattern, scope, dimension, group)
    covered = projections(model, accept_low_coverage).covered
    fractions = ascending(sparsities)
    shapes = {one.name: one.shape for one in covered}
    begin = _begin(scores, list(shapes), again=pattern == "unstructured" and chosen["scope"] == "global")

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        return _fitting(begin(), shapes)

    options = {name: value for name, value in chosen.items() if name != "pattern"}
    asked = Request(model, covered, pairs, fractions, absolute=absolute, **options)
    return Levels(tuple(map(float, fractions)), shapes, dict(PATTERNS[pattern](asked)), chosen)


def how(
    pattern: str, scope: str | None = None, dimension: str | None = None, group: int | None = None
) -> dict[str, Any]:
    """What chooses the weights, by name, what is left out filled in.

    scope: SCOPES[pattern], the first one by default. dimension: of `structured`, `outputs` by default. group: M of
    `nm`, whose sparsity is 1 - N/M, 4 by default. LookupError for unknown names, ValueError for an option of another
    pattern.
    """
    if pattern not in PATTERNS:
        raise LookupError(unknown("pattern", pattern, PATTERNS))
    known = SCOPES[pattern]
    scope = known[0] if scope is None else scope
    if scope not in known:
        raise LookupError(unknown(f"scope of pattern {pattern!r}", scope, known))
    for name, value, own in (("dimension", dimension, "structured"), ("group", group, "nm")):
        if value is not None and pattern != own:
            raise ValueError(f"{name} is of pattern {own!r}, got {value!r} with {pattern!r}: leave it out")
    found = {"pattern": pattern, "scope": scope}
    if pattern == "nm":
        return found | {"group": 4 if group is None else group}
    if pattern != "structured":
        return found
    dimension = DIMENSIONS[0] if dimension is None else dimension
    if dimension not in DIMENSIONS:
        raise LookupError(unknown("dimension", dimension, DIMENSIONS))
    return found | {"dimension": dimension}


def levels(
    scores: Scores, sparsities: float | Sequence[float], scope: str = "global", absolute: bool = False
) -> Levels:
    """Unstructured masks of whatever the scores are of, without a model; scope: `global` or `layer`."""
    if scope not in ("global", "layer"):
        raise LookupError(unknown("scope without a model", scope, ("global", "layer")))
    fractions, shapes = ascending(sparsities), {}
    begin = _begin(scores, None, again=scope == "global")

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        for name, one in begin():
            shapes[name] = tuple(one.shape)
            yield name, one

    asked = Request(None, (), pairs, fractions, scope, absolute=absolute)
    packed = dict(PATTERNS["unstructured"](asked))
    if not packed:
        raise ValueError("scores of no projection were given: a mask needs at least one")
    return Levels(tuple(map(float, fractions)), shapes, packed, {"pattern": "unstructured", "scope": scope})


def weights(model: nn.Module, accept_low_coverage: bool = False) -> dict[str, torch.Tensor]:
    """The weights of all covered projections, not copied: with absolute=True the scores of magnitude."""
    covered = projections(model, accept_low_coverage).covered
    return {one.name: model.get_parameter(one.name).detach() for one in covered}


def pack(mask: Mask, how: Mapping[str, Any] | None = None) -> Levels:
    """A single mask as `Levels`; its sparsity is the share of its weights that go. ValueError for an empty one."""
    numbers = sum(kept.numel() for kept in mask.values())
    if not numbers:
        raise ValueError("the mask holds no weights: a mask needs at least one projection")
    packed, gone = {}, 0
    for name, kept in mask.items():
        _check_bool(name, kept)
        codes = kept.detach().cpu().reshape(-1).numpy().view("uint8")
        packed[name], gone = torch.from_numpy(mask_selection.pack(codes, 1)), gone + int((~kept).sum())
    return Levels((gone / numbers,), {name: tuple(kept.shape) for name, kept in mask.items()}, packed, how or {})


def ascending(sparsities: float | Sequence[float]) -> list[Fraction]:
    """Each once. ValueError for none, too many, or one outside [0, 1]."""
    several = isinstance(sparsities, Sequence) and not isinstance(sparsities, str)
    found = sorted({exact(one) for one in (sparsities if several else [sparsities])})
    mask_selection.bits_for(len(found))
    return found


def _begin(scores: Scores, names: Sequence[str] | None, again: bool) -> Callable[[], Iterable]:
    """A function that begins the pairs anew. ValueError for pairs that can be read once, where they are read again."""
    if isinstance(scores, Mapping):
        if names is not None:
            _same_names(scores, names, "scores")
        return lambda: ((name, scores[name]) for name in names or scores)
    if callable(scores):
        return scores
    if again and iter(scores) is scores:
        raise ValueError(
            "scope 'global' reads the scores three times and these can be read once: give dict(scores), which holds "
            "them all, or a function that begins them anew"
        )
    return lambda: scores


def _fitting(pairs: Iterable, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    left = iter(shapes)
    for name, scores in pairs:
        if (wanted := next(left, None)) != name:
            raise ValueError(
                f"scores of {name} came where {wanted or 'none'} was due: give them in the projections' order"
            )
        if tuple(scores.shape) != shapes[name]:
            raise ValueError(f"scores of {name} have shape {tuple(scores.shape)}, its weights {shapes[name]}")
        yield name, scores
    if (missing := next(left, None)) is not None:
        raise ValueError(f"scores of {missing} are missing: every covered projection needs them")


def _same_names(given: Iterable[str], wanted: Iterable[str], what: str) -> None:
    given, wanted = set(given), set(wanted)
    faults = [
        f"{word} {', '.join(sorted(names)[:3])}{' and others' if len(names) > 3 else ''}"
        for word, names in (("lacks", wanted - given), ("has unknown", given - wanted))
        if names
    ]
    if faults:
        raise ValueError(
            f"the names of the {what} are not exactly those of the model's projections: it {'; it '.join(faults)}"
        )


# Application ----------------------------------------------------------------------------------------------------------


def check_fits(model: nn.Module, shapes: Mapping[str, Sequence[int]]) -> Projections:
    """The model's projections. ValueError where these names (exactly) and shapes of a mask are not theirs."""
    found = projections(model, accept_low_coverage=True)
    _same_names(shapes, (one.name for one in found.covered), "mask")
    for one in found.covered:
        if tuple(shapes[one.name]) != one.shape:
            raise ValueError(f"the mask of {one.name} has shape {tuple(shapes[one.name])}, its weights {one.shape}")
    return found


@torch.no_grad()
def apply(model: nn.Module, mask: Mask) -> None:
    """Set every weight that the mask does not keep to 0, in place. ValueError, nothing touched, where it fits not."""
    for _, weight, kept in _pairs(model, mask):
        weight.masked_fill_(~kept.to(weight.device), 0)


@torch.no_grad()
def verify(model: nn.Module, mask: Mask) -> dict[str, Any]:
    """Is every weight 0 that the mask does not keep? Plain values, for a record.

    {"layers", "numbers" (weights of the covered projections: the denominator), "masked" (of them that must be 0),
    "sparsity" (masked / numbers), "zeros" (that are 0, whatever the mask says), "violations" (masked, and not 0; NaN is
    not 0), "ok", "per_layer": {name: {"numbers", "masked", "zeros", "violations"}}}. ValueError where the mask does not
    fit, or where there was nothing to check.
    """
    per_layer = {}
    for name, weight, kept in _pairs(model, mask):
        gone, zero = ~kept.to(weight.device), weight == 0
        counted = {"numbers": weight.numel(), "masked": int(gone.sum()), "zeros": int(zero.sum())}
        per_layer[name] = counted | {"violations": int((gone & ~zero).sum())}
    total = {key: sum(one[key] for one in per_layer.values()) for key in ("numbers", "masked", "zeros", "violations")}
    return {
        "layers": len(per_layer),
        **total,
        "sparsity": total["masked"] / total["numbers"],
        "ok": total["violations"] == 0,
        "per_layer": per_layer,
    }


def read_off(model: nn.Module) -> Levels:
    """The mask of a checkpoint's zeros, in `how` called that: a weight that was 0 by chance is in it too."""
    return pack({name: weight != 0 for name, weight in weights(model, True).items()}, {"pattern": READ_OFF})


def _pairs(model: nn.Module, mask: Mask) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(name, weight, mask) of every projection; all are checked before the first one is given away."""
    if not mask:
        raise ValueError("no layer was checked: a mask without layers proves nothing")
    lazy = isinstance(mask, _Lazily)
    covered = check_fits(
        model, mask.levels.shapes if lazy else {name: kept.shape for name, kept in mask.items()}
    ).covered
    for name, kept in () if lazy else mask.items():
        _check_bool(name, kept)
    for one in covered:
        yield one.name, model.get_parameter(one.name), mask[one.name]


def _check_bool(name: str, kept: torch.Tensor) -> None:
    if kept.dtype != torch.bool:
        raise ValueError(f"the mask of {name} must be bool (True = kept), got {str(kept.dtype).removeprefix('torch.')}")
