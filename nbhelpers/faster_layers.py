"""Which layers of a model in float32 are computed faster, with the same result?

LoRA layers as one operation whose thin matrix products are laid out so that they run at full speed (peft's backward
pass spends ten times as long in them on a CPU), and GPT-2's activation as one kernel instead of seven.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn


@contextmanager
def in_use(model: nn.Module, precision: str) -> Iterator[int]:
    """Faster layers inside, the model's own afterwards, also after an error. Yields how many were put in.

    precision: of the training or of the weights; only with fp32 is anything changed.
    """
    changed = []
    try:
        for module in model.modules() if precision == "fp32" else ():
            faster = _faster(module)
            if faster is not None and "forward" not in module.__dict__:
                module.forward = faster
                changed.append(module)
        yield len(changed)
    finally:
        for module in changed:
            module.__dict__.pop("forward", None)


def _faster(module: nn.Module):
    if type(module).__name__ == "NewGELUActivation":
        return partial(F.gelu, approximate="tanh")  # 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))
    return partial(_lora_forward, module) if _is_plain_lora(module) else None


def _is_plain_lora(module: nn.Module) -> bool:
    """One adapter without dropout or variant on a frozen float32 Linear or Conv1D."""
    if "peft" not in sys.modules:  # then nothing is a layer of it
        return False
    from peft.tuners.lora.layer import Linear
    from transformers.pytorch_utils import Conv1D

    if type(module) is not Linear or module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return False
    name, base = module.active_adapters[0], module.get_base_layer()
    if name not in module.lora_A or name in module.lora_variant or module.lora_A[name].bias is not None:
        return False
    weights = (base.weight, module.lora_A[name].weight, module.lora_B[name].weight)
    return (
        type(base) in (nn.Linear, Conv1D)
        and isinstance(module.lora_dropout[name], nn.Identity)
        and module.lora_B[name].bias is None
        and all(weight.dtype == torch.float32 for weight in weights)
        and not base.weight.requires_grad
        and not (base.bias is not None and base.bias.requires_grad)
    )


def _lora_forward(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    from transformers.pytorch_utils import Conv1D

    name, base = module.active_adapters[0], module.get_base_layer()
    weight = base.weight if isinstance(base, Conv1D) else base.weight.t()
    down, up = module.lora_A[name].weight, module.lora_B[name].weight
    return _LoraLinear.apply(x, weight, base.bias, down, up, module.scaling[name])


class _LoraLinear(torch.autograd.Function):
    """x W + b + scaling (x A^T) B^T with W, b frozen.

    x: (..., inputs); weight: (inputs, outputs); bias: (outputs,) or None; down (A): (rank, inputs); up (B):
    (outputs, rank).
    """

    @staticmethod
    def forward(ctx, x, weight, bias, down, up, scaling):
        rows = x.reshape(-1, x.shape[-1])
        out = rows @ weight if bias is None else torch.addmm(bias, rows, weight)
        low = (down @ rows.t()).t()  # (rows, rank), laid out by columns: the thin side is the long one in memory
        out.addmm_(low, up.t(), alpha=scaling)
        ctx.save_for_backward(rows, weight, down, up, low)
        ctx.scaling, ctx.shape = scaling, x.shape
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx, slope):
        rows, weight, down, up, low = ctx.saved_tensors
        slope = slope.reshape(-1, slope.shape[-1])
        of_low = (up.t() @ slope.t()).mul_(ctx.scaling)  # (rank, rows)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = (slope @ weight.t()).addmm_(of_low.t(), down).view(ctx.shape)
        return of_x, None, None, of_low @ rows, (low.t() @ slope).t() * ctx.scaling, None
