"""What did one run do, in one JSON document? Config, times, every measure, notes and the losses that count.

    ExperimentLog.from_run("runs/x").write("logs")      ExperimentLog.load("logs/experiment_x_20260101T000000Z.json")

Standard library only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from nbhelpers.records import NOT_FINITE, check_output_folder, plain, read_json, restore, slug, write_json
from nbhelpers.registry import unknown
from nbhelpers.run_config import ExperimentConfig, MetricsSnapshot
from nbhelpers.runlock import read_owner
from nbhelpers.runs import Run, read_run

FORMAT = 1
_NEEDED = ("config", "start_time", "metrics_history")


@dataclass
class ExperimentLog:
    """One run. Times: ISO 8601 in UTC; duration_seconds: at work, time between attempts left out.

    end_time: None while the run goes on, and where it was killed. best_*: the least value, NaN left out; final_*: the
    last one, NaN where training ended so; None where it was never taken (0.0 is a measure). All four are of `stage`:
    None is the steps without a stage; a run all of whose steps have one gives its first.
    """

    config: ExperimentConfig
    start_time: str
    end_time: str | None = None
    duration_seconds: float = 0.0
    metrics_history: list[MetricsSnapshot] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    best_train_loss: float | None = None
    best_val_loss: float | None = None
    final_train_loss: float | None = None
    final_val_loss: float | None = None
    stage: str | None = None
    run_id: str = ""
    status: str = "finished"

    @classmethod
    def from_run(cls, run_dir: str | os.PathLike, stage: str | None = None) -> ExperimentLog:
        """The log of a run directory, also of one that is being written. LookupError for a stage it does not have."""
        run = read_run(run_dir)
        history = [MetricsSnapshot.from_dict(row) for row in run.metrics]
        stages = list(dict.fromkeys(snapshot.stage for snapshot in history))
        if stage is not None and stage not in stages:
            raise LookupError(unknown("stage", stage, [found for found in stages if found is not None]))
        if stage is None and stages and None not in stages:
            stage = stages[0]
        of_stage = [snapshot for snapshot in history if snapshot.stage == stage]
        last = run.manifest["attempts"][-1] if run.manifest["attempts"] else {}
        return cls(
            config=ExperimentConfig.from_dict(run.config),
            start_time=run.manifest.get("created") or last.get("utc", ""),
            end_time=last.get("ended"),
            duration_seconds=_seconds(run),
            metrics_history=history,
            notes=[event["text"] for event in run.events if event.get("kind") == "note" and "text" in event],
            best_train_loss=_least(snapshot.train_loss for snapshot in of_stage),
            best_val_loss=_least(snapshot.val_loss for snapshot in of_stage),
            final_train_loss=_last(snapshot.train_loss for snapshot in of_stage),
            final_val_loss=_last(snapshot.val_loss for snapshot in of_stage),
            stage=stage,
            run_id=run.run_id,
            status=run.status,
        )

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values; NaN is null with a flag."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        values["config"] = self.config.to_dict()
        values["metrics_history"] = [snapshot.to_dict() for snapshot in self.metrics_history]
        return plain({"format": FORMAT, **values})

    @property
    def file_name(self) -> str:
        """experiment_{name}_{timestamp}.json; the timestamp is that of the start, so one run keeps one file."""
        moment = re.sub(r"\.\d+|[-:]|\+00:00", "", self.start_time)
        return f"experiment_{slug(self.config.name)}_{slug(moment)}.json"

    def write(self, folder: str | os.PathLike) -> Path:
        """Write the document into `folder`, whole or not at all; returns its path.

        A document of this run that lies there is replaced; one of another run of the same name and second stays, and
        this one gets the end of its run id into its name.
        """
        folder = check_output_folder(folder, resume=True)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / self.file_name
        if path.exists() and not self._is_mine(path):
            path = path.with_stem(f"{path.stem}-{slug(self.run_id)[-6:]}")
            if path.exists() and not self._is_mine(path):
                raise ValueError(f"'{path}' is the log of another run: choose another folder")
        write_json(path, self.to_dict())
        return path

    def _is_mine(self, path: Path) -> bool:
        try:
            found = read_json(path)
        except ValueError:
            return False
        return isinstance(found, dict) and found.get("run_id") == self.run_id

    @classmethod
    def load(cls, path: str | os.PathLike) -> ExperimentLog:
        """Read a document back. ValueError in one line where it is none, broken, or of a newer format."""
        found = read_json(path)
        if not isinstance(found, dict) or any(key not in found for key in _NEEDED):
            raise ValueError(f"'{path}' is not an experiment log: it needs {', '.join(_NEEDED)}")
        version = found.get("format", FORMAT)
        if not isinstance(version, int) or version > FORMAT:
            raise ValueError(
                f"'{path}' has log format {version!r}, this version reads up to {FORMAT}: update nbhelpers"
            )
        history = [MetricsSnapshot.from_dict(row) for row in found["metrics_history"]]
        config = ExperimentConfig.from_dict(found["config"])
        known = {entry.name for entry in fields(cls)} - {"config", "metrics_history"}
        rest = restore({key: value for key, value in found.items() if key in known or key == NOT_FINITE})
        return cls(config=config, metrics_history=history, **rest)


def write_experiment_log(run_dir: str | os.PathLike, folder: str | os.PathLike | None = None) -> Path:
    """The run directory as one JSON document in `folder` (None: in the run directory itself); returns its path."""
    return ExperimentLog.from_run(run_dir).write(run_dir if folder is None else folder)


def _seconds(run: Run) -> float:
    beat = read_owner(run.folder / "heartbeat.json")
    lines = [*run.metrics, *run.events, *run.manifest["attempts"], beat]
    return max((line.get("wallclock_time") or 0.0 for line in lines), default=0.0)


def _least(values: Iterable[float | None]) -> float | None:
    return min((value for value in values if value is not None and value == value), default=None)


def _last(values: Iterable[float | None]) -> float | None:
    return next((value for value in reversed(list(values)) if value is not None), None)
