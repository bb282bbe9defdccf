"""How is one try of a job carried out? Under its lease, with what happened on record, and again where a rule says so.

Every executor of a sweep does its jobs with `Doer.do`, so that the folder looks alike whoever did them.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbhelpers import jobkinds, memory, retry_rules, search
from nbhelpers.errors import is_bad_input, one_line
from nbhelpers.grid import Expansion, Job
from nbhelpers.ledger import Ledger
from nbhelpers.redaction import Redactor
from nbhelpers.registry import unknown
from nbhelpers.runs import read_run
from nbhelpers.search import Pruned, Search, Trial
from nbhelpers.tracking import Diverged, ExperimentConfig, ExperimentTracker, Interrupted

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
log = logging.getLogger(__name__)


class Doer:
    """Does jobs of one plan in this process; what they share (a loaded model) stays until `expansion.kind.close()`."""

    def __init__(
        self,
        expansion: Expansion,
        ledger: Ledger,
        progress: Callable[[dict[str, Any]], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> None:
        self.expansion, self.kind, self.ledger = expansion, expansion.kind, ledger
        self.progress, self.should_stop = progress, should_stop

    def do(self, job: Job, begun: Callable[[Job], None] = lambda job: None) -> dict[str, Any] | None:
        """{status, seconds, and of a failure failure and error}; None where another process has the job or has done
        it, or took it over meanwhile. Status `planned`: a retry rule wants it once more. An interrupt is recorded and
        raised on."""
        with self.ledger.lease(job.id) as ours:
            if not ours or not self.ledger.state(job.id, leased=False).to_do:  # it may have been done meanwhile
                return None
            notes = self.ledger.notes().get(job.id, [])
            config = retry_rules.config_now(job.config, notes)
            number, run_dir, goes_on = self.ledger.next_run_dir(job.id, self.kind.resumes)
            run_dir.parent.mkdir(exist_ok=True)
            reached = retry_rules.reached(run_dir) if goes_on else 0
            if retry_rules.killed(notes, reached) >= retry_rules.KILLED:
                return self._give_up(job, config, reached)
            self.ledger.note("started", job.id, number, reached=reached)
            begun(job)
            return self._try(job, config, number, run_dir, {"resume": True} if goes_on else {})

    def _try(self, job: Job, config: dict[str, Any], number: int, run_dir: Path, more: dict) -> dict[str, Any] | None:
        begin = time.monotonic()
        try:
            hears = {"progress": self._within(job, run_dir), "should_stop": self.should_stop}
            self.kind.run(self.kind.config(**config), run_dir=run_dir, **hears, **more)
            if (left := read_run(run_dir).status) != "finished":
                raise RuntimeError(f"the job returned, but its run directory says {left}")
        except Pruned as why:
            return self._note(job, number, {"status": "pruned", "seconds": _since(begin)}, why=str(why))
        except (KeyboardInterrupt, Interrupted):
            self._note(job, number, {"status": "interrupted", "seconds": _since(begin)})
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was is recorded with its class, and the rest goes on
            return self._failed(job, config, number, run_dir, error, begin)
        return self._note(job, number, {"status": "finished", "seconds": _since(begin)})

    def _failed(
        self, job: Job, config: dict[str, Any], number: int, run_dir: Path, error: Exception, begin: float
    ) -> dict[str, Any] | None:
        if self._lost(job):
            return None
        if not (run_dir / "manifest.json").exists() and not (run_dir.is_dir() and any(run_dir.iterdir())):
            self._leave_record(job, config, run_dir, error)  # refused before there was a run
        failure = failure_class(error)
        said = {"failure": failure, "error": Redactor().value(_said(error, failure))}
        status = "diverged" if failure == "diverged" else "failed"
        found = self._note(job, number, {**said, "status": status, "seconds": _since(begin)})
        log.warning("job %s (%s) failed: %s: %s", job.id, job.name, failure, said["error"])
        gc.collect()  # what the job had loaded
        changed = retry_rules.again(failure, config)
        if changed is None or found is None:
            return found
        self.ledger.note("retry", job.id, number, because=failure, **changed)
        log.warning("job %s is tried again with %s", job.id, ", ".join(f"{k} {v}" for k, v in changed.items()))
        return {**found, "status": "planned"}

    def _lost(self, job: Job) -> bool:
        """Whether another process took the job over while this one slept: how it ends is that one's to say."""
        lost = not self.ledger.holds(job.id)
        if lost:
            log.warning("job %s (%s) was taken over by another process: no more is recorded here", job.id, job.name)
        return lost

    def _give_up(self, job: Job, config: dict[str, Any], reached: int) -> dict[str, Any] | None:
        """A try that only says why there is none."""
        number, run_dir, _ = self.ledger.next_run_dir(job.id)
        error = retry_rules.killed_error(reached)
        self._leave_record(job, config, run_dir, error)
        said = {"failure": "error", "error": _said(error, "error"), "status": "failed", "seconds": 0.0}
        log.warning("job %s (%s) is given up: %s", job.id, job.name, error)
        return self._note(job, number, said)

    def _leave_record(self, job: Job, config: dict[str, Any], run_dir: Path, error: Exception) -> None:
        """The failed run of a job that did not get as far as a run directory."""
        record = ExperimentConfig(**{"name": job.name, **config, "kind": self.expansion.plan.kind})
        with contextlib.suppress(type(error)), ExperimentTracker(record, run_dir=run_dir):
            raise error

    def _note(self, job: Job, number: int, found: dict[str, Any], **more: Any) -> dict[str, Any] | None:
        if self._lost(job):
            return None
        self.ledger.note("ended", job.id, number, **found, **more)
        return found

    def _within(self, job: Job, run_dir: Path) -> Callable[[dict[str, Any]], None] | None:
        """A job's own progress, marked with the job; where the search prunes, it hears it and may stop the job."""
        tell = None if self.progress is None else lambda now: self.progress({**now, "job": job.id})
        wanted = self.expansion.plan.search
        if wanted is None or wanted.pruner == "none":
            return tell
        others = trials(self.ledger, without=job.id)
        watch = search.Watch(wanted, search.whole_numbers(wanted, self.kind.config), others, job.values)

        def listen(now: dict[str, Any]) -> None:
            if tell is not None:
                tell(now)
            if (heard := self.kind.heard(now)) is not None:
                earlier = [] if watch.told else self.kind.seen(read_run(run_dir))
                if why := watch.hear(*heard, earlier):
                    raise Pruned(why)

        return listen


def trials(ledger: Ledger, *, without: str | None = None) -> list[Trial]:
    """The trials of a search as their run records tell them. without: the job that is left out."""
    wanted, kind = Search(**ledger.plan["search"]), jobkinds.KINDS[ledger.plan["kind"]]()
    states, found = ledger.states(), []
    for row in ledger.rows:
        state, value, reported = states[row.job], None, []
        if row.job == without:
            continue
        if state.status in ("finished", "pruned", "diverged", "failed"):
            run = read_run(state.run_dir)
            reported = kind.seen(run)
            if state.status == "finished":
                value = _metric(wanted.metric, kind.columns(run.result or {}))
        found.append(Trial(row.values, state.status, value, tuple(reported)))
    return found


def _metric(name: str, columns: Mapping[str, Any]) -> Any:
    if name not in columns:
        raise LookupError(unknown("metric", name, columns))
    return columns[name]


def failure_class(error: BaseException) -> str:
    """One of ledger.FAILURES: what a retry rule or a person needs to know first."""
    if memory.is_oom(error):
        return "out of memory"
    if isinstance(error, Diverged):
        return "diverged"
    if isinstance(error, OSError) and error.errno in _NO_SPACE:
        return "error"
    return "bad input" if isinstance(error, Exception) and is_bad_input(error) else "error"


def _said(error: Exception, failure: str) -> str:
    return f"{type(error).__name__}: {one_line(error)}" if failure == "error" else one_line(error)


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)
