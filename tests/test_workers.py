"""Do workers share a sweep without doing a job twice, hand back what they cannot finish, and refuse a wrong folder?"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import fake_jobs
import psutil
import pytest
from fake_jobs import plan
from typer.testing import CliRunner

from nbhelpers import cli, grid, runlock, sweep, workers
from nbhelpers.ledger import Ledger
from nbhelpers.records import read_json, write_json
from nbhelpers.runlock import read_owner, utc_now
from nbhelpers.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
CODE = "import sys, fake_jobs; from nbhelpers.cli import main; main()"  # the command, with the kind of the tests

DRIVER = f"import sys; from nbhelpers import workers; workers.COMMAND = (sys.executable, '-c', {CODE!r}); {CODE}"


@pytest.fixture(autouse=True)
def with_fake_jobs(monkeypatch):
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", CODE))
    monkeypatch.setenv("PYTHONPATH", f"{fake_jobs.TESTS}{os.pathsep}{ROOT}")


def wait_for(what, seconds: float = 120):
    """What it says as soon as it says something."""
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it did not come"
        time.sleep(0.02)
    return found


def start(folder: Path) -> subprocess.Popen:
    words = [*workers.COMMAND, "sweep", "worker", str(folder / "workers" / "plan.json"), "--folder", str(folder)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def begun(folder: Path, log: Path) -> bool:
    """Whether a job is under way that sleeps before it is done."""
    return any((folder / "runs").glob("*/metrics.jsonl")) and not log.exists()


def test_two_workers_do_every_job_once_with_the_results_of_one(tmp_path):
    log = tmp_path / "log"
    values = plan(base={"log": str(log), "cost": 0.05}, axes={"a": list(range(12))})
    found = workers.run(values, tmp_path / "s", 2)
    assert (found["done"], found["missing"], found["tried"], found["ended"]) == (12, 0, 12, "done")
    assert sorted(fake_jobs.done(log)) == [(a, 0.0, 0) for a in range(12)]
    alone = sweep.run(plan(axes={"a": list(range(12))}), tmp_path / "alone")
    assert alone["done"] == 12
    totals = [[row["total"] for row in sweep.results(tmp_path / folder)] for folder in ("s", "alone")]
    assert totals[0] == totals[1] == list(range(12))
    assert workers.present(tmp_path / "s") == [], "no probe is left behind"
    again = workers.run(values, tmp_path / "s", 2)
    assert (again["tried"], again["done"], again["ended"]) == (0, 12, "done")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_worker_that_is_told_to_end_hands_its_job_back_and_another_one_does_it(number, tmp_path):
    log = tmp_path / "log"
    values = plan(base={"log": str(log), "cost": 3.0}, axes={"a": [1, 2]})
    workers.lay_down(values, tmp_path / "s")
    worker = start(tmp_path / "s")
    wait_for(lambda: begun(tmp_path / "s", log))
    assert len(workers.present(tmp_path / "s")) == 1
    worker.send_signal(number)
    _, said = worker.communicate(timeout=30)
    assert worker.returncode == 130 and "run the same command again to go on" in said
    assert fake_jobs.statuses(tmp_path / "s") == ["interrupted"]
    assert sweep.status(tmp_path / "s")["running"] == 0, "the lease was given back"
    found = workers.work(values, tmp_path / "s")
    assert (found["done"], found["missing"]) == (2, 0) and sorted(fake_jobs.done(log)) == [(1, 0.0, 0), (2, 0.0, 0)]


@pytest.mark.slow
def test_a_worker_that_was_killed_is_started_again_and_the_sweep_is_whole(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("FAKE_FATE", "3 middle")  # each worker dies in its third job
    values = plan(base={"log": str(log), "cost": 0.01}, axes={"a": list(range(7))})
    found = workers.run(values, tmp_path / "s", 2)
    assert (found["done"], found["missing"]) == (7, 0)
    assert sorted(fake_jobs.done(log)) == [(a, 0.0, 0) for a in range(7)]
    assert len(fake_jobs.statuses(tmp_path / "s")) > 7, "somebody died"


@pytest.mark.slow
def test_a_job_that_kills_its_workers_is_given_up_and_the_sweep_ends_in_one_go(tmp_path):
    values = plan(base={"log": str(tmp_path / "log"), "cost": 0.01}, axes={"what": ["kill", "fine"], "a": [1, 2]})
    found = workers.run(values, tmp_path / "s", 2)
    assert (found["done"], found["failed_by_class"]["error"], found["missing"], found["ended"]) == (2, 2, 0, "done")


def sweep_run(folder: Path, values: dict) -> subprocess.Popen:
    """`sweep run` with two workers in a process of its own."""
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(values))
    words = [sys.executable, "-c", DRIVER, "sweep", "run", str(file), "--out", str(folder), "--workers", "2"]
    return subprocess.Popen(words, stderr=subprocess.DEVNULL)


def is_whole(folder: Path, jobs: int) -> bool:
    """Whether every job has its result, and one run directory that finished."""
    rows = [(row["status"], row["total"]) for row in sweep.results(folder)]
    return rows == [("finished", a) for a in range(jobs)] and fake_jobs.statuses(folder).count("finished") == jobs


@pytest.mark.slow
def test_a_sweep_killed_at_three_random_moments_takes_its_workers_along_and_the_same_command_goes_on(tmp_path):
    folder, generator = tmp_path / "s", random.Random(4)
    values = plan(base={"log": str(tmp_path / "log"), "cost": 0.4}, axes={"a": list(range(24))})
    for _ in range(3):
        before, driver = len(fake_jobs.statuses(folder)), sweep_run(folder, values)
        wait_for(lambda before=before: len(fake_jobs.statuses(folder)) > before)
        time.sleep(generator.random())
        below = psutil.Process(driver.pid).children()
        driver.kill()
        driver.wait()
        wait_for(lambda below=below: not any(alive(one) for one in below))
        assert not holders(folder), "leases were given back"
    assert sweep_run(folder, values).wait(timeout=240) == 0
    assert is_whole(folder, 24) and "interrupted" in fake_jobs.statuses(folder)


@pytest.mark.slow
def test_workers_killed_at_three_random_moments_are_replaced_and_every_result_is_there_once(tmp_path):
    folder, generator, killed = tmp_path / "s", random.Random(3), set()
    driver = sweep_run(folder, plan(base={"log": str(tmp_path / "log"), "cost": 0.4}, axes={"a": list(range(12))}))
    for _ in range(3):
        wait_for(lambda: holders(folder) - killed)
        time.sleep(generator.random() * 0.3)
        killed.add(pid := min(wait_for(lambda: holders(folder) - killed)))  # between two jobs nobody holds one
        os.kill(pid, signal.SIGKILL)
    assert driver.wait(timeout=240) == 0
    assert is_whole(folder, 12) and len(fake_jobs.statuses(folder)) > 12


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def holders(folder: Path) -> set[int]:
    """Processes that hold a lease of a job."""
    owners = [read_owner(path) for path in (folder / "leases").glob("*/lock") if path.parent.name != "plan"]
    return {owner["pid"] for owner in owners if "token" in owner}


def test_a_folder_without_the_plan_s_probe_is_not_the_one_that_is_shared(tmp_path):
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="has no workers/probe.json: lay the plan down first"):
        workers.work(plan(), tmp_path / "other")
    assert not any((tmp_path / "other").iterdir())


def test_a_worker_with_another_plan_leaves_the_folder_as_it_is(tmp_path):
    workers.lay_down(plan(axes={"a": [1, 2, 3]}), tmp_path / "s")
    before = read_json(tmp_path / "s" / "plan.json")
    with pytest.raises(ValueError, match="was laid down with another plan than this one"):
        workers.work(plan(axes={"a": [9]}), tmp_path / "s")
    assert read_json(tmp_path / "s" / "plan.json") == before and not (tmp_path / "s" / "runs").exists()


@pytest.mark.slow
def test_workers_that_all_die_are_started_again_and_one_that_never_lives_is_no_used_up_budget(tmp_path, monkeypatch):
    monkeypatch.setenv("FAKE_FATE", "2 middle")  # alone: nobody is alive when it has died
    log = tmp_path / "log"
    values = plan(base={"log": str(log), "cost": 0.01}, axes={"a": [1, 2, 3]})
    found = workers.run(values, tmp_path / "s", 1)
    assert (found["done"], found["missing"], found["ended"]) == (3, 0, "done")
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(2)"))
    with pytest.raises(RuntimeError, match=r"1 of 1 jobs are missing and workers ended with \[2, 2\]"):
        workers.run(plan(), tmp_path / "t", 2, budget="10h")


def far(folder: Path, name: str = "lock") -> None:
    """A process of another host, of whose death nothing is known, has the last job."""
    job = list(Ledger(folder).jobs)[-1]
    (folder / "leases" / job).mkdir(parents=True, exist_ok=True)
    write_json(folder / "leases" / job / name, {"host": "far", "pid": 1, "utc": utc_now(), "token": "theirs"})


def test_a_job_whose_worker_died_on_another_host_is_done_before_the_last_worker_ends(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(runlock, "STALE_SECONDS", 1.0)
    values = plan(axes={"a": [1, 2]})
    workers.lay_down(values, tmp_path / "s")
    far(tmp_path / "s")
    found = workers.work(values, tmp_path / "s")
    assert (found["done"], found["running"], found["tried"], found["ended"]) == (2, 0, 2, "done")
    assert caplog.text.count("jobs that run on another host: 1; waiting for a sign that it lives") == 1


def test_a_job_of_a_living_worker_on_another_host_is_not_waited_for(tmp_path):
    values, asked = plan(axes={"a": [1, 2]}), []
    workers.lay_down(values, tmp_path / "s")
    far(tmp_path / "s")

    def beat() -> bool:
        far(tmp_path / "s", "heartbeat.json")
        asked.append(True)
        return False

    found = sweep.run(values, tmp_path / "s", should_stop=beat)
    assert (found["done"], found["running"], found["ended"]) == (1, 1, "done")
    assert len(asked) < 10, "not until its lease would be stale"


def test_a_stop_is_heard_and_a_budget_kept_while_a_job_of_another_host_is_waited_for(tmp_path):
    log = tmp_path / "log"
    values = plan(base={"log": str(log), "cost": 0.0}, axes={"a": [1, 2]})
    workers.lay_down(values, tmp_path / "s")
    far(tmp_path / "s")
    found = workers.work(values, tmp_path / "s", should_stop=lambda: len(fake_jobs.done(log)) == 1)
    assert (found["done"], found["running"], found["ended"]) == (1, 1, "stopped")
    far(tmp_path / "s")
    found = workers.work(values, tmp_path / "s", budget=0.1)
    assert (found["running"], found["tried"]) == (1, 0)


def test_a_worker_whose_budget_is_used_up_makes_no_further_pass(tmp_path, monkeypatch):
    workers.lay_down(plan(), tmp_path / "s")
    passes = []

    def one_pass(*given) -> dict:
        passes.append(given)
        time.sleep(0.02)
        return {"ended": "done", "missing": 1, "tried": 1}

    monkeypatch.setattr(sweep, "run", one_pass)
    assert workers.work(plan(), tmp_path / "s", budget=0.01)["ended"] == "budget"
    assert len(passes) == 1


def test_workers_that_end_with_1_are_believed_only_where_jobs_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", "import sys; sys.exit(1)"))
    with pytest.raises(RuntimeError, match=r"1 of 1 jobs are missing and workers ended with \[1, 1\]"):
        workers.run(plan(), tmp_path / "s", 2)
    sweep.run(plan(axes={"what": ["bug"]}), tmp_path / "t")
    more = plan(axes={"what": ["bug", "fine"]})
    with pytest.raises(RuntimeError, match=r"1 of 2 jobs are missing and workers ended with \[1\]"):
        workers.run(more, tmp_path / "t", 1)  # it failed before they began
    assert workers.run(more, tmp_path / "t", 1, budget="1h")["ended"] == "budget"


def test_a_probe_is_laid_down_once_and_says_where(tmp_path):
    first = workers.lay_down(plan(axes={"a": [1]}), tmp_path / "s")
    assert workers.lay_down(plan(axes={"a": [1, 2]}), tmp_path / "s") == first and len(first["token"]) == 12
    assert read_json(tmp_path / "s" / "workers" / "plan.json")["axes"] == {"a": [1, 2]}
    assert grid.read_plan(tmp_path / "s" / "workers" / "plan.json") == grid.read_plan(plan(axes={"a": [1, 2]}))


def test_status_names_the_hosts_of_the_workers_and_leaves_out_dead_ones(tmp_path):
    workers.lay_down(plan(), tmp_path / "s")
    now = workers.this_process()
    for pid, one in enumerate((now, now | {"host": "far"}, now | {"host": "far", "utc": "2020-01-01T00:00:00Z"})):
        write_json(tmp_path / "s" / "workers" / f"on-{pid}.json", one)
    assert [one["host"] for one in workers.present(tmp_path / "s")] == [now["host"], "far"]
    words = ["sweep", "status", str(tmp_path / "s")]
    shown = CliRunner().invoke(cli.build(words), words).stdout
    assert f"workers: 1 on {now['host']}, 1 on far" in shown


def test_a_single_row_can_be_done_alone_and_a_row_that_is_none_is_refused(tmp_path):
    values = plan(axes={"a": [5, 6, 7]})
    found = sweep.run(values, tmp_path / "s", only=2)
    assert (found["tried"], found["done"], found["missing"]) == (1, 1, 2)
    (run,) = [read_run(path) for path in (tmp_path / "s" / "runs").iterdir()]
    assert run.config["a"] == 6
    with pytest.raises(ValueError, match="only must be the number of a row, 1 to 3, got 4"):
        sweep.run(values, tmp_path / "s", only=4)
    searched = {
        "kind": "fake",
        "search": {"metric": "total", "direction": "minimize", "trials": 2, "space": {"a": {"low": 0, "high": 9}}},
    }
    with pytest.raises(ValueError, match="only names a row of a grid, got 1"):
        sweep.run(searched, tmp_path / "t", only=1)


def test_fewer_than_one_worker_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        workers.run(plan(), tmp_path / "s", 0)
