"""The run directory: written by one live process, and whole after any death."""

import dataclasses
import errno
import json
import os
import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from run_folders import CONFIG, killed_run, script, tracker

from nbhelpers import runlock, tracking
from nbhelpers.linefile import LineFile
from nbhelpers.records import append_line, read_json, sha256_json
from nbhelpers.runs import read_run
from nbhelpers.tracking import Diverged, ExperimentConfig, ExperimentTracker, Interrupted, MetricsSnapshot

# config and snapshot


def test_a_config_gives_its_hyperparameters_as_attributes_and_as_a_dict():
    config = ExperimentConfig(name="x", learning_rate=1e-3, layers=[1, {"a": 2}], rate=np.float32(0.5), path=Path("p"))
    assert (config.name, config.kind, config.learning_rate, config.rate) == ("x", "experiment", 1e-3, 0.5)
    assert config.to_dict() == {
        "name": "x",
        "kind": "experiment",
        "learning_rate": 1e-3,
        "layers": [1, {"a": 2}],
        "rate": 0.5,
        "path": "p",
    }
    assert repr(config).startswith("ExperimentConfig(name='x', kind='experiment', learning_rate=0.001")


def test_a_config_cannot_be_changed_at_any_depth():
    config = ExperimentConfig(name="x", rate=1, layers=[1], inner={"a": 1})
    with pytest.raises(dataclasses.FrozenInstanceError, match="rate"):
        config.rate = 2
    with pytest.raises(dataclasses.FrozenInstanceError, match="name"):
        config.name = "y"
    with pytest.raises(AttributeError, match="append"):
        config.layers.append(2)
    with pytest.raises(TypeError, match="item assignment"):
        config.inner["a"] = 2


def test_an_unknown_config_field_says_which_are_known():
    with pytest.raises(AttributeError, match="unknown config field 'learning_rat'. Did you mean 'learning_rate'"):
        CONFIG.learning_rat  # noqa: B018 - the access is the test


def test_configs_survive_the_way_there_and_back_also_with_infinity():
    config = ExperimentConfig(name="x", clip=float("inf"), layers=[1, [2]])
    assert config.clip == float("inf")
    assert config.to_dict()["not_finite"] == {"clip": "inf"}
    for copy in (ExperimentConfig.from_dict(config.to_dict()), pickle.loads(pickle.dumps(config))):  # noqa: S301 - our own bytes
        assert copy == config and hash(copy) == hash(config) and copy.clip == float("inf")


def test_the_sha256_of_a_config_depends_on_values_and_not_on_order():
    a, b = ExperimentConfig(name="x", p=1, q=2), ExperimentConfig(q=2, p=1, name="x")
    assert a.sha256 == b.sha256 == sha256_json({"name": "x", "kind": "experiment", "p": 1, "q": 2})
    assert ExperimentConfig(name="x", p=1, q=3).sha256 != a.sha256


@pytest.mark.parametrize("key", ["sha256", "to_dict", "_x", "not_finite", "hyperparameters"])
def test_names_that_a_config_needs_for_itself_are_refused(key):
    with pytest.raises(ValueError, match=f"hyperparameter '{key}' has a name that a config needs"):
        ExperimentConfig(name="x", **{key: 1})


def test_a_config_needs_a_name_and_values_with_a_json_form():
    with pytest.raises(ValueError, match="name must be a text that is not empty, got ''"):
        ExperimentConfig(name="")
    with pytest.raises(ValueError, match="a config needs a name"):
        ExperimentConfig.from_dict({"rate": 1})
    with pytest.raises(ValueError, match="no JSON form"):
        ExperimentConfig(name="x", model=object())


def test_a_snapshot_writes_what_was_measured_and_zero_is_a_measure():
    snapshot = MetricsSnapshot(3, 2, 1.5, train_loss=0.0, metrics={"accuracy": 0.5})
    row = snapshot.to_dict()
    assert row == {
        "iteration": 3,
        "gradient_step": 2,
        "wallclock_time": 1.5,
        "train_loss": 0.0,
        "attempt": 1,
        "accuracy": 0.5,
    }
    assert MetricsSnapshot.from_dict(row) == snapshot


# a whole run


def test_a_finished_run_leaves_the_whole_record(tmp_path):
    with ExperimentTracker(CONFIG, tmp_path / "runs", fingerprints={"model": "abc"}, command=["do", "it"]) as run:
        for step in range(3):
            run.increment_gradient_step()
            run.log_metrics(train_loss=3.0 - step, learning_rate=0.1, tokens_per_sec=9.0, iter_time_ms=2.0)
        run.log_eval(val_loss=2.5, accuracy=0.5)
        run.set_fingerprints(data="def")
        run.event("stage", stage="end")
        run.finish({"perplexity": 12.5})
    assert re.fullmatch(r"try-\d{8}T\d{6}Z-[0-9a-f]{6}", run.run_dir.name)
    assert sorted(os.listdir(run.run_dir)) == [
        "events.jsonl",
        "heartbeat.json",
        "log.txt",
        "manifest.json",
        "metrics.jsonl",
        "result.json",
    ]
    manifest = read_json(run.run_dir / "manifest.json")
    assert list(manifest) == [
        "format",
        "run_id",
        "name",
        "kind",
        "config",
        "config_sha256",
        "status",
        "attempts",
        "environment",
        "fingerprints",
        "command",
        "created",
    ]
    assert manifest["config"] == {"name": "try", "kind": "test", "learning_rate": 1e-3}
    assert manifest["config_sha256"] == CONFIG.sha256
    assert manifest["fingerprints"] == {"model": "abc", "data": "def"}
    assert manifest["command"] == ["do", "it"]
    assert manifest["environment"]["python"]
    assert manifest["status"] == manifest["attempts"][0]["status"] == "finished"

    read = read_run(run.run_dir)
    assert (read.status, read.config, read.torn) == (
        "finished",
        manifest["config"],
        {"metrics": 0, "events": 0, "result": 0},
    )
    assert read.result["perplexity"] == 12.5
    assert read.result["summary"]["last"]["accuracy"] == 0.5
    assert read.result["summary"]["best"] == {"val_loss": {"value": 2.5, "iteration": 2}}
    assert read.curve("train_loss") == ([0, 1, 2], [3.0, 2.0, 1.0])
    assert read.curve("val_loss") == ([2], [2.5])
    assert [row["gradient_step"] for row in read.metrics] == [1, 2, 3]
    assert [event["kind"] for event in read.events] == ["start", "stage", "stop"]


def test_result_json_is_the_last_thing_a_run_writes(tmp_path, monkeypatch):
    order = []
    write = tracking.write_json
    monkeypatch.setattr(
        tracking, "write_json", lambda path, *rest, **more: (order.append(path.name), write(path, *rest, **more))
    )
    with tracker(tmp_path):
        pass
    assert order[-2:] == ["manifest.json", "result.json"] and order.count("result.json") == 1


@pytest.mark.parametrize("name", ["a/b", "../up", "🚀", "模型", "x" * 300, "con\0trol", "."])
def test_any_name_gives_one_folder_inside_the_root(tmp_path, name):
    with ExperimentTracker(ExperimentConfig(name=name), tmp_path, environment={}) as run:
        run.log_metrics(train_loss=1.0)
    assert [path.name for path in tmp_path.iterdir()] == [run.run_dir.name]
    assert read_run(run.run_dir).name == name


def test_two_runs_of_one_name_never_share_a_folder(tmp_path):
    runs = [ExperimentTracker(CONFIG, tmp_path, environment={}).start() for _ in range(5)]
    for run in runs:
        run.finish()
    assert len({run.run_dir for run in runs}) == 5


def test_numpy_and_torch_scalars_are_logged_and_zero_is_not_missing(tmp_path):
    with tracker(tmp_path) as run:
        run.log_metrics(
            np.int64(4),
            train_loss=torch.tensor(0.0),
            val_loss=np.float32(0.5),
            learning_rate=None,
            heads=torch.tensor([1, 2]),
        )
    (row,) = read_run(tmp_path).metrics
    assert (row["iteration"], row["train_loss"], row["val_loss"], row["heads"]) == (4, 0.0, 0.5, [1, 2])
    assert "learning_rate" not in row


def test_a_nan_metric_is_null_with_a_flag_and_the_file_stays_strict(tmp_path):
    with tracker(tmp_path) as run:
        run.log_metrics(train_loss=float("nan"), grad_norm=torch.tensor(float("inf")))
        run.log_eval(val_loss=1.0)
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda text: pytest.fail(text))
    (row,) = read_run(tmp_path).metrics
    assert row["train_loss"] is None and row["grad_norm"] is None and row["val_loss"] == 1.0
    assert row["not_finite"] == {"train_loss": "nan", "grad_norm": "inf"}


def test_trainings_in_one_run_are_kept_apart_by_stage(tmp_path):
    with tracker(tmp_path) as run:
        for stage, loss in (("tuned", 1.0), ("control", 5.0)):
            for _ in range(2):
                run.log_metrics(stage=stage, train_loss=loss)
            run.log_eval(stage=stage, val_loss=loss)
    read = read_run(tmp_path)
    assert read.curve("train_loss", "tuned") == ([0, 1], [1.0, 1.0])
    assert read.curve("train_loss", "control") == ([0, 1], [5.0, 5.0])
    assert read.result["summary"]["best"]["control/val_loss"] == {"value": 5.0, "iteration": 1}


def test_the_gradient_step_can_be_counted_or_set(tmp_path):
    with tracker(tmp_path) as run:
        assert run.increment_gradient_step(3) == 3
        assert run.log_metrics(10, gradient_step=7).gradient_step == 7
        assert run.log_metrics().iteration == 11
        assert run.summary()["gradient_step"] == 7


@pytest.mark.parametrize("bad", [-1, 1.5, True, "3", float("nan")])
def test_an_iteration_is_a_whole_number(tmp_path, bad):
    with tracker(tmp_path) as run, pytest.raises(ValueError, match="iteration must be a whole number from 0 on"):
        run.log_metrics(bad)


def test_names_of_the_tracker_cannot_be_taken(tmp_path):
    with tracker(tmp_path) as run:
        with pytest.raises(ValueError, match="metric 'attempt' belongs to the tracker"):
            run.log_metrics(attempt=1)
        with pytest.raises(ValueError, match="event field 'utc' belongs to the tracker"):
            run.event("x", utc=1)
        with pytest.raises(ValueError, match="result key 'status' belongs to the tracker"):
            run.finish({"status": 1})
        with pytest.raises(LookupError, match="unknown status 'finishd'. Did you mean 'finished'"):
            run.finish(status="finishd")
        with pytest.raises(ValueError, match="a failed run has no result"):
            run.finish({"a": 1}, status="failed")
    assert read_run(tmp_path).status == "finished"


def test_a_tracker_that_is_not_running_says_what_to_do(tmp_path):
    run = tracker(tmp_path)
    with pytest.raises(RuntimeError, match="is new, not running: use `with tracker:` or call start"):
        run.log_metrics(train_loss=1.0)
    assert run.summary()["wallclock_time"] == 0.0
    run.start().finish()
    with pytest.raises(RuntimeError, match="is finished, not running: make a new tracker"):
        run.log_metrics(train_loss=1.0)
    with pytest.raises(RuntimeError, match="is finished: make a new tracker"):
        run.start()


def test_print_summary_shows_last_and_best(tmp_path, capsys):
    with tracker(tmp_path) as run:
        run.log_eval(val_loss=0.0)
        run.print_summary()
    printed = capsys.readouterr().out
    assert re.search(r"^last val_loss +0\.0$", printed, re.M)
    assert re.search(r"^best val_loss +0\.0 at iteration 0$", printed, re.M)


# failures


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("bad thing"), "failed"),
        (SystemExit(1), "failed"),
        (Diverged("loss is nan"), "diverged"),
        (Interrupted("stop"), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_error_is_recorded_with_its_traceback_and_still_raised(tmp_path, error, status):
    with pytest.raises(type(error), match=str(error) or None), tracker(tmp_path):
        raise error
    read = read_run(tmp_path)
    assert read.status == status and read.result is None
    (event,) = [event for event in read.events if event["kind"] == "error"]
    assert event["type"] == type(error).__name__ and event["message"] == str(error)
    assert "Traceback" in event["traceback"] and "raise error" in event["traceback"]
    assert not (tmp_path / "lock").exists()


@pytest.mark.parametrize("function", ["append_line", "write_json"])
def test_a_full_disk_ends_the_run_with_the_first_error_and_nothing_looks_finished(tmp_path, monkeypatch, function):
    def full(path, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    def go():
        with tracker(tmp_path) as run:
            monkeypatch.setattr(tracking, function, full)
            if function == "append_line":
                monkeypatch.setattr(LineFile, "append", full)
                run.log_metrics(train_loss=1.0)
            else:
                run.finish({"a": 1})

    with pytest.raises(OSError, match="No space left") as caught:
        go()
    if function == "append_line":
        assert any("could not be recorded" in note for note in caught.value.__notes__)
    monkeypatch.undo()
    assert not (tmp_path / "lock").exists() and not (tmp_path / "result.json").exists()
    assert read_run(tmp_path).status != "finished"
    tracker(tmp_path, resume=True).start().finish()


def test_a_start_that_fails_can_be_tried_again(tmp_path, monkeypatch):
    write = tracking.write_json

    def full(path, *rest, **more):
        if path.name == "manifest.json":
            raise OSError("no space")
        write(path, *rest, **more)

    monkeypatch.setattr(tracking, "write_json", full)
    with pytest.raises(OSError, match="no space"):
        tracker(tmp_path).start()
    monkeypatch.undo()
    assert os.listdir(tmp_path) == []
    tracker(tmp_path).start().finish()


def test_a_folder_in_use_or_full_is_refused(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match="is not empty: choose another folder$"):
        tracker(tmp_path).start()
    with pytest.raises(ValueError, match=r"holds 'notes.txt' but no manifest.json, so it is no run to resume"):
        tracker(tmp_path, resume=True).start()
    assert os.listdir(tmp_path) == ["notes.txt"]
    with pytest.raises(ValueError, match="resume=True needs the run directory"):
        ExperimentTracker(CONFIG, tmp_path, resume=True)


# kill and resume


def test_a_kill_at_any_moment_loses_at_most_the_line_being_written(tmp_path):
    process = script(
        "t = tracker(sys.argv[1]).start(); i = 0\n"
        "while True:\n"
        "    t.log_metrics(train_loss=float(i), fill='x' * 500)\n"
        "    print(i, flush=True); i += 1",
        tmp_path,
    )
    for line in process.stdout:
        if int(line) >= 50:
            break
    process.kill()
    told = int(((line + process.stdout.read()).split() or ["0"])[-1])
    process.wait()
    process.stderr.close()
    read = read_run(tmp_path)
    assert read.status == "interrupted", "the process is gone, so nobody waits a minute to know it"
    assert [row["iteration"] for row in read.metrics][: told + 1] == list(range(told + 1))
    assert len(read.metrics) <= told + 2 and read.torn["metrics"] <= 1


def test_a_resumed_run_continues_clock_steps_and_attempts_and_shows_each_step_once(tmp_path):
    killed_run(tmp_path, "time.sleep(0.2); t.log_metrics(train_loss=1.0)")
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"attempt":1,"iterat')
    before = read_run(tmp_path)
    (tmp_path / ".left.tmp").touch()
    with tracker(tmp_path, resume=True) as run:
        assert (run.attempt, run.iteration, run.gradient_step) == (2, 2, 4)
        assert run.run_id == before.run_id
        first = run.log_metrics(1, train_loss=9.0)  # redone
        run.log_metrics(2, train_loss=8.0)
        assert run.log_metrics(train_loss=7.0).iteration == 3
    assert before.metrics[-1]["wallclock_time"] <= first.wallclock_time < before.metrics[-1]["wallclock_time"] + 5
    read = read_run(tmp_path)
    assert read.curve("train_loss") == ([0, 1, 2, 3], [3.0, 9.0, 8.0, 7.0])
    assert [row["attempt"] for row in read.metrics] == [1, 2, 2, 2]
    assert read.torn["metrics"] == 1
    assert [attempt["status"] for attempt in read.manifest["attempts"]] == ["interrupted", "finished"]
    assert [event["kind"] for event in read.events] == ["start", "attempt", "lock_taken_over", "stop"]
    assert not (tmp_path / ".left.tmp").exists()


def test_an_attempt_that_was_killed_before_its_result_was_written_was_interrupted_not_finished(tmp_path, monkeypatch):
    def killed(path, content, **_more):
        if path.name == "result.json":
            raise KeyboardInterrupt
        write_json(path, content)

    write_json = tracking.write_json
    monkeypatch.setattr(tracking, "write_json", killed)
    with pytest.raises(KeyboardInterrupt), tracker(tmp_path) as run:
        run.finish({})
    monkeypatch.undo()
    assert read_run(tmp_path).status == "interrupted"
    tracker(tmp_path, resume=True).start().finish()
    assert [attempt["status"] for attempt in read_run(tmp_path).manifest["attempts"]] == ["interrupted", "finished"]


def test_a_failed_run_goes_on_when_a_retry_is_asked_for_and_a_finished_one_does_not(tmp_path):
    with pytest.raises(Diverged, match="nan"), tracker(tmp_path):
        raise Diverged("nan")
    with tracker(tmp_path, resume=True) as run:
        assert run.attempt == 2
    with pytest.raises(ValueError, match="is finished, nothing to resume"):
        tracker(tmp_path, resume=True).start()


def test_resuming_with_another_config_names_the_fields_that_differ(tmp_path):
    killed_run(tmp_path)
    other = ExperimentConfig(name="try", kind="test", learning_rate=1e-2, steps=5)
    text = r"config .*cannot change on resume \(learning_rate was 0.001, is 0.01, steps was 'absent', is 5\)"
    with pytest.raises(ValueError, match=text):
        tracker(tmp_path, other, resume=True).start()
    assert len(read_run(tmp_path).manifest["attempts"]) == 1
    tracker(tmp_path, resume=True).start().finish()


def test_resuming_with_other_data_is_refused(tmp_path):
    with pytest.raises(Interrupted, match="x"), tracker(tmp_path, fingerprints={"data": "a"}):
        raise Interrupted("x")
    with pytest.raises(ValueError, match=r"fingerprints .*\(data was 'a', is 'b'\)"):
        tracker(tmp_path, resume=True, fingerprints={"data": "b"}).start()
    with tracker(tmp_path, resume=True) as run, pytest.raises(ValueError, match=r"\(data was 'a', is 'c'\)"):
        run.set_fingerprints(data="c", model="m")


def test_resume_on_a_missing_folder_starts_a_run(tmp_path):
    with tracker(tmp_path / "new", resume=True) as run:
        assert run.attempt == 1


# heartbeat


def test_the_heart_beats_while_the_run_lives_and_stops_with_it(tmp_path, monkeypatch):
    assert (tracking.HEARTBEAT_SECONDS, runlock.STALE_SECONDS) == (10, 60)
    monkeypatch.setattr(tracking, "HEARTBEAT_SECONDS", 0.02)
    with tracker(tmp_path) as run:
        first = read_json(tmp_path / "heartbeat.json")
        assert first["pid"] == os.getpid() and first["host"] and {"process_start", "utc"} <= set(first)
        deadline = time.monotonic() + 60
        while read_json(tmp_path / "heartbeat.json")["wallclock_time"] == first["wallclock_time"]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert run._thread.daemon
        monkeypatch.setattr(tracking, "HEARTBEAT_SECONDS", 10)  # also how long the end waits for a beat that is written
    last = read_json(tmp_path / "heartbeat.json")
    time.sleep(0.1)
    assert read_json(tmp_path / "heartbeat.json") == last and not run._thread.is_alive()


# a bare environment


def test_a_whole_run_works_with_nothing_but_the_standard_library(tmp_path):
    process = script(
        "with ExperimentTracker(config, sys.argv[1]) as t:\n"
        "    t.log_metrics(train_loss=1.0)\n"
        "    t.finish({'a': 1})\n"
        "assert read_run(t.run_dir).result['a'] == 1\n"
        "heavy = {'torch', 'numpy', 'pydantic', 'transformers', 'psutil'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "try: import numpy\n"
        "except ImportError: print('bare')",
        tmp_path,
    )
    output, errors = process.communicate()
    assert (process.returncode, output) == (0, "bare\n"), errors


# summary and notes


def test_the_summary_has_min_max_mean_std_and_last_of_every_metric_of_any_name(tmp_path):
    with tracker(tmp_path) as run:
        for value in (2.0, 4.0, 6.0):
            run.log_metrics(train_loss=value, my_own=-value)
        run.log_metrics(train_loss=float("nan"), stage="other", word="text")
        found = run.summary()["metrics"]
    expected = {"count": 3, "min": 2.0, "max": 6.0, "mean": 4.0, "std": 2.0, "last": 6.0}
    assert found["train_loss"] == expected
    assert found["my_own"] == {**expected, "min": -6.0, "max": -2.0, "mean": -4.0, "last": -6.0}
    nothing = dict.fromkeys(["min", "max", "mean", "std", "last"])
    flag = {"not_finite": {"last": "nan"}}
    assert found["other/train_loss"] == {"count": 0, **nothing, "not_finite_count": 1, **flag}
    assert "other/word" not in found and run.summary()["last"]["other/word"] == "text"
    assert read_json(tmp_path / "result.json")["summary"]["metrics"] == found


def test_the_summary_goes_on_after_a_kill_and_counts_a_step_that_was_redone_once(tmp_path):
    killed_run(tmp_path)  # losses 3 and 2 at iterations 0 and 1
    with tracker(tmp_path, resume=True) as run:
        run.log_metrics(1, train_loss=7.0)
        run.log_metrics(2, train_loss=5.0)
        found = run.summary()["metrics"]["train_loss"]
    assert found == {"count": 3, "min": 3.0, "max": 7.0, "mean": 5.0, "std": 2.0, "last": 5.0}


def test_a_note_is_kept_with_the_run(tmp_path):
    with tracker(tmp_path) as run:
        run.note("warm restart 🚀")
        with pytest.raises(ValueError, match="a note must be a text that is not empty, got ' '"):
            run.note(" ")
    assert [event["text"] for event in read_run(tmp_path).events if event["kind"] == "note"] == ["warm restart 🚀"]


# a line of metrics


@pytest.mark.parametrize("cut", [0, 10])
def test_a_disk_that_fills_up_in_the_middle_of_a_log_call_costs_only_that_line(tmp_path, monkeypatch, cut):
    write = os.write

    def full(handle, content):
        if cut:
            write(handle, content[:cut])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with tracker(tmp_path) as run:
        run.log_metrics(train_loss=1.0)
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            with pytest.raises(OSError, match="No space left"):
                run.log_metrics(train_loss=2.0)
        assert run.summary()["metrics"]["train_loss"]["count"] == 1, "what is not on disk is not counted"
        run.log_metrics(train_loss=3.0)
    read = read_run(tmp_path)
    assert read.curve("train_loss") == ([0, 1], [1.0, 3.0])
    assert read.torn["metrics"] == (1 if cut else 0)


def test_a_write_that_the_system_cut_short_is_an_error_and_counts_as_torn(tmp_path, monkeypatch):
    write = os.write
    with tracker(tmp_path) as run:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda handle, content: write(handle, content[:7]))
            with pytest.raises(OSError, match="only 7 of [0-9]+ bytes of a line were written"):
                run.log_metrics(train_loss=2.0)
        run.log_metrics(train_loss=3.0)
    read = read_run(tmp_path)
    assert (read.curve("train_loss"), read.torn["metrics"]) == (([0], [3.0]), 1)


def test_a_real_device_without_space_stops_a_log_call(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    lines = LineFile(tmp_path / "metrics.jsonl")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            lines.append({"train_loss": 1.0})


ROWS = [{"a": 1.5, "b": -3, "c": 'é"\\\n🚀'}, {"a": True}, {"a": None}, {"a": float("inf")}, {"a": [1, {"b": 2.0}]}]
ROWS += [{"a": 1e300, "b": 5e-324, "c": 0.1 + 0.2}, {}, {"é": np.float32(0.5), "b": torch.tensor(2)}]


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_the_open_file_writes_the_same_bytes_as_append_line(tmp_path, row):
    lines = LineFile(tmp_path / "open")
    lines.append(row)
    lines.append(row)
    lines.close()
    for _ in range(2):
        append_line(tmp_path / "anew", row)
    assert (tmp_path / "open").read_bytes() == (tmp_path / "anew").read_bytes()


def test_each_log_call_is_one_write_of_one_whole_line(tmp_path, monkeypatch):
    write, lines = os.write, []
    with tracker(tmp_path) as run, monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, content: (lines.append(content), write(handle, content))[1])
        for step in range(3):
            run.log_metrics(train_loss=1.0)
            assert len(lines) == step + 1 and lines[-1].endswith(b"}\n") and lines[-1].count(b"\n") == 1


def test_a_secret_in_a_metric_or_a_result_is_masked(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_HUB_TOKEN", "canary-one-1234")
    with tracker(tmp_path) as run:
        run.log_metrics(sample="see canary-one-1234", parts=["canary-one-1234", 1])
        run.finish({"text": "canary-one-1234"})
    (row,) = read_run(tmp_path).metrics
    assert (row["sample"], row["parts"]) == ("see ***", ["***", 1])
    assert [path.name for path in tmp_path.iterdir() if "canary" in path.read_text()] == []
