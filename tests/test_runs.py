"""A run directory is readable after any death, torn or copied, and says so where it is none."""

import pytest
from run_folders import tracker

from nbhelpers.records import append_line, read_json, write_json
from nbhelpers.runs import read_run


def test_an_unknown_metric_is_an_error_with_the_known_ones(tmp_path):
    with tracker(tmp_path) as run:
        run.log_metrics(train_loss=1.0)
    with pytest.raises(LookupError, match="unknown metric 'trian_loss'. Did you mean 'train_loss'"):
        read_run(tmp_path).curve("trian_loss")


def test_a_run_without_result_json_is_not_finished_whatever_its_manifest_says(tmp_path):
    with tracker(tmp_path):
        pass
    (tmp_path / "result.json").unlink()
    assert read_run(tmp_path).status == "interrupted"


def test_rows_of_an_older_attempt_never_come_back_whatever_their_order(tmp_path):
    with tracker(tmp_path):
        pass
    for attempt, loss in ((1, 7.0), (2, 5.0), (1, 6.0)):
        append_line(tmp_path / "metrics.jsonl", {"attempt": attempt, "iteration": 0, "train_loss": loss})
    append_line(tmp_path / "metrics.jsonl", {"no": "snapshot"})
    read = read_run(tmp_path)
    assert [row["train_loss"] for row in read.metrics] == [5.0]
    assert read.torn["metrics"] == 1


def test_reading_never_raises_on_torn_lines(tmp_path):
    with tracker(tmp_path) as run:
        run.log_metrics(train_loss=1.0)
    for file in ("metrics.jsonl", "events.jsonl"):
        with open(tmp_path / file, "ab") as target:
            target.write(b'\xff{"a"\n{"attempt": 1, "iter')
    (tmp_path / "result.json").write_text('{"per')
    (tmp_path / "heartbeat.json").write_text("")
    read = read_run(tmp_path)
    assert read.torn == {"metrics": 2, "events": 2, "result": 1}
    assert len(read.metrics) == 1 and read.result is None and read.status == "interrupted"


@pytest.mark.parametrize(
    ("manifest", "text"),
    [
        (None, r"is not a run directory \(no manifest.json\)"),
        ("{", "is not valid JSON"),
        ("[]", "is not the manifest of a run"),
        ('{"format": 1}', "is not the manifest of a run: it needs run_id"),
    ],
)
def test_a_folder_that_is_no_run_is_said_to_be_none(tmp_path, manifest, text):
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    with pytest.raises(ValueError, match=text):
        read_run(tmp_path)


def test_a_run_of_a_newer_format_is_refused(tmp_path):
    with tracker(tmp_path):
        pass
    write_json(tmp_path / "manifest.json", {**read_json(tmp_path / "manifest.json"), "format": 2})
    with pytest.raises(ValueError, match="has run format 2, this version reads up to 1: update nbhelpers"):
        read_run(tmp_path)


def test_a_copied_folder_is_a_complete_result(tmp_path):
    with tracker(tmp_path / "a") as run:
        run.log_metrics(train_loss=1.0)
    (tmp_path / "a").rename(tmp_path / "b")
    assert read_run(tmp_path / "b").status == "finished"
