"""What does a model lose on its labelled tokens? Logits only where there is a label, a few rows of them at a time.

A (batch, length, vocabulary) tensor never exists: the output projection is left out of the forward pass, positions with
a label are picked, and the projection, the softmax and its gradient are made chunk by chunk. With 128k tokens in the
vocabulary this is most of the memory of a training step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from nbhelpers import data

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 256 * 2**20}  # most float32 logits held at a time; more gains no speed
VOCABULARY_PART = 2048  # tokens of the vocabulary whose logits are made at a time where many are read, on a CPU
RESCALED = (
    "final_logit_softcapping",
    "logits_scaling",
    "logit_scale",
)  # config fields of logits changed after the head


def nll_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed nll in nats over the labels of a collated batch, float32; a row's first token is not scored (shift)."""
    targets, scored = _targets(batch)
    if not has_plain_head(model):
        logits = model(**_inputs(batch), use_cache=False).logits[:, :-1]
        return F.cross_entropy(logits[scored].float(), targets, reduction="sum")
    hidden, head = _before_head(model, batch)[:, :-1][scored], _inner(model).get_output_embeddings()
    return _ChunkedLoss.apply(hidden, head.weight, head.bias, targets, _chunk(head.weight))


@torch.no_grad()
def row_nlls(model: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(nll, tokens) of each row of a collated batch: summed nats (rows,) float64, scored tokens (rows,), on the CPU."""
    targets, scored = _targets(batch)
    if has_plain_head(model):
        hidden, head = _before_head(model, batch)[:, :-1][scored], _inner(model).get_output_embeddings()
        pieces = (F.linear(part, head.weight, head.bias) for part in hidden.split(_chunk(head.weight)))
    else:
        pieces = [model(**_inputs(batch), use_cache=False).logits[:, :-1][scored]]
    nlls, at = torch.empty(len(targets), device=targets.device), 0
    for logits in pieces:
        part = slice(at, at + len(logits))
        nlls[part] = F.cross_entropy(logits.float(), targets[part], reduction="none")
        at += len(logits)
    sums = torch.zeros(len(scored), dtype=torch.float64)
    sums.index_add_(0, scored.nonzero()[:, 0].cpu(), nlls.double().cpu())
    return sums, scored.sum(1).cpu()


@torch.no_grad()
def log_probabilities(
    model: nn.Module, inputs: dict[str, Any], places: list[tuple[int, int]], wanted: list[tuple[int, int]]
) -> tuple[list[float], list[bool]]:
    """(log-probabilities in nats, float32; whether each is the likeliest) of next tokens.

    inputs: of the model's forward pass. places: (row, position) at which next tokens are scored, each once. wanted:
    (number of a place, token), in the order of the places.
    """
    rows, positions = (list(part) for part in zip(*places, strict=True))
    inputs = {"use_cache": False, **inputs}
    if has_plain_head(model):
        head = _inner(model).get_output_embeddings()
        with _no_head(head):
            hidden = model(**inputs).logits[rows, positions]
        pieces = _parts_of_vocabulary(hidden, head)
    else:
        pieces = [model(**inputs).logits[rows, positions]]
    device, first = next(model.parameters()).device, 0
    at, tokens = (torch.tensor(part, device=device) for part in zip(*wanted, strict=True))
    picked = torch.empty(len(wanted), device=device)
    most, sums = torch.full((len(places), 1), -torch.inf, device=device), torch.zeros(len(places), 1, device=device)
    for logits in pieces:  # exp(logits - most), summed; the sum so far is scaled where a part holds something greater
        logits = logits.float()
        here = ((tokens >= first) & (tokens < first + logits.shape[1])).nonzero()[:, 0]
        picked[here] = logits[at[here], tokens[here] - first]
        first += logits.shape[1]
        greatest = torch.maximum(most, logits.amax(-1, keepdim=True))
        sums = sums * (most - greatest).exp_() + logits.sub_(greatest).exp_().sum(-1, keepdim=True)
        most = greatest
    above = picked - most[at, 0]
    return (above - sums.log_()[at, 0]).tolist(), (above == 0).tolist()


def _parts_of_vocabulary(hidden: torch.Tensor, head: nn.Linear) -> Iterator[torch.Tensor]:
    """Logits of all positions for a part of the vocabulary at a time: (positions, tokens of the part).

    On a CPU a large vocabulary's weights are multiplied nearly twice as fast in such parts as with few positions each.
    """
    kind = head.weight.device.type
    most = CHUNK_BYTES.get(kind, CHUNK_BYTES["cpu"]) // (4 * max(1, len(hidden)))
    size = max(256, min(most, VOCABULARY_PART)) if kind == "cpu" else max(256, most)
    for start in range(0, len(head.weight), size):
        part = slice(start, start + size)
        yield F.linear(hidden, head.weight[part], None if head.bias is None else head.bias[part])


def has_plain_head(model: nn.Module) -> bool:
    """Whether the logits are one plain linear layer's output, so that they can be made where they are needed."""
    inner = _inner(model)
    head = inner.get_output_embeddings()
    hooked = head is None or "forward" in head.__dict__ or head._forward_hooks or head._forward_pre_hooks
    text = inner.config.get_text_config()
    changed = [name for name in vars(text) if name in RESCALED or "softcap" in name or "soft_cap" in name]
    changed = [name for name in changed if not name.startswith("attn")]
    scaled = any(getattr(text, name) not in (None, 1, 1.0) for name in changed)
    return type(head) is nn.Linear and not hooked and not scaled


def _targets(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """(targets, scored): the labels (n,) that are scored; which positions predict them, bool (batch, length - 1)."""
    labels = batch["labels"][:, 1:]
    scored = labels != data.IGNORED
    return labels[scored], scored


def _inputs(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the model is given; no mask where there is no padding, so that the fastest attention can be used."""
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    if inputs["attention_mask"].ndim == 2 and inputs["attention_mask"].all():
        inputs.pop("attention_mask")
    return inputs


def _inner(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _before_head(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """What enters the output projection: (batch, length, width), through the model's own forward pass."""
    with _no_head(_inner(model).get_output_embeddings()):
        return model(**_inputs(batch), use_cache=False).logits


@contextmanager
def _no_head(head: nn.Module) -> Iterator[None]:
    head.forward = _same
    try:
        yield
    finally:
        del head.forward


def _same(hidden: torch.Tensor) -> torch.Tensor:
    return hidden


def _chunk(weight: torch.Tensor) -> int:
    """Rows of float32 logits that stay within CHUNK_BYTES."""
    return max(1, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cpu"]) // (4 * len(weight)))


class _ChunkedLoss(torch.autograd.Function):
    """Summed cross-entropy of `hidden @ weight.T + bias`, its gradients made in the forward pass, chunk by chunk.

    hidden: (n, width); weight: (vocabulary, width); bias: (vocabulary,) or None; targets: (n,). The gradient of a
    sum with respect to the logits is softmax - one-hot, so nothing but the gradients has to be kept.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, chunk):
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = torch.zeros_like(weight) if wants_weight else None
        of_bias = torch.zeros_like(bias) if wants_bias else None
        total = torch.zeros((), device=hidden.device)
        for start in range(0, len(hidden), chunk):
            part, wanted = hidden[start : start + chunk], targets[start : start + chunk, None]
            logs = F.log_softmax(F.linear(part, weight, bias).float(), -1)
            total -= logs.gather(1, wanted).sum()
            slope = logs.exp_().scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=logs.dtype))
            if wants_bias:
                of_bias += slope.sum(0)
            slope = slope.to(part.dtype)
            if wants_hidden:
                of_hidden[start : start + chunk] = slope @ weight
            if wants_weight:
                of_weight += slope.T @ part
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        return total

    @staticmethod
    def backward(ctx, factor):
        scaled = [None if slope is None else slope * factor.to(slope.dtype) for slope in ctx.saved_tensors]
        return *scaled, None, None
