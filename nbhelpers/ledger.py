"""What is done of a plan, and who is at work on what? The folder in which several processes share one grid.

    plan.json       the plan and its jobs, frozen; jobs that a changed plan no longer holds stay, and are named
    runs/<job>-<n>  the n-th try of a job: an ordinary run directory; a try that was interrupted goes on in it where
                    its kind of job can resume, and is followed by a try from the start where it cannot
    ledger.jsonl    one line when a try starts and ends, and when a retry is asked for
    leases/<job>/   lock and heartbeat of the process that does this job now
    workers/        probes of the workers (workers.py)

Status words are those of runs, `planned`, and `pruned`: stopped by a search, which is final and no failure. What a run
directory says counts; ledger.jsonl adds the class of a failure and what a try cost.
"""

from __future__ import annotations

import contextlib
import logging
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from nbhelpers.grid import Expansion, Job, Row
from nbhelpers.records import TEMPORARY, append_line, check_output_folder, plain, read_json, read_lines, write_json
from nbhelpers.registry import unknown
from nbhelpers.runlock import RunLock, is_alive, read_owner, this_process
from nbhelpers.runs import read_run
from nbhelpers.search import Pruned, same_search

FORMAT = 1
BEAT_SECONDS = 10.0
FAILURES = ("out of memory", "diverged", "bad input", "error")
FINAL = ("finished", "failed", "diverged")  # failed and diverged until a retry is asked for
STATUSES = ("planned", "running", "finished", "failed", "diverged", "interrupted", "pruned")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class State:
    """Where a job stands. tries: run directories made for it; failure: one of FAILURES; error: its one line."""

    status: str
    tries: int = 0
    run_dir: Path | None = None
    failure: str | None = None
    error: str | None = None

    @property
    def to_do(self) -> bool:
        return self.status in ("planned", "interrupted")


class Ledger:
    """`Ledger.create(folder, expansion)` for a plan, `Ledger(folder)` for one that is there."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._held: dict[str, RunLock] = {}  # of this process's leases, by job
        self._take(_read_plan(self.folder))

    def _take(self, record: dict[str, Any]) -> None:
        self.plan: dict[str, Any] = record["plan"]
        self.rows = [Row(**row) for row in record["rows"]]
        jobs = {key: Job(**job) for key, job in record["jobs"].items()}
        planned = {row.job for row in self.rows}
        self.jobs = {key: job for key, job in jobs.items() if key in planned}
        self.no_longer_planned = {key: job for key, job in jobs.items() if key not in planned}

    @classmethod
    def create(cls, folder: str | Path, expansion: Expansion) -> Ledger:
        """Freeze a plan in a folder, or go on in one: jobs of a changed plan are added, none is ever taken out.

        The rows of a search are its trials, in order; only the number of trials may change.
        """
        folder = Path(folder)
        known = folder / "plan.json"
        if not known.exists() and folder.is_dir() and (strange := _strange(folder)):
            raise ValueError(
                f"'{folder}' holds {min(strange)!r} but no plan.json, so it is no sweep: choose another folder"
            )
        check_output_folder(folder, resume=True)
        with _alone(folder / "leases" / "plan"):
            old = _read_plan(folder) if known.exists() else {"jobs": {}}
            jobs = old["jobs"] | {key: plain(job) for key, job in expansion.jobs.items() if key not in old["jobs"]}
            new = {"format": FORMAT, "plan": plain(expansion.plan), "rows": plain(expansion.rows), "jobs": jobs}
            searches = [plan for plan in (old.get("plan"), new["plan"]) if plan and plan.get("search")]
            if searches and "plan" in old:
                if not same_search(old["plan"], new["plan"]):
                    raise ValueError(
                        f"'{folder}' holds trials of another search (other base, space, metric or sampler): their "
                        "results cannot serve this one; choose another folder"
                    )
                new["rows"] = old["rows"]
            if new != old:
                write_json(known, new)
        return cls(folder)

    @property
    def to_come(self) -> int:
        """Trials of a search that are not asked for yet."""
        search = self.plan.get("search")
        return max(0, search["trials"] - len(self.rows)) if search else 0

    # reading

    def state(self, job: str, notes: Mapping[str, list[dict]] | None = None, leased: bool | None = None) -> State:
        """Where one job stands now. notes: `self.notes()`, where many are asked for; leased: False for the holder."""
        leased = self._leased(job) if leased is None else leased
        folders = self._tries(job)
        if not folders:
            return State("running" if leased else "planned")
        number, folder = folders[-1]
        try:
            run = read_run(folder)
            status, events = run.status, run.events
        except (ValueError, OSError):  # killed before there was a manifest, or in its middle
            status, events = "interrupted", []
        error = next((event for event in reversed(events) if event.get("kind") in ("error", "attempt")), {})
        if status == "interrupted" and error.get("type") == Pruned.__name__:
            return State("pruned", number, folder)
        if status == "finished":
            return State(status, number, folder)
        said = (self.notes() if notes is None else notes).get(job, [])
        if any(note["event"] == "retry" and note.get("try", 0) >= number for note in said):
            return State("running" if leased else "planned", number, folder)
        ended = next((n for n in reversed(said) if n["event"] == "ended" and n.get("try") == number), None)
        if ended is not None and ended.get("status") in STATUSES and status != "diverged":
            status = ended["status"] if ended["status"] != "finished" else status
        if leased and status not in FINAL:
            return State("running", number, folder)
        if status not in FINAL:
            return State(status, number, folder)
        failure, line = (ended or {}).get("failure"), (ended or {}).get("error")
        return State(
            status, number, folder, failure or _class_by_name(status, error.get("type")), line or error.get("message")
        )

    def states(self) -> dict[str, State]:
        notes = self.notes()
        return {job: self.state(job, notes) for job in self.jobs}

    def notes(self) -> dict[str, list[dict[str, Any]]]:
        """The lines of ledger.jsonl by job; torn ones are skipped."""
        found: dict[str, list[dict]] = {}
        for line in read_lines(self.folder / "ledger.jsonl")[0]:
            if isinstance(line.get("job"), str) and isinstance(line.get("event"), str):
                found.setdefault(line["job"], []).append(line)
        return found

    def coverage(self, states: Mapping[str, State] | None = None) -> dict[str, Any]:
        """Counts: planned = done + failed + pruned + running + missing. rows = planned jobs + aliases, of a search: the
        trials so far; those to come are planned and missing."""
        states = self.states() if states is None else states
        failed = {name: sum(state.failure == name for state in states.values()) for name in FAILURES}
        waiting = [state.status for state in states.values() if state.to_do]
        return {
            "rows": len(self.rows),
            "aliases": sum(row.alias for row in self.rows),
            "planned": len(self.jobs) + self.to_come,
            "done": sum(state.status == "finished" for state in states.values()),
            "failed": sum(failed.values()),
            "failed_by_class": failed,
            "pruned": sum(state.status == "pruned" for state in states.values()),
            "running": sum(state.status == "running" for state in states.values()),
            "missing": len(waiting) + self.to_come,
            "interrupted": waiting.count("interrupted"),
            "no_longer_planned": len(self.no_longer_planned),
        }

    def finished(self) -> int:
        """How many run directories there are with a result: a look that reads none of them."""
        return sum(1 for _ in (self.folder / "runs").glob("*/result.json"))

    def seconds(self) -> dict[str, float]:
        """What each finished job took, where it was done on this host."""
        return {
            job: note["seconds"]
            for job, notes in self.notes().items()
            for note in notes
            if note["event"] == "ended" and note.get("status") == "finished" and note.get("host") == platform.node()
        }

    def signs(self, jobs: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
        """Lock and heartbeat of those of these jobs that another host has: whether its process lives, only its next
        sign of life tells. A lease of a dead process of this host is free at once."""
        found = {}
        for job in filter(self._leased, jobs):
            signs = [read_owner(self.folder / "leases" / job / name) for name in ("lock", "heartbeat.json")]
            if signs[0].get("host") != platform.node():
                found[job] = signs
        return found

    # writing

    @contextlib.contextmanager
    def lease(self, job: str) -> Iterator[bool]:
        """True for the one process that may do this job now; kept alive by a heartbeat, free again after it."""
        folder = self.folder / "leases" / job
        folder.mkdir(parents=True, exist_ok=True)
        lock = RunLock(folder)
        try:
            lock.acquire()
        except ValueError:
            yield False
            return
        stop, self._held[job] = threading.Event(), lock
        thread = threading.Thread(target=_beat, args=(lock, stop), name="nbhelpers-lease", daemon=True)
        try:
            thread.start()
            yield True
        finally:
            stop.set()
            thread.join(timeout=BEAT_SECONDS)
            del self._held[job]
            if lock.is_ours():  # else both are of the process that took it over
                (folder / "heartbeat.json").unlink(missing_ok=True)
            lock.release()

    def holds(self, job: str) -> bool:
        """Whether this process has the lease of a job: not after a sleep through which another one took it over."""
        return job in self._held and self._held[job].is_ours()

    def next_run_dir(self, job: str, resumes: bool = False) -> tuple[int, Path, bool]:
        """(number, run directory, whether it is gone on in) of the next try; results of earlier ones stay.

        resumes: the kind of job can go on in a run directory that was interrupted.
        """
        state = self.state(job, leased=False)
        if resumes and state.status == "interrupted":
            return state.tries, state.run_dir, True
        number = max((number for number, _ in self._tries(job)), default=0) + 1
        return number, self.folder / "runs" / f"{job}-{number}", False

    def grow(self, propose: Callable[[], Job]) -> Job | None:
        """Freeze the next trial of a search, which `propose` makes of the rows so far; None where all are there.

        Other processes wait meanwhile. A trial whose job is there already is an alias.
        """
        with _alone(self.folder / "leases" / "plan"):
            record = _read_plan(self.folder)
            self._take(record)
            if not self.to_come:
                return None
            job = propose()
            record["rows"].append(plain(Row(job.values, job.id, job.id in self.jobs)))
            record["jobs"].setdefault(job.id, plain(job))
            write_json(self.folder / "plan.json", record)
            self._take(record)
        return job

    def note(self, event: str, job: str, number: int, **more: Any) -> None:
        who = this_process()
        line = {"event": event, "job": job, "try": number, "utc": who["utc"], "host": who["host"], "pid": who["pid"]}
        append_line(self.folder / "ledger.jsonl", line | more)

    def retry(self, failures: Iterable[str] = ()) -> list[str]:
        """Plan failed and diverged jobs again (those of the given classes, or all); returns their ids."""
        wanted = list(failures) or list(FAILURES)
        for name in wanted:
            if name not in FAILURES:
                raise LookupError(unknown("failure class", name, FAILURES))
        again = [(job, state) for job, state in self.states().items() if state.failure in wanted]
        for job, state in again:
            self.note("retry", job, state.tries)
        return [job for job, _ in again]

    def _tries(self, job: str) -> list[tuple[int, Path]]:
        found = [(path.name.rpartition("-")[2], path) for path in (self.folder / "runs").glob(f"{job}-*")]
        return sorted((int(number), path) for number, path in found if number.isdecimal())

    def _leased(self, job: str) -> bool:
        folder = self.folder / "leases" / job
        owner, beat = read_owner(folder / "lock"), read_owner(folder / "heartbeat.json")
        same = (beat.get("host"), beat.get("pid")) == (owner.get("host"), owner.get("pid"))
        return bool(owner) and (is_alive(owner) or (same and is_alive(owner | beat)))


_OWN = {"plan.json", "runs", "ledger.jsonl", "leases", "workers"}
_OOM_NAMES = ("MemoryError", "OutOfMemoryError", "RowTooLarge")


def _strange(folder: Path) -> set[str]:
    """Names in a folder that no sweep makes. Another process may be writing the plan at this moment."""
    return {path.name for path in folder.iterdir() if path.name not in _OWN and not fnmatch(path.name, TEMPORARY)}


def _read_plan(folder: Path) -> dict[str, Any]:
    try:
        record = read_json(folder / "plan.json")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"'{folder}' is not a sweep (no plan.json): name the folder of `sweep run --out`") from None
    if not isinstance(record, dict) or not {"format", "plan", "rows", "jobs"} <= record.keys():
        raise ValueError(f"'{folder}/plan.json' is not the plan of a sweep: it needs format, plan, rows and jobs")
    if not isinstance(record["format"], int) or record["format"] > FORMAT:
        raise ValueError(
            f"'{folder}' has sweep format {record['format']!r}, this version reads up to {FORMAT}: update nbhelpers"
        )
    return record


def _class_by_name(status: str, error: str | None) -> str:
    """The class of a failure whose line in ledger.jsonl was lost with its process."""
    if status == "diverged":
        return "diverged"
    return "out of memory" if error in _OOM_NAMES else "error"


def _beat(lock: RunLock, stop: threading.Event) -> None:
    while not stop.wait(BEAT_SECONDS):
        try:
            if not lock.is_ours():
                _log.warning("the lease '%s' was taken over by another process", lock.path.parent)
                return
            write_json(lock.path.with_name("heartbeat.json"), this_process(), durable=False)
        except OSError as error:
            _log.warning("no heartbeat could be written in '%s' (%s)", lock.path.parent, error)


@contextlib.contextmanager
def _alone(folder: Path, patience_seconds: float = 10.0) -> Iterator[None]:
    """Wait for another process that writes the plan of the same folder at this moment."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, until = RunLock(folder), time.monotonic() + patience_seconds
    while True:
        try:
            lock.acquire()
            break
        except ValueError:
            if time.monotonic() > until:
                raise
            time.sleep(0.02)
    try:
        yield
    finally:
        lock.release()
