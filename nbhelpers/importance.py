"""How important is each weight? One function a strategy, all of one shape: (model, covered, rows, options) -> scores.

Higher is more important; the scale is any. A score and a mask are two things: how many weights go, and what a score is
compared with (its row, its layer, the whole model), is said in masks.py. Scores are float32, of the stored shape of the
weight, on the CPU, one projection after another; a strategy never turns into another one.

Memory beside the model: accumulators lie on the CPU in float32, for as many projections at a time as fit in
ACCUMULATOR_BYTES (at least one), and each is given away when its score is. A gradient lives only until it is added to
its accumulator, so there is one at a time. The rows are read once for each such group: a model of 1 B numbers once, a
7 B model seven times. For 7 B numbers in bfloat16 and rows of 512 tokens, one at a time, that is 13.5 GB of weights,
4.2 GB of accumulators, and activations with one gradient: 21.9 GB in all as measured (benchmarks/importance.py), less
the accumulators on a GPU.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from nbhelpers import data, evaluate, layer_inputs, losses, sparsegpt
from nbhelpers.layer_inputs import as_experts, groups, stored, watched_steps
from nbhelpers.projections import Projection, projections
from nbhelpers.registry import Registry

IMPORTANCE = Registry("importance")
log = logging.getLogger(__name__)
ACCUMULATOR_BYTES = 4 * 2**30

Scores = Iterator[tuple[str, torch.Tensor]]  # (name of the parameter, float32 of its stored shape, on the CPU)


@dataclass(frozen=True)
class Options:
    """batch_size: rows read at a time; None: one for `gradient` and `gradient_squared`, else as many as fit."""

    seed: int = 0
    batch_size: int | None = None
    progress: Callable[[dict], None] | None = None
    should_stop: Callable[[], bool] | None = None


def needs_data(importance: str) -> bool:
    """Whether the strategy looks at rows. LookupError for an unknown one."""
    return IMPORTANCE[importance] not in (random_scores, magnitude_scores)


def estimator(importance: str) -> str:
    """What is computed, in one line, for a record: the first line of the strategy's docstring."""
    return (IMPORTANCE[importance].__doc__ or "").splitlines()[0].rstrip(".")


def scores(
    model: nn.Module,
    importance: str,
    rows: Sequence[dict] | None = None,
    *,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    accept_low_coverage: bool = False,
) -> Scores:
    """Scores of every covered projection, in the order of projections(model), made while they are asked for.

    rows: of data.rows, for strategies that need them (ValueError without). Between two scores, and afterwards, the
    model is as it was: weights, gradients, requires_grad, mode, hooks. Do not change it between two scores either.
    progress: {"done", "total"} in batches read (projections where nothing is read). LookupError for an unknown name,
    FloatingPointError for a score that is not finite, Interrupted.
    """
    strategy = IMPORTANCE[importance]
    covered = projections(model, accept_low_coverage).covered
    if needs_data(importance) and not rows:
        free = ", ".join(name for name in IMPORTANCE if not needs_data(name))
        raise ValueError(f"importance {importance!r} looks at data: give rows (--data), or use one of {free}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1 row, got {batch_size}")
    return _checked(strategy(model, covered, rows, Options(seed, batch_size, progress, should_stop)), importance)


def _checked(found: Scores, importance: str) -> Scores:
    """Refuse what is not finite; say which experts nothing is known of (inputs refuse those by themselves)."""
    for name, score in found:
        if not score.isfinite().all():
            bad = int((~score.isfinite()).sum())
            raise FloatingPointError(
                f"importance {importance!r} of {name} is not finite for {bad} of {score.numel()} weights; try float32, "
                "or check the model's weights"
            )
        blank = [at for at, one in enumerate(score) if not one.any()] if score.ndim == 3 else []
        if blank:
            log.warning("importance %s of %s is 0 for the whole of expert %s", importance, name, blank)
        yield name, score


# Without data ---------------------------------------------------------------------------------------------------------


@IMPORTANCE.register("random")
def random_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """Uniform numbers in [0, 1), of a generator seeded by the seed and the projection's name.

    What any other strategy must beat. Layers differ, and a layer's scores do not depend on which others there are.
    """
    step = _steps(options, len(covered))
    for one in covered:
        digest = hashlib.sha256(f"{options.seed} {one.name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
        yield one.name, torch.rand(one.shape, generator=generator)
        step()


@IMPORTANCE.register("magnitude")
def magnitude_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """|w|.

    Han et al. 2015, https://arxiv.org/abs/1506.02626. Looks at no data.
    """
    step = _steps(options, len(covered))
    for one in covered:
        yield one.name, _weight(model, one).abs_()
        step()


# By gradients ---------------------------------------------------------------------------------------------------------


@IMPORTANCE.register("gradient")
def gradient_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """sum over batches of |g|, g: the gradient of the batch's mean nll a token; a batch is one row unless told.

    Gradients of opposite sign do not cancel, so it depends on what a batch is.
    """

    def add(total: torch.Tensor, gradient: torch.Tensor, tokens: int) -> None:
        total.add_(gradient.abs_(), alpha=1 / tokens)

    for one, total, _ in _accumulated(model, covered, rows, options, add, options.batch_size or 1):
        yield one.name, total


@IMPORTANCE.register("gradient_sum")
def gradient_sum_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """|sum of g| over all rows, divided by their tokens: |d (mean nll a token) / d w|.

    One loss over all rows, so it does not depend on what a batch is.
    """
    for one, total, tokens in _accumulated(model, covered, rows, options, _add, options.batch_size):
        yield one.name, total.div_(tokens).abs_()


@IMPORTANCE.register("gradient_squared")
def gradient_squared_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """sum over batches of g^2, g: the gradient of the batch's mean nll a token; a batch is one row unless told.

    The diagonal of the empirical Fisher information (of rows, with their own labels), up to the number of rows.
    """

    def add(total: torch.Tensor, gradient: torch.Tensor, tokens: int) -> None:
        total.addcmul_(gradient, gradient, value=1 / tokens**2)

    for one, total, _ in _accumulated(model, covered, rows, options, add, options.batch_size or 1):
        yield one.name, total


@IMPORTANCE.register("taylor")
def taylor_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """|w g|, g: the gradient of the mean nll a token over all rows.

    To first order what the loss changes by if the weight becomes 0. Molchanov et al. 2017,
    https://arxiv.org/abs/1611.06440.
    """
    for one, total, tokens in _accumulated(model, covered, rows, options, _add, options.batch_size):
        yield one.name, total.div_(tokens).mul_(_weight(model, one)).abs_()


@IMPORTANCE.register("taylor_squared")
def taylor_squared_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """(w g)^2, g: the gradient of the mean nll a token over all rows.

    The order of single weights is that of taylor; sums over rows, columns or channels differ. Molchanov et al. 2019,
    https://arxiv.org/abs/1906.10771.
    """
    for one, total, tokens in _accumulated(model, covered, rows, options, _add, options.batch_size):
        yield one.name, total.div_(tokens).mul_(_weight(model, one)).square_()


def _add(total: torch.Tensor, gradient: torch.Tensor, tokens: int) -> None:
    total.add_(gradient)


def _accumulated(
    model: nn.Module, covered: Sequence[Projection], rows: Sequence[dict], options: Options, add, batch_size: int | None
) -> Iterator[tuple[Projection, torch.Tensor, int]]:
    """(projection, accumulator, scored tokens of all rows), as `add(accumulator, gradient, scored tokens)` made it.

    The gradient is that of a batch's summed nll, float32 on the CPU, and may be overwritten.
    """
    tokens = sum(int((row["labels"][1:] != data.IGNORED).sum()) for row in rows)
    if tokens == 0:
        raise ValueError("no token is scored: every label is masked; give rows with labels")
    size = batch_size or max(1, evaluate.batch_rows(model, max(len(row["input_ids"]) for row in rows)) // 4)
    parts = groups(covered, lambda one: 4 * one.numbers, ACCUMULATOR_BYTES)
    step = _steps(options, len(parts) * -(-len(rows) // size))
    for group in parts:
        sums = _one_pass(model, group, layer_inputs.batches(model, rows, size), add, step)
        for one in group:
            yield one, sums.pop(one.name), tokens


def _one_pass(model: nn.Module, group: Sequence[Projection], batches, add, step) -> dict[str, torch.Tensor]:
    """Read all batches once, forward and backward; only this group's weights have gradients meanwhile."""
    sums = {one.name: torch.zeros(one.shape) for one in group}
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    hooks, tokens = [], 0

    def take(name: str, parameter: nn.Parameter) -> None:
        add(sums[name], parameter.grad.to("cpu", torch.float32), tokens)
        parameter.grad = None

    try:
        for parameter, _, _ in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for one in group:
            parameter = model.get_parameter(one.name).requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(take, one.name)))
        with evaluate.evaluation_mode(model), torch.inference_mode(False), torch.enable_grad():
            for batch in batches:
                tokens = int((batch["labels"][:, 1:] != data.IGNORED).sum())
                if tokens:  # a batch without labels has no loss
                    losses.nll_sum(model, batch).backward()
                step()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
    return sums


# By inputs ------------------------------------------------------------------------------------------------------------


@IMPORTANCE.register("wanda")
def wanda_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """|w| * ||x||_2, x: what the weight is multiplied with, over all tokens of the rows.

    Sun et al. 2023, https://arxiv.org/abs/2306.11695; there scores are compared within a row of outputs (scope "row"),
    and a block's inputs are those of the blocks pruned before it: here they are those of the whole model. An expert's
    inputs are the tokens that it was given.
    """
    squares = {
        one.name: torch.zeros(layer_inputs.experts(one), layer_inputs.fan_in(one), dtype=torch.float64)
        for one in covered
    }

    def see(key: layer_inputs.Key, inputs: torch.Tensor) -> None:
        wide = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
        squares[key[0]][key[1]] += wide.square().sum(0).cpu()

    step = _steps(options, sum(1 for _ in layer_inputs.batches(model, rows, options.batch_size)))
    layer_inputs.read(model, covered, rows, see, batch_size=options.batch_size, step=step)
    for one in covered:
        norms = squares.pop(one.name).sqrt().float().cpu()
        yield one.name, stored(one, as_experts(one, _weight(model, one)).abs() * norms[:, None])


@IMPORTANCE.register("sparsegpt")
def sparsegpt_scores(model: nn.Module, covered: Sequence[Projection], rows, options: Options) -> Scores:
    """w^2 / [H^-1]_ii, H = sum of x x^T over all tokens of the rows, plus 1 % of its mean diagonal on the diagonal.

    What the squared error of a row's outputs grows by if the weight becomes 0 and all others of the row make up for it
    as well as they can. Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, who write the square of an entry
    of the inverse's Cholesky factor: for the first column that is this. The weights stay as they are here; with the
    update, see sparsegpt.prune. An input that is always 0 scores 0.
    """
    parts = groups(covered, sparsegpt.hessian_bytes, ACCUMULATOR_BYTES)
    step = _steps(options, len(parts) * sum(1 for _ in layer_inputs.batches(model, rows, options.batch_size)))
    for group in parts:
        hessians = sparsegpt.hessians(model, group, rows, batch_size=options.batch_size, step=step)
        for one in group:
            weights = as_experts(one, _weight(model, one))
            found = [
                sparsegpt.saliency(weight, hessian, name=one.name)
                for weight, hessian in zip(weights, hessians.pop(one.name), strict=True)
            ]
            yield one.name, stored(one, torch.stack(found).float())


def _weight(model: nn.Module, one: Projection) -> torch.Tensor:
    """A copy of the weight, float32 on the CPU, in its stored shape."""
    return model.get_parameter(one.name).detach().to("cpu", torch.float32, copy=True)


def _steps(options: Options, total: int) -> Callable[[], None]:
    return watched_steps(total, options.progress, options.should_stop)
