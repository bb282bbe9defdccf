"""What memory is free, what will a job need, and how is memory really given back?"""

from __future__ import annotations

import ctypes
import gc
import platform
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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


@dataclass
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
    """The highest resident size this process ever had, bytes; 0 where the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    high = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return high if sys.platform == "darwin" else high * 1024


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


sequential = loaded


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


# Estimates: starting points only --------------------------------------------------------------------------------------

JOBS = ("inference_16bit", "inference_8bit", "inference_4bit", "lora", "qlora", "full_finetuning")
MARGIN = 0.10  # allocator rounding, fragmentation, library workspace
INT8_BYTES = 1.0
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # 4 bits; a byte for every 64, 4 more for every 256 of those (double quantisation)
TRAINED_BYTES = {"weights": 4, "gradients": 4, "optimizer": 8}  # float32 masters and gradients, AdamW's two moments


@dataclass(frozen=True)
class Shape:
    """What an estimate needs to know of a model, counted without any weights.

    parameters: all, tied weights once; quantised: those that 8-/4-bit loading reaches (weights of Linear and Conv1D
    layers, not lm_head, embeddings, norms or 3-D experts); adapter_width: sum of (inputs + outputs) over these layers,
    so that LoRA of rank r trains r * adapter_width; key_value_width: numbers a token leaves in the cache per layer.
    """

    parameters: int
    quantised: int
    adapter_width: int
    layers: int
    hidden: int
    vocabulary: int
    key_value_width: int


@dataclass(frozen=True)
class Requirement:
    """An estimate: bytes by item, and the sum as one line of text."""

    job: str
    items: dict[str, int]
    text: str
    total: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", sum(self.items.values()))


def parameter_count(config: Any) -> int:
    """Number of parameters of the causal language model that `config` describes, tied weights once.

    `config`: a transformers config, or a dict with `model_type`. The model is built on the meta device: no weights.
    """
    return shape_of(config).parameters


def shape_of(config: Any) -> Shape:
    """Count a model from its config alone (transformers config or dict with `model_type`), on the meta device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    if isinstance(config, dict):
        if "model_type" not in config:
            raise ValueError(f"config must name its model_type, got the keys {sorted(config)}")
        config = AutoConfig.for_model(**config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    # the same choice as transformers' bitsandbytes integration: exactly Linear, or Conv1D, and never the head
    linears = [m for m in model.modules() if (type(m) is torch.nn.Linear or isinstance(m, Conv1D)) and m is not head]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        quantised=sum(m.weight.numel() for m in linears),
        adapter_width=sum(sum(m.weight.shape) for m in linears),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
        key_value_width=2 * head_dim * (getattr(config, "num_key_value_heads", None) or heads),
    )


def required_bytes(
    model: int | Shape | Any, job: str, *, tokens: int = 512, rank: int = 16, weight_bytes: int = 2
) -> Requirement:
    """What a job will need in memory: a starting point for a choice, not a result.

    model: a parameter count, a `Shape`, or a config (dict or transformers). tokens: in memory at once (micro-batch x
    length). rank: of the LoRA adapters, on all linear layers. weight_bytes: of unquantised frozen weights (4 on a CPU).
    A bare count says nothing of embeddings, layers and vocabulary: all weights then count as quantised, 1 % of them as
    adapters, and activations as a quarter of 16-bit weights.
    Activations when training: 34 bytes x tokens x hidden x layers (Korthikanti et al. 2022, without the score matrix,
    which fused attention never stores) and 14 bytes a logit; at inference the key-value cache and 6 bytes a logit.
    """
    if job not in JOBS:
        from nbhelpers.registry import unknown

        raise LookupError(unknown("job", job, JOBS))
    known = isinstance(model, (int, Shape))
    if isinstance(model, int) and (isinstance(model, bool) or model < 1):
        raise ValueError(f"parameters must be at least 1, got {model}")
    for name, value in {"tokens": tokens, "rank": rank, "weight_bytes": weight_bytes}.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    shape = model if known else shape_of(model)
    parts = [*_weights(shape, job, rank, weight_bytes), _activations(shape, job, tokens)]
    margin = round(MARGIN * sum(size for _, size, _ in parts))
    parts.append(("margin", margin, f"{megabytes(margin)} margin ({MARGIN:.0%})"))
    items: dict[str, int] = {}
    for name, size, _ in parts:
        items[name] = items.get(name, 0) + size
    return Requirement(job, items, " + ".join(text for *_, text in parts) + f" = {megabytes(sum(items.values()))}")


def fits(model: int | Shape | Requirement | Any, job: str | None = None, free_bytes: int | None = None) -> bool:
    """Whether the estimate is at most `free_bytes` (default: what is free now). A Requirement needs no job."""
    if not isinstance(model, Requirement):
        if job is None:
            raise ValueError(f"job must be given for a model, got None; one of {', '.join(JOBS)}")
        model = required_bytes(model, job)
    return model.total <= (available_bytes() if free_bytes is None else free_bytes)


def megabytes(size: int | float) -> str:
    """Bytes for people, decimal units as the hub shows them: `249 MB`, `16.1 GB`."""
    return f"{size / 1e9:.1f} GB" if size >= 0.9995e9 else f"{size / 1e6:.0f} MB"


_Part = tuple[str, int, str]  # item, bytes, the words of the sum


def _weights(shape: int | Shape, job: str, rank: int, weight_bytes: int) -> list[_Part]:
    count = shape if isinstance(shape, int) else shape.parameters
    if job == "full_finetuning":
        return [_times(name, count, size) for name, size in TRAINED_BYTES.items()]
    each = {"inference_8bit": INT8_BYTES, "inference_4bit": NF4_BYTES, "qlora": NF4_BYTES}.get(job)
    if each is None:
        parts = [_times("weights", count, weight_bytes)]
    else:
        packed = shape if isinstance(shape, int) else shape.quantised
        parts = [_times("weights", packed, each, "quantised weights")]
        if packed < count:
            parts.append(_times("weights", count - packed, weight_bytes, "unquantised weights"))
    if job in ("lora", "qlora"):
        adapters = max(1, count // 100) if isinstance(shape, int) else rank * shape.adapter_width
        parts += [_times(name, adapters, size, f"adapter {name}") for name, size in TRAINED_BYTES.items()]
    return parts


def _activations(shape: int | Shape, job: str, tokens: int) -> _Part:
    if isinstance(shape, int):
        size = shape // 2
    elif job.startswith("inference"):
        size = tokens * (2 * shape.layers * shape.key_value_width + 6 * shape.vocabulary)
    else:
        size = tokens * (34 * shape.layers * shape.hidden + 14 * shape.vocabulary)
    return "activations", size, f"{megabytes(size)} activations"


def _times(item: str, count: int, each: float, words: str | None = None) -> _Part:
    size = round(count * each)
    return item, size, f"{count / 1e6:,.1f} M parameters x {each:.4g} bytes = {megabytes(size)} {words or item}"


def shape_record(shape: Shape) -> dict[str, int]:
    """A shape as plain numbers, to be stored; `Shape(**record)` brings it back."""
    return asdict(shape)
