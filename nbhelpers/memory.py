"""What memory is free, how much did a block take, and how is memory really given back?"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What is there --------------------------------------------------------------------------------------------------------


def free() -> dict[str, Any]:
    """Memory now, in bytes: {"ram_total", "ram_free", "gpus": [{"name", "total", "free", "allocated"}, ...]}.

    `ram_free` is what can be had without swapping. A GPU's `free` is what the driver would still give out, `allocated`
    what tensors of this process hold.
    """
    import psutil
    import torch

    ram = psutil.virtual_memory()
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free_bytes, total = torch.cuda.mem_get_info(index)
        allocated = torch.cuda.memory_allocated(index)
        name = torch.cuda.get_device_name(index)
        gpus.append({"name": name, "total": total, "free": free_bytes, "allocated": allocated})
    return {"ram_total": ram.total, "ram_free": ram.available, "gpus": gpus}


def available_bytes() -> int:
    """What a model may use: the freest GPU where there is one, else RAM."""
    now = free()
    return max((gpu["free"] for gpu in now["gpus"]), default=now["ram_free"])


def resident_bytes() -> int:
    """RAM that this process holds now (resident set size)."""
    import psutil

    return psutil.Process().memory_info().rss


def in_use(device: str) -> dict[str, int]:
    """What this process holds now, bytes: {"resident_bytes"}, and with device cuda {"cuda_bytes"} of its tensors."""
    held = {"resident_bytes": resident_bytes()}
    return held | {"cuda_bytes": _cuda("memory_allocated")} if device == "cuda" else held


@dataclass(eq=False)  # two blocks with the same numbers are two blocks
class MemoryMark:
    """Memory over a block, bytes: before it, after it, and the highest in between. CUDA: of the current device."""

    resident_before: int = 0
    resident_after: int = 0
    resident_peak: int = 0
    cuda_before: int = 0
    cuda_after: int = 0
    cuda_peak: int = 0

    @property
    def resident_grown(self) -> int:
        return self.resident_peak - self.resident_before

    def _take_cuda_peak(self) -> None:
        self.cuda_peak = max(self.cuda_peak, _cuda("max_memory_allocated"))


_open_marks: list[MemoryMark] = []


@contextmanager
def peak(interval_seconds: float = 0.005) -> Iterator[MemoryMark]:
    """Measure a block's memory: `with memory.peak() as mark: ...` then `mark.resident_peak`, `mark.cuda_peak`.

    CUDA peaks are exact. RAM is sampled every `interval_seconds`, and exact wherever the block sets a new high for the
    process. Blocks may lie in one another.
    """
    mark = MemoryMark(resident_before=resident_bytes(), cuda_before=_cuda("memory_allocated"))
    mark.resident_peak = mark.resident_before
    for outer in _open_marks:  # the counter is shared: outer blocks keep what they saw so far
        outer._take_cuda_peak()
    _cuda("reset_peak_memory_stats")
    high_before, stop = _resident_high(), threading.Event()

    def sample() -> None:
        while not stop.wait(interval_seconds):
            mark.resident_peak = max(mark.resident_peak, resident_bytes())

    sampler = threading.Thread(target=sample, name="memory-peak", daemon=True)
    _open_marks.append(mark)
    sampler.start()
    try:
        yield mark
    finally:
        stop.set()
        sampler.join()
        _open_marks.remove(mark)
        mark.resident_after, mark.cuda_after = resident_bytes(), _cuda("memory_allocated")
        mark.resident_peak = max(mark.resident_peak, mark.resident_after)
        if (high := _resident_high()) > high_before:
            mark.resident_peak = max(mark.resident_peak, high)
        mark._take_cuda_peak()


def _resident_high() -> int:
    """The highest resident size this process ever had, bytes; 0 where the system does not tell.

    On Linux from VmHWM: the counter of getrusage would begin at the parent's size.
    """
    if sys.platform == "darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def _cuda(counter: str) -> int:
    """A torch.cuda memory function by name; 0 unless torch has CUDA running already."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return 0
    return getattr(torch.cuda, counter)() or 0


# Giving back ----------------------------------------------------------------------------------------------------------


def release(*models: Any) -> None:
    """Give the memory of models back to the system, also while variables still point to them.

    Takes torch modules, optimizers, and what holds modules: an object with `.model`, a tuple, a list. Every parameter,
    buffer and gradient is emptied in place, so another name for the model, an optimizer or a traceback keeps nothing
    alive; then garbage collection, the CUDA cache and glibc's free lists. Afterwards the model refuses to run. A
    tensor taken out before (a `state_dict`, a copy) stays valid and keeps its own storage: freeing that below it would
    crash the process at its next use. Releasing twice does nothing. TypeError where nothing to release is found.
    """
    for model in models:
        _empty(model)
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch is not None and torch.backends.mps.is_available():
        torch.mps.empty_cache()
    _trim()


@contextmanager
def loaded(load: Callable[[], Any]) -> Iterator[Any]:
    """`with memory.loaded(load) as model:` loads, and gives the memory back at the end, also after an error.

    For large models one after another, where two do not fit at once. `load` returns what `release` takes.
    """
    model = load()
    try:
        yield model
    finally:
        release(model)


def _empty(thing: Any) -> None:
    import torch

    if isinstance(thing, torch.nn.Module):
        _empty_module(thing)
    elif isinstance(thing, torch.optim.Optimizer):
        thing.zero_grad(set_to_none=True)
        thing.state.clear()
    elif isinstance(thing, (tuple, list)) and any(isinstance(part, torch.nn.Module) for part in thing):
        for part in thing:
            if isinstance(part, (torch.nn.Module, torch.optim.Optimizer)):
                _empty(part)
    elif isinstance(getattr(thing, "model", None), torch.nn.Module):
        _empty_module(thing.model)
    else:
        kind = type(thing).__name__
        raise TypeError(f"release takes torch modules, optimizers or what holds a module as .model, got {kind}")


def _empty_module(model: Any) -> None:
    import torch

    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.grad = None
        _drop_tensors(tensor)
        tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    for module in model.modules():
        _drop_tensors(module)
    if not getattr(model, "_nbhelpers_released", False):
        model._nbhelpers_released = True
        model.register_forward_pre_hook(_refuse_to_run)


def _drop_tensors(holder: Any) -> None:
    """Let go of tensors among an object's own attributes; bitsandbytes keeps scales and copies in such places."""
    import torch

    for name, value in vars(holder).items():
        if isinstance(value, torch.Tensor):
            setattr(holder, name, None)
        elif type(value).__module__.startswith("bitsandbytes."):
            _drop_tensors(value)


def _refuse_to_run(module: Any, arguments: Any) -> None:
    raise RuntimeError(f"{type(module).__name__} was released and holds no weights any more; load it again")


def _trim() -> None:
    """Have glibc return its free lists to the system; other C libraries do so by themselves or cannot."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


# Out of memory --------------------------------------------------------------------------------------------------------

# What torch says without an own exception type: CPU allocator (Linux; others), drivers, and libraries on CUDA.
_OOM_MESSAGES = (
    "out of memory",
    "can't allocate memory: you tried to allocate",
    "not enough memory: you tried to allocate",
    "cublas_status_alloc_failed",
    "cudnn_status_alloc_failed",
)


def is_oom(error: BaseException) -> bool:
    """Whether an error says that memory ran out (CUDA, MPS, CPU), so that a smaller micro-batch may help."""
    torch = sys.modules.get("torch")
    if isinstance(error, MemoryError) or (torch is not None and isinstance(error, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(message in text for message in _OOM_MESSAGES)
