"""How does a row read for people, what of it may leave the machine, and how is it written as CSV?"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nbhelpers.records import canonical_json, plain, sha256_text
from nbhelpers.stats import digits

_TEXT_FIELDS = {"prompt", "sample", "samples", "question", "answer", "instruction", "message", "messages", "note"}
_TEXT_FIELDS |= {"notes", "completion", "dialogue", "input", "context", "document", "documents", "description", "row"}
_LONGEST_SETTING = 80  # characters; a longer text in a config, or one of several lines, is somebody's text
_MOST_WORDS = 6


def withheld(field: str, value: Any) -> Any:
    """A config value as it may leave the machine: what may be a user's text only as its sha256.

    >>> withheld("strategy", "gradient"), withheld("steps", 3)
    ('gradient', 3)
    """
    if isinstance(value, list | tuple):
        return [withheld(field, inner) for inner in value]
    if isinstance(value, Mapping):
        return {key: withheld(key, inner) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    named = _TEXT_FIELDS & set(field.rsplit(".", 1)[-1].lower().split("_"))
    long = len(value) > _LONGEST_SETTING or "\n" in value or len(value.split()) > _MOST_WORDS
    return f"sha256:{sha256_text(value)[:16]}" if named or (long and not os.path.exists(value)) else value


def csv_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as CSV with the union of their columns; None is an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_csv_cell(row.get(column)) for column in columns])
    return text.getvalue()


def _csv_cell(value: Any) -> Any:
    return canonical_json(plain(value)) if isinstance(value, list | dict) else value


def counted(words: Iterable[str]) -> str:
    """`3 finished, 1 failed`."""
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return ", ".join(f"{number} {word}" for word, number in found.items())


def shown(value: Any) -> str:
    """A value for people: three digits, `-` for none."""
    if value is None:
        return "-"
    if isinstance(value, float) and math.isfinite(value) and value != 0:
        return digits(value) if 1e-3 <= abs(value) < 1e5 else f"{value:.3g}"
    return "0" if value == 0 and isinstance(value, float) else " ".join(str(value).split())


def aligned(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a text table, numbers to the right."""
    if not rows:
        return "no runs"
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    numeric = [
        any(isinstance(row[c], int | float) for row in rows)
        and all(row[c] is None or _is_number(row[c]) for row in rows)
        for c in columns
    ]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in cells
    ]
    return "\n".join(lines)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
