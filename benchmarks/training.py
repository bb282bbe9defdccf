"""What does fine-tuning by LoRA cost beside plain transformers.Trainer with peft: tokens a second, peak memory?

    python benchmarks/training.py [--quick] [--out benchmarks/results] [--readme README.md]

The peer is what one would write with both libraries: padding to the longest row of the batch, labels -100 on prompts
and padding, fused AdamW, clipping, no logging. Same model, adapters, rows, order, effective batch and schedule. Weights
are random: only shapes count. Speed: one process a cell, the variants in turn, several rounds; the losses of the very
same runs are compared step by step. Memory: one process a run. Writes training.json and training.md; --quick runs
everything on a tiny shape and writes nothing unless --out is given.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import _measuring
from _measuring import RESULTS, device, machine, publish, ratios, target, target_line

BATCH, SEED, RANK, ALPHA, LEARNING_RATE, WARMUP_SHARE = 8, 0, 8, 16.0, 1e-3, 0.05
STEPS, WARM, ROUNDS = 8, 2, 3  # steps of a run, those at its start that are not timed, rounds of runs in turn
MEMORY_STEPS, MEMORY_ROUNDS, MEMORY_VOCABULARY = 2, 2, 128_256  # the vocabulary of Llama 3
WINDOW = 192  # tokens of a row of plain text
FASTER, LESS_MEMORY, SAME_LOSS = 1.3, 0.6, 1e-4  # what was promised
PLAIN, UNPACKED, PACKED = "Trainer + peft", "nbhelpers, no packing", "nbhelpers"
DATA = {"boolq": "BoolQ", "dialogues": "dialogues", "text": "plain text"}
COMMAND = "python benchmarks/training.py --readme README.md"
MARK = "<!-- training: made by benchmarks/training.py -->"
child = partial(_measuring.child, __file__)

# Tokens of a BoolQ prompt (passage, question, "Answer:"): percentiles 0 to 100 of 1500 rows of its training split,
# counted in pieces of GPT-2's pre-tokeniser (words, numbers, marks). A test counts them again where the data are.
BOOLQ = (
    *(23, 36, 41, 44, 49, 52, 54, 57, 60, 61, 63, 66, 67, 68, 70, 71, 73, 74, 75, 77, 79, 80, 82, 83, 84),
    *(85, 86, 88, 89, 90, 91, 92, 93, 95, 96, 97, 98, 99, 101, 102, 103, 104, 105, 107, 108, 109, 110, 112, 114, 116),
    *(117, 118, 120, 121, 122, 123, 125, 126, 128, 129, 131, 133, 134, 135, 137, 138, 139, 141, 142, 143, 146, 147),
    *(149, 152, 154, 156, 158, 160, 164, 167, 171, 174, 177, 179, 183, 185, 189, 194, 198, 203, 207, 210, 215, 224),
    *(231, 239, 247, 270, 312, 346, 586),
)


class Shape(NamedTuple):
    """A model with random weights. kind: gpt2 (tied embeddings) or llama (grouped keys, gated MLP, own head)."""

    name: str
    kind: str
    width: int
    layers: int
    vocabulary: int


SHAPES = {
    "gpt2": Shape("like GPT-2 small", "gpt2", 256, 6, 8_192),
    "llama": Shape("like Llama", "llama", 256, 6, 32_000),
}
LARGE = Shape("like Llama", "llama", 256, 4, MEMORY_VOCABULARY)
TINY = {kind: Shape(f"tiny {kind}", kind, 32, 2, 1_024) for kind in SHAPES}


def build(shape: Shape) -> Any:
    """The model, the same for the same shape."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    heads, width = shape.width // 32, shape.width
    ends = {"vocab_size": shape.vocabulary, "bos_token_id": None, "eos_token_id": None}
    if shape.kind == "gpt2":
        drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        model = GPT2LMHeadModel(GPT2Config(n_embd=width, n_layer=shape.layers, n_head=heads, **drop, **ends))
    else:
        sizes = {"hidden_size": width, "intermediate_size": width * 11 // 4, "num_hidden_layers": shape.layers}
        groups = {"num_attention_heads": heads, "num_key_value_heads": max(1, heads // 2)}
        model = LlamaForCausalLM(LlamaConfig(**sizes, **groups, **ends, max_position_embeddings=1024))
    model.config.use_cache = False
    model.loss_type = "ForCausalLM"  # without it Trainer divides GPT-2's loss by one label too many a row of plain text
    return model.to(device())


# Rows -----------------------------------------------------------------------------------------------------------------


def rows(kind: str, vocabulary: int, count: int) -> list[dict]:
    """`count` rows as nbhelpers takes them, in the order in which they are trained on."""
    make = {"boolq": boolq_rows, "dialogues": dialogue_rows, "text": text_rows}[kind]
    return make(vocabulary, count)


def boolq_rows(vocabulary: int, count: int) -> list[dict]:
    """Random tokens in BoolQ's lengths; labels on the last two: the answer, yes or no, and the end."""
    drawn = random.Random(SEED)
    lengths = [quantile(BOOLQ, drawn.random()) for _ in range(count)]
    return [labelled_row(random_ids(vocabulary, length + 2, drawn), length) for length in lengths]


def dialogue_rows(vocabulary: int, count: int) -> list[dict]:
    """Bundled symptom dialogues in the bundled tokenizer's tokens; labels on the doctor's summary and what follows."""
    from transformers import AutoTokenizer

    from nbhelpers import generated, models

    tokenizer = AutoTokenizer.from_pretrained(models.BUNDLED / "small-llama")
    made = []
    for text in generated.documents(count, seed=SEED, kinds=("dialogue",)):
        start = text.index("\nDoctor: So, ") + len("\nDoctor:")
        prompt, answer = tokenizer(text[:start])["input_ids"], tokenizer(text[start:])["input_ids"]
        made.append(labelled_row([token % vocabulary for token in prompt + answer], len(prompt)))
    return made


def text_rows(vocabulary: int, count: int) -> list[dict]:
    """Windows of one length, a label on every token."""
    drawn = random.Random(SEED)
    return [labelled_row(random_ids(vocabulary, WINDOW, drawn), 0) for _ in range(count)]


def random_ids(vocabulary: int, length: int, drawn: random.Random) -> list[int]:
    return [drawn.randrange(vocabulary) for _ in range(length)]


def labelled_row(ids: list[int], prompt_length: int) -> dict:
    import torch

    labels = [-100] * prompt_length + ids[prompt_length:]
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels), "prompt_length": prompt_length}


def quantile(cuts: Sequence[float], share: float) -> int:
    """The length below which this share of the rows lies, between two percentiles by the straight line."""
    place = share * (len(cuts) - 1)
    low = min(int(place), len(cuts) - 2)
    return round(cuts[low] + (place - low) * (cuts[low + 1] - cuts[low]))


# The two ways to train ------------------------------------------------------------------------------------------------


def ours(model: Any, train: list[dict], steps: int, packing: bool) -> tuple[list[float], list[float]]:
    """(loss of each step, moment at which it ended) of nbhelpers.training.fine_tune."""
    from nbhelpers import attention
    from nbhelpers.training import TrainingConfig, fine_tune

    attention.install(model)  # as models.load_model does
    config = TrainingConfig(
        method="lora",
        steps=steps,
        batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        warmup_share=WARMUP_SHARE,
        lora_rank=RANK,
        lora_alpha=ALPHA,
        eval_every=None,
        keep_best=False,
        seed=SEED,
        packing=packing,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        result = fine_tune(model, train, None, config, output_dir=folder, progress=lambda _: ends.append(now()))
    if packing != (result.packing == "on"):
        raise RuntimeError(f"packing was to be {packing}, the run says {result.packing}")
    return [loss for _, loss in result.train_losses], ends


def plain(model: Any, train: list[dict], steps: int) -> tuple[list[float], list[float]]:
    """The same of transformers.Trainer with peft; `train` in the order in which it is trained on."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    losses, ends = [], []

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    class Clock(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            ends.append(now())

    adapted = adapters(model)
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            max_grad_norm=1.0,
            use_cpu=device() == "cpu",
            bf16=device() == "cuda",
            seed=SEED,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        )
        trainer = InOrder(
            model=adapted,
            args=arguments,
            train_dataset=train,
            data_collator=padded,
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, schedule(steps))),
            callbacks=[Clock()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    adapted.merge_and_unload(safe_merge=True)
    return [float(loss) for loss in losses], ends


def adapters(model: Any) -> Any:
    """The model with the peer's own LoRA adapters, drawn from the seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(SEED)
    swapped = model.config.model_type == "gpt2"  # its weights are (in, out)
    settings = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules="all-linear", fan_in_fan_out=swapped
    )
    return get_peft_model(model, settings)


def same_adapters(shape: Shape) -> bool:
    """Whether both begin with the same adapters, bit for bit: those of the package beside those of the peer."""
    from nbhelpers import preparation, runtime
    from nbhelpers.training import TrainingConfig

    config, model = TrainingConfig(method="lora", lora_rank=RANK, lora_alpha=ALPHA), build(shape)
    with runtime.seeded(SEED):
        left = preparation.with_adapters(model, config).state_dict()
    right = adapters(build(shape)).state_dict()
    return left.keys() == right.keys() and all(bool((left[name] == right[name]).all()) for name in left)


def padded(batch: list[dict]) -> dict:
    """(batch, longest): ids padded with 0, labels with -100, and the mask."""
    import torch

    def column(name: str, filler: int) -> Any:
        return torch.nn.utils.rnn.pad_sequence([row[name] for row in batch], batch_first=True, padding_value=filler)

    real = [{"ones": torch.ones_like(row["input_ids"])} for row in batch]
    mask = torch.nn.utils.rnn.pad_sequence([row["ones"] for row in real], batch_first=True)
    return {"input_ids": column("input_ids", 0), "labels": column("labels", -100), "attention_mask": mask}


def schedule(steps: int) -> Callable[[int], float]:
    """Linear warm-up over the first steps, then linearly down; the first step already has a rate above 0."""
    warmup = math.ceil(WARMUP_SHARE * steps)
    return lambda done: (done + 1) / warmup if done < warmup else max(0, steps - done) / max(1, steps - warmup)


def now() -> float:
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


RUN = {
    PLAIN: plain,
    UNPACKED: lambda model, train, steps: ours(model, train, steps, packing=False),
    PACKED: lambda model, train, steps: ours(model, train, steps, packing=True),
}


# Measuring: each of these in a process of its own ---------------------------------------------------------------------


def in_order(made: list[dict], steps: int) -> list[dict]:
    """The rows as fine_tune's seed orders them, for the peer, who takes them as they come."""
    from nbhelpers.optimization import data_order

    return [made[at] for at in data_order(len(made), steps * BATCH, SEED)]


def speed(shape: Shape, kind: str, steps: int = STEPS, warm: int = WARM, rounds: int = ROUNDS) -> dict:
    """Tokens a second and losses of every variant on one kind of data, in turn, every other round backwards."""
    made = rows(kind, shape.vocabulary, steps * BATCH)
    ordered = in_order(made, steps)
    timed = ordered[warm * BATCH :]
    tokens = sum(len(row["input_ids"]) for row in timed)
    variants = [PLAIN, PACKED] if kind == "text" else [PLAIN, UNPACKED, PACKED]
    found: dict[str, list[float]] = {name: [] for name in variants}
    losses: dict[str, list[float]] = {}
    peak_flops = 0.0
    for number in range(rounds):
        for name in variants if number % 2 == 0 else variants[::-1]:
            peak_flops = max(peak_flops, matmul_flops())
            losses[name], ends = RUN[name](build(shape), ordered if name == PLAIN else made, steps)
            found[name].append(tokens / (ends[-1] - ends[warm - 1]))
    model = build(shape)
    return {
        "shape": shape._asdict(),
        "data": kind,
        "rows": describe(ordered),
        "head_share": head_share(model),
        "rounds": found,
        "losses": losses,
        "same_adapters": same_adapters(shape),
        "matmul_flops": peak_flops,
        "flops_a_token": needed_flops(model, timed) / tokens,
    }


def peak_memory(shape: Shape, kind: str, variant: str, steps: int = MEMORY_STEPS) -> dict:
    """Bytes of one run in this process: with the model loaded, and the most while it was trained and merged."""
    from nbhelpers import memory

    made = rows(kind, shape.vocabulary, steps * BATCH)
    ordered = in_order(made, steps) if variant == PLAIN else made
    RUN[variant](build(TINY[shape.kind]), rows(kind, TINY[shape.kind].vocabulary, BATCH), 1)  # libraries are loaded
    model = build(shape)
    with memory.peak() as mark:
        RUN[variant](model, ordered, steps)
    if device() == "cuda":
        return {"before": mark.cuda_before, "peak": mark.cuda_peak}
    return {"before": mark.resident_before, "peak": mark.resident_peak}


def describe(ordered: list[dict]) -> dict:
    """What the rows hold, as the peer's batches have it: least, median and greatest length, padding, labels."""
    lengths = [len(row["input_ids"]) for row in ordered]
    positions = sum(BATCH * max(lengths[at : at + BATCH]) for at in range(0, len(lengths), BATCH))
    labels = sum(int((row["labels"][1:] != -100).sum()) for row in ordered)
    return {
        "lengths": [min(lengths), int(statistics.median(lengths)), max(lengths)],
        "padding": 1 - sum(lengths) / positions,
        "labels": labels / sum(lengths),
    }


def multiplied(model: Any) -> tuple[int, int]:
    """Weights that every token is multiplied by: of the layers, and of the output embedding."""
    head = model.get_output_embeddings().weight
    embeddings = {id(head), *(id(m.weight) for m in model.modules() if type(m).__name__ == "Embedding")}
    layers = sum(p.numel() for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings)
    return layers, head.numel()


def head_share(model: Any) -> float:
    layers, head = multiplied(model)
    return head / (layers + head)


def needed_flops(model: Any, timed: list[dict]) -> float:
    """Floating-point operations that these rows need, without padding: 4 a frozen weight and token (forward, and back
    to the activations), of the output embedding only where there is a label, and causal attention; adapters and
    elementwise work left out."""
    layers, head = multiplied(model)
    width, depth = model.config.hidden_size, model.config.num_hidden_layers
    lengths = [len(row["input_ids"]) for row in timed]
    labels = sum(int((row["labels"][1:] != -100).sum()) for row in timed)
    attention = sum(6 * width * length**2 * depth for length in lengths)
    return 4.0 * layers * sum(lengths) + 4.0 * head * labels + attention


def matmul_flops(size: int = 1024, times: int = 5) -> float:
    """Floating-point operations a second of the fastest of some square matrix multiplications, float32 (CUDA: bf16)."""
    import torch

    kind = torch.bfloat16 if device() == "cuda" else torch.float32
    left = torch.randn(size, size, device=device(), dtype=kind)
    best = math.inf
    for _ in range(times):
        begin = now()
        left @ left
        best = min(best, now() - begin)
    return 2 * size**3 / best


def run_child(job: list) -> dict:
    what, shape, *rest = job
    return {"speed": speed, "memory": peak_memory}[what](Shape(**shape), *rest)


def measure(quick: bool) -> dict:
    """All cells; what `summarise` takes."""
    shapes, large = (TINY, TINY["llama"]._replace(vocabulary=8_192)) if quick else (SHAPES, LARGE)
    sizes = (3, 1, 1) if quick else (STEPS, WARM, ROUNDS)
    cells = [child("speed", shape._asdict(), kind, *sizes) for shape in shapes.values() for kind in DATA]
    memories = []
    for kind in ("boolq", "text"):
        taken = {PLAIN: [], PACKED: []}
        for _ in range(1 if quick else MEMORY_ROUNDS):
            for variant, found in taken.items():
                found.append(child("memory", large._asdict(), kind, variant))
        memories.append({"shape": large._asdict(), "data": kind, "rounds": taken})
    return {"cells": cells, "memory": memories}


# What it comes to -----------------------------------------------------------------------------------------------------


def furthest(one: Sequence[float], other: Sequence[float]) -> float:
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def summarise(found: dict) -> dict:
    """Medians, the ratio of each round, the largest differences of the losses, and whether each promise was kept."""
    cells = []
    for cell in found["cells"]:
        rounds, losses = cell["rounds"], cell["losses"]
        unpacked = UNPACKED if UNPACKED in losses else PACKED
        reached = {name: statistics.median(values) for name, values in rounds.items()}
        cells.append(
            cell
            | {
                "tokens_per_second": reached,
                "ratio": ratios(rounds[PACKED], rounds[PLAIN]),
                "ratio_unpacked": ratios(rounds[unpacked], rounds[PLAIN]),
                "share_of_limit": {n: t * cell["flops_a_token"] / cell["matmul_flops"] for n, t in reached.items()},
                "loss_difference": furthest(losses[unpacked], losses[PLAIN]),
                "loss_difference_packed": furthest(losses[PACKED], losses[unpacked]),
            }
        )
    memories = []
    for row in found["memory"]:
        rounds = row["rounds"]
        peaks = {name: [one["peak"] for one in taken] for name, taken in rounds.items()}
        grown = {name: [one["peak"] - one["before"] for one in taken] for name, taken in rounds.items()}
        memories.append(
            row
            | {
                "peak_bytes": {name: statistics.median(values) for name, values in peaks.items()},
                "grown_bytes": {name: statistics.median(values) for name, values in grown.items()},
                "ratio": ratios(peaks[PACKED], peaks[PLAIN]),
                "ratio_grown": ratios(grown[PACKED], grown[PLAIN]),
            }
        )
    return found | {"cells": cells, "memory": memories, "targets": targets(cells, memories)}


def targets(cells: list[dict], memories: list[dict]) -> list[dict]:
    answers = [cell for cell in cells if cell["data"] != "text"]
    return [
        target(
            "tokens a second on prompts with answers, least ratio",
            ">=",
            FASTER,
            min(cell["ratio"]["median"] for cell in answers),
        ),
        target(
            "tokens a second on plain text, least ratio (never slower)",
            ">=",
            1.0,
            min(cell["ratio"]["median"] for cell in cells if cell["data"] == "text"),
        ),
        target(
            "peak memory with the large vocabulary, greatest ratio",
            "<=",
            LESS_MEMORY,
            max(row["ratio"]["median"] for row in memories),
        ),
        target(
            "loss of a step without packing, largest difference in nats",
            "<=",
            SAME_LOSS,
            max(cell["loss_difference"] for cell in cells),
        ),
    ]


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine = found["machine"]
    large = found["memory"][0]
    intro = (
        f"LoRA (rank {RANK}, all linear layers), {BATCH} rows an optimizer step, on {machine['processor']}, "
        f"{machine['device']}, threads: {machine['threads']}, {machine['precision']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, peft {machine['peft']}. Models have random weights. Tokens a second "
        f"count real tokens, never padding, over {found['steps'] - found['warm']} steps after {found['warm']} to warm "
        f"up: medians of {found['rounds']} rounds, the variants in turn; the ratio is the median of the rounds' "
        "ratios, with the least and the greatest. In brackets: the share of the machine's matrix multiplication "
        f"({machine['matmul_flops'] / 1e9:,.0f} GFLOP/s) that the work without padding and unneeded logits comes to. "
        f"Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/training.json](benchmarks/results/training.json)."
    )
    lines = [
        intro,
        "",
        f"| model | data | {PLAIN} | {UNPACKED} | {PACKED} | ratio |",
        "|---|---|---|---|---|---|",
        *(speed_line(cell) for cell in found["cells"]),
        "",
        (
            f"Peak memory with a vocabulary of {large['shape']['vocabulary']:,} ({shape_text(large)}), of the whole "
            "process; in brackets what it grew by from the loaded model on."
        ),
        "",
        f"| data | {PLAIN} | {PACKED} | ratio |",
        "|---|---|---|---|",
        *(memory_line(row) for row in found["memory"]),
        "",
        *(target_line(one) for one in found["targets"]),
        "",
        data_text(found),
        "Not compared: " + "; ".join(f"{name} ({why})" for name, why in found["not_compared"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def shape_text(row: dict) -> str:
    shape = row["shape"]
    return f"{shape['name']}, width {shape['width']}, {shape['layers']} layers"


def speed_line(cell: dict) -> str:
    def speed_of(name: str) -> str:
        if name not in cell["tokens_per_second"]:
            return "nothing to pack"
        return f"{cell['tokens_per_second'][name]:,.0f} ({cell['share_of_limit'][name]:.0%})"

    model = f"{shape_text(cell)}, vocabulary {cell['shape']['vocabulary']:,}"
    ratio = cell["ratio"]
    return (
        f"| {model} | {DATA[cell['data']]} | {speed_of(PLAIN)} | {speed_of(UNPACKED)} | {speed_of(PACKED)} | "
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}] |"
    )


def memory_line(row: dict) -> str:
    def bytes_of(name: str) -> str:
        return f"{row['peak_bytes'][name] / 1e6:,.0f} MB ({row['grown_bytes'][name] / 1e6:,.0f})"

    whole, grown = row["ratio"]["median"], row["ratio_grown"]["median"]
    return f"| {DATA[row['data']]} | {bytes_of(PLAIN)} | {bytes_of(PACKED)} | {whole:.2f} ({grown:.2f}) |"


def data_text(found: dict) -> str:
    kinds = {cell["data"]: cell["rows"] for cell in found["cells"]}
    said = [
        f"{DATA[kind][0].upper()}{DATA[kind][1:]}: {row['lengths'][0]} to {row['lengths'][2]} tokens, median "
        f"{row['lengths'][1]}, {row['padding']:.0%} of the padded batches is padding, {row['labels']:.0%} of the "
        "tokens have a label"
        for kind, row in kinds.items()
    ]
    shares = {cell["shape"]["name"]: cell["head_share"] for cell in found["cells"]}
    heads = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
    packed = max(cell["loss_difference_packed"] for cell in found["cells"])
    fall = max(cell["losses"][PLAIN][0] - cell["losses"][PLAIN][-1] for cell in found["cells"])
    return (
        f"{'. '.join(said)}. BoolQ stands for its lengths (counted in words and marks of 1500 real rows), tokens are "
        f"random. Share of the output embedding in the weights that a token is multiplied by: {heads} (GPT-2 small: "
        f"31 %). Packing changes the loss of a step by at most {packed:.1e} nats, while training lowers it by "
        f"up to {fall:.2f}; adapters began "
        f"{'equal, bit for bit' if all(cell['same_adapters'] for cell in found['cells']) else 'DIFFERENT'}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return

    precision = "float32" if device() == "cpu" else "bfloat16 over float32 weights"
    here = machine("transformers", "peft", precision=precision)
    measured = measure(options.quick)
    here["matmul_flops"] = max(cell["matmul_flops"] for cell in measured["cells"])
    why = "it needs a CUDA device" if device() == "cpu" else "this benchmark has no run for it yet"
    steps, warm, rounds = (3, 1, 1) if options.quick else (STEPS, WARM, ROUNDS)
    about = {"machine": here, "steps": steps, "warm": warm, "rounds": rounds, "not_compared": {"unsloth": why}}
    found = summarise(measured | about)
    text = markdown(found)
    out = options.out or (None if options.quick else RESULTS)
    publish("training", found, text, out, options.readme, MARK)


if __name__ == "__main__":
    main()
