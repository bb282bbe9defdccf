"""How is a model fine-tuned, wholly or by LoRA, so that it ends finite, reproducible and in its best state?

`fine_tune` is the one entry. What happens within a step stands in trainer.py, files on disk in checkpoints.py. This
module imports neither torch nor transformers before `fine_tune` is called, so that forms and commands can read the
config cheaply.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator

from nbhelpers import runtime
from nbhelpers.strict import StrictConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

LEARNING_RATES = {"full": 5e-5, "lora": 2e-4, "qlora": 2e-4}  # where learning_rate is None
IGNORE = -100  # a label with this value has no loss

Row = Mapping[str, Any]  # {"input_ids": (length,), "labels": (length,), optional "prompt_length": int}


class TrainingConfig(StrictConfig):
    """Everything that decides a fine-tuning run. Refuses nonsense and unknown names at birth."""

    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="train all weights, low-rank adapters merged at the end, or adapters on a 4-bit model"
    )
    steps: int = Field(200, ge=1, le=10_000_000, description="optimizer steps")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="peak learning rate; None takes 5e-5 for full and 2e-4 for lora and qlora"
    )
    batch_size: int = Field(8, ge=1, le=65_536, description="rows per optimizer step (effective batch)")
    micro_batch_size: int | None = Field(
        None, ge=1, le=65_536, description="sequences per pass; None starts with batch_size; halved when memory ends"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="how the learning rate falls after warm-up (linear and cosine end near 0)"
    )
    warmup_share: float = Field(0.05, ge=0, le=1, description="share of the steps in which the learning rate rises")
    weight_decay: float = Field(
        0.0, ge=0, le=1, description="AdamW weight decay of matrices (never of norms and biases)"
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="gradients are scaled down to this total norm; None = off"
    )
    packing: bool = Field(
        True, description="short rows share a sequence without seeing each other: less padding, the same loss"
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="rank of the adapters (lora, qlora)")
    lora_alpha: float = Field(16.0, gt=0, description="adapters are scaled by lora_alpha / lora_rank (lora, qlora)")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters (lora, qlora)")
    lora_targets: tuple[str, ...] | None = Field(
        None, min_length=1, description="last names of the layers that get adapters (q_proj); None = all but the output"
    )
    eval_every: int | None = Field(
        50, ge=1, description="steps between validations (also at step 0 and the end); None = off"
    )
    early_stopping_patience: int | None = Field(
        None, ge=1, description="end after this many validations without a better one; None = off"
    )
    keep_best: bool = Field(True, description="end with the weights of the best validation, step 0 included")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of data order, dropout and adapters")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        "auto", description="arithmetic of the forward pass; trained weights are always float32; auto asks the device"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice to need less memory")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints to resume from; None = off")
    max_bad_steps: int = Field(3, ge=1, description="non-finite steps in a row before the last good state is restored")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> TrainingConfig:
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size must be at most batch_size {self.batch_size}, got {self.micro_batch_size}"
            )
        if self.eval_every is None and (self.keep_best or self.early_stopping_patience is not None):
            raise ValueError(
                "keep_best and early_stopping_patience need validations, got eval_every None; set it or both off"
            )
        return self


@dataclass(frozen=True)
class TrainingResult:
    """What came out of `fine_tune`. `record()` is the same without the model, for a result file."""

    model: nn.Module  # the object that was given, with the trained weights (LoRA merged in, QLoRA's adapters in place)
    status: Literal["finished", "stopped"]
    stopped_early: bool  # early stopping ended it; still "finished"
    steps: int  # steps made, skipped ones included
    weights_step: int  # the step whose weights the model has now
    train_losses: tuple[tuple[int, float], ...]  # (step, mean loss over the label tokens of the effective batch, nats)
    validation_nlls: tuple[tuple[int, float], ...]  # (step, nats per scored token)
    best_step: int | None
    best_validation_nll: float | None
    skipped_steps: int
    micro_batch_size: int  # finally used
    label_tokens: int  # scored label tokens that took part in optimizer steps
    seconds: float  # all attempts, validations and checkpoints included
    tokens_per_second: float | None  # real tokens, padding excluded, per second of training steps
    trainable_parameters: int
    total_parameters: int  # of the model without adapters
    left_out: dict[str, float]  # lora, qlora: matrices without an adapter -> share of all parameters
    learning_rate: float  # peak, as resolved
    precision: str  # as resolved
    labels: dict[str, int | None]  # label_report of the training rows
    merge_difference: float | None  # lora: largest |logit change| by merging / largest |logit|, on one row
    merged: dict[str, Any] | None  # sparse lora: what merging did, and its checked facts (sparse_lora.Merged)
    masked: dict[str, Any] | None  # sparse full: what the mask callback saw in this attempt (SparseMaskCallback.report)
    packing: str  # "on", or "off: " and why
    loss_check: dict[
        str, float
    ]  # "ours" beside "own": nats a label token of a few rows, ours and by the model's logits
    processes: int  # that trained together

    def record(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "model"}


def label_report(rows: Sequence[Row], prompt_lengths: Sequence[int | None] | None = None) -> dict[str, int | None]:
    """Which tokens of these rows are trained on, and whether any of them belongs to a prompt.

    prompt_lengths: tokens of prompt at the start of each row; without it each row's own "prompt_length" counts.
    `prompt_label_tokens` is None where no row says how long its prompt is: unknown is not 0.
    """
    if prompt_lengths is None:
        prompt_lengths = [row.get("prompt_length") for row in rows]
    if len(prompt_lengths) != len(rows):
        raise ValueError(f"prompt_lengths must have one entry per row, got {len(prompt_lengths)} for {len(rows)} rows")
    known = [(row["labels"], length) for row, length in zip(rows, prompt_lengths, strict=True) if length is not None]
    tokens = sum(len(row["labels"]) for row in rows)
    labelled = sum(int((row["labels"] != IGNORE).sum()) for row in rows)
    return {
        "rows": len(rows),
        "tokens": tokens,
        "label_tokens": labelled,
        "masked_tokens": tokens - labelled,
        "scored_tokens": sum(int((row["labels"][1:] != IGNORE).sum()) for row in rows),
        "rows_with_prompt_length": len(known),
        "prompt_tokens": sum(length for _, length in known) if known else None,
        "prompt_label_tokens": sum(int((labels[:length] != IGNORE).sum()) for labels, length in known)
        if known
        else None,
    }


def check_rows(rows: Sequence[Row], name: str, model: nn.Module) -> list[dict[str, torch.Tensor]]:
    """The rows with only what is trained on; ValueError names the first one that cannot be."""
    if not rows:
        raise ValueError(f"{name} must hold at least one row, got none")
    longest = getattr(model.config, "max_position_embeddings", None)
    vocabulary = model.get_input_embeddings().num_embeddings
    checked = []
    for index, row in enumerate(rows):
        where, ids, labels = f"{name}[{index}]", row["input_ids"], row["labels"]
        lost = {"attention_mask", "position_ids", "token_type_ids"} & set(row)
        if lost:
            raise ValueError(f"{where} must not carry {sorted(lost)}: rows are whole, unpadded texts")
        if ids.ndim != 1 or ids.shape != labels.shape:
            raise ValueError(
                f"{where} needs input_ids and labels of one shape (length,), "
                f"got {tuple(ids.shape)} and {tuple(labels.shape)}"
            )
        if longest is not None and len(ids) > longest:
            raise ValueError(
                f"{where} must have at most {longest} tokens for this model, got {len(ids)}; shorten the window"
            )
        if not bool((labels[1:] != IGNORE).any()):
            raise ValueError(f"{where} has no label after its first token, so nothing to learn; drop the row")
        if not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ValueError(f"{where} has token ids outside [0, {vocabulary}): another model's tokenizer?")
        checked.append({"input_ids": ids.long().cpu(), "labels": labels.long().cpu()})
    return checked


def resolve_precision(asked: str, device: str) -> str:
    """`fp32`, `bf16` or `fp16` for this device; ValueError where the device cannot do what was asked for."""
    if asked == "auto":
        if device != "cuda":
            return "fp32"
        return "bf16" if runtime.bf16_ok(device) else "fp16"
    if asked == "bf16" and not runtime.bf16_ok(device):
        raise ValueError(
            f"precision 'bf16' needs a device with bfloat16 in hardware, got {device!r}; use 'auto' or 'fp32'"
        )
    if asked == "fp16" and device != "cuda":
        raise ValueError(f"precision 'fp16' needs a CUDA device, got {device!r}; use 'auto' or 'fp32'")
    return asked


def fine_tune(
    model: nn.Module,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row] | None,
    config: TrainingConfig,
    *,
    output_dir: str | Path,
    tracker: Any = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    sampler: Callable[[], str] | None = None,
    resume: bool = False,
    sparse: tuple[Mapping[str, torch.Tensor] | None, str] | None = None,
) -> TrainingResult:
    """Fine-tune `model` in place, where it stands (its device), and say what happened.

    Args:
        train_rows, validation_rows: see `Row`; lengths may differ. The loss is the mean over all label tokens of the
            effective batch, whatever the micro-batch; the first token of a row is never scored (shift).
        output_dir: takes checkpoints, if any; without checkpoint_every nothing is written.
        tracker: gets log_metrics per step, increment_gradient_step per optimizer step, and event("oom" |
            "non_finite" | "overflow" | "restored" | "early_stop" | "best_restored" | "checkpoint" | "resume" |
            "packing_off" | "sample", ...).
        progress: gets a plain dict after each step.
        sampler: asked at each validation for a text that the model writes as it is then.
        should_stop: asked before each step, micro-batch and validation batch. After it the unfinished step is thrown
            away, the weights stay those of the last whole step (not the best ones), status is "stopped", and with
            checkpoint_every a checkpoint is left.
        resume: go on from the newest complete checkpoint in output_dir (from the start if there is none yet).
        sparse: (mask, mode) of sparse_lora.put_on. Method lora: the model is masked, and merged with proofs. Method
            full: it is masked, and in mode sparse_to_sparse masked again after every optimizer step.

    Started by torchrun, every process calls this with the same arguments; each takes its share of the rows of a step,
    and only the first one needs tracker, progress and sampler. The loss curve is that of one process.

    Raises:
        ValueError: rows, config, device or checkpoint do not fit. tracking.Diverged: non-finite steps came back after
        the last good state was restored and the learning rate halved. torch.OutOfMemoryError: one row is too much.
        The global random state is afterwards what it was before.
    """
    from nbhelpers import checkpoints, faster_layers, masked_training, models, preparation, ranks, trainer

    started = time.perf_counter()
    if sparse is not None and config.method == "qlora":
        raise ValueError("a mask is kept by methods 'lora' and 'full', got 'qlora': 4-bit weights cannot be merged")
    train = check_rows(train_rows, "train_rows", model)
    validation = check_rows(validation_rows or [], "validation_rows", model) if config.eval_every else []
    device = next(model.parameters()).device
    precision = resolve_precision(config.precision, device.type)
    learning_rate = config.learning_rate or LEARNING_RATES[config.method]
    labels = label_report(train_rows)
    total = models.parameters(model)
    identity = checkpoints.identity(model, config, train, validation) | masked_training.identity(sparse)
    folder = checkpoints.Folder(output_dir, identity)

    with (
        ranks.joined(device.type),
        runtime.seeded(config.seed),
        tempfile.TemporaryDirectory(prefix="nbhelpers-") as scratch,
        preparation.prepared(model, config, precision, masked_training.adapters_for(config, sparse)) as trainable,
    ):
        writes = config.checkpoint_every is not None
        start_from = ranks.told_by_first(folder.start(resume, writes=writes) if ranks.is_first() else None)
        from_step = 0 if start_from is None else int(start_from.name.rpartition("-")[2])
        left_out = preparation.left_out(model, total) if config.method != "full" else {}
        callback = masked_training.callback(model, config, sparse)
        run = trainer.FineTuner(
            trainable,
            train,
            validation,
            config,
            learning_rate=learning_rate,
            precision=precision,
            scratch=scratch,
            folder=folder,
            tracker=tracker,
            progress=progress,
            sampler=sampler,
            should_stop=should_stop,
            after_update=None if callback is None else callback.on_step_end,
        )
        try:
            with faster_layers.in_use(trainable, precision):
                loss_check = run.check_loss()
                status, weights_step = run.run(start_from, started)
            state, trained = run.progress, sum(p.numel() for p in run.parameters.values())
        finally:
            run.close()
        merged = merge_difference = None
        if sparse is not None and config.method == "lora":
            merged = masked_training.merge(trainable, train[0])
            merge_difference = merged["difference"]
        elif config.method == "lora":
            merge_difference = preparation.merge(trainable, train[0])
    return TrainingResult(
        model=model,
        status=status,
        stopped_early=state.stopped_early,
        steps=state.step,
        weights_step=weights_step,
        train_losses=tuple((step, loss) for step, loss in state.train_losses),
        validation_nlls=tuple((step, nll) for step, nll in state.validation_nlls),
        best_step=state.best_step,
        best_validation_nll=state.best_validation_nll,
        skipped_steps=state.skipped_steps,
        micro_batch_size=state.micro_batch_size,
        label_tokens=state.label_tokens,
        seconds=state.seconds,
        tokens_per_second=state.tokens / state.step_seconds if state.step_seconds else None,
        trainable_parameters=trained,
        total_parameters=total,
        left_out=left_out,
        learning_rate=learning_rate,
        precision=precision,
        labels=labels,
        merge_difference=merge_difference,
        merged=merged,
        masked=None if callback is None else callback.report() | {"from_step": from_step},
        packing="on" if run.packing_off is None else f"off: {run.packing_off}",
        loss_check=loss_check,
        processes=ranks.count(),
    )
