"""Does the pace of pilots come out as a pencil says, for each job, and leave nothing behind?"""

from __future__ import annotations

import tempfile

import pytest

from nbhelpers import sweep, sweep_pace
from nbhelpers.tracking import Interrupted

PLAN = {
    "kind": "sparsity",
    "base": {"model": "tiny-llama", "task": "hellaswag", "steps": 60},
    "axes": {"sparsity": [0, 0.5], "mode": ["sparse_to_dense", "sparse_to_sparse"]},
    "aliases": [{"when": {"sparsity": 0}, "ignore": ["mode"]}],
}


def test_a_step_and_a_document_are_the_difference_of_two_pilots():
    # 0.5 s and 0.1 s a step to begin with; documents are answered three times at 0.02 s
    short = {"loading": 9.0, "training": 0.5 + 0.4, "evaluating": 0.24, "masking": 0.3, "total": 9 + 0.9 + 0.24 + 0.4}
    long = {"loading": 1.0, "training": 0.5 + 0.8, "evaluating": 0.48, "masking": 0.3, "total": 1 + 1.3 + 0.48 + 0.4}
    pace = sweep_pace._fitted((4, 4, short), (8, 8, long), evaluations=3)
    assert (pace.step, pace.document, pace.rest) == pytest.approx((0.1, 0.02, 0.4 + 0.5))
    config = {"task": "boolq", "data": "bundled", "limit": 50, "steps": 100, "tuning": "lora"}
    assert pace.seconds(config, evaluations=2) == pytest.approx(0.9 + 10 + 50 * 2 * 0.02)
    assert pace.seconds(config | {"tuning": "none"}, evaluations=2) == pytest.approx(0.9 + 2)
    hub = config | {"data": None, "limit": None}
    assert pace.seconds(hub, evaluations=2) == pytest.approx(0.9 + 10 + 3_270 * 2 * 0.02), "by the data set's card"
    assert pace.seconds(hub | {"task": "perplexity"}, evaluations=2) is None


def test_noise_makes_no_time_that_is_below_none():
    fast = {"training": 1.0, "evaluating": 1.0, "total": 2.0}
    pace = sweep_pace._fitted((4, 4, {"training": 2.0, "evaluating": 2.0, "total": 4.0}), (8, 8, fast), evaluations=3)
    assert (pace.step, pace.document) == (0, 0) and pace.rest == pytest.approx(1.0)


def test_every_job_of_a_plan_gets_seconds_and_the_preview_takes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    told = []
    measured = sweep_pace.measure(PLAN, seconds_a_model=0.01, progress=told.append)
    found = sweep.preview(PLAN, measured)
    assert list(measured) == [job["job"] for job in found["order"]] and len(measured) == 3
    assert all(0 < seconds < 600 for seconds in measured.values())
    assert found["estimated_hours"] == pytest.approx(sum(measured.values()) / 3600)
    assert found["hours_by_workers"]["1"] == pytest.approx(found["estimated_hours"]) and found["calibrated"]
    assert told == [{"stage": "calibrating", "model": "tiny-llama", "task": "hellaswag"}]
    assert list(tmp_path.iterdir()) == []


def test_a_stop_ends_the_pilots_at_once():
    with pytest.raises(Interrupted):
        sweep_pace.measure(PLAN, should_stop=lambda: True)


def test_plans_without_such_jobs_are_refused_by_name():
    with pytest.raises(ValueError, match="calibrate is for a grid of 'sparsity' jobs, got 'pruning'"):
        sweep_pace.measure({"kind": "pruning", "base": {"model": "tiny-gpt2"}, "axes": {"seed": [1]}})


@pytest.mark.parametrize(
    "name, values", [("window", [32, 64]), ("gradient_checkpointing", [False, True]), ("device", [None, "cpu"])]
)
def test_what_makes_a_step_cost_more_has_a_pilot_of_its_own(name, values, monkeypatch):
    asked = []

    def pilot(expansion, config, seconds, should_stop):
        asked.append((config[name], seconds))
        return sweep_pace.Pace(1.0, 0.0, 0.0)

    monkeypatch.setattr(sweep_pace, "pilot", pilot)
    measured = sweep_pace.measure(PLAN | {"axes": {name: values, "seed": [0, 1]}, "aliases": []})
    assert sorted(asked, key=str) == sorted([(value, 30.0) for value in values], key=str) and len(measured) == 4
