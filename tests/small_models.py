"""Random models of every architecture, small enough that a test builds one in milliseconds, and rows for them."""

from __future__ import annotations

import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 64
WINDOW = 5  # of the model with sliding-window attention: shorter than every text here
_ENDS = {"bos_token_id": None, "eos_token_id": None}
_ALL = {"vocab_size": VOCABULARY, "initializer_range": 0.3, **_ENDS}
_COMMON = {**_ALL, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 64}
_TWO = {**_COMMON, "num_hidden_layers": 2}
_GROUPED = {**_TWO, "num_key_value_heads": 2, "intermediate_size": 48, "pad_token_id": None}

CONFIGS = {
    "gpt2": (GPT2Config, {**_ALL, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": (OPTConfig, {**_TWO, "ffn_dim": 48, "word_embed_proj_dim": 32, "pad_token_id": None}),
    "gpt_neox": (GPTNeoXConfig, {**_TWO, "intermediate_size": 48}),
    "llama": (LlamaConfig, {**_GROUPED, "num_hidden_layers": 3}),
    "mistral": (MistralConfig, {**_GROUPED, "sliding_window": None}),
    "mistral_window": (MistralConfig, {**_GROUPED, "sliding_window": WINDOW}),
    "mixtral": (MixtralConfig, {**_GROUPED, "num_local_experts": 4}),
    "qwen2": (Qwen2Config, _GROUPED),
    "qwen3": (Qwen3Config, {**_GROUPED, "head_dim": 16}),
    "phi3": (Phi3Config, _GROUPED),
}
NAMES = list(CONFIGS)

# where the parts lie, written down by hand and apart from the package's own table
LAYERS = {"gpt2": "transformer.h", "opt": "model.decoder.layers", "gpt_neox": "gpt_neox.layers"}
ATTENTION = {"gpt2": "attn", "gpt_neox": "attention"}
OUTPUT = {"gpt2": "c_proj", "opt": "out_proj", "gpt_neox": "dense"}


def build(name: str, seed: int = 0, *, attention: str = "sdpa", **changes):
    """A model in evaluation mode whose attention is far from uniform and whose biases and norms are not trivial."""
    kind, options = CONFIGS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**{**options, **changes}), attn_implementation=attention)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


def attention_by_hand(model, name: str, layer: int):
    """One attention module, found by the path written down above."""
    return model.get_submodule(f"{LAYERS.get(name, 'model.layers')}.{layer}.{ATTENTION.get(name, 'self_attn')}")


def zero_by_hand(model, name: str, closed) -> None:
    """Zero what the output projections read from these heads, sliced by hand."""
    dim = 16 if name == "qwen3" else 8
    with torch.no_grad():
        for layer, head in closed:
            weight = getattr(attention_by_hand(model, name, layer), OUTPUT.get(name, "o_proj")).weight
            if name == "gpt2":  # Conv1D: (in, out)
                weight[head * dim : (head + 1) * dim, :] = 0
            else:
                weight[:, head * dim : (head + 1) * dim] = 0


def ids(rows: int = 2, length: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def text_rows(lengths=(16, 16, 16, 11), seed: int = 0) -> list[dict]:
    """Rows of these lengths, every token labelled."""
    table = ids(len(lengths), max(lengths), seed)
    return [{"input_ids": row[:length], "labels": row[:length]} for row, length in zip(table, lengths, strict=True)]
