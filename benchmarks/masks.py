"""What do exact nested masks cost beside torch's pruning, NumPy's partition, Wanda's sort, and one read of the weights?

    python benchmarks/masks.py [--quick] [--rounds 3] [--out benchmarks/results] [--readme README.md]
    pip install --no-deps llmcompressor==0.14.0.1 compressed-tensors==0.19.0 loguru==0.7.3    # before it: one more peer

Ten global levels of the 48 projections of a GPT-2-124M shape (random weights: only shapes count), packed in memory, no
files. Speed: all sides in turn in one process, several rounds, wall clock and processor seconds. Memory: one process a
side. Growth: bfloat16 weights streamed from a safetensors file, one process a size. Writes masks.json and masks.md;
--quick runs everything on tiny shapes and writes nothing unless --out is given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import _measuring
from _measuring import RESULTS, machine, publish, ratios, target, target_line

SEED, ROUNDS = 0, 3
LEVELS = [round(0.05 + 0.1 * step, 2) for step in range(10)]  # 0.05 to 0.95
ONE_LEVEL = 0.5
WANTED_SPEED, WANTED_MEMORY, WANTED_READS = 100, 0.25, 5
OURS, PRUNE, READ = "nbhelpers", "torch.nn.utils.prune", "one read of the weights"
PARTITION, PARTITIONS = "np.partition per level", "np.partition, all levels in one call"
ROWS, WANDA, COMPRESSOR = "nbhelpers, by rows", "Wanda's sort, by rows", "llm-compressor's Wanda, by rows"
SIDES, SINGLE = (READ, OURS, PARTITIONS, PARTITION, PRUNE), (OURS, ROWS, WANDA, COMPRESSOR)
SIZES = (10_000_000, 30_000_000, 100_000_000, 300_000_000, 1_000_000_000)
WIDE = (4096, 2048)  # a matrix of the growing models
COMMAND = "python benchmarks/masks.py --readme README.md"
MARK = "<!-- masks: made by benchmarks/masks.py -->"
child = partial(_measuring.child, __file__)


class Shape(NamedTuple):
    """The projections of a GPT-2: four matrices a layer, stored (inputs, outputs)."""

    name: str
    width: int
    layers: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        one = [(self.width, 3 * self.width), (self.width, self.width)]
        return [*one, (self.width, 4 * self.width), (4 * self.width, self.width)] * self.layers


GPT2 = Shape("GPT-2 124M shape", 768, 12)
TINY = Shape("tiny shape", 32, 2)


def weights_of(shape: Shape) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(SEED)
    made = [torch.empty(size).normal_(0, 0.02, generator=generator) for size in shape.matrices]
    return {f"{number:03d}": one for number, one in enumerate(made)}


def numbers_of(shape: Shape) -> int:
    return sum(rows * columns for rows, columns in shape.matrices)


# The sides: each makes ten global magnitude masks ---------------------------------------------------------------------


def ours(weights: Mapping[str, Any], sparsities: Sequence[float]) -> Any:
    from nbhelpers import masks

    return masks.levels(weights, sparsities, absolute=True)


class Pruned:
    """torch.nn.utils.prune.global_unstructured, a call a level, each on the dense weights again."""

    def __init__(self, weights: Mapping[str, Any]) -> None:
        from torch import nn

        self.holders = [nn.Module() for _ in weights]
        for holder, weight in zip(self.holders, weights.values(), strict=True):
            holder.weight = nn.Parameter(weight)  # the same memory

    def call(self, sparsity: float) -> None:
        from torch.nn.utils import prune

        from nbhelpers import masks

        places = [(holder, "weight") for holder in self.holders]
        numbers = sum(holder.weight.numel() for holder in self.holders)
        prune.global_unstructured(places, prune.L1Unstructured, amount=masks.count(sparsity, numbers))

    def undo(self) -> None:
        """Take masks and hooks off; the dense weights are still those that were given."""
        for holder in self.holders:
            holder._forward_pre_hooks.clear()
            del holder.weight, holder.weight_mask
            holder.weight = holder._parameters.pop("weight_orig")


def partition(weights: Mapping[str, Any], sparsities: Sequence[float], together: bool) -> list:
    """Packed bits of each level: the kth magnitude of all weights in one row, and a comparison. Ties all stay."""
    import numpy as np

    from nbhelpers import masks

    row = np.abs(np.concatenate([one.numpy().ravel() for one in weights.values()]))
    ranks = [masks.count(sparsity, len(row)) for sparsity in sparsities]
    if together:
        found = np.partition(row, ranks)
        return [np.packbits(row >= found[rank]) for rank in ranks]
    return [np.packbits(row >= np.partition(row, rank)[rank]) for rank in ranks]


def read(weights: Mapping[str, Any]) -> float:
    return sum(float(one.sum()) for one in weights.values())


def wanda(weights: Mapping[str, Any], sparsity: float) -> list:
    """The lines of Wanda's prune.py that make a mask of a score, here |w| as rows of outputs."""
    import torch

    found = []
    for weight in weights.values():
        metric = torch.abs(weight.T)
        mask = torch.zeros_like(metric) == 1
        order = torch.sort(metric, dim=-1, stable=True)
        mask.scatter_(1, order[1][:, : int(metric.shape[1] * sparsity)], True)
        found.append(mask)
    return found


def layers_of(weights: Mapping[str, Any]) -> list:
    """Each weight in a layer as a GPT-2 has it, in the same memory."""
    import torch
    from transformers.pytorch_utils import Conv1D

    with torch.device("meta"):
        layers = [Conv1D(weight.shape[1], weight.shape[0]) for weight in weights.values()]
    for layer, weight in zip(layers, weights.values(), strict=True):
        layer.weight = torch.nn.Parameter(weight)
    return layers


def compressor(layers: Sequence[Any], sparsity: float) -> list:
    """llm-compressor's function, layer by layer: weights with zeros. With every input alike, a score is |w|."""
    import torch
    from llmcompressor.modifiers.pruning.wanda.wanda_sparsify import sparsify_weight

    return [sparsify_weight(one, {one: torch.ones(one.weight.shape[0])}, sparsity, 0, 0) for one in layers]


def by_rows(weights: Mapping[str, Any], sparsity: float) -> dict:
    from fractions import Fraction

    from nbhelpers import mask_patterns
    from nbhelpers.mask_selection import exact
    from nbhelpers.projections import Projection

    covered = [Projection(name, tuple(one.shape), 0) for name, one in weights.items()]
    fractions: list[Fraction] = [exact(sparsity)]
    asked = mask_patterns.Request(None, covered, weights.items, fractions, "row", absolute=True)
    return dict(mask_patterns.PATTERNS["unstructured"](asked))


# Measuring: each of these in a process of its own ---------------------------------------------------------------------


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """(wall seconds, processor seconds of all threads)."""
    begin, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - begin, time.process_time() - used


def speed(shape: Shape, rounds: int) -> dict:
    """Seconds of each side, in turn, every other round backwards; torch's ten calls are timed without the undoing."""
    weights = weights_of(shape)
    pruned, few = Pruned(weights), weights_of(TINY)
    ours(few, LEVELS), partition(few, LEVELS, True), wanda(few, 0.5), by_rows(few, 0.5)
    layers = layers_of(weights) if has_compressor() else None

    def ten_calls() -> tuple[float, float]:
        wall = used = 0.0
        for sparsity in LEVELS:
            one = timed(lambda sparsity=sparsity: pruned.call(sparsity))
            wall, used = wall + one[0], used + one[1]
            pruned.undo()
        return wall, used

    sides: dict[str, Callable[[], tuple[float, float]]] = {
        READ: lambda: timed(lambda: read(weights)),
        OURS: lambda: timed(lambda: ours(weights, LEVELS)),
        PARTITIONS: lambda: timed(lambda: partition(weights, LEVELS, True)),
        PARTITION: lambda: timed(lambda: partition(weights, LEVELS, False)),
        PRUNE: ten_calls,
    }
    single = {
        OURS: lambda: timed(lambda: ours(weights, [ONE_LEVEL])),
        ROWS: lambda: timed(lambda: by_rows(weights, ONE_LEVEL)),
        WANDA: lambda: timed(lambda: wanda(weights, ONE_LEVEL)),
    }
    if layers is not None:
        compressor(layers_of(few), ONE_LEVEL)
        single[COMPRESSOR] = lambda: timed(lambda: compressor(layers, ONE_LEVEL))
    found: dict[str, list] = {name: [] for name in sides}
    alone: dict[str, list] = {name: [] for name in single}
    for number in range(rounds):
        for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
            found[name].append(sides[name]())
        for name in list(single)[:: 1 if number % 2 == 0 else -1]:
            alone[name].append(single[name]())
    return {
        "model": shape.name,
        "projections": len(weights),
        "numbers": numbers_of(shape),
        "rounds": found,
        "one_level": alone,
        "differences": differences(weights, pruned),
        "differences_by_rows": None if layers is None else differences_by_rows(weights, layers),
    }


def has_compressor() -> bool:
    return importlib.util.find_spec("llmcompressor") is not None


def differences(weights: Mapping[str, Any], pruned: Pruned) -> dict[str, int]:
    """At half: weights that ours and torch's masks differ on; of them those that are no tie at the threshold."""
    from nbhelpers import masks

    mine = masks.levels(weights, [ONE_LEVEL], absolute=True)
    pruned.call(ONE_LEVEL)
    differ = [
        (mine.kept(name) != holder.weight_mask.bool()) for name, holder in zip(weights, pruned.holders, strict=True)
    ]
    values = [one.abs()[where] for one, where in zip(weights.values(), differ, strict=True)]
    pruned.undo()
    threshold = max((float(one.abs()[~mine.kept(name)].max()) for name, one in weights.items()), default=0.0)
    return {
        "weights": sum(int(one.sum()) for one in differ),
        "beside_ties": sum(int((one != threshold).sum()) for one in values),
    }


def differences_by_rows(weights: Mapping[str, Any], layers: Sequence[Any]) -> int:
    """At half of each row: weights that our masks and llm-compressor's zeros differ on."""
    from nbhelpers.mask_selection import kept

    mine, differ = by_rows(weights, ONE_LEVEL), 0
    for (name, weight), zeroed in zip(weights.items(), compressor(layers, ONE_LEVEL), strict=True):
        stays = kept(mine[name].numpy(), weight.numel(), 1, 0).reshape(weight.shape)
        differ += int((stays != (zeroed != 0).numpy()).sum())
    return differ


def peak_memory(shape: Shape, side: str) -> dict:
    """Bytes above the weights, at most, while one side makes its ten levels (torch: one call; they do not add up)."""
    from nbhelpers import memory

    few = weights_of(TINY)  # libraries are loaded before memory is read
    ours(few, LEVELS), partition(few, LEVELS, False), Pruned(few).call(0.5)
    weights = weights_of(shape)
    pruned = Pruned(weights) if side == PRUNE else None
    with memory.peak(interval_seconds=0.001) as mark:
        if pruned is not None:
            pruned.call(ONE_LEVEL)
        elif side == OURS:
            kept = ours(weights, LEVELS)
            del kept
        else:
            partition(weights, LEVELS, side == PARTITIONS)
    return {"grown": mark.resident_peak - mark.resident_before, "weights": 4 * numbers_of(shape)}


def growth(numbers: int, folder: str) -> dict:
    """Seconds and peak memory of ten levels of a bfloat16 model in a file, and seconds to read the file once."""
    from nbhelpers import mask_files, masks, memory

    path = Path(folder) / "weights.safetensors"
    written = write_weights(path, numbers)
    ours(weights_of(TINY), LEVELS)
    streamed = mask_files.Streamed([path])
    reading = timed(lambda: [streamed[name] for name in streamed])
    with memory.peak(interval_seconds=0.002) as mark:
        seconds = timed(lambda: masks.levels(streamed, LEVELS, absolute=True))
    path.unlink()
    return {
        "numbers": written,
        "seconds": seconds,
        "reading": reading,
        "grown": mark.resident_peak - mark.resident_before,
        "packed": written // 2,
    }


def write_weights(path: Path, numbers: int) -> int:
    """A safetensors file of about so many bfloat16 weights, written one matrix at a time; returns how many."""
    import torch

    rows, columns = WIDE if numbers >= 10_000_000 else (64, 32)
    count = max(1, round(numbers / (rows * columns)))
    size = 2 * rows * columns
    header = {
        f"layer.{number:04d}.weight": {
            "dtype": "BF16",
            "shape": [rows, columns],
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number in range(count)
    }
    text = json.dumps(header).encode()
    generator = torch.Generator().manual_seed(SEED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(count):
            made = torch.empty(rows, columns).normal_(0, 0.02, generator=generator).bfloat16()
            file.write(made.view(torch.uint8).numpy().tobytes())
    return count * rows * columns


def run_child(job: list) -> dict:
    what, *rest = job
    if what == "growth":
        return growth(*rest)
    shape, *rest = rest
    return {"speed": speed, "memory": peak_memory}[what](Shape(**shape), *rest)


def measure(quick: bool, rounds: int) -> dict:
    """All cells; what `summarise` takes."""
    shape = TINY if quick else GPT2
    told = shape._asdict()
    found = child("speed", told, rounds)
    held: dict[str, list] = {side: [] for side in SIDES if side != READ}
    for _ in range(rounds):
        for side in held:
            held[side].append(child("memory", told, side))
    curve, left_out = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for numbers in (100_000, 200_000) if quick else SIZES:
            if why := no_room(numbers, folder):
                left_out[str(numbers)] = why
            else:
                curve.append(child("growth", numbers, folder))
    return {"speed": found, "memory": held, "growth": curve, "not_measured": left_out}


def no_room(numbers: int, folder: str) -> str | None:
    """Why a file of so many bfloat16 weights, and their ten levels in memory, do not fit here."""
    from nbhelpers import memory

    if shutil.disk_usage(folder).free < 3 * numbers:
        return "no room on the disk"
    return "no room in memory" if memory.free()["ram_free"] < numbers else None


# Summing up -----------------------------------------------------------------------------------------------------------


def summarise(found: dict) -> dict:
    """Medians over the rounds, ratios of each round, and which promises were kept."""
    taken = found["speed"]
    for part in ("rounds", "one_level"):
        sides = taken[part]
        taken[f"{part}_seconds"] = {
            name: [statistics.median(values) for values in zip(*sides[name], strict=True)] for name in sides
        }
    rounds = taken["rounds"]
    taken["beside"] = {
        name: {
            "wall": ratios([one[0] for one in rounds[name]], [one[0] for one in rounds[OURS]]),
            "processor": ratios([one[1] for one in rounds[name]], [one[1] for one in rounds[OURS]]),
        }
        for name in rounds
        if name != OURS
    }
    taken["reads"] = ratios([one[0] for one in rounds[OURS]], [one[0] for one in rounds[READ]])
    held = {
        side: statistics.median(one["grown"] / one["weights"] for one in runs) for side, runs in found["memory"].items()
    }
    return found | {"speed": taken, "memory_shares": held, "targets": targets(taken, held)}


def targets(taken: Mapping[str, Any], held: Mapping[str, float]) -> list[dict]:
    """What was promised."""
    return [
        target(f"times as fast as ten calls of {PRUNE}", ">=", WANTED_SPEED, taken["beside"][PRUNE]["wall"]["median"]),
        target("extra peak memory, of the weights", "<=", WANTED_MEMORY, held[OURS]),
        target("time in reads of the weights (an aim)", "<=", WANTED_READS, taken["reads"]["median"]),
    ]


# Text -----------------------------------------------------------------------------------------------------------------


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, taken = found["machine"], found["speed"]
    once = taken["one_level_seconds"]
    best = min((PARTITION, PARTITIONS), key=lambda name: taken["rounds_seconds"][name][0])
    intro = (
        f"Global magnitude masks at ten sparsities ({LEVELS[0]} to {LEVELS[-1]}) of the {taken['projections']} "
        f"projections of a {taken['model']} ({taken['numbers']:,} float32 weights, random), packed in memory, on "
        f"{machine['processor']}, threads: {machine['threads']}, torch {machine['torch']}, NumPy {machine['numpy']}. "
        f"Medians of {len(taken['rounds'][OURS])} round(s), all sides in turn in one process; ratios are medians of "
        "the rounds' ratios, with the least and the greatest. Processor seconds are of all threads. Made by "
        f"`{COMMAND}`; all numbers are in [benchmarks/results/masks.json](benchmarks/results/masks.json)."
    )
    lines = [
        intro,
        "",
        "| ten levels | seconds | / ours | processor seconds | / ours | extra peak memory / weights |",
        "|---|---|---|---|---|---|",
        *(side_line(found, name) for name in SIDES),
        "",
        *(target_line(one, seen=".3g") for one in found["targets"]),
        f"- beside the best peer ({best}): {taken['beside'][best]['wall']['median']:.1f} times as fast.",
        "",
        (
            f"At {ONE_LEVEL} ours and torch's masks differ on {taken['differences']['weights']} weights, "
            f"{taken['differences']['beside_ties']} of them no ties at the threshold."
        ),
        "",
        f"One level, {ONE_LEVEL}: "
        + ", ".join(f"{name} {once[name][0]:.2f} s" for name in SINGLE if name in once)
        + ".",
        *compared_by_rows(found),
        "",
        *growth_lines(found),
        *(f"Not measured: {int(size):,} weights ({why})." for size, why in found["not_measured"].items()),
        *(f"Not compared: {name} ({why})." for name, why in found["not_compared"].items()),
    ]
    return "\n".join(lines) + "\n"


def compared_by_rows(found: Mapping[str, Any]) -> list[str]:
    """How far ours and llm-compressor's zeros agree, where it is installed."""
    differ = found["speed"].get("differences_by_rows")
    if differ is None:
        return []
    version = found["machine"]["llmcompressor"]
    return ["", f"With llm-compressor {version}, half of each row: it and nbhelpers differ on {differ:,} weights."]


def side_line(found: Mapping[str, Any], name: str) -> str:
    taken = found["speed"]
    wall, used = taken["rounds_seconds"][name]
    told = [spread(taken["beside"].get(name, {}).get(kind)) for kind in ("wall", "processor")]
    share = found["memory_shares"].get(name)
    return f"| {name} | {wall:.3f} | {told[0]} | {used:.3f} | {told[1]} | {'' if share is None else f'{share:.2f}'} |"


def spread(ratio: Mapping[str, float] | None) -> str:
    return "1" if ratio is None else f"{ratio['median']:.3g} [{ratio['low']:.3g}, {ratio['high']:.3g}]"


def growth_lines(found: Mapping[str, Any]) -> list[str]:
    rows = [
        (
            f"| {one['numbers'] / 1e6:,.1f} M | {one['seconds'][0]:.2f} | "
            f"{one['seconds'][1] / one['numbers'] * 1e9:.1f} | {one['reading'][0]:.2f} | {one['grown'] / 1e6:,.0f} | "
            f"{one['packed'] / 1e6:,.0f} |"
        )
        for one in found["growth"]
    ]
    return [
        "How cost grows: bfloat16 weights streamed from a safetensors file, ten levels, the model never in memory.",
        "",
        "| weights | seconds | processor ns a weight | seconds to read the file | peak memory MB | of it packed MB |",
        "|---|---|---|---|---|---|",
        *rows,
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: does it run?")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return

    here = machine("numpy", "llmcompressor")
    missing = {} if has_compressor() else {"llm-compressor": "it is not installed"}
    found = measure(options.quick, 1 if options.quick else options.rounds) | {
        "machine": here,
        "not_compared": missing,
    }
    found = summarise(found)
    text = markdown(found)
    out = options.out or (None if options.quick else RESULTS)
    publish("masks", found, text, out, options.readme, MARK)


if __name__ == "__main__":
    main()
