"""Is a job the same exactly where the computation is, and does a fine-tuning job go on where it was killed?"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nbhelpers import generated, grid, jobkinds, runtime, sweep
from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment
from nbhelpers.ledger import Ledger
from nbhelpers.records import sha256_file, write_json
from nbhelpers.runs import read_run

ROOT = Path(__file__).resolve().parent.parent
QUICK = {"model": "tiny-gpt2", "window": 32, "evaluation_windows": 4, "batch_size": 2, "sample_tokens": 2}
QUICK |= {"device": "cpu", "steps": 4, "samples": False}


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


def ids(*configs: dict) -> int:
    """How many different jobs."""
    plans = [grid.read_plan({"kind": "fine_tuning", "base": config}) for config in configs]
    return len({next(iter(grid.expand(plan).jobs)) for plan in plans})


# ------------------------------------------------------------------------------------------------ which job is the same


def test_fine_tunings_that_mean_the_same_computation_are_one_job():
    assert ids({}, {"learning_rate": 5e-5}, {"lora_rank": 4}, {"lora_alpha": 8.0}, {"name": "other"}) == 1
    assert ids({}, {"micro_batch_size": 2}, {"checkpoint_every": None}) == 1
    assert ids({"method": "lora"}, {"method": "lora", "learning_rate": 2e-4}) == 1
    assert ids({"steps": 3, "validations": 4}, {"steps": 3, "validations": 3}) == 1


def test_fine_tunings_that_mean_another_computation_are_other_jobs():
    others = [{"method": "lora"}, {"method": "lora", "lora_rank": 4}, {"steps": 7}, {"seed": 1}, {"packing": False}]
    others += [{"validations": 2}, {"batch_size": 4}, {"control": "tiny-opt"}, {"data": "bundled-instructions"}]
    assert ids({}, *others) == 1 + len(others)


def test_other_data_or_another_model_or_control_in_the_same_place_is_another_job(tmp_path):
    path, model = tmp_path / "t.txt", tmp_path / "m"
    model.mkdir()
    found = set()
    for content in ("one", "another"):
        path.write_text(content)
        write_json(model / "config.json", {"is": content})
        for config in ({"data": str(path)}, {"model": str(model)}, {"control": str(model)}):
            found |= grid.expand(grid.read_plan({"kind": "fine_tuning", "base": config})).jobs.keys()
    assert len(found) == 6


def test_the_bundled_grid_is_six_jobs_because_a_rank_means_nothing_to_full_fine_tuning():
    expansion = grid.expand(grid.read_plan(ROOT / "plans" / "fine_tuning_grid.yaml"))
    assert (len(expansion.rows), len(expansion.jobs), expansion.aliases) == (8, 6, 2)


@pytest.mark.parametrize("path", sorted((ROOT / "plans").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_bundled_plan_can_be_planned_and_its_time_is_known(path):
    found = sweep.preview(path)
    if path.stem == "sparsity_7b":  # its rows and models are on the hub
        assert (found["jobs"], found["not_estimated"], found["estimated_hours"]) == (330, 330, None)
        ((why, jobs),) = found["why_not_estimated"].items()
        assert jobs == 330 and "--calibrate on the machine that will do it" in why
        assert list(found["price"]["downloads"].values()) == [13_476_835_328, 14_483_464_192]
        assert found["price"]["disk_bytes"] > 10 * 6_476_005_376 / 2, "ten sets of masks at 4 bits a weight"
        return
    assert found["jobs"] > 0 == found["not_estimated"] and 0 < found["estimated_hours"] < 3


def test_a_plan_whose_rows_are_in_a_file_that_is_not_there_or_cannot_be_used_is_refused(tmp_path):
    rows, broken = tmp_path / "rows.jsonl", tmp_path / "broken.jsonl"
    rows.write_text('{"passage": "Rain is wet.", "question": "is rain wet", "label": 1}\n')
    broken.write_text('{"passage": "Rain is wet."}\n')
    for kind, values, said in (
        ("sparsity", {"data": tmp_path / "no.jsonl"}, "data: file .*no.jsonl' does not exist"),
        ("sparsity", {"data": rows, "train_data": tmp_path / "no.csv"}, "train_data: file .*no.csv' does not exist"),
        ("sparsity", {"data": rows}, "name a file of training rows as train_data"),
        ("sparsity", {"data": rows, "train_data": broken}, "broken.jsonl.*question"),
        ("evaluation", {"data": tmp_path / "no.jsonl"}, "data: file .*no.jsonl' does not exist"),
        ("evaluation", {"data": rows, "shots": 1, "shots_data": tmp_path / "no"}, "shots_data: file .*no' does not"),
    ):
        base = {"task": "boolq", "model": "tiny-llama"} | {k: v if k == "shots" else str(v) for k, v in values.items()}
        with pytest.raises((LookupError, ValueError), match=said):
            sweep.preview({"kind": kind, "base": base, "axes": {"seed" if kind == "sparsity" else "limit": [1, 2]}})
    offline = {"kind": "evaluation", "base": {"task": "boolq", "model": "tiny-llama", "data": None}}
    assert sweep.preview(offline)["jobs"] == 1, "rows of the hub are not looked at"


def test_why_jobs_are_not_estimated_is_said_in_words_with_their_number():
    elsewhere = next(device for device in ("cuda", "mps") if device != runtime.device())
    base = {"task": "boolq", "limit": 4, "device": elsewhere}
    found = sweep.preview({"kind": "sparsity", "base": base, "axes": {"sparsity": [0, 0.5]}})
    ((why, jobs),) = found["why_not_estimated"].items()
    assert jobs == 2 == found["not_estimated"] and f"device '{elsewhere}' is not on this machine" in why
    found = sweep.preview({"kind": "evaluation", "base": {"model": "tiny-llama", "task": "boolq"}})
    assert found["why_not_estimated"] == {sweep.UNKNOWN: 1} and found["notes"] == []


def test_columns_of_stages_that_were_not_run_are_empty_not_zero():
    found = jobkinds.fine_tuning_columns({"baseline": {"perplexity": 4.0}, "control": None, "best_step": 0})
    assert (found["baseline_perplexity"], found["fine_tuned_perplexity"], found["best_step"]) == (4.0, None, 0)


def test_validations_on_the_way_are_heard_but_not_the_last_one():
    now = {"stage": "training fine_tuned", "step": 2, "steps": 4, "validation_nll": 1.5}
    heard = jobkinds.KINDS["fine_tuning"]().heard
    assert heard(now) == (2, 1.5)
    others = [{"step": 4}, {"validation_nll": None}, {"stage": "training control"}]
    assert [heard(now | other) for other in others] == [None] * 3 == [heard({"stage": s}) for s in ("saving", "x", "")]


# ------------------------------------------------------------------------------------------------ the jobs are done


def test_a_cell_is_the_run_that_its_config_gives_by_itself(text, tmp_path):
    plan = {"kind": "fine_tuning", "base": QUICK | {"data": text}, "axes": {"method": ["full", "lora"]}}
    plan["axes"]["lora_rank"] = [2, 4]
    found = sweep.run(plan, tmp_path / "g")
    assert (found["rows"], found["done"], found["aliases"], found["failed"]) == (4, 3, 1, 0)
    rows = {(row["method"], row["lora_rank"]): row for row in sweep.results(tmp_path / "g")}
    alone = FineTuningExperiment.run(FineTuningConfig(**QUICK, data=text, method="lora"), run_dir=tmp_path / "run")
    assert rows["lora", 2]["trainable_parameters"] * 2 == rows["lora", 4]["trainable_parameters"]
    assert rows["full", 2]["job"] == rows["full", 4]["job"] and rows["full", 4]["alias"]
    assert rows["lora", 2]["baseline_perplexity"] == alone["baseline"]["perplexity"]


def test_a_job_that_was_stopped_goes_on_from_its_checkpoint_in_the_same_run_directory(text, tmp_path):
    plan = {"kind": "fine_tuning", "base": QUICK | {"data": text, "checkpoint_every": 1, "learning_rate": 1e-3}}
    made = []

    def hear(now: dict) -> None:
        made.append(now.get("step", 0))

    found = sweep.run(plan, tmp_path / "g", progress=hear, should_stop=lambda: bool(made) and max(made) >= 2)
    assert (found["ended"], found["interrupted"]) == ("stopped", 1)
    assert sweep.run(plan, tmp_path / "g")["done"] == 1
    (run_dir,) = (tmp_path / "g" / "runs").iterdir()
    run = read_run(run_dir)
    assert [event["step"] for event in run.events if event["kind"] == "resume"] == [2]
    assert len(run.manifest["attempts"]) == 2 and run.curve("train_loss", "fine_tuned")[0] == [1, 2, 3, 4]
    straight = FineTuningExperiment.run(FineTuningConfig(**plan["base"]), run_dir=tmp_path / "straight")
    assert run.result["fine_tuned"]["nll"] == pytest.approx(straight["fine_tuned"]["nll"], abs=1e-6)


def test_a_job_that_failed_and_is_retried_begins_anew_beside_its_first_try(tmp_path):
    plan = {"kind": "fine_tuning", "base": {"model": "no-model"}}
    sweep.run(plan, tmp_path / "g")
    assert len(sweep.retry(tmp_path / "g")) == 1 and sweep.run(plan, tmp_path / "g")["tried"] == 1
    assert len(list((tmp_path / "g" / "runs").iterdir())) == 2


@pytest.mark.slow
def test_a_job_whose_process_was_killed_goes_on_from_its_checkpoint(text, tmp_path):
    base = QUICK | {"data": text, "steps": 40, "checkpoint_every": 2}
    write_json(tmp_path / "plan.json", {"kind": "fine_tuning", "base": base})
    out = tmp_path / "g"
    command = [sys.executable, "-m", "nbhelpers", "sweep", "run", str(tmp_path / "plan.json"), "--out", str(out)]
    process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL)
    complete = "runs/*/artefacts/fine_tuned/checkpoint-*/COMPLETE"  # only the newest two of them stay
    while not any(int(path.parent.name.partition("-")[2]) >= 4 for path in out.glob(complete)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sweep.run(tmp_path / "plan.json", out)["done"] == 1
    (run_dir,) = (out / "runs").iterdir()
    run = read_run(run_dir)
    assert run.curve("train_loss", "fine_tuned")[0] == list(range(1, 41)) and len(run.manifest["attempts"]) == 2
    assert next(event["step"] for event in run.events if event["kind"] == "resume") >= 4


# ------------------------------------------------------------------------------------------------ a real search


def test_a_search_over_real_fine_tunings_stops_those_that_are_behind_and_names_the_best(text, tmp_path):
    pytest.importorskip("optuna")
    space = {"learning_rate": {"low": 1e-5, "high": 1e-1, "log": True}, "lora_rank": {"choices": [2, 4]}}
    section = {"metric": "fine_tuned_perplexity", "direction": "minimize", "trials": 5, "space": space, "seed": 1}
    section |= {"startup_trials": 3, "pruner": "successive_halving", "first_rung": 2, "reduction_factor": 2}
    plan = {"kind": "fine_tuning", "base": QUICK | {"data": text, "method": "lora"}, "search": section}
    found = sweep.run(plan, tmp_path / "s")
    assert (found["failed"], found["missing"]) == (0, 0) and found["pruned"] >= 1 and found["done"] >= 1
    best = sweep.status(tmp_path / "s")["best"]
    ended = [row["fine_tuned_perplexity"] for row in sweep.results(tmp_path / "s") if row["status"] == "finished"]
    assert best["value"] == min(ended) and best["values"].keys() == space.keys()
    stopped = [state.run_dir for state in Ledger(tmp_path / "s").states().values() if state.status == "pruned"]
    for run in map(read_run, stopped):
        assert run.curve("train_loss", "fine_tuned")[0] == [1, 2] and run.result is None
    assert sweep.run(plan, tmp_path / "s")["tried"] == 0


# ------------------------------------------------------------------------------------------------ evaluations


def test_a_plan_of_evaluations_gives_a_row_of_measures_for_each_model_and_task(tmp_path):
    values = {
        "kind": "evaluation",
        "base": {"data": "bundled", "limit": 3, "device": "cpu"},
        "axes": {"model": ["tiny-gpt2"], "task": ["boolq", "perplexity"]},
    }
    found = sweep.run(values, tmp_path / "s")
    assert (found["done"], found["failed"]) == (2, 0)
    runs = [read_run(folder) for folder in sorted((tmp_path / "s" / "runs").iterdir()) if folder.name[0] != "."]
    rows = {run.result["task"]: jobkinds.evaluation_columns(run.result) for run in runs}
    assert rows["boolq"]["n"] == 3 and 0 <= rows["boolq"]["acc_low"] <= rows["boolq"]["acc"] <= 1
    assert (
        rows["perplexity"]["perplexity_low"] < rows["perplexity"]["perplexity"] < rows["perplexity"]["perplexity_high"]
    )
    assert "acc" not in rows["perplexity"]


def test_an_evaluation_of_other_rows_or_another_precision_is_another_job(tmp_path):
    def jobs(*configs: dict) -> int:
        plans = [grid.read_plan({"kind": "evaluation", "base": config}) for config in configs]
        return len({next(iter(grid.expand(plan).jobs)) for plan in plans})

    assert jobs({}, {"name": "other"}, {"batch_tokens": 10}, {"cache": False}) == 1
    others = [{"task": "hellaswag"}, {"limit": 3}, {"dtype": "bfloat16"}, {"shots": 1}, {"data": "bundled"}]
    assert jobs({}, *others) == 1 + len(others)


def test_an_evaluation_with_other_masks_in_the_same_place_is_another_job(tmp_path):
    place, found = tmp_path / "masks", set()
    place.mkdir()
    for content in (b"one", b"another"):
        (place / "masks.safetensors").write_bytes(content)
        for masks in (place, place / "masks.safetensors"):
            expansion = grid.expand(grid.read_plan({"kind": "evaluation", "base": {"masks": str(masks)}}))
            (job,) = expansion.jobs.values()
            told = expansion.kind.fingerprint(expansion.kind.config(**job.config))["masks"]
            assert told == sha256_file(place / "masks.safetensors")
            found.add(job.id)
    assert len(found) == 4


@pytest.mark.parametrize("kind", ["sparsity", "fine_tuning"])
def test_a_scope_makes_another_job_but_for_pattern_nm_which_has_none(kind):
    def jobs(pattern: str) -> int:
        base = {"pattern": pattern, "sparsity": 0.5} | ({"method": "sparse_lora"} if kind == "fine_tuning" else {})
        plan = {"kind": kind, "base": base, "axes": {"scope": ["layer", "row", "global"]}}
        return len(grid.expand(grid.read_plan(plan)).jobs)

    assert (jobs("unstructured"), jobs("nm")) == (3, 1)
