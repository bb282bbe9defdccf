"""How is Ray reached? Imported quietly, a cluster joined and left running, or one of our own, gone afterwards."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from typing import Any

STARTS = 3  # of Ray itself: it gives up after a time that cannot be set, which a busy machine needs for its helpers
CLIENT_STARTS = 4  # of a cluster's server for this client: one in fourteen dies as it is forked (ray issue 63202)
OBJECT_STORE_BYTES = 80 * 2**20  # nothing large goes through it; Ray takes no less than 75 MiB
QUIET = {"log_to_driver": False, "logging_level": "error"}
log = logging.getLogger(__name__)


def installed(local: bool = True) -> Any:
    """The ray module, silent about its use and on loopback; LookupError that says how to get it where it is missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if local:  # Ray's name for "no cluster": it and its servers then keep to 127.0.0.1
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        return importlib.import_module("ray")
    except ImportError:
        raise LookupError(
            'engine ray needs the package ray, which is not installed: pip install "nbhelpers[ray]", or use the engine '
            "local with several workers"
        ) from None


@contextlib.contextmanager
def connected(ray: Any, count: int, address: str | None) -> Iterator[str | None]:
    """Ray, and the address of its head where that can be watched; one of our own is gone afterwards with all of its."""
    if ray.is_initialized():
        if address is not None:
            raise ValueError(
                f"this process is connected to Ray already, got address {address!r}: leave it out to use that one, or "
                "call ray.shutdown() first"
            )
        yield _head(ray)
        return
    try:
        _connect(ray, count, address)
        yield _head(ray)
    finally:
        started = [] if address is not None else _below()
        ray.shutdown()
        _end(started)


def _connect(ray: Any, count: int, address: str | None) -> None:
    if address is None:
        _start(ray, count)
    else:
        _join(ray, address)


def _join(ray: Any, address: str) -> None:
    for left in reversed(range(CLIENT_STARTS)):
        try:
            ray.init(address=address, **QUIET)
            return
        except (ConnectionError, ValueError, RuntimeError) as error:
            said = " ".join(str(error).split())
            if not left or not isinstance(error, ConnectionAbortedError):
                raise ValueError(f"no Ray takes us in at address {address!r}: {said}{_advice()}") from error
            log.warning("the cluster's server for Ray's client did not start: once more")
            ray.shutdown()


def _start(ray: Any, count: int) -> None:
    cores = max(count, os.cpu_count() or 1)
    own = {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": cores}
    for left in reversed(range(STARTS)):
        try:
            ray.init(address="local", object_store_memory=OBJECT_STORE_BYTES, **own, **QUIET)
            return
        except Exception as error:  # Ray has no other type for a part of it that took longer than its 15 s
            started = _below()
            ray.shutdown()
            _end(started)
            if not left:
                raise RuntimeError(f"Ray did not start on this machine, {STARTS} times: {error}") from error
            log.warning("Ray did not start in time (%s): once more", error)


def look_up(address: str) -> None:
    """ValueError at once where nothing listens there: Ray itself would try for half a minute."""
    if address == "auto":
        return
    place = address.removeprefix("ray://")
    if not re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:/\s]+):\d{1,5}", place):
        raise ValueError(f"address must be auto, host:port or ray://host:port, got {address!r}")
    if not answers(place):
        raise ValueError(f"nothing listens at address {address!r}: is the cluster up, and is that port open to here?")


def _advice() -> str:
    """A head that was started where a token lies asks for it; Ray sends one to a named address only if told to."""
    if os.environ.get("RAY_AUTH_MODE") is not None:
        return ""
    return "; if that cluster asks for a token (see `ray get-auth-token`), set RAY_AUTH_MODE=token here"


def _head(ray: Any) -> str | None:
    """host:port of the head; None through Ray's client (ray://), which notices by itself."""
    return None if ray.util.client.ray.is_connected() else ray.get_runtime_context().gcs_address


def answers(head: str) -> bool:
    host, _, port = head.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError):  # a port of five digits may be none
        return False
    return True


# in the command lines of its processes: of the package's own folders, as a home or an image may be called ray too
OF_RAY = tuple(f"{os.sep}ray{os.sep}{part}{os.sep}" for part in ("_private", "core", "dashboard", "autoscaler"))


def _below() -> list[Any]:
    """Processes below this one that are Ray's."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if any(word.startswith("ray::") or any(part in word for part in OF_RAY) for word in words):
                found.append(process)
    return found


def _end(processes: list[Any]) -> None:
    """None of them outlives the sweep, also where the head that would have ended them is gone."""
    import psutil

    _, alive = psutil.wait_procs(processes, timeout=5)
    for process in alive:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(alive, timeout=5)
