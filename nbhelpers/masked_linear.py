"""How is x (W + s (B A) . M) computed without keeping (B A) . M? By blocks, formed anew in the backward pass.

W (frozen), the mask M and the product of the factors have the shape in which the weight is stored: (P, Q) is
(outputs, inputs) for Linear and (inputs, outputs) for GPT-2's Conv1D. Plain LoRA needs two products of full size a
step (forward, and back to x); a masked delta a third one, since the gradient of the factors is that of W, masked:
1.5 times the work is the floor. Adding the delta to W block by block keeps it at three; a product of its own for the
delta would make five.

Sums are formed in float32 (float64 for float64) and rounded once to the number format of x, so a bfloat16 layer
computes with exactly the weight that merging writes.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch.autograd.function import once_differentiable


def block_numbers(numbers: int, device: str) -> int:
    """How many weights are formed at a time, of so many: a small share, so that little memory is needed, but enough
    for a fast product, and on a GPU for few launches."""
    least = 1 << 18 if device == "cpu" else 1 << 24
    return max(least, min(numbers // 32, 1 << 21))


# Masks, eight weights a byte ------------------------------------------------------------------------------------------


def pack(mask: torch.Tensor) -> torch.Tensor:
    """(..., Q) bool -> (..., ceil(Q / 8)) uint8: weight 8 i + k of a row is bit k of its byte i, the rest is 0."""
    short = -mask.shape[-1] % 8
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, short))
    weights = 2 ** torch.arange(8, device=mask.device)
    return (padded.unflatten(-1, (-1, 8)) * weights).sum(-1).to(torch.uint8)


def unpack(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """The inverse of `pack`: (..., columns) bool."""
    return _ones_and_zeros(bits, columns).view(torch.bool)


def _ones_and_zeros(bits: torch.Tensor, columns: int) -> torch.Tensor:
    """(..., columns) uint8: several times faster to turn into floats than bool."""
    eight = torch.index_select(_spread(bits.device), 0, bits.reshape(-1).int()).view(torch.uint8)
    return eight.view(*bits.shape[:-1], -1)[..., :columns]


@lru_cache
def _spread(device: torch.device) -> torch.Tensor:
    """(256,) int64: entry b holds the bits of b, a byte each. One read fetches eight weights of a mask."""
    numbers = torch.arange(256, device=device)
    each = (numbers[:, None] >> torch.arange(8, device=device)) & 1
    return each.to(torch.uint8).view(torch.int64).view(256)


# One layer ------------------------------------------------------------------------------------------------------------


def masked_linear(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    down: torch.Tensor,
    up: torch.Tensor,
    bits: torch.Tensor,
    scaling: float,
    transposed: bool = False,
) -> torch.Tensor:
    """x (W + scaling (B A) . M) + b; without a weight only the part of the delta.

    x: (..., inputs); weight: (outputs, inputs), or (inputs, outputs) where transposed; bias: (outputs,) or None;
    down (A): (rank, inputs); up (B): (outputs, rank); bits: `pack` of a mask of the weight's shape. Gradients flow to
    x, bias and the factors, not to the weight. The result has the dtype of x.
    """
    return _MaskedLinear.apply(x, weight, bias, down, up, bits, scaling, transposed)


def masked_sum(
    weight: torch.Tensor, left: torch.Tensor, right: torch.Tensor, bits: torch.Tensor, scaling: float
) -> torch.Tensor:
    """W + scaling (left right) . M of all experts, (experts, P, Q) and of W's dtype; gradients flow to the factors.

    left: (experts, P, rank); right: (experts, rank, Q); bits: `pack` of the mask. The sum itself is kept, since the
    experts' own code multiplies by it; the delta and its gradient exist by blocks alone.
    """
    return _MaskedSum.apply(weight, left, right, bits, scaling)


class _Blocks:
    """Rows of W + scaling (left right) . M, some at a time, in buffers that every block uses anew."""

    def __init__(self, weight, left, right, bits, scaling, dtype) -> None:
        self.kind = torch.promote_types(dtype, torch.float32)
        self.weight, self.bits, self.dtype = weight, bits, dtype
        self.left = left.to(self.kind) * scaling  # (P, rank)
        self.right = right.to(self.kind).contiguous()  # (rank, Q)
        columns = right.shape[1]
        numbers = block_numbers(len(left) * columns, left.device.type)
        rows = min(len(left), max(1, numbers // columns))
        self.sums, self.kept = (left.new_empty(rows, columns, dtype=self.kind) for _ in range(2))

    def __iter__(self) -> Iterator[slice]:
        size, total = len(self.sums), len(self.left)
        return (slice(start, min(start + size, total)) for start in range(0, total, size))

    def mask(self, rows: slice) -> torch.Tensor:
        """1 where a weight is kept, 0 where not; valid until the next block."""
        kept = self.kept[: rows.stop - rows.start]
        return kept.copy_(_ones_and_zeros(self.bits[rows], kept.shape[1]))

    def form(self, rows: slice, mask: torch.Tensor) -> torch.Tensor:
        """These rows of the sum; valid until the next block."""
        sums = torch.mm(self.left[rows], self.right, out=self.sums[: rows.stop - rows.start]).mul_(mask)
        if self.weight is not None:
            sums.add_(self.weight[rows])
        return sums.to(self.dtype)


class _MaskedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, down, up, bits, scaling, transposed):
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows, weight, down, up, bits)
        ctx.scaling, ctx.transposed, ctx.shape = scaling, transposed, x.shape
        with torch.autocast(x.device.type, enabled=False):
            blocks = _Blocks(weight, *_sides(down, up, transposed), bits, scaling, x.dtype)
            out = rows.new_empty(len(rows), len(up))
            if transposed:
                out.copy_(bias) if bias is not None else out.zero_()
                for part in blocks:
                    out.addmm_(rows[:, part], blocks.form(part, blocks.mask(part)))
            else:
                for part in blocks:
                    torch.mm(rows, blocks.form(part, blocks.mask(part)).t(), out=out[:, part])
                if bias is not None:
                    out += bias
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        rows, weight, down, up, bits = ctx.saved_tensors
        slope = slope.reshape(-1, slope.shape[-1])
        transposed, (of_x_wanted, _, of_bias_wanted, *of_factors) = ctx.transposed, ctx.needs_input_grad[:5]
        of_bias = slope.sum(0) if of_bias_wanted else None
        along, across = (rows, slope) if transposed else (slope, rows)  # (tokens, P), (tokens, Q)
        with torch.autocast(slope.device.type, enabled=False):
            blocks = _Blocks(weight, *_sides(down, up, transposed), bits, ctx.scaling, rows.dtype)
            of_x = _zeros_or_room(rows, transposed) if of_x_wanted else None
            of_left, of_right = torch.empty_like(blocks.left), torch.zeros_like(blocks.right)
            room = torch.empty_like(blocks.sums, dtype=rows.dtype)
            for part in blocks:
                mask = blocks.mask(part)
                if of_x is not None:
                    formed = blocks.form(part, mask)
                    if transposed:
                        torch.mm(slope, formed.t(), out=of_x[:, part])
                    else:
                        of_x.addmm_(slope[:, part], formed)
                if any(of_factors):
                    of_weight = torch.mm(along[:, part].t(), across, out=room[: len(mask)])
                    of_weight = torch.mul(of_weight, mask, out=blocks.sums[: len(mask)])
                    torch.mm(of_weight, blocks.right.t(), out=of_left[part])
                    of_right.addmm_(blocks.left[part].t(), of_weight)
            of_left *= ctx.scaling
        of_up, of_down = (of_right.t(), of_left.t()) if transposed else (of_left, of_right)
        of_x = None if of_x is None else of_x.view(ctx.shape)
        return of_x, None, of_bias, of_down.to(down.dtype), of_up.to(up.dtype), None, None, None


def _sides(down: torch.Tensor, up: torch.Tensor, transposed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the delta as it is stored: (P, rank), (rank, Q)."""
    return (down.t(), up.t()) if transposed else (up, down)


def _zeros_or_room(rows: torch.Tensor, transposed: bool) -> torch.Tensor:
    return torch.empty_like(rows) if transposed else torch.zeros_like(rows)


class _MaskedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, left, right, bits, scaling):
        ctx.save_for_backward(left, right, bits)
        ctx.scaling = scaling
        out = torch.empty_like(weight)
        with torch.autocast(weight.device.type, enabled=False):
            for one in range(len(weight)):
                blocks = _Blocks(weight[one], left[one], right[one], bits[one], scaling, weight.dtype)
                for part in blocks:
                    out[one, part] = blocks.form(part, blocks.mask(part))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        left, right, bits = ctx.saved_tensors
        of_left, of_right = torch.empty_like(left), torch.empty_like(right)
        with torch.autocast(slope.device.type, enabled=False):
            for one in range(len(left)):
                blocks = _Blocks(None, left[one], right[one], bits[one], ctx.scaling, slope.dtype)
                above = torch.zeros_like(blocks.right)
                for part in blocks:
                    of_weight = blocks.mask(part).mul_(slope[one, part])
                    of_left[one, part] = torch.mm(of_weight, blocks.right.t()) * ctx.scaling
                    above.addmm_(blocks.left[part].t(), of_weight)
                of_right[one] = above
        return None, of_left, of_right, None, None
