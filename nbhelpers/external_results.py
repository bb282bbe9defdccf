"""How do our numbers stand beside a table of somebody else's? A CSV in, matched cell by cell; nothing is guessed.

A table says what was measured in columns of any name; `columns` maps them to ours. Numbers of another protocol (other
shots, split or measure) are no measure of ours, so a table without one is refused: both protocols stand side by side.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nbhelpers.registry import unknown

KEYS = ("model", "task", "method", "sparsity", "mode", "seed")
VALUES = ("value", "value_percent")
NAMES = (*KEYS, "sparsity_percent", *VALUES, "protocol")
COLUMNS = ("row", *KEYS, "ours", "ours_low", "ours_high", "theirs", "difference", "outside", "status", "line")
COLUMNS += ("our_protocol", "their_protocol")
NAMED = 5  # cells without a partner that are named
SHORT = {"s2s": "sparse_to_sparse", "s2d": "sparse_to_dense"}
MODES = ("dense", *SHORT.values())  # of our rows; dense is without zeros


def parse_columns(text: str) -> dict[str, str]:
    """`"Acc.=value,Sparsity=sparsity"` as {their column: our name}. ValueError for anything else."""
    found: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        theirs, equals, ours = (piece.strip() for piece in part.rpartition("="))
        if not equals or not theirs or not ours:
            raise ValueError(f"columns must be THEIRS=OURS, with a comma between, got {part!r}: write 'Accuracy=value'")
        if theirs in found:
            raise ValueError(f"column {theirs!r} is mapped twice, to {found[theirs]!r} and {ours!r}: leave one")
        found[theirs] = ours
    return found


def read(
    path: str | Path, columns: str | Mapping[str, str] | None = None, protocol: str | None = None
) -> dict[str, Any]:
    """{"rows": a dict a line with its line number, "keys": which of KEYS it has, "source": the file's name}.

    columns: {their column: one of NAMES}; columns that are called as ours need no entry. protocol: how all of it was
    measured, where no column says it. ValueError or LookupError in one line for a table that cannot be compared.
    """
    mapped = parse_columns(columns) if isinstance(columns, str) else dict(columns or {})
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}' is not text in UTF-8 ({error.reason}): save it as CSV UTF-8") from None
    if not text.strip():
        raise ValueError(f"'{path}' is empty: name a table with a header and results")
    reader = csv.DictReader(io.StringIO(text, newline=""))
    header = [name for name in reader.fieldnames or () if name]
    if len(header) == 1 and ";" in header[0]:
        raise ValueError(f"'{path}' has semicolons between its columns: save it with commas")
    if twice := [name for name, count in Counter(header).items() if count > 1]:
        raise ValueError(f"'{path}' has the column {twice[0]!r} twice: give each a name of its own")
    mapped = _mapped(mapped, header, protocol)
    found, seen = [], {}
    for line in reader:
        row = _row(line, mapped, reader.line_num) | {"line": reader.line_num}
        row.setdefault("protocol", protocol)
        if not row["protocol"]:
            raise ValueError(
                f"line {reader.line_num} names no protocol: say how it was measured (shots, split, metric)"
            )
        key = tuple(row.get(name) for name in KEYS)
        if key in seen:
            where = ", ".join(f"{name} {row[name]}" for name in KEYS if row.get(name) is not None)
            raise ValueError(f"lines {seen[key]} and {row['line']} are of one cell ({where}): leave one of them out")
        seen[key] = row["line"]
        found.append(row)
    if not found:
        raise ValueError(f"'{path}' has no rows below its header: name a table with results")
    keys = [name for name in KEYS if any(row.get(name) is not None for row in found)]
    return {"rows": found, "keys": keys, "source": Path(path).name}


def _mapped(mapped: dict[str, str], header: Sequence[str], protocol: str | None) -> dict[str, str]:
    for theirs, ours in mapped.items():
        if theirs not in header:
            raise LookupError(unknown("column", theirs, header))
        if ours not in NAMES:
            raise LookupError(unknown(f"name for column {theirs!r}", ours, NAMES))
    mapped = {name: name for name in header if name in NAMES and name not in mapped.values()} | mapped
    ours = list(mapped.values())
    if twice := next((name for name in ours if ours.count(name) > 1), None):
        raise ValueError(f"two columns are mapped to {twice!r}: leave one of them")
    for names in (VALUES, ("sparsity", "sparsity_percent")):
        if sum(name in ours for name in names) != 1:
            raise ValueError(
                f"one column must be {names[0]!r} (a share, 0-1) or {names[1]!r}, the table has "
                f"{', '.join(header) or 'no header'}: map it with THEIRS={names[0]}"
            )
    if "protocol" not in ours and not (protocol or "").strip():
        raise ValueError(
            "the table does not say how its numbers were measured (shots, split, metric): map a column to 'protocol' "
            "or give it in words"
        )
    return mapped


def _row(line: Mapping[str, Any], mapped: Mapping[str, str], number: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for theirs, ours in mapped.items():
        text = (line.get(theirs) or "").strip()
        if ours in (*VALUES, "sparsity", "sparsity_percent"):
            name = ours.removesuffix("_percent")
            row[name] = _share(text, theirs, number, 100 if ours.endswith("_percent") else 1)
        elif ours == "seed":
            row[ours] = _seed(text, theirs, number) if text else None
        elif text:
            row[ours] = _mode(text) if ours == "mode" else text
    if row["sparsity"] and row.get("mode") not in (None, *MODES):  # without zeros the mode decides nothing
        column = next(theirs for theirs, ours in mapped.items() if ours == "mode")
        raise LookupError(f"line {number}, column {column!r}: {unknown('mode', row['mode'], MODES)}")
    return row


def _share(text: str, column: str, number: int, of: int) -> float:
    try:
        value = float(text) / of
    except ValueError:
        why = f"line {number}, column {column!r}: {text!r} is not a number: correct it or leave the line out"
        raise ValueError(why) from None
    if not (math.isfinite(value) and 0 <= value <= 1):
        raise ValueError(
            f"line {number}, column {column!r}: must be from 0 to {of}, got {text}"
            + (": map the column to the name that ends in _percent if it is in percent" if of == 1 else "")
        )
    return round(value, 12)


def _seed(text: str, column: str, number: int) -> int:
    if not text.isdecimal():
        raise ValueError(f"line {number}, column {column!r}: a seed is a whole number, got {text!r}")
    return int(text)


def _mode(text: str) -> str:
    name = text.casefold().replace(" ", "_").replace("-", "_")
    return SHORT.get(name, name)


def compared(ours: Sequence[Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """Our rows beside a table of `read`: {rows (as COLUMNS), ours_alone, theirs_alone (in words each), keys, source}.

    ours: rows of `sparsity_results.rows`. A column that the table lacks, or a cell of it that is empty, fits any of
    ours; at sparsity 0 method and mode decide nothing and are not compared. `outside`: theirs is outside our interval.
    """
    own = [row for row in ours if not row.alias]
    rows, theirs_alone, used = [], [], set()
    for theirs in table["rows"]:
        fitting = [row for row in own if _fits(row, theirs)]
        if not fitting:
            theirs_alone.append(f"line {theirs['line']} ({_words(theirs)})")
        used |= {row.row for row in fitting}
        rows += [_beside(row, theirs) for row in fitting]
    alone = [_words(vars(row)) for row in own if row.row not in used]
    return {
        "rows": rows,
        "ours_alone": alone,
        "theirs_alone": theirs_alone,
        "keys": table["keys"],
        "source": table["source"],
    }


def _fits(row: Any, theirs: Mapping[str, Any]) -> bool:
    if abs(row.sparsity - theirs["sparsity"]) > 1e-9:
        return False
    asked = [name for name in KEYS if name != "sparsity" and theirs.get(name) is not None]
    if row.sparsity == 0:
        asked = [name for name in asked if name not in ("method", "mode")]
    return all(str(getattr(row, name)).casefold() == str(theirs[name]).casefold() for name in asked)


def _beside(row: Any, theirs: Mapping[str, Any]) -> dict[str, Any]:
    known = row.tuned is not None
    return {
        "row": row.row,
        **{name: getattr(row, name) for name in KEYS},
        "ours": row.tuned,
        "ours_low": row.tuned_low,
        "ours_high": row.tuned_high,
        "theirs": theirs["value"],
        "difference": row.tuned - theirs["value"] if known else None,
        "outside": not row.tuned_low <= theirs["value"] <= row.tuned_high if row.tuned_low is not None else None,
        "status": row.status,
        "line": theirs["line"],
        "our_protocol": row.protocol,
        "their_protocol": theirs["protocol"],
    }


def _words(row: Mapping[str, Any]) -> str:
    return " ".join(
        f"{row[name]:g}" if name == "sparsity" else str(row[name]) for name in KEYS[:5] if row.get(name) is not None
    )


def counts(found: Mapping[str, Any]) -> dict[str, int]:
    """{matched, outside, not_measured, ours_alone, theirs_alone}; outside and not_measured are cells of ours, each
    counted once: several of their lines may be of one."""
    return {
        "matched": len(found["rows"]),
        "outside": len({row["row"] for row in found["rows"] if row["outside"] is True}),
        "not_measured": len({row["row"] for row in found["rows"] if row["ours"] is None}),
        "ours_alone": len(found["ours_alone"]),
        "theirs_alone": len(found["theirs_alone"]),
    }


def said(found: Mapping[str, Any]) -> list[str]:
    """Sentences: how many met, how many lie outside our interval, and which of either side have no partner."""
    told = counts(found)
    cells = len({row["row"] for row in found["rows"]})
    lines = [f"{cells} cells of ours stand beside {found['source']}, by {', '.join(found['keys'])}"]
    lines.append(f"theirs is outside our 95 % interval in {told['outside']} of them")
    lines += [f"{told['not_measured']} of ours are not measured"] if told["not_measured"] else []
    for side, name in (("theirs", "theirs_alone"), ("ours", "ours_alone")):
        if found[name]:
            named = "; ".join(found[name][:NAMED]) + ("; ..." if len(found[name]) > NAMED else "")
            lines.append(f"{len(found[name])} of {side} have no partner: {named}")
    for side, name in (("ours", "our_protocol"), ("theirs", "their_protocol")):
        said_so = dict.fromkeys(row[name] for row in found["rows"] if row[name])
        lines += [f"how {side} were measured: {'; '.join(said_so)}"] if said_so else []
    return lines
