"""Are a large and a small model better together? One weight on their log-probabilities, chosen on validation."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy

WEIGHTS = tuple(step / 20 for step in range(21))  # of the large model


def combine(large: numpy.ndarray, small: numpy.ndarray, weight: float) -> numpy.ndarray:
    """Normalised log-probabilities of weight * large + (1 - weight) * small: a product of experts.

    large, small: (rows, labels) log-probabilities over the same labels. At 0 it is the small model's own, at 1 the
    large one's.
    """
    _check(large, small)
    if not 0 <= weight <= 1:
        raise ValueError(f"weight must be in [0, 1], got {weight}")
    if weight in (0, 1):  # and no 0 * -inf
        return (large if weight else small).copy()
    mixed = weight * large + (1 - weight) * small
    highest = mixed.max(1, keepdims=True)
    if not numpy.isfinite(highest).all():
        row = int(numpy.argmin(numpy.isfinite(highest[:, 0])))
        raise ValueError(f"row {row} has no label that both models find possible: smooth the scores first")
    return mixed - highest - numpy.log(numpy.exp(mixed - highest).sum(1, keepdims=True))


def grid(
    validation_large: numpy.ndarray, validation_small: numpy.ndarray, gold: Sequence[Collection[int]]
) -> list[dict[str, float]]:
    """[{"weight", "accuracy"}]: top-1 accuracy on validation for weights 0 to 1 by 0.05.

    gold: columns that are right, one collection a row.
    """
    if len(gold) != len(validation_large) or not len(gold):
        raise ValueError(
            f"gold needs the right columns of each validation row, got {len(gold)} of {len(validation_large)}"
        )
    found = []
    for weight in WEIGHTS:
        said = combine(validation_large, validation_small, weight).argmax(1).tolist()
        right = sum(column in columns for column, columns in zip(said, gold, strict=True))
        found.append({"weight": weight, "accuracy": right / len(gold)})
    return found


def choose(validation_large: numpy.ndarray, validation_small: numpy.ndarray, gold: Sequence[Collection[int]]) -> float:
    """The large model's weight with the highest validation accuracy; of equal ones the smallest.

    The small model is the cheaper one, and at 0 the large one need not run at all.
    """
    return max(grid(validation_large, validation_small, gold), key=lambda point: point["accuracy"])["weight"]


def _check(large: numpy.ndarray, small: numpy.ndarray) -> None:
    if large.ndim != 2 or large.shape != small.shape:
        raise ValueError(
            f"scores must be (rows, labels) of the same rows and labels, got {large.shape} and {small.shape}"
        )
    for side, scores in (("large", large), ("small", small)):
        sums = numpy.exp(scores.astype(numpy.float64)).sum(1)
        if not numpy.allclose(sums, 1, atol=1e-3):
            row = int(numpy.argmax(numpy.where(numpy.isfinite(sums), abs(sums - 1), numpy.inf)))
            raise ValueError(
                f"the {side} model's probabilities of row {row} sum to {sums[row]:.4g}: normalise over the labels"
            )
