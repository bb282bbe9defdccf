"""Several processes that train one model together (torchrun, accelerate launch): who am I, and what do we all know?

Each rank takes its share of the rows of every step; gradients are added up, so that all ranks make the same step. With
one process everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

PATIENCE = timedelta(days=1)  # a rank may measure or save for long while the others wait
BUCKET_BYTES = 64 * 2**20  # gradients are sent together up to this size


def count() -> int:
    """How many processes there are, as their launcher says."""
    return int(os.environ.get("WORLD_SIZE", 1))


def number() -> int:
    """Which of them this is, from 0."""
    return int(os.environ.get("RANK", 0)) if count() > 1 else 0


def is_first() -> bool:
    """Whether this is the process that writes and reports."""
    return number() == 0


@contextmanager
def joined(device: str) -> Iterator[None]:
    """The processes know each other inside (gloo on CPUs, nccl on GPUs, one GPU a process). May lie in one another."""
    if count() == 1:
        yield
        return
    import torch

    if torch.distributed.is_initialized():
        yield
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def share(rows: list) -> list:
    """This process's part of the rows of a step."""
    return rows[number() :: count()]


def add_up(tensors: Iterable[Any]) -> None:
    """Each tensor becomes its sum over all processes, in place; they are sent in buckets of one number format."""
    if count() == 1:
        return
    import torch

    for bucket in _buckets(tensors):
        flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
        torch.distributed.all_reduce(flat)
        for tensor, summed in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
            tensor.copy_(summed.view_as(tensor))


def _buckets(tensors: Iterable[Any]) -> Iterator[list]:
    bucket: list = []
    for tensor in tensors:
        full = sum(other.nbytes for other in bucket) + tensor.nbytes > BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def total(values: list[float], device: Any) -> list[float]:
    """Numbers added up over all processes, in float64."""
    if count() == 1:
        return values
    import torch

    summed = torch.tensor(
        values, dtype=torch.float32 if str(device).startswith("mps") else torch.float64, device=device
    )
    torch.distributed.all_reduce(summed)
    return summed.tolist()


def any_of(flag: bool, device: Any) -> bool:
    """Whether it is so in at least one process: for decisions that all must take."""
    return flag if count() == 1 else total([float(flag)], device)[0] > 0


def told_by_first(value: Any) -> Any:
    """The first process's value, a plain Python object, in every process."""
    if count() == 1:
        return value
    import torch

    held = [value]
    torch.distributed.broadcast_object_list(held, src=0)
    return held[0]
