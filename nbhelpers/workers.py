"""How do several processes share one sweep? Workers under any scheduler, and several at once on this machine.

A worker does jobs of a sweep's folder, each under a lease, until none is left that it could do. The folder has to be
one and the same for all of them: whoever lays the plan down leaves a probe in `workers/`, a worker that does not find
it refuses to start, and each leaves a probe of its own. SIGTERM and SIGUSR1 (schedulers send one before the time is
up) stop the job at hand, whose run then says interrupted, and give its lease back; another worker goes on with it. So
does the death of a sweep that started its workers itself.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nbhelpers import grid, sweep
from nbhelpers.grid import Plan
from nbhelpers.ledger import Ledger
from nbhelpers.records import plain, read_json, write_json
from nbhelpers.runlock import is_alive, read_owner, this_process

FOLDER = "workers"
PROBE, PLAN = "probe.json", "plan.json"
SIGNALS = ("SIGTERM", "SIGUSR1")
LOOK_SECONDS = 0.2
RESTARTS = 3  # of workers that a signal ended before they had begun a job; one that kills them has its own rule
PARENT = "NBHELPERS_SWEEP_PROCESS"  # the process that started a worker and without which it shall not go on
COMMAND = (sys.executable, "-m", "nbhelpers")


def lay_down(plan: str | Path | Mapping[str, Any] | Plan, folder: str | Path) -> dict[str, Any]:
    """Freeze a plan in a folder without running anything, and leave the probe by which workers know it. Returns it."""
    expansion = grid.expand(grid.read_plan(plan))
    folder = Ledger.create(folder, expansion).folder
    probe = folder / FOLDER / PROBE
    probe.parent.mkdir(exist_ok=True)
    if not probe.exists():
        write_json(probe, {**this_process(), "token": secrets.token_hex(6)})
    write_json(probe.with_name(PLAN), plain(expansion.plan))
    return read_json(probe)


def work(
    plan: str | Path | Mapping[str, Any] | Plan,
    folder: str | Path,
    budget: str | float | None = None,
    progress: Callable[[dict[str, Any]], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Do jobs of a plan that was laid down in this folder, beside other workers; the result is that of `sweep.run`.

    Jobs that a dead worker left are taken over once its heartbeat is stale. ValueError without the plan's probe.
    """
    folder, allowed = Path(folder), sweep.parse_budget(budget)
    check_common(folder, plan)
    until = time.monotonic() + allowed
    with told_by_signals(should_stop) as stop, announced(folder):
        while True:
            left = None if budget is None else max(0.001, until - time.monotonic())
            found = sweep.run(plan, folder, left, progress, stop)
            if found["ended"] != "done" or not found["missing"] or not found["tried"]:
                return found
            if time.monotonic() >= until:
                return found | {"ended": "budget"}


def present(folder: str | Path) -> list[dict[str, Any]]:
    """The workers that may be at work in a folder now: {host, pid, utc}, by host and process."""
    found = [read_owner(path) for path in sorted((Path(folder) / FOLDER).glob("on-*.json"))]
    return [one for one in found if is_alive(one)]  # one that has ended meanwhile says nothing


def run(
    plan: str | Path | Mapping[str, Any] | Plan,
    folder: str | Path,
    count: int,
    budget: str | float | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """`count` workers on this machine until nothing is left to do; the result is that of `sweep.run`.

    The cores are shared out among them unless OMP_NUM_THREADS says otherwise. A worker that a signal ended (memory,
    say) is started again; a job that ends its workers again and again is given up (retry_rules). A stop is passed on.
    """
    if count < 1:
        raise ValueError(f"workers must be at least 1, got {count}")
    allowed = sweep.parse_budget(budget)
    folder = Path(folder)
    lay_down(plan, folder)
    before, started, restarts = sweep.status(folder), time.monotonic(), RESTARTS
    workers = [_start(folder, count, budget) for _ in range(count)]
    ended = "done"
    try:
        while True:
            if should_stop is not None and should_stop():
                raise KeyboardInterrupt
            killed = [worker for worker in workers if (worker.poll() or 0) < 0]
            for worker in killed:
                left = allowed - (time.monotonic() - started)
                free = began_a_job(Ledger(folder), {**this_process(), "pid": worker.pid})
                if (free or restarts) and left > 0:
                    restarts -= not free
                    workers.remove(worker)
                    workers.append(_start(folder, count, None if budget is None else round(left, 3)))
            if all(worker.poll() is not None for worker in workers):
                break
            time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        ended = "stopped"
    finally:
        _end(workers)
    found = Ledger(folder).coverage()
    codes = [worker.returncode for worker in workers]
    if ended == "done" and found["missing"]:
        told = found["failed"] > (before["failed"] if budget is None else 0)  # a worker's 1: jobs failed, or it did
        if not all(code == 0 or (code == 1 and told) for code in codes):
            raise RuntimeError(
                f"{found['missing']} of {found['planned']} jobs are missing and workers ended with {sorted(codes)}: "
                "see what they said above; the same command goes on"
            )
        ended = "budget" if budget is not None else "stopped"
    tried = found["done"] + found["failed"] - before["done"] - before["failed"]
    seconds = round(time.monotonic() - started, 3)
    return found | {"ended": ended, "tried": tried, "seconds": seconds, "folder": str(folder)}


def _start(folder: Path, count: int, budget: str | float | None) -> subprocess.Popen:
    plan = folder / FOLDER / PLAN
    words = [*COMMAND, "sweep", "worker", str(plan), "--folder", str(folder)]
    words += [] if budget is None else ["--budget", str(budget)]
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {"OMP_NUM_THREADS": threads, "OMP_WAIT_POLICY": "PASSIVE", **os.environ, PARENT: str(os.getpid())}
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL)


def _end(workers: list[subprocess.Popen]) -> None:
    """Ask those that are at work to stop, and wait for them."""
    for worker in workers:
        if worker.poll() is None:
            worker.terminate()
    for worker in workers:
        worker.wait()


def began_a_job(ledger: Ledger, process: Mapping[str, Any]) -> bool:
    """Whether this process (its host and pid) ever began a job of a sweep."""
    who = (process["host"], process["pid"])
    return any(
        note["event"] == "started" and (note["host"], note["pid"]) == who
        for notes in ledger.notes().values()
        for note in notes
    )


def check_common(folder: Path, plan: str | Path | Mapping[str, Any] | Plan) -> None:
    """ValueError unless this plan was laid down here."""
    probe = folder / FOLDER / PROBE
    if not probe.is_file():
        raise ValueError(
            f"'{folder}' has no {FOLDER}/{PROBE}: lay the plan down first (sweep plan PLAN --out DIR), and look "
            "whether this machine sees the same folder"
        )
    if plain(grid.read_plan(plan)) != read_json(folder / FOLDER / PLAN):
        raise ValueError(
            f"'{folder}' was laid down with another plan than this one: give {FOLDER}/{PLAN} of that folder, or lay "
            "the changed plan down first (sweep plan PLAN --out DIR)"
        )


@contextlib.contextmanager
def announced(folder: Path) -> Iterator[None]:
    """A probe of this worker, renewed while it lives and gone after it."""
    me = this_process()
    probe, stop = folder / FOLDER / f"on-{me['host']}-{me['pid']}.json", threading.Event()

    def renew() -> None:
        while True:
            with contextlib.suppress(OSError):
                write_json(probe, this_process(), durable=False)
            if stop.wait(10):
                return

    thread = threading.Thread(target=renew, name="nbhelpers-worker", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=10)
        probe.unlink(missing_ok=True)


@contextlib.contextmanager
def told_by_signals(should_stop: Callable[[], bool] | None) -> Iterator[Callable[[], bool]]:
    """A should_stop that also hears SIGNALS, and the death of a PARENT; the handlers are put back afterwards. Only a
    main thread hears signals."""
    told, parent = threading.Event(), os.environ.get(PARENT)
    before = {}
    if threading.current_thread() is threading.main_thread():
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.signal(number, lambda *_: told.set()) for number in numbers}
    try:
        yield (
            lambda: (
                told.is_set()
                or (parent is not None and os.getppid() != int(parent))
                or (should_stop is not None and should_stop())
            )
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
