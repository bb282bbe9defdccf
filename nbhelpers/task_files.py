"""Which rows do a csv, json, jsonl or parquet file and a data set of the hub hold, and where does each stand?

Nothing is judged here beyond what a row is: fields are those of the source, as it has them.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")


@dataclass(frozen=True)
class Found:
    """A row's place in words, and its fields, or what is wrong with it."""

    place: str
    fields: dict[str, Any] | None
    problem: str | None = None


def of_file(path: str | Path) -> Iterator[Found]:
    """Rows of a file, in order. LookupError where there is none, ValueError where it is no file of rows.

    .csv: UTF-8 with a header; .jsonl: an object a line; .json: a list of objects, or the same as .jsonl; .txt: one row
    whose field `text` is the whole file.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise LookupError(f"data file {str(path)!r} does not exist")
    if not path.is_file() or path.suffix not in SUFFIXES:
        raise ValueError(f"data must be a {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]} file, got {str(path)!r}")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{str(path)!r} is not UTF-8 at byte {error.start}; convert it, say with iconv") from error
    if path.suffix == ".txt":
        return iter([Found(repr(str(path)), {"text": content})])
    if path.suffix == ".csv":
        return _csv_rows(content, path)
    if path.suffix == ".json" and content.lstrip().startswith("["):
        return _listed_rows(content, path)
    return _line_rows(content, path)


def _line_rows(content: str, path: Path) -> Iterator[Found]:
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        place = f"{str(path)!r} line {number}"
        try:
            yield _object(place, json.loads(line))
        except json.JSONDecodeError as error:
            yield Found(place, None, f"is not JSON: {error.msg}")


def _listed_rows(content: str, path: Path) -> Iterator[Found]:
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        raise ValueError(f"{str(path)!r} line {error.lineno} is not JSON: {error.msg}") from error
    return (_object(f"{str(path)!r} row {number}", row) for number, row in enumerate(rows, 1))


def _object(place: str, row: Any) -> Found:
    return Found(place, row) if isinstance(row, dict) else Found(place, None, "is not a JSON object")


def _csv_rows(content: str, path: Path) -> Iterator[Found]:
    reader = csv.DictReader(io.StringIO(content, newline=""), strict=True)
    try:
        for row in reader:
            place = f"{str(path)!r} line {reader.line_num}"
            yield Found(place, None, "has more cells than the header") if None in row else Found(place, row)
    except csv.Error as error:
        raise ValueError(f"{str(path)!r} line {reader.line_num} is not CSV: {error}") from error


def _parquet_rows(path: Path) -> Iterator[Found]:
    import pyarrow
    from pyarrow import parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(f"{str(path)!r} is not Parquet: {str(error).splitlines()[0]}") from error
    return _counted(rows, str(path))


def of_hub(path: str, config: str | None, split: str) -> Iterator[Found]:
    """Rows of one split of a data set of the hub, in order. ValueError where it cannot be read."""
    from datasets import load_dataset

    name = f"{path} ({config})" if config else path
    try:
        rows = load_dataset(path, config, split=split)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"cannot read data set {name!r}: {reason}; check the connection, give a {', '.join(SUFFIXES)} file "
            "with the same fields, or 'bundled'"
        ) from error
    return _counted(rows, f"{name} {split}")


def _counted(rows: Iterable[dict], source: str) -> Iterator[Found]:
    return (Found(f"{source!r} row {number}", dict(row)) for number, row in enumerate(rows, 1))
