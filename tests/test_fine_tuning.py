"""Does a fine-tuning run do what it says, refuse what it cannot do, and survive a kill?"""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from nbhelpers import attention, evaluate, generated, models, packing
from nbhelpers.commands_training import show_fine_tuning
from nbhelpers.estimates import megabytes
from nbhelpers.fine_tuning import FineTuningConfig, FineTuningExperiment, improvement, required_memory, verdict
from nbhelpers.linefile import LineFile
from nbhelpers.records import read_json
from nbhelpers.runs import read_run
from nbhelpers.tracking import Interrupted

QUICK = {"window": 32, "evaluation_windows": 8, "batch_size": 2, "sample_tokens": 4, "device": "cpu", "steps": 4}

MASKED = ({"method": "sparse_lora"}, {"method": "full", "sparsity": 0.5})
FEW = r"calibration_rows must be at most the \d+ training rows there are, got 1000"


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    """Forty generated documents, a row each."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


def config(text: str, **changes) -> FineTuningConfig:
    return FineTuningConfig(**{"model": "tiny-gpt2", "data": text, **QUICK, **changes})


def asked(result: dict) -> dict:
    """The config of a run, from its record."""
    recorded = read_run(result["run_dir"]).config
    return {name: value for name, value in recorded.items() if name in FineTuningConfig.model_fields}


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory) -> dict:
    """A run on a pruned model, with the whole model as control."""
    folder = tmp_path_factory.mktemp("whole")
    loaded = models.load_model("tiny-gpt2", device="cpu")
    attention.close_heads(loaded.model, [(0, 1), (3, 2)])
    models.save_model(loaded.model, loaded.tokenizer, folder / "pruned")
    settings = config(text, model=str(folder / "pruned"), control="tiny-gpt2", learning_rate=1e-3)
    return FineTuningExperiment.run(settings, run_dir=folder / "run", estimated_seconds=123.0)


def test_every_fact_of_an_honest_run_holds(whole):
    assert whole["all_facts_hold"], whole["facts"]
    assert {fact["name"] for fact in whole["facts"]} == {
        "test_text_was_not_trained_on",
        "loss_is_the_models_own",
        "closed_heads_add_nothing_after_fine_tuning",
        "reloaded_model_is_the_same",
        "plain_transformers_computes_the_same",
        "control_had_the_same_budget",
    }


def test_closed_heads_stay_closed_through_fine_tuning_and_saving(whole):
    loaded = models.load_model(whole["model_dir"])
    assert attention.closed_heads(loaded.model) == [(0, 1), (3, 2)]


def test_the_model_was_trained_and_the_numbers_are_those_of_its_record(whole):
    record = read_json(Path(whole["run_dir"]) / "artefacts" / "training_fine_tuned.json")
    assert whole["steps"] == record["steps"] == len(record["train_losses"]) == 4
    assert whole["best_step"] == record["best_step"] and whole["skipped_steps"] == 0
    assert whole["improvement_percent"] == pytest.approx(
        100 * (1 - whole["fine_tuned"]["perplexity"] / whole["baseline"]["perplexity"])
    )
    assert whole["memory"]["resident_peak_bytes"] > 1e8 and whole["tokens_per_second"] > 0


def test_estimates_stand_beside_what_was_measured(whole):
    used = whole["memory"]
    assert used["estimated_bytes"] == required_memory(FineTuningConfig(**asked(whole))).total > 0
    assert used["estimated"].endswith(megabytes(used["estimated_bytes"]))
    assert whole["time"]["estimated_seconds"] == 123.0 and whole["time"]["seconds"] > 0
    shown = show_fine_tuning(whole)
    assert f"estimated without libraries: {megabytes(used['estimated_bytes'])}" in shown
    assert "(estimated: 2 min)" in shown
    unknown = show_fine_tuning(whole | {"time": {"estimated_seconds": None, "seconds": 1.0}})
    assert "time: 1 s (estimated: not known before)" in unknown


def test_samples_are_written_at_each_validation_unless_they_are_switched_off(whole, text, tmp_path):
    run = read_run(whole["run_dir"])
    samples = [event for event in run.events if event["kind"] == "sample"]
    assert [(event["stage"], event["step"]) for event in samples] == [("fine_tuned", step) for step in range(5)]
    assert all(event["text"] for event in samples)
    silent = FineTuningExperiment.run(config(text, samples=False, steps=1), run_dir=tmp_path / "run")
    assert not [event for event in read_run(silent["run_dir"]).events if event["kind"] == "sample"]


def test_packing_reaches_the_training_and_the_result_says_so(whole, text, tmp_path):
    off = FineTuningExperiment.run(config(text, packing=False, steps=1), run_dir=tmp_path / "run")
    assert (whole["packing"], off["packing"]) == ("on", "off: not asked for")


def test_lora_trains_few_parameters_and_is_merged(text, tmp_path):
    result = FineTuningExperiment.run(config(text, method="lora", lora_rank=2), run_dir=tmp_path / "run")
    assert result["all_facts_hold"] and result["trainable_parameters"] < result["parameters"] / 10
    names = models.load_model(result["model_dir"]).model.state_dict()
    assert not any("lora" in name for name in names)


def test_prompts_are_not_in_the_loss_and_a_fact_says_so(tmp_path):
    rows = [{"prompt": f"Question {n}: what is {n} and 1? Answer:", "completion": f" {n + 1}"} for n in range(30)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = FineTuningExperiment.run(config(str(path), steps=1), run_dir=tmp_path / "run")
    assert "loss_is_on_the_completion_alone" in {fact["name"] for fact in result["facts"] if fact["ok"]}


def test_a_mask_through_which_rows_see_each_other_makes_the_run_a_violation(text, tmp_path, monkeypatch):
    """Saboteur: packing as it is done elsewhere, rows one after another under one causal mask."""
    collate = packing.collate

    def careless(sequences, device="cpu"):
        batch = collate(sequences, device)
        if batch["attention_mask"].ndim == 4:
            length = batch["input_ids"].shape[1]
            batch["attention_mask"] = (
                torch.ones(length, length, dtype=torch.bool).tril().expand_as(batch["attention_mask"])
            )
        return batch

    monkeypatch.setattr(packing, "collate", careless)
    result = FineTuningExperiment.run(config(text, steps=1), run_dir=tmp_path / "run")
    assert not result["all_facts_hold"]
    assert {fact["name"] for fact in result["facts"] if not fact["ok"]} == {"loss_is_the_models_own"}


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"model": "tiny-gtp2"}, LookupError, "Did you mean 'tiny-gpt2'"),
        ({"data": "nothing.jsonl"}, LookupError, "'nothing.jsonl' does not exist"),
        ({"window": 5000}, ValueError, "at most the model's 256 positions"),
        *(({"importance": "wanda", "calibration_rows": 1000} | how, ValueError, FEW) for how in MASKED),
    ],
)
def test_what_cannot_run_is_said_before_a_run_directory_exists(changes, error, message, text, tmp_path):
    with pytest.raises(error, match=message):
        FineTuningExperiment.run(config(text, **changes), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_control_that_counts_other_tokens_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "tokenizer_fingerprint", id)
    with pytest.raises(ValueError, match="has another tokenizer"):
        FineTuningExperiment.run(config(text, control="tiny-opt"), run_dir=tmp_path / "run")


@pytest.mark.parametrize(
    "changes, message",
    [({"steps": 0}, "greater than or equal to 1"), ({"stepz": 3}, "stepz"), ({"method": "x"}, "full")],
)
def test_nonsense_is_refused_at_birth(changes, message, text):
    with pytest.raises(ValueError, match=message):
        config(text, **changes)
    with pytest.raises(ValueError, match="micro_batch_size must be at most batch_size 2"):
        config(text, micro_batch_size=3)


def test_validations_are_spread_over_the_steps(text):
    assert config(text, steps=100, validations=4).training().eval_every == 25
    assert config(text, steps=3, validations=4).training().eval_every == 1


def test_a_stopped_run_is_interrupted_and_goes_on_where_it_stopped(text, tmp_path):
    settings, seen = config(text, checkpoint_every=1), []
    with pytest.raises(Interrupted, match="stopped in step 2 of 4"):
        FineTuningExperiment.run(
            settings, run_dir=tmp_path / "run", progress=seen.append, should_stop=lambda: made(seen) >= 2
        )
    assert read_run(tmp_path / "run").status == "interrupted"
    resumed = FineTuningExperiment.run(settings, run_dir=tmp_path / "run", resume=True)
    straight = FineTuningExperiment.run(settings, run_dir=tmp_path / "straight")
    assert resumed["fine_tuned"]["nll"] == pytest.approx(straight["fine_tuned"]["nll"], abs=1e-6)


def made(seen: list[dict]) -> int:
    return max((now.get("step", 0) for now in seen), default=0)


def test_another_config_cannot_go_on_in_a_run(text, tmp_path):
    with pytest.raises(Interrupted):
        FineTuningExperiment.run(config(text), run_dir=tmp_path / "run", should_stop=lambda: True)
    with pytest.raises(ValueError, match="cannot change on resume"):
        FineTuningExperiment.run(config(text, seed=1), run_dir=tmp_path / "run", resume=True)


KILLED = {"steps": 8, "checkpoint_every": 2, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def straight(text, tmp_path_factory) -> dict:
    """The run that the killed ones shall end like."""
    return FineTuningExperiment.run(config(text, **KILLED), run_dir=tmp_path_factory.mktemp("straight") / "run")


@pytest.mark.parametrize("seed", [7, pytest.param(0, marks=pytest.mark.slow), pytest.param(5, marks=pytest.mark.slow)])
def test_a_run_killed_at_a_random_moment_ends_as_if_it_had_not_been_and_shows_each_step_once(
    seed, text, straight, tmp_path
):
    """Killed at once or a little after a step whose number the seed draws; `make soak` kills twenty times."""
    drawn, run = random.Random(seed), tmp_path / "run"
    after, wait = drawn.randint(1, 7), drawn.uniform(0, 0.05)
    options = QUICK | KILLED | {"model": "tiny-gpt2", "data": text, "out": str(run)}
    arguments = [sys.executable, "-m", "nbhelpers", "finetune", "--json"]
    arguments += [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    started = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while not (run / "metrics.jsonl").is_file() or f'"iteration":{after}' not in (
        (run / "metrics.jsonl").read_text().replace(" ", "")
    ):
        assert started.poll() is None and time.monotonic() < give_up
        time.sleep(0.01)
    time.sleep(wait)
    os.kill(started.pid, signal.SIGKILL)
    started.wait()
    done = subprocess.run([*arguments, "--resume"], capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    resumed = json.loads(done.stdout.splitlines()[-1])
    assert resumed["fine_tuned"]["nll"] == pytest.approx(straight["fine_tuned"]["nll"], abs=1e-5)
    steps, losses = read_run(run).curve("train_loss", "fine_tuned")
    assert steps == list(range(1, 9)) and len(read_run(run).manifest["attempts"]) == 2
    assert losses == pytest.approx(read_run(straight["run_dir"]).curve("train_loss", "fine_tuned")[1], abs=1e-6)


def test_a_disk_that_is_full_in_the_middle_of_a_training_fails_the_run_and_it_goes_on_when_there_is_room(
    text, straight, tmp_path, monkeypatch
):
    append = LineFile.append

    def full(self, row):
        if row["iteration"] == 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return append(self, row)

    monkeypatch.setattr(LineFile, "append", full)
    with pytest.raises(OSError, match="No space left"):
        FineTuningExperiment.run(config(text, **KILLED), run_dir=tmp_path / "run")
    monkeypatch.undo()
    assert read_run(tmp_path / "run").status == "failed"
    resumed = FineTuningExperiment.run(config(text, **KILLED), run_dir=tmp_path / "run", resume=True)
    assert resumed["fine_tuned"]["nll"] == pytest.approx(straight["fine_tuned"]["nll"], abs=1e-5)
    assert read_run(tmp_path / "run").curve("train_loss", "fine_tuned")[0] == list(range(1, 9))


def test_weights_that_are_saved_wrong_are_seen(text, tmp_path, monkeypatch):
    saved = models.save_model

    def spoil(model, tokenizer, folder):
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(1.5)
        return saved(model, tokenizer, folder)

    monkeypatch.setattr(models, "save_model", spoil)
    result = FineTuningExperiment.run(config(text, steps=1), run_dir=tmp_path / "run")
    assert not result["all_facts_hold"]
    assert {f["name"] for f in result["facts"] if not f["ok"]} >= {"reloaded_model_is_the_same"}


def test_improvement_and_verdict_are_those_of_a_pencil():
    found = {"baseline": 10.0, "fine_tuned": 8.0}
    assert improvement(found) == pytest.approx(20.0)
    assert verdict(found, None) == "Fine-tuning took perplexity from 10.0 to 8.00 (-20.0 %)."
    assert "not better than big, which reaches 7.00" in verdict({**found, "control": 7.0}, "big")


def test_where_no_step_was_better_the_verdict_says_that_the_start_was_kept():
    found = {"baseline": 10.0, "fine_tuned": 10.0}
    assert "whose weights were kept (10.0)" in verdict(found, None, kept_start=True)


def test_the_fine_tuned_perplexity_is_that_of_the_saved_model(whole, text):
    loaded = models.load_model(whole["model_dir"], device="cpu", dtype="stored")
    plan = FineTuningExperiment._check(config(text))
    again = evaluate.perplexity(loaded.model, plan[3]["test"][:8])
    assert again.nll == pytest.approx(whole["fine_tuned"]["nll"], rel=1e-5)
