"""What is the loss, in which order come the rows, how fast do the weights move, and how is their state copied?

The parts of a training step that know nothing of its policies.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from nbhelpers import data, ranks


def adamw(
    parameters: dict[str, nn.Parameter],
    learning_rate: float,
    weight_decay: float,
    device: torch.device,
    *,
    paged: bool = False,
) -> Any:
    """AdamW; weight decay for matrices only. Trained weights that are not float32 are an error.

    paged: bitsandbytes' AdamW, whose state moves to the CPU where the GPU is full.
    """
    wrong = [name for name, parameter in parameters.items() if parameter.dtype != torch.float32]
    if wrong or not parameters:
        raise ValueError(f"trained parameters must be float32 and at least one, got {wrong or 'none'}")
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if paged:
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(groups, lr=learning_rate)
    return torch.optim.AdamW(groups, lr=learning_rate, fused=device.type in ("cuda", "cpu"))


def schedule_factor(config: Any) -> Callable[[int], float]:
    """Factor of the peak learning rate for the step after `done` steps: linear warm-up to 1, then the decay to 0.

    The first step has 1 / warm-up steps and the last one 1 / decay steps (linear): no step is spent on a rate of 0.
    """
    warmup = math.ceil(config.warmup_share * config.steps)

    def factor(done: int) -> float:
        if done < warmup:
            return (done + 1) / warmup
        if config.schedule == "constant" or done >= config.steps:
            return float(config.schedule == "constant")
        share = (done - warmup) / (config.steps - warmup)
        return 1 - share if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * share))

    return factor


def data_order(rows: int, count: int, seed: int) -> list[int]:
    """`count` row numbers: shuffled epochs, one after the other, from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    epochs = [torch.randperm(rows, generator=generator) for _ in range(math.ceil(count / rows))]
    return torch.cat(epochs)[:count].tolist()


def scored_tokens(row: dict[str, torch.Tensor]) -> int:
    return int((row["labels"][1:] != data.IGNORED).sum())


def copied(tensors: dict[str, torch.Tensor], into: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """Copies on the CPU; into: an earlier copy whose memory is used again, if it has the same names and shapes."""
    fits = into is not None and {n: t.shape for n, t in into.items()} == {n: t.shape for n, t in tensors.items()}
    if fits:
        for name, tensor in tensors.items():
            into[name].copy_(tensor.detach())
        return into
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}


def copied_tree(tree: Any, into: Any = None) -> Any:
    """The same nested dicts and lists with all tensors copied to the CPU; into: an earlier copy, whose memory is used
    again where it fits."""
    if isinstance(tree, torch.Tensor):
        if isinstance(into, torch.Tensor) and (into.shape, into.dtype) == (tree.shape, tree.dtype):
            return into.copy_(tree.detach())
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, dict):
        old = into if isinstance(into, dict) else {}
        return {key: copied_tree(value, old.get(key)) for key, value in tree.items()}
    if isinstance(tree, list):
        old = into if isinstance(into, list) and len(into) == len(tree) else [None] * len(tree)
        return [copied_tree(value, before) for value, before in zip(tree, old, strict=True)]
    return tree


@torch.no_grad()
def put(parameters: dict[str, nn.Parameter], values: dict[str, torch.Tensor]) -> None:
    """Write values into parameters of exactly the same names and shapes."""
    if parameters.keys() != values.keys():
        raise ValueError(f"stored weights fit another model: {sorted(parameters.keys() ^ values.keys())[:4]} differ")
    for name, parameter in parameters.items():
        if parameter.shape != values[name].shape:
            raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(values[name].shape)}")
        parameter.copy_(values[name])


def torch_random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def set_torch_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    elif "mps" in state:
        torch.mps.set_rng_state(state["mps"])


def bare_arguments(config: Any, scratch: str, device: torch.device) -> TrainingArguments:
    """Trainer as a bare loop: it neither logs, validates, saves, clips nor reports to anyone by itself."""
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        gradient_accumulation_steps=1,
        max_grad_norm=0.0,
        seed=config.seed,
        use_cpu=device.type == "cpu",
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    if arguments.world_size != ranks.count():
        raise RuntimeError(
            f"Trainer found {arguments.world_size} processes where the launcher started {ranks.count()}; start them by "
            "torchrun"
        )
    arguments._n_gpu = min(
        arguments.n_gpu, 1
    )  # else Trainer splits the batch over all GPUs of a machine (DataParallel)
    return arguments
