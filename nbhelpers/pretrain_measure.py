"""How good is a bundled model, and is it worth pruning?

Plain transformers forwards throughout: nothing here goes through this package's own attention, loading or evaluation,
so that a test can hold the two against each other. Losses are in nats per scored token.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nbhelpers.generated import Document

# Where each architecture projects the output of its heads, and by what name its layers go.
OUTPUT_PROJECTION = {
    "gpt2": "transformer.h.{}.attn.c_proj",
    "opt": "model.decoder.layers.{}.self_attn.out_proj",
    "gpt_neox": "gpt_neox.layers.{}.attention.dense",
    "llama": "model.layers.{}.self_attn.o_proj",
}
HALF_SEEDS = range(5)
COSTLY = 0.02  # nats a head must cost alone to count as one that matters


def token_stream(tokenizer, texts: Iterable[str]) -> torch.Tensor:
    """Ids of all texts one after another, each with the BOS that the tokenizer puts before it. (tokens,)"""
    return torch.tensor([token for ids in tokenizer(list(texts))["input_ids"] for token in ids])


def windows(stream: torch.Tensor, length: int) -> torch.Tensor:
    """The stream cut into rows without overlap, the tail dropped. (windows, length)"""
    return stream[: len(stream) // length * length].view(-1, length)


@torch.no_grad()
def window_loss(model: nn.Module, rows: torch.Tensor, batch: int = 8) -> float:
    """Mean loss per scored token; the first token of each row is not scored. rows: (windows, length)"""
    total = sum(
        cross_entropy(model(part).logits[:, :-1].flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
        for part in rows.split(batch)
    )
    return total / (rows.shape[0] * (rows.shape[1] - 1))


@torch.no_grad()
def document_loss(model: nn.Module, tokenizer, documents: Sequence[Document]) -> dict:
    """Loss on documents read one by one, beside the generator's own entropy on the same tokens.

    Scored are all tokens of a document and the BOS that follows it, because knowing that a document is over is part of
    knowing the document. Returns {nll, entropy, gap, documents, tokens}, the first three in nats per token.
    """
    total, tokens = 0.0, 0
    for document in documents:
        ids = torch.tensor([[*tokenizer(document.text)["input_ids"], tokenizer.bos_token_id]])
        total += cross_entropy(model(ids).logits[0, :-1].float(), ids[0, 1:], reduction="sum").item()
        tokens += ids.shape[1] - 1
    nll, entropy = total / tokens, sum(document.nats for document in documents) / tokens
    return {"nll": nll, "entropy": entropy, "gap": nll - entropy, "documents": len(documents), "tokens": tokens}


def heads_of(model: nn.Module) -> list[tuple[int, int]]:
    """(layer, head) of every head, counted by the config."""
    config = model.config
    return [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]


@contextmanager
def closed(model: nn.Module, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """While it lasts, the output of these (layer, head) is zero before the output projection."""
    config = model.config
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    name = OUTPUT_PROJECTION[config.model_type]
    by_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        by_layer.setdefault(layer, []).append(head)

    def zero(heads_here: list[int]):
        def before(_module: nn.Module, inputs: tuple) -> tuple:
            hidden = inputs[0].clone()
            for head in heads_here:
                hidden[..., head * size : (head + 1) * size] = 0
            return (hidden, *inputs[1:])

        return before

    modules = {layer: model.get_submodule(name.format(layer)) for layer in by_layer}
    hooks = [modules[layer].register_forward_pre_hook(zero(here)) for layer, here in by_layer.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def worth_pruning(model: nn.Module, rows: torch.Tensor) -> dict:
    """What closing heads costs on these rows: half of all at random (5 seeds), and each one alone.

    Returns {nll, half_closed_ratios, half_closed_mean_ratio, head_costs, costly_heads, heads, windows, tokens}.
    Ratios are perplexities over that with all heads open, costs are nats per token, costly heads cost more than COSTLY.
    """
    heads = heads_of(model)
    base = window_loss(model, rows)

    def cost(which: Sequence[tuple[int, int]]) -> float:
        with closed(model, which):
            return window_loss(model, rows) - base

    ratios = [math.exp(cost(random.Random(seed).sample(heads, len(heads) // 2))) for seed in HALF_SEEDS]
    costs = [cost([head]) for head in heads]
    return {
        "nll": base,
        "half_closed_ratios": ratios,
        "half_closed_mean_ratio": sum(ratios) / len(ratios),
        "head_costs": costs,
        "costly_heads": sum(one > COSTLY for one in costs),
        "heads": len(heads),
        "windows": rows.shape[0],
        "tokens": rows.shape[0] * (rows.shape[1] - 1),
    }
