"""Which runs lie under these folders, and what numbers do they hold? Read again only where something changed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from nbhelpers.records import read_json, restore
from nbhelpers.runlock import is_alive, read_owner
from nbhelpers.runs import Run, read_run

PARTS = ("manifest.json", "metrics.jsonl", "events.jsonl", "result.json")
NOT_SEARCHED = {"model", "artefacts", "node_modules", "site-packages", "__pycache__"}  # hold no runs, or many files
LOSSES = ("train_loss", "val_loss")
_BOOKKEEPING = {"attempt", "iteration", "gradient_step", "wallclock_time", "stage"}
_NO_MEASURE = {"format", "summary", "facts", "scores", "samples", "pruned_heads"}  # parts of a result


@dataclass
class Experiment(Run):
    """A run as the analysis sees it: a run directory, or a one-file JSON log, with its numbers by name."""

    @cached_property
    def numbers(self) -> dict[str, float]:
        """Every number of the run by name, such as `fine_tuned/perplexity` or `val_loss`; NaN where it was NaN.

        The last value of a logged metric; the losses also as `best_...` (lowest finite) and `final_...`. A number of
        the result goes before a logged one of the same name. What was not measured is not in it; 0.0 is.
        """
        found: dict[str, float] = {}
        for (stage, metric), (_, values) in self.curves.items():
            found[_joined(stage, metric)] = values[-1]
            if metric in LOSSES:
                found[_joined(stage, f"final_{metric}")] = values[-1]
                finite = [value for value in values if math.isfinite(value)]
                if finite:
                    found[_joined(stage, f"best_{metric}")] = min(finite)
        kept = {key: value for key, value in (self.result or {}).items() if key not in _NO_MEASURE}
        known = {name: value for name, value in _numbers_in(restore(kept)) if self.config.get(name) != value}
        found |= known
        if self.seconds is not None:
            found["seconds"] = self.seconds
        if isinstance((self.result or {}).get("facts"), list):
            facts = self.result["facts"]
            found["failed_facts"] = sum(1 for fact in facts if isinstance(fact, dict) and not fact.get("ok"))
        return found

    @cached_property
    def curves(self) -> dict[tuple[str | None, str], tuple[list[int], list[float]]]:
        """(stage, metric) -> (steps, values), equally long: a step where the metric was not taken is not in it."""
        found: dict[tuple[str | None, str], tuple[list[int], list[float]]] = {}
        for row in self.metrics:
            for metric, value in _numbers_in({k: v for k, v in restore(row).items() if k not in _BOOKKEEPING}):
                steps, values = found.setdefault((row.get("stage"), metric), ([], []))
                steps.append(row["iteration"])
                values.append(value)
        return found

    @property
    def seconds(self) -> float | None:
        """Seconds at work; None where nothing says it."""
        clocks = [*self.manifest.get("attempts", []), *self.metrics[-1:], *self.events[-1:]]
        times = [line.get("wallclock_time") for line in clocks if isinstance(line, dict)]
        return max((time for time in times if isinstance(time, int | float)), default=None)

    @property
    def created(self) -> str:
        return str(self.manifest.get("created") or "")

    @property
    def torn_lines(self) -> int:
        return sum(self.torn.values())

    @property
    def generated(self) -> bool:
        """Whether it was measured on text or rows that this project generated itself."""
        parts = [(self.result or {}).get(part) for part in ("text", "protocol")]
        return any(isinstance(part, dict) and bool(part.get("generated")) for part in parts)


def _joined(stage: str | None, metric: str) -> str:
    return f"{stage}/{metric}" if stage else metric


def _numbers_in(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers_in(value, f"{prefix}{key}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config with its inner mappings as dotted names.

    >>> flat({"steps": 2, "lora": {"rank": 8}})
    {'steps': 2, 'lora.rank': 8}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) and value else {f"{prefix}{key}": value}
    return found


# --- finding and reading ----------------------------------------------------------------------------------------------


class Collection:
    """The runs under some folders. `refresh()` reads what is new or changed; `problems` says what cannot be read."""

    def __init__(self, folders: str | os.PathLike | Iterable[str | os.PathLike]) -> None:
        several = [folders] if isinstance(folders, str | os.PathLike) else list(folders)
        self.folders = [Path(folder) for folder in several]
        if not self.folders:
            raise ValueError("name at least one folder with runs, got none")
        for folder in self.folders:
            if not folder.exists():
                raise ValueError(f"'{folder}' does not exist: name a folder with runs in it")
        self.problems: list[str] = []
        self._known: dict[Path, tuple[tuple, Experiment]] = {}

    def refresh(self) -> list[Experiment]:
        """Every run, oldest first, each once; a run directory that is being written is read as far as it goes."""
        self.problems = []
        read: dict[Path, tuple[tuple, Experiment]] = {}
        for place in (place for folder in self.folders for place in self._places(folder)):
            key = place.resolve()
            if key in read:  # found under two of the folders
                continue
            try:
                read[key] = self._read(place, self._known.get(key))
            except (ValueError, OSError) as error:
                self.problems.append(" ".join(str(error).split()))
        self._known = read
        return self._once([run for _, run in read.values()])

    def _places(self, folder: Path) -> Iterator[Path]:
        if folder.is_file():
            yield folder
            return
        for place, inside, files in os.walk(folder, onerror=lambda error: self.problems.append(str(error))):
            inside[:] = sorted(name for name in inside if name not in NOT_SEARCHED and not name.startswith("."))
            if "manifest.json" in files or "metrics.jsonl" in files or "events.jsonl" in files:
                yield Path(place)
            else:  # in a run directory a one-file log tells of that same run
                yield from (Path(place, name) for name in sorted(files) if _is_log(name))

    def _read(self, place: Path, known: tuple[tuple, Experiment] | None) -> tuple[tuple, Experiment]:
        mark = _signature(place)  # before reading: what is written meanwhile is read the next time
        if known and known[0] == mark and not _status_moved(known[1]):
            return known
        if place.is_file():
            return mark, read_log(place)
        return mark, Experiment(**vars(read_run(place)))

    def _once(self, runs: list[Experiment]) -> list[Experiment]:
        found: dict[str, Experiment] = {}
        for run in runs:
            other = found.get(run.run_id)
            if other is None or _says_more(run, other):
                found[run.run_id] = run
            if other is not None and run.folder.is_file() == other.folder.is_file():
                self.problems.append(f"'{run.folder}' and '{other.folder}' are copies of run {run.run_id}: read once")
        return sorted(found.values(), key=lambda run: (run.created, run.run_id))


def _says_more(run: Experiment, other: Experiment) -> bool:
    """A run directory before a log of the same run, then the finished one of two copies."""
    if run.folder.is_file() != other.folder.is_file():
        return other.folder.is_file()
    return other.result is None and run.result is not None


def _is_log(name: str) -> bool:
    return name.startswith("experiment_") and name.endswith(".json")


def _signature(place: Path) -> tuple:
    marks = []
    for path in [place] if place.is_file() else [place / part for part in PARTS]:
        try:
            found = path.stat()
        except FileNotFoundError:
            marks.append(None)
        else:
            marks.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return tuple(marks)


def _status_moved(run: Experiment) -> bool:
    """A process that dies changes no file: its heartbeat only grows old."""
    if run.manifest.get("status") != "running" or run.result is not None or run.folder.is_file():
        return False
    return (run.status == "running") != is_alive(read_owner(run.folder / "heartbeat.json"))


def read_log(path: str | os.PathLike) -> Experiment:
    """A one-file JSON log (`experiment_{name}_{timestamp}.json`); ValueError in one line where it is none."""
    path = Path(path)
    document = read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("config"), dict):
        raise ValueError(f"'{path}' is not an experiment log: it needs config and metrics_history")
    history = document.get("metrics_history")
    if not isinstance(history, list):
        raise ValueError(f"'{path}' is not an experiment log: it needs config and metrics_history")
    rows, strange = [], 0
    for entry in history:
        if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
            row = {key: value for key, value in entry.items() if key != "metrics" and value is not None}
            rows.append({"attempt": 1, **(entry.get("metrics") or {}), **row})
        else:
            strange += 1
    config = document["config"]
    ended = document.get("end_time") is not None
    result = {key: value for key, value in document.items() if key not in ("config", "metrics_history")}
    return Experiment(
        folder=path,
        run_id=str(document.get("run_id") or path.stem),
        name=str(config.get("name") or document.get("name") or path.stem),
        kind=str(config.get("kind") or "experiment"),
        config=config,
        status=str(document.get("status") or ("finished" if ended else "interrupted")),
        metrics=rows,
        events=[],
        result={key: value for key, value in result.items() if value is not None} if ended else None,
        manifest={
            "created": _utc(document.get("start_time")),
            "attempts": [{"wallclock_time": document.get("duration_seconds")}],
            "fingerprints": {},
        },
        torn={"metrics": strange, "events": 0, "result": 0},
    )


def _utc(moment: Any) -> str:
    if isinstance(moment, int | float):
        return datetime.fromtimestamp(moment).astimezone().isoformat(timespec="seconds")
    return str(moment or "")
