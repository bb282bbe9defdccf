"""What a run leaves behind: the run directory and its one writer.

Standard library only, so that it works where nothing else does.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from nbhelpers.experiment_log import ExperimentLog
from nbhelpers.linefile import LineFile
from nbhelpers.manifest import first_manifest, refuse_changes, refuse_strangers
from nbhelpers.records import (
    NOT_FINITE,
    TEMPORARY,
    append_line,
    check_output_folder,
    plain,
    read_lines,
    restore,
    slug,
    write_json,
)
from nbhelpers.redaction import Redactor
from nbhelpers.registry import unknown
from nbhelpers.run_config import ExperimentConfig, MetricsSnapshot, whole
from nbhelpers.runlock import RunLock, read_owner, this_process, utc_now
from nbhelpers.runlog import LogFile, close_log, open_log
from nbhelpers.runs import FORMAT, read_run
from nbhelpers.summaries import Summaries, summary_text

__all__ = ["STATUSES", "Diverged", "ExperimentConfig", "ExperimentLog", "ExperimentTracker", "Interrupted"]
__all__ += ["MetricsSnapshot"]
HEARTBEAT_SECONDS = 10.0
STATUSES = ("running", "finished", "failed", "diverged", "interrupted")
_log = logging.getLogger(__name__)


class Diverged(RuntimeError):
    """The training left finite numbers for good: the run ends with status diverged."""


class Interrupted(RuntimeError):
    """Somebody pressed Stop: the run ends with status interrupted."""


# --- the run --------------------------------------------------------------------------------------------------------

_RESULT_KEYS = ("format", "run_id", "status", "summary")
_EVENT_KEYS = ("utc", "attempt", "wallclock_time", "kind")


class ExperimentTracker:
    """Writes one run directory; use it with `with`, so that a failure is recorded too (and still raised).

    >>> with ExperimentTracker(ExperimentConfig(name="x", learning_rate=1e-3)) as tracker:  # doctest: +SKIP
    ...     tracker.log_metrics(train_loss=2.5)
    ...     tracker.finish({"perplexity": 12.2})

    config: an ExperimentConfig, or a dict, dataclass or pydantic model with a `name`.
    root: folder for a new run directory of its own; run_dir: this very folder instead, missing or empty.
    resume: go on in `run_dir` if it holds a run that is not finished (its clock, steps and attempts continue).
    command, environment: what to record instead of this process's own. fingerprints: {"model": sha256, ...}.
    """

    def __init__(
        self,
        config: Any,
        root: str | os.PathLike = "runs",
        *,
        run_dir: str | os.PathLike | None = None,
        resume: bool = False,
        command: list[str] | None = None,
        fingerprints: Mapping[str, Any] | None = None,
        environment: Mapping[str, Any] | None = None,
    ) -> None:
        if resume and run_dir is None:
            raise ValueError("resume=True needs the run directory to go on in: pass run_dir=...")
        self.config = config if isinstance(config, ExperimentConfig) else ExperimentConfig.from_dict(config)
        self.redactor = Redactor()
        moment = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self.run_id = f"{slug(self.config.name)}-{moment}-{secrets.token_hex(3)}"
        self.run_dir = Path(root) / self.run_id if run_dir is None else Path(run_dir)
        self.status = "new"
        self.attempt = 1
        self.iteration: int | None = None
        self.gradient_step = 0
        self._resume = resume
        self._command = sys.argv if command is None else command
        self._environment = environment
        self._fingerprints = self.redactor.value(plain(dict(fingerprints or {})))
        self._manifest: dict[str, Any] = {}
        self._iterations: dict[str | None, int] = {}
        self._summaries = Summaries()
        self._metrics_file = LineFile(self.run_dir / "metrics.jsonl")
        self._clock_before = 0.0
        self._started = 0.0
        self._guard = threading.RLock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lock: RunLock | None = None
        self._log_file: LogFile | None = None

    # start and end

    def start(self) -> ExperimentTracker:
        """Take the run directory and write what is known before any work; a second call is an error."""
        if self.status != "new":
            raise RuntimeError(f"run {self.run_id} is {self.status}: make a new tracker to run again")
        check_output_folder(self.run_dir, self._resume)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock = RunLock(self.run_dir)
        stale = lock.acquire()
        self._lock = lock
        try:
            self._begin(stale)
        except BaseException:
            self.status = "failed"
            if not (self.run_dir / "manifest.json").exists():  # leave nothing that would stop a second try
                (self.run_dir / "heartbeat.json").unlink(missing_ok=True)
            self._let_go()
            raise
        return self

    def _begin(self, stale: dict[str, Any] | None) -> None:
        for left in self.run_dir.glob(TEMPORARY):  # of a process killed while writing; nobody else is here
            left.unlink(missing_ok=True)
        continued = (self.run_dir / "manifest.json").exists()
        self._manifest = self._earlier() if continued else self._first_manifest()
        self._started = time.monotonic()
        self.status = "running"
        self._manifest["status"] = "running"
        self._manifest["attempts"].append(
            {**this_process(), "attempt": self.attempt, "status": "running", "command": self._masked_command()}
        )
        self._beat()
        self.save()
        self._log_file = LogFile(self.run_dir, self.redactor, self.event)
        open_log(self._log_file)
        self.event("attempt" if continued else "start", config_sha256=self._manifest["config_sha256"])
        if stale is not None:
            self.event("lock_taken_over", **{f"from_{key}": stale.get(key) for key in ("host", "pid", "utc")})
        self._thread = threading.Thread(target=self._keep_beating, name="nbhelpers-heartbeat", daemon=True)
        self._thread.start()

    def _masked_command(self) -> list[str]:
        return self.redactor.command(list(self._command))

    def _first_manifest(self) -> dict[str, Any]:
        refuse_strangers(self.run_dir)
        return first_manifest(
            self.run_id, self.config, self._environment, self._fingerprints, self._masked_command(), self.redactor
        )

    def _earlier(self) -> dict[str, Any]:
        """The manifest of the run to go on with; its steps and clock become ours."""
        if not self._resume:  # another process finished here between our look and our lock
            raise ValueError(f"output folder '{self.run_dir}' is not empty: choose another folder")
        run = read_run(self.run_dir)
        if run.result is not None:
            raise ValueError(f"run directory '{self.run_dir}' is finished, nothing to resume: choose another folder")
        refuse_changes("config", run.config, self.redactor.value(self.config.to_dict()), self.run_dir)
        self._check_fingerprints(run.manifest["fingerprints"])
        manifest = run.manifest
        for attempt in manifest["attempts"]:
            if attempt["status"] in ("running", "finished"):  # there is no result: it was killed before it was written
                attempt["status"] = "interrupted"
        self.run_id = manifest["run_id"]
        manifest["fingerprints"].update(self._fingerprints)
        rows, _ = read_lines(self.run_dir / "metrics.jsonl")
        clocks = [*rows, *run.events, *manifest["attempts"], read_owner(self.run_dir / "heartbeat.json")]
        self._clock_before = max((line.get("wallclock_time") or 0.0 for line in clocks), default=0.0)
        self.attempt = 1 + max((line.get("attempt", 0) for line in [*rows, *manifest["attempts"]]), default=0)
        for row in rows:
            self._stand_at(MetricsSnapshot.from_dict(row))
        for row in run.metrics:
            self._summaries.add_earlier(MetricsSnapshot.from_dict(row))
        return manifest

    def _check_fingerprints(self, recorded: dict[str, Any]) -> None:
        both = recorded.keys() & self._fingerprints.keys()
        refuse_changes(
            "fingerprints",
            {key: recorded[key] for key in both},
            {key: self._fingerprints[key] for key in both},
            self.run_dir,
        )

    def set_fingerprints(self, **fingerprints: Any) -> None:
        """Record what was loaded after the start (model, tokenizer, data, masks); a changed one is a ValueError."""
        with self._guard:
            self._check_active()
            self._fingerprints = self.redactor.value(plain(fingerprints))
            self._check_fingerprints(self._manifest["fingerprints"])
            self._manifest["fingerprints"].update(self._fingerprints)
            self.save()

    def finish(self, result: Mapping[str, Any] | None = None, status: str = "finished") -> None:
        """End the run: the manifest first, and for a finished run result.json last, with `result` in it.

        Other status words (failed, diverged, interrupted) leave no result.json.
        """
        if status not in STATUSES[1:]:
            raise LookupError(unknown("status", status, STATUSES[1:]))
        self._check_active()
        if status != "finished" and result is not None:
            raise ValueError(
                f"a {status} run has no result: record it with event(...) or finish with status 'finished'"
            )
        content = self.redactor.value(plain(dict(result or {})))
        for key in _RESULT_KEYS:
            if key in content:
                raise ValueError(f"result key {key!r} belongs to the tracker: rename it")
        self._end(status, content)

    def _end(self, status: str, result: dict[str, Any]) -> None:
        try:
            with self._guard:
                self.event("stop", status=status)
                self.status = status
                self._manifest["status"] = status
                self._manifest["attempts"][-1].update(status=status, ended=utc_now(), wallclock_time=self.seconds())
                self.save()
                if status == "finished":
                    own = {"format": FORMAT, "run_id": self.run_id, "status": status, "summary": self.summary()}
                    write_json(self.run_dir / "result.json", {**own, **result})
        except BaseException:
            self.status = "failed"
            raise
        finally:
            self._let_go()

    def _let_go(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT_SECONDS)
        if self._log_file is not None:
            close_log(self._log_file)
            self._log_file = None
        self._metrics_file.close()
        if self._lock is not None:
            self._lock.release()

    def __enter__(self) -> ExperimentTracker:
        return self.start() if self.status == "new" else self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status != "running":
            return
        if error is None:
            self.finish()
            return
        status = "diverged" if isinstance(error, Diverged) else "failed"
        if isinstance(error, Interrupted | KeyboardInterrupt):
            status = "interrupted"
        text = "".join(traceback.format_exception(kind, error, trace))
        try:
            self.event("error", type=type(error).__name__, message=str(error), traceback=text)
        except (OSError, RuntimeError) as second:  # the full disk that ended the run: the first error matters more
            error.add_note(f"the error could not be recorded in '{self.run_dir}' ({second})")
        try:
            self._end(status, {})
        except (OSError, RuntimeError) as second:
            error.add_note(f"the status {status} could not be recorded in '{self.run_dir}' ({second})")

    # while it runs

    def log_metrics(self, iteration: int | None = None, *, stage: str | None = None, **metrics: Any) -> MetricsSnapshot:
        """Append one snapshot. Without `iteration` it is the one after the last (of this stage), from 0.

        metrics: any of the known measures or your own names; NumPy and torch scalars work; NaN becomes null and a flag.
        `gradient_step=` sets the counter (as when a checkpoint is resumed).
        """
        return self._log(iteration, stage, metrics, step_on=1)

    def log_eval(self, iteration: int | None = None, *, stage: str | None = None, **metrics: Any) -> MetricsSnapshot:
        """Append measures taken at the current iteration, such as val_loss; they join its other measures when read."""
        return self._log(iteration, stage, metrics, step_on=0)

    def _log(self, iteration: Any, stage: str | None, metrics: dict[str, Any], step_on: int) -> MetricsSnapshot:
        for key in ("attempt", "wallclock_time", NOT_FINITE):
            if key in metrics:
                raise ValueError(f"metric {key!r} belongs to the tracker: rename it")
        with self._guard:
            self._check_active()
            if iteration is None:
                iteration = max(self._iterations.get(stage, -step_on) + step_on, 0)
            if "gradient_step" in metrics:
                self.gradient_step = whole("gradient_step", metrics.pop("gradient_step"))
            row = {
                "attempt": self.attempt,
                "iteration": whole("iteration", iteration),
                "gradient_step": self.gradient_step,
                "wallclock_time": self.seconds(),
            }
            if stage is not None:
                row["stage"] = stage
            row.update((key, self._safe(value)) for key, value in metrics.items() if value is not None)
            snapshot = MetricsSnapshot.from_dict(self._metrics_file.append(row))
            self._stand_at(snapshot)
            self._summaries.add(snapshot)
        return snapshot

    def _safe(self, value: Any) -> Any:
        return value if type(value) in (float, int) else restore(self.redactor.value(plain({"": value})))[""]

    def _stand_at(self, snapshot: MetricsSnapshot) -> None:
        self.iteration = self._iterations[snapshot.stage] = snapshot.iteration
        self.gradient_step = snapshot.gradient_step

    def increment_gradient_step(self, n: int = 1) -> int:
        """Count `n` optimizer steps; returns the new count."""
        with self._guard:
            self.gradient_step += whole("n", n)
            return self.gradient_step

    def event(self, kind: str, **data: Any) -> None:
        """Append one line to events.jsonl: a stage or memory mark, a warning, an out-of-memory or NaN event."""
        for key in data:
            if key in _EVENT_KEYS:
                raise ValueError(f"event field {key!r} belongs to the tracker: rename it")
        self._check_active()
        row = {"utc": utc_now(), "attempt": self.attempt, "wallclock_time": self.seconds(), "kind": kind}
        append_line(self.run_dir / "events.jsonl", {**row, **self.redactor.value(plain(data))})

    def note(self, text: str) -> None:
        """Keep a remark with the run: an event `note`, and a line of `notes` in its ExperimentLog."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"a note must be a text that is not empty, got {text!r}")
        self.event("note", text=text)

    def write_log(self, folder: str | os.PathLike | None = None) -> Path:
        """The run so far as one JSON document, experiment_{name}_{timestamp}.json in `folder` or the run directory."""
        return ExperimentLog.from_run(self.run_dir).write(self.run_dir if folder is None else folder)

    def seconds(self) -> float:
        """Seconds at work since the start of the first attempt."""
        return round(self._clock_before + time.monotonic() - self._started, 6)

    def save(self) -> None:
        """Write the manifest as it is now, atomically."""
        with self._guard:
            self._check_owner()
            write_json(self.run_dir / "manifest.json", self._manifest)

    def summary(self) -> dict[str, Any]:
        """Where the run stands: status, steps, seconds, and of every metric (`stage/name` where it has a stage):
        `last` value, `best` val_loss, and in `metrics` count, min, max, mean, std and last; see summaries.py."""
        with self._guard:
            return plain(
                {
                    "run_id": self.run_id,
                    "name": self.config.name,
                    "kind": self.config.kind,
                    "status": self.status,
                    "attempt": self.attempt,
                    "iteration": self.iteration,
                    "gradient_step": self.gradient_step,
                    "wallclock_time": self.seconds() if self._started else 0.0,
                    **self._summaries.to_dict(),
                }
            )

    def print_summary(self) -> None:
        """The summary for people, one fact a line."""
        print(summary_text(self.summary()))  # noqa: T201 - the one published name that prints

    def _check_active(self) -> None:
        if self.status != "running":
            way = "use `with tracker:` or call start()" if self.status == "new" else "make a new tracker to run again"
            raise RuntimeError(f"run {self.run_id} is {self.status}, not running: {way}")
        self._check_owner()

    def _check_owner(self) -> None:
        if self._lock is None or not self._lock.is_ours():
            raise RuntimeError(
                f"run directory '{self.run_dir}' was taken over by another process: nothing more is written"
            )

    def _beat(self) -> None:
        beat = {**this_process(), "attempt": self.attempt, "wallclock_time": self.seconds()}
        write_json(self.run_dir / "heartbeat.json", beat, durable=False)

    def _keep_beating(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                self._check_owner()
                self._beat()
            except RuntimeError as error:
                _log.warning("%s", error)
                return
            except OSError as error:
                _log.warning("no heartbeat could be written in '%s' (%s)", self.run_dir, error)
