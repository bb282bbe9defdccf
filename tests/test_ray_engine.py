"""Does Ray give the results of one process, whatever of it is killed, and leave nothing of itself behind?"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import fake_jobs
import psutil
import pytest
from fake_jobs import plan
from typer.testing import CliRunner

from nbhelpers import cli, ray_connection, ray_engine, sweep, workers
from nbhelpers.grid import Job
from nbhelpers.records import read_lines
from nbhelpers.runlock import read_owner

ROOT = Path(__file__).resolve().parent.parent
CODE = """import fake_jobs
from nbhelpers import cli, ray_engine
ray_engine.MODULES += ("fake_jobs",)
cli.main()"""
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: nbhelpers[ray]")


def job(number: int, model: str, stage: int) -> Job:
    return Job(str(number), str(number), {"model": model, "stage": stage}, {})


KIND = SimpleNamespace(shares=lambda config: config["model"], early=lambda config: config["stage"])
WAITING = [job(0, "a", 0), job(1, "a", 0), job(2, "b", 0), job(3, "a", 1), job(4, "b", 1), job(5, "c", 1)]


@pytest.mark.parametrize(
    "waiting, held, others, chosen",
    [
        ([0, 1, 2, 3], None, [], 0),  # the first of all
        ([0, 1, 2, 3], None, ["a"], 2),  # of the first stage, with a model that nobody holds
        ([0, 1, 2, 3], "b", ["a"], 2),  # of the first stage, with its own
        ([1, 4, 5], "b", ["a"], 4),  # its own model's next stage rather than a model that another one holds
        ([1, 4, 5], "b", [], 1),  # a model that nobody holds must not wait for the next stage
        ([1, 5], "b", ["a"], 1),  # nothing of its own is left: it helps
        ([4, 5], "a", ["b"], 5),  # the first stage that is left is the second one
    ],
)
def test_the_next_job_keeps_the_model_loaded_and_every_curve_growing(waiting, held, others, chosen):
    found = ray_engine.choose([WAITING[n] for n in waiting], KIND, held and repr(held), [repr(one) for one in others])
    assert found.id == str(chosen)


@pytest.mark.parametrize(
    "cores, workers, share",
    [([2], 1, 2), ([2], 2, 1), ([2], 5, 1), ([3, 5], 2, 3), ([8, 8], 3, 4), ([64], 6, 10), ([], 2, 1), ([0.5], 1, 1)],
)
def test_cores_are_shared_out_so_that_every_actor_finds_a_place(cores, workers, share):
    assert ray_engine.cpu_share(cores, workers) == share


def test_without_ray_the_error_says_how_to_get_it_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(LookupError, match=r'needs the package ray.*pip install "nbhelpers\[ray\]"'):
        ray_engine.run(plan(), tmp_path / "s", 2)
    assert not any(tmp_path.iterdir())


def test_fewer_than_one_actor_is_refused(tmp_path):
    with pytest.raises(ValueError, match="workers must be at least 1, got 0"):
        ray_engine.run(plan(), tmp_path / "s", 0)


def test_a_sweep_that_is_done_starts_no_ray(tmp_path, monkeypatch):
    sweep.run(plan(axes={"a": [1, 2]}), tmp_path / "s")
    monkeypatch.setattr(ray_engine, "installed", lambda local: None)
    found = ray_engine.run(plan(axes={"a": [1, 2]}), tmp_path / "s", 2)
    assert (found["done"], found["tried"], found["ended"]) == (2, 0, "done")


@pytest.mark.parametrize(
    "words, said",
    [
        (["--address", "auto"], "address is of the engine ray, got 'auto'"),
        (["--engine", "ray", "--only", "1"], "only is one job of this process"),
    ],
)
def test_options_that_do_not_fit_together_are_refused(words, said, tmp_path):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(plan()))
    words = ["sweep", "run", str(file), "--out", str(tmp_path / "s"), *words]
    result = CliRunner().invoke(cli.build(words), words)
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "s").exists()


@pytest.mark.parametrize("address", ["here", "ray://here", "local", "127.0.0.1:port", "a b:1"])
def test_an_address_that_is_none_is_refused_by_name(address, tmp_path):
    with pytest.raises(ValueError, match=f"address must be auto, host:port or ray://host:port, got '{address}'"):
        ray_engine.run(plan(axes={"a": [1]}), tmp_path / "s", 1, address=address)


@pytest.mark.parametrize("before", ["", "ray://"])
def test_an_address_where_nothing_listens_is_one_line_at_once(before, tmp_path):
    with socket.socket() as taken:  # bound, so that nobody else listens there, and not listening itself
        taken.bind(("127.0.0.1", 0))
        address = f"{before}127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"nothing listens at address '{address}'"):
            ray_engine.run(plan(axes={"a": [1]}), tmp_path / "s", 1, address=address)


# ------------------------------------------------------------------------------------------------ Ray itself


@pytest.fixture(scope="module")
def a_ray():
    """One Ray of two cores on loopback, which runs use because this process is connected to it."""
    before, ray_engine.MODULES = ray_engine.MODULES, ("nbhelpers.jobkinds", "fake_jobs")
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{fake_jobs.TESTS}{os.pathsep}{ROOT}"
    with ray_connection.connected(ray_connection.installed(), 2, None) as head:
        yield head
    ray_engine.MODULES = before
    os.environ.pop("PYTHONPATH") if path is None else os.environ.update(PYTHONPATH=path)


def totals(folder: Path) -> list:
    return [(row["status"], row.get("total")) for row in sweep.results(folder)]


def connections(process: psutil.Process) -> list:
    """None of a helper that is gone by now."""
    try:
        return process.net_connections("tcp")
    except psutil.NoSuchProcess:
        return []


@needs_ray
@pytest.mark.slow
def test_ray_listens_on_loopback_alone(a_ray):
    assert a_ray.startswith("127.0.0.1:")
    listening = [
        place.laddr.ip
        for process in [psutil.Process(), *psutil.Process().children(recursive=True)]
        for place in connections(process)
        if place.status == psutil.CONN_LISTEN
    ]
    assert listening and {ip.removeprefix("::ffff:") for ip in listening} == {"127.0.0.1"}


@needs_ray
@pytest.mark.slow
def test_two_actors_give_the_results_of_one_process_and_of_two_workers(a_ray, tmp_path, monkeypatch):
    axes = {"what": ["fine", "bug", "bad", "diverge", "oom above 4"], "a": [1, 2]}
    monkeypatch.setattr(workers, "COMMAND", (sys.executable, "-c", CODE))
    monkeypatch.setenv("PYTHONPATH", f"{fake_jobs.TESTS}{os.pathsep}{ROOT}")
    said = []
    found = {
        "alone": sweep.run(plan(axes=axes), tmp_path / "alone"),
        "workers": workers.run(plan(axes=axes), tmp_path / "workers", 2),
        "ray": ray_engine.run(plan(axes=axes), tmp_path / "ray", 2, progress=said.append),
    }
    keys = ("done", "failed_by_class", "missing", "running", "ended")
    assert [[one[key] for key in keys] for one in found.values()] == [[found["alone"][key] for key in keys]] * 3
    assert found["ray"]["done"] == 4 and found["ray"]["tried"] == 12, "two of the jobs twice"
    assert totals(tmp_path / "alone") == totals(tmp_path / "workers") == totals(tmp_path / "ray")
    assert fake_jobs.statuses(tmp_path / "alone") == fake_jobs.statuses(tmp_path / "ray")
    assert sum(now["stage"] == "job ended" for now in said) == 10
    assert workers.present(tmp_path / "ray") == [], "no probe is left behind"


@needs_ray
@pytest.mark.slow
def test_every_actor_loads_its_model_once(a_ray, tmp_path):
    axes = {"model": ["one", "two"], "a": list(range(6))}
    base = {"log": str(tmp_path / "log"), "loads": str(tmp_path / "loads"), "cost": 1.5}  # so long that both begin
    assert ray_engine.run(plan(base=base, axes=axes), tmp_path / "s", 2)["done"] == 12
    loads = read_lines(tmp_path / "loads")[0]
    assert sorted(line["model"] for line in loads) == ["one", "two"] and len({line["pid"] for line in loads}) == 2


@needs_ray
@pytest.mark.slow
def test_a_search_asks_its_trials_of_actors(a_ray, tmp_path):
    pytest.importorskip("optuna")
    search = {"metric": "total", "direction": "minimize", "trials": 5, "space": {"b": {"low": 0.0, "high": 1.0}}}
    found = ray_engine.run(plan(search=search), tmp_path / "s", 2)
    assert (found["planned"], found["done"], found["ended"]) == (5, 5, "done")


@needs_ray
@pytest.mark.slow
def test_a_stop_interrupts_the_jobs_at_hand_and_the_next_run_goes_on(a_ray, tmp_path):
    log = tmp_path / "log"
    values = plan(base={"log": str(log), "cost": 2.0}, axes={"a": list(range(6))})  # is stopped in the middle
    found = ray_engine.run(values, tmp_path / "s", 2, should_stop=lambda: len(fake_jobs.statuses(tmp_path / "s")) > 1)
    assert found["ended"] == "stopped" and found["running"] == 0 and found["interrupted"] >= 1
    assert not list((tmp_path / "s" / "leases").rglob("lock")), "leases were given back"
    assert ray_engine.run(values, tmp_path / "s", 2)["done"] == 6
    assert sorted(fake_jobs.done(log)) == [(a, 0.0, 0) for a in range(6)]


@needs_ray
@pytest.mark.slow
def test_another_address_is_refused_while_this_process_is_connected(a_ray, tmp_path):
    with pytest.raises(ValueError, match="is connected to Ray already, got address 'auto'"):
        ray_engine.run(plan(), tmp_path / "s", 1, address="auto")


@needs_ray
@pytest.mark.slow
def test_actors_that_cannot_import_what_they_need_end_the_sweep_with_the_reason(a_ray, tmp_path, monkeypatch):
    monkeypatch.setattr(ray_engine, "MODULES", ("no_such_module",))
    with pytest.raises(RuntimeError, match="Ray lost 4 actors that had begun no job.*No module named 'no_such_module'"):
        ray_engine.run(plan(axes={"a": [1]}), tmp_path / "s", 1)


def at_work(folder: Path) -> list[int]:
    """Processes that hold a lease now."""
    owners = [read_owner(path) for path in (folder / "leases").glob("*/lock")]
    return [owner["pid"] for owner in owners if "token" in owner and owner["pid"] != os.getpid()]


@needs_ray
@pytest.mark.slow
def test_ray_workers_killed_at_three_random_moments_are_replaced_and_every_result_is_there_once(a_ray, tmp_path):
    log, folder, generator, killed = tmp_path / "log", tmp_path / "s", random.Random(1), []
    over = threading.Event()
    values = plan(base={"log": str(log), "cost": 0.4}, axes={"a": list(range(10))})

    def kill() -> None:
        for _ in range(3):
            while not (pids := set(at_work(folder)) - set(killed)):
                if over.wait(0.02):
                    return
            time.sleep(generator.random() * 0.35)
            killed.append(sorted(pids)[0])
            with contextlib.suppress(ProcessLookupError):
                os.kill(killed[-1], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = ray_engine.run(values, folder, 2)
    finally:
        over.set()
        killer.join()
    assert len(killed) == 3
    assert (found["done"], found["missing"], found["failed"], found["ended"]) == (10, 0, 0, "done")
    assert Counter(fake_jobs.statuses(folder))["finished"] == 10 < len(fake_jobs.statuses(folder))
    assert totals(folder) == [("finished", a) for a in range(10)]


@needs_ray
@pytest.mark.slow
def test_without_its_head_the_sweep_ends_with_one_line_and_nothing_of_ray_is_left(a_ray, tmp_path):
    """The head is killed at three random moments; the last run is one on another Ray."""
    log, folder, file, generator = tmp_path / "log", tmp_path / "s", tmp_path / "plan.json", random.Random(2)
    values = plan(base={"log": str(log), "cost": 0.5}, axes={"a": list(range(30))})
    file.write_text(json.dumps(values))
    words = [sys.executable, "-c", CODE, *f"sweep run {file} --out {folder} --engine ray --workers 2".split()]
    for _ in range(3):
        before = len(fake_jobs.statuses(folder))
        driver = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        process = psutil.Process(driver.pid)
        while len(fake_jobs.statuses(folder)) == before:
            assert driver.poll() is None, driver.stderr.read()
            time.sleep(0.05)
        time.sleep(generator.random() * 2)
        below = process.children(recursive=True)
        (head,) = [child for child in below if child.is_running() and "gcs_server" in child.name()]
        head.kill()
        try:
            _, said = driver.communicate(timeout=240)
        finally:
            driver.kill()
        assert driver.returncode == 1, said
        assert "Ray's head is gone" in said and "the same command goes on" in said
        alive = [child for child in below if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
        assert alive == [], "it left processes behind"
        assert not list((folder / "leases").rglob("lock")), "leases were given back"
    assert ray_engine.run(values, folder, 2)["done"] == 30
    assert Counter(fake_jobs.statuses(folder))["finished"] == 30
    assert sorted(fake_jobs.done(log)) == [(a, 0.0, 0) for a in range(30)]


COLUMNS = ("dense", "masked", "tuned", "tuned_low", "tuned_high", "n", "mask_sha256", "measured_sparsity")
COLUMNS += ("merge_difference", "merge_violations", "merge_withheld", "all_facts_hold", "validation_nll", "status")


@needs_ray
@pytest.mark.slow
def test_the_plan_of_twelve_rows_has_equal_results_in_one_process_with_two_workers_and_on_ray(a_ray, tmp_path):
    import yaml

    values = yaml.safe_load((ROOT / "plans" / "sparsity_12.yaml").read_text(encoding="utf-8"))
    values["base"] |= {"steps": 2, "limit": 16, "batch_size": 4}
    found = {}
    for name, run in (("alone", sweep.run), ("workers", workers.run), ("ray", ray_engine.run)):
        count = () if name == "alone" else (2,)
        done = run(values, tmp_path / name, *count)
        assert (done["rows"], done["done"], done["aliases"], done["ended"]) == (12, 9, 3, "done"), name
        found[name] = [{key: row[key] for key in (*values["axes"], *COLUMNS)} for row in sweep.results(tmp_path / name)]
    assert found["alone"] == found["workers"]
    assert found["alone"] == found["ray"]
    assert len({row["mask_sha256"] for row in found["ray"]}) == 5, "dense, and four masks that both modes share"


class Forking:
    """A cluster whose server for the client dies so many times, as ray's do at times while they are forked."""

    def __init__(self, times, error):
        self.times, self.error, self.calls = times, error, []

    def init(self, address, **_options):
        self.calls.append(address)
        if self.calls.count(address) <= self.times:
            raise self.error

    def shutdown(self):
        self.calls.append("shutdown")


@pytest.mark.parametrize("said", ["Starting Ray client server failed.", "ZombieProcess: PID still exists"])
def test_a_cluster_whose_server_for_the_client_died_is_asked_again_up_to_three_times(said):
    place, died = "ray://127.0.0.1:10001", ConnectionAbortedError(f"Initialization failure from server: {said}")
    thrice = Forking(3, died)
    ray_connection._connect(thrice, 1, place)
    assert thrice.calls == [place, "shutdown"] * 3 + [place]
    always = Forking(9, died)
    with pytest.raises(ValueError, match=f"no Ray takes us in at address .* {said}"):
        ray_connection._connect(always, 1, place)
    assert always.calls.count(place) == 4


def test_another_refusal_of_a_cluster_stands_at_once():
    place = "ray://127.0.0.1:10001"
    other = Forking(1, RuntimeError("versions differ"))
    with pytest.raises(ValueError, match="versions differ"):
        ray_connection._connect(other, 1, place)
    assert other.calls == [place]
