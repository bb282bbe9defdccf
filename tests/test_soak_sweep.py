"""Does the soak of sweeps kill at seeded moments, and does it see a promise that was broken?"""

from __future__ import annotations

import json

import pytest
from test_benchmarks import load

from nbhelpers import retry_rules


@pytest.fixture(scope="module")
def soak_sweep():
    load("soak")
    return load("soak_sweep")


def test_every_kind_of_kill_has_twenty_seeded_moments_of_its_own(soak_sweep):
    kills = [kill for kind in soak_sweep.KINDS for kill in soak_sweep.moments(kind, soak_sweep.KILLS)]
    assert [kill.number for kill in kills] == list(range(80)) and len({kill.seconds for kill in kills}) > 60
    assert all(0 <= kill.seconds <= soak_sweep.LATEST_SECONDS for kill in kills)
    assert vars(soak_sweep.moments("a worker", 20)[3]) == vars(kills[23]), "seeded"


ROWS = [{"status": "finished", "tuned": 0.5}, {"status": "finished", "tuned": 0.75}]


@pytest.mark.parametrize(
    "change, results, why, difference",
    [
        ({}, ["a-1", "b-2"], "", 0.0),
        ({"tuned": 0.625}, ["a-1", "b-2"], "equal", 0.125),
        ({"status": "failed"}, ["a-1"], "every job finished, each once, equal", 0.0),
        ({}, ["a-1", "a-2"], "each once", 0.0),
        ({}, ["a-1", "b-1", "b-2"], "each once", 0.0),
    ],
)
def test_a_broken_promise_of_a_killed_sweep_is_seen(soak_sweep, monkeypatch, change, results, why, difference):
    monkeypatch.setattr(soak_sweep, "COLUMNS", ("tuned",))
    got = soak_sweep.compared([ROWS[0], ROWS[1] | change], ROWS, results, 2)
    assert (got["why"], got["ok"], got["difference"]) == (why, not why, difference)


def test_the_table_says_what_was_found(soak_sweep):
    sweeps = [
        {"difference": 0.0, "ok": True, "why": "", "kills": 5},
        {"difference": 0.5, "ok": False, "why": "equal", "kills": 3},
    ]
    machine = {"processor": "a", "cores": 2, "python": "3.11", "torch": "2"}
    kinds = [{"kind": "a worker", "kills": [{}] * 8, "sweeps": sweeps, "seconds": 60.0}]
    text = soak_sweep.markdown({"kinds": kinds, "jobs": 9, "seconds": 61.0, "machine": machine})
    assert text.startswith("8 SIGKILLs at seeded random moments of 2 sweeps of 9 sparsity jobs")
    assert "1 of 2 sweeps had exactly the planned results" in text
    assert text.splitlines()[-1] == "| a worker | 8 | 2 | 1, FAILED: equal | 5.0e-01 | 60 |"


def test_kinds_that_were_measured_before_stay_and_are_replaced_where_measured_again(soak_sweep, tmp_path):
    path = tmp_path / "soak_sweep.json"
    head = "Ray's head"
    worker, old, new = ({"kind": kind, "at": at} for kind, at in (("a worker", 1), (head, 1), (head, 2)))
    assert soak_sweep.with_known([new], path) == [new]
    path.write_text(json.dumps({"kinds": [old, worker]}))
    assert soak_sweep.with_known([new], path) == [worker, new]


def test_no_sweep_has_so_many_kills_that_a_job_is_rightly_given_up(soak_sweep):
    assert soak_sweep.A_SWEEP < retry_rules.KILLED
