"""A run directory has one live process, and a dead one does not hold it."""

import os
import platform
import re
import subprocess
import time

import pytest
from run_folders import age, killed_run, script, tracker

from nbhelpers.records import read_json, read_lines, write_json
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


def test_a_process_that_slept_through_a_takeover_writes_nothing_more(tmp_path):
    run = tracker(tmp_path).start()
    (tmp_path / "lock").unlink()
    write_json(tmp_path / "lock", {"host": "elsewhere", "pid": 1, "token": "theirs"})
    with pytest.raises(RuntimeError, match="was taken over by another process"), run:
        run.log_metrics(train_loss=1.0)
    assert read_lines(tmp_path / "metrics.jsonl") == ([], 0)
    assert read_json(tmp_path / "lock")["token"] == "theirs", "the lock of the other one stays"
