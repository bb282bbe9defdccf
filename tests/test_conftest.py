"""Do the tests keep to themselves: no network, no hub, real data only where it is lent?"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

INNER = """
import pytest

def test_on_data(data_dir):
    assert data_dir.is_dir()

@pytest.mark.gpu
def test_on_gpu():
    pass
"""


def run_inner(tmp_path: Path, **environ: str) -> str:
    """pytest's short report of two tests under our conftest, in a process of its own."""
    (tmp_path / "conftest.py").write_text((Path(__file__).parent / "conftest.py").read_text())
    (tmp_path / "test_inner.py").write_text(INNER)
    # a stand-in that is found first: importing the real one three times would cost more than all other lines here
    (tmp_path / "torch.py").write_text("class cuda:\n    is_available = staticmethod(lambda: False)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  data\n  gpu\n")
    clean = {k: v for k, v in os.environ.items() if not k.startswith("NBHELPERS_")}
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=clean | environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    return done.stdout


def test_a_loopback_connection_is_allowed(loopback_server):
    with socket.create_connection(loopback_server, timeout=5) as client:
        assert client.getpeername() == loopback_server


def test_a_local_name_is_looked_up():
    assert socket.getaddrinfo("localhost", 80)


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="this system has no unix sockets")
def test_a_unix_socket_is_allowed():
    left, right = socket.socketpair()
    with left, right:
        left.sendall(b"x")
        assert right.recv(1) == b"x"


@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("8.8.8.8", 53), ("::ffff:192.0.2.1", 80)])
@pytest.mark.parametrize("verb", ["connect", "connect_ex"])
def test_a_connection_beyond_this_machine_is_blocked(address, verb):
    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as client, pytest.raises(RuntimeError, match="only reach loopback"):
        getattr(client, verb)(address)


def test_a_datagram_beyond_this_machine_is_blocked():
    with socket.socket(type=socket.SOCK_DGRAM) as client, pytest.raises(RuntimeError, match="only reach loopback"):
        client.sendto(b"x", ("192.0.2.1", 53))


def test_a_name_beyond_this_machine_is_not_looked_up():
    with pytest.raises(RuntimeError, match="only look up loopback names, got 'example.invalid'"):
        socket.getaddrinfo("example.invalid", 443)


def test_the_hub_is_switched_off_before_a_library_reads_it():
    from huggingface_hub import constants

    assert constants.HF_HUB_OFFLINE is True
    assert constants.HF_HOME.startswith(os.environ["HF_HOME"])


def test_without_real_data_a_data_test_skips_and_says_so(tmp_path):
    report = run_inner(tmp_path)
    assert "2 skipped" in report
    assert "NBHELPERS_TEST_DATA is not set: no real data to test on" in report
    assert "needs a CUDA device, and torch finds none here" in report


def test_where_data_is_required_its_absence_is_a_failure(tmp_path):
    absent = str(tmp_path / "absent")
    report = run_inner(tmp_path, NBHELPERS_REQUIRE_DATA="1", NBHELPERS_TEST_DATA=absent)
    assert "1 skipped" in report and "1 error" in report
    assert f"NBHELPERS_TEST_DATA is no folder: {absent}" in report


def test_where_data_is_lent_a_data_test_runs(tmp_path):
    report = run_inner(tmp_path, NBHELPERS_TEST_DATA=str(tmp_path))
    assert "1 passed, 1 skipped" in report
