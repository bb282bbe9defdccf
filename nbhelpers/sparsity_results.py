"""What came out of each cell of a sparsity sweep? A row a cell, judged against the dense model, and a headline.

Everything is read from the sweep's folder. A cell that is missing or failed stands there as that, never as a number.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from nbhelpers import predictions, records, sweep
from nbhelpers.ledger import Ledger

KEYS = ("model", "task", "sparsity", "mode", "seed")  # axes that have a place of their own in the tables
CHOOSING = {"pattern", "importance", "scope", "dimension"}  # fields that choose which weights go
TOLERANCE = 0.02  # points of the task's measure below the dense model of the same tuning that still pass
RUNS = "runs"  # where a sweep keeps its run directories
UNTUNED = "untuned"  # instead of a mode where nothing was trained
WEIGHTS = "weights"  # of the covered projections: what a sparsity is a share of, unless whole groups go
GROUPS = {"outputs": "output rows", "inputs": "input columns", "channels": "MLP channels"}  # dimension -> what goes
CANNOT_TELL = "what masks cost cannot be told here"


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
    dimension: str | None = Field(None, description="outputs, inputs or channels: what goes as a whole (structured)")
    tuning: str | None = Field(None, description="lora: adapters were trained and merged; none: nothing was trained")
    mode: str | None = Field(
        description="as planned: sparse_to_dense, sparse_to_sparse or dense; untuned where nothing was trained"
    )
    sparsity: float = Field(ge=0, le=1, description="share that was asked to go, of what sparsity_of names")
    sparsity_of: str = Field(
        WEIGHTS, description="weights, output rows or input columns of the covered projections, or MLP channels"
    )
    setting: str = Field("", description="the values of those of these axes that do not choose weights")
    seed: int = Field(description="seed of random scores, calibration rows, data order and adapters")
    dtype: str | None = Field(None, description="number format of the weights")
    device: str | None = Field(None, description="what it ran on")
    job: str = Field(description="id of the job that did it")
    run: str | None = Field(None, description="name of its run directory among the sweep's runs")
    alias: bool = Field(description="done by the job of an earlier row, as nothing of this row differs in effect")
    status: str = Field(description="status of the job; numbers stand only beside finished")
    failure: str | None = Field(None, description="class of a failure")
    error: str | None = Field(None, description="its one line")
    generated: bool | None = Field(None, description="whether this project generated the task's rows itself")
    protocol: str | None = Field(None, description="how the task was asked: version, shots, split and source of rows")
    metric: str | None = Field(None, description="the task's measure")
    n: int | None = Field(None, description="evaluated documents")
    chance: float | None = Field(
        None, description="the measure of guessing: mean of 1 / choices; none where answers are written"
    )
    dense: float | None = Field(None, description="the measure of the model as it is")
    masked: float | None = Field(None, description="the measure of the masked model before tuning")
    masked_low: float | None = Field(None, description="95 % interval over documents, lower end")
    masked_high: float | None = Field(None, description="95 % interval over documents, upper end")
    tuned: float | None = Field(
        None, description="the measure at the end: tuned and merged, or where tuning is none as masked"
    )
    tuned_low: float | None = Field(None, description="95 % interval over documents, lower end")
    tuned_high: float | None = Field(None, description="95 % interval over documents, upper end")
    dense_above_chance: bool | None = Field(
        None, description="whether tuned_low of the row at sparsity 0 is above chance (0 where answers are written)"
    )
    within_tolerance: bool | None = Field(
        None,
        description="tuned is at most the tolerance below that of the row at sparsity 0; none where that one is not "
        "above chance",
    )
    measured_sparsity: float | None = Field(
        None, description="share of the covered projections' weights that goes, counted on the mask"
    )
    mask_sha256: str | None = Field(None, description="of the mask")
    documents_sha256: str | None = Field(None, description="of the evaluated documents as they were asked")
    text_sha256: str | None = Field(None, description="of the training and validation rows")
    calibration_sha256: str | None = Field(None, description="of the rows that weights were scored on, if on any")
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
    found, asked, hashes = [], {}, {}
    for number, (place, cell) in enumerate(zip(ledger.rows, sweep.results(folder), strict=True), 1):
        own = {name: value for name, value in place.values.items() if name in ResultRow.model_fields}
        config = ledger.jobs[place.job].config | _named(ledger.plan, place.values) | own  # an alias has its own place
        method = _label(place.values) or f"{config['pattern']} by {config['importance']}"
        known = {name: config[name] for name in ("model", "task", "pattern", "importance", "scope", "sparsity")}
        if config["pattern"] == "nm":  # whatever the plan says of a scope
            known["scope"] = "group"
        known |= {"tuning": config.get("tuning"), "mode": _mode(ledger.plan, config)}
        known |= _what_goes(config["pattern"], config.get("dimension", "outputs"))
        named = {name: cell.get(name) for name in ResultRow.model_fields if name in cell}
        beside = {name: value for name, value in place.values.items() if not CHOOSING & _fields(ledger.plan, name)}
        named["setting"] = _label(beside)
        if run_dir := cell.get("run_dir"):
            if run_dir not in hashes:
                hashes[run_dir] = _hashes(Path(run_dir))
            named |= hashes[run_dir]
        if cell["status"] == "finished":
            same = tuple(config.get(name) for name in ("task", "data", "train_data", "shots", "limit"))
            if same not in asked:
                asked[same] = _how_asked(Path(cell["run_dir"]))
            named |= asked[same] | {"run": Path(cell["run_dir"]).name}
        found.append(
            ResultRow(**{**named, **known, "row": number, "method": method, "seed": config["seed"], "job": place.job})
        )
    return judged(found, tolerance)


def _named(plan: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The config fields that the named values of axes stand for."""
    found: dict[str, Any] = {}
    for axis, value in values.items():
        stands_for = plan["axes"].get(axis)
        found |= stands_for.get(value, {}) if isinstance(stands_for, Mapping) else {}
    return found


def _mode(plan: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """What becomes of the zeros in training; where nothing is trained, the rows of several modes still stay apart."""
    if config.get("tuning") != "none":
        return config["mode"]
    several = any("mode" in _fields(plan, axis) for axis in plan["axes"])
    return f"{config['mode']}_{UNTUNED}" if several else UNTUNED


def _what_goes(pattern: str, dimension: str) -> dict[str, str | None]:
    if pattern != "structured":
        return {"dimension": None, "sparsity_of": WEIGHTS}
    return {"dimension": dimension, "sparsity_of": GROUPS[dimension]}


def _hashes(run_dir: Path) -> dict[str, str | None]:
    """Of the data that a run read, as it recorded them itself; a run that failed early recorded none."""
    manifest, result = (
        records.read_json(path) if (path := run_dir / name).is_file() else {}
        for name in ("manifest.json", "result.json")
    )
    recorded = manifest.get("fingerprints") or {}
    return {
        "documents_sha256": recorded.get("documents"),
        "text_sha256": recorded.get("text"),
        "calibration_sha256": (result.get("mask") or {}).get("scored_on"),
    }


def _fields(plan: Mapping[str, Any], axis: str) -> set[str]:
    """The config fields that an axis of a plan sets."""
    values = plan["axes"].get(axis)
    return set(next(iter(values.values()), {})) if isinstance(values, Mapping) else {axis}


def _label(values: Mapping[str, Any]) -> str:
    """What tells a row from others of its model, task, mode and sparsity, the seed aside."""
    others = {name: value for name, value in values.items() if name not in KEYS}
    return ", ".join(str(v) if isinstance(v, str) else f"{name} {v}" for name, v in others.items())


def _how_asked(run_dir: Path) -> dict[str, Any]:
    """The protocol in words and the level of chance, of a run that stands for all that were asked the same."""
    told = records.read_json(run_dir / "result.json").get("protocol") or {}
    shots = told.get("shots")
    words = f"{told.get('task')} {told.get('version')}, {shots} shot{'' if shots == 1 else 's'}, {told.get('split')}"
    words += f", {told.get('rows')} rows, {told.get('source')}" + (" (generated)" if told.get("generated") else "")
    choices = [len(line.get("loglikelihoods") or ()) for line in predictions.read(run_dir) or ()]
    chance = sum(1 / count for count in choices) / len(choices) if choices and all(choices) else None
    return {"protocol": words if told else None, "chance": chance}


def judged(found: Sequence[ResultRow], tolerance: float) -> list[ResultRow]:
    """The rows with `within_tolerance`, where they and the dense model are measured and proved, and it is above
    chance."""
    return [_judged(row, found, tolerance) for row in found]


def _judged(row: ResultRow, every: Sequence[ResultRow], tolerance: float) -> ResultRow:
    base = _dense_row(one for one in every if _same_start(one, row))
    if base is None:
        return row
    told: dict[str, Any] = {"dense_above_chance": is_above_chance(base)}
    if row.tuned is not None and row.all_facts_hold and told["dense_above_chance"]:
        told["within_tolerance"] = row.tuned >= base.tuned - tolerance - 1e-12
    return row.model_copy(update=told)


def _dense_row(cells: Iterable[ResultRow]) -> ResultRow | None:
    """The measured and proved row at sparsity 0."""
    return next((row for row in cells if row.sparsity == 0 and row.all_facts_hold and row.tuned is not None), None)


def is_above_chance(row: ResultRow) -> bool | None:
    """Whether its interval lies above guessing (0 where answers are written); None where one of them is not known."""
    chance = _chance(row)
    return None if chance is None or row.tuned_low is None else row.tuned_low > chance


def _chance(row: ResultRow) -> float | None:
    if row.chance is None:
        return None if (row.metric or "").startswith("acc") else 0.0
    return row.chance


def _cannot_tell(base: ResultRow | None) -> str | None:
    """Why nothing can be said of masks beside this dense row, or None. Of one that is missing: nothing yet."""
    if base is None or is_above_chance(base):
        return None
    chance = _chance(base)
    if chance is None:
        return f"chance is not known, as the answers are not in the folder: {CANNOT_TELL}"
    if base.tuned_low is None:
        told = f"{base.tuned:.3f}, chance {chance:.3g}"
        return f"one document cannot show the dense model above chance ({told}): {CANNOT_TELL}"
    told = f"{base.tuned:.3f} [{base.tuned_low:.3f}, {base.tuned_high:.3f}], chance {chance:.3g}"
    return f"the dense model is not above chance ({told}): {CANNOT_TELL}"


def _same_start(one: ResultRow, other: ResultRow) -> bool:
    return (one.model, one.task, one.method, one.seed) == (other.model, other.task, other.method, other.seed)


def headline(found: Sequence[ResultRow]) -> list[dict[str, Any]]:
    """By model, task, method, mode and seed the highest sparsity within tolerance, all lower ones of the plan being
    measured, proved and within it too, with its interval; sparsity None where not even the lowest one is.

    sparsity_of, measured_sparsity: what it is a share of, and its share of the weights. known: False where a cell that
    is not judged yet ended it, so that it may come to more. cannot_tell: why there is no headline at all, or None.
    """
    best = []
    for key, cells in _groups(found).items():
        last, known = None, True
        reason = _cannot_tell(_dense_row(row for row in found if _same_start(row, cells[0])))
        for row in sorted((row for row in cells if row.sparsity > 0), key=lambda row: row.sparsity):
            if not row.within_tolerance:
                known = row.within_tolerance is not None
                break
            last = row
        told = dict(zip(("model", "task", "method", "mode", "seed"), key, strict=True))
        told |= {"sparsity": last.sparsity if last else None, "known": known, "cannot_tell": reason}
        names = ("measured_sparsity", "tuned", "tuned_low", "tuned_high")
        told |= {name: getattr(last, name) if last else None for name in names}
        best.append(told | {"sparsity_of": units(cells)[key[2]]})
    return best


def units(found: Sequence[ResultRow]) -> dict[str, str]:
    """Method -> what its sparsities are shares of."""
    return {row.method: row.sparsity_of for row in sorted(found, key=lambda row: row.sparsity > 0)}


def weights_said(share: float | None) -> str:
    """`33.3 % of weights`: beside a share of something else."""
    return "share of weights not known" if share is None else f"{100 * share:.3g} % of weights"


def goes_said(sparsity: float, of: str, measured: float | None) -> str:
    """`50 % of weights`, `50 % of MLP channels (33.3 % of weights)`."""
    return f"{100 * sparsity:g} % of {of}" + ("" if of == WEIGHTS else f" ({weights_said(measured)})")


def is_untuned(found: Sequence[ResultRow]) -> bool:
    """Whether nothing was trained in any of them."""
    return bool(found) and all(row.tuning == "none" for row in found)


def dense_said(found: Sequence[ResultRow]) -> str:
    """What the rows are judged by."""
    if is_untuned(found):
        return "the dense model, untuned"
    return (
        "the dense model of the same tuning" if any(row.tuning == "none" for row in found) else "the tuned dense model"
    )


def _groups(found: Sequence[ResultRow]) -> dict[tuple, list[ResultRow]]:
    groups: dict[tuple, list[ResultRow]] = {}
    for row in found:
        groups.setdefault((row.model, row.task, row.method, row.mode, row.seed), []).append(row)
    return groups


def coverage(found: Sequence[ResultRow]) -> dict[str, Any]:
    """{"cells", "done", "failed", "missing" (neither), "failures": {class: count}}: an alias is as its job is."""
    failures = Counter(row.failure or row.status for row in found if has_failed(row))
    done = sum(row.status == "finished" for row in found)
    failed = sum(failures.values())
    return {
        "cells": len(found),
        "done": done,
        "failed": failed,
        "missing": len(found) - done - failed,
        "failures": dict(sorted(failures.items())),
    }


def has_failed(row: ResultRow) -> bool:
    return row.status in ("failed", "diverged")


def coverage_said(found: Sequence[ResultRow]) -> str:
    """`36 cells: 30 done, 1 failed (diverged), 5 missing`."""
    told = coverage(found)
    classes = ", ".join(name if count == 1 else f"{count} {name}" for name, count in told["failures"].items())
    parts = [f"{told['done']} done"]
    parts += [f"{told['failed']} failed ({classes})"] if told["failed"] else []
    parts += [f"{told['missing']} missing"] if told["missing"] else []
    return f"{told['cells']} cells: " + ", ".join(parts)


def both_modes(done: Sequence[ResultRow]) -> list[tuple[ResultRow, ResultRow]]:
    """(sparse to sparse, sparse to dense) of each masked cell that was tuned in both."""
    by_cell: dict[tuple, dict[str | None, ResultRow]] = {}
    for row in done:
        if row.sparsity > 0:
            by_cell.setdefault((row.model, row.task, row.method, row.sparsity, row.seed), {})[row.mode] = row
    wanted = ("sparse_to_sparse", "sparse_to_dense")
    return [tuple(cell[mode] for mode in wanted) for cell in by_cell.values() if set(wanted) <= set(cell)]


def checked(found: Sequence[ResultRow]) -> list[str]:
    """What was proved of the runs, whether the two modes really differ, and what failed, a sentence each."""
    done = [row for row in found if row.status == "finished" and not row.alias]
    broken = [row for row in done if not row.all_facts_hold]
    failures = Counter(row.failure or row.status for row in found if row.status != "finished" and not row.alias)
    pairs = both_modes(done)
    same = [pair for pair in pairs if pair[0].validation_nll == pair[1].validation_nll]
    apart = f"sparse to sparse differs from sparse to dense in {len(pairs) - len(same)} of {len(pairs)} cells with both"
    return [
        f"{len(done)} runs finished, {len(done) - len(broken)} with every fact true, {len(broken)} with a false one.",
        "nothing was trained, so there are no two modes." if is_untuned(found) else f"{apart} (validation loss).",
        "not finished: " + (", ".join(f"{count} {name}" for name, count in sorted(failures.items())) or "none"),
    ]


def as_csv(found: Sequence[ResultRow]) -> str:
    return csv_safe([row.model_dump() for row in found], list(ResultRow.model_fields))


def csv_safe(lines: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> str:
    """CSV that a table program opens without taking a text for a formula."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({name: _cell(value) for name, value in line.items()})
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in "=+-@\t\r":  # a table program would take it for a formula
        return f"'{value}"
    return "" if value is None else str(value).lower() if isinstance(value, bool) else value
