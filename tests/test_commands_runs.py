"""Do the `runs` commands show, compare, export, follow and log runs, with the exit codes of every command?"""

from __future__ import annotations

import csv
import io
import json

import pytest
from many_runs import a_run, pruning_run
from run_folders import tracker
from typer.testing import CliRunner

from nbhelpers import cli, commands_runs


def call(*arguments: object):
    words = ["runs", *(str(argument) for argument in arguments)]
    return CliRunner().invoke(cli.build(words), words)


def answer(*arguments: object) -> dict:
    result = call(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.fixture
def folder(tmp_path):
    for seed, tuned in enumerate((5.0, 4.0)):
        pruning_run(tmp_path / f"g{seed}", 3.0, 6.0, tuned, seed=seed, sample_prompt="canary")
    return tmp_path


def test_list_names_every_run_and_what_cannot_be_read(folder):
    (folder / "no").mkdir()
    (folder / "no" / "events.jsonl").write_text("")
    found = answer("list", folder)
    assert [row["status"] for row in found["runs"]] == ["finished", "finished"]
    assert "no manifest.json" in found["problems"][0]
    assert "note: " in call("list", folder).stdout


def test_show_tells_one_run_whole(folder):
    found = answer("show", folder / "g1")
    assert found["metrics"]["fine_tuned/perplexity"] == 4.0 and found["config"]["seed"] == 1
    assert "fine_tuned/perplexity" in call("show", folder / "g1").stdout


def test_show_says_why_a_run_failed(tmp_path):
    with pytest.raises(OSError, match="no disk"), tracker(tmp_path / "a"):
        raise OSError("no disk")
    assert answer("show", tmp_path / "a")["failure"] == "OSError: no disk"


@pytest.mark.parametrize(
    "words, text",
    [
        (("show", "."), "is not a run directory"),
        (("list", "missing"), "does not exist"),
        (("compare", ".", "--columns", "nonsense"), "unknown column 'nonsense'"),
        (("compare", ".", "--metric", "nonsense"), "unknown metric 'nonsense'"),
        (("export", ".", "--format", "xml"), "unknown format 'xml'"),
        (("export", ".", "--form", "tall"), "unknown form 'tall'"),
        (("log", "missing"), "is not a folder"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(folder, monkeypatch, words, text):
    monkeypatch.chdir(folder)
    result = call(*words)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and text in result.stderr


def test_compare_gives_table_best_and_mean_over_seeds(folder):
    found = answer("compare", folder, "--columns", "seed,fine_tuned/perplexity")
    assert [row["seed"] for row in found["runs"]] == [0, 1]
    assert found["metric"] == "fine_tuned/perplexity" and found["best"]["value"] == 4.0
    (group,) = found["seeds"]
    assert (group["mean"], group["n"]) == (4.5, 2)
    said = call("compare", folder).stdout
    assert "all runs: 4.5 [" in said and "best fine_tuned/perplexity: 4.00" in said


def test_compare_draws_figures_as_vectors_and_pictures(folder, monkeypatch):
    from nbhelpers import analysis_plots

    some = {name: analysis_plots.FIGURES[name] for name in ("quadrants", "throughput")}
    monkeypatch.setattr(analysis_plots, "FIGURES", some)
    answer("compare", folder, "--figures", folder / "fig")
    assert sorted(path.name for path in (folder / "fig").iterdir()) == [
        *("quadrants.png", "quadrants.svg", "throughput.png", "throughput.svg"),
    ]


def test_export_writes_csv_and_json_without_texts_of_users(folder):
    rows = list(csv.DictReader(io.StringIO(call("export", folder).stdout)))
    assert [row["fine_tuned/perplexity"] for row in rows] == ["5.0", "4.0"]
    long = call("export", folder, "--form", "long", "--out", folder / "long.csv")
    assert long.exit_code == 0 and (folder / "long.csv").read_text().startswith("run_id,name,stage,step,metric,value\n")
    document = json.loads(call("export", folder, "--format", "json").stdout)
    assert len(document["runs"]) == 2 and len(document["curves"]) == 24
    assert "canary" not in str(rows) + (folder / "long.csv").read_text() + json.dumps(document)
    assert "canary" in call("export", folder, "--include-text").stdout


def test_watch_once_shows_where_each_run_stands(folder):
    with tracker(folder / "now") as run:
        run.log_metrics(iteration=7, stage="s", train_loss=2.5)
        found = answer("watch", folder, "--once")
    row = next(row for row in found["runs"] if row["status"] == "running")
    assert (row["stage"], row["steps"], row["train_loss"]) == ("s", 7, 2.5)
    assert found["line"] == "2 finished, 1 running"


def test_watch_follows_a_run_until_it_has_ended(tmp_path, monkeypatch):
    running = tracker(tmp_path / "a").start()
    running.log_metrics(train_loss=2.0)
    steps = iter((lambda: None, lambda: running.log_metrics(train_loss=1.0), running.finish))
    monkeypatch.setattr(commands_runs.time, "sleep", lambda seconds: next(steps)())
    screen = io.StringIO()
    found = commands_runs.watch([tmp_path], False, 2.0, screen)
    assert found["line"] == "1 finished"
    losses = [text for text in ("2.00", "1.00") if text in screen.getvalue()]
    assert losses == ["2.00", "1.00"] and screen.getvalue().count("finished") == 1


def test_an_interrupt_ends_the_watching_with_130(folder, monkeypatch):
    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands_runs.time, "sleep", interrupted)
    with tracker(folder / "now"):
        result = call("watch", folder)
    assert result.exit_code == 130 and "running" in result.stdout


def test_log_writes_the_journal(folder):
    found = answer("log", folder)
    assert (found["completed"], found["planned"]) == (2, 0)
    assert "| run |" in (folder / "EXPERIMENT_LOG.md").read_text()
    assert "2 completed" in call("log", folder).stdout


def test_a_folder_without_runs_is_said_to_be_empty(tmp_path):
    assert call("list", tmp_path).stdout == "no runs\n"
    assert answer("compare", tmp_path)["best"] is None
    a_run(tmp_path / "a", status="interrupted")
    assert answer("compare", tmp_path)["metric"] is None
