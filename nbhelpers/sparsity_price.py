"""What will a sparsity sweep do and leave in all? Trainings, evaluations, loads, scorings, downloads and disk, counted
from the plan alone. Only for planning: no number from here stands in a result.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from nbhelpers import catalogue, estimates, importance, mask_selection, mask_sets, models, tasks
from nbhelpers.catalogue import DTYPE_BYTES

ANSWER_BYTES = 150  # of one document in predictions.jsonl
STEP_BYTES = 300  # of one optimizer step in metrics.jsonl
RUN_BYTES = 60_000  # of a run directory without answers and steps
ADAPTER_BYTES = 12  # of a trained number in a checkpoint: float32, with AdamW's two moments
Config = Mapping[str, Any]


def price(configs: Sequence[Config]) -> dict[str, Any]:
    """What one process does that carries the jobs out in this order, and what the runs leave.

    Answers before tuning are kept, so each is counted once; one model is held. downloads: bytes of each model of the
    hub; disk_bytes: of the runs, their masks and answers, without the downloads. None: not known before.
    """
    masked = [config for config in configs if config["sparsity"]]
    asked = ("model", "task", "data", "limit", "shots", "dtype")
    how = ("pattern", "importance", "scope", "dimension", "seed")
    looks = {name: importance.needs_data(name) for name in {config["importance"] for config in masked}}
    dense, masked_alone, scored = _distinct(configs, asked), set(), set()
    for config in masked:
        seeded = looks[config["importance"]] or config["importance"] == "random"
        same = [config[name] for name in how if name != "seed" or seeded]
        masked_alone.add((*(config[name] for name in asked), *same, config["sparsity"]))
        scored.add((config["model"], *same, looks[config["importance"]] and config["task"]))
    loads = sum(one["model"] != before["model"] for before, one in itertools.pairwise(configs)) + bool(configs)
    trainings = sum(config["tuning"] == "lora" for config in configs)
    return {
        "trainings": trainings,
        "evaluations": trainings + len(dense) + len(masked_alone),
        "loads": loads,
        "scorings": len(scored),
        "downloads": {name: _download(name) for name in sorted({c["model"] for c in configs}) if _is_on_hub(name)},
        "disk_bytes": _disk(configs, scored),
    }


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


def _disk(configs: Sequence[Config], scored: set) -> int | None:
    """Records, one set of packed masks a scoring, a checkpoint a training while it runs, models that are kept."""
    total, shapes = 0, {name: _shape(name) for name in {config["model"] for config in configs}}
    asked = {one: documents(*one) for one in _distinct(configs, ("task", "data", "limit"))}
    if None in shapes.values() or None in asked.values():
        return None
    levels = {config["sparsity"] for config in configs if config["sparsity"]} | set(mask_sets.USUAL)
    for model, *_ in scored:
        total += shapes[model].quantised * mask_selection.bits_for(len(levels)) // 8
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
    """How many documents are asked; of the hub's rows that many are known where a limit says so."""
    if source is None:
        return limit
    try:
        return len(tasks.read(task, source, limit=limit).rows)
    except (LookupError, ValueError, OSError):
        return None
