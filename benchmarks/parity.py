"""Do our numbers equal those of lm-evaluation-harness, document by document?

    python benchmarks/parity.py [--quick] [--data FOLDER] [--out benchmarks/results] [--readme README.md]

The harness's own tasks on local rows, by its own `hf` model and by `nbhelpers.evaluation` on one model in memory: the
same prompts, the largest difference of a log-likelihood, predictions that differ, accuracies. Needs the extra `lmeval`
and the folder of data (NBHELPERS_TEST_DATA). Writes parity.json and parity.md; --quick takes few rows and writes
nothing unless --out is given.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import logging
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measuring import RESULTS, publish

LIMIT = 1e-3  # nats: what was promised for float32
BATCH = 16
FILES = {"boolq": "boolq_dev.jsonl", "hellaswag": "hellaswag_val.jsonl", "gsm8k": "gsm8k_test.jsonl"}
SHOTS = {"gsm8k": "gsm8k_train.jsonl"}
OF_HARNESS = {"boolq": "super_glue/boolq/default.yaml", "hellaswag": "hellaswag/hellaswag.yaml"}
OF_HARNESS |= {"gsm8k": "gsm8k/gsm8k.yaml"}
ROWS = {"boolq": 200, "hellaswag": 200, "gsm8k": 16}
QUICK = {"boolq": 8, "hellaswag": 8, "gsm8k": 3}
NEW_TOKENS, SHORT = 256, 64  # most tokens written; of models that have no room for as many as the task says
STORIES = "stories260K"
CLOSED = "half of its heads closed"
COMMAND = "python benchmarks/parity.py --readme README.md"
MARK = "<!-- parity: made by benchmarks/parity.py -->"
KEYS = {"exact_match_strict": "exact_match,strict-match", "exact_match_flexible": "exact_match,flexible-extract"}


# The harness's side ---------------------------------------------------------------------------------------------------


def task_folder(folder: Path, files: Mapping[str, Path], shots: Mapping[str, Path] | None = None) -> Path:
    """Task files for the harness: its own tasks, their rows read from local files. Returns the folder."""
    import lm_eval

    tasks = Path(lm_eval.__file__).parent / "tasks"
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        splits = {"validation": str(_with_labels(path, folder)), "test": str(path)}
        splits = {"test": splits["test"]} if name == "gsm8k" else {"validation": splits["validation"]}
        if shots and name in shots:
            splits["train"] = str(shots[name])
        told = [
            f"include: {tasks / OF_HARNESS[name]}",
            f"task: local_{name}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {json.dumps({'data_files': splits})}",
            *([] if "train" in splits else ["training_split: null"]),
        ]
        (folder / f"local_{name}.yaml").write_text("\n".join(told) + "\n")
    return folder


def _with_labels(path: Path, folder: Path) -> Path:
    """The rows with BoolQ's `answer` as the `label` that the hub's data set has."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [row | {"label": int(row["answer"])} if isinstance(row.get("answer"), bool) else row for row in rows]
    made = folder / path.name
    made.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return made


def harness(model: Any, tokenizer: Any, task: str, folder: Path, limit: int | None, batch: int = BATCH) -> dict:
    """{"results", "documents": [{prompt, loglikelihoods | text, metrics}]} of the harness's own hf model."""
    from lm_eval.models.huggingface import HFLM

    with quiet():
        peer = HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=batch)  # it gives it a pad token
    return run_harness(peer, task, folder, limit)


def run_harness(peer: Any, task: str, folder: Path, limit: int | None) -> dict:
    """The same of any of the harness's models that holds one in memory as `.model`."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    options = {"gen_kwargs": {"max_gen_toks": new_tokens(peer.model)}} if task == "gsm8k" else {}
    with quiet():
        found = lm_eval.simple_evaluate(
            peer,
            tasks=[f"local_{task}"],
            limit=limit,
            bootstrap_iters=0,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            **options,
        )
    return told(found, f"local_{task}")


def told(found: dict, name: str) -> dict:
    """The harness's result, one entry a document."""
    documents: dict[int, dict] = {}
    for sample in found["samples"][name]:
        entry = documents.setdefault(sample["doc_id"], {"metrics": {}})
        arguments = sample["arguments"]
        requests = list(arguments.values()) if isinstance(arguments, dict) else list(arguments)
        entry["prompt"] = requests[0]["arg_0"] if isinstance(requests[0], dict) else requests[0][0]
        if len(sample["resps"]) > 1:
            entry["loglikelihoods"] = [float(answer[0][0]) for answer in sample["resps"]]
        else:
            entry["text"] = sample["resps"][0][0]
        suffix = "" if sample["filter"] == "none" else f",{sample['filter']}"
        for metric in sample["metrics"]:
            entry["metrics"][f"{metric}{suffix}"] = float(sample[metric])
    return {"results": found["results"][name], "documents": [documents[at] for at in sorted(documents)]}


@contextlib.contextmanager
def quiet():
    """Neither progress bars nor log lines of the harness."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


def new_tokens(model: Any) -> int:
    """Most tokens that both sides write after a word problem."""
    from nbhelpers import scoring

    return NEW_TOKENS if scoring.longest_text(model) > 1.5 * NEW_TOKENS else SHORT


# Ours, and both beside each other -------------------------------------------------------------------------------------


def ours(model: Any, tokenizer: Any, task: str, path: Path, shots: Path | None, limit: int | None) -> dict:
    """{"results", "documents"} of nbhelpers.evaluation, named as the harness names them."""
    from dataclasses import replace

    from nbhelpers import evaluation

    rows, asked = evaluation.questions(task, path, shots=None, shots_data=shots, limit=limit)
    told = replace(rows.task, new_tokens=new_tokens(model)) if task == "gsm8k" else rows.task
    lines = dict(evaluation.answered(model, tokenizer, told, asked))
    lines = [lines[number] for number in range(len(asked))]
    found = evaluation.measures(lines, rows.task.metrics)
    documents = [
        {
            "prompt": one.context,
            "metrics": {KEYS.get(name, name): _outcome(line, name) for name in rows.task.metrics},
            **{name: line[name] for name in ("loglikelihoods", "text") if name in line},
        }
        for one, line in zip(asked, lines, strict=True)
    ]
    return {
        "results": {KEYS.get(name, f"{name},none"): found[name] for name in rows.task.metrics},
        "documents": documents,
    }


def _outcome(line: Mapping[str, Any], metric: str) -> float:
    names = {"acc": "prediction", "acc_norm": "prediction_norm"}
    if metric in names:
        return float(line[names[metric]] == line["gold"])
    return float(line[metric.removeprefix("exact_match_")])


def compare(mine: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, Any]:
    """rows; prompts and texts that differ; max |difference| in nats; flips: predictions that differ; both's metrics."""
    pairs = list(zip(mine["documents"], theirs["documents"], strict=True))
    choices = [(a["loglikelihoods"], b["loglikelihoods"]) for a, b in pairs if "loglikelihoods" in a]
    delta = [abs(x - y) for a, b in choices for x, y in zip(a, b, strict=True)]
    best = [a.index(max(a)) != b.index(max(b)) for a, b in choices]
    flips = [
        any(a["metrics"][name] != b["metrics"][name] for name in a["metrics"]) or (bool(best) and best[at])
        for at, (a, b) in enumerate(pairs)
    ]
    return {
        "rows": len(pairs),
        "prompts_differ": sum(a["prompt"] != b["prompt"] for a, b in pairs),
        "texts_differ": sum(a.get("text") != b.get("text") for a, b in pairs),
        "delta": max(delta) if delta else None,
        "flips": sum(flips),
        "metrics": {name: [value, theirs["results"][name]] for name, value in mine["results"].items()},
    }


def equal(found: Mapping[str, Any]) -> bool:
    """Whether what was promised holds."""
    close = found["delta"] is None or (math.isfinite(found["delta"]) and found["delta"] <= LIMIT)
    same = all(abs(a - b) < 1e-9 for a, b in found["metrics"].values())
    return close and same and not (found["flips"] or found["prompts_differ"])


def pair(model: Any, tokenizer: Any, task: str, folder: Path, data: Path, limit: int | None) -> dict[str, Any]:
    """One task on one model, both ways."""
    shots = data / SHOTS[task] if task in SHOTS else None
    theirs = harness(model, tokenizer, task, folder, limit)
    return compare(ours(model, tokenizer, task, data / FILES[task], shots, limit), theirs)


# Measuring ------------------------------------------------------------------------------------------------------------


def model_names() -> list[str]:
    from nbhelpers import models

    return [*models.bundled_names(), STORIES, f"{STORIES}, {CLOSED}"]


def load(name: str, data: Path) -> Any:
    """A LoadedModel in float32 on the CPU."""
    from nbhelpers import attention, models

    known, _, closed = name.partition(", ")
    loaded = models.load_model(
        str(data / "models" / "stories260K-hf") if known == STORIES else known, device="cpu", dtype="float32"
    )
    if closed:
        geo = attention.model_geometry(loaded.model)
        heads = [(layer, head) for layer in range(geo.layers) for head in range(layer % 2, geo.heads, 2)]
        attention.close_heads(loaded.model, heads)
    return loaded


def measure(data: Path, rows: Mapping[str, int], names: Sequence[str]) -> list[dict]:
    cells = []
    with tempfile.TemporaryDirectory() as place:
        files = {task: data / name for task, name in FILES.items()}
        folder = task_folder(Path(place) / "tasks", files, {task: data / name for task, name in SHOTS.items()})
        for name in names:
            loaded = load(name, data)
            for task, limit in rows.items():
                found = pair(loaded.model, loaded.tokenizer, task, folder, data, limit)
                cells.append({"model": name, "task": task, **found, "equal": equal(found)})
    return cells


def markdown(found: Mapping[str, Any]) -> str:
    """The README's section, every number from `found`."""
    cells = found["cells"]
    wrong = [cell for cell in cells if not cell["equal"]]
    intro = (
        f"lm-evaluation-harness {found['versions']['lm_eval']} (its own tasks, its `hf` model) and nbhelpers on one "
        "model in memory, float32, CPU, first rows of real BoolQ, HellaSwag and GSM8K. Promised: the same prompts, "
        f"predictions and measures, log-likelihoods within {LIMIT:g} nats. "
        f"{len(cells) - len(wrong)} of {len(cells)} cells keep it. Made by `{COMMAND}`; all numbers are in "
        "[benchmarks/results/parity.json](benchmarks/results/parity.json)."
    )
    lines = [
        intro,
        "",
        "| model | task | rows | prompts that differ | largest difference, nats | flips | ours | harness |",
        "|---|---|---|---|---|---|---|---|",
        *(line(cell) for cell in cells),
        "",
        texts(cells),
    ]
    return "\n".join(lines) + "\n"


def line(cell: Mapping[str, Any]) -> str:
    delta = "no log-likelihoods" if cell["delta"] is None else f"{cell['delta']:.1e}"
    mine, theirs = (" / ".join(f"{values[side]:.4f}" for values in cell["metrics"].values()) for side in (0, 1))
    told = "" if cell["equal"] else " NOT equal"
    return (
        f"| {cell['model']} | {cell['task']} | {cell['rows']} | {cell['prompts_differ']} | {delta} | "
        f"{cell['flips']}{told} | {mine} | {theirs} |"
    )


def texts(cells: Sequence[Mapping[str, Any]]) -> str:
    written = [cell for cell in cells if cell["delta"] is None]
    differ = sum(cell["texts_differ"] for cell in written)
    return (
        "BoolQ: accuracy. HellaSwag: acc / acc_norm. GSM8K: exact match, strict / flexible; of "
        f"{sum(cell['rows'] for cell in written)} texts written, {differ} differ in some letter."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rows of two models: does it run?")
    parser.add_argument("--data", default=os.environ.get("NBHELPERS_TEST_DATA", "data"))
    parser.add_argument("--out")
    parser.add_argument("--readme")
    options = parser.parse_args()

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    import lm_eval
    import torch
    import transformers

    names = [model_names()[1], STORIES] if options.quick else model_names()
    found = {
        "cells": measure(Path(options.data).resolve(), QUICK if options.quick else ROWS, names),
        "versions": {
            "lm_eval": lm_eval.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    out = options.out or (None if options.quick else RESULTS)
    publish("parity", found, markdown(found), out, options.readme, MARK)


if __name__ == "__main__":
    main()
