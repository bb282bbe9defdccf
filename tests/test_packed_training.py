"""Does packing change nothing but the padding, and does training tell what it does: samples, events, memory?"""

from __future__ import annotations

import pytest
import small_models
import torch

from nbhelpers import attention, evaluate, packing
from nbhelpers.training import TrainingConfig, fine_tune

LENGTHS = (16, 9, 12, 5, 16, 7, 11, 14, 6, 10)


class Follower:
    """Tracker and progress callback that remember."""

    def __init__(self) -> None:
        self.metrics, self.events, self.told = [], [], []

    def log_metrics(self, iteration=None, **metrics):
        self.metrics.append({"iteration": iteration, **metrics})

    def increment_gradient_step(self, n=1):
        pass

    def event(self, kind, **facts):
        self.events.append({"kind": kind, **facts})


NO_DROPOUT = {
    "gpt2": dict.fromkeys(("attn_pdrop", "resid_pdrop", "embd_pdrop"), 0.0),
    "opt": {"dropout": 0.0, "attention_dropout": 0.0},
}


def tune(folder, name="llama", *, gates=True, lengths=LENGTHS, spoil=None, sampler=None, **settings):
    """(result, follower) of a short training; the last two rows are the validation text."""
    model, follower = small_models.build(name, **NO_DROPOUT.get(name, {})), Follower()
    if gates:
        attention.install(model)
    if spoil is not None:
        spoil(model)
    rows = small_models.text_rows(lengths)
    config = TrainingConfig(**{"steps": 4, "batch_size": 4, "learning_rate": 1e-2, "eval_every": 2, **settings})
    result = fine_tune(
        model,
        rows[:-2],
        rows[-2:],
        config,
        output_dir=folder / "out",
        tracker=follower,
        progress=follower.told.append,
        sampler=sampler,
    )
    return result, follower


@pytest.mark.parametrize("name", ["gpt2", "opt", "gpt_neox", "llama"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_each_steps_loss_is_that_without_packing(name, method, tmp_path):
    packed, _ = tune(tmp_path, name, method=method)
    alone, _ = tune(tmp_path, name, method=method, packing=False)
    assert (packed.packing, alone.packing) == ("on", "off: not asked for")
    assert [loss for _, loss in packed.train_losses] == pytest.approx(
        [loss for _, loss in alone.train_losses], abs=1e-4
    )


def test_packed_sequences_hold_fewer_tokens_of_padding(tmp_path, monkeypatch):
    seen = {True: 0, False: 0}
    collate = packing.collate

    def counted(sequences, device="cpu"):
        batch = collate(sequences, device)
        seen[packs] += batch["input_ids"].numel()
        return batch

    monkeypatch.setattr(packing, "collate", counted)
    for packs in (True, False):
        tune(tmp_path, packing=packs, batch_size=8, steps=2)
    assert seen[True] <= 0.8 * seen[False]


def test_a_model_whose_attention_is_not_known_trains_unpacked_and_an_event_says_why(tmp_path):
    result, follower = tune(tmp_path, gates=False)
    assert result.packing.startswith("off: attention of llama models is not known here")
    assert [event["reason"] for event in follower.events if event["kind"] == "packing_off"] == [result.packing[5:]]


def test_micro_batches_of_packed_sequences_give_the_same_losses(tmp_path):
    whole, _ = tune(tmp_path)
    parts, _ = tune(tmp_path, micro_batch_size=1)
    assert [loss for _, loss in parts.train_losses] == pytest.approx([loss for _, loss in whole.train_losses], abs=1e-5)


def test_out_of_memory_halves_the_sequences_of_a_pass_and_the_losses_stay(tmp_path):
    def limited(model):
        forward = model.forward

        def call(*args, input_ids=None, **kwargs):
            if model.training and len(input_ids) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(*args, input_ids=input_ids, **kwargs)

        model.forward = call

    result, follower = tune(tmp_path, spoil=limited)
    plain, _ = tune(tmp_path)
    events = [event for event in follower.events if event["kind"] == "oom"]
    assert result.micro_batch_size == 1 and events[-1]["to_micro_batch_size"] == 1
    assert [loss for _, loss in result.train_losses] == pytest.approx(
        [loss for _, loss in plain.train_losses], abs=1e-5
    )
    assert [event["kind"] for event in follower.told[0]["events"]] == ["oom"] * len(events)


def test_the_check_before_the_first_step_compares_with_the_models_own_loss(tmp_path):
    result, _ = tune(tmp_path)
    assert result.loss_check["ours"] == pytest.approx(result.loss_check["own"], rel=1e-5)
    assert result.loss_check["rows"] == 2 and result.loss_check["tokens"] == 5 - 1 + 7 - 1


def test_the_check_sees_a_loss_that_is_not_the_models(tmp_path):
    """A head whose outputs are changed where nobody looks: in the model's own forward pass."""

    def louder(model):
        forward = model.forward

        def call(*args, **kwargs):
            output = forward(*args, **kwargs)
            if output.logits.shape[-1] == small_models.VOCABULARY:
                output.logits = output.logits * 2
            return output

        model.forward = call

    result, _ = tune(tmp_path, spoil=louder)
    assert abs(result.loss_check["ours"] - result.loss_check["own"]) > 0.1


def test_a_sample_is_written_at_each_validation_and_changes_nothing_else(tmp_path):
    asked = []
    with_samples, follower = tune(tmp_path, sampler=lambda: asked.append(len(asked)) or f"text {len(asked)}")
    without, _ = tune(tmp_path)
    found = [(event["step"], event["text"]) for event in follower.events if event["kind"] == "sample"]
    assert found == [(0, "text 1"), (2, "text 2"), (4, "text 3")]
    assert [told["sample"] for told in follower.told] == ["text 1", "text 2", None, "text 3"]
    assert with_samples.train_losses == without.train_losses


def test_memory_in_use_is_told_and_logged_with_each_step(tmp_path):
    _, follower = tune(tmp_path)
    assert all(told["resident_bytes"] > 50e6 and told["cuda_bytes"] is None for told in follower.told)
    steps = [row for row in follower.metrics if "train_loss" in row]
    assert len(steps) == 4 and all(row["resident_bytes"] > 50e6 for row in steps)


def test_validation_is_that_of_evaluate_also_while_packing(tmp_path):
    result, _ = tune(tmp_path, keep_best=False)
    rows = small_models.text_rows(LENGTHS)[-2:]
    assert result.validation_nlls[-1][1] == pytest.approx(evaluate.perplexity(result.model, rows).nll, abs=1e-5)
