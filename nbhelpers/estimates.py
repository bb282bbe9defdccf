"""What memory will a model need for a job? Starting points only, with the sum in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from nbhelpers import memory
from nbhelpers.registry import unknown

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
    return model.total <= (memory.available_bytes() if free_bytes is None else free_bytes)


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
