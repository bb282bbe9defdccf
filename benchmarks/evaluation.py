"""What does evaluating cost beside lm-evaluation-harness: documents a second, peak memory, and how does it grow?

    python benchmarks/evaluation.py [--quick] [--data FOLDER] [--out benchmarks/results] [--readme README.md]

The peer is lm-evaluation-harness's own `hf` model on the same model in memory, the same documents and the same
machine; both are given the same prompts and choices, so that only scoring and writing are measured. Speed: one process
a cell, both in turn, warmed up, several rounds. Memory: one process a run. Weights of the GPT-2 shape are random: only
shapes count. Writes evaluation.json and evaluation.md; --quick runs everything on tiny shapes and writes nothing unless
--out is given. Needs the extra `lmeval`; real rows where NBHELPERS_TEST_DATA is set, else generated ones.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import os
import random
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import _measuring
from _measuring import RESULTS, machine, publish, ratios, target, target_line

SEED, VOCABULARY = 0, 50_257
ROUNDS, MEMORY_ROUNDS = 3, 2  # speed: both in turn so often (GSM8K once less); memory: processes of each
BATCHES = (1, 8, 64)  # contexts with a choice in a pass of the peer: its default, and what batch_size=auto takes here
DEFAULT = "1"
WRITING = (12,)  # prompts of a pass of the peer: larger is faster
EQUAL = 64  # contexts with a choice in a pass of both, where memory is measured
WANTED = {
    "hellaswag": 3.0,
    "boolq": 1.3,
    "gsm8k": 1.5,
}  # documents a second, ours / peer's, promised for the GPT-2 shape
WANTED_MEMORY, WANTED_LABELS = 1 / 3, 1.5
COUNTS = {"hellaswag": 24, "boolq": 16, "gsm8k": 12}  # documents of the GPT-2 shape
STORIES_COUNTS = {"hellaswag": 60, "boolq": 60, "gsm8k": 12}
LABELS, LABEL_TOKENS, LABEL_CONTEXT = 2000, 4, 400  # a closed label set, and the context that it is ranked after
OURS, PEER = "nbhelpers", "lm-eval hf"
TASKS = {"hellaswag": "HellaSwag", "boolq": "BoolQ", "gsm8k": "GSM8K"}
FILES = {"hellaswag": "hellaswag_val.jsonl", "boolq": "boolq_dev.jsonl", "gsm8k": "gsm8k_test.jsonl"}
SHOTS = "gsm8k_train.jsonl"
COMMAND = "python benchmarks/evaluation.py --readme README.md"
MARK = "<!-- evaluation: made by benchmarks/evaluation.py -->"
child = partial(_measuring.child, __file__)


class Shape(NamedTuple):
    """A model: the shape of GPT-2 with random weights, or `stories`: real weights."""

    name: str
    width: int
    layers: int
    heads: int
    positions: int


GPT2 = Shape("GPT-2 124M, random weights", 768, 12, 12, 1024)
STORIES = Shape("stories260K", 0, 0, 0, 512)
TINY = Shape("tiny, random weights", 32, 2, 2, 1024)


class Documents(NamedTuple):
    """Contexts, each with its choices (none: the answer is written), and the right answers to written ones."""

    contexts: list[str]
    choices: list[list[str]]
    answers: list[str]
    stops: tuple[str, ...]
    new_tokens: int


# Documents ------------------------------------------------------------------------------------------------------------


def documents(task: str, count: int, data: str | None) -> Documents:
    """The first documents of a task as both sides are asked; generated ones where there is no folder of data."""
    from nbhelpers import tasks

    known = data is not None and (Path(data) / FILES[task]).is_file()
    rows = tasks.read(task, Path(data) / FILES[task] if known else tasks.BUNDLED, limit=count)
    pool = tasks.read(task, Path(data) / SHOTS, "train") if known and rows.task.shots else None
    asked = tasks.documents(rows, shots_rows=pool)
    return Documents(
        [one.context for one in asked],
        [list(one.choices) for one in asked],
        [str(one.gold) for one in asked],
        rows.task.stops,
        rows.task.new_tokens,
    )


def tokenizer_of(texts: Sequence[str], vocabulary: int = VOCABULARY) -> Any:
    """Byte-level BPE in the manner of GPT-2, trained on these texts."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end)


def corpus(data: str | None) -> list[str]:
    """Texts that the tokenizer of the GPT-2 shape is trained on: all rows of all tasks, and generated text."""
    from nbhelpers import generated

    texts = list(generated.documents(300, seed=SEED))
    for name in [*FILES.values(), SHOTS, "boolq_train.jsonl"]:
        path = Path(data or "") / name
        if data and path.is_file():
            rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
            texts += [" ".join(_strings(row)) for row in rows]
    return texts


def _strings(row: dict) -> list[str]:
    return [
        text for value in row.values() for text in (value if isinstance(value, list) else [value]) if type(text) is str
    ]


def load(shape: Shape, data: str | None) -> tuple[Any, Any]:
    """(model, tokenizer) as both sides use them."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from nbhelpers import attention, models

    if shape.name == STORIES.name:
        loaded = models.load_model(
            str(Path(data or "data") / "models" / "stories260K-hf"), device="cpu", dtype="float32"
        )
        return loaded.model, loaded.tokenizer
    vocabulary = VOCABULARY if shape.width > 100 else 1000
    tokenizer = tokenizer_of(corpus(data), vocabulary)
    torch.manual_seed(SEED)
    config = GPT2Config(
        n_embd=shape.width,
        n_layer=shape.layers,
        n_head=shape.heads,
        n_positions=shape.positions,
        vocab_size=vocabulary,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = GPT2LMHeadModel(config).eval()
    attention.install(model)
    return model, tokenizer


# The two ways ---------------------------------------------------------------------------------------------------------


def ours(model: Any, tokenizer: Any, asked: Documents, batch_tokens: int | None = None) -> list:
    """Log-likelihoods or texts of each document, by the package."""
    from nbhelpers import generation, scoring

    if not asked.choices[0]:
        told = {"stops": asked.stops, "max_new_tokens": asked.new_tokens}
        found = generation.continuations(model, tokenizer, asked.contexts, **told)
        return [text for _, text in sorted(found)]
    pairs = zip(asked.contexts, asked.choices, strict=True)
    made = [scoring.question(tokenizer, context, choices) for context, choices in pairs]
    return [values for _, values in sorted(scoring.loglikelihoods(model, made, batch_tokens=batch_tokens))]


def peer(model: Any, tokenizer: Any, asked: Documents, batch: int) -> list:
    """The same by the harness's hf model. batch: contexts with one choice, or prompts, of a pass."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        harness = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)
        if not asked.choices[0]:
            settings = {"until": list(asked.stops), "do_sample": False, "max_gen_toks": asked.new_tokens}
            requests = [SimpleNamespace(args=(context, dict(settings))) for context in asked.contexts]
            return harness.generate_until(requests, disable_tqdm=True)
        pairs = zip(asked.contexts, asked.choices, strict=True)
        requests = [SimpleNamespace(args=(context, choice)) for context, choices in pairs for choice in choices]
        values = iter(value for value, _ in harness.loglikelihood(requests, disable_tqdm=True))
        return [[next(values) for _ in choices] for choices in asked.choices]


@contextlib.contextmanager
def quiet():
    """No log lines of the harness."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


LAST = 24  # tokens at a prompt's end by which it is told which answer is its own
FIRST = 300  # tokens FIRST + n mean: n more, then the end


@contextlib.contextmanager
def as_long_as_the_right_answers(model: Any, tokenizer: Any, asked: Documents):
    """The model writes texts as long as the right answers: random weights would go on to the last token allowed."""
    import torch

    ids = tokenizer(asked.contexts)["input_ids"]
    lengths = [len(found) for found in tokenizer([f" {answer}" for answer in asked.answers])["input_ids"]]
    length_of = {
        tuple(prompt[-LAST:]): min(length, asked.new_tokens) for prompt, length in zip(ids, lengths, strict=True)
    }

    def after(module, args, kwargs, output):
        given = kwargs["input_ids"]
        if given.shape[1] > 1:
            left = torch.tensor([length_of[tuple(row[-LAST:])] for row in given.tolist()], device=given.device)
        else:
            left = given[:, 0] - FIRST - 1
        chosen = torch.where(left > 0, left + FIRST, tokenizer.eos_token_id)
        output.logits[torch.arange(len(given)), -1, chosen] = 1e9

    handle = model.register_forward_hook(after, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


# Measuring: each of these in a process of its own ---------------------------------------------------------------------


def now() -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def first(asked: Documents, count: int) -> Documents:
    return asked._replace(contexts=asked.contexts[:count], choices=asked.choices[:count], answers=asked.answers[:count])


def speed(shape: Shape, task: str, data: str | None, count: int, rounds: int) -> dict:
    """Documents a second of ours and of the peer at each batch size, in turn, every other round backwards."""
    model, tokenizer = load(shape, data)
    asked = documents(task, count, data)
    written = not asked.choices[0]
    if shape.name == STORIES.name:
        asked = asked._replace(new_tokens=min(asked.new_tokens, 128))
    sides: dict[str, Callable[[Documents], list]] = {OURS: lambda these: ours(model, tokenizer, these)}
    for batch in WRITING if written else BATCHES:
        sides[str(batch)] = lambda these, batch=batch: peer(model, tokenizer, these, batch)
    found: dict[str, list[float]] = {name: [] for name in sides}
    results: dict[str, list] = {}
    lengths = as_long_as_the_right_answers(model, tokenizer, asked) if written and shape.name != STORIES.name else None
    with lengths or contextlib.nullcontext():
        for side in sides.values():
            side(first(asked, 2))
        for number in range(rounds):
            for name in list(sides)[:: 1 if number % 2 == 0 else -1]:
                begin = now()
                results[name] = sides[name](asked)
                found[name].append(count / (now() - begin))
    return {
        "model": shape.name,
        "task": task,
        "documents": len(asked.contexts),
        "real_rows": data is not None,
        "tokens": token_counts(tokenizer, asked),
        "rounds": found,
        "difference": max(difference(results[OURS], results[name]) for name in results),
    }


def difference(mine: list, theirs: list) -> float:
    """Largest difference of log-likelihoods; of texts the number that differ."""
    if isinstance(mine[0], str):
        return float(sum(a != b for a, b in zip(mine, theirs, strict=True)))
    return max(abs(a - b) for x, y in zip(mine, theirs, strict=True) for a, b in zip(x, y, strict=True))


def token_counts(tokenizer: Any, asked: Documents) -> dict[str, float]:
    """Mean tokens of a context, and of a choice or right answer."""
    ends = [choice for choices in asked.choices for choice in choices] or [f" {answer}" for answer in asked.answers]
    return {
        "context": statistics.mean(len(ids) for ids in tokenizer(asked.contexts)["input_ids"]),
        "ending": statistics.mean(len(ids) for ids in tokenizer(ends)["input_ids"]),
    }


def peak_memory(shape: Shape, data: str | None, count: int, side: str) -> dict:
    """Bytes of one HellaSwag run in this process: with the model loaded, and the most after that. A pass of either has
    EQUAL contexts with a choice."""
    from nbhelpers import memory, scoring

    asked = documents("hellaswag", count, data)
    tiny, small = load(TINY, data)  # libraries are loaded before memory is read
    ours(tiny, small, first(asked, 2)), peer(tiny, small, first(asked, 2), 2)
    model, tokenizer = load(shape, data)
    pairs = zip(asked.contexts, asked.choices, strict=True)
    longest = max(
        len(tree) for pair in pairs for tree in scoring.trees(scoring.question(tokenizer, *pair), 0, shape.positions)
    )
    with memory.peak() as mark:
        if side == OURS:
            ours(model, tokenizer, asked, batch_tokens=longest * EQUAL // 4)
        else:
            peer(model, tokenizer, asked, EQUAL)
    return {"before": mark.resident_before, "peak": mark.resident_peak}


def curve(shape: Shape, data: str | None, counts: Sequence[int], choices: Sequence[int], rounds: int) -> dict:
    """Seconds by number of HellaSwag documents, and of one context by number of choices of 20 tokens, both sides."""
    model, tokenizer = load(shape, data)
    asked = documents("hellaswag", max(counts), data)
    drawn = random.Random(SEED)
    words = [f" {word}" for text in asked.contexts for word in text.split()]
    many = [" " + "".join(drawn.choice(words) for _ in range(16)).strip() for _ in range(max(choices))]
    found = {"documents": [], "choices": []}
    for count in counts:
        found["documents"].append([count, *both(model, tokenizer, first(asked, count), rounds)])
    for count in choices:
        one = first(asked, 1)._replace(choices=[many[:count]])
        found["choices"].append([count, *both(model, tokenizer, one, rounds)])
    return {"model": shape.name, **found}


def both(model: Any, tokenizer: Any, asked: Documents, rounds: int) -> tuple[float, float]:
    """Median seconds of ours and of the peer."""
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for at, run in enumerate((lambda: ours(model, tokenizer, asked), lambda: peer(model, tokenizer, asked, 8))):
            begin = now()
            run()
            seconds[at].append(now() - begin)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def labels(shape: Shape, data: str | None, rounds: int, count: int = LABELS) -> dict:
    """Seconds to rank a closed label set, beside reading the context and the labels' own tokens once as plain text."""
    import torch

    from nbhelpers import losses, scoring

    model, _ = load(shape, data)
    drawn = random.Random(SEED)
    most = model.config.vocab_size - 1
    context = tuple(drawn.randrange(most) for _ in range(LABEL_CONTEXT))
    made = {tuple(drawn.randrange(most) for _ in range(LABEL_TOKENS)) for _ in range(count)}
    asked = scoring.Question(context, tuple(sorted(made)))
    own = torch.tensor([token for choice in asked.choices for token in choice[:-1]])  # the last one is not read
    ranked, plain = [], []

    def encode() -> None:
        """Context and labels' tokens as plain text, in rows of 500, a next token scored after each label token."""
        tokens = [torch.tensor(context), *own.split(500)]
        for row in tokens:
            places = [(0, at) for at in range(len(row))] if row is not tokens[0] else [(0, len(row) - 1)]
            losses.log_probabilities(model, {"input_ids": row[None]}, places, [(at, 1) for at in range(len(places))])

    with torch.inference_mode():
        for number in range(rounds + 1):
            begin = now()
            list(scoring.loglikelihoods(model, [asked]))
            middle = now()
            encode()
            if number:
                ranked.append(middle - begin)
                plain.append(now() - middle)
    return {
        "model": shape.name,
        "labels": len(asked.choices),
        "tokens": LABEL_TOKENS,
        "context": LABEL_CONTEXT,
        "ranked_seconds": ranked,
        "plain_seconds": plain,
        "ratio": ratios(ranked, plain),
    }


def run_child(job: list) -> dict:
    what, shape, *rest = job
    kinds = {"speed": speed, "memory": peak_memory, "curve": curve, "labels": labels}
    return kinds[what](Shape(**shape), *rest)


def measure(quick: bool, data: str | None) -> dict:
    """All cells; what `summarise` takes."""
    large = TINY if quick else GPT2
    rounds, again = (1, 1) if quick else (ROUNDS, MEMORY_ROUNDS)
    counts = dict.fromkeys(COUNTS, 2) if quick else COUNTS
    often = {task: max(1, rounds - (task == "gsm8k")) for task in TASKS}
    cells = [child("speed", large._asdict(), task, data, counts[task], often[task]) for task in TASKS]
    if data is not None:
        few = dict.fromkeys(COUNTS, 2) if quick else STORIES_COUNTS
        cells += [child("speed", STORIES._asdict(), task, data, few[task], often[task]) for task in TASKS]
    taken: dict[str, list[dict]] = {OURS: [], PEER: []}
    for _ in range(again):
        for side, found in taken.items():
            found.append(child("memory", large._asdict(), data, 2 if quick else EQUAL // 4, side))
    shown = TINY if data is None or quick else STORIES
    return {
        "cells": cells,
        "memory": {"model": large.name, "rounds": taken},
        "curve": child("curve", shown._asdict(), data, [2, 4] if quick else [4, 16, 64], [1, 2, 4, 16, 64], rounds),
        "labels": child("labels", large._asdict(), data, rounds, 50 if quick else LABELS),
    }


def summarise(found: dict) -> dict:
    """Medians over the rounds, the ratios of each round, and which promises were kept."""
    cells = []
    for cell in found["cells"]:
        medians = {name: statistics.median(values) for name, values in cell["rounds"].items()}
        others = [name for name in medians if name != OURS]
        against = {name: ratios(cell["rounds"][OURS], cell["rounds"][name]) for name in others}
        cells.append(
            cell
            | {
                "documents_per_second": medians,
                "ratios": against,
                "fastest": max(others, key=lambda name: medians[name]),
            }
        )
    grown = {side: [run["peak"] - run["before"] for run in runs] for side, runs in found["memory"]["rounds"].items()}
    held = found["memory"] | {
        "grown_bytes": {side: statistics.median(values) for side, values in grown.items()},
        "ratio": ratios(grown[OURS], grown[PEER]),
    }
    return found | {"cells": cells, "memory": held, "targets": targets(cells, held, found["labels"])}


def targets(cells: list[dict], held: dict, ranked: dict) -> list[dict]:
    """What was promised, for the GPT-2 shape, against the peer's fastest batch size and against its default."""
    speeds = []
    for cell in cells:
        if cell["model"] == STORIES.name:
            continue
        sides = {cell["fastest"]: f"at its fastest (batch {cell['fastest']})"}
        if DEFAULT in cell["ratios"]:
            sides.setdefault(DEFAULT, f"as it comes (batch {DEFAULT})")
        for name, said in sides.items():
            what = f"{TASKS[cell['task']]}, documents a second beside the peer {said}"
            speeds.append(target(what, ">=", WANTED[cell["task"]], cell["ratios"][name]["median"]))
    return [
        *speeds,
        target(
            "peak memory above the loaded model, HellaSwag at equal batch", "<=", WANTED_MEMORY, held["ratio"]["median"]
        ),
        target(
            f"ranking {ranked['labels']:,} labels beside reading context and labels once",
            "<=",
            WANTED_LABELS,
            ranked["ratio"]["median"],
        ),
    ]


# Text -----------------------------------------------------------------------------------------------------------------


def markdown(found: dict) -> str:
    """The README's section, every number from `found`."""
    machine, held = found["machine"], found["memory"]
    rows = "real rows" if found["cells"][0]["real_rows"] else "generated rows"
    large = found["cells"][0]
    intro = (
        f"nbhelpers and lm-evaluation-harness {machine['lm_eval']} (its `hf` model) on one model in memory and the "
        f"same {rows}, on {machine['processor']}, {machine['device']}, threads: {machine['threads']}, "
        f"{machine['precision']}, torch {machine['torch']}, transformers {machine['transformers']}. "
        f"Documents a second: medians of {found['rounds']} rounds in turn, after a warm-up; the ratio is the median "
        "of the rounds' ratios, with the least and the greatest. Batch: contexts with one choice, or prompts, in a "
        f"pass of the harness. Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/evaluation.json](benchmarks/results/evaluation.json)."
    )
    lines = [
        intro,
        "",
        "| model | task | documents | harness, by batch | nbhelpers | ratio to its fastest |",
        "|---|---|---|---|---|---|",
        *(speed_line(cell) for cell in found["cells"]),
        "",
        *(target_line(one, wanted=".2g") for one in found["targets"]),
        "",
        (
            f"Memory above the loaded model, {held['model']}, HellaSwag, {EQUAL} contexts with a choice in a pass of "
            f"either: {held['grown_bytes'][PEER] / 1e6:,.0f} MB the harness, {held['grown_bytes'][OURS] / 1e6:,.0f} MB "
            f"nbhelpers ({held['ratio']['median']:.2f})."
        ),
        "",
        *curve_lines(found["curve"]),
        "",
        (
            f"Tokens of the first model's HellaSwag: context {large['tokens']['context']:.0f}, ending "
            f"{large['tokens']['ending']:.0f}, by a BPE tokenizer trained on the tasks' rows and generated text. "
            "Texts of its GSM8K are as long as the right answers: random weights would write on. Largest difference of "
            "a log-likelihood in these runs: "
            f"{max(cell['difference'] for cell in found['cells'] if cell['task'] != 'gsm8k'):.1e} nats; texts that "
            f"differ: {sum(cell['difference'] for cell in found['cells'] if cell['task'] == 'gsm8k'):.0f}."
        ),
        "Not measured: " + "; ".join(f"{name} ({why})" for name, why in found["not_measured"].items()) + ".",
    ]
    return "\n".join(lines) + "\n"


def speed_line(cell: dict) -> str:
    speeds = cell["documents_per_second"]
    others = ", ".join(f"{speeds[name]:.2f} ({name})" for name in speeds if name != OURS)
    ratio = cell["ratios"][cell["fastest"]]
    slower = "" if ratio["median"] >= 1 else " slower"
    return (
        f"| {cell['model']} | {TASKS[cell['task']]} | {cell['documents']} | {others} | {speeds[OURS]:.2f} | "
        f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{slower} |"
    )


def curve_lines(found: dict) -> list[str]:
    def row(name: str, values: list) -> list[str]:
        heads = " | ".join(str(value[0]) for value in values)
        return [
            f"| {name} | {heads} |",
            "|---|" + "---|" * len(values),
            "| harness, seconds | " + " | ".join(f"{value[2]:.2f}" for value in values) + " |",
            "| nbhelpers, seconds | " + " | ".join(f"{value[1]:.2f}" for value in values) + " |",
        ]

    return [
        f"How cost grows ({found['model']}): HellaSwag documents, and choices of about 20 words after one context.",
        "",
        *row("documents", found["documents"]),
        "",
        *row("choices", found["choices"]),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: does it run?")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--data", default=os.environ.get("NBHELPERS_TEST_DATA"))
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if options.child:
        print(json.dumps(run_child(json.loads(options.child))))
        return

    import torch

    here = machine("transformers", "lm_eval", precision="float32")
    data = None if options.data is None else str(Path(options.data).resolve())
    why = "this benchmark has no run for it yet" if torch.cuda.is_available() else "no GPU here"
    found = measure(options.quick, data) | {
        "machine": here,
        "rounds": 1 if options.quick else ROUNDS,
        "not_measured": {"1B to 8B shapes in bfloat16 and 4 bits": why},
    }
    found = summarise(found)
    text = markdown(found)
    out = options.out or (None if options.quick else RESULTS)
    publish("evaluation", found, text, out, options.readme, MARK)


if __name__ == "__main__":
    main()
