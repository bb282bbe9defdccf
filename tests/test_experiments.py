"""Does a pruning run do what it says, and does it say FAILED when it does not?"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from nbhelpers import attention, data, evaluate, experiments, facts, generated, heads, models, records, training
from nbhelpers.experiments import PruningConfig, PruningExperiment
from nbhelpers.runs import read_run
from nbhelpers.tracking import Diverged, Interrupted

QUICK = {
    "window": 32,
    "scoring_windows": 4,
    "evaluation_windows": 8,
    "batch_size": 2,
    "sample_tokens": 4,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> str:
    """Forty generated documents, a row each."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in generated.documents(40, seed=90_000)))
    return str(path)


@pytest.fixture(scope="session")
def prompts(tmp_path_factory) -> str:
    """Thirty prompts with completions."""
    path = tmp_path_factory.mktemp("text") / "prompts.jsonl"
    rows = [{"prompt": f"Question {n}: what is {n} and 1? Answer:", "completion": f" {n + 1}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(text: str, **changes) -> PruningConfig:
    return PruningConfig(**{"model": "tiny-llama", "text": text, "steps": 2, "control": False, **QUICK, **changes})


@pytest.fixture(scope="session")
def whole(text, tmp_path_factory) -> dict:
    """One run with everything: gradient, fine-tuning, control, record."""
    return PruningExperiment.run(config(text, control=True), run_dir=tmp_path_factory.mktemp("whole") / "run")


def failed(result: dict) -> set[str]:
    return {fact["name"] for fact in result["facts"] if not fact["ok"]}


# ------------------------------------------------------------------------------------------------------- what a run is


def test_every_fact_of_an_honest_run_holds(whole):
    assert whole["all_facts_hold"] and failed(whole) == set()
    assert len(whole["facts"]) == 11


def test_the_result_holds_all_stages_and_the_heads_that_were_closed(whole):
    assert all(whole[stage]["perplexity"] > 1 for stage in ("baseline", "pruned", "fine_tuned", "control"))
    assert whole["pruned_heads"] == sorted(whole["pruned_heads"])
    assert len(whole["pruned_heads"]) == heads.count(0.3, whole["total_heads"])
    assert ("recovery_percent" in whole) != ("improvement_percent" in whole)


def test_a_run_without_remove_has_no_numbers_of_a_removal(whole):
    assert {whole[key] for key in experiments.REMOVAL_KEYS} == {None}
    assert not (Path(whole["model_dir"]) / "compact_heads.json").exists()


def test_the_record_on_disk_is_the_result(whole):
    run = read_run(whole["run_dir"])
    assert run.status == "finished" and run.result["facts"] == whole["facts"]
    assert run.config["strategy"] == "gradient" and run.config["level"] == 0.3
    assert set(run.manifest["fingerprints"]) == {"model", "tokenizer", "text"}
    assert {row.get("stage") for row in run.metrics} == {"fine_tuned", "control"}


def test_training_curves_of_pruned_model_and_control_have_every_step_once(whole):
    run = read_run(whole["run_dir"])
    for stage in ("fine_tuned", "control"):
        steps, losses = run.curve("train_loss", stage)
        assert steps == [1, 2] and all(loss > 0 for loss in losses)


def test_the_saved_model_generates_in_plain_transformers_as_it_does_here(whole):
    ours = models.load_model(whole["run_dir"], device="cpu", dtype="float32")
    plain = AutoModelForCausalLM.from_pretrained(whole["model_dir"])
    prompt = ours.tokenizer("Tom went to the", return_tensors="pt")["input_ids"]
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.model.generate(prompt, **options), plain.generate(prompt, **options))
    assert [list(head) for head in attention.closed_heads(ours.model)] == whole["pruned_heads"]


def test_the_pruned_perplexity_is_that_of_the_model_with_its_projections_zeroed_by_hand(whole, text):
    model = AutoModelForCausalLM.from_pretrained(models.BUNDLED / "tiny-llama")
    for layer, head in whole["pruned_heads"]:
        dim = model.config.head_dim
        with torch.no_grad():
            model.model.layers[layer].self_attn.o_proj.weight[:, head * dim : (head + 1) * dim] = 0
    tokenizer = models.load_tokenizer("tiny-llama")
    rows = data.rows(tokenizer, data.load_corpus(text).test, QUICK["window"])[: QUICK["evaluation_windows"]]
    assert evaluate.perplexity(model, rows).nll == pytest.approx(whole["pruned"]["nll"], rel=1e-5)


def test_the_same_config_gives_the_same_result_twice(text, tmp_path):
    first, second = (PruningExperiment.run(config(text), run_dir=tmp_path / name) for name in "ab")
    for key in ("baseline", "pruned", "fine_tuned", "pruned_heads", "samples", "scores"):
        assert first[key] == second[key]


def test_zero_steps_skip_fine_tuning_and_the_control(text, tmp_path):
    result = PruningExperiment.run(config(text, steps=0, control=True), run_dir=tmp_path / "run")
    assert result["fine_tuned"] is None and result["control"] is None
    assert result["all_facts_hold"] and "not fine-tuned" in result["verdict"]


def test_lora_leaves_one_merged_model_with_its_heads_closed(text, tmp_path):
    result = PruningExperiment.run(config(text, method="lora", model="tiny-gpt2"), run_dir=tmp_path / "run")
    assert result["all_facts_hold"] and result["fine_tuned"]["perplexity"] != result["pruned"]["perplexity"]
    assert 0 < result["trainable_parameters"] < result["parameters"]


@pytest.mark.parametrize("model", ["tiny-gpt2", "tiny-opt", "tiny-pythia", "small-llama"])
def test_every_bundled_model_can_be_pruned(model, text, tmp_path):
    result = PruningExperiment.run(config(text, model=model, strategy="magnitude", steps=0), run_dir=tmp_path / "run")
    assert result["all_facts_hold"]


def test_a_pruned_run_can_be_pruned_further(whole, text, tmp_path):
    result = PruningExperiment.run(config(text, model=whole["run_dir"], level=0.5, steps=0), run_dir=tmp_path / "run")
    assert result["all_facts_hold"]
    assert {tuple(head) for head in whole["pruned_heads"]} < {tuple(head) for head in result["pruned_heads"]}


def test_bundled_text_is_stamped_as_generated_and_a_file_is_not(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "BUNDLED_DOCUMENTS", 40)
    result = PruningExperiment.run(config("bundled", steps=0), run_dir=tmp_path / "run")
    assert result["text"]["generated"] is True and whole["text"]["generated"] is False


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_every_fact_of_a_run_on_cuda_holds(dtype, text, tmp_path):
    steps = 2 if dtype == "float32" else 0
    result = PruningExperiment.run(config(text, device="cuda", dtype=dtype, steps=steps), run_dir=tmp_path / "run")
    assert result["all_facts_hold"]


# ------------------------------------------------------------------------------------------ pencil: recovery, verdict


def test_recovery_is_the_share_of_the_damage_that_came_back():
    assert experiments.outcome({"baseline": 4.0, "pruned": 8.0, "fine_tuned": 5.0}) == {"recovery_percent": 75.0}


def test_where_pruning_did_not_hurt_improvement_is_against_the_baseline():
    assert experiments.outcome({"baseline": 4.0, "pruned": 3.5, "fine_tuned": 3.0}) == {"improvement_percent": 25.0}


def test_without_fine_tuning_there_is_no_recovery():
    assert experiments.outcome({"baseline": 4.0, "pruned": 8.0}) == {"recovery_percent": None}


@pytest.mark.parametrize(
    ("control", "words"), [(4.9, "does not beat"), (5.1, "That beats"), (None, "No unpruned control")]
)
def test_the_verdict_says_whether_it_beats_fine_tuning_the_whole_model(control, words):
    perplexity = {"baseline": 4.0, "pruned": 8.0, "fine_tuned": 5.0} | ({"control": control} if control else {})
    assert words in experiments.verdict(perplexity) and "4.00 to 8.00" in experiments.verdict(perplexity)


# ------------------------------------------------------------------------------- saboteurs: the product says FAILED


def test_a_gate_applied_after_the_output_is_reported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(attention, "apply_gate", lambda output, gate: output)
    result = PruningExperiment.run(config(text, strategy="magnitude", steps=0), run_dir=tmp_path / "run")
    assert failed(result) >= {"closed_heads_add_nothing_after_pruning", "pruning_changed_the_logits"}
    assert not result["all_facts_hold"]


def test_gates_dropped_on_save_are_reported(text, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "save_gates", lambda model, folder: None)
    monkeypatch.setattr(attention, "state_dict_without_closed_heads", lambda model: model.state_dict())
    result = PruningExperiment.run(config(text, steps=0), run_dir=tmp_path / "run")
    assert failed(result) == {"reloaded_model_is_the_same", "plain_transformers_computes_the_same"}


@pytest.mark.parametrize("strategy", ["magnitude", "entropy", "gradient", "ablation"])
def test_a_strategy_swapped_for_random_is_reported(strategy, text, tmp_path, monkeypatch):
    monkeypatch.setitem(heads.STRATEGIES._entries, strategy, heads.STRATEGIES["random"])
    result = PruningExperiment.run(config(text, strategy=strategy, steps=0), run_dir=tmp_path / "run")
    assert failed(result) == {"strategy_is_the_one_asked_for"}


def test_the_wrong_heads_closed_are_reported(text, tmp_path, monkeypatch):
    honest = heads.choose
    monkeypatch.setattr(heads, "choose", lambda scores, *rest, **options: honest(-scores, *rest, **options))
    result = PruningExperiment.run(config(text, steps=0), run_dir=tmp_path / "run")
    assert failed(result) == {"least_important_heads_were_closed"}


def test_a_prompt_in_the_loss_is_reported(prompts, tmp_path, monkeypatch):
    honest = PruningExperiment.run(config(prompts), run_dir=tmp_path / "honest")
    assert "loss_is_on_the_completion_alone" in {fact["name"] for fact in honest["facts"]} and honest["all_facts_hold"]
    monkeypatch.setattr(data, "mask_prompt", lambda ids, prompt_length: ids.clone())
    assert failed(PruningExperiment.run(config(prompts), run_dir=tmp_path / "run")) == {
        "loss_is_on_the_completion_alone"
    }


def test_heads_that_training_opened_again_are_reported(text, tmp_path, monkeypatch):
    honest = training.fine_tune

    def careless(model, *rest, **options):
        result = honest(model, *rest, **options)
        attention.close_heads(model, [])
        return result

    monkeypatch.setattr(training, "fine_tune", careless)
    result = PruningExperiment.run(config(text), run_dir=tmp_path / "run")
    assert failed(result) >= {"closed_heads_add_nothing_after_fine_tuning", "reloaded_model_is_the_same"}


def test_a_control_with_a_smaller_budget_is_reported(text, tmp_path, monkeypatch):
    honest = PruningExperiment._fine_tune

    def stingy(self, model, stage):
        full = self.config
        self.config = full.model_copy(update={"steps": 1}) if stage == "control" else full
        try:
            return honest(self, model, stage)
        finally:
            self.config = full

    monkeypatch.setattr(PruningExperiment, "_fine_tune", stingy)
    result = PruningExperiment.run(config(text, control=True), run_dir=tmp_path / "run")
    assert failed(result) == {"control_had_the_same_budget"}


def test_test_text_among_the_training_text_is_reported(text, tmp_path, monkeypatch):
    def leaky(documents):
        return list(documents), list(documents), list(documents[:8])

    monkeypatch.setattr(data, "split_documents", leaky)
    result = PruningExperiment.run(config(text, steps=0), run_dir=tmp_path / "run")
    assert failed(result) == {"test_text_was_not_trained_on"}


def test_an_attention_that_computes_something_else_with_open_gates_is_reported(text, tmp_path, monkeypatch):
    honest = attention.sdpa_attention_forward

    def off(*inputs, **options):
        output, weights = honest(*inputs, **options)
        return output * 1.001, weights

    monkeypatch.setattr(attention, "sdpa_attention_forward", off)
    result = PruningExperiment.run(config(text, steps=0), run_dir=tmp_path / "run")
    assert "open_gates_are_transparent" in failed(result)


def test_a_failed_fact_reads_failed_in_the_printed_list():
    fact = facts.Fact("name", False, "the claim", "what was seen")
    assert fact.line() == "FAILED the claim: what was seen"


# ------------------------------------------------------------------------------------------------------------- faults


def test_stop_leaves_a_run_recorded_as_interrupted(text, tmp_path):
    with pytest.raises(Interrupted, match="stopped"):
        PruningExperiment.run(config(text), run_dir=tmp_path / "run", should_stop=lambda: True)
    assert read_run(tmp_path / "run").status == "interrupted"
    assert not (tmp_path / "run" / "result.json").exists()


def test_stop_is_heard_also_while_the_saved_model_is_checked(text, tmp_path):
    stages = []
    with pytest.raises(Interrupted, match="stopped after 0 of 8 windows"):
        PruningExperiment.run(
            config(text, steps=0, strategy="random"),
            run_dir=tmp_path / "run",
            progress=lambda now: stages.append(now["stage"]),
            should_stop=lambda: "saving" in stages,
        )
    assert read_run(tmp_path / "run").status == "interrupted"


@pytest.mark.parametrize("strategy", ["ablation", "gradient", "entropy"])
def test_stop_is_heard_in_the_middle_of_scoring(strategy, text, tmp_path):
    stages, asked = [], itertools.count()
    with pytest.raises(Interrupted, match="stopped while scoring heads"):
        PruningExperiment.run(
            config(text, steps=0, strategy=strategy),
            run_dir=tmp_path / "run",
            progress=lambda now: stages.append(now["stage"]),
            should_stop=lambda: "scoring heads" in stages and next(asked) > 0,  # not at once: before the first pass
        )
    assert stages[-1] == "scoring heads" and read_run(tmp_path / "run").status == "interrupted"


def test_training_that_does_not_stay_finite_is_recorded_as_diverged(text, tmp_path, monkeypatch):
    def explode(*_rest, **_options):
        raise Diverged("the loss is not finite")

    monkeypatch.setattr(training, "fine_tune", explode)
    with pytest.raises(Diverged, match="not finite"):
        PruningExperiment.run(config(text), run_dir=tmp_path / "run")
    assert read_run(tmp_path / "run").status == "diverged"


def test_a_full_disk_while_saving_leaves_no_model_that_looks_complete(text, tmp_path, monkeypatch):
    def full(*_rest, **_options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        PruningExperiment.run(config(text, steps=0), run_dir=tmp_path / "run")
    assert read_run(tmp_path / "run").status == "failed"
    assert not (tmp_path / "run" / "model").exists() and not (tmp_path / "run" / "result.json").exists()


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("level", 1.5, "less than or equal to 1"),
        ("level", -0.1, "greater than or equal to 0"),
        ("strategy", "entrpy", "Did you mean 'entropy'"),
        ("stpes", 3, "unknown field 'stpes'. Did you mean 'steps'"),
        ("window", 1, "greater than or equal to 2"),
    ],
)
def test_nonsense_is_refused_before_anything_is_loaded(field, value, says):
    with pytest.raises(ValidationError, match=says):
        PruningConfig(**{field: value})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"model": "tiny-lama"}, "Did you mean 'tiny-llama'"),
        ({"text": "no/such/file.txt"}, "does not exist"),
        ({"window": 4096}, "smaller --window"),
        ({"text": "SHORT"}, "less than one window"),
        ({"level": 1.0, "min_heads_per_layer": 1}, "lower level or min_heads_per_layer"),
    ],
)
def test_what_cannot_be_run_leaves_no_run_directory(changes, says, text, tmp_path):
    if changes.get("text") == "SHORT":
        (tmp_path / "short.txt").write_text("Too short.")
        changes = {"text": str(tmp_path / "short.txt")}
    with pytest.raises((LookupError, ValueError), match=says):
        PruningExperiment.run(config(**{"text": text, **changes}), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_every_config_field_reaches_the_record(whole):
    recorded = records.read_json(Path(whole["run_dir"]) / "manifest.json")["config"]
    assert set(PruningConfig.model_fields) <= set(recorded)
