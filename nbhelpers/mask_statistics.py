"""What do masks have in common, how are they spread, and did the loss change as their scores said?

Shares are of the weights of the projections that a mask reaches, said as `denominator` beside every total. All results
are plain values, for records and tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from nbhelpers.masks import Levels, Mask

BINS = 10


def counts(mask: Mask) -> dict[str, Any]:
    """{"layers", "numbers", "gone", "sparsity" (gone / numbers), "denominator", "per_layer": {name: ...}}."""
    return _table({name: (kept.numel(), kept.numel() - int(kept.sum())) for name, kept in mask.items()})


def counts_of_levels(levels: Levels) -> list[dict[str, Any]]:
    """`counts` of every level, each with the "asked" sparsity, read without unpacking masks."""
    gone = levels.gone()
    sizes = {name: torch.Size(shape).numel() for name, shape in levels.shapes.items()}
    return [
        {"asked": asked, **_table({name: (sizes[name], found[level]) for name, found in gone.items()})}
        for level, asked in enumerate(levels.sparsities)
    ]


def _table(found: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    if not found:
        raise ValueError("there is nothing to count: the mask has no layers")
    numbers, gone = (sum(values) for values in zip(*found.values(), strict=True))
    return {
        "layers": len(found),
        "numbers": numbers,
        "gone": gone,
        "sparsity": gone / numbers,
        "denominator": f"{numbers:,} weights of {len(found)} projections",
        "per_layer": {name: {"numbers": n, "gone": g, "sparsity": g / n} for name, (n, g) in found.items()},
    }


def histogram(mask: Mask | Mapping[str, Any], bins: int = BINS) -> dict[str, list]:
    """Projections by their own sparsity: {"edges": bins + 1 in [0, 1], "layers": bins}; 1 is in the last bin.

    mask: a mask, or what `counts` found.
    """
    if bins < 1:
        raise ValueError(f"bins must be at least 1, got {bins}")
    found = mask if "per_layer" in mask else counts(mask)
    layers = [0] * bins
    for one in found["per_layer"].values():
        layers[min(one["gone"] * bins // one["numbers"], bins - 1)] += 1
    return {"edges": [at / bins for at in range(bins + 1)], "layers": layers}


# Two masks ------------------------------------------------------------------------------------------------------------


def intersection(one: Mask, other: Mask) -> dict[str, torch.Tensor]:
    """The mask that keeps what both keep. ValueError for masks of different projections."""
    return _together(one, other, torch.logical_and)


def union(one: Mask, other: Mask) -> dict[str, torch.Tensor]:
    """The mask that keeps what one of the two keeps."""
    return _together(one, other, torch.logical_or)


def overlap(one: Mask, other: Mask) -> dict[str, Any]:
    """How much two masks keep in common, in total and "per_layer".

    {"numbers", "kept" (by each of the two), "both", "either", "jaccard" (both / either; 1 where neither keeps any),
    "share" (both / numbers), "by_chance" (the share that two independent masks of these sparsities have on average)}.
    """
    per_layer = {}
    for name, a, b in _paired(one, other):
        first, second, both = int(a.sum()), int(b.sum()), int((a & b).sum())
        per_layer[name] = _shares(a.numel(), first, second, both)
    total = _shares(*(sum(values) for values in zip(*map(_parts, per_layer.values()), strict=True)))
    return {"layers": len(per_layer), **total, "per_layer": per_layer}


def _parts(found: Mapping[str, Any]) -> tuple[int, int, int, int]:
    return found["numbers"], *found["kept"], found["both"]


def _shares(numbers: int, first: int, second: int, both: int) -> dict[str, Any]:
    either = first + second - both
    return {
        "numbers": numbers,
        "kept": [first, second],
        "both": both,
        "either": either,
        "jaccard": both / either if either else 1.0,
        "share": both / numbers,
        "by_chance": first * second / numbers**2,
    }


def _together(one: Mask, other: Mask, operation: Callable) -> dict[str, torch.Tensor]:
    return {name: operation(a, b) for name, a, b in _paired(one, other)}


def _paired(one: Mask, other: Mask) -> Iterable[tuple[str, torch.Tensor, torch.Tensor]]:
    if differing := sorted(set(one) ^ set(other)):
        raise ValueError(
            f"the masks are of different projections: {', '.join(differing[:3])} stands in one of them only"
        )
    if not one:
        raise ValueError("there is nothing to compare: the masks have no layers")
    for name in one:
        a, b = one[name], other[name]
        if a.shape != b.shape:
            raise ValueError(f"the masks of {name} have different shapes: {tuple(a.shape)} and {tuple(b.shape)}")
        yield name, a, b


# Loss -----------------------------------------------------------------------------------------------------------------


def predicted_loss_change(
    mask: Mask, scores: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]], measured: float | None = None
) -> dict[str, Any]:
    """The sum of the scores of all weights that go, beside the loss change that was measured, in the loss's own unit.

    What it predicts is what the scores say. With g the gradient of the loss: -w g (signed) gives the loss change to
    first order; |w g| (importance `taylor`) is the most that it can be to first order, whichever way the signs lie.
    Summed in float64. {"predicted", "measured", "difference" (measured - predicted), "per_layer": {name: predicted}}.
    """
    per_layer = {}
    for name, score in scores.items() if isinstance(scores, Mapping) else scores:
        if name not in mask or mask[name].shape != score.shape:
            raise ValueError(f"scores of {name} do not fit the mask: it needs the same names and shapes")
        per_layer[name] = float(score.detach()[~mask[name].to(score.device)].sum(dtype=torch.float64))
    if missing := sorted(set(mask) - set(per_layer)):
        raise ValueError(f"scores of {', '.join(missing[:3])} are missing: a prediction needs those of all that goes")
    predicted = sum(per_layer.values())
    difference = None if measured is None else measured - predicted
    return {"predicted": predicted, "measured": measured, "difference": difference, "per_layer": per_layer}
