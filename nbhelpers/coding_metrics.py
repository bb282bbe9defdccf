"""How good are a model's codes: exact match, category, chapter, F1 and top-k, each with its interval?

An answer is a line {"id", "gold": [labels], "written": label or None where something was generated, "ranked": [labels,
best first] where the label set was ranked}. A document with several gold labels is right by any of them. An answer
without a valid label is wrong, and for F1 a predicted class of its own, which no document has.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import Any

import numpy

from nbhelpers import icd10, stats
from nbhelpers.registry import unknown

Line = Mapping[str, Any]
RANKS = 10  # labels that a line keeps
MOST_ERRORS = 50
BUCKETS = ((0, 0), (1, 1), (2, 2), (3, 5), (6, 10), (11, 20), (21, math.inf))  # training rows of a label
NO_ANSWER = ""  # the predicted class of answers without a valid label: no label is empty


def prediction(line: Line) -> str | None:
    """The first of the ranking where there is one, else what was written; None where that was no valid label."""
    return line["ranked"][0] if line.get("ranked") else line.get("written")


def _top(most: int) -> Callable[[Line], bool | None]:
    return lambda line: any(said in line["gold"] for said in line["ranked"][:most]) if line.get("ranked") else None


def _part(of: Callable[[str], str | None]) -> Callable[[Line], bool]:
    def right(line: Line) -> bool:
        said = prediction(line)
        return said is not None and of(said) is not None and of(said) in {of(gold) for gold in line["gold"]}

    return right


# name -> is this answer right by it; None where the line does not have what it looks at
MEASURES: dict[str, Callable[[Line], bool | None]] = {
    "exact_match_accuracy": lambda line: line["written"] in line["gold"] if "written" in line else None,
    "category_accuracy": _part(icd10.category),
    "chapter_accuracy": _part(icd10.chapter),
    "top_1_accuracy": _top(1),
    "top_3_accuracy": _top(3),
    "top_5_accuracy": _top(5),
}
OF_CODES = ("category_accuracy", "chapter_accuracy")


def outcomes(lines: Sequence[Line], headline: str) -> list[bool]:
    """Right or not of each line by a measure. ValueError where a line does not have it, LookupError for no measure."""
    if headline not in MEASURES:
        raise LookupError(unknown("measure", headline, MEASURES))
    found = [MEASURES[headline](line) for line in lines]
    if None in found:
        missing = found.count(None)
        raise ValueError(
            f"{headline} is not there for {missing} of {len(found)} answers: compare by another measure, or let the "
            "model answer again with ranking and writing on"
        )
    return [bool(right) for right in found]


def measure(
    lines: Sequence[Line],
    *,
    kind: str,
    train_counts: Mapping[str, int],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Every measure of one model's answers; None where one does not apply.

    kind: "icd10" has categories and chapters, "labels" has none. train_counts: label -> its training rows. Category,
    chapter, F1 and both breakdowns look at `prediction`; a breakdown counts a document under its first gold label,
    whatever the model says. F1 takes as gold the predicted label where it is right, else the first gold one, and
    averages over the classes that occur as gold or as prediction (scikit-learn's way), macro equally and weighted by
    their documents. No recall: weighted, it is the accuracy. `intervals` resample documents;
    where all are right or all wrong no resample differs: accuracies have the exact binomial one instead, F1 has none.
    """
    _check(lines, kind)
    found: dict[str, Any] = {"n_samples": len(lines)}
    intervals: dict[str, Any] = {}
    for name, right in MEASURES.items():
        asked = kind == "icd10" or name not in OF_CODES
        values = [right(line) for line in lines] if asked else [None]
        if None in values:
            found[name] = None
            continue
        found[name] = stats.mean([float(bool(value)) for value in values])
        intervals[name] = accuracy_interval(values, confidence, resamples, seed)
    rows = _classes(lines)
    for name, statistic in (("f1", weighted_f1), ("macro_f1", macro_f1)):
        found[name] = statistic(rows)
        intervals[name] = f1_interval(rows, statistic, confidence, resamples, seed)
    written = [line["written"] for line in lines if "written" in line]
    wrong = [line for line in lines if prediction(line) not in line["gold"]]
    return found | {
        "no_valid_answer": written.count(None) if written else None,
        "intervals": intervals,
        "by_chapter": _by_chapter(lines, confidence) if kind == "icd10" else None,
        "by_frequency": _by_frequency(lines, train_counts, confidence),
        "errors": [
            {"id": line["id"], "gold": list(line["gold"]), "said": prediction(line)} for line in wrong[:MOST_ERRORS]
        ],
    }


def macro_f1(rows: numpy.ndarray) -> float:
    """Mean over classes of 2 * right / (gold + predicted); rows: (documents, 2) numbers of the two classes."""
    each, _ = _f1(rows)
    return float(each.mean())


def weighted_f1(rows: numpy.ndarray) -> float:
    """The same mean, weighted by a class's gold documents."""
    each, gold = _f1(rows)
    return float((each * gold).sum() / gold.sum())


def _f1(rows: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """F1 and gold documents of the classes that occur in rows, from counts alone."""
    gold, said = rows.astype(numpy.intp).T
    most = int(max(gold.max(), said.max())) + 1
    right = numpy.bincount(gold[gold == said], minlength=most)
    of_gold = numpy.bincount(gold, minlength=most)
    both = of_gold + numpy.bincount(said, minlength=most)
    there = both > 0
    return 2 * right[there] / both[there], of_gold[there]


def _classes(lines: Sequence[Line]) -> numpy.ndarray:
    pairs = [(_gold(line), prediction(line) or NO_ANSWER) for line in lines]
    numbers = {label: number for number, label in enumerate(sorted({label for pair in pairs for label in pair}))}
    return numpy.array([[numbers[gold], numbers[said]] for gold, said in pairs])


def _gold(line: Line) -> str:
    """The one gold label that a document counts for in F1."""
    said = prediction(line)
    return said if said in line["gold"] else line["gold"][0]


def _by_chapter(lines: Sequence[Line], confidence: float) -> list[dict[str, Any]]:
    groups: dict[str, list[bool]] = {}
    for line in sorted(lines, key=lambda line: icd10.normal(line["gold"][0])):
        name = icd10.chapter(line["gold"][0]) or "in no chapter"
        groups.setdefault(name, []).append(prediction(line) in line["gold"])
    return [{"chapter": name, **_share(right, confidence)} for name, right in groups.items()]


def _by_frequency(lines: Sequence[Line], counts: Mapping[str, int], confidence: float) -> list[dict[str, Any]]:
    found = []
    for low, high in BUCKETS:
        inside = [line for line in lines if low <= counts.get(line["gold"][0], 0) <= high]
        if inside:
            name = str(low) if low == high else f"{low}-{high}" if math.isfinite(high) else f"{low}+"
            right = [prediction(line) in line["gold"] for line in inside]
            labels = len({line["gold"][0] for line in inside})
            found.append({"training_rows": name, "labels": labels, **_share(right, confidence)})
    return found


def _share(right: Sequence[bool], confidence: float) -> dict[str, Any]:
    """Groups are small, so their interval is the exact binomial one: 3 of 3 says little, and a resample would not."""
    low, high = exact_interval(sum(right), len(right), confidence)
    return {"n": len(right), "accuracy": sum(right) / len(right), "low": low, "high": high}


# ------------------------------------------------------------------------------------------------ intervals


def accuracy_interval(right: Sequence[bool], confidence: float = 0.95, resamples: int = 2000, seed: int = 0) -> dict:
    """{"low", "high", "by"}: bootstrap over documents, or exact binomial where all of them are right, or all wrong."""
    if len(set(map(bool, right))) == 1:
        low, high = exact_interval(sum(map(bool, right)), len(right), confidence)
        return {"low": low, "high": high, "by": "exact binomial"}
    drawn = resampled_accuracies([right], resamples, seed)[:, 0]
    low, high = numpy.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"low": float(low), "high": float(high), "by": "bootstrap"}


def f1_interval(
    rows: numpy.ndarray,
    statistic: Callable[[numpy.ndarray], float],
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """F1 +- z * its standard deviation over resampled documents, within [0, 1] (Efron and Tibshirani 1993, 13.3).

    Percentiles will not do: a resample lacks a third of the documents, and with them whole classes where a class has
    few, so resampled F1 lies off the F1 itself (2,037 classes of one document: 0.34, percentiles 0.35 to 0.39).
    """
    generator = numpy.random.default_rng(seed)
    drawn = [statistic(rows[generator.integers(0, len(rows), len(rows))]) for _ in range(resamples)]
    half = NormalDist().inv_cdf((1 + confidence) / 2) * float(numpy.std(drawn))
    if half == 0:  # all right or all wrong: resamples do not differ, and that is no interval
        return {"low": None, "high": None, "by": None}
    middle = statistic(rows)
    return {"low": max(0.0, middle - half), "high": min(1.0, middle + half), "by": "bootstrap deviation"}


def resampled_accuracies(models: Sequence[Sequence[bool]], resamples: int = 2000, seed: int = 0) -> numpy.ndarray:
    """(resamples, models): accuracies of models on the same resampled documents, drawn with replacement.

    Documents that all models answered alike are one kind, and a resample draws how many there are of each kind: the
    same distribution as drawing documents, and fast.
    """
    kinds, documents = numpy.unique(numpy.asarray(models, dtype=bool), axis=1, return_counts=True)
    total = int(documents.sum())
    drawn = numpy.random.default_rng(seed).multinomial(total, documents / total, size=resamples)
    return drawn @ kinds.T / total


def exact_interval(right: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided Clopper-Pearson (1934) interval of a share: right of n, n >= 1."""
    tail = (1 - confidence) / 2
    return lower_bound(right, n, 1 - tail), 1 - lower_bound(n - right, n, 1 - tail)


def lower_bound(right: int, n: int, confidence: float = 0.95) -> float:
    """One-sided Clopper-Pearson bound: the share at which as many right or more have a probability of 1 - confidence.

    0 where none is right.
    """
    if not (n >= 1 and 0 <= right <= n):
        raise ValueError(f"right must be 0 to n with n at least 1, got {right} of {n}")
    low, high = 0.0, 1.0
    if right == 0:
        return low
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if tail_probability(right, n, middle) < 1 - confidence else (low, middle)
    return low


def tail_probability(right: int, n: int, share: float) -> float:
    """P(at least `right` of n) of a binomial with 0 < share < 1."""
    k = numpy.arange(right, n + 1)
    ways = numpy.concatenate([[0.0], numpy.cumsum(numpy.log(numpy.arange(1, n + 1)))])  # log k!
    logs = ways[n] - ways[k] - ways[n - k] + k * math.log(share) + (n - k) * math.log1p(-share)
    return float(numpy.exp(logs).sum())


# ------------------------------------------------------------------------------------------------ lines


def ranked_lines(rows: Sequence[Any], scores: numpy.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Lines of rows (with .id and .labels) from log-probabilities (rows, labels); of equal ones the first label."""
    order = numpy.argsort(-scores, axis=1, kind="stable")[:, :RANKS]
    best = numpy.take_along_axis(scores, order[:, :1], axis=1)[:, 0]
    return [
        {
            "id": row.id,
            "gold": list(row.labels),
            "ranked": [labels[column] for column in columns],
            "probability": float(min(1.0, math.exp(first))),
        }
        for row, columns, first in zip(rows, order, best, strict=True)
    ]


def _check(lines: Sequence[Line], kind: str) -> None:
    if kind not in ("icd10", "labels"):
        raise ValueError(f"kind must be 'icd10' or 'labels', got {kind!r}")
    if not lines:
        raise ValueError("no answers to measure: the test part is empty")
    often, times = Counter(line["id"] for line in lines).most_common(1)[0]
    if times > 1:
        raise ValueError(f"document {often!r} was answered {times} times: measure one answer a document")
    for line in lines:
        if not line["gold"]:
            raise ValueError(f"document {line['id']!r} has no gold label: leave out such rows by name")
        if not line.get("ranked") and "written" not in line:
            raise ValueError(f"document {line['id']!r} has neither 'ranked' nor 'written': it was not answered")
