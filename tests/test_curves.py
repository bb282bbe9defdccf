"""Is a training read from its record the one that was heard, and is what happened in it said in words?"""

from __future__ import annotations

import pytest

from nbhelpers import curves
from nbhelpers.tracking import ExperimentTracker

OOM = {"kind": "oom", "where": "training", "from_micro_batch_size": 8, "to_micro_batch_size": 4}


@pytest.fixture
def run(tmp_path):
    """A record of six steps in two attempts' worth of rows, with a fault of each kind."""
    with ExperimentTracker({"name": "r", "kind": "fine_tuning", "steps": 6}, run_dir=tmp_path / "run") as tracker:
        tracker.log_metrics(iteration=0, stage="fine_tuned", val_loss=3.0)
        tracker.event("sample", stage="fine_tuned", step=0, text="before")
        for step in range(1, 7):
            if step == 4:
                tracker.event(stage="fine_tuned", **OOM)
            tracker.log_metrics(iteration=step, stage="fine_tuned", train_loss=1 / step, resident_bytes=step)
        tracker.event("sample", stage="fine_tuned", step=6, text="after")
        tracker.log_metrics(iteration=1, stage="control", train_loss=9.0)
    return tmp_path / "run"


def test_the_record_gives_curves_samples_and_events_by_training(run):
    found = curves.read(run)
    assert set(found) == {"fine_tuned", "control"}
    assert found["fine_tuned"]["train_losses"] == [(step, 1 / step) for step in range(1, 7)]
    assert found["fine_tuned"]["validation_nlls"] == [(0, 3.0)] and found["fine_tuned"]["steps"] == 6
    assert found["fine_tuned"]["samples"] == [(0, "before"), (6, "after")]
    assert [(event["kind"], event["step"]) for event in found["fine_tuned"]["events"]] == [("oom", 4)]
    assert found["control"]["events"] == []


def test_a_run_to_go_on_with_is_read_up_to_its_checkpoint(run):
    found = curves.read(run, until={"fine_tuned": 3})
    assert [step for step, _ in found["fine_tuned"]["train_losses"]] == [1, 2, 3]
    assert found["fine_tuned"]["samples"] == [(0, "before")] and found["fine_tuned"]["events"] == []
    assert "control" not in found and curves.read(run, until={}) == {}


def test_reports_are_added_and_a_skipped_step_leaves_a_gap():
    curve = curves.empty(9)
    curves.hear(curve, {"step": 1, "steps": 9, "train_loss": 2.0, "validation_nll": None, "sample": "before"})
    curves.hear(curve, {"step": 2, "train_loss": None, "events": [{"kind": "non_finite"}]})
    curves.hear(curve, {"step": 3, "train_loss": 1.0, "validation_nll": 1.5, "sample": "now", "cuda_bytes": 7})
    assert curve["train_losses"] == [(1, 2.0), (3, 1.0)] and curve["validation_nlls"] == [(3, 1.5)]
    assert curve["samples"] == [(0, "before"), (3, "now")] and curve["cuda_bytes"] == [(3, 7)]
    assert curve["events"] == [{"step": 2, "kind": "non_finite"}]


def test_a_copy_does_not_grow_with_the_run():
    curve = curves.empty(2)
    copied = curves.copied(curve)
    curves.hear(curve, {"step": 1, "train_loss": 1.0})
    assert copied["train_losses"] == []


@pytest.mark.parametrize(
    "event, words",
    [
        (OOM, "memory ran out, so batches are cut smaller (8 to 4 windows a pass); the effective batch stays the same"),
        ({"kind": "oom", "where": "validation", "from_batch_size": 2, "to_batch_size": 1}, "while validating"),
        ({"kind": "non_finite"}, "so the step was left out"),
        ({"kind": "non_finite", "where": "validation"}, "this validation does not count"),
        ({"kind": "restored", "from_step": 1}, "the state of step 1 was restored and the learning rate halved"),
        ({"kind": "overflow"}, "the loss scale lowered"),
        ({"kind": "early_stop", "best_step": 2}, "the best validation was at step 2"),
        ({"kind": "best_restored", "best_step": 2}, "the weights of step 2 were kept"),
        ({"kind": "resume"}, "went on from the checkpoint of step 5"),
        ({"kind": "packing_off", "reason": "dropout"}, "not packed: dropout"),
        ({"kind": "stopped"}, "stopped after step 5"),
    ],
)
def test_what_happened_is_said_with_what_was_done_about_it(event, words):
    assert words in curves.in_words({"step": 5, **event})


def test_ordinary_events_are_not_told_and_equal_ones_once():
    events = [{"kind": "checkpoint", "step": 1}, {"step": 2, **OOM}, {"step": 2, **OOM}]
    assert len(curves.told({"events": events})) == 1


def test_steps_in_a_row_that_are_not_finite_are_one_mark():
    events = [{"kind": "non_finite", "step": step} for step in (3, 4, 5, 9)] + [{"kind": "restored", "step": 5}]
    assert curves.marks({"events": events}) == [
        (3, "non_finite", "not finite (3 steps)"),
        (5, "restored", "restored"),
        (9, "non_finite", "not finite"),
    ]


def test_a_long_beginning_is_said_once_and_no_word_is_cut():
    prompt = "word " * 50
    shared, rest = curves.beginning([f"{prompt}red end", f"{prompt}rest", f"{prompt}red"])
    assert shared == prompt.rstrip() and rest == ["red end", "rest", "red"]


@pytest.mark.parametrize("samples", [[], ["one"], ["same text", "same text"], ["short a", "short b"]])
def test_texts_that_share_little_stay_whole(samples):
    assert curves.beginning(samples) == ("", samples)
