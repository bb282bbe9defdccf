"""Does a sweep that is killed anywhere give the results of one that was not? Twenty SIGKILLs each of four processes.

    python benchmarks/soak_sweep.py [--out benchmarks/results] [--readme README.md]      (a part of `make soak`)

A plan of nine sparsity jobs (mask, LoRA with checkpoints, merge, evaluation) is run again and again with two workers,
or two actors of a Ray on this machine. Each time a job is at work, a seeded moment later one process gets SIGKILL: the
sweep itself, the worker that does a job, the actor that does one, or Ray's head (gcs_server). What ended is started
again with the same command, until a sweep has had its kills; then it runs to its end.

Each sweep must end with exactly the planned results, each job finished in one run directory, and every number equal to
that of a sweep in one process without a kill. Writes soak_sweep.json and soak_sweep.md; exit code 1 where one does not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from _measuring import RESULTS, processor, publish, version
from soak import environment

KILLS = 20  # in all of a kind
A_SWEEP = 3  # of one sweep: a job that is hit oftener before its first step is given up, as retry_rules says
LATEST_SECONDS = 2.0  # after a job was seen at work
PATIENCE_SECONDS = 300
MARK = "<!-- soak_sweep: made by benchmarks/soak_sweep.py -->"
KINDS = {"the sweep": "local", "a worker": "local", "an actor of Ray": "ray", "Ray's head": "ray"}
COLUMNS = ("dense", "masked", "tuned", "tuned_low", "tuned_high", "n", "mask_sha256", "measured_sparsity")
COLUMNS += ("merge_difference", "merge_violations", "merge_withheld", "validation_nll", "steps", "all_facts_hold")
PLAN = {
    "kind": "sparsity",
    "name": "soak",
    "base": {"model": "tiny-llama", "task": "hellaswag", "data": "bundled", "limit": 16, "batch_size": 4}
    | {"steps": 8, "checkpoint_every": 2},
    "axes": {
        "method": {
            "unstructured": {"pattern": "unstructured", "importance": "magnitude"},
            "random": {"pattern": "unstructured", "importance": "random"},
        },
        "sparsity": [0, 0.5, 0.9],
        "mode": ["sparse_to_dense", "sparse_to_sparse"],
    },
    "aliases": [{"when": {"sparsity": 0}, "ignore": ["method", "mode"]}],
}


@dataclass
class Kill:
    """One kill. seconds: after a job was seen at work; done: jobs that were finished then."""

    number: int
    kind: str
    sweep: int
    seconds: float
    done: int = 0
    job: str = ""


def moments(kind: str, kills: int) -> list[Kill]:
    """The kills of a kind, each with its seeded moment, a few for each sweep."""
    first = list(KINDS).index(kind) * KILLS
    return [
        Kill(first + n, kind, 1 + n // A_SWEEP, round(LATEST_SECONDS * random.Random(first + n).random(), 3))
        for n in range(kills)
    ]


# --- the sweep that is killed ---------------------------------------------------------------------------------------


def start(kind: str, plan: Path, folder: Path) -> subprocess.Popen:
    words = ["-m", "nbhelpers", "sweep", "run", str(plan), "--out", str(folder), "--workers", "2"]
    words += ["--engine", KINDS[kind], "--json"]
    out = (folder.parent / f"{folder.name}.log").open("ab")
    return subprocess.Popen([sys.executable, *words], env=environment(), stdout=out, stderr=out)


def at_work(folder: Path) -> dict[int, str]:
    """Process -> job, of all that hold a lease now."""
    from nbhelpers.runlock import is_alive, read_owner

    owners = {path.parent.name: read_owner(path) for path in (folder / "leases").glob("*/lock")}
    return {o["pid"]: job for job, o in owners.items() if job != "plan" and "token" in o and is_alive(o)}


def wait_for(what: Callable, driver: subprocess.Popen):
    """What comes, or None where the driver ends before it."""
    until = time.monotonic() + PATIENCE_SECONDS
    while not (found := what()):
        if driver.poll() is not None:
            return None
        if time.monotonic() > until:
            raise TimeoutError(f"nothing came in {PATIENCE_SECONDS} s")
        time.sleep(0.02)
    return found


def strike(kill: Kill, driver: subprocess.Popen, folder: Path, gone: set[int]) -> bool:
    """Kill the process that is meant, at its moment. False where the sweep ended before it."""

    def busy() -> dict[int, str]:
        return {pid: job for pid, job in at_work(folder).items() if pid not in gone}

    if wait_for(busy, driver) is None:
        return False
    time.sleep(kill.seconds)
    if (working := wait_for(busy, driver)) is None:
        return False
    pid, kill.job = sorted(working.items())[0]
    kill.done = len(finished(folder))
    if kill.kind == "the sweep":
        pid = driver.pid
    elif kill.kind == "Ray's head":
        pid = next(one.pid for one in psutil.Process(driver.pid).children() if one.name().startswith("gcs_server"))
    gone.add(pid)
    try:
        psutil.Process(pid).kill()
    except psutil.NoSuchProcess:  # it ended in this very moment
        return False
    if kill.kind in ("the sweep", "Ray's head"):
        driver.wait(timeout=PATIENCE_SECONDS)
    return True


def finished(folder: Path) -> list[str]:
    return sorted(path.parent.name for path in (folder / "runs").glob("*/result.json"))


def one_sweep(kind: str, kills: list[Kill], plan: Path, folder: Path) -> list[Kill]:
    """Start, kill, start again; then to the end. The kills that fell."""
    driver, fell, gone = start(kind, plan, folder), [], set()
    for kill in kills:
        if driver.poll() is not None:
            driver = start(kind, plan, folder)
        if not strike(kill, driver, folder, gone):
            break
        fell.append(kill)
    while driver.wait(timeout=PATIENCE_SECONDS):
        if Counter(open_runs(folder))["failed"]:
            break
        driver = start(kind, plan, folder)
    return fell


def open_runs(folder: Path) -> list[str]:
    from nbhelpers import sweep

    return [job["status"] for job in sweep.status(folder)["jobs"]]


# --- comparing ------------------------------------------------------------------------------------------------------


def rows(folder: Path) -> list[dict]:
    from nbhelpers import sweep

    return [{key: row.get(key) for key in (*PLAN["axes"], "status", *COLUMNS)} for row in sweep.results(folder)]


def compared(found: list[dict], whole: list[dict], results: list[str], jobs: int) -> dict:
    """Whether a killed sweep kept its promises, and the largest difference of a number."""
    largest = max(
        (
            abs(mine[key] - theirs[key])
            for mine, theirs in zip(found, whole, strict=True)
            for key in COLUMNS
            if isinstance(theirs[key], float) and isinstance(mine[key], float)
        ),
        default=0.0,
    )
    promises = {
        "every job finished": {row["status"] for row in found} == {"finished"},
        "each once": len(results) == jobs == len({name.rpartition("-")[0] for name in results}),
        "equal": found == whole,
    }
    broken = [name for name, kept in promises.items() if not kept]
    return {"difference": largest, "ok": not broken, "why": ", ".join(broken)}


def carry_out(kind: str, kills: int, plan: Path, place: Path, whole: list[dict], jobs: int) -> dict:
    """All kills of one kind, in as many sweeps as they take."""
    began, left, fell, sweeps = time.monotonic(), moments(kind, kills), [], []
    while left:
        folder = place / f"{list(KINDS).index(kind)}-{len(sweeps) + 1}"
        hit = one_sweep(kind, left[:A_SWEEP], plan, folder)
        for kill in hit:
            kill.sweep = len(sweeps) + 1
        fell, left = fell + hit, left[len(hit) :]
        sweeps.append(compared(rows(folder), whole, finished(folder), jobs) | {"kills": len(hit)})
        print(f"{kind}: sweep {len(sweeps)}, {len(fell)} kills: {sweeps[-1]}", flush=True)
    seconds = round(time.monotonic() - began, 1)
    return {"kind": kind, "kills": [vars(kill) for kill in fell], "sweeps": sweeps, "seconds": seconds}


def with_known(kinds: list[dict], path: Path) -> list[dict]:
    """With those kinds of kills that were measured before and not now."""
    known = json.loads(path.read_text())["kinds"] if path.exists() else []
    now = {kind["kind"]: kind for kind in kinds}
    found = {kind["kind"]: kind for kind in known} | now
    return [found[kind] for kind in KINDS if kind in found]


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, kinds = found["machine"], found["kinds"]
    where = f"{machine['processor']}, {machine['cores']} cores, Python {machine['python']}, torch {machine['torch']}"
    sweeps = [one for kind in kinds for one in kind["sweeps"]]
    intro = (
        f"{sum(len(kind['kills']) for kind in kinds)} SIGKILLs at seeded random moments of {len(sweeps)} sweeps of "
        f"{found['jobs']} sparsity jobs (tiny-llama, {PLAN['base']['steps']} steps, a checkpoint every "
        f"{PLAN['base']['checkpoint_every']}), on {where}. After the same command was given again "
        f"{sum(one['ok'] for one in sweeps)} of {len(sweeps)} sweeps had exactly the planned results, each job "
        "finished in one run directory, and every number equal to that of a sweep in one process without a kill. Made "
        f"by `make soak` in {found['seconds']:.0f} s; all numbers are in "
        "[benchmarks/results/soak_sweep.json](benchmarks/results/soak_sweep.json)."
    )
    columns = ("killed", "kills", "sweeps", "as planned and equal", "largest difference", "seconds")
    lines = [intro, "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for kind in kinds:
        good, largest = sum(one["ok"] for one in kind["sweeps"]), max(one["difference"] for one in kind["sweeps"])
        why = "; ".join(sorted({one["why"] for one in kind["sweeps"]} - {""}))
        cells = [kind["kind"], len(kind["kills"]), len(kind["sweeps"]), f"{good}{why and f', FAILED: {why}'}"]
        cells += [f"{largest:.1e}", f"{kind['seconds']:.0f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--readme")
    parser.add_argument("--kills", type=int, default=KILLS, help="of each kind")
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    options = parser.parse_args()
    from nbhelpers import sweep

    os.environ.update(environment())
    with tempfile.TemporaryDirectory(prefix="nbhelpers-soak-") as folder:
        place, plan = Path(folder), Path(folder) / "plan.json"
        plan.write_text(json.dumps(PLAN))
        jobs = sweep.run(PLAN, place / "whole")["done"]
        whole = rows(place / "whole")
        kinds = [carry_out(kind, options.kills, plan, place, whole, jobs) for kind in options.kinds]
    machine = {"processor": processor(), "cores": os.cpu_count(), "python": platform.python_version()}
    kinds = with_known(kinds, Path(options.out) / "soak_sweep.json")
    found = {"kinds": kinds, "jobs": jobs, "seconds": round(sum(kind["seconds"] for kind in kinds), 1)}
    found["machine"] = machine | {"torch": version("torch")}
    publish("soak_sweep", found, markdown(found), options.out, options.readme, MARK)
    return 0 if all(one["ok"] for kind in kinds for one in kind["sweeps"]) else 1


if __name__ == "__main__":
    sys.exit(main())
