"""Are the example runs that come with the package whole, honest about what they are, and free of any machine?"""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
from many_runs import a_run
from test_repository import MACHINE_PATH

from nbhelpers import example_grid
from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.grid import expand, read_plan
from nbhelpers.ledger import Ledger
from nbhelpers.overview import coverage_line
from nbhelpers.records import write_json


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return example_grid.unpacked(tmp_path_factory.mktemp("root"))


# ------------------------------------------------------------------------------------------------ what is shipped


def test_it_is_the_plan_of_the_project_with_48_finished_runs_and_none_twice(folder):
    assert coverage_line(folder) == "48 planned, 48 finished, 0 failed, 0 running, 0 missing, 0 twice"
    rows = [row.values for row in expand(read_plan(example_grid.PLAN)).rows]
    assert [row.values for row in Ledger(folder).rows] == rows


def test_every_run_can_be_read_and_says_that_its_own_facts_hold(folder):
    runs = ExperimentAnalyzer(folder)
    assert {run.status for run in runs.load_all()} == {"finished"} and runs.problems == []
    assert all(run.numbers["failed_facts"] == 0 and run.generated for run in runs.experiments)
    assert all({"fine_tuned", "control"} <= {stage for stage, _ in run.curves} for run in runs.experiments)


def test_it_is_small_holds_no_model_and_names_no_machine():
    assert example_grid.ASSET.stat().st_size < 300_000
    with zipfile.ZipFile(example_grid.ASSET) as bundle:
        names, text = bundle.namelist(), "\n".join(bundle.read(name).decode() for name in bundle.namelist())
    ends = {name.rpartition("/")[2] for name in names}
    assert ends == {"manifest.json", "metrics.jsonl", "events.jsonl", "result.json"} | {
        "plan.json",
        "ledger.jsonl",
        "example.json",
    }
    assert MACHINE_PATH.search(text) is None
    assert not re.search(r'"(host|pid|user|command|git|run_dir|model_dir)":', text) and "hf_" not in text


def test_it_says_when_with_what_and_on_what_it_was_recorded(folder):
    said = example_grid.stamp(folder)
    assert re.fullmatch(
        r"example runs that come with the package, recorded \d{4}-\d\d-\d\d with nbhelpers [\d.]+, "
        "bundled models on generated text",
        said,
    )
    assert example_grid.stamp(folder / "runs") == example_grid.stamp(next((folder / "runs").iterdir())) == said


def test_a_folder_of_ones_own_has_no_stamp(tmp_path):
    assert example_grid.stamp(tmp_path) == "" and example_grid.card(tmp_path) is None


# ------------------------------------------------------------------------------------------------ unpacking


def test_it_is_unpacked_once_and_looked_at_again(folder):
    mark = (folder / "plan.json").stat().st_mtime_ns
    assert example_grid.unpacked(folder.parent) == folder
    assert (folder / "plan.json").stat().st_mtime_ns == mark
    assert [path.name for path in folder.parent.iterdir()] == [folder.name], "nothing is left beside it"


def test_a_changed_file_is_found_and_the_way_out_said(tmp_path):
    folder = example_grid.unpacked(tmp_path)
    (folder / "ledger.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"is not as it was recorded \(ledger.jsonl\): delete this folder"):
        example_grid.unpacked(tmp_path)


def test_another_content_goes_to_another_folder(tmp_path):
    small = example_grid.zipped({"example.json": json.dumps({"files": {}})})
    (tmp_path / "small.zip").write_bytes(small)
    folders = {example_grid.unpacked(tmp_path / "root", path) for path in (example_grid.ASSET, tmp_path / "small.zip")}
    assert len(folders) == 2


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "runs/../../outside.txt", "runs\\..\\..\\x"])
def test_an_entry_that_would_leave_the_folder_is_refused_and_nothing_is_unpacked(tmp_path, name):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as bundle:
        bundle.writestr("example.json", json.dumps({"files": {}}))
        entry = zipfile.ZipInfo("x")
        entry.filename = name
        bundle.writestr(entry, "evil")
    (tmp_path / "evil.zip").write_bytes(buffer.getvalue())
    with pytest.raises(ValueError, match="would leave its folder"):
        example_grid.unpacked(tmp_path / "root", tmp_path / "evil.zip")
    assert list((tmp_path / "root").iterdir()) == [] and not (tmp_path / "outside.txt").exists()


def test_a_package_without_the_archive_says_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="the example runs are not here .* name a folder with runs in it"):
        example_grid.unpacked(tmp_path, tmp_path / "none.zip")


# ------------------------------------------------------------------------------------------------ recording


def a_sweep(folder: Path, **changes) -> Path:
    """A finished sweep of one job, by hand."""
    job = {"id": "aa", "name": "a job", "values": {}, "config": {"model": "m"}}
    rows = [{"values": {"model": "m"}, "job": "aa", "alias": False}]
    folder.mkdir()
    write_json(
        folder / "plan.json", {"format": 1, "plan": {"name": "p", "kind": "test"}, "rows": rows, "jobs": {"aa": job}}
    )
    (folder / "ledger.jsonl").write_text('{"event":"started","job":"aa","try":1,"host":"ada-pc","pid":7}\n')
    a_run(folder / "runs" / "aa-1", (3.0, 2.0), {"accuracy": 0.5, **changes}, name="a job", model="m")
    return folder


def test_packing_keeps_numbers_and_order_and_leaves_the_machine_out(tmp_path):
    packed = example_grid.pack(a_sweep(tmp_path / "sweep"))
    assert example_grid.pack(tmp_path / "sweep") == packed, "the same bytes for the same runs"
    with zipfile.ZipFile(io.BytesIO(packed)) as bundle:
        manifest = json.loads(bundle.read("runs/aa-1/manifest.json"))
        assert "command" not in manifest and not {"host", "pid"} & {key for a in manifest["attempts"] for key in a}
        original = json.loads((tmp_path / "sweep/runs/aa-1/manifest.json").read_text())
        assert list(manifest["config"]) == list(original["config"])
        assert json.loads(bundle.read("runs/aa-1/result.json"))["accuracy"] == 0.5
        assert b"ada-pc" not in bundle.read("ledger.jsonl")
        assert bundle.read("runs/aa-1/metrics.jsonl").decode().count("train_loss") == 2


@pytest.mark.parametrize("text", ["see /" + "home/ada/x.txt", "C:\\Users\\ada", "~/secret/x"])
def test_a_record_that_still_names_a_path_is_not_packed(tmp_path, text):
    with pytest.raises(ValueError, match=r"result.json holds the path .*must not name a machine's paths"):
        example_grid.pack(a_sweep(tmp_path / "sweep", said=text))


def test_a_grid_that_is_not_finished_is_not_packed(tmp_path, monkeypatch, capsys):
    coverage = {"done": 1, "planned": 2, "failed": 1}
    monkeypatch.setattr(example_grid.sweep, "run", lambda *_a, **_k: coverage)
    assert example_grid.main(["--work", str(tmp_path / "w"), "--out", str(tmp_path / "x.zip")]) == 1
    assert "1 of 2 jobs finished, 1 failed: nothing was packed" in capsys.readouterr().err
    assert not (tmp_path / "x.zip").exists()


def test_recording_carries_out_the_plan_and_writes_the_archive(tmp_path, monkeypatch):
    folder = a_sweep(tmp_path / "sweep")
    asked = []
    monkeypatch.setattr(
        example_grid.sweep, "run", lambda plan, work, progress: asked.append(plan) or {"done": 1, "planned": 1}
    )
    assert example_grid.main(["--work", str(folder), "--out", str(tmp_path / "x.zip")]) == 0
    assert asked == [example_grid.PLAN] and len(asked) == 1
    assert example_grid.unpacked(tmp_path / "root", tmp_path / "x.zip").is_dir()
