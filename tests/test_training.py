"""Fine-tuning ends finite, reproducible and in its best state, or says why not."""

from __future__ import annotations

import copy
import gc
import math
import subprocess
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from nbhelpers import attention, checkpoints, evaluate, preparation, runtime, trainer, training
from nbhelpers.tracking import Diverged
from nbhelpers.training import TrainingConfig, fine_tune, label_report

VOCABULARY = 31
NO_VALIDATION = {"eval_every": None, "keep_best": False}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """One thread, and garbage collection (accelerate asks for it before each training) only over what tests make."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def llama() -> LlamaForCausalLM:
    with runtime.seeded(7):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
            )
        )


def gpt2(dropout: float = 0.1) -> GPT2LMHeadModel:
    sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": dropout}
    with runtime.seeded(7):
        return GPT2LMHeadModel(GPT2Config(**sizes, **drops, bos_token_id=0, eos_token_id=0))


def make_rows(count: int, seed: int = 0, step: int = 3) -> list[dict]:
    """Arithmetic progressions modulo the vocabulary: learnable; lengths 8 to 11, row i has i % 3 masked tokens."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(count):
        first = torch.randint(0, VOCABULARY, (1,), generator=generator)
        ids = (first + step * torch.arange(8 + index % 4)) % VOCABULARY
        labels = ids.clone()
        labels[: index % 3] = -100
        rows.append({"input_ids": ids, "labels": labels})
    return rows


def overfitting(**settings) -> dict:
    """Settings under which validation gets better for five steps and worse after that (llama)."""
    return {"rows": make_rows(3), "learning_rate": 2e-2, "steps": 12, "eval_every": 1, **settings}


class Follower:
    """A tracker and a progress callback that remember; `weights` are taken after each step."""

    def __init__(self, model=None) -> None:
        self.model, self.metrics, self.events, self.told, self.weights = model, [], [], [], {}
        self.gradient_steps = 0

    def log_metrics(self, iteration=None, **metrics):
        self.metrics.append({"iteration": iteration, **metrics})

    def increment_gradient_step(self, n=1):
        self.gradient_steps += n

    def event(self, kind, **facts):
        self.events.append({"kind": kind, **facts})

    def of(self, kind):
        return [event for event in self.events if event["kind"] == kind]

    def __call__(self, told):
        self.told.append(told)
        if self.model is not None:
            self.weights[told["step"]] = weights(self.model)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def tune(model, tmp_path, *, rows=None, validation=None, follower=None, should_stop=None, resume=False, **settings):
    settings = {"steps": 4, "batch_size": 4, "learning_rate": 1e-2, **settings}
    return fine_tune(
        model,
        rows if rows is not None else make_rows(10),
        validation if validation is not None else make_rows(5, seed=1),
        TrainingConfig(**settings),
        output_dir=tmp_path / "out",
        tracker=follower,
        progress=follower,
        should_stop=should_stop,
        resume=resume,
    )


def spoil(model, change, calls):
    """Let `change` alter the logits of these forward passes in training mode (numbered from 1)."""
    count = {"calls": 0}
    forward = model.forward

    def spoiled(*args, **kwargs):
        output = forward(*args, **kwargs)
        if model.training:
            count["calls"] += 1
            if count["calls"] in calls:
                output.logits = change(output.logits)
        return output

    model.forward = spoiled
    return count


def nan(logits):
    return logits * float("nan")


# Config ---------------------------------------------------------------------------------------------------------------


def test_an_unknown_field_is_named_with_the_nearest_known_one():
    with pytest.raises(ValidationError, match=r"unknown field 'learnin_rate'. Did you mean 'learning_rate'"):
        TrainingConfig(learnin_rate=1e-3)


@pytest.mark.parametrize(
    "field, value",
    [
        ("method", "dora"),
        ("steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", math.nan),
        ("batch_size", 0),
        ("micro_batch_size", 0),
        ("micro_batch_size", 9),  # more than the effective batch of 8
        ("schedule", "step"),
        ("warmup_share", 1.5),
        ("weight_decay", -0.1),
        ("max_grad_norm", 0.0),
        ("lora_rank", 0),
        ("lora_alpha", 0.0),
        ("lora_dropout", 1.0),
        ("eval_every", 0),
        ("eval_every", None),  # keep_best needs validations
        ("early_stopping_patience", 0),
        ("seed", -1),
        ("precision", "fp8"),
        ("checkpoint_every", 0),
        ("max_bad_steps", 0),
    ],
)
def test_a_value_out_of_bounds_is_refused_and_its_field_named(field, value):
    with pytest.raises(ValidationError, match=field):
        TrainingConfig(**{field: value})


def test_the_config_is_frozen_and_every_field_says_what_it_is():
    with pytest.raises(ValidationError, match="frozen"):
        TrainingConfig().steps = 3
    assert all(field.description for field in TrainingConfig.model_fields.values())


def test_reading_the_config_imports_neither_torch_nor_transformers():
    code = "import sys, nbhelpers.training; print({'torch', 'transformers', 'peft'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"


@pytest.mark.parametrize(
    "method, field, value",
    [
        ("full", "learning_rate", 2e-2),
        ("full", "batch_size", 3),
        ("full", "schedule", "cosine"),
        ("full", "schedule", "constant"),
        ("full", "warmup_share", 0.75),
        ("full", "weight_decay", 0.5),
        ("full", "max_grad_norm", 0.1),
        ("full", "seed", 1),
        ("lora", "lora_rank", 4),
        ("lora", "lora_alpha", 32.0),
        ("lora", "lora_dropout", 0.5),
        ("lora", "lora_targets", ("q_proj",)),
    ],
)
def test_every_field_of_the_recipe_changes_what_is_learned(tmp_path, method, field, value):
    plain, changed = llama(), llama()
    tune(plain, tmp_path, method=method, **NO_VALIDATION)
    tune(changed, tmp_path, method=method, **NO_VALIDATION, **{field: value})
    assert not same(weights(plain), weights(changed))


def test_the_learning_rate_is_the_methods_own_where_none_is_given_and_is_recorded(tmp_path):
    assert tune(llama(), tmp_path, steps=1, learning_rate=None).learning_rate == 5e-5
    assert tune(llama(), tmp_path, steps=1, learning_rate=None, method="lora").learning_rate == 2e-4


# Loss, order, schedule ------------------------------------------------------------------------------------------------


def test_the_first_loss_is_the_mean_over_the_label_tokens_of_the_whole_batch(tmp_path):
    model, rows = llama(), make_rows(4)
    nll, tokens = 0.0, 0
    for row in rows:  # one by one, no padding, spelled out
        probabilities = model(row["input_ids"][None]).logits[0].detach().log_softmax(-1)
        for position in range(len(row["labels"]) - 1):
            if row["labels"][position + 1] != -100:
                nll, tokens = nll - float(probabilities[position, row["labels"][position + 1]]), tokens + 1
    result = tune(model, tmp_path, rows=rows, steps=1)
    assert result.train_losses[0] == (1, pytest.approx(nll / tokens, abs=1e-5))
    assert result.label_tokens == tokens


@pytest.mark.parametrize("build", [llama, lambda: gpt2(0.0)])
def test_the_loss_curve_does_not_depend_on_the_micro_batch(tmp_path, build):
    curves = [
        [loss for _, loss in tune(build(), tmp_path, steps=6, micro_batch_size=size).train_losses]
        for size in (1, 2, 3, 4)
    ]
    for curve in curves[:-1]:
        assert curve == pytest.approx(curves[-1], abs=1e-5)


def test_a_head_that_somebody_else_hooked_trains_by_the_models_own_logits_to_the_same_losses(tmp_path):
    rows = make_rows(4)
    for row in rows:
        row["labels"] = torch.where(torch.arange(len(row["labels"])) < len(row["labels"]) - 2, -100, row["labels"])
    plain, hooked, seen = llama(), llama(), []
    hooked.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    curves = [
        [loss for _, loss in tune(model, tmp_path, rows=rows, steps=3, **NO_VALIDATION).train_losses]
        for model in (plain, hooked)
    ]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)
    assert len(seen) >= 3  # the hook was not passed by


def test_the_validation_nll_is_the_one_of_evaluate(tmp_path):
    model, validation = llama(), make_rows(5, seed=1)
    before = evaluate.perplexity(model, validation).nll
    result = tune(model, tmp_path, validation=validation, steps=6, eval_every=2, keep_best=False)
    assert [step for step, _ in result.validation_nlls] == [0, 2, 4, 6]
    assert result.validation_nlls[0][1] == pytest.approx(before, abs=1e-6)
    assert result.validation_nlls[-1][1] == pytest.approx(evaluate.perplexity(model, validation).nll, abs=1e-6)


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("linear", [0.5, 1, 1, 3 / 4, 2 / 4, 1 / 4]),
        ("cosine", [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]),
        ("constant", [0.5, 1, 1, 1, 1, 1]),
    ],
)
def test_the_learning_rate_warms_up_and_decays_as_by_pencil(tmp_path, schedule, expected):
    follower = Follower()
    tune(llama(), tmp_path, follower=follower, steps=6, warmup_share=1 / 3, schedule=schedule)
    assert [told["learning_rate"] for told in follower.told] == pytest.approx([1e-2 * share for share in expected])


def test_every_batch_is_whole_and_every_row_comes_once_an_epoch():
    order = trainer.data_order(rows=6, count=15, seed=3)
    assert len(order) == 15
    assert sorted(order[:6]) == sorted(order[6:12]) == list(range(6))
    assert order[:6] != order[6:12]
    assert order != trainer.data_order(rows=6, count=15, seed=4)


def test_training_learns(tmp_path):
    result = tune(llama(), tmp_path, steps=40, eval_every=20, rows=make_rows(30))
    assert result.validation_nlls[-1][1] < result.validation_nlls[0][1] - 1


# Clipping and precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [0.05, None])
def test_the_optimizer_sees_gradients_of_at_most_the_given_norm(tmp_path, limit):
    model, norms = llama(), []
    model.lm_head.weight.register_hook(lambda gradient: gradient * 1e6)

    def watch(optimizer, args, kwargs):
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms.append(math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients)))

    handle = register_optimizer_step_pre_hook(watch)
    try:
        tune(model, tmp_path, max_grad_norm=limit, steps=3)
    finally:
        handle.remove()
    if limit is None:
        assert len(norms) == 3
        assert min(norms) > 1e4
    else:
        assert norms == pytest.approx([limit] * 3, rel=1e-3)
        assert max(norms) <= limit * (1 + 1e-6)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_precision_that_the_device_lacks_is_refused(tmp_path, precision):
    with pytest.raises(ValueError, match=f"precision '{precision}' needs .* got 'cpu'; use 'auto' or 'fp32'"):
        tune(llama(), tmp_path, precision=precision)


def test_auto_chooses_bf16_only_in_hardware_and_fp16_only_on_cuda(monkeypatch):
    assert training.resolve_precision("auto", "cpu") == "fp32"
    assert training.resolve_precision("auto", "mps") == "fp32"
    monkeypatch.setattr(runtime, "bf16_ok", lambda device: True)
    assert training.resolve_precision("auto", "cuda") == "bf16"
    monkeypatch.setattr(runtime, "bf16_ok", lambda device: False)
    assert training.resolve_precision("auto", "cuda") == "fp16"


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_16_bit_model_is_trained_with_float32_masters_and_comes_back_in_16_bit(tmp_path, monkeypatch, method):
    seen, whole = [], trainer.FineTuner.training_step

    def watch(self, model, inputs, *rest):
        seen.append({p.dtype for p in model.parameters() if p.requires_grad})
        return whole(self, model, inputs, *rest)

    monkeypatch.setattr(trainer.FineTuner, "training_step", watch)
    model = llama().to(torch.bfloat16)
    before = weights(model)
    tune(model, tmp_path, steps=2, method=method, keep_best=False)
    assert seen == [{torch.float32}] * 2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not same(before, weights(model))


def test_fp16_runs_through_the_scaler_and_its_search_for_a_scale_is_no_fault(tmp_path, monkeypatch):
    """The arithmetic of a T4, on the CPU: the first scale overflows by design, is halved, and training goes on."""
    monkeypatch.setattr(training, "resolve_precision", lambda asked, device: "fp16")
    follower, model = Follower(), llama()

    def enlarge(module, inputs, logits):  # float16 gradients that overflow until the scale has fallen far enough
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradient * 500)

    model.lm_head.register_forward_hook(enlarge)
    result = tune(model, tmp_path, follower=follower, steps=30, max_bad_steps=1, rows=make_rows(30), max_grad_norm=None)
    scales = [event["scale"] for event in follower.of("overflow")]
    assert not follower.of("non_finite")
    assert len(scales) >= 2
    assert scales == [65536.0 / 2**index for index in range(len(scales))]
    assert result.skipped_steps == len(scales)
    assert result.validation_nlls[-1][1] < result.validation_nlls[0][1] - 0.3
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# Steps that are not finite --------------------------------------------------------------------------------------------


def test_a_step_with_a_nan_loss_leaves_every_weight_bit_for_bit(tmp_path):
    model = llama()
    spoil(model, nan, calls={3})
    follower = Follower(model)
    result = tune(model, tmp_path, follower=follower, weight_decay=0.1, keep_best=False)
    assert same(follower.weights[3], follower.weights[2])
    assert not same(follower.weights[2], follower.weights[1])
    assert not same(follower.weights[4], follower.weights[3])
    assert [step for step, _ in result.train_losses] == [1, 2, 4]
    assert (result.steps, result.skipped_steps, follower.gradient_steps) == (4, 1, 3)
    assert [(e["step"], e["loss"], e["in_a_row"]) for e in follower.of("non_finite")] == [(3, "nan", 1)]
    assert follower.told[2]["train_loss"] is None


def test_an_infinite_gradient_under_a_finite_loss_skips_the_step_too(tmp_path):
    model, calls = llama(), []
    model.lm_head.weight.register_hook(lambda g: (calls.append(1), g * math.inf if len(calls) == 2 else g)[1])
    follower = Follower(model)
    result = tune(model, tmp_path, follower=follower, keep_best=False)
    assert same(follower.weights[2], follower.weights[1])
    assert result.skipped_steps == 1
    assert math.isfinite(float(follower.of("non_finite")[0]["loss"]))


def test_a_skipped_step_does_not_touch_the_learning_rate_schedule(tmp_path):
    model = llama()
    spoil(model, nan, calls={2})
    spoiled, plain = Follower(), Follower()
    tune(model, tmp_path, follower=spoiled)
    tune(llama(), tmp_path, follower=plain)
    assert [t["learning_rate"] for t in spoiled.told] == [t["learning_rate"] for t in plain.told]


def test_bad_steps_in_a_row_bring_back_the_last_good_state_at_half_the_rate(tmp_path):
    model = llama()
    spoil(model, nan, calls={4, 5})
    follower = Follower(model)
    result = tune(
        model, tmp_path, follower=follower, steps=8, eval_every=2, max_bad_steps=2, schedule="constant", keep_best=False
    )
    (restored,) = follower.of("restored")
    assert (restored["step"], restored["from_step"], restored["peak_learning_rate"]) == (5, 2, 5e-3)
    assert not same(follower.weights[3], follower.weights[2])
    assert same(follower.weights[5], follower.weights[2])
    assert [t["learning_rate"] for t in follower.told] == pytest.approx([1e-2] * 5 + [5e-3] * 3)
    assert (result.status, result.skipped_steps) == ("finished", 2)
    assert not same(follower.weights[8], follower.weights[5])


def test_the_optimizers_memory_is_restored_with_the_weights(tmp_path):
    """Good state at step 2, bad steps 4 and 5: the moments of step 3 are forgotten."""
    model, moments = llama(), []
    spoil(model, nan, calls={4, 5})

    def watch(optimizer, args, kwargs):
        if type(optimizer) is torch.optim.AdamW:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            moments.append([optimizer.state[p]["exp_avg"].clone() for p in parameters])

    handle = register_optimizer_step_post_hook(watch)
    try:
        tune(model, tmp_path, steps=6, eval_every=2, max_bad_steps=2, keep_best=False)
    finally:
        handle.remove()
    at_step = dict(enumerate(moments, start=1))

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(at_step[a], at_step[b], strict=True))

    assert equal(5, 2)
    assert not equal(3, 2)
    assert not equal(6, 5)


def test_bad_steps_that_come_back_end_the_run_as_diverged(tmp_path):
    model = llama()
    spoil(model, nan, calls=set(range(2, 100)))
    follower = Follower(model)
    with pytest.raises(Diverged, match=r"3 non-finite steps in a row up to step 7.*lower learning_rate"):
        tune(model, tmp_path, follower=follower, steps=50)
    assert len(follower.of("restored")) == 1
    assert follower.told[-1]["step"] == 6
    assert all(p.isfinite().all() for p in model.parameters())


def test_bad_steps_that_are_not_in_a_row_never_restore_anything(tmp_path):
    model, follower = llama(), Follower()
    spoil(model, nan, calls={1, 2, 4, 5, 7})
    result = tune(model, tmp_path, follower=follower, steps=8)
    assert result.skipped_steps == 5
    assert not follower.of("restored")


def test_a_validation_that_is_not_finite_is_an_event_and_never_the_best(tmp_path):
    model, follower = llama(), Follower()
    forward = model.forward

    def spoiled(*args, **kwargs):
        output = forward(*args, **kwargs)
        if not model.training and follower.told:
            output.logits = nan(output.logits)
        return output

    model.forward = spoiled
    result = tune(model, tmp_path, follower=follower, eval_every=2)
    assert [step for step, _ in result.validation_nlls] == [0]
    assert result.best_step == 0
    assert {event["where"] for event in follower.of("non_finite")} == {"validation"}


# Out of memory --------------------------------------------------------------------------------------------------------


def too_small(model, most_rows, *, after=0):
    """Let this model run out of memory with more than `most_rows` rows in a training pass, from pass `after` + 1 on."""
    forward, calls = model.forward, []

    def limited(*args, input_ids=None, **kwargs):
        if model.training:
            calls.append(len(input_ids))
            if len(calls) > after and len(input_ids) > most_rows:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(*args, input_ids=input_ids, **kwargs)

    model.forward = limited
    return calls


def test_out_of_memory_halves_the_micro_batch_and_learns_the_same(tmp_path):
    starved, plain, follower = llama(), llama(), Follower()
    too_small(starved, 1)
    result = tune(starved, tmp_path, follower=follower)
    tune(plain, tmp_path, micro_batch_size=1)
    sizes = [(e["from_micro_batch_size"], e["to_micro_batch_size"], e["batch_size"]) for e in follower.of("oom")]
    assert sizes == [(4, 2, 4), (2, 1, 4)]
    assert result.micro_batch_size == 1
    assert same(weights(starved), weights(plain))


def test_a_step_that_ran_out_of_memory_halfway_is_redone_whole_with_the_same_dropout(tmp_path):
    """The second micro-batch fails: the gradients of the first must not count twice, nor its random numbers."""
    starved, plain = gpt2(), gpt2()
    calls = too_small(starved, 1, after=1)
    tune(starved, tmp_path, micro_batch_size=2)
    tune(plain, tmp_path, micro_batch_size=1)
    assert calls[:6] == [2, 2, 1, 1, 1, 1]
    assert same(weights(starved), weights(plain))


def test_out_of_memory_with_one_row_is_one_line_that_names_the_way_out(tmp_path):
    model = llama()
    too_small(model, 0)
    with pytest.raises(
        torch.OutOfMemoryError, match=r"micro_batch_size 1 and rows of up to 11 tokens: use shorter rows"
    ):
        tune(model, tmp_path)


def test_an_error_that_is_no_lack_of_memory_is_not_retried(tmp_path):
    model = llama()
    calls = spoil(model, lambda logits: logits.view(-1, 7, 5), calls={1})
    with pytest.raises(RuntimeError, match="shape"):
        tune(model, tmp_path)
    assert calls["calls"] == 1


def test_a_validation_that_runs_out_of_memory_takes_smaller_batches(tmp_path):
    model, plain, follower = llama(), llama(), Follower()
    forward = model.forward

    def limited(*args, input_ids=None, **kwargs):
        if not model.training and len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return forward(*args, input_ids=input_ids, **kwargs)

    model.forward = limited
    limited_result, plain_result = tune(model, tmp_path, follower=follower), tune(plain, tmp_path)
    assert [event["to_batch_size"] for event in follower.of("oom")] == [2, 1]
    assert limited_result.micro_batch_size == 4
    assert limited_result.best_validation_nll == pytest.approx(plain_result.best_validation_nll, abs=1e-6)


# Best state, early stopping, stop -------------------------------------------------------------------------------------


def test_training_ends_with_the_weights_of_its_best_validation(tmp_path):
    model = llama()
    follower = Follower(model)
    result = tune(model, tmp_path, follower=follower, **overfitting())
    best = min(result.validation_nlls, key=lambda pair: pair[1])
    assert result.best_step == result.weights_step == best[0]
    assert 0 < result.best_step < 12
    assert same(weights(model), follower.weights[result.best_step])
    assert evaluate.perplexity(model, make_rows(5, seed=1)).nll == pytest.approx(best[1], abs=1e-6)


def test_without_keep_best_the_last_weights_stay(tmp_path):
    model = llama()
    follower = Follower(model)
    result = tune(model, tmp_path, follower=follower, **overfitting(keep_best=False))
    assert 0 < result.best_step < 12
    assert result.weights_step == 12
    assert same(weights(model), follower.weights[12])


def test_if_training_only_hurts_the_model_comes_back_untouched(tmp_path):
    model = llama()
    before = weights(model)
    result = tune(model, tmp_path, learning_rate=0.9, max_grad_norm=None, warmup_share=0.0)
    assert result.best_step == result.weights_step == 0
    assert same(weights(model), before)


def test_early_stopping_waits_for_its_patience_and_no_longer(tmp_path):
    follower = Follower()
    result = tune(llama(), tmp_path, follower=follower, **overfitting(early_stopping_patience=3))
    assert result.status == "finished"
    assert result.stopped_early
    assert result.best_step > 0
    assert result.steps == result.best_step + 3 < 12
    assert follower.of("early_stop")[0]["best_step"] == result.best_step


def test_stop_throws_the_unfinished_step_away_and_keeps_what_was_trained(tmp_path):
    """Asked after the first of two micro-batches of step 3."""
    model = llama()
    follower, calls = Follower(model), spoil(model, None, calls=())
    result = tune(model, tmp_path, follower=follower, micro_batch_size=2, should_stop=lambda: calls["calls"] >= 5)
    assert calls["calls"] == 5
    assert (result.status, result.steps, result.weights_step) == ("stopped", 2, 2)
    assert same(weights(model), follower.weights[2])
    assert all(p.grad is None for p in model.parameters())


def test_stop_during_a_validation_is_heard_and_the_step_before_it_is_reported(tmp_path):
    follower = Follower()
    result = tune(llama(), tmp_path, follower=follower, eval_every=2, should_stop=lambda: bool(follower.metrics[2:]))
    assert (result.status, result.steps) == ("stopped", 2)
    asked = {"count": 0}

    def at_second_validation():
        asked["count"] += 1
        return asked["count"] > 2 + 2  # two validation batches at step 0, two steps, then the validation

    follower = Follower()
    result = tune(llama(), tmp_path, follower=follower, eval_every=2, should_stop=at_second_validation)
    assert (result.status, result.steps) == ("stopped", 2)
    assert [metrics["iteration"] for metrics in follower.metrics] == [0, 1, 2]
    assert len(result.validation_nlls) == 1


def test_stop_before_the_first_step_returns_the_model_as_it_was(tmp_path):
    model = llama()
    before = weights(model)
    result = tune(model, tmp_path, should_stop=lambda: True)
    assert (result.status, result.steps, result.tokens_per_second) == ("stopped", 0, None)
    assert same(weights(model), before)


# Checkpoints ----------------------------------------------------------------------------------------------------------


def stop_after(follower, steps):
    return lambda: len(follower.told) >= steps


@pytest.mark.parametrize("method", ["full", "lora"])
def test_six_steps_are_bit_for_bit_three_steps_stop_and_three_more(tmp_path, method):
    settings = {"steps": 6, "method": method, "lora_dropout": 0.1, "checkpoint_every": 100, "eval_every": 2}
    straight, broken = gpt2(), gpt2()
    once = tune(straight, tmp_path / "straight", **settings)
    follower = Follower()
    first = tune(broken, tmp_path / "broken", follower=follower, should_stop=stop_after(follower, 3), **settings)
    assert (first.status, first.steps) == ("stopped", 3)
    again = gpt2()  # as a new process would load it
    second = tune(again, tmp_path / "broken", resume=True, **settings)
    assert same(weights(again), weights(straight))
    assert second.train_losses == once.train_losses
    assert second.validation_nlls == once.validation_nlls
    assert (second.label_tokens, second.best_step) == (once.label_tokens, once.best_step)


def test_a_stop_between_micro_batches_resumes_bit_for_bit_too(tmp_path):
    """The random numbers that the thrown-away half step had drawn are drawn again."""
    settings = {"steps": 4, "micro_batch_size": 2, "checkpoint_every": 100}
    straight, broken, again = gpt2(), gpt2(), gpt2()
    tune(straight, tmp_path / "straight", **settings)
    calls = spoil(broken, None, calls=())
    tune(broken, tmp_path / "broken", should_stop=lambda: calls["calls"] >= 5, **settings)
    tune(again, tmp_path / "broken", resume=True, **settings)
    assert same(weights(again), weights(straight))


def test_a_killed_run_goes_on_from_its_last_checkpoint_with_the_best_state_of_before(tmp_path):
    """Killed in step 8 of 9; the best validation was before the checkpoint of step 6."""
    settings = overfitting(steps=9, checkpoint_every=6, schedule="constant")
    straight, broken, again = llama(), llama(), llama()
    once = tune(straight, tmp_path / "straight", **settings)
    assert 0 < once.best_step < 6

    def killed(logits):
        raise KeyboardInterrupt

    spoil(broken, killed, calls={8})
    with pytest.raises(KeyboardInterrupt):
        tune(broken, tmp_path / "broken", **settings)
    follower = Follower()
    second = tune(again, tmp_path / "broken", resume=True, follower=follower, **settings)
    assert follower.of("resume")[0]["step"] == 6
    assert [told["step"] for told in follower.told] == [7, 8, 9]
    assert second.best_step == once.best_step
    assert same(weights(again), weights(straight))


def test_a_finished_or_early_stopped_run_resumes_to_the_same_result_without_a_step(tmp_path):
    settings = overfitting(checkpoint_every=100, early_stopping_patience=2)
    first, again, follower = llama(), llama(), Follower()
    once = tune(first, tmp_path, **settings)
    second = tune(again, tmp_path, resume=True, follower=follower, **settings)
    assert once.stopped_early
    assert second.stopped_early
    assert not follower.told
    assert same(weights(again), weights(first))
    finished = tune(llama(), tmp_path / "whole", checkpoint_every=2)
    assert tune(llama(), tmp_path / "whole", checkpoint_every=2, resume=True).train_losses == finished.train_losses


@pytest.mark.parametrize("damage", ["no COMPLETE", "torn COMPLETE", "torn weights", "changed optimizer", "file gone"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(tmp_path, damage):
    settings = {"steps": 4, "checkpoint_every": 2}
    straight = gpt2()
    tune(straight, tmp_path, **settings)
    newest = tmp_path / "out" / "checkpoint-00000004"
    if damage == "no COMPLETE":
        (newest / "COMPLETE").unlink()
    elif damage == "torn COMPLETE":
        (newest / "COMPLETE").write_bytes((newest / "COMPLETE").read_bytes()[:40])
    elif damage == "torn weights":
        (newest / "trained.safetensors").write_bytes((newest / "trained.safetensors").read_bytes()[:-8])
    elif damage == "changed optimizer":
        content = bytearray((newest / "optimizer.pt").read_bytes())
        content[len(content) // 2] ^= 1
        (newest / "optimizer.pt").write_bytes(bytes(content))
    else:
        (newest / "rng_state.pth").unlink()
    assert checkpoints.newest_complete(tmp_path / "out").name == "checkpoint-00000002"
    again, follower = gpt2(), Follower()
    tune(again, tmp_path, resume=True, follower=follower, **settings)
    assert [told["step"] for told in follower.told] == [3, 4]
    assert same(weights(again), weights(straight))


def test_a_checkpoint_holds_no_pickled_arguments_and_only_two_are_kept(tmp_path):
    tune(llama(), tmp_path, steps=5, checkpoint_every=1)
    kept = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in kept] == ["checkpoint-00000004", "checkpoint-00000005"]
    names = {"trained.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "state.json"}
    assert {path.name for path in kept[0].iterdir()} - {"best.safetensors"} == names | {"COMPLETE"}


def test_without_checkpoints_nothing_is_written(tmp_path):
    tune(llama(), tmp_path)
    assert not (tmp_path / "out").exists()


def test_old_checkpoints_are_neither_mixed_in_nor_continued_with_other_settings_or_rows(tmp_path):
    tune(llama(), tmp_path, checkpoint_every=2)
    with pytest.raises(ValueError, match="already holds checkpoints; resume=True continues them"):
        tune(llama(), tmp_path, checkpoint_every=2)
    with pytest.raises(ValueError, match=r"made with other config.learning_rate; resume with the same"):
        tune(llama(), tmp_path, checkpoint_every=2, learning_rate=1e-3, resume=True)
    with pytest.raises(ValueError, match=r"made with other train_rows"):
        tune(llama(), tmp_path, checkpoint_every=2, rows=make_rows(9), resume=True)
    with pytest.raises(ValueError, match=r"made with other parameters"):
        tune(gpt2(), tmp_path, checkpoint_every=2, resume=True)
    pruned = llama()
    attention.install(pruned)
    attention.close_heads(pruned, [(0, 1)])
    with pytest.raises(ValueError, match=r"made with other head_gates"):
        tune(pruned, tmp_path, checkpoint_every=2, resume=True)
    assert tune(llama(), tmp_path, checkpoint_every=3, micro_batch_size=1, resume=True).status == "finished"


def test_resuming_where_nothing_was_saved_yet_starts_from_the_beginning(tmp_path):
    assert tune(llama(), tmp_path, checkpoint_every=2, resume=True).steps == 4


def test_a_full_disk_is_one_line_and_leaves_nothing_that_looks_complete(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_tensors", full)
    with pytest.raises(OSError, match=r"cannot write checkpoint .*No space left on device; free some space"):
        tune(llama(), tmp_path, checkpoint_every=2)
    assert list((tmp_path / "out").iterdir()) == []


# Head gates -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("build", [llama, gpt2])
def test_closed_heads_stay_closed_through_training_best_state_and_resume(tmp_path, build, method):
    closed = [(0, 1), (1, 0), (1, 3)]

    def pruned():
        model = build()
        attention.install(model)
        attention.close_heads(model, closed)
        return model

    settings = overfitting(steps=6, weight_decay=0.5, checkpoint_every=3, method=method)
    model = pruned()
    gates = {name: b.clone() for name, b in model.named_buffers() if name.endswith("head_gate")}
    tune(model, tmp_path, **settings)
    after = {name: b for name, b in model.named_buffers() if name.endswith("head_gate")}
    assert len(gates) == 2
    assert same(gates, after)
    again = pruned()
    follower = Follower()
    tune(again, tmp_path / "stopped", follower=follower, should_stop=stop_after(follower, 2), **settings)
    resumed = pruned()
    tune(resumed, tmp_path / "stopped", resume=True, **settings)
    assert attention.closed_heads(resumed) == closed
    assert same(weights(resumed), weights(model))


def test_a_closed_head_gets_no_gradient(tmp_path):
    """With weight decay off, the output projection's inputs from the closed head stay bit for bit."""
    model = llama()
    attention.install(model)
    attention.close_heads(model, [(0, 1)])
    before = model.model.layers[0].self_attn.o_proj.weight.detach().clone()
    tune(model, tmp_path, keep_best=False)
    after = model.model.layers[0].self_attn.o_proj.weight.detach()
    head = slice(8, 16)  # head 1 of 4, head_dim 8
    assert torch.equal(after[:, head], before[:, head])
    assert not torch.equal(after[:, :8], before[:, :8])


# LoRA -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", [llama, gpt2])
def test_merging_keeps_what_the_adapters_computed(tmp_path, monkeypatch, build):
    import peft

    model, probe, seen = build(), make_rows(1, seed=9)[0]["input_ids"][None], {}
    state_names, untrained = list(model.state_dict()), copy.deepcopy(model)
    whole = peft.PeftModel.merge_and_unload if hasattr(peft.PeftModel, "merge_and_unload") else None
    assert whole is None  # it is reached through the tuner, so that is what is watched
    original = peft.tuners.lora.LoraModel.merge_and_unload

    def watch(self, **options):
        self.model.eval()
        with torch.no_grad():
            seen["adapted"] = self.model(probe).logits
        return original(self, **options)

    monkeypatch.setattr(peft.tuners.lora.LoraModel, "merge_and_unload", watch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = tune(model, tmp_path, method="lora", lora_rank=4, steps=5, keep_best=False)
    model.eval()
    merged, before = model(probe).logits, untrained.eval()(probe).logits
    largest = seen["adapted"].abs().max()
    assert (merged - seen["adapted"]).abs().max() <= 1e-5 * largest
    assert (merged - before).abs().max() > 1e-2 * largest
    assert result.merge_difference <= 1e-5
    assert result.model is model
    assert type(model) is type(untrained)
    assert list(model.state_dict()) == state_names
    assert all(p.requires_grad for p in model.parameters())


def test_the_trained_parameters_are_those_that_peft_and_the_pencil_count(tmp_path):
    """Llama: rank x (inputs + outputs) over q, o (32, 32), k, v (32, 16), gate, up, down (32, 48), twice."""
    from peft import LoraConfig, get_peft_model

    result = tune(llama(), tmp_path, method="lora", lora_rank=4, steps=1)
    independent = get_peft_model(llama(), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    pencil = 2 * 4 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 48))
    assert result.trainable_parameters == independent.get_nb_trainable_parameters()[0] == pencil
    assert result.left_out == {}
    assert tune(llama(), tmp_path, steps=1).trainable_parameters == sum(p.numel() for p in llama().parameters())


def test_adapters_go_on_the_layers_that_are_named_and_on_no_others(tmp_path):
    """q and v alone: rank x (32 + 32) and rank x (32 + 16), twice."""
    result = tune(llama(), tmp_path, method="lora", lora_rank=4, lora_targets=("q_proj", "v_proj"), steps=1)
    assert result.trainable_parameters == 2 * 4 * ((32 + 32) + (32 + 16))
    assert "model.layers.*.self_attn.o_proj.weight" in result.left_out


def test_a_layer_that_the_model_does_not_have_is_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match="unknown layer of lora_targets 'q_prj'. Did you mean 'q_proj'"):
        tune(llama(), tmp_path, method="lora", lora_targets=("q_prj",), steps=1)


def test_matrices_without_an_adapter_are_named_with_their_share():
    from peft import LoraConfig, get_peft_model

    model = llama()
    total = sum(p.numel() for p in model.parameters())
    get_peft_model(model, LoraConfig(target_modules=["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]))
    left = preparation.left_out(model, total)
    expected = {"model.layers.*.self_attn.o_proj.weight": 32 * 32, "model.layers.*.mlp.down_proj.weight": 32 * 48}
    assert left == pytest.approx({name: 2 * count / total for name, count in expected.items()})


@pytest.mark.parametrize("diverges", [False, True])
def test_experts_of_mixtral_get_adapters_that_merge_and_go(tmp_path, diverges):
    """They are 3-D parameters, no linear layers, and most of the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 32}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=VOCABULARY, **sizes, **more))
    before = weights(model)
    settings = {"method": "lora", "steps": 8, "max_bad_steps": 1, "keep_best": False}
    if diverges:
        spoil(model, nan, calls={3, 4})
        with pytest.raises(Diverged, match="training diverged"):
            tune(model, tmp_path, **settings)
        assert same(weights(model), before)
        return
    result = tune(model, tmp_path, **settings)
    assert result.left_out == {}
    assert result.merge_difference <= 1e-5
    assert before.keys() == weights(model).keys()
    changed = {name for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert {name for name in before if "experts" in name} <= changed


def test_after_an_error_the_adapters_are_gone_and_the_weights_are_the_untrained_ones(tmp_path):
    model = llama()
    before, names = weights(model), list(model.state_dict())
    spoil(model, nan, calls=set(range(3, 100)))
    with pytest.raises(Diverged, match="training diverged"):
        tune(model, tmp_path, method="lora", steps=30)
    assert list(model.state_dict()) == names
    assert same(weights(model), before)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "peft_config")


def test_a_quantised_model_is_refused_before_anything_is_touched(tmp_path):
    model = llama()
    model.quantization_method = "bitsandbytes"
    with pytest.raises(ValueError, match="method 'full' cannot train 8- or 4-bit weights"):
        tune(model, tmp_path)


# Rows and labels ------------------------------------------------------------------------------------------------------


def test_the_label_report_counts_what_is_trained_and_what_of_it_is_prompt():
    ids = torch.arange(6)
    clean = {"input_ids": ids, "labels": torch.tensor([-100, -100, -100, 3, 4, 5]), "prompt_length": 3}
    leaky = {"input_ids": ids, "labels": torch.tensor([-100, 1, 2, 3, 4, 5]), "prompt_length": 3}
    assert label_report([clean]) == {
        "rows": 1,
        "tokens": 6,
        "label_tokens": 3,
        "masked_tokens": 3,
        "scored_tokens": 3,
        "rows_with_prompt_length": 1,
        "prompt_tokens": 3,
        "prompt_label_tokens": 0,
    }
    assert label_report([clean, leaky])["prompt_label_tokens"] == 2
    assert label_report([clean, leaky], prompt_lengths=[4, None])["prompt_label_tokens"] == 1
    with pytest.raises(ValueError, match="one entry per row, got 1 for 2 rows"):
        label_report([clean, leaky], prompt_lengths=[4])


def test_unknown_prompt_lengths_are_unknown_and_not_zero():
    assert label_report(make_rows(2))["prompt_label_tokens"] is None


def test_training_takes_rows_with_a_prompt_length_and_reports_on_them(tmp_path):
    rows = [{**row, "prompt_length": 3} for row in make_rows(6)]
    kept = copy.deepcopy(rows)
    result = tune(llama(), tmp_path, rows=rows)
    assert result.labels == label_report(rows)
    assert result.labels["prompt_label_tokens"] == 3 * 6 - (0 + 1 + 2) * 2
    assert all(row.keys() == other.keys() for row, other in zip(rows, kept, strict=True))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": torch.arange(5)}, r"rows\[1\] needs input_ids and labels of one shape"),
        ({"input_ids": torch.zeros(40).long(), "labels": torch.zeros(40).long()}, "at most 32 tokens .* got 40"),
        ({"labels": torch.full((9,), -100)}, r"rows\[1\] has no label after its first token"),
        ({"input_ids": torch.full((9,), 31)}, r"token ids outside \[0, 31\)"),
        ({"attention_mask": torch.ones(9)}, r"must not carry \['attention_mask'\]"),
    ],
)
def test_a_row_that_cannot_be_trained_on_is_named(tmp_path, change, message):
    rows = make_rows(3)
    rows[1] = {**rows[1], **change}
    with pytest.raises(ValueError, match=message):
        tune(llama(), tmp_path, rows=rows)


def test_no_rows_are_an_error_that_names_them(tmp_path):
    with pytest.raises(ValueError, match="train_rows must hold at least one row"):
        tune(llama(), tmp_path, rows=[])
    with pytest.raises(ValueError, match="validation_rows must hold at least one row"):
        tune(llama(), tmp_path, validation=[])
    assert tune(llama(), tmp_path, validation=[], **NO_VALIDATION).validation_nlls == ()


# Around ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, mode", [("full", False), ("lora", True)])
def test_training_leaves_no_other_trace_than_the_weights(tmp_path, capfd, method, mode):
    model = llama().train(mode)
    model.config.use_cache = True
    frozen = model.model.embed_tokens.weight.requires_grad_(False)
    attributes, hooks = set(vars(model)), len(model.get_input_embeddings()._forward_hooks)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    tune(model, tmp_path, gradient_checkpointing=True, method=method)
    assert torch.equal(torch.rand(3), expected)
    assert model.training is mode
    assert all(module.training is mode for module in model.modules())
    assert model.config.use_cache
    assert not frozen.requires_grad
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert len(model.get_input_embeddings()._forward_hooks) == hooks
    assert set(vars(model)) - attributes <= {
        "_gradient_checkpointing_func",
        "_require_grads_hook",
        "_require_grads_hooks",
    }
    assert capfd.readouterr().out == ""


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, monkeypatch):
    plain, saving, used = gpt2(0.0), gpt2(0.0), []
    tune(plain, tmp_path, **NO_VALIDATION)
    whole = torch.utils.checkpoint.checkpoint
    import transformers.modeling_utils

    monkeypatch.setattr(transformers.modeling_utils, "checkpoint", lambda *a, **k: (used.append(1), whole(*a, **k))[1])
    tune(saving, tmp_path, gradient_checkpointing=True, **NO_VALIDATION)
    assert used
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(plain.parameters(), saving.parameters(), strict=True))


def test_the_seed_alone_decides_and_not_the_state_of_the_global_generators(tmp_path):
    first, second = gpt2(), gpt2()
    torch.manual_seed(1)
    tune(first, tmp_path)
    torch.manual_seed(2)
    tune(second, tmp_path)
    assert same(weights(first), weights(second))


def test_tracker_and_progress_get_every_step(tmp_path):
    follower = Follower()
    result = tune(llama(), tmp_path, follower=follower, eval_every=2)
    assert [told["step"] for told in follower.told] == [1, 2, 3, 4]
    assert [told["validation_nll"] is None for told in follower.told] == [True, False, True, False]
    assert {"step", "steps", "train_loss", "validation_nll", "learning_rate", "tokens_per_second", "seconds"} <= set(
        follower.told[0]
    )
    assert follower.gradient_steps == 4
    assert [metrics["iteration"] for metrics in follower.metrics] == [0, 1, 2, 3, 4]
    assert [m["train_loss"] for m in follower.metrics[1:]] == [loss for _, loss in result.train_losses]
    assert [m["val_loss"] for m in follower.metrics if "val_loss" in m] == [nll for _, nll in result.validation_nlls]
    assert result.record().keys() == set(vars(result)) - {"model"}


def test_a_plain_loop_written_by_hand_learns_the_same_weights(tmp_path):
    """Independent of Trainer: AdamW over the same batches, the model's own loss over padded labels."""
    model, rows = llama(), make_rows(10)
    by_hand = copy.deepcopy(model)
    tune(model, tmp_path, rows=rows, steps=5, schedule="constant", warmup_share=0.0, **NO_VALIDATION)
    optimizer = torch.optim.AdamW(by_hand.parameters(), lr=1e-2, weight_decay=0.0)
    order = trainer.data_order(10, 20, seed=0)
    for step in range(5):
        batch = [rows[index] for index in order[4 * step : 4 * step + 4]]
        nll = sum(
            F.cross_entropy(by_hand(row["input_ids"][None]).logits[0, :-1], row["labels"][1:], reduction="sum")
            for row in batch
        )
        (nll / sum(int((row["labels"][1:] != -100).sum()) for row in batch)).backward()
        torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(model.parameters(), by_hand.parameters(), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_on_cuda_every_precision_learns_and_resumes(tmp_path, precision, method):
    if precision == "bf16" and not runtime.bf16_ok("cuda"):
        pytest.skip("no bfloat16 in hardware")
    settings = {"steps": 40, "precision": precision, "method": method, "checkpoint_every": 100, "eval_every": 20}
    follower = Follower()
    tune(gpt2().cuda(), tmp_path, follower=follower, should_stop=stop_after(follower, 20), **settings)
    result = tune(gpt2().cuda(), tmp_path, resume=True, **settings)
    assert result.precision == precision
    assert result.validation_nlls[-1][1] < result.validation_nlls[0][1] - 0.2
