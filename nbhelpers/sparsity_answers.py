"""What does a sparsity sweep answer? Two modes or two methods, document by document; dense, masked and chance levels.

A difference is of accuracies at the end, after tuning where there is any, as shares. Its interval is a bootstrap over
documents: all runs of a task answer the same ones, so a document is drawn with its answers in every cell of that task.
It says nothing about other seeds: what a second training would change is in it only where the plan has several seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from nbhelpers import predictions
from nbhelpers.sparsity_results import RUNS, WEIGHTS, ResultRow, both_modes

RESAMPLES = 2000
CONFIDENCE = 0.95
Pair = tuple[ResultRow, ResultRow]


def modes_compared(folder: str | Path, found: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """Accuracy of sparse_to_dense - sparse_to_sparse, an entry a model and task, then one of all (model None).

    Every masked cell that has both modes counts the same. Entries as of `differences`.
    """
    return differences(folder, [(dense, sparse) for sparse, dense in both_modes(_proved(found))])


def methods_compared(
    folder: str | Path,
    found: Sequence[ResultRow],
    first: str = "magnitude",
    second: str = "random",
    sparsity: float = 0.5,
) -> list[dict[str, Any]]:
    """Accuracy of `first` - `second` (importances) at one sparsity, in cells that differ in nothing else.

    An entry a model and task, modes and seeds together, then one of all (model None). Entries as of `differences`.
    """
    cells: dict[tuple, dict[str | None, list[ResultRow]]] = {}
    for row in _proved(found):
        if row.sparsity == sparsity and row.importance in (first, second):
            key = (row.model, row.task, row.pattern, row.dimension, row.scope, row.mode, row.seed, row.setting)
            cells.setdefault(key, {}).setdefault(row.importance, []).append(row)
    pairs = [(cell[first][0], cell[second][0]) for cell in cells.values() if sorted(map(len, cell.values())) == [1, 1]]
    return differences(folder, pairs)


def _proved(found: Sequence[ResultRow]) -> list[ResultRow]:
    return [row for row in found if row.status == "finished" and not row.alias and row.all_facts_hold]


def differences(folder: str | Path, pairs: Sequence[Pair]) -> list[dict[str, Any]]:
    """First - second of each pair, pooled: {model, task, cells, documents, difference, low, high, left_out}.

    The mean over cells, then over documents; of all models and tasks the mean over all cells, documents drawn within
    their task. left_out: pairs whose predictions are gone or are of other documents. One document has no low and high.
    """
    groups: dict[tuple[str, str], list[Pair]] = {}
    for pair in pairs:
        groups.setdefault((pair[0].model, pair[0].task), []).append(pair)
    entries, sums, left_out = [], {}, 0
    answers = _Answers(Path(folder))
    for (model, task), members in groups.items():
        columns = [column for pair in members if (column := answers.difference(*pair)) is not None]
        apart = len(members) - len(columns)
        left_out += apart
        entries.append({"model": model, "task": task, **_interval({task: columns}), "left_out": apart})
        sums.setdefault(task, []).extend(columns)
    return [*entries, {"model": None, "task": None, **_interval(sums), "left_out": left_out}] if entries else []


class _Answers:
    """Right or not by document of runs, each file read once."""

    def __init__(self, folder: Path) -> None:
        self.runs = folder / RUNS
        self.held: dict[str, Any] = {}
        self.documents: dict[str, list] = {}  # of a task: those of its first pair

    def difference(self, one: ResultRow, other: ResultRow) -> Any:
        """(documents,): 1 where only the first is right, -1 where only the second is; None where that is not known."""
        left, right = self._of(one), self._of(other)
        if left is None or right is None or left[0] != right[0]:
            return None
        if self.documents.setdefault(one.task, left[0]) != left[0]:
            return None
        return left[1] - right[1]

    def _of(self, row: ResultRow) -> tuple[list, Any] | None:
        if row.run not in self.held:
            lines = predictions.read(self.runs / row.run) if row.run else None
            values = predictions.outcomes(lines).get(row.metric) if lines else None
            ids = [(line["id"], line.get("gold")) for line in lines or ()]
            right = None if values is None else numpy.array([bool(value) for value in values], dtype=float)
            self.held[row.run] = None if right is None else (ids, right)
        return self.held[row.run]


def _interval(strata: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Mean over cells and documents with its bootstrap interval. strata: task -> (documents,) of each cell."""
    sums = [numpy.sum(columns, axis=0) for columns in strata.values() if columns]
    cells = sum(map(len, strata.values()))
    told = {"cells": cells, "documents": sum(map(len, sums)), "difference": None, "low": None, "high": None}
    if not cells:
        return told
    told["difference"] = float(sum(one.mean() for one in sums) / cells)
    if min(map(len, sums)) > 1:
        generator = numpy.random.default_rng(0)
        drawn = [sum(_drawn(one, generator) for one in sums) / cells for _ in range(RESAMPLES)]
        tail = (1 - CONFIDENCE) / 2
        told["low"], told["high"] = map(float, numpy.quantile(drawn, [tail, 1 - tail]))
    return told


def _drawn(values: Any, generator: Any) -> float:
    return values[generator.integers(0, len(values), len(values))].mean()


def answers(folder: str | Path, found: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """What the sweep was made for, an entry a model and task and a last one of all (model None).

    {model, task, metric, chance, dense (at the end, sparsity 0: {tuned, tuned_low, tuned_high} or None), masked_at (the
    highest sparsity of the plan), masked ({method: accuracy before tuning}), masked_shares ({method: share of weights
    that goes there, where `masked_at` is a share of something else}), modes, methods (entries of `modes_compared` and
    `methods_compared`, or None)}. dense and masked are means over seeds, dense of tuned runs where there are any.
    """
    modes = {(one["model"], one["task"]): one for one in modes_compared(folder, found)}
    methods = {(one["model"], one["task"]): one for one in methods_compared(folder, found)}
    told = []
    for model, task in [*dict.fromkeys((row.model, row.task) for row in found), (None, None)]:
        here = [row for row in found if (row.model, row.task) == (model, task)]
        proved = [row for row in here if row.all_facts_hold and row.tuned is not None]
        dense = {row.job: row for row in proved if row.sparsity == 0}.values()
        dense = [row for row in dense if row.tuning != "none"] or dense
        top = max((row.sparsity for row in here), default=0.0)
        masked: dict[str, list[float]] = {}
        shares = {
            row.method: row.measured_sparsity for row in proved if row.sparsity == top and row.sparsity_of != WEIGHTS
        }
        for row in {row.job: row for row in proved if row.sparsity == top > 0 and row.masked is not None}.values():
            masked.setdefault(row.method, []).append(row.masked)
        told.append(
            {
                "model": model,
                "task": task,
                "metric": next((row.metric for row in here if row.metric), None),
                "chance": next((row.chance for row in here if row.chance is not None), None),
                "dense": _level(list(dense)),
                "masked_at": top or None,
                "masked": {method: statistics.fmean(values) for method, values in masked.items()},
                "masked_shares": shares,
                "modes": modes.get((model, task)),
                "methods": methods.get((model, task)),
            }
        )
    return told


def _level(dense: Sequence[ResultRow]) -> dict[str, Any] | None:
    """The dense model at the end with its interval over documents; of several seeds the mean, which has none here."""
    if not dense:
        return None
    interval = {name: getattr(dense[0], name) if len(dense) == 1 else None for name in ("tuned_low", "tuned_high")}
    return {"tuned": statistics.fmean(row.tuned for row in dense), **interval}


def difference_said(one: Mapping[str, Any] | None, of_difference: str) -> str:
    """`+0.012 [-0.004, 0.028] (27 cells, 500 documents)`, or why there is none.

    of_difference: what is compared, for the sentence that there is nothing to compare.
    """
    if one is None:
        return f"no cell has both {of_difference} yet"
    if one["difference"] is None:
        return f"the predictions of {one['left_out']} pair{'' if one['left_out'] == 1 else 's'} are not there"
    interval = "" if one["low"] is None else f" [{one['low']:+.3f}, {one['high']:+.3f}]"
    cells = f"{one['cells']} cell{'' if one['cells'] == 1 else 's'}, {one['documents']} documents"
    return f"{one['difference']:+.3f}{interval} ({cells})"
