"""Which attention heads matter least, and which are closed?

Scores and selection are two things: a strategy says how important each head is, `choose` how many go. Every strategy
is a function of one shape, `strategy(model, rows, seed) -> (layers, heads)`: higher is more important, and a head that
does nothing (zero query, zero output columns) scores `DEAD`. Scores are taken with the heads closed so far closed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

import torch
import torch.nn.functional as F
from torch import nn

from nbhelpers import attention, data, evaluate
from nbhelpers.architecture import (
    Geometry,
    attention_modules,
    head_columns,
    model_geometry,
    output_weight,
    query_rows,
)
from nbhelpers.attention import Head
from nbhelpers.registry import Registry
from nbhelpers.tracking import Interrupted

STRATEGIES = Registry("strategy")
DEAD = 0.0  # what a head that does nothing scores, under every strategy but random
DEAD_TOLERANCE = 1e-5
ROUNDS = 20  # iterative selection scores again after each twentieth of all heads
log = logging.getLogger(__name__)

Scores = torch.Tensor  # (layers, heads), float64, any scale, higher = keep


@STRATEGIES.register("random")
def random_scores(model: nn.Module, rows: Sequence[dict], seed: int = 0) -> Scores:
    """Uniform numbers from a seeded generator: what any other strategy must beat."""
    geo = model_geometry(model)
    return torch.rand(geo.layers, geo.heads, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@STRATEGIES.register("magnitude")
def magnitude_scores(model: nn.Module, rows: Sequence[dict], seed: int = 0) -> Scores:
    """||W_O[:, head]||_2: Frobenius norm of the head's columns of the output projection. Looks at no text."""
    geo = model_geometry(model)
    weights = [output_weight(model, module).detach().double().cpu() for module in attention_modules(model)]
    return torch.stack([torch.stack([w[:, head_columns(geo, h)].norm() for h in range(geo.heads)]) for w in weights])


@STRATEGIES.register("entropy")
def entropy_scores(model: nn.Module, rows: Sequence[dict], seed: int = 0) -> Scores:
    """1 - mean over query positions of H(attention row) / log(keys it may see): sharp attention counts as important.

    That low entropy means important is a convention, not a law. The first position (one visible key) and padding are
    left out; 0 = attends evenly to all it sees, 1 = always to a single token.
    """
    with evaluate.evaluation_mode(model), attention.entropy_meter(model) as meter, torch.inference_mode():
        for batch in batches(model, rows):
            meter.real_queries = batch["attention_mask"].bool()
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    return 1 - meter.mean()


@STRATEGIES.register("gradient")
def gradient_scores(model: nn.Module, rows: Sequence[dict], seed: int = 0) -> Scores:
    """mean over rows of |d loss / d gate|, divided by each layer's l2 norm (Michel, Levy, Neubig 2019, 1905.10650).

    The loss of a row is its mean token nll. Closed heads score 0 and are left out of the norm.
    """
    geo = model_geometry(model)
    total = torch.zeros(geo.layers, geo.heads, dtype=torch.float64)
    for batch in batches(model, rows):
        rows_here = batch["input_ids"].shape[0]
        with (
            evaluate.evaluation_mode(model),
            attention.differentiable_gates(model, rows_here) as gates,
            torch.enable_grad(),
        ):
            mask = {} if batch["attention_mask"].all() else {"attention_mask": batch["attention_mask"]}
            logits = model(input_ids=batch["input_ids"], **mask, use_cache=False).logits[:, :-1].float()
            labels = batch["labels"][:, 1:]
            losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=data.IGNORED, reduction="none")
            row_means = losses.sum(1) / (labels != data.IGNORED).sum(1).clamp(min=1)
            gradients = torch.autograd.grad(row_means.sum(), gates)
        total += torch.stack([gradient.abs().sum(0).double().cpu() for gradient in gradients])
    scores = total / len(rows)
    for layer, head in attention.closed_heads(model):
        scores[layer, head] = 0
    return scores / scores.norm(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)


@STRATEGIES.register("ablation")
def ablation_scores(model: nn.Module, rows: Sequence[dict], seed: int = 0) -> Scores:
    """loss with this head closed - loss as it is, in nats a token: the true cost of losing that head alone.

    One pass over the rows for every open head, from its own layer on: what the layers below give is computed once a
    batch. Negative: the model is better without it.
    """
    geo, closed = model_geometry(model), set(attention.closed_heads(model))
    open_heads = [head for head in all_heads(geo.layers, geo.heads) if head not in closed]
    scores, tokens = torch.zeros(geo.layers, geo.heads, dtype=torch.float64), 0
    size = evaluate.batch_rows(model, max(len(row["input_ids"]) for row in rows))
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        with attention.reusable_layers(model) as reuse_below:
            before, counts = evaluate.row_losses(model, batch, batch_size=size)
            for layer, head in open_heads:
                with attention.heads_closed(model, [(layer, head)]), reuse_below(layer):
                    scores[layer, head] += (evaluate.row_losses(model, batch, batch_size=size)[0] - before).sum()
        tokens += int(counts.sum())
    return scores / tokens


def all_heads(layers: int, heads: int) -> list[Head]:
    return [(layer, head) for layer in range(layers) for head in range(heads)]


def batches(model: nn.Module, rows: Sequence[dict]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows collated on the model's device, small enough for a backward pass."""
    size = max(1, evaluate.batch_rows(model, max(len(row["input_ids"]) for row in rows)) // 4)
    for start in range(0, len(rows), size):
        yield data.collate(rows[start : start + size], next(model.parameters()).device)


def count(level: float, heads: int) -> int:
    """Heads to close: round-half-even of the exact decimal level times the heads (0.3 is 3/10)."""
    if not 0 <= level <= 1:
        raise ValueError(f"level must be in [0, 1], got {level}")
    return int((Decimal(str(level)) * heads).to_integral_value(ROUND_HALF_EVEN))


@dataclass(frozen=True)
class Selection:
    """closed: sorted (layer, head) pairs; rounds: what was scored and then closed, in order; scores: of the first
    round; group_size: heads that could only go together (1 without KV groups)."""

    closed: list[Head]
    rounds: list[dict]
    group_size: int = 1

    @property
    def newly_closed(self) -> list[Head]:
        return sorted(tuple(head) for number in self.rounds for head in number["closed"])

    @property
    def scores(self) -> list[list[float]]:
        return self.rounds[0]["scores"] if self.rounds else []


def check_budget(
    geo: Geometry, number: int, min_per_layer: int, *, group_size: int = 1, closed: Iterable[Head] = ()
) -> None:
    """ValueError where `number` heads, `closed` among them, cannot go while every layer keeps `min_per_layer`."""
    if not 0 <= min_per_layer <= geo.heads:
        raise ValueError(f"min_heads_per_layer must be in [0, {geo.heads}], got {min_per_layer}")
    closed = set(closed)
    most = len(closed)
    for layer in range(geo.layers):
        left = geo.heads - sum(other == layer for other, _ in closed)
        most += max(0, left - min_per_layer) // group_size * group_size
    if number > most:
        raise ValueError(
            f"cannot close {number} of {geo.total} heads and keep {min_per_layer} in each of {geo.layers} layers: "
            f"at most {most}; lower level or min_heads_per_layer"
        )


def choose(
    scores: Scores,
    number: int,
    geo: Geometry,
    *,
    closed: Iterable[Head] = (),
    min_per_layer: int = 0,
    group_size: int = 1,
) -> list[Head]:
    """The `number` least important heads not yet closed, in the order of their scores; ties by layer, then head.

    `group_size`: heads that go together (a KV group), least mean score first; `number` is then a multiple of it.
    Heads whose layer would keep fewer than `min_per_layer` stay.
    """
    closed = set(closed)
    left = {layer: geo.heads - sum(other == layer for other, _ in closed) for layer in range(geo.layers)}
    units = [
        (scores[layer, start : start + group_size].mean().item(), layer, start)
        for layer in range(geo.layers)
        for start in range(0, geo.heads, group_size)
        if (layer, start) not in closed
    ]
    chosen: list[Head] = []
    for _, layer, start in sorted(units):
        if len(chosen) + group_size > number:
            break
        if left[layer] - group_size >= min_per_layer:
            left[layer] -= group_size
            chosen += [(layer, start + offset) for offset in range(group_size)]
    return chosen


def prune(
    model: nn.Module,
    rows: Sequence[dict],
    strategy: str,
    level: float,
    *,
    iterative: bool = False,
    heads_per_round: int | None = None,
    min_per_layer: int = 0,
    kv_groups: bool = False,
    seed: int = 0,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> Selection:
    """Close heads, least important first, until the share `level` of all heads is closed; say what was scored.

    One-shot scores once; iterative scores again after every `heads_per_round` heads (a twentieth of all if None).
    `kv_groups`: whole groups of heads that share keys and values; the level is then rounded to groups.
    """
    score = STRATEGIES[strategy]
    geo = model_geometry(model)
    group_size = geo.group_size if kv_groups else 1
    target = count(level, geo.total // group_size) * group_size
    closed = attention.closed_heads(model)
    if len(closed) > target:
        raise ValueError(f"level {level} means {target} closed heads, the model already has {len(closed)}; raise level")
    whole = {(layer, head - head % group_size + at) for layer, head in closed for at in range(group_size)}
    if whole != set(closed):
        raise ValueError("kv_groups needs whole groups, the model already has single closed heads; leave kv_groups off")
    check_budget(geo, target, min_per_layer, group_size=group_size, closed=closed)
    step = target
    if iterative:
        step = heads_per_round or -(-geo.total // ROUNDS)
        step = max(group_size, step - step % group_size)
    rounds: list[dict] = []
    while len(closed) < target:
        if should_stop is not None and should_stop():
            raise Interrupted(f"stopped with {len(closed)} of {target} heads closed")
        scores = score(model, rows, seed=seed + len(rounds))
        if not scores.isfinite().all():
            raise FloatingPointError(f"strategy {strategy!r} gave a score that is not finite; try float32")
        wanted = min(step, target - len(closed))
        chosen = choose(scores, wanted, geo, closed=closed, min_per_layer=min_per_layer, group_size=group_size)
        if not chosen:
            raise RuntimeError(f"no head was chosen with {len(closed)} of {target} closed, check_budget let it pass")
        closed = sorted([*closed, *chosen])
        attention.close_heads(model, closed)
        rounds.append({"scores": scores.tolist(), "closed": [list(head) for head in chosen]})
        log.info("strategy %s closed %d of %d heads", strategy, len(closed), target)
        if progress is not None:
            progress({"done": len(closed), "total": target})
    return Selection(closed=closed, rounds=rounds, group_size=group_size)


@contextmanager
def planted_dead_head(model: nn.Module, head: Head) -> Iterator[None]:
    """Make one head do nothing: its query weights (so it attends evenly) and its output columns are zero inside."""
    layer, index = head
    module, geo = attention_modules(model)[layer], model_geometry(model)
    weight, bias = query_rows(model, module, index)
    columns = output_weight(model, module)[:, head_columns(geo, index)]
    parts = [part for part in (weight, bias, columns) if part is not None]
    kept = [copy.deepcopy(part.detach()) for part in parts]
    try:
        with torch.no_grad():
            for part in parts:
                part.zero_()
        yield
    finally:
        with torch.no_grad():
            for part, value in zip(parts, kept, strict=True):
                part.copy_(value)


def finds_dead_head(
    model: nn.Module, rows: Sequence[dict], strategy: str, head: Head, seed: int = 0
) -> tuple[bool, float]:
    """(found, score) of a head planted dead: a strategy that looks at the model gives it the score DEAD.

    Catches a strategy that was swapped for random numbers, not one swapped for another that looks at the model.
    """
    with planted_dead_head(model, head):
        score = STRATEGIES[strategy](model, rows, seed=seed)[head].item()
    return abs(score - DEAD) <= DEAD_TOLERANCE, score
