"""What does a thousand dialogues cost with each model, and after how many has fine-tuning paid for itself?

From measured seconds and the price that the user names; without a price there are hours and no money.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

DIALOGUES = 1000
HOUR = 3600
WRITTEN = "exact_match_accuracy"  # the headline where texts were timed, and not rankings


def table(
    entries: Mapping[str, Mapping[str, Any]],
    *,
    headline: str,
    device: str,
    price_per_gpu_hour: float | None = None,
    currency: str = "",
    phases: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Rows of models and, for each tuned model against each large one, the dialogues until tuning has paid.

    entries: results.json, key -> entry; of each are read "model", "performance" (seconds_per_dialogue, spread, came),
    "training_metrics" (seconds) and the headline measure. device: in words, what the seconds were measured on.
    price_per_gpu_hour: of that device, in `currency`, or None. phases: of the run, {"model": key, "came"}: whether it
    asked or took answers from before, which an entry does not know.

    Tuning has paid after tuning seconds / (seconds a dialogue of the large model - of the tuned one) dialogues: the
    price falls out, as both run on the same device. Reading a prompt in batches or one by one is what was measured.
    Where the spreads of the two rates (see label_answers.Speed) overlap, nothing is said; a rate without one is one
    measurement. A machine is not as fast at one time as at another, which no spread within a measurement shows: a
    model that was timed before and after its tuning computes the same, so the times by which these differ, "drift",
    count to the spread of every pair. A model is never held against itself.
    """
    if price_per_gpu_hour is not None and not (math.isfinite(price_per_gpu_hour) and price_per_gpu_hour >= 0):
        raise ValueError(
            f"price_per_gpu_hour must be at least 0, got {price_per_gpu_hour}: leave it out for hours alone"
        )
    came = {phase["model"]: phase.get("came") for phase in phases}
    rows = [_row(key, entry, headline, price_per_gpu_hour, came.get(key)) for key, entry in entries.items()]
    drift = None if headline == WRITTEN else _drift(entries)  # a tuned model writes shorter answers
    large = [row for row in rows if entries[row["key"]].get("training_status") == "untrained"]
    tuned = [row for row in rows if entries[row["key"]].get("training_status") == "finetuned"]
    return {
        "device": device,
        "measured_on": f"measured on {device}",
        "headline": headline,
        "dialogues": DIALOGUES,
        "price_per_gpu_hour": price_per_gpu_hour,
        "currency": currency if price_per_gpu_hour is not None else None,
        "drift": drift,
        "rows": rows,
        "pays": [
            _pays(small, other, drift or 1.0)
            for small, other in product(tuned, large)
            if not _same_model(entries[small["key"]], entries[other["key"]])
        ],
    }


def _drift(entries: Mapping[str, Mapping[str, Any]]) -> float | None:
    """The most that two measurements of one model differ by, as slow / fast; None where none was measured twice.

    Of one precision, and not where adapters were left beside the weights, which is slower.
    """
    rates: dict[tuple, list[float]] = {}
    for entry in entries.values():
        seconds = (entry.get("performance") or {}).get("seconds_per_dialogue")
        beside = (entry.get("training_metrics") or {}).get("method") == "qlora"
        if seconds and entry.get("model") is not None and not beside:
            rates.setdefault((entry["model"], entry.get("precision")), []).append(seconds)
    return max((max(found) / min(found) for found in rates.values() if len(found) > 1), default=None)


def _same_model(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return one.get("model") is not None and one["model"] == other.get("model")


def _row(
    key: str, entry: Mapping[str, Any], headline: str, price: float | None, came: str | None = None
) -> dict[str, Any]:
    performance, training = entry.get("performance") or {}, entry.get("training_metrics") or {}
    hours = _hours(performance.get("seconds_per_dialogue"), DIALOGUES)
    tuning = _hours(training.get("seconds"))
    return {
        "key": key,
        "accuracy": entry.get(headline),
        "seconds_per_dialogue": performance.get("seconds_per_dialogue"),
        "spread": performance.get("spread"),
        "came": came or performance.get("came"),
        "hours_per_1000": hours,
        "price_per_1000": _money(hours, price),
        "tuning_seconds": training.get("seconds"),
        "tuning_hours": tuning,
        "tuning_price": _money(tuning, price),
    }


def _pays(small: Mapping[str, Any], large: Mapping[str, Any], drift: float = 1.0) -> dict[str, Any]:
    ours, theirs, tuning = small["seconds_per_dialogue"], large["seconds_per_dialogue"], small["tuning_seconds"]
    names = f"tuning {small['key']} pays in time against {large['key']}"
    dialogues = ends = None
    once = None in (small["spread"], large["spread"])
    (fast, slow), (low, high) = _ends(small, drift), _ends(large, drift)
    if None in (ours, theirs, tuning):
        missing = [
            f"seconds a dialogue of {row['key']}" for row in (small, large) if row["seconds_per_dialogue"] is None
        ]
        missing += ["tuning seconds"] if tuning is None else []
        reason = f"{' and '.join(missing)} not measured"
        sentence = f"Whether {names} cannot be told: {reason}."
    elif (drift > 1 or small["spread"] or large["spread"]) and fast <= high and low <= slow:
        rates = f"{_rate(small)} and {_rate(large)} a dialogue"
        rates += f"; one model's own differ by {drift:.3g} times" if drift > 1 else ""
        reason = f"the two rates do not differ beyond their spread ({rates})"
        sentence = f"Whether {names} cannot be told: {reason}."
    elif ours >= theirs:
        reason = f"{_rate(small)} a dialogue is not less than {_rate(large)}"
        sentence = f"{'By one measurement it' if once else 'It'} never happens that {names}: {reason}."
    else:
        reason = None
        dialogues = math.ceil(tuning / (theirs - ours))
        sentence = f"By {'one measurement' if once else 'measured seconds'} {names} after {dialogues:,} dialogues"
        if not once:
            ends = {"low": math.ceil(tuning / (high - fast)), "high": math.ceil(tuning / (low - slow))}
            sentence += f" [{ends['low']:,}, {ends['high']:,}]"
        sentence += "."
    better = None if None in (small["accuracy"], large["accuracy"]) else small["accuracy"] - large["accuracy"]
    return {
        "tuned": small["key"],
        "large": large["key"],
        "dialogues": dialogues,
        "dialogues_between": ends,
        "reason": reason,
        "accuracy_difference": better,
        "sentence": sentence
        if better is None
        else f"{sentence[:-1]}; its accuracy differs by {100 * better:+.1f} points.",
    }


def _ends(row: Mapping[str, Any], drift: float) -> tuple[float, float]:
    """Least and most seconds a dialogue; half of the drift, as a factor, is either's of two that are compared."""
    measured = row["seconds_per_dialogue"] or 0.0
    spread, half = row["spread"] or {"low": measured, "high": measured}, math.sqrt(drift)
    return spread["low"] / half, spread["high"] * half


def _rate(row: Mapping[str, Any]) -> str:
    """`0.058 s [0.05, 0.067]`, or without a spread the seconds alone."""
    said = f"{row['seconds_per_dialogue']:.3g} s"
    return said + (f" [{row['spread']['low']:.3g}, {row['spread']['high']:.3g}]" if row["spread"] else "")


def _hours(seconds: float | None, times: int = 1) -> float | None:
    return None if seconds is None else seconds * times / HOUR


def _money(hours: float | None, price: float | None) -> float | None:
    return None if None in (hours, price) else hours * price
