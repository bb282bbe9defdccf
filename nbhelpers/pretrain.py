"""How are the bundled models made?

`python -m nbhelpers.pretrain [NAMES]` (what `make models` calls) trains each on generated text: first a byte-level BPE
tokenizer, then a real transformers class from scratch, AdamW on the causal language-model loss of packed windows. It
writes assets/models/<name>/ and that model's entry in assets/manifest.json, with the measurements of what it wrote.
Minutes a model on two CPU cores. Seeded: the same machine and versions give the same files.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nbhelpers import generated, pretrain_measure, records, runtime
from nbhelpers.architecture import attention_modules
from nbhelpers.data import IGNORED
from nbhelpers.registry import unknown

ASSETS = Path(__file__).parent / "assets"
VOCABULARY = 1024
TOKENIZER_DOCUMENTS = 10_000
HELD_OUT_DOCUMENTS = 600
PRUNING_WINDOWS = 16
log = logging.getLogger("nbhelpers.pretrain")


@dataclass(frozen=True)
class Recipe:
    """How one bundled model is made. `sizes` go to the config class as they are; `special`: bos, eos, pad."""

    model_type: str
    sizes: dict[str, Any]
    special: tuple[str, str, str]
    steps: int = 1700
    batch: int = 16  # windows a step
    window: int = 128  # tokens; the last `long_share` of all steps read windows of `context` tokens instead
    long_share: float = 0.15
    context: int = 512  # positions of the model
    copying_periods: tuple[int, int] = (4, 2)  # the window divided by these, in turn, is after how much it repeats
    copying_steps: int = 400  # first steps, in which half of each batch is a random sequence that repeats itself
    learning_rate: float = 3e-3
    seed: int = 0
    documents: int = 60_000


_TINY = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 6}
# learned positions: every one is read in every step; copying takes longer to learn than with rotary ones
_LEARNED_POSITIONS = {"context": 256, "window": 256, "batch": 8, "long_share": 0.0}
_LEARNED_POSITIONS |= {"copying_periods": (8, 4), "copying_steps": 900, "steps": 2200}
_ENDOFTEXT = ("<|endoftext|>", "<|endoftext|>", "<|padding|>")
_LLAMA = ("<s>", "</s>", "<pad>")

RECIPES = {
    "tiny-gpt2": Recipe(
        "gpt2",
        {"n_embd": 96, "n_layer": 4, "n_head": 6, "n_inner": 192, "n_positions": 256, "initializer_range": 0.08}
        | {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        _ENDOFTEXT,
        **_LEARNED_POSITIONS,
    ),
    "tiny-opt": Recipe(
        "opt",
        _TINY
        | {"ffn_dim": 192, "word_embed_proj_dim": 96, "max_position_embeddings": 256, "dropout": 0.0, "init_std": 0.08},
        ("</s>", "</s>", "<pad>"),
        **_LEARNED_POSITIONS,
    ),
    "tiny-pythia": Recipe(
        "gpt_neox",
        _TINY
        | {"intermediate_size": 160, "max_position_embeddings": 512, "tie_word_embeddings": False}
        | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        _ENDOFTEXT,
    ),
    "tiny-llama": Recipe(
        "llama",
        _TINY
        | {"num_key_value_heads": 3, "head_dim": 16, "intermediate_size": 192}
        | {"max_position_embeddings": 512, "tie_word_embeddings": True},
        _LLAMA,
    ),
    "small-llama": Recipe(
        "llama",
        {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16}
        | {"intermediate_size": 384, "max_position_embeddings": 512, "tie_word_embeddings": True},
        _LLAMA,
        steps=2200,
        learning_rate=2.5e-3,
    ),
}


def train_tokenizer(
    texts: Sequence[str], special: tuple[str, str, str], vocabulary: int = VOCABULARY, context: int = 512
):
    """A byte-level BPE tokenizer that begins each text with BOS. `special`: bos, eos, pad; equal is one."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    bos, eos, pad = special
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(dict.fromkeys(special)),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def build_model(recipe: Recipe, tokenizer) -> nn.Module:
    """The untrained model of a recipe, float32, with generation settings that stop at the end of a document."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    runtime.set_seed(recipe.seed)
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = AutoConfig.for_model(recipe.model_type, vocab_size=len(tokenizer), **tokens, **recipe.sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    begin_with_a_look_back(model)
    # In the training text a document ends where the BOS of the next begins, so generation stops at either.
    ends = sorted({tokenizer.eos_token_id, tokenizer.bos_token_id})
    tokens["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    model.generation_config = GenerationConfig(**tokens)
    return model


@torch.no_grad()
def begin_with_a_look_back(model: nn.Module, amplitude: float = 0.1, sharpness: float = 1.5) -> None:
    """Give models with learned positions (gpt2, opt) a start from which copying is learned in minutes.

    Their position embeddings begin as a few sines and cosines (Vaswani et al. 2017) in dimensions that the tokens leave
    free, and the first head's query and key read those, the query turned back by one: it begins by looking at the token
    before. All of it is trained like the rest. Rotary models need none of this and are left as they are.
    """
    tables = [module for name, module in model.named_modules() if name.rsplit(".", 1)[-1] in ("wpe", "embed_positions")]
    if not tables:
        return
    positions, width = tables[0].weight.shape
    size = width // model.config.num_attention_heads
    frequencies = 10_000 ** -(torch.arange(0, size, 2) / width)
    angles = torch.arange(positions)[:, None] * frequencies
    tables[0].weight.zero_()
    tables[0].weight[:, :size] = amplitude * torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)
    model.get_input_embeddings().weight[:, :size] = 0
    turns = [torch.tensor([[f.cos(), -f.sin()], [f.sin(), f.cos()]]) for f in frequencies]
    first = attention_modules(model)[0]
    if model.config.model_type == "gpt2":
        query, key = first.c_attn.weight.T[:size], first.c_attn.weight.T[width : width + size]
    else:
        query, key = first.q_proj.weight[:size], first.k_proj.weight[:size]
    for rows, reads in ((query, torch.block_diag(*turns)), (key, torch.eye(size))):
        rows.zero_()
        rows[:, :size] = sharpness * reads


def learning_rate_at(step: int, recipe: Recipe) -> float:
    """Linear warm-up over 100 steps (a tenth of a short run), then half a cosine down to a twentieth."""
    warm_up = min(100, max(1, recipe.steps // 10))
    done = step / recipe.steps
    return recipe.learning_rate * min(1.0, (step + 1) / warm_up) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done)))


def batches(stream: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """The stream read once from its beginning, in batches (windows, length). ValueError where it is too short."""
    long_from, size, start = round(recipe.steps * (1 - recipe.long_share)), recipe.batch * recipe.window, 0
    if recipe.steps * size > len(stream):
        raise ValueError(f"training needs {recipe.steps * size} tokens, the text has {len(stream)}; raise documents")
    for step in range(recipe.steps):
        yield stream[start : start + size].view(-1, recipe.window if step < long_from else recipe.context)
        start += size


def train(
    model: nn.Module, stream: torch.Tensor, recipe: Recipe, progress: Callable[[dict], None] | None = None
) -> None:
    """AdamW on the mean loss of each batch, gradients clipped at norm 1; decay on matrices only. In place."""
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
    vocabulary, generator = stream.unique(), torch.Generator().manual_seed(recipe.seed)
    model.train()
    for step, rows in enumerate(batches(stream, recipe)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, recipe)
        labels = rows
        if step < recipe.copying_steps:
            rows, labels = with_repetitions(rows, vocabulary, recipe.copying_periods[step % 2], generator)
        logits = model(rows, use_cache=False).logits[:, :-1]
        losses = cross_entropy(logits.transpose(1, 2), labels[:, 1:], reduction="none", ignore_index=IGNORED)
        loss = losses.sum() / (labels[:, 1:] != IGNORED).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if progress and (step % 100 == 0 or step == recipe.steps - 1):
            text = losses[: len(rows) // 2].mean().item()
            progress({"step": step + 1, "steps": recipe.steps, "train_loss": loss.item(), "text_loss": text})
    model.eval()


def with_repetitions(
    rows: torch.Tensor, vocabulary: torch.Tensor, repeats: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, labels) with the second half of the rows replaced by random sequences that repeat themselves.

    Only what repeats is scored. Such rows can be predicted by copying alone, and heads that copy, which the text needs
    most, form on them within a few hundred steps.
    """
    kept, length = len(rows) // 2, rows.shape[1]
    period = length // repeats
    picks = torch.randint(len(vocabulary), (len(rows) - kept, period), generator=generator)
    rows = torch.cat([rows[:kept], vocabulary[picks].repeat(1, length // period)])
    labels = rows.clone()
    labels[kept:, :period] = IGNORED
    return rows, labels


def measure(folder: Path) -> dict:
    """Everything the manifest says about how good the saved model is, measured on what was saved."""
    model, tokenizer = load(folder)
    context = model.config.max_position_embeddings
    held_out = generated.documents_with_nats(HELD_OUT_DOCUMENTS, generated.HELD_OUT_SEED)
    rows = pretrain_measure.windows(pretrain_measure.token_stream(tokenizer, [d.text for d in held_out]), context)
    nll = pretrain_measure.window_loss(model, rows)
    return {
        "held_out": {
            "seed": generated.HELD_OUT_SEED,
            "documents": len(held_out),
            "text_sha256": text_sha256([document.text for document in held_out]),
            "window": context,
            "windows": rows.shape[0],
            "tokens": rows.shape[0] * (rows.shape[1] - 1),
            "nll": nll,
            "perplexity": math.exp(nll),
        },
        "against_entropy": pretrain_measure.document_loss(model, tokenizer, held_out),
        "pruning": pretrain_measure.worth_pruning(model, rows[:PRUNING_WINDOWS]),
    }


def load(folder: Path) -> tuple[nn.Module, Any]:
    """(model, tokenizer) by plain transformers, float32, evaluation mode."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def text_sha256(texts: Sequence[str]) -> str:
    """sha256 of the texts with a zero character between them."""
    return records.sha256_text("\0".join(texts))


def make(name: str, assets: Path = ASSETS, progress: Callable[[dict], None] | None = None) -> dict:
    """Train, save and measure one bundled model; returns the entry that it writes into the manifest."""
    if name not in RECIPES:
        raise LookupError(unknown("bundled model", name, RECIPES))
    recipe, started = RECIPES[name], time.monotonic()
    texts = generated.documents(recipe.documents, generated.MODEL_SEED)
    tokenizer = train_tokenizer(texts[:TOKENIZER_DOCUMENTS], recipe.special, context=recipe.context)
    model = build_model(recipe, tokenizer)
    train(model, pretrain_measure.token_stream(tokenizer, texts), recipe, progress)
    seconds = time.monotonic() - started
    folder = assets / "models" / name
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    entry = {
        "recipe": asdict(recipe),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "training": {
            "seed": generated.MODEL_SEED,
            "documents": recipe.documents,
            "text_sha256": text_sha256(texts),
            "steps": recipe.steps,
            "tokens": recipe.steps * recipe.batch * recipe.window,
            "seconds": seconds,
        },
        **measure(folder),
        "files": {path.name: records.sha256_file(path) for path in sorted(folder.iterdir())},
    }
    path = assets / "manifest.json"
    manifest = records.read_json(path) if path.exists() else {"format": 1, "models": {}}
    manifest["models"] = dict(sorted({**manifest["models"], name: entry}.items()))
    records.write_json(path, manifest)
    return entry


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: names of bundled models, all of them without any."""
    parser = argparse.ArgumentParser(prog="python -m nbhelpers.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of: {', '.join(RECIPES)} (default: all)")
    names = parser.parse_args(arguments).names or list(RECIPES)
    for name in names:
        if name not in RECIPES:
            parser.error(unknown("bundled model", name, RECIPES))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    for name in names:
        entry = make(name, progress=lambda row, name=name: log.info("%s %s", name, row))
        gap, ratio = entry["against_entropy"]["gap"], entry["pruning"]["half_closed_mean_ratio"]
        log.info("%s done: gap %.4f nats/token, half of the heads closed: perplexity x %.2f", name, gap, ratio)


if __name__ == "__main__":
    main()
