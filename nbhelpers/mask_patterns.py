"""What goes together? Single weights, whole rows, columns and MLP channels, or some of every M neighbours.

A pattern is a function of one shape, `pattern(request) -> (name, packed codes) of every projection, in order`. A weight
that goes before another one has the lower score; equal ones go in the order that `mask_selection` states, groups in the
order of their projections, experts and numbers. The score of a group is the sum of its members' scores, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import nn

from nbhelpers import channels
from nbhelpers.mask_selection import CHUNK, Pairs, bits_for, check, keys, pack, refuse_nan, select
from nbhelpers.projections import Projection
from nbhelpers.registry import Registry

PATTERNS = Registry("pattern")
SCOPES = {  # what scores are compared with; the first one is meant where none is named
    "unstructured": ("global", "layer", "row"),
    "structured": ("layer", "global"),
    "nm": ("group",),
}
DIMENSIONS = ("outputs", "inputs", "channels")
GROUPS = {  # what a sparsity of pattern `structured` is a share of: (of all of them, of each)
    "outputs": ("output rows", "projection"),
    "inputs": ("input columns", "projection"),
    "channels": ("MLP channels", "layer"),
}

Packed = Iterator[tuple[str, torch.Tensor]]


@dataclass(frozen=True)
class Request:
    """What a pattern is asked for. pairs: the scores, in the order of covered; fractions: ascending, each once."""

    model: nn.Module
    covered: Sequence[Projection]
    pairs: Pairs
    fractions: Sequence[Fraction]
    scope: str
    dimension: str = "outputs"
    group: int = 4
    absolute: bool = False

    @property
    def bits(self) -> int:
        return bits_for(len(self.fractions))


@PATTERNS.register("unstructured")
def unstructured(request: Request) -> Packed:
    """Single weights. scope: each loses its share of the model (`global`), of each projection (`layer`; a projection's
    experts together), or of each output's inputs (`row`)."""
    if request.scope == "global":
        yield from select(request.pairs, request.fractions, request.absolute)
    elif request.scope == "row":
        for one, (name, scores) in zip(request.covered, request.pairs(), strict=True):
            yield name, _packed(_by_rows(one, name, scores, None, request), request.bits)
    else:
        for pair in request.pairs():
            yield from select(lambda pair=pair: [pair], request.fractions, request.absolute)


@PATTERNS.register("nm")
def nm(request: Request) -> Packed:
    """N kept of every M = `group` neighbours along the inputs. ValueError where M does not divide a projection's inputs
    or a sparsity keeps no whole number of M."""
    odd = [float(one) for one in request.fractions if (one * request.group).denominator != 1]
    if request.group < 2 or odd:
        what = f"sparsity {odd[0]}" if odd else "a group"
        raise ValueError(f"N:M keeps a whole number of each {request.group} weights, at least 2: {what} does not fit")
    for one in request.covered:
        if one.shape[one.inputs] % request.group:
            raise ValueError(f"{one.name} has {one.shape[one.inputs]} inputs, and {request.group} does not divide that")
    for one, (name, scores) in zip(request.covered, request.pairs(), strict=True):
        yield name, _packed(_by_rows(one, name, scores, request.group, request), request.bits)


@PATTERNS.register("structured")
def structured(request: Request) -> Packed:
    """Whole groups of weights; the share is one of groups. scope: of each projection's, or of the model's (`global`).

    dimension: `outputs` (rows of the matrix), `inputs` (columns), or `channels` of MLPs: a row of the up projection,
    and of the gate, coupled with a column of the down projection, so that they can be removed physically; projections
    that are in no MLP are then kept whole. Every expert is a projection of its own. `global` compares sums of groups of
    different sizes, and experts may lose different numbers: those can be closed but not removed.
    """
    if request.dimension == "channels":
        blocks = channels.coupled(request.model)
    else:
        blocks = [{one.name: 1} for one in request.covered]
    codes = _group_codes(_group_scores(request, blocks), request)
    place = {name: (number, block) for number, block in enumerate(blocks) for name in block}
    for one in request.covered:
        found = torch.full(one.shape, len(request.fractions), dtype=torch.uint8)
        if one.name in place:
            number, block = place[one.name]
            view = found if found.ndim == 3 else found[None]
            matrix = view if one.inputs == len(one.shape) - 1 else view.transpose(-1, -2)
            along = 2 if _reads(request, one.name, block) else 1
            matrix.copy_(codes[number].repeat(1, block[one.name]).unsqueeze(3 - along))
        yield one.name, _packed(found, request.bits)


def share_of(how: Mapping[str, Any]) -> str:
    """What the sparsities that were asked for are shares of: groups of `structured`, or else weights."""
    if how.get("pattern") != "structured":
        return "the weights"
    what, each = GROUPS[how["dimension"]]
    return f"all {what}" if how["scope"] == "global" else f"the {what} of each {each}"


def _reads(request: Request, name: str, block: dict[str, int]) -> bool:
    """Whether a group is a column of this projection."""
    return name == list(block)[-1] if request.dimension == "channels" else request.dimension == "inputs"


def _group_scores(request: Request, blocks: Sequence[dict[str, int]]) -> list[torch.Tensor]:
    """Of each block (experts, groups), float64: the sums of what belongs together."""
    place = {name: (number, block) for number, block in enumerate(blocks) for name in block}
    found: list = [0] * len(blocks)
    for one, (name, scores) in zip(request.covered, request.pairs(), strict=True):
        check(name, scores)
        refuse_nan(name, scores)
        if name in place:
            number, block = place[name]
            scores = scores.detach().abs() if request.absolute else scores.detach()
            matrix = one.as_matrix(scores) if scores.ndim == 3 else one.as_matrix(scores)[None]
            sums = matrix.sum(1 if _reads(request, name, block) else 2, dtype=torch.float64).cpu()
            found[number] = found[number] + sums.unflatten(1, (block[name], -1)).sum(1)
    return found


def _group_codes(scores: list[torch.Tensor], request: Request) -> list[torch.Tensor]:
    """Of each block (experts, groups), uint8: at how many levels a group is kept."""
    if request.scope == "global":
        codes = _ranked(torch.cat([one.flatten() for one in scores]), request.fractions)
        parts = codes.split([one.numel() for one in scores])
        return [part.view(one.shape) for part, one in zip(parts, scores, strict=True)]
    return [torch.stack([_ranked(expert, request.fractions) for expert in one]) for one in scores]


def _ranked(scores: torch.Tensor, fractions: Sequence[Fraction]) -> torch.Tensor:
    """Codes of scores (n,), all compared with one another."""
    codes = torch.empty(len(scores), dtype=torch.uint8)
    codes[scores.argsort(stable=True)] = torch.from_numpy(_code_of_rank(len(scores), fractions))
    return codes


def _code_of_rank(numbers: int, fractions: Sequence[Fraction]) -> np.ndarray:
    """(numbers,) uint8: at how many levels the weight is kept that has so many before it."""
    counts = np.array([round(one * numbers) for one in fractions])
    return (np.arange(numbers)[:, None] >= counts).sum(1, dtype=np.uint8)


def _by_rows(one: Projection, name: str, scores: torch.Tensor, group: int | None, request: Request) -> torch.Tensor:
    """Codes of the stored shape; each output's inputs, or each `group` of them, compared with one another."""
    check(name, scores)
    refuse_nan(name, scores)
    codes = torch.empty(one.shape, dtype=torch.uint8)
    width = group or one.shape[one.inputs]
    code_of_rank = _code_of_rank(width, request.fractions)
    pairs = zip(_matrices(one, scores.detach()), _matrices(one, codes), strict=True)
    for matrix, target in pairs:
        rows = max(1, CHUNK // matrix.shape[1])
        for piece, place in zip(matrix.split(rows), target.split(rows), strict=True):
            mine = keys(piece.contiguous(), request.absolute).reshape(-1, width)
            place.copy_(torch.from_numpy(_row_codes(mine, code_of_rank)).view(place.shape))
    return codes


def _row_codes(mine: np.ndarray, code_of_rank: np.ndarray) -> np.ndarray:
    """Codes of keys (rows, n), each row by itself: sorted by key and place, both in one integer."""
    order = mine.astype(np.int64) << 32 | np.arange(mine.shape[1])
    order.sort(axis=1)
    codes = np.empty(mine.shape, np.uint8)
    np.put_along_axis(codes, order & 0xFFFFFFFF, np.broadcast_to(code_of_rank, mine.shape), axis=1)
    return codes


def _matrices(one: Projection, tensor: torch.Tensor) -> Iterable[torch.Tensor]:
    """Views (outputs, inputs): one, or one an expert."""
    matrix = one.as_matrix(tensor)
    return matrix.unbind(0) if matrix.ndim == 3 else [matrix]


def _packed(codes: torch.Tensor, bits: int) -> torch.Tensor:
    return torch.from_numpy(pack(codes.reshape(-1).numpy(), bits))
