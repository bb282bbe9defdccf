"""What does it give to take closed attention heads out of a model: parameters, bytes, tokens a second?

    python benchmarks/removal.py [--model MODEL] [--text TEXT] [--out benchmarks/results] [--readme README.md]

Two models, half of the heads of each: stories260K, really pruned in whole KV groups (so small that fixed costs decide
its speed), and a model of the shape of GPT-2 small with random weights, for the speed alone. Before (heads closed by
gates) and after (heads gone) are measured in turn in one process. Writes removal.json and removal.md; --readme puts the
same text between the marks in that file.
"""

from __future__ import annotations

import argparse
import os
import statistics
from pathlib import Path

from _measuring import RESULTS, processor, publish

LEVEL, SEED = 0.5, 0
WINDOW, BATCH = 256, 4
ROUNDS, PASSES = 5, 5  # speed is measured this often, each time the median of so many passes
COMMAND = "python benchmarks/removal.py --readme README.md"
MARK = "<!-- removal: made by benchmarks/removal.py -->"


def stories(model: str, text: str) -> dict:
    """The real model: half of its KV groups closed by gradient on its own text, then removed."""
    from nbhelpers import data, heads, models
    from nbhelpers.stages import sample_rows

    loaded, corpus = models.load_model(model, device="cpu", dtype="float32"), data.load_corpus(text)
    train, test = (data.rows(loaded.tokenizer, getattr(corpus, part), WINDOW) for part in ("train", "test"))
    heads.prune(loaded.model, sample_rows(train, 16, SEED), "gradient", LEVEL, kv_groups=True, seed=SEED)
    return measure(loaded.model, test[:BATCH], "stories260K", weights="trained", chosen="whole KV groups, by gradient")


def gpt2_shape() -> dict:
    """Random weights in the shape of GPT-2 small, half of the heads closed at random."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from nbhelpers import attention, heads, runtime

    with runtime.seeded(SEED):
        model = GPT2LMHeadModel(GPT2Config()).eval()
        ids = torch.randint(0, model.config.vocab_size, (BATCH, WINDOW))
    attention.install(model)
    heads.prune(model, [], "random", LEVEL, seed=SEED)
    rows = [{"input_ids": row, "labels": row} for row in ids]
    return measure(model, rows, "shape of GPT-2 small", weights="random", chosen="heads, at random")


def measure(model, rows: list[dict], name: str, **about: str) -> dict:
    """Before and after of one gated model, with the checked fact that both compute the same."""
    from nbhelpers import attention, compact, evaluate, facts, models

    narrow = compact.remove_heads(model)
    fact = facts.removal_changed_nothing(model, narrow, rows[:2])
    rounds = [evaluate.tokens_per_second([model, narrow], rows, passes=PASSES) for _ in range(ROUNDS)]
    return {
        "model": name,
        **about,
        "heads_removed": len(attention.closed_heads(model)),
        "heads": sum(compact.removal(narrow).heads for _ in compact.removal(narrow).kept),
        "loads_with": compact.removal(narrow).loads_with,
        "parameters": [models.parameters(model), models.parameters(narrow)],
        "bytes": [models.weight_bytes(model), models.weight_bytes(narrow)],
        "rounds": rounds,
        "fact": fact.as_dict(),
    }


def summarise(row: dict) -> dict:
    """Medians over the rounds, and the ratio of each round with its least and greatest."""
    before, after = zip(*row["rounds"], strict=True)
    ratios = [new / old for old, new in row["rounds"]]
    return row | {
        "tokens_per_second": [statistics.median(before), statistics.median(after)],
        "speed_ratio": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine = found["machine"]
    intro = (
        f"Half of the heads taken out, on {machine['processor']}, threads: {machine['threads']}, float32, {BATCH} "
        f"windows of {WINDOW} tokens a pass. Speed: medians of {ROUNDS} rounds of {PASSES} passes, gated and compact "
        "model in turn; the ratio is the median of the rounds' ratios, with the least and the greatest. Made by "
        f"`{COMMAND}`; all numbers are in [benchmarks/results/removal.json](benchmarks/results/removal.json)."
    )
    lines = [
        intro,
        "",
        "| model | | heads closed | heads removed | removed / closed |",
        "|---|---|---|---|---|",
    ]
    for row in found["models"]:
        name = f"{row['model']}, {row['weights']} weights ({row['heads_removed']} of {row['heads']} heads)"
        ratio = row["speed_ratio"]
        for what, cell, label in (("parameters", name + " ", "parameters"), ("bytes", "", "bytes of weights")):
            old, new = row[what]
            lines.append(f"| {cell}| {label} | {old:,} | {new:,} | {new / old:.3f} |")
        old, new = row["tokens_per_second"]
        span = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        lines.append(f"| | tokens a second | {old:,.0f} | {new:,.0f} | {span} |")
    facts = "; ".join(
        f"{row['model']}: {'OK' if row['fact']['ok'] else 'FAILED'}, {row['fact']['saw']}" for row in found["models"]
    )
    lines += ["", f"Checked while it ran, that both compute the same: {facts}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("NBHELPERS_TEST_DATA", "data"))
    parser.add_argument("--model", default=str(data / "models" / "stories260K-hf"))
    parser.add_argument("--text", default=str(data / "tinystories.jsonl"))
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--readme")
    options = parser.parse_args()

    import torch
    import transformers

    found = {
        "models": [summarise(row) for row in (stories(options.model, options.text), gpt2_shape())],
        "level": LEVEL,
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    publish("removal", found, markdown(found), options.out, options.readme, MARK)


if __name__ == "__main__":
    main()
