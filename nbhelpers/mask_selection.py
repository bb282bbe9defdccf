"""Which weights go at which sparsity? Exactly as many as asked for, in three passes and little memory.

The order of all weights: lower scores first; equal scores in the order of the layers, and in a layer by flat index of
the stored tensor, the earlier one first. Of n weights the first `count(sparsity, n)` go, so masks of growing sparsity
are nested. Scores order as the integers that their float32 bits are (radix), so that 16- and 32-bit scores of equal
value give equal masks, and no scores of two layers ever stand in one tensor. All comparing is done on the CPU, piece by
piece, wherever the scores lie: the device decides nothing.

Pass one counts the upper 16 bits of every score, pass two the lower ones where a threshold lies among them, pass three
writes each weight's **code**: at how many of the levels it is kept. Codes take 4 bits a weight, of a single level 1.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeVar

import numpy as np
import torch

CHUNK = 1 << 18  # weights in hand at once, for each thread
MOST_LEVELS = 15  # what 4 bits can tell apart
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_POSITIVE, _AMBIGUOUS = 1 << 15, 128
_NOTHING_GOES = -(1 << 31)  # a threshold below every score

Pairs = Callable[[], Iterable[tuple[str, torch.Tensor]]]  # begins (name, scores of the stored shape) anew each time
_In, _Out = TypeVar("_In"), TypeVar("_Out")


def exact(sparsity: object) -> Fraction:
    """The decimal fraction that was written: 0.9 is 9/10. ValueError outside [0, 1]."""
    try:
        found = sparsity if isinstance(sparsity, Fraction) else Fraction(str(sparsity))
    except ValueError:
        raise ValueError(f"sparsity must be a number in [0, 1], got {sparsity!r}") from None
    if not 0 <= found <= 1:
        raise ValueError(f"sparsity must be in [0, 1], got {sparsity}")
    return found


def count(sparsity: object, numbers: int) -> int:
    """How many of `numbers` weights go: the exact decimal fraction of them, a half rounded to the even number.

    >>> count(0.5, 5), count(0.5, 7), count(0.9, 10)
    (2, 4, 9)
    """
    return round(exact(sparsity) * numbers)


def bits_for(levels: int) -> int:
    """Bits a weight that the codes of so many levels take: 1 or 4. ValueError above MOST_LEVELS."""
    if not 1 <= levels <= MOST_LEVELS:
        raise ValueError(
            f"between 1 and {MOST_LEVELS} sparsities fit one set of masks, got {levels}: make several sets"
        )
    return 1 if levels == 1 else 4


# Codes and their packing ----------------------------------------------------------------------------------------------


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes (n,), uint8, as bytes: the first weight in the lowest bits of the first byte, what is left over 0."""
    if bits == 1:
        return np.packbits(codes, bitorder="little")
    pairs = (np.append(codes, np.uint8(0)) if len(codes) % 2 else np.ascontiguousarray(codes)).view("<u2")
    return (pairs | (pairs >> 4)).astype(np.uint8)


def kept(packed: np.ndarray, numbers: int, bits: int, level: int) -> np.ndarray:
    """Of each weight whether it is kept at a level, counted from 0: bool, (numbers,)."""
    return unpack(packed, numbers, bits) > level


def unpack(packed: np.ndarray, numbers: int, bits: int) -> np.ndarray:
    """The inverse of `pack`."""
    if bits == 1:
        return np.unpackbits(packed, count=numbers, bitorder="little")
    wide = packed.astype("<u2")
    return ((wide | (wide << 4)) & 0x0F0F).view(np.uint8)[:numbers]


def packed_bytes(numbers: int, bits: int) -> int:
    return (numbers * bits + 7) // 8


# The three passes -----------------------------------------------------------------------------------------------------


@dataclass
class _Counted:
    """What pass one knows: weights by upper half of their key, and whether lower halves say anything."""

    upper: np.ndarray
    has_lower: bool
    numbers: int


@dataclass(frozen=True)
class _Thresholds:
    """By level: weights with a lower key go, and of those with this key the first `going` of `equal`."""

    keys: list[int]
    going: list[int]
    equal: list[int]


def select(pairs: Pairs, fractions: Sequence[Fraction], absolute: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, packed codes) of every tensor; all of them together lose each fraction, ascending, of their weights.

    absolute: compare |score|, so that weights can be given as they are. ValueError names scores that hold NaN or are
    in another format than DTYPES.
    """
    bits = bits_for(len(fractions))
    with _workers() as in_order:
        found = _count_upper(pairs(), absolute, in_order)
        ranks = [round(fraction * found.numbers) for fraction in fractions]
        bins, within = _place(found.upper, ranks)
        lower = _count_lower(pairs(), absolute, in_order, bins, found)
        thresholds = _thresholds(bins, within, lower, absolute)
        yield from _codes(pairs(), absolute, in_order, bins, thresholds, bits)


def keys(scores: torch.Tensor, absolute: bool) -> np.ndarray:
    """int32 that order as the scores do (0.0 and -0.0 are equal); of |score| where absolute."""
    values = scores.detach().to("cpu", torch.float32)
    if absolute:
        return values.numpy().view(np.int32) & np.int32(0x7FFFFFFF)
    bits = (values + 0.0).numpy().view(np.int32)  # -0.0 + 0.0 is 0.0
    return bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))


def check(name: str, scores: torch.Tensor) -> None:
    """ValueError for scores in a format that float32 does not hold whole."""
    if scores.dtype not in DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(
            f"scores of {name} must be {known}, got {str(scores.dtype).removeprefix('torch.')}: convert them"
        )


def refuse_nan(name: str, scores: torch.Tensor) -> None:
    """ValueError that names the projection and how many of its scores are NaN."""
    if bad := int(scores.isnan().sum()):
        raise ValueError(f"scores of {name} hold NaN for {bad} of {scores.numel()} weights: score it again in float32")


def _pieces(scores: torch.Tensor) -> list[torch.Tensor]:
    return list(scores.detach().reshape(-1).split(CHUNK)) if scores.numel() else []


def _upper(found: np.ndarray, absolute: bool) -> np.ndarray:
    """The upper halves of keys, counted from 0."""
    return found >> 16 if absolute else (found >> 16) + _POSITIVE


def _count_upper(pairs: Iterable[tuple[str, torch.Tensor]], absolute: bool, in_order: Callable) -> _Counted:
    bins = _POSITIVE if absolute else 2 * _POSITIVE
    found = _Counted(np.zeros(bins, np.int64), False, 0)

    def one(piece: torch.Tensor) -> np.ndarray:
        return torch.bincount(torch.from_numpy(_upper(keys(piece, absolute), absolute)), minlength=bins).numpy()

    first = bins - _POSITIVE  # bin of +0.0
    for name, scores in pairs:
        check(name, scores)
        mine = np.zeros(bins, np.int64)
        for counted in in_order(one, _pieces(scores)):
            mine += counted
        if mine[first + 0x7F80 :].any() or mine[: max(0, first - 0x7F80)].any():  # infinities lie there too
            refuse_nan(name, scores)
        found.upper += mine
        found.has_lower |= scores.dtype != torch.bfloat16
        found.numbers += scores.numel()
    return found


def _place(histogram: np.ndarray, ranks: Sequence[int]) -> tuple[list[int], list[int]]:
    """Of each rank (how many go) the bin of the last one that goes, and how many of that bin go; -1 where none goes."""
    below = np.cumsum(histogram)
    bins = [int(np.searchsorted(below, rank)) if rank else -1 for rank in ranks]
    return bins, [rank - int(below[at] - histogram[at]) if rank else 0 for rank, at in zip(ranks, bins, strict=True)]


def _count_lower(
    pairs: Iterable[tuple[str, torch.Tensor]], absolute: bool, in_order: Callable, bins: Sequence[int], found: _Counted
) -> dict[int, np.ndarray]:
    """Weights by lower half of their key, for each bin in which a threshold lies."""
    wanted = sorted(set(bins) - {-1})
    counts = np.zeros((len(wanted), 1 << 16), np.int64)
    zero = 0 if absolute else _POSITIVE
    if not found.has_lower:  # bfloat16 is the upper half of float32
        for row, at in zip(counts, wanted, strict=True):
            row[0 if at >= zero else 0xFFFF] = found.upper[at]
        return dict(zip(wanted, counts, strict=True))
    table = np.zeros(len(found.upper), np.uint8)
    table[wanted] = np.arange(1, len(wanted) + 1)

    def one(piece: torch.Tensor) -> np.ndarray:
        mine = keys(piece, absolute)
        which = np.take(table, _upper(mine, absolute))
        places = np.flatnonzero(which != 0)
        return (which[places].astype(np.intp) - 1) << 16 | (mine[places] & 0xFFFF)

    for _, scores in pairs:
        for these in in_order(one, _pieces(scores)):
            np.add.at(counts.reshape(-1), these, 1)
    return dict(zip(wanted, counts, strict=True))


def _thresholds(
    bins: Sequence[int], within: Sequence[int], lower: dict[int, np.ndarray], absolute: bool
) -> _Thresholds:
    found = _Thresholds([], [], [])
    for at, rank in zip(bins, within, strict=True):
        if at < 0:
            parts = (_NOTHING_GOES, 0, 0)
        else:
            ((half,), (going,)) = _place(lower[at], [rank])
            parts = ((at - (0 if absolute else _POSITIVE)) << 16 | half, going, int(lower[at][half]))
        for values, value in zip((found.keys, found.going, found.equal), parts, strict=True):
            values.append(value)
    return found


def _codes(
    pairs: Iterable[tuple[str, torch.Tensor]],
    absolute: bool,
    in_order: Callable,
    bins: Sequence[int],
    thresholds: _Thresholds,
    bits: int,
) -> Iterator[tuple[str, torch.Tensor]]:
    size = _POSITIVE if absolute else 2 * _POSITIVE
    table = np.sum([np.arange(size) > at for at in bins], axis=0, dtype=np.uint8)
    table[sorted(set(bins) - {-1})] = _AMBIGUOUS
    split = [at for at, going in enumerate(thresholds.going) if going < thresholds.equal[at]]
    seen = dict.fromkeys(split, 0)

    def one(piece: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        mine = keys(piece, absolute)
        codes = np.take(table, _upper(mine, absolute))
        places = np.flatnonzero(codes >= _AMBIGUOUS)
        mine = mine[places]
        codes[places] = np.sum([mine > key for key in thresholds.keys], axis=0, dtype=np.uint8)
        return codes, places, mine

    for name, scores in pairs:
        packed, end = np.empty(packed_bytes(scores.numel(), bits), np.uint8), 0
        for codes, places, mine in in_order(one, _pieces(scores)):
            for at in split:  # ties: the first ones go, in the order of all weights
                equal = places[mine == thresholds.keys[at]]
                codes[equal[max(0, thresholds.going[at] - seen[at]) :]] += 1
                seen[at] += len(equal)
            done = pack(codes, bits)
            packed[end : end + len(done)] = done
            end += len(done)
        yield name, torch.from_numpy(packed)


class _workers:
    """`with _workers() as in_order`: in_order(function, items) yields results in order, by torch's number of threads.

    At most two results a thread wait to be read.
    """

    def __enter__(self) -> Callable[[Callable[[_In], _Out], Sequence[_In]], Iterator[_Out]]:
        self.threads = torch.get_num_threads()
        self.pool = ThreadPoolExecutor(self.threads) if self.threads > 1 else None
        return self.in_order

    def __exit__(self, *error: object) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
        if self.pool is None or len(items) < 2:
            yield from map(function, items)
            return
        waiting: deque = deque()
        for item in items:
            waiting.append(self.pool.submit(function, item))
            if len(waiting) > 2 * self.threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
