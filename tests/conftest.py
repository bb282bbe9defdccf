"""What every test may count on: no network, no hub, no user caches, few threads, and real data where it is lent."""

from __future__ import annotations

import ipaddress
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# before any library is imported: they read these once
_caches = tempfile.mkdtemp(prefix="nbhelpers-test-caches-")
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", MPLBACKEND="Agg", HF_HOME=_caches)
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads make a busy machine many times slower

_UNGUARDED = {name: getattr(socket.socket, name) for name in ("connect", "connect_ex", "sendto")}
_UNGUARDED_LOOKUP = socket.getaddrinfo
_LOCAL_NAMES = ("", "localhost", "localhost.localdomain", "ip6-localhost")


class NetworkBlocked(RuntimeError):
    """A test reached for something beyond this machine. Not an OSError, so that no retry or fallback swallows it."""


def _is_loopback(host: object) -> bool:
    if host is None or host in _LOCAL_NAMES:
        return True
    name = host.decode() if isinstance(host, bytes) else str(host)
    try:
        return ipaddress.ip_address(name.split("%")[0]).is_loopback
    except ValueError:
        return name in _LOCAL_NAMES or name == socket.gethostname()


def _guarded(name: str) -> Callable:
    original = _UNGUARDED[name]

    def guard(self: socket.socket, *args):
        internet = self.family in (socket.AF_INET, socket.AF_INET6)
        if internet and not _is_loopback(args[-1][0]):
            raise NetworkBlocked(f"tests may only reach loopback addresses, got {args[-1]!r}")
        return original(self, *args)

    return guard


def _guarded_lookup(host, *args, **kwargs):
    if not _is_loopback(host):
        raise NetworkBlocked(f"tests may only look up loopback names, got {host!r}")
    return _UNGUARDED_LOOKUP(host, *args, **kwargs)


def pytest_configure(config: pytest.Config) -> None:
    """Close the network before the first test file is imported."""
    for name in _UNGUARDED:
        setattr(socket.socket, name, _guarded(name))
    socket.getaddrinfo = _guarded_lookup


def pytest_unconfigure(config: pytest.Config) -> None:
    for name, original in _UNGUARDED.items():
        setattr(socket.socket, name, original)
    socket.getaddrinfo = _UNGUARDED_LOOKUP
    shutil.rmtree(_caches, ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A test that takes `data_dir` is a data test; one with a browser or on Ray has two tries, told as a rerun."""
    for item in items:
        on_ray = item.path.name.startswith("test_ray") and item.get_closest_marker("slow")
        in_browser = item.path.name.startswith("test_browser") or "browser" in getattr(item, "fixturenames", ())
        if on_ray or in_browser:
            item.add_marker(pytest.mark.flaky(reruns=1))
        if "data_dir" in getattr(item, "fixturenames", ()):
            item.add_marker("data")


def missing_data(environ: dict[str, str]) -> str | None:
    """Why there is no real data, in one line; None where the folder is there."""
    folder = environ.get("NBHELPERS_TEST_DATA")
    if not folder:
        return "NBHELPERS_TEST_DATA is not set: no real data to test on"
    return None if Path(folder).is_dir() else f"NBHELPERS_TEST_DATA is no folder: {folder}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("data") and (reason := missing_data(dict(os.environ))):
        if os.environ.get("NBHELPERS_REQUIRE_DATA") == "1":
            pytest.fail(f"{reason} (NBHELPERS_REQUIRE_DATA=1 makes this a failure)", pytrace=False)
        pytest.skip(reason)
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device, and torch finds none here")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real public data and models; a test that asks for it skips or fails where there is none."""
    return Path(os.environ["NBHELPERS_TEST_DATA"]).resolve()


@pytest.fixture(scope="session")
def project_dir() -> Path:
    """The root of the checkout that is being tested."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture
def loopback_server() -> Iterator[tuple[str, int]]:
    """A listening socket on 127.0.0.1, for tests of what may still connect."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()
