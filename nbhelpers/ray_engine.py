"""How does Ray carry out a sweep? Actors on this machine or on a cluster, each with its model loaded, on one ledger.

`run` lays the plan down, starts the actors and hands out jobs in the sweep's order; an actor does each as any worker
does, under its lease and on record in the folder, which all of them share. So whatever dies, the same command goes on:
an actor is replaced and its job goes on from its checkpoint; without Ray's head the sweep ends with one line.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbhelpers import attempts, sweep
from nbhelpers import workers as several
from nbhelpers.grid import Job, JobKind, Plan
from nbhelpers.ledger import BEAT_SECONDS, Ledger
from nbhelpers.ray_connection import answers, connected, installed, look_up
from nbhelpers.records import plain
from nbhelpers.runlock import STALE_SECONDS, this_process
from nbhelpers.tracking import Interrupted

MODULES = ("nbhelpers.jobkinds",)  # what an actor imports first: all that register kinds of jobs
RESTARTS = 3  # of actors that died before they had begun a job; a job that kills them is given up by its own rule
LOOK_SECONDS, STOP_SECONDS, PATIENCE_SECONDS = 0.5, 30.0, 60.0
log = logging.getLogger(__name__)


def run(
    plan: str | Path | Mapping[str, Any] | Plan,
    folder: str | Path,
    workers: int = 1,
    budget: str | float | None = None,
    should_stop: Callable[[], bool] | None = None,
    address: str | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """`workers` actors until nothing is left to do; the result is that of `sweep.run`.

    address: a cluster that runs ("auto", host:port, ray://host:port), which is left running; None = the Ray that this
    process is connected to, else one of its own on this machine's loopback, gone at the end. An actor takes one GPU
    where Ray has any, and its share of the cores. RuntimeError, one line, where Ray's head is gone.
    """
    if workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if address is not None:
        look_up(address)
    allowed, ray, expansion = sweep.parse_budget(budget), installed(local=address is None), sweep.opened(plan)
    folder = Path(folder).resolve()
    several.lay_down(expansion.plan, folder)
    todo = sweep.Pass(expansion, sweep.laid_down(expansion, folder), allowed, progress, should_stop)
    if not todo.waiting and not todo.ledger.to_come:
        return todo.summary("done")
    with connected(ray, workers, address) as head, several.told_by_signals(should_stop) as stop:
        how = _Crew(ray, todo, workers, head, stop).run()
    return todo.summary(how)


def choose(waiting: Sequence[Job], kind: JobKind, held: str | None, others: Sequence[str | None]) -> Job:
    """The next job of an actor that holds the model `held`, while others hold theirs; the first of these kinds:

    of the stage that comes first, with its model; of that stage, with a model that nobody holds; with its model, from
    a later stage; any. So a model stays loaded, and each model's curve still fills from its ends and its middle.
    """
    first = min(kind.early(job.config) for job in waiting)

    def last(job: Job) -> tuple[bool, bool, bool]:
        own, now, free = (model := shared(kind, job)) == held, kind.early(job.config) == first, model not in others
        return not (own and now), not (free and now), not own

    return min(waiting, key=last)  # the earliest of equals


def shared(kind: JobKind, job: Job) -> str:
    return repr(kind.shares(job.config))


def cpu_share(cores: Sequence[float], workers: int) -> int:
    """Cores of each actor: the most with which all find a place on nodes of so many cores; at least 1.

    >>> cpu_share([4, 8], 3), cpu_share([2], 5)
    (4, 1)
    """
    most = int(max(cores, default=1))
    return next((n for n in range(most, 1, -1) if sum(int(node) // n for node in cores) >= workers), 1)


class Worker:
    """What runs in an actor: a worker of the sweep that is told which job comes next, and keeps what they share."""

    def __init__(self, modules: Sequence[str], place: str) -> None:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        if Path(place).is_dir():
            os.chdir(place)  # relative paths of a plan mean what they mean to the one who asked
        for name in modules:
            importlib.import_module(name)
        self.told, self.open_things = threading.Event(), contextlib.ExitStack()

    def join(self, plan: dict[str, Any], folder: str) -> dict[str, Any]:
        """Take part in the sweep of this folder; returns who this is. ValueError where it is not the same folder."""
        several.check_common(Path(folder), plan)
        expansion = sweep.opened(plan)
        self.open_things.enter_context(several.announced(Path(folder)))
        self.open_things.callback(expansion.kind.close)
        self.doer = attempts.Doer(expansion, Ledger(folder), should_stop=self.told.is_set)
        return this_process()

    def do(self, job: dict[str, Any]) -> dict[str, Any] | None:
        try:
            return self.doer.do(Job(**job))
        except (KeyboardInterrupt, Interrupted):
            return {"status": "interrupted"}

    def stop(self) -> None:
        self.told.set()

    def leave(self) -> None:
        self.open_things.close()


@dataclass(eq=False)
class _Actor:
    """One actor as the driver sees it. process: who it is, once it is ready; job: what it is at; held: its model."""

    handle: Any
    process: dict[str, Any] | None = None
    job: Job | None = None
    held: str | None = None


class _HeadGone(RuntimeError):
    """Ray itself does not answer any more."""


class _Crew:
    """The actors of one sweep: started, given jobs, replaced, told to stop."""

    def __init__(self, ray: Any, todo: sweep.Pass, count: int, head: str | None, stop: Callable[[], bool]) -> None:
        self.ray, self.todo, self.head, self.stop = ray, todo, head, stop
        self.kind, self.ledger, self.restarts = todo.kind, todo.ledger, RESTARTS
        self.options, self.count = _resources(ray, count), count
        self.pending: dict[Any, _Actor] = {}  # what was asked of actors and has no answer yet
        self.idle: list[_Actor] = []
        self.taken_until: dict[str, float] = {}  # job -> until when the lease of its dead owner may look alive
        self.later: list[Job] = []
        self.waits_since = time.monotonic()

    def run(self) -> str:
        """done or stopped."""
        try:
            for _ in range(self.count):
                self._start()
            while not self.stop():
                self._hand_out()
                busy = any(actor.job for actor in self.pending.values()) or self.later
                if self.idle and not busy:  # there was nothing for one that is ready
                    return "done"
                if not self._look():
                    break
            self._halt()
            return "stopped"
        except (KeyboardInterrupt, Interrupted):
            self._halt()
            return "stopped"
        except _HeadGone:
            self._halt()
            where = "" if self.head is None else f" ({self.head})"
            raise RuntimeError(
                f"Ray's head is gone{where}: what was done is on record, and the same command goes on"
            ) from None
        finally:
            self._dismiss()

    def _start(self) -> None:
        remote = self.ray.remote(concurrency_groups={"control": 1}, max_restarts=0, **self.options)(Worker)
        actor = _Actor(remote.remote(MODULES, os.getcwd()))
        asked = actor.handle.join.remote(plain(self.todo.expansion.plan), str(self.ledger.folder))
        self.pending[asked] = actor

    def _hand_out(self) -> None:
        for actor in list(self.idle):
            others = [one.held for one in (*self.pending.values(), *self.idle) if one is not actor]
            job = self.todo.next(lambda waiting, a=actor, o=others: choose(waiting, self.kind, a.held, o))
            if job is None:
                return
            self.idle.remove(actor)
            actor.job, actor.held = job, shared(self.kind, job)
            self.pending[actor.handle.do.remote(plain(job))] = actor
            self.todo.begun(job)

    def _look(self) -> bool:
        """Wait a moment for answers and take them; False where a job was interrupted."""
        if self._head_is_gone():
            raise _HeadGone
        self._say_where_nobody_is_ready()
        with self._only_actor_errors():
            ready, _ = self.ray.wait(list(self.pending), num_returns=len(self.pending), timeout=LOOK_SECONDS)
        interrupted = [self._take(asked) for asked in ready]
        self.todo.waiting += self.later
        self.later.clear()
        return not any(interrupted)

    def _take(self, asked: Any) -> bool:
        """One answer. True where it is that the job was interrupted."""
        actor = self.pending.pop(asked)
        try:
            with self._only_actor_errors():
                found = self.ray.get(asked)
        except self.ray.exceptions.RayActorError as error:
            self._replace(actor, error)
            return False
        job, actor.job = actor.job, None
        self.idle.append(actor)
        if job is None:
            actor.process = found
        elif found is None:  # another process has it, or a dead one seems to
            self.todo.tried -= 1
            self.later += [job] if time.monotonic() < self.taken_until.get(job.id, 0.0) else []
        elif found["status"] == "interrupted":
            return True
        else:
            self.todo.over(job, found)
        return False

    @contextlib.contextmanager
    def _only_actor_errors(self) -> Iterator[None]:
        """What was raised in an actor comes out as itself; what Ray says of itself, its actors apart, is its end."""
        errors = self.ray.exceptions
        try:
            yield
        except errors.RayActorError:
            raise
        except errors.RayTaskError as error:
            raise error.cause from None
        except (errors.RayError, ConnectionError) as error:
            log.debug("Ray: %s", error)
            raise _HeadGone from None

    def _head_is_gone(self) -> bool:
        return self.head is not None and not answers(self.head)

    def _replace(self, actor: _Actor, error: Exception) -> None:
        if self._head_is_gone():
            raise _HeadGone
        if actor.job is not None:  # on another host its lease looks alive until it is stale
            self.taken_until[actor.job.id] = time.monotonic() + STALE_SECONDS + BEAT_SECONDS
            self.todo.tried -= 1
            self.later.append(actor.job)
        if actor.process is None or not several.began_a_job(self.ledger, actor.process):
            self.restarts -= 1
            if self.restarts < 0:
                why = str(error).strip().splitlines()[-1]
                raise RuntimeError(f"Ray lost {RESTARTS + 1} actors that had begun no job; of the last one: {why}")
        place = "" if actor.job is None else f" in job {actor.job.id}"
        log.warning("an actor of Ray died%s: another one takes its place", place)
        self._start()

    def _say_where_nobody_is_ready(self) -> None:
        if self.idle or any(actor.process for actor in self.pending.values()):
            self.waits_since = time.monotonic()
        elif time.monotonic() - self.waits_since > PATIENCE_SECONDS:
            self.waits_since = time.monotonic()
            log.warning("no actor has found a place yet: each asks for %s, Ray has %s", self.options, _total(self.ray))

    def _halt(self) -> None:
        """Have the jobs at hand stop where they are, and give their leases back. Needs no head."""
        with contextlib.suppress(self.ray.exceptions.RayError, ConnectionError):
            for actor in self.pending.values():
                actor.handle.stop.options(concurrency_group="control").remote()
            busy = [asked for asked, actor in self.pending.items() if actor.job]
            ready, _ = self.ray.wait(busy, num_returns=len(busy), timeout=STOP_SECONDS) if busy else ([], [])
            for asked in ready:
                found, job = self.ray.get(asked), self.pending.pop(asked).job
                if found and found["status"] != "interrupted":  # it was done just then
                    self.todo.over(job, found)

    def _dismiss(self) -> None:
        """Let the actors give back what they hold, and end them."""
        if self._head_is_gone():
            return
        with contextlib.suppress(self.ray.exceptions.RayError, ConnectionError):
            leaving = [actor.handle.leave.remote() for actor in self.idle]
            if leaving:
                self.ray.wait(leaving, num_returns=len(leaving), timeout=STOP_SECONDS)
            for actor in (*self.idle, *self.pending.values()):
                self.ray.kill(actor.handle)


def _resources(ray: Any, count: int) -> dict[str, Any]:
    """What each actor asks of Ray."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    with_gpu = [node for node in nodes if node.get("GPU", 0) >= 1]
    cores = [node.get("CPU", 1) for node in with_gpu or nodes]
    return {"num_cpus": cpu_share(cores, count)} | ({"num_gpus": 1} if with_gpu else {})


def _total(ray: Any) -> str:
    return ", ".join(f"{ray.cluster_resources().get(name, 0):g} {name}" for name in ("CPU", "GPU"))
