"""What does each projection read? Its inputs, handed on batch by batch while a model reads rows.

Hooks are on only while a batch is read, also after an error. Padded positions are left out, prompt positions are not.
A 3-D weight of experts is read expert by expert: each sees the tokens that the router gave it, and no others. The
router's weight is multiplied in after the last projection, so it changes no input.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn

from nbhelpers import data, evaluate
from nbhelpers.projections import Projection
from nbhelpers.tracking import Interrupted

Key = tuple[str, int]  # a projection's name and the number of its expert, 0 where it has none
See = Callable[
    [Key, torch.Tensor], None
]  # is given (tokens, inputs) on the model's device, in the model's number format


@torch.no_grad()
def read(
    model: nn.Module,
    covered: Sequence[Projection],
    rows: Sequence[dict],
    see: See,
    *,
    batch_size: int | None = None,
    step: Callable[[], None] = lambda: None,
) -> dict[Key, int]:
    """Let the model read the rows; `see` is called with what every covered projection reads. Returns tokens by key.

    `step` is called after each batch. ValueError names a projection, or an expert, that saw no token: nothing is known
    of what it reads. LookupError names experts whose forward pass is not known.
    """
    tokens = {(one.name, expert): 0 for one in covered for expert in range(experts(one))}

    def counted(key: Key, inputs: torch.Tensor) -> None:
        tokens[key] += len(inputs)
        see(key, inputs)

    with evaluate.evaluation_mode(model):
        for batch in batches(model, rows, batch_size):
            mask = batch["attention_mask"]
            padding = {} if mask.all() else {"attention_mask": mask}  # without one the fastest attention can be used
            with _hooked(model, covered, counted, mask.bool().flatten()):
                model.base_model(input_ids=batch["input_ids"], **padding, use_cache=False)
            step()
    _check_all_seen(covered, tokens)
    return tokens


def batches(model: nn.Module, rows: Sequence[dict], batch_size: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
    """The rows collated on the model's device; batch_size: as many as evaluate.batch_rows allows if None."""
    size = batch_size or evaluate.batch_rows(model, max(len(row["input_ids"]) for row in rows))
    for start in range(0, len(rows), size):
        yield data.collate(rows[start : start + size], next(model.parameters()).device)


def experts(projection: Projection) -> int:
    """How many experts share the weight; 1 for a matrix."""
    return projection.shape[0] if len(projection.shape) == 3 else 1


def fan_in(projection: Projection) -> int:
    """Numbers that one output is made of."""
    return projection.shape[projection.inputs]


def as_experts(one: Projection, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor of the stored shape as (experts, outputs, inputs), of a matrix with one expert."""
    matrix = one.as_matrix(tensor)
    return matrix if matrix.ndim == 3 else matrix[None]


def stored(one: Projection, tensor: torch.Tensor) -> torch.Tensor:
    """(experts, outputs, inputs) back in the stored shape."""
    return one.as_matrix(tensor if len(one.shape) == 3 else tensor[0]).contiguous()


def groups(covered: Sequence[Projection], size: Callable[[Projection], int], limit: int) -> list[list[Projection]]:
    """Neighbours together as long as their bytes stay within the limit, at least one a group."""
    found: list[list[Projection]] = []
    left = 0
    for one in covered:
        if not found or size(one) > left:
            found.append([])
            left = limit
        found[-1].append(one)
        left -= size(one)
    return found


def watched_steps(
    total: int, progress: Callable[[dict], None] | None, should_stop: Callable[[], bool] | None
) -> Callable[[], None]:
    """A function to be called after each of `total` steps; it raises Interrupted where it was asked to stop."""
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress({"done": done, "total": total})
        if should_stop is not None and should_stop() and done < total:
            raise Interrupted(f"stopped after {done} of {total} steps of scoring weights")

    return step


def _check_all_seen(covered: Sequence[Projection], tokens: dict[Key, int]) -> None:
    for one in covered:
        unseen = [expert for expert in range(experts(one)) if not tokens[one.name, expert]]
        if unseen and len(one.shape) == 3:
            raise ValueError(
                f"{one.name}: the router gave no token to expert {', '.join(map(str, unseen))} of {experts(one)}, so "
                "nothing is known of their inputs; give more rows"
            )
        if unseen:
            raise ValueError(f"{one.name} read nothing while the model read the rows; it cannot be scored by inputs")


@contextmanager
def _hooked(model: nn.Module, covered: Sequence[Projection], see: See, real: torch.Tensor) -> Iterator[None]:
    """real: which positions of the flattened batch are no padding, bool (rows * length,)."""
    by_module: dict[str, list[Projection]] = {}
    for one in covered:
        by_module.setdefault(one.module, []).append(one)
    hooks = []
    for name, inside in by_module.items():
        if len(inside[0].shape) == 3:
            _check_experts(name, model.get_submodule(name))
    try:
        for name, inside in by_module.items():
            watch = _experts_hook if len(inside[0].shape) == 3 else _matrix_hook
            hooks.append(model.get_submodule(name).register_forward_pre_hook(watch(inside, see, real)))
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _matrix_hook(inside: list[Projection], see: See, real: torch.Tensor):
    """For Linear and Conv1D: (rows, length, inputs), or (rows * length, inputs) as OPT's MLP is given."""
    (one,) = inside

    def hook(module: nn.Module, arguments: tuple) -> None:
        see((one.name, 0), _flat(one.name, arguments[0], real)[real])

    return hook


def _experts_hook(inside: list[Projection], see: See, real: torch.Tensor):
    """For experts in 3-D, given hidden states (tokens, width) and the experts of each token (tokens, chosen)."""
    names = {one.name.rpartition(".")[2]: one.name for one in inside}

    def hook(module: nn.Module, arguments: tuple) -> None:
        hidden, chosen = arguments[:2]
        hidden = _flat(inside[0].name, hidden, real)
        for expert in range(len(module.gate_up_proj)):
            its = hidden[(chosen == expert).any(-1) & real]
            if "gate_up_proj" in names:
                see((names["gate_up_proj"], expert), its)
            if "down_proj" in names:
                see((names["down_proj"], expert), module._apply_gate(F.linear(its, module.gate_up_proj[expert])))

    return hook


def _flat(name: str, inputs: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    flat = inputs.reshape(-1, inputs.shape[-1])
    if len(flat) != len(real):
        raise ValueError(f"{name} reads {len(flat)} positions of a batch of {len(real)}; it cannot be scored by inputs")
    return flat


def _check_experts(name: str, module: nn.Module) -> None:
    """LookupError unless these experts are gated, without biases, and lie as (experts, outputs, inputs)."""
    plain = getattr(module, "has_gate", False) and not (module.has_bias or module.is_transposed)
    if not plain or not all(hasattr(module, part) for part in ("gate_up_proj", "down_proj", "_apply_gate")):
        raise LookupError(
            f"how {type(module).__name__} ({name}) computes is not known, so what its experts read is not; use an "
            "importance that needs no inputs"
        )
