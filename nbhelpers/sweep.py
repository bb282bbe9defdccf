"""How is a grid carried out? One job after another, within a budget, and after a kill only what is missing.

`run(plan, folder)` is the executor of this process. Several processes may work on one folder: each job is leased. The
jobs of a search come one by one, each from what is on record by then; its other rules are those of a grid.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import logging
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nbhelpers import grid, jobkinds, memory, search
from nbhelpers.errors import is_bad_input, one_line
from nbhelpers.grid import Expansion, Job, Plan
from nbhelpers.ledger import Ledger, State
from nbhelpers.redaction import Redactor
from nbhelpers.registry import unknown
from nbhelpers.runs import read_run
from nbhelpers.search import Pruned, Search, Trial
from nbhelpers.tracking import Diverged, ExperimentConfig, ExperimentTracker, Interrupted

KINDS = jobkinds.KINDS
_DURATION = re.compile(r"(?=.)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
Progress = Callable[[dict[str, Any]], None]
log = logging.getLogger(__name__)


def parse_budget(budget: str | float | None) -> float:
    """Seconds of "30m", "1h30m", "90s" or a number; None = without end.

    >>> parse_budget("1h30m"), parse_budget("90s"), parse_budget(5)
    (5400.0, 90.0, 5.0)
    """
    if budget is None:
        return math.inf
    text = str(budget).strip().replace(" ", "")
    if found := _DURATION.fullmatch(text):
        seconds = sum(float(part or 0) * unit for part, unit in zip(found.groups(), (3600, 60, 1), strict=True))
    else:
        try:
            seconds = float(text)
        except ValueError:
            seconds = math.nan
    if isinstance(budget, bool) or not 0 < seconds < math.inf:
        raise ValueError(f"budget must be a time above 0 such as 30m, 1h30m, 90s or seconds, got {budget!r}")
    return seconds


def preview(plan: str | Path | Mapping[str, Any] | Plan) -> dict[str, Any]:
    """What a plan would run, without running: counts, jobs in order, and seconds estimated where that is possible."""
    expansion = grid.expand(grid.read_plan(plan))
    if expansion.plan.search is not None:
        return _preview_search(expansion, expansion.plan.search)
    ordered = grid.in_order(expansion, list(expansion.jobs.values()))
    seconds = [_estimate(expansion, job) for job in ordered]
    known = [value for value in seconds if value is not None]
    return {
        "name": expansion.plan.name,
        "kind": expansion.plan.kind,
        "rows": len(expansion.rows),
        "jobs": len(expansion.jobs),
        "aliases": expansion.aliases,
        "axes": {name: len(values) for name, values in expansion.plan.all_axes().items()},
        "estimated_hours": sum(known) / 3600 if known else None,
        "not_estimated": len(seconds) - len(known),
        "order": [{"job": job.id, "name": job.name} for job in ordered],
        "price": expansion.kind.price([job.config for job in ordered]),
    }


def _preview_search(expansion: Expansion, wanted: Search) -> dict[str, Any]:
    """The same of a search: its time is that of jobs at both ends of the space, each run to its end."""
    whole = search.whole_numbers(wanted, expansion.kind.config)
    bounds = {name: values.bounds(name in whole) for name, values in wanted.space.items()}
    ends = [grid.trial_job(expansion, {name: found[at] for name, found in bounds.items()}) for at in (0, -1)]
    seconds = [_estimate(expansion, job) for job in ends]
    known = None not in seconds
    return {
        "name": expansion.plan.name,
        "kind": expansion.plan.kind,
        "rows": wanted.trials,
        "jobs": wanted.trials,
        "aliases": 0,
        "search": wanted.model_dump(),
        "axes": {},
        "estimated_hours": wanted.trials * statistics.fmean(seconds) / 3600 if known else None,
        "not_estimated": 0 if known else wanted.trials,
        "order": [],
    }


def _estimate(expansion: Expansion, job: Job) -> float | None:
    return expansion.kind.estimate(expansion.kind.config(**job.config))


def run(
    plan: str | Path | Mapping[str, Any] | Plan,
    folder: str | Path,
    budget: str | float | None = None,
    progress: Progress | None = None,
    should_stop: Callable[[], bool] | None = None,
    only: int | None = None,
) -> dict[str, Any]:
    """Do what is missing of a plan in a ledger folder; returns its coverage and how it `ended`: done, budget, stopped.

    only: the job of this row of the plan alone, counted from 1.

    A job that fails is recorded with its class and the rest goes on. With a budget no job is started that would not
    fit by the measured cost of jobs like it (the first one always is). An interrupt ends the sweep cleanly.
    """
    allowed = parse_budget(budget)
    expansion = grid.expand(grid.read_plan(plan))
    if only is not None and expansion.plan.search is not None:
        raise ValueError(f"only names a row of a grid, got {only}: the trials of a search come one by one")
    if expansion.plan.search is not None:
        search.installed()
    ledger = Ledger.create(folder, expansion)
    if expansion.plan.search is not None:
        _check_same_files(expansion, ledger)
    if only is not None and not 1 <= only <= len(ledger.rows):
        raise ValueError(f"only must be the number of a row, 1 to {len(ledger.rows)}, got {only}")
    job = None if only is None else ledger.rows[only - 1].job
    return _Sweep(expansion, ledger, allowed, progress, should_stop).run(job)


def _check_same_files(expansion: Expansion, ledger: Ledger) -> None:
    """A trial of another model or data in the same place says nothing of what is searched for now."""
    for number, row in enumerate(ledger.rows):
        if grid.trial_job(expansion, row.values).id != row.job:
            raise ValueError(
                f"model or data were others when trial {number} of '{ledger.folder}' was run: its result cannot serve "
                "this search; choose another folder"
            )


def status(folder: str | Path) -> dict[str, Any]:
    """Coverage of a ledger folder, where each of its jobs stands, and of a search the best trial so far."""
    ledger = Ledger(folder)
    states = ledger.states()
    jobs = [{"job": key, "name": ledger.jobs[key].name, **_shown(state)} for key, state in states.items()]
    found = ledger.coverage(states) | {"folder": str(folder), "name": ledger.plan["name"], "jobs": jobs}
    return found | ({"best": best_trial(ledger)} if ledger.plan.get("search") else {})


def best_trial(ledger: Ledger) -> dict[str, Any] | None:
    """{trial, metric, value, values, job, run_dir} of the best trial that came to its end; None before there is one."""
    wanted, found = Search(**ledger.plan["search"]), trials(ledger)
    number = search.best(wanted, found)
    if number is None:
        return None
    row = ledger.rows[number]
    told = {"trial": number, "metric": wanted.metric, "value": found[number].value, "values": row.values}
    return told | {"job": row.job, "run_dir": str(ledger.state(row.job).run_dir)}


def trials(ledger: Ledger, *, without: str | None = None) -> list[Trial]:
    """The trials of a search as their run records tell them. without: the job that is left out."""
    wanted, kind = Search(**ledger.plan["search"]), KINDS[ledger.plan["kind"]]()
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


def _shown(state: State) -> dict[str, Any]:
    run_dir = None if state.run_dir is None else str(state.run_dir)
    return {"status": state.status, "tries": state.tries, "failure": state.failure, "error": state.error} | {
        "run_dir": run_dir
    }


def retry(folder: str | Path, failures: tuple[str, ...] | list[str] = ()) -> list[str]:
    """Plan failed jobs again, of the given classes or all; the next `run` does them. Returns their ids."""
    return Ledger(folder).retry(failures)


def results(folder: str | Path) -> list[dict[str, Any]]:
    """One dict a row of the plan: its axes, job, whether it is an alias, status, and the columns of its result."""
    ledger = Ledger(folder)
    columns = KINDS[ledger.plan["kind"]]().columns
    states, found = ledger.states(), {}
    for key, state in states.items():
        finished = state.status == "finished"
        found[key] = _shown(state) | (columns(read_run(state.run_dir).result or {}) if finished else {})
    return [{**row.values, "job": row.job, "alias": row.alias, **found[row.job]} for row in ledger.rows]


class _Sweep:
    """One pass of this process over the jobs that are to do."""

    def __init__(self, expansion: Expansion, ledger: Ledger, allowed: float, progress, should_stop) -> None:
        self.expansion, self.kind, self.ledger = expansion, expansion.kind, ledger
        self.allowed, self.progress, self.should_stop = allowed, progress, should_stop
        self.search = expansion.plan.search
        self.started = time.monotonic()
        self.costs: dict[Any, list[float]] = {}
        self.tried = 0

    def run(self, only: str | None = None) -> dict[str, Any]:
        states = self.ledger.states()
        for key, seconds in self.ledger.seconds().items():
            if job := self.ledger.jobs.get(key):
                self._learn(job, seconds)
        jobs = list(self.ledger.jobs.values())
        ordered = grid.in_order(self.expansion, jobs)
        if self.search:  # as they were asked for
            ordered = [self.ledger.jobs[job] for job in dict.fromkeys(row.job for row in self.ledger.rows)]
        # jobs that a killed process left go last: one that kills its process must not keep the others from their turn
        self.waiting = sorted((job for job in ordered if states[job.id].to_do), key=lambda job: states[job.id].tries)
        self.ended = sum(not states[job.id].to_do for job in ordered)
        if only is not None:
            self.waiting = [job for job in self.waiting if job.id == only]
        how = "done"
        try:
            how = self._pass()
        except (KeyboardInterrupt, Interrupted):
            how = "stopped"
        finally:
            self.kind.close()
        return self.ledger.coverage() | {
            "ended": how,
            "tried": self.tried,
            "seconds": round(time.monotonic() - self.started, 3),
            "folder": str(self.ledger.folder),
        }

    def _pass(self) -> str:
        skipped = False
        while self.waiting or self._ask():
            if self.should_stop is not None and self.should_stop():
                return "stopped"
            job = self.waiting.pop(0)
            if self._too_late(self.expected(job)):
                skipped = True
                continue
            with self.ledger.lease(job.id) as ours:
                if ours and self.ledger.state(job.id, leased=False).to_do:  # another process may have done it meanwhile
                    self._do(job)
        return "budget" if skipped or self.ledger.to_come else "done"

    def _too_late(self, expected: float | None) -> bool:
        return bool(self.tried) and time.monotonic() - self.started + (expected or 0.0) > self.allowed

    def _ask(self) -> bool:
        """Let the next trial of a search wait for its turn; False where there is none, or no time for it."""
        if self.search is None or not self.ledger.to_come or self._too_late(self.expected(None)):
            return False
        if self.should_stop is not None and self.should_stop():
            raise Interrupted("stopped before the next trial")
        job = self.ledger.grow(self._propose)
        if job is not None:
            self.waiting.append(job)
        return job is not None

    def _propose(self) -> Job:
        return grid.trial_job(self.expansion, search.next_values(self.search, self._whole, trials(self.ledger)))

    @property
    def _whole(self) -> set[str]:
        return search.whole_numbers(self.search, self.kind.config)

    def _do(self, job: Job) -> None:
        number, run_dir, goes_on = self.ledger.next_run_dir(job.id, self.kind.resumes)
        run_dir.parent.mkdir(exist_ok=True)
        self.tried += 1
        self.ledger.note("started", job.id, number)
        self._tell("job started", job)
        begun = time.monotonic()
        try:
            config = self.kind.config(**job.config)
            more = {"resume": True} if goes_on else {}
            self.kind.run(
                config, run_dir=run_dir, progress=self._within(job, run_dir), should_stop=self.should_stop, **more
            )
            if (left := read_run(run_dir).status) != "finished":
                raise RuntimeError(f"the job returned, but its run directory says {left}")
        except Pruned as why:
            seconds = _since(begun)
            self.ledger.note("ended", job.id, number, status="pruned", seconds=seconds, why=str(why))
            self.ended += 1
            self._tell("job ended", job, status="pruned", seconds=seconds)
        except (KeyboardInterrupt, Interrupted):
            self.ledger.note("ended", job.id, number, status="interrupted", seconds=_since(begun))
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was is recorded with its class, and the rest goes on
            self._failed(job, number, run_dir, error, begun)
        else:
            seconds = _since(begun)
            self.ledger.note("ended", job.id, number, status="finished", seconds=seconds)
            self._learn(job, seconds)
            self.ended += 1
            self._tell("job ended", job, status="finished", seconds=seconds)

    def _failed(self, job: Job, number: int, run_dir: Path, error: Exception, begun: float) -> None:
        if not (run_dir / "manifest.json").exists() and not (run_dir.is_dir() and any(run_dir.iterdir())):
            _leave_record(self.expansion.plan.kind, job, run_dir, error)  # refused before there was a run
        failure = failure_class(error)
        said = {"failure": failure, "error": Redactor().value(_said(error, failure))}
        said["status"] = "diverged" if failure == "diverged" else "failed"
        self.ledger.note("ended", job.id, number, **said, seconds=_since(begun))
        log.warning("job %s (%s) failed: %s: %s", job.id, job.name, failure, said["error"])
        gc.collect()  # what the job had loaded
        self.ended += 1
        self._tell("job ended", job, **said)

    def expected(self, job: Job | None) -> float | None:
        """Mean seconds of the jobs like this one that were measured on this host, else of all; None without any."""
        alike = self.costs.get(job and self._key(job)) or [
            seconds for known in self.costs.values() for seconds in known
        ]
        return statistics.fmean(alike) if alike else None

    def _learn(self, job: Job, seconds: float) -> None:
        self.costs.setdefault(self._key(job), []).append(seconds)

    def _key(self, job: Job) -> str:
        return repr(self.kind.similar(job.config))

    def seconds_left(self) -> float | None:
        expected = [self.expected(job) for job in (*self.waiting, *[None] * self.ledger.to_come)]
        return None if None in expected else math.fsum(expected)

    def _tell(self, stage: str, job: Job, **more: Any) -> None:
        log.info("%s %s %s", stage, job.id, job.name)
        if self.progress is not None:
            where = {
                "done": self.ended,
                "total": len(self.ledger.jobs) + self.ledger.to_come,
                "seconds_left": self.seconds_left(),
            }
            self.progress({"stage": stage, "job": job.id, "name": job.name, **where, **more})

    def _within(self, job: Job, run_dir: Path) -> Progress | None:
        """A job's own progress, marked with the job; where the search prunes, it hears it and may stop the job."""
        tell = None if self.progress is None else lambda now: self.progress({**now, "job": job.id})
        if self.search is None or self.search.pruner == "none":
            return tell
        others = trials(self.ledger, without=job.id)
        watch = search.Watch(self.search, self._whole, others, job.values)

        def listen(now: dict[str, Any]) -> None:
            if tell is not None:
                tell(now)
            if (heard := self.kind.heard(now)) is not None:
                earlier = [] if watch.told else self.kind.seen(read_run(run_dir))
                if why := watch.hear(*heard, earlier):
                    raise Pruned(why)

        return listen


def _since(begun: float) -> float:
    return round(time.monotonic() - begun, 3)


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


def _leave_record(kind: str, job: Job, run_dir: Path, error: Exception) -> None:
    """The failed run of a job that was refused before it made a run directory."""
    config = {"name": job.name, **job.config, "kind": kind}
    with contextlib.suppress(type(error)), ExperimentTracker(ExperimentConfig(**config), run_dir=run_dir):
        raise error
