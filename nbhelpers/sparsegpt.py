"""How are weights pruned so that the others make up for them? SparseGPT: masks and new weights from second moments.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774. A layer's squared output error ||W X - W' X||^2 is, row by
row, a quadratic form with H = X X^T, so what is lost by a weight, and how the others best answer, have closed forms.
Columns are solved from left to right: a column's error goes into the columns right of it, block by block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import torch
from torch import nn

from nbhelpers import layer_inputs
from nbhelpers.layer_inputs import as_experts, stored, watched_steps
from nbhelpers.mask_selection import count
from nbhelpers.projections import Projection, projections

DAMPING = 0.01  # of the mean diagonal of H, put on its diagonal; as published
BLOCK = 128  # columns whose errors are gathered before the columns right of them are changed; as published


# One layer ------------------------------------------------------------------------------------------------------------


def saliency(
    weight: torch.Tensor, hessian: torch.Tensor, *, damping: float = DAMPING, name: str = "the layer"
) -> torch.Tensor:
    """w^2 / [H^-1]_ii: (outputs, inputs), on the weight's device. 0 where an input is always 0.

    weight: (outputs, inputs); hessian: (inputs, inputs), not damped.
    """
    spread = torch.cholesky_inverse(_cholesky(_damped(hessian, damping), name)).diagonal()
    wide = weight.to(_wide(weight.dtype))
    return (wide.square() / spread.to(wide)).masked_fill(_dead(hessian).to(wide.device), 0)


def update(
    weight: torch.Tensor,
    hessian: torch.Tensor,
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    mask: torch.Tensor | None = None,
    damping: float = DAMPING,
    block: int = BLOCK,
    name: str = "the layer",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(new weights, mask): weights go, and those right of them in their row change so that the outputs change least.

    weight: (outputs, inputs); hessian: (inputs, inputs), not damped; mask: bool (outputs, inputs), True = kept.
    Exactly one of: sparsity in [0, 1], of the whole layer, exact to the number; pattern (N, M): N of each M inputs
    side by side are kept; mask: which weights are kept is given, only the others are updated. Weights left of one that
    goes stay as they are, so the result is the least possible error only where all that goes stands to the left.
    Computed in float32 (float64 for float64) on the weight's device. ValueError for a shape or a number that does not
    fit; FloatingPointError where H cannot be inverted.
    """
    _check(weight, hessian, sparsity, pattern, mask, block)
    outputs, inputs = weight.shape
    new = weight.detach().to(_wide(weight.dtype), copy=True)
    factor, dead = _inverse_factor(hessian.to(new), damping, name), _dead(hessian).to(new.device)
    keep = torch.ones_like(new, dtype=torch.bool) if mask is None else mask.to(new.device).clone()
    for start in range(0, inputs, block):
        stop = min(start + block, inputs)
        if sparsity is not None:
            gone = count(sparsity, outputs * stop) - count(sparsity, outputs * start)
            keep[:, start:stop] = _all_but_least(_lost(new, factor, dead, start, stop), gone)
        errors = torch.zeros_like(new[:, start:stop])
        for at in range(start, stop):
            if pattern is not None and at % pattern[1] == 0:
                ahead = at + pattern[1]
                keep[:, at:ahead] = _most_of_each_row(_lost(new, factor, dead, at, ahead), pattern[0])
            kept = new[:, at] * keep[:, at]
            errors[:, at - start] = (new[:, at] - kept) / factor[at, at]
            new[:, at:stop] -= errors[:, at - start, None] * factor[at, at:stop]
            new[:, at] = kept
        new[:, stop:] -= errors @ factor[start:stop, stop:]
    return new.to(weight.dtype), keep


def output_error(before: torch.Tensor, after: torch.Tensor, hessian: torch.Tensor) -> float:
    """||W X - W' X||^2 / ||W X||^2, from H = X X^T alone; 0 for equal weights."""
    wide = before.double()
    moved, hessian = after.double() - wide, hessian.double()
    return float(((moved @ hessian) * moved).sum() / ((wide @ hessian) * wide).sum())


def _lost(new: torch.Tensor, factor: torch.Tensor, dead: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """w^2 / U_ii^2 of these columns: (outputs, stop - start)."""
    lost = new[:, start:stop].square() / factor.diagonal()[start:stop].square()
    return lost.masked_fill(dead[start:stop], 0)


def _all_but_least(lost: torch.Tensor, gone: int) -> torch.Tensor:
    """True but for the `gone` least, ties by flat index."""
    keep = torch.ones(lost.numel(), dtype=torch.bool, device=lost.device)
    keep[lost.flatten().argsort(stable=True)[:gone]] = False
    return keep.view_as(lost)


def _most_of_each_row(lost: torch.Tensor, number: int) -> torch.Tensor:
    """True for the `number` greatest of each row; of equal ones the first go."""
    order = lost.argsort(dim=1, stable=True)
    return torch.ones_like(lost, dtype=torch.bool).scatter_(1, order[:, : lost.shape[1] - number], False)


def _check(weight, hessian, sparsity, pattern, mask, block: int) -> None:
    _check_amount(sparsity, pattern, mask)
    if weight.ndim != 2 or hessian.shape != (weight.shape[1],) * 2:
        raise ValueError(
            f"weight must be (outputs, inputs) and hessian (inputs, inputs), got {tuple(weight.shape)} and "
            f"{tuple(hessian.shape)}"
        )
    if mask is not None and (mask.shape != weight.shape or mask.dtype != torch.bool):
        raise ValueError(f"mask must be bool {tuple(weight.shape)}, got {mask.dtype} {tuple(mask.shape)}")
    if pattern is not None:
        _check_divides(pattern, "inputs", weight.shape[1])
        _check_divides(pattern, "block", block)


def _check_amount(sparsity, pattern, mask=None) -> None:
    if sum(one is not None for one in (sparsity, pattern, mask)) != 1:
        raise ValueError("give exactly one of sparsity, pattern and mask")
    if sparsity is not None and not 0 <= sparsity <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    if pattern is not None and not (0 <= pattern[0] <= pattern[1] and pattern[1] > 0):
        raise ValueError(f"pattern must keep N of M with 0 <= N <= M, got {pattern[0]} of {pattern[1]}")


def _check_divides(pattern: tuple[int, int], what: str, value: int) -> None:
    if value % pattern[1]:
        raise ValueError(f"pattern {pattern[0]}:{pattern[1]} needs {what} that {pattern[1]} divides, got {value}")


def _inverse_factor(hessian: torch.Tensor, damping: float, name: str) -> torch.Tensor:
    """U, upper triangular, with U^T U = H^-1: U_ii^2 is [H^-1]_ii once the columns left of i are solved."""
    inverse = torch.cholesky_inverse(_cholesky(_damped(hessian, damping), name))
    return _cholesky(inverse, name).mT


def _damped(hessian: torch.Tensor, damping: float) -> torch.Tensor:
    """H + damping * mean(diagonal) on the diagonal, and 1 where an input is always 0."""
    wide = hessian.to(_wide(hessian.dtype), copy=True)
    diagonal = wide.diagonal()
    diagonal += damping * diagonal.mean()
    diagonal[_dead(hessian)] = 1
    return wide


def _dead(hessian: torch.Tensor) -> torch.Tensor:
    return hessian.diagonal() == 0


def _cholesky(matrix: torch.Tensor, name: str) -> torch.Tensor:
    """Lower factor; FloatingPointError where there is none."""
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item() or not factor.isfinite().all():
        raise FloatingPointError(
            f"the second moments of the inputs of {name} cannot be inverted; give more rows, a greater damping, or a "
            "float32 model"
        )
    return factor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


# A model --------------------------------------------------------------------------------------------------------------


def prune(
    model: nn.Module,
    rows: Sequence[dict],
    *,
    sparsity: float | None = None,
    pattern: tuple[int, int] | None = None,
    damping: float = DAMPING,
    batch_size: int | None = None,
    progress: Callable[[dict], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
    accept_low_coverage: bool = False,
) -> dict[str, torch.Tensor]:
    """Prune and update all projections in place. Returns masks: bool of the stored shape on the CPU, True = kept.

    Decoder layers are done in order and each one's inputs are those of the model as it is by then, pruned below, as
    published. Experts are each solved by themselves. The rows are read once a layer, and more often where the second
    moments of a layer's inputs are many. Interrupted leaves what was done so far.
    """
    covered = projections(model, accept_low_coverage).covered
    _check_amount(sparsity, pattern)
    for one in covered if pattern else ():
        _check_divides(pattern, f"inputs of {one.name}", layer_inputs.fan_in(one))
    layers = _by_layer(covered)
    number = sum(1 for _ in layer_inputs.batches(model, rows, batch_size))
    step, masks = watched_steps(len(layers) * number, progress, should_stop), {}
    for group in layers:
        found = hessians(model, group, rows, batch_size=batch_size, step=step)
        for one in group:
            masks[one.name] = _prune_one(model, one, found.pop(one.name), sparsity, pattern, damping)
    return {one.name: masks[one.name] for one in covered}


@torch.no_grad()
def _prune_one(model, one: Projection, found, sparsity, pattern, damping: float) -> torch.Tensor:
    parameter = model.get_parameter(one.name)
    solved = [
        update(weight, hessian, sparsity=sparsity, pattern=pattern, damping=damping, name=one.name)
        for weight, hessian in zip(as_experts(one, parameter), found, strict=True)
    ]
    new, masks = (torch.stack(part) for part in zip(*solved, strict=True))
    parameter.copy_(stored(one, new))
    return stored(one, masks).cpu()


def hessians(
    model: nn.Module,
    group: Sequence[Projection],
    rows: Sequence[dict],
    *,
    batch_size: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> dict[str, torch.Tensor]:
    """H = sum of x x^T over the tokens of the rows, for each projection (experts, inputs, inputs), float32.

    It lies on the model's device, because every batch adds to all of it: see hessian_bytes. float64 for float64.
    """
    first = next(model.parameters())
    sums = {
        one.name: torch.zeros(
            layer_inputs.experts(one),
            *[layer_inputs.fan_in(one)] * 2,
            dtype=_wide(first.dtype),
            device=first.device,
        )
        for one in group
    }

    def see(key: layer_inputs.Key, inputs: torch.Tensor) -> None:
        wide = inputs.to(sums[key[0]].dtype)
        sums[key[0]][key[1]].addmm_(wide.T, wide)

    layer_inputs.read(model, group, rows, see, batch_size=batch_size, step=step)
    return sums


def hessian_bytes(one: Projection) -> int:
    """Bytes of float32 second moments: 4 * inputs^2 an expert."""
    return 4 * layer_inputs.experts(one) * layer_inputs.fan_in(one) ** 2


def _by_layer(covered: Sequence[Projection]) -> list[list[Projection]]:
    """Projections of one decoder layer together: those whose names have the same first number."""
    found: dict[str, list[Projection]] = {}
    for one in covered:
        number = re.search(r"\.(\d+)\.", one.name)
        found.setdefault(number[1] if number else one.name, []).append(one)
    return list(found.values())
