"""The 360 cells of the classic plan as rows made up for tests: plausible curves, with holes and failures on request."""

from __future__ import annotations

import random

from nbhelpers.sparsity_results import ResultRow, judged

MODES = ("sparse_to_dense", "sparse_to_sparse")
MODELS = ("tiny-llama", "tiny-gpt2")
CHANCE = {"boolq": 0.5, "hellaswag": 0.25, "gsm8k": None}
METHODS = {"unstructured": ("unstructured", "magnitude"), "structured": ("structured", "magnitude")}
METHODS |= {"random": ("unstructured", "random")}
KNEE = {"unstructured": 0.75, "structured": 0.45, "random": 0.35}
LEVELS = tuple(tenth / 10 for tenth in range(10))


def full_grid(missing=(), failed=(), models=MODELS, tasks=tuple(CHANCE), methods=tuple(METHODS)) -> list[ResultRow]:
    """missing, failed: (method, sparsity, mode) that no model and task has."""
    dice, rows = random.Random(0), []
    cells = [(m, t, how, s, mode) for m in models for t in tasks for how in methods for s in LEVELS for mode in MODES]
    for number, (model, task, method, sparsity, mode) in enumerate(cells, 1):
        pattern, importance = METHODS[method]
        told = {"row": number, "model": model, "task": task, "method": method, "pattern": pattern, "scope": "layer"}
        told |= {"importance": importance, "mode": mode, "sparsity": sparsity, "seed": 0, "job": f"j{number:03}"}
        told |= {"alias": sparsity == 0 and (method, mode) != (methods[0], MODES[0]), "status": "planned"}
        if (method, sparsity, mode) in failed:
            told |= {"status": "diverged", "failure": "diverged", "error": "loss is not finite"}
        elif (method, sparsity, mode) not in missing:
            told |= _measured(dice, task, method, sparsity, mode)
        rows.append(ResultRow(**told))
    for row in rows:  # what an alias says is what its job said
        if row.alias:
            job = next(one for one in rows if (one.model, one.task) == (row.model, row.task))
            names = ("tuned", "tuned_low", "tuned_high", "masked", "tokens_per_second", "job")
            rows[row.row - 1] = row.model_copy(update={name: getattr(job, name) for name in names})
    return judged(rows, 0.02)


def _measured(dice: random.Random, task: str, method: str, sparsity: float, mode: str) -> dict:
    floor = CHANCE[task] or 0.0
    top = {"boolq": 0.93, "hellaswag": 0.84, "gsm8k": 0.78}[task]
    over = max(0.0, sparsity - KNEE[method]) / (1 - KNEE[method])
    fill = 0.5 if mode == MODES[0] else 1.0
    tuned = floor + (top - floor) * (1 - fill * over**1.3) + dice.uniform(-0.012, 0.012)
    masked = max(0.0, floor + (0.8 * top - floor) * max(0.0, 1 - 2.2 * sparsity) + dice.uniform(-0.02, 0.02))
    half = 1.96 * (tuned * (1 - tuned) / 500) ** 0.5
    told = {"status": "finished", "metric": "exact_match_strict" if task == "gsm8k" else "acc", "n": 500}
    told |= {"chance": CHANCE[task], "generated": True, "dense": 0.8 * top, "masked": masked, "tuned": tuned}
    told |= {"tuned_low": tuned - half, "tuned_high": tuned + half, "all_facts_hold": True, "merge_violations": 0}
    speed = dice.gauss(12_000 if mode == MODES[0] else 11_000, 500)
    return told | {"tokens_per_second": speed, "validation_nll": dice.random()}
