"""One JSON document of a run: what it says, and that it comes back as it went."""

import json
import math
import re

import pytest
from run_folders import killed_run, tracker

from nbhelpers.experiment_log import ExperimentLog, write_experiment_log
from nbhelpers.records import read_json, write_json
from nbhelpers.run_config import MetricsSnapshot
from nbhelpers.tracking import ExperimentConfig


def finished(folder, **more):
    with tracker(folder, **more) as run:
        for loss in (2.0, 0.0, 1.0):
            run.log_metrics(train_loss=loss)
        run.log_eval(val_loss=3.0, accuracy=0.5)
        run.note("looks fine")
    return run


def test_a_log_holds_the_fields_that_were_promised_with_the_losses_of_a_pencil(tmp_path):
    finished(tmp_path / "run")
    document = read_json(write_experiment_log(tmp_path / "run"))
    promised = ["config", "start_time", "end_time", "duration_seconds", "metrics_history", "notes"]
    promised += ["best_train_loss", "best_val_loss", "final_train_loss", "final_val_loss"]
    assert set(promised) <= set(document)
    assert document["config"] == {"name": "try", "kind": "test", "learning_rate": 1e-3}
    losses = [document[key] for key in promised[-4:]]
    assert losses == [0.0, 3.0, 1.0, 3.0], "0.0 is a measure and the best one"
    assert document["notes"] == ["looks fine"]
    assert [row["iteration"] for row in document["metrics_history"]] == [0, 1, 2]
    assert document["metrics_history"][2]["accuracy"] == 0.5
    assert document["start_time"] <= document["end_time"] and 0 < document["duration_seconds"] < 60


def test_a_log_survives_the_way_there_and_back(tmp_path):
    finished(tmp_path / "run")
    log = ExperimentLog.from_run(tmp_path / "run")
    assert ExperimentLog.load(log.write(tmp_path / "logs")) == log
    assert log.metrics_history[2] == MetricsSnapshot.from_dict(log.metrics_history[2].to_dict())


def test_a_loss_that_ended_as_nan_is_null_with_a_flag_and_never_the_best(tmp_path):
    with tracker(tmp_path) as run:
        for loss in (float("nan"), 2.0, float("nan")):
            run.log_metrics(train_loss=loss)
        path = run.write_log()
    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(text))
    document = read_json(path)
    assert document["final_train_loss"] is None and document["not_finite"] == {"final_train_loss": "nan"}
    log = ExperimentLog.load(path)
    assert math.isnan(log.final_train_loss) and math.isnan(log.metrics_history[2].train_loss)
    assert log.best_train_loss == 2.0 and log.final_val_loss is None


def test_a_log_of_a_running_and_of_a_killed_run_has_no_end(tmp_path):
    with tracker(tmp_path / "live") as run:
        run.log_metrics(train_loss=1.0)
        live = ExperimentLog.load(run.write_log(tmp_path))
    assert (live.status, live.end_time, live.final_train_loss) == ("running", None, 1.0)
    killed_run(tmp_path / "killed")
    killed = ExperimentLog.from_run(tmp_path / "killed")
    assert (killed.status, killed.end_time) == ("interrupted", None)
    assert [snapshot.train_loss for snapshot in killed.metrics_history] == [3.0, 2.0]


def test_losses_are_those_of_one_stage_and_the_log_says_which(tmp_path):
    with tracker(tmp_path) as run:
        run.log_metrics(stage="tuned", train_loss=2.0)
        run.log_metrics(stage="control", train_loss=1.0)
    log = ExperimentLog.from_run(tmp_path)
    assert (log.stage, log.best_train_loss, len(log.metrics_history)) == ("tuned", 2.0, 2)
    assert ExperimentLog.from_run(tmp_path, "control").best_train_loss == 1.0
    with pytest.raises(LookupError, match="unknown stage 'contrl'. Did you mean 'control'"):
        ExperimentLog.from_run(tmp_path, "contrl")


@pytest.mark.parametrize("name", ["a/b", "../up", "🚀", "模型"])
def test_any_name_gives_one_file_inside_the_folder(tmp_path, name):
    with tracker(tmp_path / "run", ExperimentConfig(name=name)) as run:
        path = run.write_log(tmp_path / "logs")
    assert list((tmp_path / "logs").iterdir()) == [path]
    assert re.fullmatch(r"experiment_.+_\d{8}T\d{6}Z\.json", path.name)
    assert ExperimentLog.load(path).config.name == name


def test_a_run_keeps_one_file_and_two_runs_never_share_one(tmp_path):
    logs = []
    for name in "ab":
        log = ExperimentLog.from_run(finished(tmp_path / name).run_dir)
        log.start_time = "2026-01-01T00:00:00.000Z"
        logs.append(log)
    first, second = (log.write(tmp_path / "logs") for log in logs)
    assert first.name == "experiment_try_20260101T000000Z.json" and first != second
    assert logs[0].write(tmp_path / "logs") == first and logs[1].write(tmp_path / "logs") == second
    assert [ExperimentLog.load(path).run_id for path in (first, second)] == [log.run_id for log in logs]


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"format": 2}, "has log format 2, this version reads up to 1: update nbhelpers"),
        ({"config": {}}, "a config needs a name"),
    ],
)
def test_a_document_of_a_newer_format_or_without_a_name_is_refused(tmp_path, change, text):
    path = write_experiment_log(finished(tmp_path).run_dir)
    write_json(path, {**read_json(path), **change})
    with pytest.raises(ValueError, match=text):
        ExperimentLog.load(path)


@pytest.mark.parametrize("content", ["[]", "{}", '{"config": {"name": "x"}}', "{"])
def test_a_file_that_is_no_log_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "experiment_x.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="is not an experiment log: it needs config|is not valid JSON"):
        ExperimentLog.load(path)
