"""What does a model need before it is trained, and what is undone afterwards?

Float32 masters of what is trained, adapters for LoRA, flags and settings: all of it for the time of training only. The
object that was given is the object that comes back, with trained weights and otherwise as it was.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nbhelpers import adapters
from nbhelpers.registry import unknown

COMPARED = 16  # tokens of a row on which merged and unmerged logits are compared


@contextmanager
def prepared(
    model: nn.Module, config: Any, precision: str, put_on: Callable[[nn.Module], nn.Module] | None = None
) -> Iterator[nn.Module]:
    """The module to train: the model itself, or for lora and qlora the model wrapped by peft.

    put_on: puts the adapters on in place of `with_adapters`.

    Whatever is trained is float32 (with precision fp32 also what is not). Afterwards, also after an error: number
    formats, requires_grad, training mode, use_cache and activation checkpointing are as before, and adapters that were
    not merged are gone. For qlora they stay, unless there was an error: merging would round them to 4 bits.
    """
    _check_quantisation(model, config.method)
    before = [(p, p.requires_grad, p.dtype) for p in model.parameters()]
    was_training, use_cache = model.training, getattr(model.config, "use_cache", None)
    try:
        for parameter, _, _ in before:
            if (config.method == "full" or precision == "fp32") and parameter.is_floating_point():
                parameter.data = parameter.data.float()
            parameter.requires_grad_(config.method == "full")
        trainable = model
        if config.method != "full":
            trainable = put_on(model) if put_on is not None else with_adapters(model, config)
        if config.gradient_checkpointing:  # after the adapters: peft would set the same hook a second time, for good
            _checkpoint_activations(model)
        yield trainable
    except BaseException:
        adapters.unload(model)
        raise
    else:
        if config.method != "qlora":
            adapters.unload(model)
    finally:
        if config.gradient_checkpointing:
            _keep_activations(model)
        for parameter, requires_grad, dtype in before:
            if parameter.dtype != dtype:
                parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(requires_grad)
        if use_cache is not None:
            model.config.use_cache = use_cache
        model.train(was_training)
        model.__dict__.pop("_is_accelerate_prepared", None)


def _check_quantisation(model: nn.Module, method: str) -> None:
    """ValueError unless quantised weights meet qlora, and qlora 4-bit weights without adapters."""
    packed = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    if method == "qlora" and not packed:
        raise ValueError("method 'qlora' trains adapters on 4-bit weights; load the model with quantization='4bit'")
    if adapters.are_on(model):
        raise ValueError(
            "the model carries adapters, which training would drop; merge them into it first, or fine-tune the model "
            "they were made on"
        )
    if method != "qlora" and getattr(model, "quantization_method", None) is not None:
        raise ValueError(
            f"method {method!r} cannot train 8- or 4-bit weights; load the model with quantization=None, or use 'qlora'"
        )


def with_adapters(model: nn.Module, config: Any) -> nn.Module:
    """The model with a LoRA adapter on each linear layer but the output embedding (peft's "all-linear"), or on those
    that config.lora_targets names. ValueError where a name is no layer's."""
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers.pytorch_utils import Conv1D

    named = {name.rpartition(".")[2] for name, module in model.named_modules() if hasattr(module, "weight")}
    for name in config.lora_targets or ():
        if name not in named:
            raise ValueError(unknown("layer of lora_targets", name, sorted(named)))
    settings = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=list(config.lora_targets) if config.lora_targets else "all-linear",
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),  # GPT-2: (in, out) weights
    )
    with adapters.quiet_peft():
        return get_peft_model(model, settings)


def merge(trained: nn.Module, row: dict[str, torch.Tensor]) -> float:
    """Put adapters into the weights of a peft model. Returns largest |logit change| / largest |logit| (a row's end)."""
    trained.eval()
    adapted = _logits(trained, row)
    merged = _logits(trained.merge_and_unload(safe_merge=True), row)
    return float((merged - adapted).abs().max() / adapted.abs().max())


@torch.no_grad()
def _logits(model: nn.Module, row: dict[str, torch.Tensor]) -> torch.Tensor:
    ids = row["input_ids"][None, -COMPARED:].to(next(model.parameters()).device)
    return model(input_ids=ids, use_cache=False).logits.float()


def left_out(model: nn.Module, total: int) -> dict[str, float]:
    """Matrices without an adapter, embeddings aside: name with * for layer numbers -> share of `total` parameters.

    model: the inner model while it carries adapters. Experts held as 3-D parameters (Mixtral) are no linear layers.
    """
    embeddings = {id(e.weight) for e in (model.get_input_embeddings(), model.get_output_embeddings()) if e is not None}
    positions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    shares: dict[str, float] = {}
    for name, parameter in model.named_parameters():
        adapted = ".lora_" in name or ".base_layer." in name
        if parameter.ndim >= 2 and not adapted and id(parameter) not in embeddings | positions:
            pattern = re.sub(r"\.\d+\.", ".*.", name)
            shares[pattern] = shares.get(pattern, 0.0) + parameter.numel() / total
    return shares


def _checkpoint_activations(model: nn.Module) -> None:
    if hasattr(model, "activation_checkpointing_enable"):  # its name since transformers 5.2x
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def _keep_activations(model: nn.Module) -> None:
    if hasattr(model, "activation_checkpointing_disable"):
        model.activation_checkpointing_disable()
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()
