"""Are all runs under a folder found and read as they are, whatever else lies there and whoever still writes?"""

from __future__ import annotations

import json
import math

import pytest
from many_runs import a_run
from run_folders import age, killed_run, tracker

from nbhelpers import collection
from nbhelpers.collection import Collection, flat, read_log
from nbhelpers.records import append_line, read_json, write_json

LOG = {
    "config": {"name": "logged", "learning_rate": 0.1},
    "start_time": "2026-01-02T03:04:05",
    "end_time": "2026-01-02T03:05:05",
    "duration_seconds": 60.0,
    "metrics_history": [
        {"iteration": 0, "gradient_step": 0, "wallclock_time": 1.0, "train_loss": 3.0, "val_loss": None, "metrics": {}},
        {"iteration": 5, "gradient_step": 5, "wallclock_time": 2.0, "train_loss": 2.0, "metrics": {"acc": 0.0}},
    ],
    "notes": "mine",
    "best_train_loss": 2.0,
    "best_val_loss": None,
    "final_train_loss": 2.0,
    "final_val_loss": None,
}


def test_runs_are_found_at_any_depth_and_beside_other_files(tmp_path):
    a_run(tmp_path / "a")
    a_run(tmp_path / "x" / "y" / "b")
    a_run(tmp_path / "sweep" / "runs" / "c")
    a_run(tmp_path / ".hidden" / "d")
    (tmp_path / "readme.txt").write_text("x")
    found = Collection(tmp_path)
    assert [run.folder.name for run in found.refresh()] == ["a", "b", "c"]
    assert found.problems == []


def test_a_run_directory_itself_and_overlapping_folders_give_each_run_once(tmp_path):
    a_run(tmp_path / "a")
    assert len(Collection([tmp_path, tmp_path / "a", tmp_path / "x" / ".." / "a"][:2]).refresh()) == 1


def test_a_copied_run_is_read_once_and_named(tmp_path):
    import shutil

    a_run(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    found = Collection(tmp_path)
    assert len(found.refresh()) == 1
    assert "are copies of run" in found.problems[0]


def test_a_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist: name a folder with runs"):
        Collection(tmp_path / "nothing")
    with pytest.raises(ValueError, match="at least one folder"):
        Collection([])


def test_what_cannot_be_read_is_one_line_each_and_the_rest_goes_on(tmp_path):
    a_run(tmp_path / "good")
    for name in ("newer", "broken", "missing"):
        a_run(tmp_path / name, losses=[1.0])
    write_json(tmp_path / "newer" / "manifest.json", {**read_json(tmp_path / "newer" / "manifest.json"), "format": 9})
    (tmp_path / "broken" / "manifest.json").write_text('{"form')
    (tmp_path / "missing" / "manifest.json").unlink()
    (tmp_path / "experiment_x.json").write_text("[]")
    found = Collection(tmp_path)
    assert [run.folder.name for run in found.refresh()] == ["good"]
    assert len(found.problems) == 4 and all("\n" not in line for line in found.problems)
    for text in ("format 9", "not valid JSON", "no manifest.json", "not an experiment log"):
        assert any(text in line for line in found.problems)


def test_only_what_changed_is_read_again(tmp_path, monkeypatch):
    for name in "ab":
        a_run(tmp_path / name, losses=[1.0])
    found, read = Collection(tmp_path), []
    found.refresh()
    true_reader = collection.read_run
    monkeypatch.setattr(collection, "read_run", lambda folder: read.append(folder.name) or true_reader(folder))
    found.refresh()
    assert read == []
    append_line(tmp_path / "b" / "metrics.jsonl", {"attempt": 1, "iteration": 1, "train_loss": 0.5})
    runs = found.refresh()
    assert read == ["b"]
    assert {run.folder.name: run.numbers["train_loss"] for run in runs} == {"a": 1.0, "b": 0.5}


def test_a_run_is_read_while_it_is_being_written_and_seen_to_end(tmp_path):
    found = Collection(tmp_path)
    with tracker(tmp_path / "a") as run:
        run.log_metrics(train_loss=2.0)
        (now,) = found.refresh()
        assert (now.status, now.numbers["train_loss"]) == ("running", 2.0)
        run.log_metrics(train_loss=1.0)
        (now,) = found.refresh()
        assert now.numbers["train_loss"] == 1.0
    (now,) = found.refresh()
    assert now.status == "finished"


def test_a_killed_run_is_seen_to_be_interrupted_although_none_of_its_files_changed(tmp_path):
    with tracker(tmp_path / "a") as run:
        run.log_metrics(train_loss=2.0)
        found = Collection(tmp_path)
        assert found.refresh()[0].status == "running"
        age(tmp_path / "a" / "heartbeat.json", 3600)
        assert found.refresh()[0].status == "interrupted"
    killed_run(tmp_path / "k")
    assert {run.folder.name: run.status for run in found.refresh()}["k"] == "interrupted"


def test_torn_lines_are_counted(tmp_path):
    a_run(tmp_path / "a", losses=[1.0])
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(b'{"torn\n{"attempt": 1, "iter')
    (run,) = Collection(tmp_path).refresh()
    assert (run.torn_lines, run.numbers["train_loss"]) == (2, 1.0)


def test_numbers_are_last_best_and_results_and_zero_is_one_of_them(tmp_path):
    with tracker(tmp_path / "a") as run:
        for loss in (3.0, 1.0, 2.0):
            run.log_metrics(stage="s", train_loss=loss, acc=0.0)
        run.finish({"perplexity": 7.5, "count": {"inner": 0}, "flag": True, "words": "x", "none": None})
    (found,) = Collection(tmp_path).refresh()
    expected = {"s/train_loss": 2.0, "s/final_train_loss": 2.0, "s/best_train_loss": 1.0, "s/acc": 0.0}
    expected |= {"perplexity": 7.5, "count/inner": 0}
    assert expected.items() <= found.numbers.items()
    assert not {"flag", "words", "none", "learning_rate"} & found.numbers.keys()


def test_nan_stays_nan_keeps_its_step_and_is_never_the_best(tmp_path):
    a_run(tmp_path / "a", losses=[3.0, float("nan"), 2.0, float("nan")])
    (run,) = Collection(tmp_path).refresh()
    steps, values = run.curves[None, "train_loss"]
    assert steps == [0, 1, 2, 3] and math.isnan(values[1])
    assert math.isnan(run.numbers["train_loss"]) and run.numbers["best_train_loss"] == 2.0


def test_a_curve_holds_only_the_steps_at_which_its_metric_was_taken(tmp_path):
    with tracker(tmp_path / "a") as run:
        for step in (0, 10, 20):
            run.log_metrics(iteration=step, train_loss=float(step))
        run.log_eval(val_loss=0.5)
    (found,) = Collection(tmp_path).refresh()
    assert found.curves[None, "train_loss"] == ([0, 10, 20], [0.0, 10.0, 20.0])
    assert found.curves[None, "val_loss"] == ([20], [0.5])


def test_a_one_file_log_is_a_run_with_its_curve_and_numbers(tmp_path):
    (tmp_path / "experiment_logged_20260102.json").write_text(json.dumps(LOG))
    (run,) = Collection(tmp_path).refresh()
    assert (run.name, run.status, run.seconds, run.config["learning_rate"]) == ("logged", "finished", 60.0, 0.1)
    assert run.curves[None, "train_loss"] == ([0, 5], [3.0, 2.0])
    assert run.numbers["acc"] == 0.0 and run.numbers["final_train_loss"] == 2.0
    assert "final_val_loss" not in run.numbers


def test_a_log_without_an_end_is_interrupted_and_lines_that_are_no_snapshots_are_counted(tmp_path):
    path = tmp_path / "experiment_x.json"
    path.write_text(json.dumps({**LOG, "end_time": None, "metrics_history": [*LOG["metrics_history"], 7]}))
    run = read_log(path)
    assert (run.status, run.torn_lines) == ("interrupted", 1)


def test_a_log_inside_a_run_directory_tells_of_that_run_and_is_no_second_one(tmp_path):
    a_run(tmp_path / "a")
    (tmp_path / "a" / "experiment_try_1.json").write_text(json.dumps(LOG))
    assert len(Collection(tmp_path).refresh()) == 1


def test_a_log_written_beside_its_run_directory_is_the_same_run(tmp_path):
    from nbhelpers.experiment_log import ExperimentLog

    a_run(tmp_path / "run", [3.0, float("nan"), 2.0])
    log = ExperimentLog.from_run(tmp_path / "run").write(tmp_path / "logs")
    found = Collection(tmp_path)
    (run,) = found.refresh()
    assert run.folder.name == "run" and found.problems == []
    alone = read_log(log)
    assert alone.numbers["best_train_loss"] == run.numbers["best_train_loss"] == 2.0
    assert (alone.run_id, alone.status) == (run.run_id, "finished") and math.isnan(
        alone.curves[None, "train_loss"][1][1]
    )


def test_flat_names_inner_fields_with_dots():
    assert flat({"a": 1, "b": {"c": {"d": 2}}, "e": {}}) == {"a": 1, "b.c.d": 2, "e": {}}
