"""What does a thousand dialogues cost with each model, and after how many has fine-tuning paid for itself?

From measured seconds and the price that the user names; without a price there are hours and no money.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

DIALOGUES = 1000
HOUR = 3600


def table(
    entries: Mapping[str, Mapping[str, Any]],
    *,
    headline: str,
    device: str,
    price_per_gpu_hour: float | None = None,
    currency: str = "",
) -> dict[str, Any]:
    """Rows of models and, for each tuned model against each large one, the dialogues until tuning has paid.

    entries: results.json, key -> entry; of each are read "performance" (seconds_per_dialogue, came),
    "training_metrics" (seconds) and the headline measure. device: in words, what the seconds were measured on.
    price_per_gpu_hour: of that device, in `currency`, or None.

    Tuning has paid after tuning seconds / (seconds a dialogue of the large model - of the tuned one) dialogues: the
    price falls out, as both run on the same device. Reading a prompt in batches or one by one is what was measured.
    """
    if price_per_gpu_hour is not None and not (math.isfinite(price_per_gpu_hour) and price_per_gpu_hour >= 0):
        raise ValueError(
            f"price_per_gpu_hour must be at least 0, got {price_per_gpu_hour}: leave it out for hours alone"
        )
    rows = [_row(key, entry, headline, price_per_gpu_hour) for key, entry in entries.items()]
    large = [row for row in rows if entries[row["key"]].get("training_status") == "untrained"]
    tuned = [row for row in rows if entries[row["key"]].get("training_status") == "finetuned"]
    return {
        "device": device,
        "measured_on": f"measured on {device}",
        "headline": headline,
        "dialogues": DIALOGUES,
        "price_per_gpu_hour": price_per_gpu_hour,
        "currency": currency if price_per_gpu_hour is not None else None,
        "rows": rows,
        "pays": [_pays(small, other) for small, other in product(tuned, large)],
    }


def _row(key: str, entry: Mapping[str, Any], headline: str, price: float | None) -> dict[str, Any]:
    performance, training = entry.get("performance") or {}, entry.get("training_metrics") or {}
    hours = _hours(performance.get("seconds_per_dialogue"), DIALOGUES)
    tuning = _hours(training.get("seconds"))
    return {
        "key": key,
        "accuracy": entry.get(headline),
        "seconds_per_dialogue": performance.get("seconds_per_dialogue"),
        "came": performance.get("came"),
        "hours_per_1000": hours,
        "price_per_1000": _money(hours, price),
        "tuning_seconds": training.get("seconds"),
        "tuning_hours": tuning,
        "tuning_price": _money(tuning, price),
    }


def _pays(small: Mapping[str, Any], large: Mapping[str, Any]) -> dict[str, Any]:
    ours, theirs, tuning = small["seconds_per_dialogue"], large["seconds_per_dialogue"], small["tuning_seconds"]
    names = f"tuning {small['key']} pays in time against {large['key']}"
    dialogues = None
    if None in (ours, theirs, tuning):
        missing = [
            f"seconds a dialogue of {row['key']}" for row in (small, large) if row["seconds_per_dialogue"] is None
        ]
        missing += ["tuning seconds"] if tuning is None else []
        reason = f"{' and '.join(missing)} not measured"
        sentence = f"Whether {names} cannot be told: {reason}."
    elif ours >= theirs:
        reason = f"{ours:.3g} s a dialogue is not less than {theirs:.3g} s"
        sentence = f"It never happens that {names}: {reason}."
    else:
        reason = None
        dialogues = math.ceil(tuning / (theirs - ours))
        sentence = f"By measured seconds {names} after {dialogues:,} dialogues."
    better = None if None in (small["accuracy"], large["accuracy"]) else small["accuracy"] - large["accuracy"]
    return {
        "tuned": small["key"],
        "large": large["key"],
        "dialogues": dialogues,
        "reason": reason,
        "accuracy_difference": better,
        "sentence": sentence
        if better is None
        else f"{sentence[:-1]}; its accuracy differs by {100 * better:+.1f} points.",
    }


def _hours(seconds: float | None, times: int = 1) -> float | None:
    return None if seconds is None else seconds * times / HOUR


def _money(hours: float | None, price: float | None) -> float | None:
    return None if None in (hours, price) else hours * price
