"""How are weights in 8 and 4 bits loaded, computed with as their format says, and unpacked? By bitsandbytes."""

from __future__ import annotations

import copy
from functools import partial
from typing import Literal

import torch
from torch import nn

Quantization = Literal["8bit", "4bit"]


def quantization_config(kind: Quantization, compute: torch.dtype):
    """What transformers loads these weights by: 8 bits, or nf4 with double quantisation that computes in `compute`."""
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=compute
    )


def mend_4bit_on_cpu(model: nn.Module) -> None:
    """Let 4-bit layers compute on a CPU what their format says; on other devices nothing is changed.

    Two faults of bitsandbytes 0.50 on CPUs with AVX-512: layers whose width is no multiple of their block (64) are
    dequantised wrongly, as if blocks began anew in each row; and the first evaluation packs weights anew with rounded
    scales, so that the model is no longer the one that was measured.
    """
    for module in model.modules():
        if type(module).__name__ == "Linear4bit" and module.weight.device.type == "cpu":
            module.support_avx512bf16_for_cpu = False
            if module.in_features % module.weight.quant_state.blocksize:
                module.forward = partial(_linear_4bit, module)


def _linear_4bit(module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(inputs, dequantised(module).to(inputs.dtype), module.bias)


def dequantised(module: nn.Module) -> torch.Tensor:
    """(out, in): what the packed weight of a 4-bit layer stands for, in the type it computes with.

    Unpacked as one row, in which blocks lie one after another.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(module.weight.quant_state)
    shape, state.shape = state.shape, torch.Size([state.shape.numel()])
    return dequantize_4bit(module.weight.data, state).view(shape)
