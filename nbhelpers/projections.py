"""Which weights of a model are projections, and how do they lie? One view of Linear, Conv1D and experts in 3-D.

A projection multiplies what passes through a block: attention and MLP matrices. Embeddings, the output head, routers
and norms are none by default. What is left out is named with its share, so that a sparsity says of what it is one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from nbhelpers import adapters
from nbhelpers.architecture import is_quantised

LEAST_COVERAGE = 0.9  # of the numbers in a model's projections
TRANSPOSED = ("Conv1D",)  # classes whose weight is (inputs, outputs)


@dataclass(frozen=True)
class Projection:
    """One weight. name: of the parameter, exactly as in `model.named_parameters()`; shape: as it is stored.

    inputs: the dimension of `shape` along which inputs lie; the dimension of outputs is the other of the last two.
    """

    name: str
    shape: tuple[int, ...]
    inputs: int

    @property
    def numbers(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def outputs(self) -> int:
        """The dimension along which outputs lie."""
        return 2 * len(self.shape) - 3 - self.inputs

    @property
    def module(self) -> str:
        """The module that holds it."""
        return self.name.rpartition(".")[0]

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view of a tensor of this shape as (outputs, inputs), of experts as (experts, outputs, inputs)."""
        return tensor if self.inputs == len(self.shape) - 1 else tensor.transpose(-1, -2)


@dataclass(frozen=True)
class LeftOut:
    """A weight of two or more dimensions that is no projection. counts: whether a mask should have reached it."""

    name: str
    numbers: int
    why: str
    counts: bool


@dataclass(frozen=True)
class Projections:
    """covered: in the order of the model's parameters; left_out: every other weight of two or more dimensions."""

    covered: tuple[Projection, ...]
    left_out: tuple[LeftOut, ...]

    @property
    def numbers(self) -> int:
        """The denominator of a sparsity: numbers in all covered projections."""
        return sum(one.numbers for one in self.covered)

    @property
    def coverage(self) -> float:
        """Share of the numbers that a mask should reach which are covered."""
        missed = sum(one.numbers for one in self.left_out if one.counts)
        return self.numbers / (self.numbers + missed) if self.numbers else 0.0

    def lines(self) -> list[str]:
        """What is covered and what is not, each with its share of all weights of two or more dimensions."""
        total = self.numbers + sum(one.numbers for one in self.left_out)
        rest = [f"left out: {one.name} ({one.numbers / total:.1%}): {one.why}" for one in self.left_out]
        return [f"covered: {len(self.covered)} projections ({self.numbers / total:.1%})", *rest]


def projections(model: nn.Module, accept_low_coverage: bool = False) -> Projections:
    """All projections of a model without adapters. ValueError: quantised weights, adapters that are not merged, or
    coverage below LEAST_COVERAGE that is not accepted.

    Tied weights are listed once, under the first of their names.
    """
    if adapters.are_on(model):
        raise ValueError("the model carries adapters that are not merged: merge them or take them out first")
    ends = {id(part) for part in (model.get_input_embeddings(), model.get_output_embeddings()) if part is not None}
    covered, left_out = [], []
    for name, parameter in model.named_parameters():  # tied ones once
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, nn.Linear) and name.endswith("weight") and is_quantised(module):
            raise ValueError(f"{name} is quantised, so its numbers cannot be masked: load it without quantization")
        if parameter.ndim < 2:
            continue
        why = ("embedding or output head", False) if id(module) in ends else _why_not(model, name, module, parameter)
        if why is None:
            covered.append(Projection(name, tuple(parameter.shape), parameter.ndim - (2 if _transposed(module) else 1)))
        else:
            left_out.append(LeftOut(name, parameter.numel(), *why))
    found = Projections(tuple(covered), tuple(left_out))
    if not covered:
        raise ValueError(f"{type(model).__name__} has no projection that can be masked: {'; '.join(found.lines()[1:])}")
    if found.coverage < LEAST_COVERAGE and not accept_low_coverage:
        missed = ", ".join(f"{one.name} ({one.why})" for one in left_out if one.counts)
        raise ValueError(
            f"only {found.coverage:.1%} of the projections' numbers can be masked, left out: {missed}; accept it with "
            "accept_low_coverage (--accept-low-coverage)"
        )
    return found


def _why_not(model: nn.Module, name: str, module: nn.Module, parameter: nn.Parameter) -> tuple[str, bool] | None:
    """None for a projection; else (why, whether it should have been one)."""
    kind, own = type(module).__name__, name.rpartition(".")[2]
    text = model.config.get_text_config()
    experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None)
    if isinstance(module, nn.Embedding):
        return "embedding", False
    if "bias" in own:
        return "bias", False
    if "Router" in kind or (parameter.ndim == 2 and parameter.shape[0] == experts and "gate" in name.split(".")):
        return "router", False
    if parameter.ndim == 2 and own == "weight" and (isinstance(module, nn.Linear) or kind in TRANSPOSED):
        return None
    if parameter.ndim == 3 and kind.endswith("Experts"):
        return None
    return f"how {kind} uses it is not known", True


def _transposed(module: nn.Module) -> bool:
    """Whether its weights are (..., inputs, outputs)."""
    return type(module).__name__ in TRANSPOSED or bool(getattr(module, "is_transposed", False))
