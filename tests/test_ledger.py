"""Does a lease belong to one process at a time, and is it free again after a death?"""

from __future__ import annotations

import pytest
from fake_jobs import plan
from run_folders import age

from nbhelpers import ledger as ledgers
from nbhelpers import sweep
from nbhelpers.grid import expand, read_plan
from nbhelpers.ledger import Ledger
from nbhelpers.records import write_json
from nbhelpers.runlock import utc_now


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger.create(tmp_path / "s", expand(read_plan(plan(axes={"a": [1, 2]}))))


def test_a_folder_in_which_another_process_writes_the_plan_just_now_is_taken_for_a_sweep(tmp_path):
    (tmp_path / ".8cf0a29c1a4f.tmp").write_text('{"format": 1, "pl')  # as write_atomic leaves it when it is killed
    assert Ledger.create(tmp_path, expand(read_plan(plan(axes={"a": [1, 2]})))).jobs
    (tmp_path / "plan.json").unlink()
    (tmp_path / ".thesis").write_text("")
    with pytest.raises(ValueError, match="holds '.thesis' but no plan.json"):
        Ledger.create(tmp_path, expand(read_plan(plan(axes={"a": [1, 2]}))))


def test_a_lease_is_given_to_one_at_a_time_and_to_the_next_after_it(ledger):
    job, other = ledger.jobs
    with ledger.lease(job) as first, ledger.lease(job) as second, ledger.lease(other) as third:
        assert (first, second, third) == (True, False, True)
        assert ledger.state(job).status == "running" and ledger.state(job, leased=False).to_do
    assert ledger.state(job).status == "planned"
    with ledger.lease(job) as again:
        assert again


def test_a_lease_that_was_taken_since_we_looked_is_left_alone(ledger):
    _, second = [job["job"] for job in sweep.preview(ledger.plan)["order"]]
    held = ledger.lease(second)

    def hold(now: dict) -> None:
        if now["stage"] == "job started":
            assert held.__enter__()

    found = sweep.run(ledger.plan, ledger.folder, progress=hold)
    held.__exit__(None, None, None)
    assert (found["tried"], found["done"], found["running"]) == (1, 1, 1)


def test_a_lease_lives_by_its_heartbeat_and_is_stale_without_one(ledger, monkeypatch):
    monkeypatch.setattr(ledgers, "BEAT_SECONDS", 0.02)
    job = next(iter(ledger.jobs))
    folder = ledger.folder / "leases" / job
    with ledger.lease(job):
        while not (folder / "heartbeat.json").exists():
            pass
        age(folder / "lock", 300)
        assert ledger.state(job).status == "running"
    assert not list(folder.iterdir())
    (folder / "lock").write_text('{"host": "elsewhere", "pid": 1, "utc": "2020-01-01T00:00:00Z"}')
    assert ledger.state(job).status == "planned"
    with ledger.lease(job) as ours:
        assert ours


def test_a_lease_that_was_taken_over_while_its_process_slept_stays_whole_with_the_other_one(ledger):
    job, other = ledger.jobs
    folder = ledger.folder / "leases" / job
    with ledger.lease(job):
        assert ledger.holds(job) and not ledger.holds(other)
        for name in ("lock", "heartbeat.json"):
            write_json(folder / name, {"host": "elsewhere", "pid": 1, "utc": utc_now(), "token": "theirs"})
        assert not ledger.holds(job)
    assert {path.name for path in folder.iterdir()} == {"lock", "heartbeat.json"}
    assert ledger.state(job).status == "running"
