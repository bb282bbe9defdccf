"""Does a sweep run on a Ray cluster that is there already, with a GPU for each actor, and leave it running?"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import fake_jobs
import psutil
import pytest
from fake_jobs import plan
from test_ray_engine import CODE, ROOT, needs_ray

from nbhelpers import ray_connection, sweep
from nbhelpers.records import read_lines

ENVIRON = os.environ | {"PYTHONPATH": f"{fake_jobs.TESTS}{os.pathsep}{ROOT}", "RAY_USAGE_STATS_ENABLED": "0"}
ENVIRON |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # Ray's name for "this machine is all of it": loopback alone
pytestmark = [needs_ray, pytest.mark.slow]


@dataclass(frozen=True)
class Cluster:
    """A head of two cores and, by its word, two GPUs: Ray counts what it is told and shows each actor its share."""

    folder: str
    port: int
    client_port: int

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if any(self.folder in word or word.endswith(f":{self.port}") for word in process.cmdline()):
                    found.append(process)
        return found

    def answers(self) -> bool:
        return ray_connection.answers(f"127.0.0.1:{self.port}")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture(scope="module")
def token(tmp_path_factory) -> dict[str, str]:
    """What a head and those who connect to it have in common."""
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text("ab" * 32)
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}


@pytest.fixture(scope="module")
def cluster(token) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory(prefix="ray") as scratch:  # a short path: sockets lie below it
        try:
            for left in reversed(range(3)):  # it needs half of the 30 s that it gives itself, where nothing else runs
                found = Cluster(scratch, free_port(), free_port())
                command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--include-dashboard=false"]
                command += ["--node-ip-address=127.0.0.1", f"--port={found.port}", f"--temp-dir={scratch}"]
                command += [f"--ray-client-server-port={found.client_port}", "--num-cpus=2", "--num-gpus=2"]
                command += [f"--object-store-memory={80 * 2**20}"]
                started = subprocess.run(command, env=ENVIRON | token, capture_output=True, text=True)
                if started.returncode == 0:
                    break
                end(found.processes())
                assert left, started.stderr
            yield found
        finally:
            end(found.processes())


def end(processes: list[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=20)


def run(
    folder: Path, address: str, workers: int, values: dict, token: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    file = folder.with_suffix(".json")
    file.write_text(json.dumps(values))
    words = f"sweep run {file} --out {folder} --engine ray --address {address} --workers {workers}"
    command = [sys.executable, "-c", CODE, *words.split()]
    return subprocess.run(command, env=ENVIRON | token, capture_output=True, text=True, timeout=300)


def expected(folder: Path, jobs: int) -> None:
    rows = sweep.results(folder)
    assert [(row["status"], row["total"]) for row in rows] == [("finished", float(a)) for a in range(jobs)]
    assert not list((folder / "leases").rglob("lock"))


def test_as_many_actors_work_as_find_a_gpu_each_with_its_own_and_the_cluster_runs_on(cluster, token, tmp_path):
    values = plan(base={"log": str(tmp_path / "log"), "cost": 2.0}, axes={"a": list(range(6))})
    done = run(tmp_path / "s", f"127.0.0.1:{cluster.port}", 3, values, token)
    assert done.returncode == 0, done.stderr
    expected(tmp_path / "s", 6)
    places = {(row["pid"], row["gpu"]) for row in read_lines(tmp_path / "log")[0]}
    assert sorted(gpu for _, gpu in places) == ["0", "1"]
    assert cluster.answers() and cluster.processes()


def test_a_sweep_is_driven_through_rays_client(cluster, token, tmp_path):
    done = run(tmp_path / "s", f"ray://127.0.0.1:{cluster.client_port}", 2, plan(axes={"a": list(range(4))}), token)
    assert done.returncode == 0, done.stderr
    expected(tmp_path / "s", 4)
    assert cluster.answers()


def test_a_cluster_that_asks_for_a_token_says_how_to_give_it(cluster, tmp_path):
    refused = run(tmp_path / "s", f"127.0.0.1:{cluster.port}", 1, plan(axes={"a": [1]}), {})
    assert refused.returncode == 2 and "set RAY_AUTH_MODE=token here" in refused.stderr
    assert "Traceback" not in refused.stderr and cluster.answers()
