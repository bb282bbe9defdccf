"""What does a training show, step by step? Its curves and events, heard while it runs or read from its record.

A training is a dict of lists: a curve is [(step, value), ...], `samples` is [(step, text), ...], `events` are dicts
with `kind` and `step`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers.runs import Run, read_run

# curve -> (its name in a report of progress, its name in metrics.jsonl)
CURVES = {
    "train_losses": ("train_loss", "train_loss"),
    "validation_nlls": ("validation_nll", "val_loss"),
    "learning_rates": ("learning_rate", "learning_rate"),
    "tokens_per_second": ("tokens_per_second", "tokens_per_sec"),
    "resident_bytes": ("resident_bytes", "resident_bytes"),
    "cuda_bytes": ("cuda_bytes", "cuda_bytes"),
}
LEAST_SHARED = 200  # letters that samples must share before their beginning is said once instead of in each


def empty(steps: int = 1) -> dict[str, Any]:
    """A training of which nothing was seen yet. steps: those it is to make."""
    return {"steps": steps, **{name: [] for name in CURVES}, "samples": [], "events": []}


def hear(curve: dict[str, Any], now: Mapping[str, Any]) -> None:
    """Add one report of progress; what it does not hold is left out."""
    step = now["step"]
    curve["steps"] = now.get("steps", curve["steps"])
    for name, (key, _) in CURVES.items():
        if now.get(key) is not None:
            curve[name].append((step, now[key]))
    if now.get("sample"):  # one that comes without a validation was written before the first step
        curve["samples"].append((step if now.get("validation_nll") is not None else 0, now["sample"]))
    curve["events"] += [{"step": step, **event} for event in now.get("events") or ()]


def copied(curve: Mapping[str, Any]) -> dict[str, Any]:
    """The training as it is now."""
    return {name: list(values) if isinstance(values, list) else values for name, values in list(curve.items())}


def read(run: Run | str | os.PathLike, until: Mapping[str, int] | None = None) -> dict[str, dict[str, Any]]:
    """{stage: training} from a run directory, also one that is being written.

    until: {stage: last step} to read, as a resumed run will have it; what comes after is left out.
    """
    run = run if isinstance(run, Run) else read_run(Path(run))
    found: dict[str, dict[str, Any]] = {}
    for row in run.metrics:
        stage, step = row.get("stage"), row["iteration"]
        if stage is None or (until is not None and step > until.get(stage, -1)):
            continue
        curve = found.setdefault(stage, empty(run.config.get("steps", 1)))
        for name, (_, key) in CURVES.items():
            if row.get(key) is not None:
                curve[name].append((step, row[key]))
    for stage, curve in found.items():
        rows = [row for row in run.metrics if row.get("stage") == stage]
        for event in run.events:
            step = _step_of(event, rows)
            if event.get("stage") != stage or (until is not None and step > until[stage]):
                continue
            if event["kind"] == "sample":
                curve["samples"].append((step, event["text"]))
            else:
                curve["events"].append({**event, "step": step})
        curve["samples"] = sorted(dict(curve["samples"]).items())  # a step taken again by a resumed run counts once
    return found


def _step_of(event: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> int:
    """The step of an event; of one that does not say, the first that was logged after it."""
    if event.get("step") is not None:
        return event["step"]
    when = event.get("wallclock_time", 0.0)
    later = [row["iteration"] for row in rows if row.get("wallclock_time", 0.0) >= when]
    return later[0] if later else max((row["iteration"] for row in rows), default=0)


def marks(curve: Mapping[str, Any]) -> list[tuple[int, str, str]]:
    """(step, kind, a word or two) of the events that are marked in a figure, in their order.

    Each kind once a step; steps in a row that were not finite are one mark.
    """
    short = {
        "oom": lambda e: f"memory: {_sizes(e)}",
        "non_finite": lambda e: "not finite",
        "restored": lambda e: "restored",
        "resume": lambda e: "resumed",
        "early_stop": lambda e: "ended early",
    }
    found = {
        (e["step"], e["kind"]): (e["step"], e["kind"], short[e["kind"]](e))
        for e in curve["events"]
        if e["kind"] in short
    }
    ordered, joined = sorted(found.values(), key=lambda mark: mark[0]), []
    for step, kind, word in ordered:
        if joined and joined[-1][1] == kind == "non_finite" and step == joined[-1][0] + joined[-1][3]:
            joined[-1][3] += 1
        else:
            joined.append([step, kind, word, 1])
    return [(step, kind, word + (f" ({count} steps)" if count > 1 else "")) for step, kind, word, count in joined]


def _sizes(event: Mapping[str, Any]) -> str:
    before = event.get("from_micro_batch_size", event.get("from_batch_size", "?"))
    return f"{before} to {event.get('to_micro_batch_size', event.get('to_batch_size', '?'))}"


def in_words(event: Mapping[str, Any]) -> str:
    """What happened, as one sentence that says what was done about it; empty for what need not be told.

    >>> in_words({"kind": "oom", "step": 7, "where": "training", "from_micro_batch_size": 8, "to_micro_batch_size": 4})
    'step 7: memory ran out, so batches are cut smaller (8 to 4 windows a pass); the effective batch stays the same'
    >>> in_words({"kind": "checkpoint", "step": 7})
    ''
    """
    step = f"step {event.get('step')}"
    match event["kind"]:
        case "oom" if event.get("where") == "validation":
            return f"{step}: memory ran out while validating, so batches are cut smaller ({_sizes(event)} windows)"
        case "oom":
            return (
                f"{step}: memory ran out, so batches are cut smaller ({_sizes(event)} windows a pass); "
                "the effective batch stays the same"
            )
        case "non_finite" if event.get("where") == "validation":
            return f"{step}: the validation loss was not finite, so this validation does not count"
        case "non_finite":
            return f"{step}: loss or gradient was not finite (NaN or infinite), so the step was left out"
        case "overflow":
            return f"{step}: half precision overflowed, so the step was left out and the loss scale lowered"
        case "restored":
            return (
                f"{step}: too many such steps in a row, so the state of step {event.get('from_step')} was restored and "
                "the learning rate halved"
            )
        case "resume":
            return f"went on from the checkpoint of step {event.get('step')}"
        case "early_stop":
            return f"{step}: ended early, the best validation was at step {event.get('best_step')}"
        case "best_restored":
            return f"after {step} the weights of step {event.get('best_step')} were kept, the best validation"
        case "packing_off":
            return f"short rows are trained on one by one, not packed: {event.get('reason')}"
        case "stopped":
            return f"stopped after {step}"
    return ""


def told(curve: Mapping[str, Any]) -> list[str]:
    """The events of a training in words, equal ones once."""
    return list(dict.fromkeys(filter(None, map(in_words, curve["events"]))))


def beginning(samples: Sequence[str]) -> tuple[str, list[str]]:
    """(what all samples begin with, what follows it in each); ("", samples) where they share little.

    The beginning ends where a word ends, so that no word is cut in two.
    """
    first, last = min(samples, default=""), max(samples, default="")
    same = next((at for at, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    shared = first[:same] if first != last else ""
    end = max(shared.rfind(letter) for letter in (" ", "\n")) + 1
    if end < LEAST_SHARED:
        return "", list(samples)
    return shared[:end].rstrip(), [sample[end:].strip() for sample in samples]
