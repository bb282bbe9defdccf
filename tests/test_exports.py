"""A run in other tools' files: its curves with their steps and stages, no secret, and one line where a tool lacks."""

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest
from run_folders import tracker

from nbhelpers.exports import export_tensorboard, export_wandb
from nbhelpers.records import append_line
from nbhelpers.tracking import ExperimentConfig

BENCHMARK = Path(__file__).resolve().parent.parent / "benchmarks" / "tracking.py"


def logged(folder):
    config = ExperimentConfig(name="a/b 🚀", learning_rate=0.5, where="canary-one-1234")
    with tracker(folder, config) as run:
        for step in (0, 10):
            run.log_metrics(step, stage="tuned", train_loss=0.5 * step, word="canary-one-1234")
        run.log_metrics(0, stage="control", train_loss=4.0)
        run.log_metrics(3, val_loss=float("nan"), speed=2.5)
        run.note("see canary-one-1234")
        run.finish({"perplexity": 12.5})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MY_HUB_TOKEN", "canary-one-1234")
    logged(tmp_path / "run")
    unmasked = {"attempt": 1, "kind": "note", "text": "canary-one-1234, written by another tool"}
    append_line(tmp_path / "run" / "events.jsonl", unmasked)
    return tmp_path / "run"


def assert_no_secret(out):
    files = [path for path in out.rglob("*") if path.is_file()]
    assert files and [path.name for path in files if b"canary" in path.read_bytes()] == []


def scalars(folder):
    """{tag: [(step, value)]} as TensorBoard's own reader gives them."""
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = reader.EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def test_tensorboard_reads_every_curve_with_its_steps_and_stages(folder, tmp_path):
    pytest.importorskip("tensorboard")
    for _ in range(2):  # a second export takes the place of the first
        export = export_tensorboard(folder, tmp_path / "board")
        found = scalars(export.folder)
        assert found["tuned/train_loss"] == [(0, 0.0), (10, 5.0)]
        assert found["control/train_loss"] == [(0, 4.0)] and found["speed"] == [(3, 2.5)]
        assert [(step, math.isnan(value)) for step, value in found["val_loss"]] == [(3, True)]
    assert sum(map(len, found.values())) == export.points and export.skipped == ("tuned/word",)
    assert_no_secret(tmp_path / "board")


def load_benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_tracking", BENCHMARK)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def wandb_rows(folder):
    """The history of a .wandb file as [{name: value}], read with W&B's own message classes."""
    messages = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    benchmark = load_benchmark()
    (path,) = folder.glob("*.wandb")
    rows = []
    for content in benchmark.wandb_records(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(content)
        row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
        if row:
            rows.append({key: value for key, value in row.items() if not key.startswith("_")})
    return rows


def test_wandb_gets_an_offline_run_with_every_curve_its_steps_and_stages(folder, tmp_path):
    pytest.importorskip("wandb")
    export = export_wandb(folder, tmp_path / "out")
    rows = wandb_rows(export.folder)
    steps = [(row["tuned/iteration"], row["tuned/train_loss"]) for row in rows if "tuned/iteration" in row]
    assert [tuple(map(float, pair)) for pair in steps] == [(0.0, 0.0), (10.0, 5.0)]
    assert [float(row["control/train_loss"]) for row in rows if "control/iteration" in row] == [4.0]
    assert [(row["iteration"], float(row["speed"])) for row in rows if "speed" in row] == [("3", 2.5)]
    assert export.skipped == ("tuned/word",)
    assert_no_secret(tmp_path / "out")


def test_a_run_can_be_exported_while_it_goes_on(tmp_path):
    pytest.importorskip("tensorboard")
    with tracker(tmp_path / "run") as run:
        run.log_metrics(7, train_loss=1.5)
        export = export_tensorboard(tmp_path / "run", tmp_path / "board")
        assert scalars(export.folder)["train_loss"] == [(7, 1.5)]


@pytest.mark.parametrize(
    ("export", "module", "text"),
    [
        (export_tensorboard, "tensorboard", r"^TensorBoard is not installed .*pip install 'nbhelpers\[tensorboard\]'"),
        (export_wandb, "wandb", r"^W&B is not installed .*pip install 'nbhelpers\[wandb\]', or pip install wandb$"),
    ],
)
def test_a_missing_tool_is_one_line_that_says_what_to_install(tmp_path, monkeypatch, export, module, text):
    for name in [name for name in sys.modules if name == module or name.startswith(f"{module}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=text) as caught:
        export(tmp_path / "run", tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# the benchmark beside those tools


def test_the_table_holds_the_percentiles_of_a_pencil_and_names_what_was_not_compared():
    benchmark = load_benchmark()
    calls = [float(number) for number in range(101)]
    left = {"1": 1, "100": 98}
    found = {
        "tools": benchmark.summarise(
            {"nbhelpers": calls, "W&B offline": [10 * call for call in calls]}, {"nbhelpers": left, "W&B offline": left}
        ),
        "versions": {"nbhelpers": "1.0", "W&B offline": "2.0"},
        "not_compared": ["MLflow file store"],
        "machine": {"processor": "x", "cores": 2, "python": "3"},
    }
    text = benchmark.markdown(found)
    assert "| nbhelpers 1.0 | 50.0 | 99.0 | 1 | 98 |\n| W&B offline 2.0 | 500.0 | 990.0 | 1 | 98 |" in text
    assert "p50 is 0.100 of W&B offline's" in text
    assert "Not compared, because it is not installed: MLflow file store." in text


def test_in_the_committed_results_every_call_of_ours_survives_and_costs_a_tenth_of_wandb_at_most():
    results = BENCHMARK.parent / "results"
    found = json.loads((results / "tracking.json").read_text(encoding="utf-8"))
    by = {row["tool"]: row for row in found["tools"]}
    assert all(int(calls) == left for calls, left in by["nbhelpers"]["survived"].items())
    assert by["nbhelpers"]["p50"] <= by["W&B offline"]["p50"] / 10
    assert (results / "tracking.md").read_text(encoding="utf-8") == load_benchmark().markdown(found)


def test_a_killed_process_leaves_every_step_of_ours(tmp_path):
    assert load_benchmark().survivors("nbhelpers", 20) == 20
