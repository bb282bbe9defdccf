"""Do the sweep commands say what they did, and leave with the exit code that belongs to it?"""

from __future__ import annotations

import json

import fake_jobs  # noqa: F401 - registers the job kind
from typer.testing import CliRunner

from nbhelpers import cli


def call(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


def plan_file(folder, text: str):
    path = folder / "plan.yaml"
    path.write_text("kind: fake\n" + text)
    return path


def test_plan_prints_rows_jobs_and_aliases_and_makes_no_folder(tmp_path):
    plan = plan_file(tmp_path, "axes: {a: [1, 2], b: [0, 0.5]}\naliases: [{when: {b: 0}, ignore: [a]}]\n")
    result = call("sweep", "plan", plan)
    assert result.exit_code == 0 and "4 rows (2 a x 2 b) -> 3 jobs, 1 aliases" in result.stdout
    assert json.loads(call("sweep", "plan", plan, "--json").stdout)["jobs"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["plan.yaml"]


def test_run_does_the_jobs_and_prints_the_coverage(tmp_path):
    plan = plan_file(tmp_path, "axes: {a: [1, 2]}\n")
    result = call("sweep", "run", plan, "--out", tmp_path / "s", "--budget", "1h", "--json")
    assert result.exit_code == 0 and result.stdout.count("\n") == 1
    assert (json.loads(result.stdout)["done"], json.loads(result.stdout)["ended"]) == (2, "done")
    assert "2/2 a " in result.stderr and "finished" in result.stderr
    assert "2 of 2 jobs done, 0 failed, 0 running, 0 missing" in call("sweep", "status", tmp_path / "s").stdout


def test_failed_jobs_are_exit_code_1_and_a_retry_plans_them_again(tmp_path):
    plan = plan_file(tmp_path, "axes: {what: [fine, bug, bad]}\n")
    result = call("sweep", "run", plan, "--out", tmp_path / "s", "--json")
    assert result.exit_code == 1 and json.loads(result.stdout)["failed_by_class"]["error"] == 1
    assert "error: 2 of 3 jobs failed (1 bad input, 1 error)" in result.stderr
    shown = call("sweep", "status", tmp_path / "s").stdout
    assert "1 of 3 jobs done, 2 failed (1 bad input, 1 error)" in shown and "error: ZeroDivisionError" in shown
    result = call("sweep", "retry", tmp_path / "s", "--class", "bad input")
    assert result.exit_code == 0 and result.stdout.startswith("1 jobs are planned again")
    assert json.loads(call("sweep", "status", tmp_path / "s", "--json").stdout)["missing"] == 1


def test_an_interrupted_sweep_is_exit_code_130_and_says_how_to_go_on(tmp_path):
    plan = plan_file(tmp_path, "base: {what: interrupt}\n")
    result = call("sweep", "run", plan, "--out", tmp_path / "s")
    assert result.exit_code == 130 and "run the same command again to go on" in result.stderr


def test_bad_input_is_exit_code_2_and_one_line(tmp_path):
    plan = plan_file(tmp_path, "axes: {b: [7]}\n")
    for arguments, said in (
        (("run", plan, "--out", tmp_path / "s"), "axis 'b', value 7: b must be less than or equal to 1, got 7"),
        (("plan", tmp_path / "none.yaml"), "none.yaml"),
        (("status", tmp_path), "is not a sweep"),
        (("retry", tmp_path), "is not a sweep"),
    ):
        result = call("sweep", *arguments)
        assert result.exit_code == 2 and said in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "s").exists()


def test_a_budget_that_is_no_time_is_refused_before_a_folder_is_made(tmp_path):
    result = call("sweep", "run", plan_file(tmp_path, ""), "--out", tmp_path / "s", "--budget", "soon")
    assert result.exit_code == 2 and "budget must be a time above 0" in result.stderr
    assert not (tmp_path / "s").exists()


def test_the_quick_test_does_the_whole_chain_and_keeps_nothing_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    result = call("quick-test")
    assert result.exit_code == 0, result.output
    assert "OK     every checked fact holds in 3 runs" in result.stdout and "sparse_to_sparse" in result.stdout
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("nbhelpers-")]


def test_the_quick_test_fails_where_a_fact_does(tmp_path, monkeypatch):
    from nbhelpers import masks

    monkeypatch.setattr(masks, "apply", lambda model, mask: None)
    from nbhelpers import sparse_lora

    monkeypatch.setattr(sparse_lora, "zero", lambda model: None)
    result = call("quick-test", "--json", "--out", tmp_path / "kept")
    assert result.exit_code == 1 and "a checked fact does not hold" in result.stderr
    assert (tmp_path / "kept" / "plan.json").exists()
