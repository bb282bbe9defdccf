"""What does a run directory say? Read while it is written, after it was killed, and elsewhere."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbhelpers.records import NOT_FINITE, read_json, read_lines
from nbhelpers.registry import unknown
from nbhelpers.runlock import is_alive, read_owner

FORMAT = 1


@dataclass
class Run:
    """A run directory as read. metrics: one row a step (and stage), from the highest attempt that took it."""

    folder: Path
    run_id: str
    name: str
    kind: str
    config: dict[str, Any]
    status: str
    metrics: list[dict[str, Any]]
    events: list[dict[str, Any]]
    result: dict[str, Any] | None
    manifest: dict[str, Any]
    torn: dict[str, int]

    def curve(self, metric: str, stage: str | None = None) -> tuple[list[int], list[Any]]:
        """(iterations, values) of one metric where it was taken; LookupError names the known metrics."""
        known = sorted({key for row in self.metrics for key in row} - {"attempt", "iteration", "stage", NOT_FINITE})
        if metric not in known:
            raise LookupError(unknown("metric", metric, known))
        rows = [row for row in self.metrics if metric in row and row.get("stage") == stage]
        return [row["iteration"] for row in rows], [row[metric] for row in rows]


def read_run(folder: str | os.PathLike) -> Run:
    """Read a run directory, also while it is being written. Torn lines are skipped and counted in `torn`.

    ValueError where there is no manifest.json, or it is broken or of a newer format.
    """
    folder = Path(folder)
    manifest = _read_manifest(folder)
    metrics, torn_metrics = read_lines(folder / "metrics.jsonl")
    events, torn_events = read_lines(folder / "events.jsonl")
    torn = {"metrics": torn_metrics, "events": torn_events, "result": 0}
    result = None
    try:
        result = read_json(folder / "result.json")
    except FileNotFoundError:
        pass
    except ValueError:
        torn["result"] = 1
    steps, strange = _once_each(metrics)
    torn["metrics"] += strange
    return Run(
        folder=folder,
        run_id=manifest["run_id"],
        name=manifest["name"],
        kind=manifest["kind"],
        config=manifest["config"],
        status=_status(folder, manifest, result),
        metrics=steps,
        events=events,
        result=result,
        manifest=manifest,
        torn=torn,
    )


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_json(folder / "manifest.json")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"'{folder}' is not a run directory (no manifest.json): name the folder of a run") from None
    needed = ("run_id", "name", "kind", "config", "status", "attempts", "fingerprints")
    if not isinstance(manifest, dict) or any(key not in manifest for key in needed):
        raise ValueError(f"'{folder}/manifest.json' is not the manifest of a run: it needs {', '.join(needed)}")
    if not isinstance(manifest.get("format"), int) or manifest["format"] > FORMAT:
        raise ValueError(
            f"'{folder}' has run format {manifest.get('format')!r}, this version reads up to {FORMAT}: update nbhelpers"
        )
    return manifest


def _status(folder: Path, manifest: dict[str, Any], result: Any) -> str:
    if result is not None:
        return "finished"
    if manifest["status"] == "finished":  # killed between the manifest and result.json
        return "interrupted"
    if manifest["status"] == "running" and not is_alive(read_owner(folder / "heartbeat.json")):
        return "interrupted"
    return manifest["status"]


def _once_each(rows: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
    """Rows by (stage, iteration), those of one attempt merged, and how many rows were no snapshot."""
    steps: dict[tuple[Any, int], dict[str, Any]] = {}
    strange = 0
    for row in rows:
        if not isinstance(row.get("iteration"), int) or not isinstance(row.get("attempt"), int):
            strange += 1
            continue
        key = (row.get("stage"), row["iteration"])
        known = steps.get(key)
        if known is None or row["attempt"] > known["attempt"]:
            steps[key] = dict(row)
        elif row["attempt"] == known["attempt"]:
            _merge(known, row)
    order = {stage: index for index, stage in enumerate(dict.fromkeys(stage for stage, _ in steps))}
    return sorted(steps.values(), key=lambda row: (order[row.get("stage")], row["iteration"])), strange


def _merge(known: dict[str, Any], row: dict[str, Any]) -> None:
    flags = {key: flag for key, flag in known.pop(NOT_FINITE, {}).items() if key.partition("[")[0] not in row}
    flags |= row.get(NOT_FINITE, {})
    known.update(row)
    if flags:
        known[NOT_FINITE] = flags
