"""What does it cost that LoRA respects a mask: time and memory of one layer's training step?

    python benchmarks/sparse_lora.py [--quick] [--out benchmarks/results] [--readme README.md]

Three ways to a linear layer with adapters of rank 16, forward and backward: plain LoRA of peft (no mask), the textbook
masked product (the delta made whole, masked, added to the weight, kept by autograd), and ours (by blocks, formed anew
in the backward pass). Speed: one process a cell, the three in turn, several rounds; the gradients of the very same
steps are compared. Memory: one process a measurement, all that the layer and its step need beyond the libraries.
Writes sparse_lora.json and sparse_lora.md; --quick runs everything on a tiny layer and writes nothing unless --out is
given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import _measuring
from _measuring import RESULTS, device, machine, publish, ratios, target, target_line

RANK, ALPHA, KEPT, SEED = 16, 32.0, 0.5, 0
SHAPES, TOKENS = ((1024, 1024), (4096, 11008)), (64, 256, 1024, 2048)  # (inputs, outputs); tokens of a step
ROUNDS, SECONDS = 5, 1.5  # of a cell; steps of a round fill about so many seconds over the three
MEMORY_ROUNDS, MEMORY_STEPS = 2, 2
SLOWER, MORE_MEMORY, SAME = 2.2, 1.3, 1e-4  # what was promised, at the most tokens; the gradients' relative difference
PLAIN, TEXTBOOK, OURS = "plain LoRA (peft)", "textbook masked", "nbhelpers"
COMMAND = "python benchmarks/sparse_lora.py --readme README.md"
MARK = "<!-- sparse_lora: made by benchmarks/sparse_lora.py -->"
child = partial(_measuring.child, __file__)


def now() -> float:
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# The three ways -------------------------------------------------------------------------------------------------------


def layer(inputs: int, outputs: int) -> Any:
    """peft's LoRA layer around a frozen one, half of whose weights are zero, with adapters that are not."""
    import torch
    from peft import LoraConfig
    from peft.tuners.lora.layer import Linear

    torch.manual_seed(SEED)
    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    base = torch.nn.Linear(inputs, outputs, device=device(), dtype=kind).requires_grad_(False)
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA)
    adapted = Linear(base, "default", config=settings, r=RANK, lora_alpha=ALPHA).float()
    base.to(kind)
    torch.nn.init.normal_(adapted.lora_B["default"].weight, std=0.02)
    return adapted


def masked(adapted: Any) -> Any:
    """(outputs, inputs) bool, drawn from the seed; the weight's masked numbers become zero."""
    import torch

    weight = adapted.base_layer.weight
    drawn = torch.Generator(weight.device).manual_seed(SEED)
    kept = torch.rand(weight.shape, generator=drawn, device=weight.device) < KEPT
    weight.data.masked_fill_(~kept, 0)
    return kept


def plain(inputs: int, outputs: int) -> tuple[Callable, Any]:
    adapted = layer(inputs, outputs)
    masked(adapted)
    return adapted, adapted


def textbook(inputs: int, outputs: int) -> tuple[Callable, Any]:
    """x (W + scaling (B A) * M) + b in plain autograd. M is in the weight's format: bool would be slower."""
    from torch.nn.functional import linear

    adapted = layer(inputs, outputs)
    mask = masked(adapted).to(adapted.base_layer.weight.dtype)
    base, down, up = adapted.base_layer, adapted.lora_A["default"].weight, adapted.lora_B["default"].weight

    def forward(x: Any) -> Any:
        delta = adapted.scaling["default"] * (up @ down) * mask
        return linear(x, (base.weight + delta).to(x.dtype), base.bias)

    return forward, adapted


def ours(inputs: int, outputs: int) -> tuple[Callable, Any]:
    from nbhelpers import masked_adapters
    from nbhelpers.masked_linear import pack

    adapted = layer(inputs, outputs)
    masked_adapters.attach(adapted, pack(masked(adapted)))
    return adapted, adapted


WAYS = {PLAIN: plain, TEXTBOOK: textbook, OURS: ours}


def data(inputs: int, outputs: int, tokens: int) -> tuple[Any, Any]:
    """What enters the layer, whose gradient is needed too, and the gradient that comes back to it."""
    import torch

    torch.manual_seed(SEED + 1)
    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    x = torch.randn(tokens, inputs, device=device(), dtype=kind).requires_grad_()
    return x, torch.randn(tokens, outputs, device=device(), dtype=kind)


def step(forward: Callable, adapted: Any, x: Any, slope: Any) -> list:
    """One step; the gradients that it leaves."""
    factors = [adapted.lora_A["default"].weight, adapted.lora_B["default"].weight]
    for tensor in (x, *factors):
        tensor.grad = None
    forward(x).backward(slope)
    return [x.grad, *(factor.grad for factor in factors)]


# Measuring: each of these in a process of its own ---------------------------------------------------------------------


def speed(inputs: int, outputs: int, tokens: int, rounds: int = ROUNDS, seconds: float = SECONDS) -> dict:
    """Seconds of a step of each way: in every round the median of its steps, the ways in turn."""
    x, slope = data(inputs, outputs, tokens)
    made = {name: build(inputs, outputs) for name, build in WAYS.items()}
    left = {name: [one.clone() for one in step(*way, x, slope)] for name, way in made.items()}
    begin = now()
    for way in made.values():
        step(*way, x, slope)
    steps = max(1, int(seconds / (now() - begin)))
    found: dict[str, list[float]] = {name: [] for name in made}
    for number in range(rounds):
        taken: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(steps):
            for name in made if number % 2 == 0 else [*made][::-1]:
                begin = now()
                step(*made[name], x, slope)
                taken[name].append(now() - begin)
        for name, values in taken.items():
            found[name].append(statistics.median(values))
    apart = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(left[OURS], left[TEXTBOOK], strict=True)]
    return {
        "inputs": inputs,
        "outputs": outputs,
        "tokens": tokens,
        "rounds": found,
        "steps_a_round": steps,
        "gradients_differ": max(apart),
    }


def peak_memory(inputs: int, outputs: int, tokens: int, name: str) -> dict:
    """Bytes that the layer, its adapters and some steps need at most, libraries loaded before."""
    from nbhelpers import memory

    step(*WAYS[name](64, 64), *data(64, 64, 8))
    memory.release()
    with memory.peak(interval_seconds=0.002) as mark:
        way, taken = WAYS[name](inputs, outputs), data(inputs, outputs, tokens)
        memory.release()
    built = {"resident": mark.resident_after, "cuda": mark.cuda_after}
    before = {"resident": mark.resident_before, "cuda": mark.cuda_before}
    with memory.peak(interval_seconds=0.002) as mark:
        for _ in range(MEMORY_STEPS):
            step(*way, *taken)
    where = "cuda" if device() == "cuda" else "resident"
    peak = mark.cuda_peak if where == "cuda" else mark.resident_peak
    return {"before": before[where], "built": built[where], "peak": peak}


def run_child(job: list) -> dict:
    what, *rest = job
    return {"speed": speed, "memory": peak_memory}[what](*rest)


def measure(quick: bool) -> dict:
    """All cells; what `summarise` takes."""
    shapes, tokens = (((64, 96),), (8, 32)) if quick else (SHAPES, TOKENS)
    sizes = (1, 0.01) if quick else (ROUNDS, SECONDS)
    cells, memories = [], []
    for shape in shapes:
        for count in tokens:
            cells.append(child("speed", *shape, count, *sizes))
            taken = {name: [] for name in WAYS}
            for _ in range(1 if quick else MEMORY_ROUNDS):
                for name, found in taken.items():
                    found.append(child("memory", *shape, count, name))
            memories.append({"inputs": shape[0], "outputs": shape[1], "tokens": count, "rounds": taken})
    return {"cells": cells, "memory": memories}


# What it comes to -----------------------------------------------------------------------------------------------------


def summarise(found: dict) -> dict:
    """Medians, the ratio of each round to plain LoRA, and whether each promise was kept."""
    cells = []
    for cell in found["cells"]:
        rounds = cell["rounds"]
        more = {"seconds": {name: statistics.median(values) for name, values in rounds.items()}}
        more["ratio"] = {name: ratios(values, rounds[PLAIN]) for name, values in rounds.items()}
        cells.append(cell | more)
    memories = []
    for row in found["memory"]:
        needed = {name: [one["peak"] - one["before"] for one in taken] for name, taken in row["rounds"].items()}
        more = {"bytes": {name: statistics.median(values) for name, values in needed.items()}}
        more["ratio"] = {name: ratios(values, needed[PLAIN]) for name, values in needed.items()}
        memories.append(row | more)
    return found | {"cells": cells, "memory": memories, "targets": targets(cells, memories)}


def targets(cells: list[dict], memories: list[dict]) -> list[dict]:
    most = max(cell["tokens"] for cell in cells)

    def worst(rows: list[dict]) -> float:
        return max(row["ratio"][OURS]["median"] for row in rows if row["tokens"] == most)

    return [
        target(f"time of a step at {most} tokens, greatest ratio to plain LoRA", "<=", SLOWER, worst(cells)),
        target(f"memory at {most} tokens, greatest ratio to plain LoRA", "<=", MORE_MEMORY, worst(memories)),
        target(
            "gradients beside the textbook's, greatest relative difference",
            "<=",
            SAME if device() == "cpu" else 0.05,
            max(cell["gradients_differ"] for cell in cells),
        ),
    ]


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine = found["machine"]
    intro = (
        f"One linear layer with LoRA of rank {RANK}, {KEPT:.0%} of its weights kept by the mask, forward and backward, "
        f"on {machine['processor']}, {machine['device']}, threads: {machine['threads']}, {machine['precision']}, torch "
        f"{machine['torch']}, peft {machine['peft']}. Milliseconds a step: medians of {found['rounds']} rounds, the "
        "three in turn; in brackets the ratio to plain LoRA, the median of the rounds' ratios with the least and the "
        "greatest. Memory: the most that layer and step need beyond the libraries. A masked delta needs three products "
        f"of full size where plain LoRA needs two: 1.5 is the floor. Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/sparse_lora.json](benchmarks/results/sparse_lora.json)."
    )
    heads = f"| layer | tokens | {PLAIN} | {TEXTBOOK} | {OURS} |"
    lines = [
        intro,
        "",
        heads,
        "|---|---|---|---|---|",
        *(speed_line(cell) for cell in found["cells"]),
        "",
        "Memory in MB, with the ratio to plain LoRA:",
        "",
        heads,
        "|---|---|---|---|---|",
        *(memory_line(row) for row in found["memory"]),
        "",
        *(target_line(one) for one in found["targets"]),
        "",
        "Training with a mask is never faster than without one: zeros are multiplied like other numbers.",
    ]
    return "\n".join(lines) + "\n"


def speed_line(cell: dict) -> str:
    def of(name: str) -> str:
        ratio = cell["ratio"][name]
        return f"{1e3 * cell['seconds'][name]:,.1f} ({ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}])"

    only = f"{1e3 * cell['seconds'][PLAIN]:,.1f}"
    return f"| {cell['inputs']} x {cell['outputs']} | {cell['tokens']} | {only} | {of(TEXTBOOK)} | {of(OURS)} |"


def memory_line(row: dict) -> str:
    def of(name: str) -> str:
        return f"{row['bytes'][name] / 1e6:,.0f} ({row['ratio'][name]['median']:.2f})"

    only = f"{row['bytes'][PLAIN] / 1e6:,.0f}"
    return f"| {row['inputs']} x {row['outputs']} | {row['tokens']} | {only} | {of(TEXTBOOK)} | {of(OURS)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny layer, one round: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return

    precision = "float32" if device() == "cpu" else "bfloat16 with float32 adapters"
    about = {"machine": machine("peft", precision=precision), "rounds": 1 if options.quick else ROUNDS}
    found = summarise(measure(options.quick) | about)
    found["machine"]["load_after"] = os.getloadavg()
    text = markdown(found)
    out = options.out or (None if options.quick else RESULTS)
    publish("sparse_lora", found, text, out, options.readme, MARK)


if __name__ == "__main__":
    main()
