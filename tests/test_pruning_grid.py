"""Does the grid of pruning runs hold what single runs would, and where did each control come from?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbhelpers import generated, grid, jobkinds, pruning_grid, sweep
from nbhelpers.experiments import PruningConfig, PruningExperiment
from nbhelpers.pruning_grid import PruningFineTuningExperiment
from nbhelpers.records import write_json
from nbhelpers.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"window": 32, "scoring_windows": 2, "evaluation_windows": 4, "batch_size": 2, "sample_tokens": 2}
QUICK |= {"device": "cpu", "steps": 1}
SMALL = {"models": ["tiny-llama"], "strategies": ["random"], "levels": [0.5]}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


@pytest.fixture(scope="session")
def shared(text, tmp_path_factory) -> PruningFineTuningExperiment:
    """One model, one strategy, one level, with one shared control."""
    folder = tmp_path_factory.mktemp("grid") / "g"
    experiment = PruningFineTuningExperiment(folder, **SMALL, base=QUICK | {"text": text}, shared_control=True)
    experiment.run()
    return experiment


# ------------------------------------------------------------------------------------------------ the grid


def test_a_grid_has_a_row_for_every_model_strategy_level_seed_and_further_axis(tmp_path):
    experiment = PruningFineTuningExperiment(
        tmp_path, models=["tiny-gpt2", "tiny-llama"], strategies=["random", "gradient"], levels=[0.1, 0.3, 0.5],
        seeds=[0, 1], learning_rate=[1e-4, 1e-3],
    )  # fmt: skip
    assert len(grid.expand(experiment.plan).jobs) == 2 * 2 * 3 * 2 * 2


def test_the_bundled_plan_is_the_48_jobs_of_two_models_four_strategies_three_levels_and_two_seeds():
    expansion = grid.expand(grid.read_plan(ROOT / "plans" / "pruning_grid.yaml"))
    assert (len(expansion.jobs), expansion.aliases) == (48, 0)
    assert [len(values) for values in expansion.plan.all_axes().values()] == [2, 4, 3, 2]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"strategies": ["wnada"]}, "axis 'strategy', value 'wnada': unknown strategy 'wnada'"),
        ({"levels": [1.5]}, "axis 'level', value 1.5: level must be less than or equal to 1"),
        ({"learning_rat": [1]}, "unknown field 'learning_rat'. Did you mean 'learning_rate'"),
        ({"models": []}, "axis 'model' has no values"),
        ({"level": [0.1]}, "unknown axis 'level'. Did you mean 'levels'"),
        ({"shared_control": True, "base": {"control": True}}, "shared_control takes the place of a control"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said_before_anything_runs(changes, said, tmp_path):
    with pytest.raises((ValueError, LookupError), match=said):
        PruningFineTuningExperiment(tmp_path, **SMALL | changes)


# ------------------------------------------------------------------------------------------------ which job is the same


def ids(*configs: dict) -> int:
    """How many different jobs."""
    return len({next(iter(grid.expand(grid.read_plan({"kind": "pruning", "base": c})).jobs)) for c in configs})


def test_values_that_mean_the_same_computation_are_one_job():
    assert ids({}, {"learning_rate": 5e-4}, {"heads_per_round": 3}, {"name": "other"}) == 1
    assert ids({"steps": 0}, {"steps": 0, "method": "lora"}, {"steps": 0, "control": False}) == 1


def test_values_that_mean_another_computation_are_other_jobs():
    assert ids({}, {"learning_rate": 1e-3}, {"steps": 0}, {"iterative": True}, {"control": False}, {"seed": 1}) == 6
    assert ids({"iterative": True}, {"iterative": True, "heads_per_round": 3}) == 2


def test_another_text_or_model_in_the_same_place_is_another_job(tmp_path):
    path, model = tmp_path / "t.txt", tmp_path / "m"
    model.mkdir()
    found = set()
    for content in ("one", "another"):
        path.write_text(content)
        write_json(model / "config.json", {"is": content})
        for config in ({"text": str(path)}, {"model": str(model)}):
            found |= grid.expand(grid.read_plan({"kind": "pruning", "base": config})).jobs.keys()
    assert len(found) == 4


def test_a_model_that_does_not_exist_fails_as_a_job_and_the_others_are_done(text, tmp_path):
    base = QUICK | {"text": text, "steps": 0}
    experiment = PruningFineTuningExperiment(
        tmp_path / "g", **SMALL | {"models": ["no-model", "tiny-llama"]}, base=base
    )
    found = experiment.run()
    assert (found["done"], found["failed_by_class"]["bad input"]) == (1, 1)
    (failed,) = [job for job in experiment.status()["jobs"] if job["failure"]]
    assert "unknown model 'no-model'" in failed["error"] and read_run(failed["run_dir"]).status == "failed"


# ------------------------------------------------------------------------------------------------ results, controls


def test_a_cell_of_the_grid_is_the_run_that_its_config_gives_by_itself(shared, text, tmp_path):
    (row,) = [row for row in shared.results() if row["level"] == 0.5]
    config = PruningConfig(model="tiny-llama", strategy="random", level=0.5, control=True, text=text, **QUICK)
    alone = PruningExperiment.run(config, run_dir=tmp_path / "run")
    for stage in ("baseline", "pruned", "fine_tuned"):
        assert row[f"{stage}_perplexity"] == alone[stage]["perplexity"]
    assert row["control_perplexity"] == alone["control"]["perplexity"]  # of the level-0 run: the very same training


def test_a_shared_control_names_the_job_it_came_from(shared):
    rows = {row["level"]: row for row in shared.results()}
    assert rows.keys() == {0.0, 0.5}
    assert rows[0.5]["control_from"] == rows[0.0]["job"] != rows[0.5]["job"]
    assert rows[0.5]["control_perplexity"] == rows[0.0]["fine_tuned_perplexity"]


def test_a_control_is_only_shared_by_runs_with_the_same_training(monkeypatch, tmp_path):
    def row(job, level, tuned):
        return {"job": job, "level": level, "status": "finished", "fine_tuned_perplexity": tuned}

    configs = {"z": (0.0, 0), "same": (0.5, 0), "other seed": (0.5, 1)}
    jobs = {k: grid.Job(k, k, {"level": lv, "seed": s, "strategy": k}, {}) for k, (lv, s) in configs.items()}
    monkeypatch.setattr(sweep, "results", lambda folder: [row(k, lv, 7.0) for k, (lv, _) in configs.items()])
    monkeypatch.setattr(pruning_grid, "Ledger", lambda folder: type("L", (), {"jobs": jobs}))
    found = {row["job"]: row.get("control_from") for row in pruning_grid.with_shared_controls(tmp_path)}
    assert found == {"z": "z", "same": "z", "other seed": None}


def test_the_columns_of_a_run_without_fine_tuning_are_empty_not_zero():
    found = jobkinds.pruning_columns(
        {"baseline": {"perplexity": 4.0}, "pruned": {"perplexity": 8.0}, "pruned_heads": []}
    )
    assert (found["baseline_perplexity"], found["fine_tuned_perplexity"], found["recovery_percent"]) == (
        4.0,
        None,
        None,
    )
    assert found["pruned_heads"] == 0


# ------------------------------------------------------------------------------------------------ killed twice


@pytest.mark.slow
def test_the_grid_of_48_runs_killed_twice_ends_with_48_results_none_twice(text, tmp_path):
    plan = grid.read_plan(ROOT / "plans" / "pruning_grid.yaml").model_dump()
    plan["base"] |= QUICK | {"text": text}
    write_json(tmp_path / "plan.json", plan)
    out = tmp_path / "grid"
    command = [sys.executable, "-m", "nbhelpers", "sweep", "run", str(tmp_path / "plan.json"), "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for wanted in (3, 20):  # killed in the middle of the job after the 3rd and after the 20th
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while len(list(out.glob("runs/*/result.json"))) < wanted or len(list(out.glob("runs/*/log.txt"))) <= wanted:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    found = sweep.run(plan, out)
    assert (found["planned"], found["done"], found["failed"], found["missing"]) == (48, 48, 0, 0)
    finished = [path.parent.name.partition("-")[0] for path in out.glob("runs/*/result.json")]
    assert len(finished) == 48 == len(set(finished))
    assert len({(r["model"], r["strategy"], r["level"], r["seed"]) for r in sweep.results(out)}) == 48
