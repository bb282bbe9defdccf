"""Who is at work in a run directory? Its lock, the identity of a process, the age of a heartbeat."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import secrets
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from nbhelpers.records import read_json

STALE_SECONDS = 60.0


def utc_now() -> str:
    """Now as ISO 8601 text in UTC, to the millisecond, with a Z."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _process_state(pid: int) -> tuple[str, int] | None:
    """State letter and start (clock ticks since boot) of a process, where /proc tells."""
    try:
        numbers = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return numbers[0], int(numbers[19])
    except (OSError, IndexError, ValueError):
        return None


def this_process() -> dict[str, Any]:
    """{"host", "pid", "process_start", "utc"}: what a lock, a heartbeat and an attempt say of their process."""
    state = _process_state(os.getpid())
    return {"host": platform.node(), "pid": os.getpid(), "process_start": state[1] if state else None, "utc": utc_now()}


def _is_dead(owner: Mapping[str, Any]) -> bool:
    """True only where it is certain: same host, and the process is gone (or its number was given to another one)."""
    pid = owner.get("pid")
    if owner.get("host") != platform.node() or not isinstance(pid, int) or os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    state = _process_state(pid)
    started = owner.get("process_start")
    return state is not None and (state[0] in "ZX" or (started is not None and started != state[1]))


def _age_seconds(owner: Mapping[str, Any]) -> float:
    try:
        return time.time() - datetime.fromisoformat(owner["utc"]).timestamp()
    except (KeyError, TypeError, ValueError):
        return float("inf")


def is_alive(owner: Mapping[str, Any]) -> bool:
    """Whether the process that wrote a lock or heartbeat may still be at work: not stale, and not certainly dead."""
    return _age_seconds(owner) <= STALE_SECONDS and not _is_dead(owner)


def read_owner(path: Path) -> dict[str, Any]:
    """What a lock or heartbeat says; a torn one says only when it was written; a missing one says nothing."""
    try:
        value = read_json(path)
        return value if isinstance(value, dict) else {}
    except FileNotFoundError:
        return {}
    except ValueError:
        with contextlib.suppress(FileNotFoundError):
            return {"utc": datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat()}
        return {}


class RunLock:
    """One live process in a run directory: a file `lock`, made with O_EXCL, that says who holds it."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self.token = secrets.token_hex(8)
        self._mark: tuple[int, int] | None = None

    def acquire(self) -> dict[str, Any] | None:
        """Take the lock; returns the stale owner it was taken from, if any. A live owner is a ValueError."""
        with _one_at_a_time(self.path.parent):
            stale = None
            if self.path.exists():
                stale = self._stale_owner()
                self._put_away(stale)
            self._create()
        return stale

    def _stale_owner(self) -> dict[str, Any]:
        owner = read_owner(self.path)
        beat = read_owner(self.path.with_name("heartbeat.json"))
        same = (beat.get("host"), beat.get("pid")) == (owner.get("host"), owner.get("pid"))
        latest = min([owner, beat], key=_age_seconds) if same else owner
        if is_alive({**owner, "utc": latest.get("utc")}):
            self._refuse(owner)
        return owner

    def _put_away(self, stale: Mapping[str, Any]) -> None:
        """Take the stale lock away, whole. Where no flock reaches other hosts, one of them may have taken it since it
        was read: then what is taken away is a live lock, and goes back."""
        aside = self.path.with_name(f".{self.token}.tmp")  # as records.TEMPORARY: swept away if this process dies now
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:  # somebody else was first: _create finds out who
            return
        taken = read_owner(aside)
        if taken == stale:
            aside.unlink(missing_ok=True)
            return
        try:
            os.link(aside, self.path)
        except (FileExistsError, FileNotFoundError):  # a third one has come meanwhile
            pass
        except OSError:  # a file system without second names
            os.replace(aside, self.path)
        aside.unlink(missing_ok=True)
        self._refuse(taken)

    def _create(self) -> None:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            self._refuse(read_owner(self.path))
        with os.fdopen(handle, "w", encoding="ascii") as file:
            json.dump({**this_process(), "token": self.token}, file)
        self._mark = self._stat()

    def _refuse(self, owner: Mapping[str, Any]) -> None:
        who = f"process {owner.get('pid', 'unknown')} on host {owner.get('host', 'unknown')}"
        raise ValueError(
            f"run directory '{self.path.parent}' is in use by {who}: wait for it, stop it, or choose another folder"
        )

    def _stat(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path)
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def is_ours(self) -> bool:
        """False once another process has taken the run directory over (after a long sleep of this one)."""
        return self._stat() == self._mark or read_owner(self.path).get("token") == self.token

    def release(self) -> None:
        if self.is_ours():
            self.path.unlink(missing_ok=True)


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Two processes that find the same stale lock must not both take it; the kernel frees this one with its process."""
    try:
        import fcntl
    except ImportError:  # Windows: O_EXCL alone
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a mount without flock: O_EXCL alone
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
