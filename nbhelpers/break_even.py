"""From how many labelled dialogues on is a small fine-tuned model ahead of a large one that was not fine-tuned?

Accuracy of the small model after training on 0 to all rows, the large model's line beside it, and where they cross.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy

from nbhelpers import coding_metrics


def curve(
    points: Sequence[tuple[int, Sequence[bool]]],
    large_line: Sequence[bool],
    *,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """The curve, its crossing and a "sentence".

    points: (training rows, right or not of each test document), rows growing. large_line: the large model's outcomes on
    the same documents. The crossing is where the small model gets ahead and stays ahead up to the last point, linear in
    log(1 + rows) between the two points "between"; "state" is "crosses", "between" (just as good at the first of those
    two: where between them it gets ahead cannot be told, rows is None), "from the start" (ahead at the first point and
    ever after) or "never" (not ahead at the last point: rows is None). Its interval are percentiles among the resamples
    of the documents that cross, or are ahead from the start; `share_of_resamples` says how many did.
    """
    rows = [count for count, _ in points]
    _check(rows, points, large_line)
    accuracies = [float(numpy.mean(right)) for _, right in points]
    large = float(numpy.mean(large_line))
    differences = [accuracy - large for accuracy in accuracies]
    crossing = _crossing(rows, differences)
    drawn = coding_metrics.resampled_accuracies([*(right for _, right in points), large_line], resamples, seed)
    crossings = [_crossing(rows, resample.tolist()) for resample in drawn[:, :-1] - drawn[:, -1:]]
    crossed = [found for found in crossings if found is not None]
    tail, state = (1 - confidence) / 2, _state(differences)
    told = crossed and state in ("crosses", "from the start")
    low, high = numpy.quantile(crossed, [tail, 1 - tail]) if told else (None, None)
    options = (confidence, resamples, seed)
    found = {
        "n": len(large_line),
        "points": [
            {"rows": count, "accuracy": accuracy, **coding_metrics.accuracy_interval(right, *options)}
            for (count, right), accuracy in zip(points, accuracies, strict=True)
        ],
        "large": {"accuracy": large, **coding_metrics.accuracy_interval(large_line, *options)},
        "crossing": {
            "state": state,
            "rows": None if state == "between" else crossing,
            "between": _between(rows, differences) if state in ("crosses", "between") else None,
            "low": None if low is None else float(low),
            "high": None if high is None else float(high),
            "share_of_resamples": len(crossed) / resamples,
        },
    }
    return found | {"sentence": _sentence(found, rows)}


def with_uncounted(found: dict[str, Any], validation_rows: int, shots: int = 0) -> dict[str, Any]:
    """The curve with the labels that its numbers of rows leave out, in its "sentence" too.

    validation_rows: dialogues that chose the best step of each tuning. shots: solved dialogues in every prompt.
    """
    said = f"Plus {validation_rows} validation dialogues, which chose each tuning's best step"
    said += f", and {shots} solved in every prompt." if shots else "."
    return found | {"validation_rows": validation_rows, "shots": shots, "sentence": f"{found['sentence']} {said}"}


def _state(differences: Sequence[float]) -> str:
    if differences[-1] <= 0:
        return "never"
    behind = [difference for difference in differences if difference <= 0]
    return "from the start" if not behind else "between" if behind[-1] == 0 else "crosses"


def _between(rows: Sequence[int], differences: Sequence[float]) -> list[int]:
    """The last point that is not ahead, and the one after it."""
    last = max(index for index, difference in enumerate(differences) if difference <= 0)
    return [rows[last], rows[last + 1]]


def _crossing(rows: Sequence[int], differences: Sequence[float]) -> float | None:
    """Rows from which on every difference is above 0; None where the last one is not."""
    if differences[-1] <= 0:
        return None
    last = max((index for index, difference in enumerate(differences) if difference <= 0), default=None)
    if last is None:
        return float(rows[0])
    left, right = math.log1p(rows[last]), math.log1p(rows[last + 1])
    part = differences[last] / (differences[last] - differences[last + 1])
    return math.expm1(left + part * (right - left)) if part else float(rows[last])


def _sentence(found: dict[str, Any], rows: Sequence[int]) -> str:
    crossing, large = found["crossing"], f"the large one ({found['large']['accuracy']:.1%})"
    share = f"{crossing['share_of_resamples']:.0%} of resamples of the {found['n']} test documents"
    if crossing["state"] == "never":
        until = f"With up to {rows[-1]} labelled dialogues"
        return f"{until} the small model does not end ahead of {large}; in {share} it does."
    if crossing["state"] == "from the start":
        return f"The small model is ahead of {large} from {rows[0]} labelled dialogues on; in {share} it ends ahead."
    before, after = crossing["between"]
    if crossing["state"] == "between":
        return (
            f"The small model is just as good as {large} with {before} labelled dialogues and ahead with {after}, the "
            f"next number tried: where between them it gets ahead cannot be told; in {share} it ends ahead."
        )
    return (
        f"The small model gets ahead of {large} at about {crossing['rows']:.0f} labelled dialogues "
        f"[{crossing['low']:.0f}, {crossing['high']:.0f}], between the tried {before} and {after}; in {share} it ends "
        "ahead."
    )


def sizes(n: int, points: int = 6) -> list[int]:
    """Numbers of training rows to try: 0, then up to n by doubling, `points` in all (fewer where n is small).

    >>> sizes(384)
    [0, 24, 48, 96, 192, 384]
    """
    if n < 1 or points < 2:
        raise ValueError(f"a curve needs at least 1 row and 2 points, got {n} rows and {points} points")
    return sorted({0, *(n // 2**halvings for halvings in range(points - 1))})


def subsets(labels: Sequence[Hashable], sizes: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Row numbers, in the order of the data, of nested subsets: each holds the smaller ones.

    labels: one of each row. Rows are taken in rounds, one of every label that has rows left, in an order drawn anew for
    each round: so numbers of rows differ by at most 1 between labels that have enough.
    """
    if sizes and not 0 <= min(sizes) <= max(sizes) <= len(labels):
        raise ValueError(f"sizes must be 0 to {len(labels)} training rows, got {list(sizes)}")
    generator = numpy.random.default_rng(seed)
    rounds: dict[Hashable, int] = {}
    place = {}
    for row in generator.permutation(len(labels)).tolist():
        rounds[labels[row]] = place[row] = rounds.get(labels[row], -1) + 1
    draw = generator.random(len(labels))
    order = sorted(place, key=lambda row: (place[row], draw[row]))
    return [sorted(order[:size]) for size in sizes]


def _check(rows: Sequence[int], points: Sequence[tuple[int, Sequence[bool]]], large_line: Sequence[bool]) -> None:
    if not points or not len(large_line):
        raise ValueError("a break-even curve needs at least one point and one test document")
    if rows != sorted(set(rows)) or rows[0] < 0:
        raise ValueError(f"points must have growing numbers of training rows from 0 on, got {rows}")
    counts = {len(large_line), *(len(right) for _, right in points)}
    if len(counts) > 1:
        raise ValueError(
            f"points and the large model must have answered the same documents, got {sorted(counts)} of them"
        )
