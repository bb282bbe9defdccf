"""What will a sparsity sweep do and leave in all? Trainings, evaluations, loads, scorings, downloads and disk, counted
from the plan alone. Only for planning: no number from here stands in a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from nbhelpers import catalogue, estimates, importance, mask_selection, mask_sets, models, tasks
from nbhelpers.catalogue import DTYPE_BYTES
from nbhelpers.mask_sets import in_sets

ANSWER_BYTES = 150  # of one document in predictions.jsonl
STEP_BYTES = 300  # of one optimizer step in metrics.jsonl
RUN_BYTES = 60_000  # of a run directory without answers and steps
ADAPTER_BYTES = 12  # of a trained number in a checkpoint: float32, with AdamW's two moments
HUB_DOCUMENTS = {"boolq": 3_270, "hellaswag": 10_042, "gsm8k": 1_319}  # evaluation rows, by each data set's card
CALIBRATION = ("task", "data", "train_data", "window", "calibration_rows")  # that rows to score on come from, and seed
Config = Mapping[str, Any]


def price(configs: Sequence[Config]) -> dict[str, Any]:
    """What one process does that carries the jobs out in this order, and what the runs leave.

    Answers before tuning are kept, so each is counted once; one model is held. downloads: bytes of each model of the
    hub; disk_bytes: of the runs, their masks and answers, without the downloads. None: not known before. notes: what
    is planned with, and what is not known, in words. LookupError, ValueError: a file of rows that cannot be read.
    """
    asked = ("model", "task", "data", "limit", "shots", "dtype")
    dense, masked_alone, ranked = _distinct(configs, asked), set(), {}
    for config in configs:
        if config["sparsity"]:
            how = ranking(config)
            masked_alone.add((*(config[name] for name in asked), how, config["sparsity"]))
            ranked.setdefault((config["model"], config["pattern"], how), set()).add(config["sparsity"])
    scored = [(model, made) for (model, pattern, _), found in ranked.items() for made in in_sets(pattern, found)]
    loads = sum(one["model"] != before["model"] for before, one in itertools.pairwise(configs)) + bool(configs)
    trainings = sum(config["tuning"] == "lora" for config in configs)
    return {
        "trainings": trainings,
        "evaluations": trainings + len(dense) + len(masked_alone),
        "loads": loads,
        "scorings": len(scored),
        "downloads": {name: _download(name) for name in sorted({c["model"] for c in configs}) if _is_on_hub(name)},
        "disk_bytes": _disk(configs, scored),
        "notes": _notes(configs),
    }


def ranking(config: Config) -> tuple:
    """What decides in which order the weights of a job go: jobs of equal ranking share their scoring."""
    wanted = mask_sets.Wanted.of(SimpleNamespace(**config))
    decide = ("model", "dtype", "device", *(CALIBRATION if importance.needs_data(wanted.importance) else ()))
    return (*(config.get(name) for name in decide), *vars(wanted).values())


def _notes(configs: Sequence[Config]) -> list[str]:
    told = []
    for name in sorted({config["model"] for config in configs}):
        if _shape(name) is None:
            told.append(f"{name} is not in the catalogue and not here: its download and what it takes on disk are open")
        elif _is_on_hub(name) and (entry := catalogue.entry(name)).gated is not False:
            told.append(f"{name} ({entry.licence}) {entry.note}")
    on_hub = sorted({config["task"] for config in configs if config["data"] is None})
    if known := [f"{task} {HUB_DOCUMENTS[task]:,}" for task in on_hub if task in HUB_DOCUMENTS]:
        told.append(f"evaluation rows on the hub, by the card of each data set: {', '.join(known)}")
    return told


def _distinct(configs: Sequence[Config], names: Sequence[str]) -> set[tuple]:
    return {tuple(config[name] for name in names) for config in configs}


def _is_on_hub(name: str) -> bool:
    try:
        return models.locate(name)[0] == "hub"
    except (LookupError, ValueError):  # said by the job itself
        return False


def _download(name: str) -> int | None:
    try:
        return catalogue.entry(name).download_bytes
    except LookupError:
        return None


def _disk(configs: Sequence[Config], scored: Sequence[tuple[str, list[float]]]) -> int | None:
    """Records, one set of packed masks a scoring, a checkpoint a training while it runs, models that are kept."""
    total, shapes = 0, {name: _shape(name) for name in {config["model"] for config in configs}}
    asked = {one: documents(*one) for one in _distinct(configs, ("task", "data", "limit"))}
    if None in shapes.values() or None in asked.values():
        return None
    for model, made in scored:
        total += shapes[model].quantised * mask_selection.bits_for(len(made)) // 8
    for config in configs:
        shape, answered = shapes[config["model"]], asked[config["task"], config["data"], config["limit"]]
        total += RUN_BYTES + 2 * answered * ANSWER_BYTES  # before tuning, in the cache, and after it
        if config["tuning"] == "lora":
            total += config["steps"] * STEP_BYTES
            if config["checkpoint_every"]:
                total += config["lora_rank"] * shape.adapter_width * ADAPTER_BYTES
        if config["keep_model"]:
            total += shape.parameters * DTYPE_BYTES.get(config["dtype"], 4)
    return total


@lru_cache
def _shape(name: str) -> estimates.Shape | None:
    try:
        if _is_on_hub(name):
            return catalogue.entry(name).shape
        return estimates.shape_of(models.load_config(name))
    except (LookupError, ValueError):
        return None


@lru_cache
def documents(task: str, source: str | None, limit: int | None) -> int | None:
    """How many documents are asked; of the hub's rows by the card of the data set, or None where there is none here.
    Errors of `tasks.read` for a file that cannot be read."""
    if source is None:
        whole = HUB_DOCUMENTS.get(task)
        return limit if whole is None else min(limit or whole, whole)
    return len(tasks.read(task, source, limit=limit).rows)
