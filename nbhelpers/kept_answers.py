"""Where are the answers of a comparison kept, so that no model is asked twice? Beside the runs, a folder for each.

`.predictions/coding-<sha256 of their identity>/`: a JSON file, and the label scores as safetensors.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nbhelpers import answer_cache, records

PREFIX = "coding-"  # of the folders
DAY = 86_400


@dataclass
class Answers:
    """Lines by part (see `label_answers`), the labels' log-probabilities by part (rows, labels), and what it took."""

    lines: dict[str, list[dict[str, Any]]]
    scores: dict[str, np.ndarray | None]
    about: dict[str, Any] = field(default_factory=dict)
    came: str = "measured"


def folder(run_dir: Path) -> Path:
    """Where a run and those beside it keep theirs."""
    return run_dir.parent / answer_cache.FOLDER


def read(place: Path, oldest_days: float | None = None) -> Answers | None:
    """Answers kept at `place`, or None where there are none, or they are torn or too old."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        kept = records.read_json(place / "answers.json")
        scores = load_file(place / "scores.safetensors")
        lines = {part: [records.restore(line) for line in lines] for part, lines in kept["lines"].items()}
        made = float(kept["made"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None
    if oldest_days is not None and time.time() - made > oldest_days * DAY:
        return None
    return Answers(lines, {part: scores.get(part) for part in lines}, kept["about"], came="cached")


def write(place: Path, answers: Answers) -> None:
    """Keep answers, whole or not at all; what lay there before goes."""
    from safetensors.numpy import save

    beside = place.with_name(f".{place.name}.{os.getpid()}")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    scores = {part: found for part, found in answers.scores.items() if found is not None}
    records.write_atomic(beside / "scores.safetensors", save(scores))
    records.write_json(
        beside / "answers.json",
        records.plain({"made": time.time(), "lines": answers.lines, "about": answers.about}),
    )
    shutil.rmtree(place, ignore_errors=True)
    try:
        beside.replace(place)
    except OSError:
        if read(place) is None:  # else another run has just written the same
            raise
        shutil.rmtree(beside, ignore_errors=True)


def clear(root: Path, older_than_days: float | None = None) -> int:
    """Delete kept answers of comparisons under `root`, also of a write that was killed; how many there were."""
    gone, kept = 0, root / answer_cache.FOLDER
    for place in sorted([*kept.glob(f"{PREFIX}*"), *kept.glob(f".{PREFIX}*")]):
        if older_than_days is None or time.time() - place.stat().st_mtime > older_than_days * DAY:
            shutil.rmtree(place) if place.is_dir() else place.unlink()
            gone += 1
    return gone
