"""How does a PEFT adapter respect a mask? The one place that knows PEFT's private parts.

PEFT lets a `LoraVariant`, set as `layer.lora_variant[adapter]`, decide what a LoRA layer adds and merges, and calls
that interface private: a test fails when it moves. Layers on float weights also get a subclass of their own class,
which puts the delta into the product with the weight instead of beside it; 3-D experts get one whose delta is masked.
Layers on 4-bit weights keep PEFT's own class: there the delta alone is masked, and whether the base has zeros was
decided when it was quantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from peft.tuners.lora.layer import Linear, LoraLayer, LoraVariant, ParamWrapper
from torch import nn

from nbhelpers import adapters
from nbhelpers.architecture import is_quantised, is_transposed
from nbhelpers.masked_linear import masked_linear, masked_sum, pack, unpack

ADAPTER = "default"
BUFFER = adapters.MASKED  # of a layer whose delta is masked; in its state_dict, so in every fingerprint of the model


@dataclass(frozen=True)
class StoredMask:
    """What a model was masked by. bits: name of a parameter -> its mask packed, on the CPU; shapes: as it is stored."""

    mode: str
    bits: dict[str, torch.Tensor]
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, mode: str, mask: Mapping[str, torch.Tensor]) -> StoredMask:
        shapes = {name: tuple(kept.shape) for name, kept in sorted(mask.items())}
        return cls(mode, {name: pack(mask[name].cpu()) for name in shapes}, shapes)

    def kept(self, name: str) -> torch.Tensor:
        """The mask of one parameter: bool, of its shape, on the CPU."""
        return unpack(self.bits[name], self.shapes[name][-1])


def stored_mask(model: nn.Module) -> StoredMask | None:
    """What `remember` was told of this model; None for one that was never masked."""
    return getattr(inner(model), "nbhelpers_mask", None)


def remember(model: nn.Module, stored: StoredMask | None) -> None:
    inner(model).nbhelpers_mask = stored


def inner(model: nn.Module) -> nn.Module:
    """The model itself, without PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


# Layers ---------------------------------------------------------------------------------------------------------------


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    """Name of the parameter as in the model without adapters -> the LoRA layer around it."""
    found = {}
    for path, module in inner(model).named_modules():
        if isinstance(module, LoraLayer):
            found[f"{path.replace('.base_layer', '')}.{getattr(module, 'parameter_name', 'weight')}"] = module
    return found


def base_parameter(layer: LoraLayer) -> nn.Parameter:
    """The frozen weight that the layer adapts."""
    return getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))


def is_packed(layer: LoraLayer) -> bool:
    """Whether the weight below is 8- or 4-bit."""
    return not isinstance(layer, ParamWrapper) and is_quantised(layer)


def attach(layer: LoraLayer, bits: torch.Tensor) -> None:
    """From now on the layer's delta is masked by `bits`, in every forward pass and by every way of merging."""
    layer.register_buffer(BUFFER, bits.to(base_parameter(layer).device, copy=True))
    if isinstance(layer, ParamWrapper):
        layer.__class__ = MaskedParameter
        return
    layer.lora_variant[ADAPTER] = MaskedDelta()
    if type(layer) is Linear:
        layer.__class__ = MaskedLinear


def kept_by(layer: LoraLayer) -> torch.Tensor:
    """The mask of a layer's delta as it is stored: bool, of the weight's shape."""
    columns = layer.in_features if is_packed(layer) else base_parameter(layer).shape[-1]
    return unpack(getattr(layer, BUFFER), columns)


def delta(layer: LoraLayer) -> torch.Tensor:
    """scaling B A as the weight is stored, not masked, in float32 or better: what PEFT itself would add."""
    wide = torch.promote_types(base_parameter(layer).dtype, torch.float32)
    down, up = (part[ADAPTER].weight.detach().to(wide) for part in (layer.lora_A, layer.lora_B))
    if isinstance(layer, ParamWrapper):
        lhs, rhs = _expert_sides(layer, down, up)
        return torch.bmm(lhs, rhs) * layer.scaling[ADAPTER]
    product = up @ down * layer.scaling[ADAPTER]
    return product.t() if is_transposed(layer) else product


def merged_weight(layer: LoraLayer) -> torch.Tensor:
    """W + scaling (B A) . M, formed in float32 or better and rounded once; without a mask W + scaling B A."""
    weight, added = base_parameter(layer).detach(), delta(layer)
    if hasattr(layer, BUFFER):
        added = added.masked_fill(~kept_by(layer), 0)
    return (weight + added).to(weight.dtype)


class MaskedDelta(LoraVariant):
    """PEFT's hooks, for one adapter whose delta is masked by the layer's buffer."""

    @staticmethod
    def init(module: LoraLayer, adapter_name: str, **_) -> None:
        """Nothing: `attach` brings the mask."""

    def supports_lora_conversion(self) -> bool:
        return False

    @staticmethod
    def forward(module: LoraLayer, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **_) -> torch.Tensor:
        x = module.lora_dropout[active_adapter](x)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return result + _product(module, x, None, None)

    @staticmethod
    def merge_safe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        if is_packed(module):
            raise ValueError(
                "merging rounds 8- and 4-bit weights anew: dequantise the model first, or keep the adapters"
            )
        module.kept_base = base_parameter(module).data.cpu()  # PEFT works on a copy
        return merged_weight(module)

    @staticmethod
    def merge_unsafe(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> None:
        orig_weight.data = MaskedDelta.merge_safe(module, active_adapter, orig_weight)

    @staticmethod
    def unmerge(module: LoraLayer, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        return module.__dict__.pop("kept_base").to(orig_weight.device)


def _product(layer: LoraLayer, x: torch.Tensor, weight, bias) -> torch.Tensor:
    down, up = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    bits, scaling = getattr(layer, BUFFER), layer.scaling[ADAPTER]
    return masked_linear(x, weight, bias, down, up, bits, scaling, is_transposed(layer))


class MaskedLinear(Linear):
    """x (W + scaling (B A) . M) + b as one operation, where nothing asks for the base layer's own result."""

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if args or any(value is not None for value in kwargs.values()) or not self._can_be_one():
            return super().forward(x, *args, **kwargs)
        base, device = self.get_base_layer(), x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        elif x.dtype != base.weight.dtype:
            return super().forward(x)
        return _product(self, x, base.weight, base.bias)

    def _can_be_one(self) -> bool:
        base, name = self.get_base_layer(), self.active_adapters
        dropping = self.training and not isinstance(self.lora_dropout[ADAPTER], nn.Identity)
        watched = base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        usable = name == [ADAPTER] and isinstance(self.lora_variant.get(ADAPTER), MaskedDelta)
        return usable and not (self.disable_adapters or self.merged or dropping or watched or base.weight.requires_grad)


# Experts in 3-D -------------------------------------------------------------------------------------------------------


class MaskedParameter(ParamWrapper):
    """Experts, whose weights PEFT swaps for W + delta during the forward pass: here for W + delta . M."""

    def get_delta_weight(self, adapter_name: str, *args, **kwargs) -> torch.Tensor:
        return super().get_delta_weight(adapter_name, *args, **kwargs).masked_fill(~kept_by(self), 0)

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base, name = self.get_base_layer(), self.parameter_name
        wanted = self.get_param().requires_grad
        nn.utils.parametrize.register_parametrization(base, name, _MaskedSum(self), unsafe=True)
        base.parametrizations[name].original.requires_grad_(wanted)
        try:
            with nn.utils.parametrize.cached():
                yield
        finally:
            self._remove_parametrizations()


class _MaskedSum(nn.Module):
    def __init__(self, layer: ParamWrapper) -> None:
        super().__init__()
        self._layer = [layer]  # in a list: no submodule, which would close a circle

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        (layer,) = self._layer
        sides = _expert_sides(layer, layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight)
        return masked_sum(weight, *sides, getattr(layer, BUFFER), layer.scaling[ADAPTER])


def _expert_sides(layer: ParamWrapper, down: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """PEFT's factors of all experts, (experts * rank, inputs) and (outputs, rank * experts), as (experts, P, rank) and
    (experts, rank, Q), where (P, Q) is how a weight is stored."""
    down = down.reshape(layer.num_experts, -1, down.shape[-1])
    up = up.reshape(up.shape[0], -1, layer.num_experts).permute(2, 0, 1)
    if getattr(layer.get_base_layer(), "is_transposed", False):
        return down.transpose(1, 2), up.transpose(1, 2)
    return up, down
