"""What came out of a sparsity sweep? One table a row a run, curves with intervals, a headline, and what was proved.

Everything is read from the sweep's folder. A cell that is missing or failed stands there as that, never as a number.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nbhelpers import records, sweep
from nbhelpers.ledger import Ledger

KEYS = ("model", "task", "sparsity", "mode", "seed")  # axes that have a place of their own in the tables
TOLERANCE = 0.02  # points of the task's measure below the tuned dense model that still pass
FILES = ("results.csv", "columns.json", "summary.md", "correctness.md")


class ResultRow(BaseModel):
    """One row of results.csv: every row is held to this, and columns.json is its JSON schema."""

    model_config = ConfigDict(extra="forbid")
    row: int = Field(ge=1, description="number in the plan, from 1")
    model: str = Field(description="name, folder or hub id")
    task: str = Field(description="name of the task")
    method: str = Field(description="the values of the plan's other axes, or how weights were chosen where it has none")
    pattern: str | None = Field(description="unstructured, structured or nm")
    importance: str | None = Field(description="what ranked the weights")
    scope: str | None = Field(description="what a weight is compared with")
    mode: str | None = Field(description="sparse_to_dense or sparse_to_sparse; dense at sparsity 0")
    sparsity: float = Field(ge=0, le=1, description="share of the projections' weights that was asked to go")
    seed: int = Field(description="seed of random scores, calibration rows, data order and adapters")
    dtype: str | None = Field(None, description="number format of the weights")
    device: str | None = Field(None, description="what it ran on")
    job: str = Field(description="id of the job that did it")
    alias: bool = Field(description="done by the job of an earlier row, as nothing of this row differs in effect")
    status: str = Field(description="status of the job; numbers stand only beside finished")
    failure: str | None = Field(None, description="class of a failure")
    error: str | None = Field(None, description="its one line")
    generated: bool | None = Field(None, description="whether this project generated the task's rows itself")
    metric: str | None = Field(None, description="the task's measure")
    n: int | None = Field(None, description="evaluated documents")
    dense: float | None = Field(None, description="the measure of the model as it is")
    masked: float | None = Field(None, description="the measure of the masked model before tuning")
    tuned: float | None = Field(None, description="the measure after tuning and merging")
    tuned_low: float | None = Field(None, description="95 % interval over documents, lower end")
    tuned_high: float | None = Field(None, description="95 % interval over documents, upper end")
    within_tolerance: bool | None = Field(
        None, description="tuned is at most the tolerance below the tuned dense model"
    )
    measured_sparsity: float | None = Field(None, description="share counted on the mask")
    mask_sha256: str | None = Field(None, description="of the mask")
    merge_difference: float | None = Field(None, description="largest change of a logit by merging / largest logit")
    merge_violations: int | None = Field(None, description="masked weights not 0 after merging; 0 in sparse_to_sparse")
    merge_withheld: float | None = Field(None, description="share of the free delta's norm that the mask took away")
    validation_nll: float | None = Field(None, description="nats a scored token on the validation rows, best state")
    tokens_per_second: float | None = Field(None, description="of training, padding left out")
    steps: int | None = Field(None, description="optimizer steps made")
    best_step: int | None = Field(None, description="the step whose weights were kept")
    overhead_share: float | None = Field(None, description="share of the time that was neither training nor evaluating")
    all_facts_hold: bool | None = Field(None, description="whether every checked fact holds")


def rows(folder: str | Path, tolerance: float = TOLERANCE) -> list[ResultRow]:
    """A row a cell of the plan, in its order. ValueError for a folder of another kind of sweep."""
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance must be in [0, 1) points of the measure, got {tolerance}")
    ledger = Ledger(folder)
    if ledger.plan["kind"] != "sparsity":
        raise ValueError(f"'{folder}' is a sweep of {ledger.plan['kind']!r} runs, this report is of 'sparsity' ones")
    found = []
    for number, (place, cell) in enumerate(zip(ledger.rows, sweep.results(folder), strict=True), 1):
        own = {name: value for name, value in place.values.items() if name in ResultRow.model_fields}
        config = ledger.jobs[place.job].config | own  # of an alias its own place, not that of the job that did it
        method = _label(place.values) or f"{config['pattern']} by {config['importance']}"
        known = {name: config[name] for name in ("model", "task", "pattern", "importance", "scope", "mode", "sparsity")}
        named = {name: cell.get(name) for name in ResultRow.model_fields if name in cell}
        found.append(
            ResultRow(**{**named, **known, "row": number, "method": method, "seed": config["seed"], "job": place.job})
        )
    return [_judged(row, found, tolerance) for row in found]


def _label(values: Mapping[str, Any]) -> str:
    """What tells a row from others of its model, task, mode and sparsity, the seed aside."""
    others = {name: value for name, value in values.items() if name not in KEYS}
    return ", ".join(str(v) if isinstance(v, str) else f"{name} {v}" for name, v in others.items())


def _judged(row: ResultRow, every: Sequence[ResultRow], tolerance: float) -> ResultRow:
    base = next((one for one in every if _same_start(one, row) and one.sparsity == 0 and one.all_facts_hold), None)
    if row.tuned is None or base is None or not row.all_facts_hold:
        return row
    return row.model_copy(update={"within_tolerance": row.tuned >= base.tuned - tolerance - 1e-12})


def _same_start(one: ResultRow, other: ResultRow) -> bool:
    return (one.model, one.task, one.method, one.seed) == (other.model, other.task, other.method, other.seed)


def write(folder: str | Path, out: str | Path | None = None, tolerance: float = TOLERANCE) -> dict[str, Any]:
    """The report in files: FILES, in the sweep's folder `report` by default. Returns the counts and the headline."""
    found = rows(folder, tolerance)
    out = Path(out) if out is not None else Path(folder) / "report"
    out.mkdir(parents=True, exist_ok=True)
    records.write_atomic(out / "results.csv", as_csv(found))
    records.write_json(out / "columns.json", ResultRow.model_json_schema())
    records.write_atomic(out / "summary.md", summary(found, tolerance))
    records.write_atomic(out / "correctness.md", correctness(found))
    finished = [row for row in found if row.status == "finished"]
    broken = [row for row in finished if row.all_facts_hold is False and not row.alias]
    return {
        "facts": [{"name": f"every fact of row {row.row} ({row.job})", "ok": False} for row in broken],
        "rows": len(found),
        "finished": len(finished),
        "facts_failed": len(broken),
        "tolerance": tolerance,
        "headline": headline(found),
        "files": [str(out / name) for name in FILES],
    }


def as_csv(found: Sequence[ResultRow]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(ResultRow.model_fields), lineterminator="\n")
    writer.writeheader()
    for row in found:
        writer.writerow({name: _cell(value) for name, value in row.model_dump().items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "=+-@\t\r":  # a table program would take it for a formula
        return f"'{value}"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value


def headline(found: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """By model, task, method, mode and seed the highest sparsity within tolerance, all lower ones of the plan being
    measured, proved and within it too, with its interval; sparsity None where not even the lowest one is."""
    best = []
    for key, cells in _groups(found).items():
        last = None
        for row in sorted((row for row in cells if row.sparsity > 0), key=lambda row: row.sparsity):
            if not row.within_tolerance:
                break
            last = row
        told = dict(zip(("model", "task", "method", "mode", "seed"), key, strict=True))
        interval = {name: getattr(last, name) if last else None for name in ("tuned", "tuned_low", "tuned_high")}
        best.append({**told, "sparsity": last.sparsity if last else None, **interval})
    return best


def _groups(found: Sequence[ResultRow]) -> dict[tuple, list[ResultRow]]:
    groups: dict[tuple, list[ResultRow]] = {}
    for row in found:
        groups.setdefault((row.model, row.task, row.method, row.mode, row.seed), []).append(row)
    return groups


def summary(found: Sequence[ResultRow], tolerance: float) -> str:
    """A table a model and task: sparsities down, methods and modes across; then the headline."""
    lines = ["# Sparsity against accuracy", ""]
    lines += ["Intervals are 95 % over documents. Cells that are missing or failed say so.", ""]
    if any(row.generated for row in found):
        lines += ["The rows of these tasks were generated by this project: they say nothing about the real tasks.", ""]
    several = len({row.seed for row in found}) > 1
    for model, task, seed in dict.fromkeys((row.model, row.task, row.seed) for row in found):
        here = [row for row in found if (row.model, row.task, row.seed) == (model, task, seed)]
        cells = {(row.sparsity, row.method, row.mode): row for row in here}
        columns = list(dict.fromkeys((method, mode) for _, method, mode in cells))
        metric = next((row.metric for row in cells.values() if row.metric), "no measure yet")
        lines += [f"## {model} on {task} ({metric})" + (f", seed {seed}" if several else ""), ""]
        lines.append("| sparsity | " + " | ".join(f"{m}, {(o or '').replace('_', ' ')}" for m, o in columns) + " |")
        lines.append("|---|" + "---|" * len(columns))
        for level in sorted({sparsity for sparsity, _, _ in cells}):
            shown = [_shown(cells.get((level, *column))) for column in columns]
            lines.append(f"| {level:g} | " + " | ".join(shown) + " |")
        lines.append("")
    lines += [f"## Highest sparsity within {tolerance:g} of the tuned dense model", ""]
    lines += ["| model | task | method | mode | seed | sparsity | there |", "|---|---|---|---|---|---|---|"]
    for one in headline(found):
        where = "none" if one["sparsity"] is None else f"{one['sparsity']:g}"
        there = "" if one["tuned"] is None else _value(one["tuned"], one["tuned_low"], one["tuned_high"])
        named = " | ".join(str(one[name]) for name in ("model", "task", "method", "mode", "seed"))
        lines.append(f"| {named} | {where} | {there} |")
    return "\n".join(lines) + "\n"


def _shown(row: ResultRow | None) -> str:
    if row is None:
        return "not planned"
    if row.tuned is None:
        return f"{row.status}: {row.failure}" if row.failure else "missing"
    return _value(row.tuned, row.tuned_low, row.tuned_high) + ("" if row.all_facts_hold else " FACT FAILED")


def _value(value: float, low: float | None, high: float | None) -> str:
    """With its interval, where more than one document gives one."""
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def correctness(found: Sequence[ResultRow]) -> str:
    """What was proved of each run, whether the two modes really differ, and what failed."""
    done = [row for row in found if row.status == "finished" and not row.alias]
    broken = [row for row in done if not row.all_facts_hold]
    failures = Counter(row.failure or row.status for row in found if row.status != "finished" and not row.alias)
    pairs = _both_modes(done)
    same = [pair for pair in pairs if pair[0].validation_nll == pair[1].validation_nll]
    apart = f"{len(pairs) - len(same)} of {len(pairs)} cells with both (validation loss)"
    lines = [
        "# What was checked",
        "",
        f"- {len(done)} runs finished, {len(done) - len(broken)} with every fact true, {len(broken)} with a false one.",
        f"- sparse to sparse differs from sparse to dense in {apart}.",
        "- not finished: " + (", ".join(f"{count} {name}" for name, count in sorted(failures.items())) or "none"),
        "",
        "| row | cell | mask sha256 | sparsity | merged - trained | masked weights alive | facts |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in done:
        name = f"{row.model} {row.task} {row.method} {row.sparsity:g} {(row.mode or '').replace('_', ' ')}"
        mask = "none" if row.mask_sha256 is None else row.mask_sha256[:12]
        share = "" if row.measured_sparsity is None else f"{row.measured_sparsity:.4f}"
        gap = "" if row.merge_difference is None else f"{row.merge_difference:.1e}"
        alive = "" if row.merge_violations is None else f"{row.merge_violations:,}"
        alive += " (free to fill)" if row.mode == "sparse_to_dense" and row.merge_violations else ""
        lines.append(
            f"| {row.row} | {name} | {mask} | {share} | {gap} | {alive} | {'OK' if row.all_facts_hold else 'FAILED'} |"
        )
    return "\n".join(lines) + "\n"


def _both_modes(done: Sequence[ResultRow]) -> list[tuple[ResultRow, ResultRow]]:
    by_cell: dict[tuple, dict[str | None, ResultRow]] = {}
    for row in done:
        if row.sparsity > 0:
            by_cell.setdefault((row.model, row.task, row.method, row.sparsity, row.seed), {})[row.mode] = row
    wanted = ("sparse_to_sparse", "sparse_to_dense")
    return [tuple(cell[mode] for mode in wanted) for cell in by_cell.values() if set(wanted) <= set(cell)]
