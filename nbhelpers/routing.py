"""Which answers can be accepted as they are, and which go to a person? A threshold on the model's own probability.

Chosen on the validation part alone, then measured on the test part. Beside it how far the probabilities can be trusted:
expected calibration error and Brier score.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy

from nbhelpers import coding_metrics

WANTED = (0.8, 0.9, 0.95)  # precisions of the accepted answers
MOST_POINTS = 50
BINS = 10


def curve(
    validation_probability: Sequence[float],
    validation_right: Sequence[bool],
    test_probability: Sequence[float],
    test_right: Sequence[bool],
    wanted: Sequence[float] = WANTED,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """What share of the test documents is coded, and how rightly, at each wanted precision.

    probability: of the first answer, 0 to 1; an answer is accepted at or above the threshold, see `threshold`. Where
    no threshold promises the wanted precision, it is None and says so. "reached": whether the test precision is at
    least the wanted one; None where nothing was accepted.
    """
    validation = _sorted(validation_probability, validation_right, "validation")
    test = _sorted(test_probability, test_right, "test")
    return {
        "n_validation": len(validation[0]),
        "n_test": len(test[0]),
        "points": [_point(value, validation, test, confidence) for value in wanted],
        "curve": _points(test),
        "calibration_error": calibration_error(*test),
        "bins": bins(*test),
        "brier": float(((test[0] - test[1]) ** 2).mean()),
    }


def threshold(
    probability: Sequence[float], right: Sequence[bool], wanted: float, confidence: float = 0.95
) -> float | None:
    """The smallest threshold that promises the wanted precision (0 < wanted < 1) on these documents; None for none.

    Fixed-sequence testing (Bauer 1991; Westfall and Krishen 2001): probabilities seen are tried from the surest on, as
    long as the one-sided Clopper-Pearson lower bound of the precision of the accepted reaches what is wanted, and the
    last of them is taken. So the promise holds with `confidence` for all of them together; the best of them all, each
    tested alone, would be the luckiest. Tried from the first on at which all right would do: 29 accepted for 0.9, 59
    for 0.95.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted precision must be in (0, 1), got {wanted}: certainty cannot be promised")
    found = None
    for value, count, hit in zip(*_by_threshold(*_sorted(probability, right, "validation")), strict=True):
        if wanted ** int(count) > 1 - confidence:  # too few to promise anything
            continue
        if coding_metrics.tail_probability(int(hit), int(count), wanted) > 1 - confidence:
            break
        found = float(value)
    return found


def calibration_error(probability: Sequence[float], right: Sequence[bool]) -> float:
    """Expected calibration error: sum over bins of (documents / all) * |accuracy - mean probability|; see `bins`."""
    found = bins(probability, right)
    total = sum(each["n"] for each in found)
    return sum(each["n"] / total * abs(each["accuracy"] - each["confidence"]) for each in found)


def bins(probability: Sequence[float], right: Sequence[bool]) -> list[dict[str, Any]]:
    """10 bins of equal numbers of documents by growing probability; equal probabilities stay in one bin."""
    ordered, hits = _sorted(probability, right, "test")
    _, first, count = numpy.unique(ordered, return_index=True, return_counts=True)
    middle = first + count / 2  # rank of a probability among all documents
    place = numpy.repeat((BINS * middle / len(ordered)).astype(int), count)
    return [
        {
            "low": float(ordered[inside].min()),
            "high": float(ordered[inside].max()),
            "n": int(inside.sum()),
            "confidence": float(ordered[inside].mean()),
            "accuracy": float(hits[inside].mean()),
        }
        for inside in (place == number for number in numpy.unique(place))
    ]


def _point(wanted: float, validation: tuple, test: tuple, confidence: float) -> dict[str, Any]:
    chosen = threshold(*validation, wanted, confidence)
    if chosen is None:
        says = (
            f"no threshold promises {wanted:.0%} on the {len(validation[0])} validation documents: all go to a person"
        )
        return {"wanted": wanted, "threshold": None, "validation": None, "test": None, "says": says}
    seen, said = (_accepted(chosen, *part, confidence) for part in (validation, test))
    reached = said["precision"] >= wanted if said["coded"] else None
    says = f"{said['coverage']:.1%} of the documents are coded"
    says += f", {said['precision']:.1%} of them rightly" if said["coded"] else ": all go to a person"
    return {
        "wanted": wanted,
        "threshold": chosen,
        "validation": seen,
        "test": said | {"reached": reached},
        "says": says,
    }


def _accepted(chosen: float, probability: numpy.ndarray, right: numpy.ndarray, confidence: float) -> dict[str, Any]:
    inside = right[probability >= chosen]
    count, hits = len(inside), int(inside.sum())
    low, high = coding_metrics.exact_interval(hits, count, confidence) if count else (None, None)
    return {
        "coded": count,
        "right": hits,
        "coverage": count / len(right),
        "precision": hits / count if count else None,
        "low": low,
        "high": high,
    }


def _points(test: tuple) -> list[dict[str, float]]:
    """Coverage and precision at every probability of the test part from the highest on, thinned out to 50 points."""
    values, accepted, hits = _by_threshold(*test)
    kept = numpy.unique(numpy.linspace(0, len(values) - 1, min(MOST_POINTS, len(values))).round().astype(int))
    return [
        {
            "threshold": float(values[at]),
            "coverage": float(accepted[at] / len(test[0])),
            "precision": float(hits[at] / accepted[at]),
        }
        for at in kept
    ]


def _by_threshold(
    probability: numpy.ndarray, right: numpy.ndarray
) -> tuple[numpy.ndarray, numpy.ndarray, numpy.ndarray]:
    """(thresholds, falling; documents accepted at each; right ones among them)."""
    values, first = numpy.unique(probability, return_index=True)  # probability grows: what stands from `first` on
    right_from = numpy.cumsum(right[::-1])[::-1]
    return values[::-1], (len(probability) - first)[::-1], right_from[first][::-1]


def _sorted(probability: Sequence[float], right: Sequence[bool], part: str) -> tuple[numpy.ndarray, numpy.ndarray]:
    if len(probability) != len(right) or len(right) == 0:
        raise ValueError(f"{part} needs one probability a document, got {len(probability)} for {len(right)} documents")
    odd = [value for value in probability if value is None or not 0 <= value <= 1]
    if odd:
        raise ValueError(
            f"{part} probabilities must be in [0, 1], got {odd[0]}: leave models without probabilities out of routing"
        )
    order = numpy.argsort(numpy.asarray(probability, dtype=float), kind="stable")
    return numpy.asarray(probability, dtype=float)[order], numpy.asarray(right, dtype=float)[order]
