"""Does a 7B shape score within 24 GB? Peak memory and seconds of one group's gradients, for real, in bfloat16.

    python benchmarks/importance.py [--quick] [--layers 32] [--tokens 512] [--out DIR] [--readme README.md]

The shape of Llama-2-7B with random weights (only shapes count), Taylor scores from one row of tokens: the weights, a
group's accumulators, one gradient and the activations are in memory at once, on a GPU or, as here, all in RAM. Scores
are made group by group and each group needs the same, so the first one is measured and the number of groups is told.
Writes importance.json and importance.md; --quick runs a tiny shape and writes nothing unless --out is given. Where the
model does not fit, it says so and measures nothing.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from _measuring import RESULTS, machine, publish, target, target_line

SEED, WANTED_GIGABYTES = 0, 24
LLAMA_2_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32_000,
}
TINY = {name: value // 32 for name, value in LLAMA_2_7B.items()} | {"num_hidden_layers": 2, "vocab_size": 1000}
COMMAND = "python benchmarks/importance.py --readme README.md"
MARK = "<!-- importance: made by benchmarks/importance.py -->"


def model_of(shape: dict[str, int]) -> Any:
    """Random bfloat16 weights of a Llama's shape, made without a float32 copy."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape)).to(torch.bfloat16)
    rotary = model.model.rotary_emb
    model.to_empty(device="cpu")
    model.model.rotary_emb = type(rotary)(model.config)
    torch.manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0) if "norm" in name else parameter.normal_(0, 0.02)
    return model.eval()


def measure(shape: dict[str, int], tokens: int) -> dict[str, Any]:
    """Of the first group of projections: bytes of each part, peak memory above the loaded model, seconds."""
    import torch

    from nbhelpers import importance, memory
    from nbhelpers.layer_inputs import groups
    from nbhelpers.projections import projections

    before = memory.resident_bytes()
    model = model_of(shape)
    covered = projections(model).covered
    parts = groups(covered, lambda one: 4 * one.numbers, importance.ACCUMULATOR_BYTES)
    ids = torch.randint(0, shape["vocab_size"], (tokens,), generator=torch.Generator().manual_seed(SEED))
    rows = [{"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}]
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    with memory.peak() as mark:
        began = time.perf_counter()
        found = importance.scores(model, "taylor", rows)
        first = [next(found)[1] for _ in parts[0]]
        seconds = time.perf_counter() - began
        found.close()
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "covered": sum(one.numbers for one in covered),
        "weights_bytes": weights,
        "accumulator_bytes": 4 * sum(one.numbers for one in parts[0]),
        "groups": len(parts),
        "scored": sum(int(one.isfinite().sum()) for one in first),
        "tokens": tokens,
        "seconds": seconds,
        "peak_bytes": mark.resident_peak,
        "libraries_bytes": before,
        "grown_bytes": mark.resident_peak - mark.resident_before,
    }


def no_room(shape: dict[str, int]) -> str | None:
    """Why the shape cannot be tried here."""
    from nbhelpers import memory

    layer = 4 * shape["hidden_size"] ** 2 + 3 * shape["hidden_size"] * shape["intermediate_size"]
    numbers = shape["num_hidden_layers"] * layer + 2 * shape["vocab_size"] * shape["hidden_size"]
    wanted, free = 2 * numbers + 9e9, memory.free()["ram_free"]
    return (
        None if wanted < free or shape == TINY else f"it wants about {wanted / 1e9:.0f} GB, {free / 1e9:.0f} are free"
    )


def markdown(found: dict[str, Any]) -> str:
    """The README's section, every number from `found`."""
    one, here = found["measured"], found["machine"]
    giga = {name: one[f"{name}_bytes"] / 1e9 for name in ("weights", "accumulator", "peak", "libraries", "grown")}
    return (
        f"Taylor scores of {found['layers']} layers of Llama-2-7B's shape ({one['parameters'] / 1e9:.2f} B random "
        f"bfloat16 weights) from one row of {one['tokens']} tokens, on {here['processor']}, {here['device']}, "
        f"threads: {here['threads']}, torch {here['torch']}. Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/importance.json](benchmarks/results/importance.json).\n\n"
        f"Peak memory of the whole process {giga['peak']:.1f} GB: {giga['weights']:.1f} of weights, "
        f"{giga['accumulator']:.1f} of float32 accumulators (in RAM also where the model is on a GPU), "
        f"{giga['libraries']:.1f} of libraries, the rest activations and one gradient. The first of {one['groups']} "
        f"groups of projections ({one['scored'] / 1e9:.2f} B of {one['covered'] / 1e9:.2f} B scores) took "
        f"{one['seconds']:.0f} s; each of the others reads the rows again and needs the same.\n\n"
        + "\n".join(target_line(promise, seen=".1f") for promise in found["targets"])
        + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny shape: does it run?")
    parser.add_argument("--layers", type=int, default=LLAMA_2_7B["num_hidden_layers"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    shape = TINY if options.quick else LLAMA_2_7B | {"num_hidden_layers": options.layers}
    if why := no_room(shape):
        print(f"{options.layers} layers of Llama-2-7B's shape are not measured here: {why}; try fewer --layers")
        return
    here = machine("transformers")
    measured = measure(shape, options.tokens)
    promised = target("peak memory of scoring a 7B shape in GB", "<=", WANTED_GIGABYTES, measured["peak_bytes"] / 1e9)
    found = {"machine": here, "layers": shape["num_hidden_layers"], "measured": measured, "targets": [promised]}
    out = options.out or (None if options.quick else RESULTS)
    publish("importance", found, markdown(found), out, options.readme, MARK)


if __name__ == "__main__":
    main()
