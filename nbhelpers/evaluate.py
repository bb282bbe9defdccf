"""How well does a model predict text, and what does it write?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from nbhelpers import data, losses, models, runtime
from nbhelpers.tracking import Interrupted

LOGIT_BYTES = 256 * 2**20  # most bytes of float32 logits held at a time; it sets the batch size


@dataclass(frozen=True)
class Perplexity:
    """nll: nats a scored token; perplexity: exp(nll); tokens: scored tokens; windows: rows read."""

    nll: float
    perplexity: float
    tokens: int
    windows: int


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """No dropout inside: what is measured of a model that is being trained is that of its weights."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.inference_mode()
def row_losses(
    model: nn.Module,
    rows: Sequence[dict],
    *,
    batch_size: int | None = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll, tokens): per row the summed nll in nats (rows,) float64 and the number of scored tokens (rows,).

    A row's first token is not scored, nor are positions labelled -100 or padding. The model is put into evaluation mode
    and back. Raises FloatingPointError where a row's loss is not finite, naming the row.
    """
    if not rows:
        raise ValueError("no rows to score; give more text or a smaller window")
    batch_size = batch_size or batch_rows(model, max(len(row["input_ids"]) for row in rows))
    device = next(model.parameters()).device
    sums, counts = [], []
    with evaluation_mode(model):
        for start in range(0, len(rows), batch_size):
            if should_stop is not None and should_stop():
                raise Interrupted(f"stopped after {start} of {len(rows)} windows")
            nll, tokens = losses.row_nlls(model, data.collate(rows[start : start + batch_size], device))
            sums.append(nll)
            counts.append(tokens)
            if progress is not None:
                progress({"done": min(start + batch_size, len(rows)), "total": len(rows)})
    nll = torch.cat(sums)
    if not nll.isfinite().all():
        row = int((~nll.isfinite()).nonzero()[0])
        raise FloatingPointError(
            f"the loss of window {row} is {nll[row].item()}; try float32, or check the model's weights"
        )
    return nll, torch.cat(counts)


def batch_rows(model: nn.Module, length: int) -> int:
    """Rows of this length whose float32 logits stay within LOGIT_BYTES (at least 1, at most 64)."""
    return max(1, min(64, LOGIT_BYTES // (4 * length * model.config.vocab_size)))


@torch.inference_mode()
def tokens_per_second(
    models_: Sequence[nn.Module],
    rows: Sequence[dict],
    *,
    passes: int = 5,
    should_stop: Callable[[], bool] | None = None,
) -> list[float]:
    """Tokens that each model reads a second, measured side by side: the same rows, as one batch, in turn.

    One pass each is not counted, then `passes` rounds, every other one in reverse order; the medians are returned.
    """
    batch = data.collate(rows, next(models_[0].parameters()).device)
    batch.pop("labels")
    tokens = int(batch["attention_mask"].sum())
    if batch["attention_mask"].all():
        batch.pop("attention_mask")
    seconds: list[list[float]] = [[] for _ in models_]
    order = list(range(len(models_)))
    for number in range(passes + 1):
        for at in order if number % 2 else reversed(order):
            if should_stop is not None and should_stop():
                raise Interrupted(f"stopped in round {number} of {passes} of measuring speed")
            with evaluation_mode(models_[at]):
                started = _now(models_[at])
                models_[at](**batch, use_cache=False)
                seconds[at].append(_now(models_[at]) - started)
    return [tokens / statistics.median(found[1:]) for found in seconds]


def _now(model: nn.Module) -> float:
    """Seconds of a clock, after what was given to the model's device is done."""
    device = next(model.parameters()).device
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def perplexity(model: nn.Module, rows: Sequence[dict], **options) -> Perplexity:
    """exp(sum of token nll / scored tokens) over the rows of data.rows. ValueError if nothing is scored."""
    nll, tokens = row_losses(model, rows, **options)
    total = int(tokens.sum())
    if total == 0:
        raise ValueError("no token is scored: every label is masked")
    mean = float(nll.sum()) / total
    if mean > 700:
        raise FloatingPointError(f"the loss is {mean:.0f} nats a token, its perplexity is no finite number")
    return Perplexity(nll=mean, perplexity=math.exp(mean), tokens=total, windows=len(rows))


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer,
    prompt: str,
    *,
    max_new_tokens: int = 60,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
) -> str:
    """The prompt and what the model writes after it. Temperature 0 is greedy; sampling is seeded and leaves the global
    generators as they were."""
    if not prompt:
        raise ValueError("prompt must not be empty; give at least one word")
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}; 0 takes the likeliest token")
    inputs = tokenizer(prompt, return_tensors="pt").to(next(model.parameters()).device)
    length, limit = inputs["input_ids"].shape[1], models.max_positions(model) or 10**9
    if length == 0:
        raise ValueError(f"prompt {prompt!r} has no tokens; give at least one word")
    if length >= limit:
        raise ValueError(f"prompt has {length} tokens, the model has {limit} positions; shorten the prompt")
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    eos = model.generation_config.eos_token_id
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = eos[0] if isinstance(eos, list) else eos
    with evaluation_mode(model), runtime.seeded(seed):
        output = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=min(max_new_tokens, limit - length),
            pad_token_id=pad,
            **sampling,
        )
    return tokenizer.decode(output[0], skip_special_tokens=True)
