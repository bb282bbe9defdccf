"""Which rows do a csv, xlsx, json, jsonl or parquet file and a data set of the hub hold, and where does each stand?

Nothing is judged here beyond what a row is: fields are those of the source, as it has them.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

SUFFIXES = (".csv", ".json", ".jsonl", ".parquet", ".txt")
TABLES = (".csv", ".xlsx", ".json", ".jsonl", ".parquet")  # what rows with named columns come in


@dataclass(frozen=True)
class Found:
    """A row's place in words, and its fields, or what is wrong with it."""

    place: str
    fields: dict[str, Any] | None
    problem: str | None = None


def of_file(path: str | Path, suffixes: Sequence[str] = SUFFIXES) -> Iterator[Found]:
    """Rows of a file, in order. LookupError where there is none, ValueError where it is no file of rows.

    .csv: UTF-8 with a header; .jsonl: an object a line; .json: a list of objects, or the same as .jsonl; .txt: one row
    whose field `text` is the whole file; .xlsx (where `suffixes` has it): the first sheet with a header.
    """
    path = Path(os.path.expanduser(path))
    if not path.exists():
        raise LookupError(f"data file {str(path)!r} does not exist")
    if not path.is_file() or path.suffix not in suffixes:
        raise ValueError(f"data must be a {', '.join(suffixes[:-1])} or {suffixes[-1]} file, got {str(path)!r}")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    if path.suffix == ".xlsx":
        return _workbook_rows(path)
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


def _workbook_rows(path: Path) -> Iterator[Found]:
    """Values as they were last saved: a formula is never computed, and one without a saved value is named."""
    for values, written in zip(_sheets(path, data_only=True), _sheets(path, data_only=False), strict=True):
        filled = [number for number, cells in enumerate(written) if any(cell is not None for cell in cells)]
        if filled:
            return _sheet_rows(path, values, written, filled)
    raise ValueError(f"{str(path)!r} has no sheet with a header; its first filled row must name the columns")


def _sheet_rows(path: Path, values: list[tuple], written: list[tuple], filled: list[int]) -> Iterator[Found]:
    names = [None if cell is None else str(cell) for cell in values[filled[0]]]
    if twice := {name for name in names if name is not None and names.count(name) > 1}:
        raise ValueError(f"{str(path)!r} names {len(twice)} of its columns twice; give each column its own name")
    for number in filled[1:]:
        place, cells = f"{str(path)!r} row {number + 1}", values[number]
        named = [*names, *[None] * (len(cells) - len(names))]
        if any(cell is None and formula is not None for cell, formula in zip(cells, written[number], strict=True)):
            yield Found(place, None, "holds a formula whose value was never saved; save values instead")
        elif any(cell is not None and name is None for cell, name in zip(cells, named, strict=False)):
            yield Found(place, None, "has more cells than the header")
        else:
            yield Found(place, {name: cell for name, cell in zip(named, cells, strict=False) if name is not None})


def _sheets(path: Path, data_only: bool) -> list[list[tuple]]:
    """The cells of each sheet, row by row. data_only: what formulas gave when the file was saved, else formulas."""
    import openpyxl

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of forms and colours that are not read
            book = openpyxl.load_workbook(path, read_only=True, data_only=data_only)
            try:
                for sheet in book.worksheets:
                    sheet.reset_dimensions()  # some programs write a wrong size, and rows beyond it are not read
                return [list(sheet.iter_rows(values_only=True)) for sheet in book.worksheets]
            finally:
                book.close()
    except (BadZipFile, OSError, EOFError, LookupError, ValueError, TypeError, AttributeError, SyntaxError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"{str(path)!r} is not an xlsx workbook ({reason}); save it again, or as csv") from error


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
