"""How is a grid carried out? One job after another, within a budget, and after a kill only what is missing.

`run(plan, folder)` is the executor of this process. Several processes may work on one folder: each job is leased. The
jobs of a search come one by one, each from what is on record by then; its other rules are those of a grid.
"""

from __future__ import annotations

import heapq
import logging
import math
import re
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import attempts, grid, jobkinds, retry_rules, runlock, search
from nbhelpers.errors import one_line
from nbhelpers.grid import Expansion, Job, Plan
from nbhelpers.ledger import BEAT_SECONDS, Ledger, State
from nbhelpers.runs import read_run
from nbhelpers.search import Search
from nbhelpers.tracking import Interrupted

KINDS = jobkinds.KINDS
_DURATION = re.compile(r"(?=.)(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
UNKNOWN = "what such a job takes is not known before one was done"
LOOK_SECONDS = 0.5
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


def preview(
    plan: str | Path | Mapping[str, Any] | Plan, measured: Mapping[str, float | None] | None = None
) -> dict[str, Any]:
    """What a plan would run, without running: counts, jobs in order, and hours estimated where that is possible.

    measured: seconds of each job by its id, where a pilot was timed (sweep_pace.measure). why_not_estimated: number of
    jobs by the reason; notes: what is planned with, and what is not known, in words. LookupError, ValueError: also a
    file of rows that is not there or cannot be read.
    """
    expansion = grid.expand(grid.read_plan(plan))
    if expansion.plan.search is not None:
        return _preview_search(expansion, expansion.plan.search)
    ordered = grid.in_order(expansion, list(expansion.jobs.values()))
    for job in ordered:
        jobkinds.check_rows(expansion.plan.kind, job.config)
    estimates = [_estimate(expansion, job) if measured is None else (measured[job.id], UNKNOWN) for job in ordered]
    seconds = [value for value, _ in estimates]
    known = [value for value in seconds if value is not None]
    price = dict(expansion.kind.price([job.config for job in ordered]))
    return {
        "name": expansion.plan.name,
        "kind": expansion.plan.kind,
        "rows": len(expansion.rows),
        "jobs": len(expansion.jobs),
        "aliases": expansion.aliases,
        "axes": {name: len(values) for name, values in expansion.plan.all_axes().items()},
        "estimated_hours": sum(known) / 3600 if known else None,
        "not_estimated": len(seconds) - len(known),
        "why_not_estimated": dict(Counter(why for value, why in estimates if value is None)),
        "notes": price.pop("notes", []),
        "calibrated": measured is not None,
        "hours_by_workers": hours_by_workers(known),
        "order": [{"job": job.id, "name": job.name} for job in ordered],
        "price": price,
    }


def hours_by_workers(seconds: Sequence[float], counts: Sequence[int] = (1, 2, 4, 8)) -> dict[str, float]:
    """Hours until the last job is done, by the number of workers: each takes the next job once it is free."""
    found = {}
    for count in counts:
        free = [0.0] * min(count, max(1, len(seconds)))
        for one in seconds:
            heapq.heapreplace(free, free[0] + one)
        found[str(count)] = max(free) / 3600
    return found


def _preview_search(expansion: Expansion, wanted: Search) -> dict[str, Any]:
    """The same of a search: its time is that of jobs at both ends of the space, each run to its end."""
    whole = search.whole_numbers(wanted, expansion.kind.config)
    bounds = {name: values.bounds(name in whole) for name, values in wanted.space.items()}
    ends = [grid.trial_job(expansion, {name: found[at] for name, found in bounds.items()}) for at in (0, -1)]
    for job in ends:
        jobkinds.check_rows(expansion.plan.kind, job.config)
    estimates = [_estimate(expansion, job) for job in ends]
    seconds = [value for value, _ in estimates]
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
        "why_not_estimated": {} if known else {next(why for s, why in estimates if s is None): wanted.trials},
        "notes": [],
        "order": [],
    }


def _estimate(expansion: Expansion, job: Job) -> tuple[float | None, str]:
    """(seconds, why there are none)."""
    try:
        return expansion.kind.estimate(expansion.kind.config(**job.config)), UNKNOWN
    except (LookupError, ValueError) as error:
        return None, one_line(error)


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
    fit by the measured cost of jobs like it (the first one always is). An interrupt ends the sweep cleanly. A job whose
    process on another host may be dead is waited for until that is known, a minute or so, and done if it is.
    """
    allowed = parse_budget(budget)
    plan = grid.read_plan(plan)
    if only is not None and plan.search is not None:
        raise ValueError(f"only names a row of a grid, got {only}: the trials of a search come one by one")
    expansion = opened(plan)
    ledger = laid_down(expansion, folder)
    if only is not None and not 1 <= only <= len(ledger.rows):
        raise ValueError(f"only must be the number of a row, 1 to {len(ledger.rows)}, got {only}")
    job = None if only is None else ledger.rows[only - 1].job
    return Pass(expansion, ledger, allowed, progress, should_stop, job).run()


def opened(plan: str | Path | Mapping[str, Any] | Plan) -> Expansion:
    """A plan, checked; LookupError where it is a search and what a search needs is not installed."""
    expansion = grid.expand(grid.read_plan(plan))
    if expansion.plan.search is not None:
        search.installed()
    return expansion


def laid_down(expansion: Expansion, folder: str | Path) -> Ledger:
    """The ledger of a plan in a folder; ValueError where the folder holds something else."""
    ledger = Ledger.create(folder, expansion)
    if expansion.plan.search is not None:
        _check_same_files(expansion, ledger)
    return ledger


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
    wanted, found = Search(**ledger.plan["search"]), attempts.trials(ledger)
    number = search.best(wanted, found)
    if number is None:
        return None
    row = ledger.rows[number]
    told = {"trial": number, "metric": wanted.metric, "value": found[number].value, "values": row.values}
    return told | {"job": row.job, "run_dir": str(ledger.state(row.job).run_dir)}


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


class Pass:
    """One pass over the jobs that are to do: which one is next while there is time, and what is said of each."""

    def __init__(
        self,
        expansion: Expansion,
        ledger: Ledger,
        allowed: float,
        progress: Progress | None = None,
        should_stop: Callable[[], bool] | None = None,
        only: str | None = None,
    ) -> None:
        self.expansion, self.kind, self.ledger = expansion, expansion.kind, ledger
        self.allowed, self.progress, self.should_stop = allowed, progress, should_stop
        self.search = expansion.plan.search
        self.started = time.monotonic()
        self.costs: dict[Any, list[float]] = {}
        self.tried, self.skipped = 0, False
        for key, seconds in ledger.seconds().items():
            if job := ledger.jobs.get(key):
                self._learn(job, seconds)
        states = ledger.states()
        over = [state for state in states.values() if not state.to_do and state.status != "running"]
        self.ended = self.ended_before = len(over)
        self.finished_before = ledger.finished()
        asked = [job for job in self._in_order(states) if only in (None, job.id)]
        self.waiting = [job for job in asked if states[job.id].to_do]
        self.elsewhere = {job.id for job in asked if states[job.id].status == "running"}  # other processes have these

    def _in_order(self, states: Mapping[str, State]) -> list[Job]:
        ordered = grid.in_order(self.expansion, list(self.ledger.jobs.values()))
        if self.search:  # as they were asked for
            ordered = [self.ledger.jobs[job] for job in dict.fromkeys(row.job for row in self.ledger.rows)]
        # jobs that a killed process left go last: one that kills its process must not keep the others from their turn
        notes = self.ledger.notes()
        return sorted(ordered, key=lambda job: (states[job.id].tries, retry_rules.killed(notes.get(job.id, []))))

    def run(self) -> dict[str, Any]:
        """Do them one after another in this process."""
        doer = attempts.Doer(self.expansion, self.ledger, self.progress, self.should_stop)
        how = "done"
        try:
            while how == "done" and (job := self.next() or self._left()) is not None:
                if self.should_stop is not None and self.should_stop():
                    how = "stopped"
                    continue
                if found := doer.do(job, begun=self.begun):
                    self.over(job, found)
                else:
                    self.elsewhere.add(job.id)
        except (KeyboardInterrupt, Interrupted):
            how = "stopped"
        finally:
            self.kind.close()
        return self.summary(how)

    def next(self, choose: Callable[[list[Job]], Job] = lambda waiting: waiting[0]) -> Job | None:
        """The next job that there is time for, of those that wait the one that is chosen; None where there is none."""
        while self.waiting or self._ask():
            job = choose(self.waiting)
            self.waiting.remove(job)
            if not self._too_late(self.expected(job)):
                return job
            self.skipped = True
        return None

    def _left(self) -> Job | None:
        """The next job that another process left. One on another host that was killed looks alive until its lease is
        stale: it is waited for until that, or until its next sign of life."""
        longest = runlock.STALE_SECONDS + BEAT_SECONDS
        until, seen = min(self.started + self.allowed, time.monotonic() + longest), None
        while self.elsewhere:
            notes = self.ledger.notes()
            states = {job: self.ledger.state(job, notes) for job in self.elsewhere}
            self.elsewhere = {job for job, state in states.items() if state.status == "running"}
            if left := [self.ledger.jobs[job] for job, state in states.items() if state.to_do]:
                self.waiting += left
                return self.next()
            signs = self.ledger.signs(self.elsewhere)
            if signs and seen is None:
                who = f"jobs that run on another host: {len(signs)}; waiting for a sign that it lives"
                log.warning("%s, %.0f s at most; what a dead process left is done here", who, longest)
            seen = signs if seen is None else seen
            if time.monotonic() > until or not any(seen.get(job) == sign for job, sign in signs.items()):
                break
            if self.should_stop is not None and self.should_stop():
                raise Interrupted("stopped while a job of another host was waited for")
            time.sleep(LOOK_SECONDS)
        return None

    def begun(self, job: Job) -> None:
        self.tried += 1
        self._tell("job started", job)

    def over(self, job: Job, found: Mapping[str, Any]) -> None:
        """Take note of how a job ended: what attempts.Doer.do said."""
        if found["status"] == "planned":  # a retry rule wants it once more
            self.waiting.append(job)
            return
        if found["status"] == "finished":
            self._learn(job, found["seconds"])
        self.ended += 1
        self._tell("job ended", job, **found)

    def summary(self, how: str) -> dict[str, Any]:
        """The result of `run`. how: done or stopped."""
        if how == "done" and (self.skipped or self.ledger.to_come):
            how = "budget"
        return self.ledger.coverage() | {
            "ended": how,
            "tried": self.tried,
            "seconds": round(time.monotonic() - self.started, 3),
            "folder": str(self.ledger.folder),
        }

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
        whole = search.whole_numbers(self.search, self.kind.config)
        return grid.trial_job(self.expansion, search.next_values(self.search, whole, attempts.trials(self.ledger)))

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
            self.progress({"stage": stage, "job": job.id, "name": job.name, **self._where(), **more})

    def _where(self) -> dict[str, Any]:
        """How far the sweep is, with what other processes did meanwhile; time is then left by the pace of all."""
        total, left = len(self.ledger.jobs) + self.ledger.to_come, self.seconds_left()
        done = max(self.ended, self.ledger.finished() - self.finished_before + self.ended_before)
        if done > self.ended:
            pace = (time.monotonic() - self.started) / (done - self.ended_before)
            left = pace * (total - done)
        return {"done": done, "total": total, "seconds_left": left}
