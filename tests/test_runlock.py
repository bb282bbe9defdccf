"""A run directory has one live process, and a dead one does not hold it."""

import contextlib
import os
import platform
import re
import subprocess
import time

import pytest
from run_folders import age, killed_run, script, tracker

from nbhelpers import runlock
from nbhelpers.records import read_json, read_lines, write_json
from nbhelpers.runlock import RunLock
from nbhelpers.runs import read_run


def test_a_second_live_process_is_refused_by_pid_and_host(tmp_path):
    process = script(
        "t = tracker(sys.argv[1]).start(); print('up', flush=True); sys.stdin.read(); t.finish()",
        tmp_path,
        stdin=subprocess.PIPE,
    )
    assert process.stdout.readline() == "up\n"
    assert read_run(tmp_path).status == "running"
    text = rf"is in use by process {process.pid} on host {re.escape(platform.node())}: wait for it"
    with pytest.raises(ValueError, match=text):
        tracker(tmp_path, resume=True).start()
    process.communicate("")
    assert process.returncode == 0 and read_run(tmp_path).status == "finished"


def test_a_lock_of_another_host_is_stale_only_when_its_heartbeat_is(tmp_path):
    killed_run(tmp_path)
    for file in ("lock", "heartbeat.json"):
        age(tmp_path / file, 50, host="elsewhere")
    assert read_run(tmp_path).status == "running"
    with pytest.raises(ValueError, match="on host elsewhere"):
        tracker(tmp_path, resume=True).start()
    age(tmp_path / "lock", 500)  # the lock is old, its heartbeat is not
    with pytest.raises(ValueError, match="on host elsewhere"):
        tracker(tmp_path, resume=True).start()
    age(tmp_path / "heartbeat.json", 70)
    assert read_run(tmp_path).status == "interrupted"
    with tracker(tmp_path, resume=True):
        pass
    (event,) = [event for event in read_run(tmp_path).events if event["kind"] == "lock_taken_over"]
    assert event["from_host"] == "elsewhere"


def test_a_process_number_given_to_somebody_else_does_not_hold_the_lock(tmp_path):
    killed_run(tmp_path)
    for file in ("lock", "heartbeat.json"):
        age(tmp_path / file, 0, pid=os.getpid(), process_start=1)
    with tracker(tmp_path, resume=True) as run:
        assert run.attempt == 2


def test_a_torn_lock_is_live_while_it_is_fresh(tmp_path):
    (tmp_path / "lock").write_text('{"ho')
    with pytest.raises(ValueError, match="in use by process unknown"):
        tracker(tmp_path, resume=True).start()
    os.utime(tmp_path / "lock", (time.time() - 100,) * 2)
    tracker(tmp_path, resume=True).start().finish()


def test_of_many_processes_that_find_one_stale_lock_exactly_one_takes_it(tmp_path):
    killed_run(tmp_path)
    code = (
        "look = RunLock._stale_owner\n"
        "def slowly(self): owner = look(self); time.sleep(0.2); return owner\n"
        "RunLock._stale_owner = slowly\n"
        "try: t = tracker(sys.argv[1], resume=True).start(); print('won', flush=True); sys.stdin.read(); t.finish()\n"
        "except ValueError as error: print('lost', error, flush=True)"
    )
    racers = [script(code, tmp_path, stdin=subprocess.PIPE) for _ in range(6)]
    said = [racer.stdout.readline().split()[0] for racer in racers]
    for racer in racers:
        racer.communicate("")
    assert sorted(said) == ["lost"] * 5 + ["won"]


DEAD = {"host": "elsewhere", "pid": 1, "utc": "2020-01-01T00:00:00Z", "token": "dead"}


def no_link(*_):
    raise PermissionError("no second names here")


@pytest.mark.parametrize("link", [os.link, no_link])
def test_where_no_flock_reaches_other_hosts_one_that_took_the_lock_since_it_was_read_keeps_it(
    link, tmp_path, monkeypatch
):
    write_json(tmp_path / "lock", DEAD)
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    look = RunLock._stale_owner

    def overtaken(self):
        owner = look(self)
        if self is second:
            assert first.acquire() == DEAD
        return owner

    monkeypatch.setattr(runlock, "_one_at_a_time", lambda folder: contextlib.nullcontext())
    monkeypatch.setattr(RunLock, "_stale_owner", overtaken)
    monkeypatch.setattr(os, "link", link)
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on host"):
        second.acquire()
    assert first.is_ours() and not second.is_ours()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_stale_lock_that_is_gone_since_it_was_read_is_no_obstacle(tmp_path, monkeypatch):
    write_json(tmp_path / "lock", DEAD)
    look = RunLock._stale_owner

    def released(self):
        owner = look(self)
        self.path.unlink()
        return owner

    monkeypatch.setattr(RunLock, "_stale_owner", released)
    lock = RunLock(tmp_path)
    lock.acquire()
    assert lock.is_ours()


def test_a_process_that_dies_while_it_takes_a_stale_lock_away_leaves_a_folder_that_can_be_taken(tmp_path, monkeypatch):
    killed_run(tmp_path)

    def dies(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runlock, "read_owner", lambda path: dies(path) if path.suffix == ".tmp" else read_json(path))
        with pytest.raises(KeyboardInterrupt):
            RunLock(tmp_path).acquire()
    assert not (tmp_path / "lock").exists()
    with tracker(tmp_path, resume=True) as run:
        assert run.attempt == 2
    assert not list(tmp_path.glob(".*.tmp"))


def test_a_process_that_slept_through_a_takeover_writes_nothing_more(tmp_path):
    run = tracker(tmp_path).start()
    (tmp_path / "lock").unlink()
    write_json(tmp_path / "lock", {"host": "elsewhere", "pid": 1, "token": "theirs"})
    with pytest.raises(RuntimeError, match="was taken over by another process"), run:
        run.log_metrics(train_loss=1.0)
    assert read_lines(tmp_path / "metrics.jsonl") == ([], 0)
    assert read_json(tmp_path / "lock")["token"] == "theirs", "the lock of the other one stays"
