"""Small random models and tokenizers in folders, made once a session: for tests of everything but what training learnt.

Use it with `pytest_plugins = ["model_fixtures"]` in a test module. No assert stands here: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nbhelpers import generated

POSITIONS = 64
VOCABULARY = 300
TEXTS = generated.documents(40, seed=77_000)


def make_tokenizer(*, bos: bool, pad: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of VOCABULARY tokens. Id 0 is an ordinary token of the text, the end token comes last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - 2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(["<s>", "</s>"])
    if bos:
        start = tokenizer.token_to_id("<s>")
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", start)])
    special = {"pad_token": "</s>"} if pad else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", **special)


def make_model(kind: str) -> torch.nn.Module:
    """Two layers of four heads, hidden 32, with weights large enough that every head and token matters."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        ends = {"bos_token_id": VOCABULARY - 2, "eos_token_id": VOCABULARY - 1}
        if kind == "gpt2":
            config = GPT2Config(
                vocab_size=VOCABULARY,
                n_positions=POSITIONS,
                n_embd=32,
                n_layer=2,
                n_head=4,
                initializer_range=0.2,
                **ends,
            )
            return GPT2LMHeadModel(config).eval()
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=POSITIONS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,
            **ends,
        )
        return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, Path]:
    """gpt2: no BOS, no pad token; llama: a BOS before each text, grouped-query attention."""
    root = tmp_path_factory.mktemp("models")
    for kind in ("gpt2", "llama"):
        make_model(kind).save_pretrained(root / kind)
        make_tokenizer(bos=kind == "llama").save_pretrained(root / kind)
    return {kind: root / kind for kind in ("gpt2", "llama")}


@pytest.fixture(scope="session")
def text_file(tmp_path_factory) -> Path:
    """Forty generated documents, a row each."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    return path
