"""When do answers from before serve again? Only where nothing that decides them differs, known before weights are read.

A file an identity, `.predictions/<sha256 of the identity>.json` beside the run directories: the lines of
predictions.jsonl, the facts that were checked when they were made, and the precision. Measures are computed anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers import models, records, runtime, tasks

FORMAT = 1  # of the code that makes answers: a new number makes every cached answer an old one
FOLDER = ".predictions"
LIBRARIES = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")  # whose versions may change an answer


def identity(
    model: str, rows: tasks.Rows, asked: Sequence[tasks.Asked], *, device: str | None, dtype: str, **more: Any
) -> dict[str, Any]:
    """Everything that decides the answers. model: None in it for a hub id, whose revision is known once it is loaded.

    dtype: as asked; what stands in the identity is the one that this device takes for it. more: what else decides the
    answers: quantisation, fingerprints of adapters and masks.
    """
    device = device or runtime.device()
    return {
        "format": FORMAT,
        "model": models.files_fingerprint(model),
        "documents": records.sha256_json([vars(document) for document in asked]),
        "task": [rows.task.name, rows.task.version, list(rows.task.stops), rows.task.new_tokens],
        "device": device.split(":")[0],
        "dtype": str(models.DTYPES[dtype] or runtime.dtype_for(device)),
        "libraries": {name: runtime.library_versions().get(name) for name in LIBRARIES},
        **more,
    }


def place(run_dir: Path, identity: Mapping[str, Any]) -> Path | None:
    """Where these answers are kept for the runs beside this one; None where the model's revision is not known."""
    if identity["model"] is None:
        return None
    return run_dir.parent / FOLDER / f"{records.sha256_json(identity)}.json"


def read(place: Path | None, asked: Sequence[tasks.Asked]) -> dict[str, Any] | None:
    """{lines, facts, precision} of answers made before by the same weights to the same documents, or None."""
    if place is None or not place.is_file():
        return None
    try:
        found = records.read_json(place)
        found["lines"] = [records.restore(line) for line in found["lines"]]
    except (ValueError, KeyError, TypeError):  # torn or of another make
        return None
    return found if len(found["lines"]) == len(asked) else None


def write(place: Path | None, lines: Sequence[Mapping], facts: Sequence[Mapping], precision: Mapping[str, Any]) -> None:
    """Keep answers, unless a fact about them does not hold."""
    if place is None or not all(fact["ok"] for fact in facts):
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    records.write_json(place, {"lines": lines, "facts": facts, "precision": precision})
