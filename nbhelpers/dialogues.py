"""Which dialogues with which labels does a source hold, and what was wrong with the rest? The hub, a file, or bundled.

Columns are found by name whatever their case and spaces, or named by the caller. What cannot be used is left out,
counted and named by its place, never repaired by a guess; what a dialogue says stands in no error and no count.
Two rows are duplicates where their dialogues are equal but for white space; near_duplicates says what is nearly equal.
"""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

from nbhelpers import data, generated_dialogues, icd10, near_duplicates, task_files
from nbhelpers.registry import unknown

BUNDLED = data.BUNDLED
HUB = "Ahmad0067/MedSynth"  # a data set of the hub is read from its split `train`
KINDS = ("auto", "icd10", "labels")
SEVERAL = ("refuse", "any")
CODES_SHARE = 0.9  # of the labels, from which on they are taken for codes
LONGEST_LABEL = 200  # characters
PLACES = 20  # named of each kind of fault
COLUMNS = {
    "dialogue": ("dialogue", "dialog", "conversation", "transcript", "text"),
    "label": (
        *("icd10", "icd10code", "icd10cm", "icd10cmcode", "icdcode", "icd"),
        *("label", "labels", "code", "codes", "sectionheader", "category", "class", "target"),
    ),
    "description": ("icd10desc", "icd10description", "icddesc", "codedescription", "labeldescription", "description"),
    "id": ("id", "idx", "ind", "rowid", "dialogueid"),
}
FAULTS = {  # why rows are left out
    "unreadable": "rows that cannot be read left out",
    "empty_dialogue": "rows without a dialogue left out",
    "empty_label": "rows without a label left out",
    "no_code": "rows whose label is no code of ICD-10-CM left out; kind='labels' keeps labels as they are",
    "duplicate": "rows that repeat a dialogue and its label left out",
    "contradictory": "rows of dialogues with different labels left out; several='any' makes each dialogue one row "
    "with all its labels",
}
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dialogue:
    """A row. id: as in the source where each row has its own, else the position, which counts all rows from 0.

    labels: canonical: a code without dot, or the text as it stands; several where any one of them is right.
    group: rows with one group are near-duplicates of each other (or of one that is).
    """

    id: int | str
    position: int
    text: str
    labels: tuple[str, ...]
    group: int


@dataclass(frozen=True)
class Dialogues:
    """The rows of a source. labels: all, sorted; descriptions: what the source says of a label in words.

    cleaning: what was left out, counts and places; sha256: of ids, texts and labels, whatever the file's format.
    """

    rows: tuple[Dialogue, ...]
    kind: Literal["icd10", "labels"]
    labels: tuple[str, ...]
    descriptions: Mapping[str, str]
    source: str
    generated: bool
    sha256: str
    cleaning: dict[str, Any]

    def __len__(self) -> int:
        return len(self.rows)


class _Row(NamedTuple):
    place: str
    position: int
    id: int | str
    text: str
    labels: tuple[str, ...]
    description: str


def read(
    source: str | Path | None,
    *,
    dialogue_column: str | None = None,
    label_column: str | None = None,
    description_column: str | None = None,
    kind: str = "auto",
    several: str = "refuse",
    labels: Sequence[str] | str | Path | None = None,
    limit: int | None = None,
) -> Dialogues:
    """Dialogues of the hub (None: MedSynth, or a data set's id), "bundled" (generated), or a csv, xlsx, json, jsonl or
    parquet file.

    kind: auto takes labels for codes where 9 in 10 are; the others are then left out. several: a cell with more than
    one label (`E11.9; I10`, or a list) is refused, or any one of them is right. labels: the only ones there are, or a
    text file with one a line; another one is refused. limit: the first so many rows; what follows is not looked at.

    One dialogue with different labels is a row with all of them where several="any"; else all its rows are left out.
    """
    for name, value, known in (("kind", kind, KINDS), ("several", several, SEVERAL)):
        if value not in known:
            raise LookupError(unknown(name, value, known))
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 row, got {limit}")
    named = _label_list(labels) if isinstance(labels, str | Path) else labels
    where = HUB if source is None else str(source)
    found = list(_found(where))[:limit]
    given = {"dialogue": dialogue_column, "label": label_column, "description": description_column}
    columns = _columns(found, where, given)
    faults: dict[str, list[str]] = {name: [] for name in FAULTS}
    rows, kind = _usable(found, columns, kind, several, faults)
    if named is not None:
        named = _canonical(named, kind)
        _check_known(rows, named)
    rows, joined = _unrepeated(rows, several, faults)
    if not rows:
        counted = ", ".join(f"{len(places)} {name}" for name, places in faults.items() if places) or "no rows"
        raise ValueError(f"{where!r} holds no dialogue with a label: {counted.replace('_', ' ')}")
    groups = near_duplicates.groups([row.text for row in rows])
    kept = tuple(
        Dialogue(row.id, row.position, row.text, row.labels, rows[group].position)
        for row, group in zip(rows, groups, strict=True)
    )
    seen = sorted({label for row in kept for label in row.labels})
    cleaning = {"rows": len(found), "kept": len(kept), "labels": len(seen), "columns": columns, "kind": kind}
    cleaning |= {name: {"rows": len(places), "places": places[:PLACES]} for name, places in faults.items()}
    cleaning |= {"joined": joined, "rows_with_several_labels": sum(len(row.labels) > 1 for row in kept)}
    cleaning |= {"near_duplicates": _near(kept)}
    cleaning |= {"labels_without_rows": 0 if named is None else len(named - set(seen))}
    cleaning |= {"says": _says(cleaning)}
    for line in cleaning["says"]:
        log.warning("%s: %s", where, line)
    content = "".join(json.dumps([row.id, row.text, row.labels]) + "\n" for row in kept)
    return Dialogues(
        rows=kept,
        kind=kind,
        labels=tuple(seen if named is None else sorted(named)),
        descriptions=_descriptions(rows),
        source=where,
        generated=where == BUNDLED,
        sha256=hashlib.sha256(content.encode()).hexdigest(),
        cleaning=cleaning,
    )


def _found(source: str) -> Iterable[task_files.Found]:
    if source == BUNDLED:
        rows = generated_dialogues.rows()
        return (task_files.Found(f"{BUNDLED} row {number}", row) for number, row in enumerate(rows, 1))
    path = Path(os.path.expanduser(source))
    if path.exists() or path.suffix.lower() in (*task_files.SUFFIXES, *task_files.TABLES) or source[:1] in "./~":
        return task_files.of_file(path, task_files.TABLES)
    return task_files.of_hub(source, None, "train")


# Columns --------------------------------------------------------------------------------------------------------------


def _columns(found: Sequence[task_files.Found], source: str, given: Mapping[str, str | None]) -> dict[str, str | None]:
    """Which column is what. Those that are not needed may be None."""
    names = list(dict.fromkeys(str(name) for one in found if one.fields is not None for name in one.fields))
    if not names:
        problem = next((f": {one.place} {one.problem}" for one in found), "")
        raise ValueError(f"{source!r} holds no row{problem}")
    columns = {what: _column(names, source, what, given.get(what)) for what in COLUMNS}
    if columns["dialogue"] == columns["label"]:
        raise ValueError(f"dialogue and label must be two columns of {source!r}, got {columns['label']!r} for both")
    ids = [_identity(one.fields.get(columns["id"])) for one in found if one.fields is not None]
    if None in ids or len(set(ids)) < len(ids):
        columns["id"] = None
    return columns


def _column(names: Sequence[str], source: str, what: str, given: str | None) -> str | None:
    wanted = COLUMNS[what] if given is None else (_plain(given),)
    fits = [given] if given in names else [name for name in names if _plain(name) in wanted]
    if len(fits) == 1:
        return fits[0]
    shown = ", ".join(
        repr(name) if len(name) <= 40 and len(name.split()) <= 4 else f"one of {len(name)} characters"
        for name in names[:20]
    )
    if given is not None:
        raise LookupError(f"{what}_column must be a column of {source!r}, got {given!r}; it has {shown}")
    if what in ("description", "id"):
        return None
    if fits:
        fits = ", ".join(map(repr, fits))
        raise ValueError(f"{source!r} has more than one column for the {what}: {fits}; name it as {what}_column")
    raise ValueError(
        f"{source!r} has no column for the {what} ({', '.join(wanted)}); name it as {what}_column: it has {shown}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[\W_]+", "", name).lower()


def _identity(value: Any) -> int | str | None:
    """A number or a text that can name a row; a number that a table holds as text or fraction is the number."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and re.fullmatch(r"-?(0|[1-9][0-9]{0,17})", value):
        return int(value)
    return value if isinstance(value, int | str) and not isinstance(value, bool) and value != "" else None


# Rows -----------------------------------------------------------------------------------------------------------------


def _usable(
    found: Sequence[task_files.Found],
    columns: Mapping[str, str | None],
    kind: str,
    several: str,
    faults: dict[str, list[str]],
) -> tuple[list[_Row], str]:
    """The rows with a dialogue and a label, and whether labels are codes; places of the others go to `faults`."""
    rows = []
    for position, one in enumerate(found):
        place = _short(one.place)
        text = None if one.fields is None else one.fields.get(columns["dialogue"])
        values = [] if one.fields is None else _values(one.fields.get(columns["label"]))
        if one.fields is None or not _is_text(text) or not all(map(_is_text, values)):
            faults["unreadable"].append(place)
        elif not (text or "").strip():
            faults["empty_dialogue"].append(place)
        elif not values:
            faults["empty_label"].append(place)
        else:
            identity = position if columns["id"] is None else _identity(one.fields[columns["id"]])
            text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
            description = " ".join(_values(one.fields.get(columns["description"])))
            rows.append(_Row(one.place, position, identity, text, tuple(values), description))
    if kind == "auto":
        codes = sum(_codes(row.labels) is not None for row in rows)
        kind = "icd10" if rows and codes >= CODES_SHARE * len(rows) else "labels"
    usable = []
    for row in rows:
        labels = _codes(row.labels) if kind == "icd10" else tuple(dict.fromkeys(row.labels))
        if labels is None:
            faults["no_code"].append(_short(row.place))
        else:
            usable.append(row._replace(labels=labels))
    _check_labels(usable, columns["label"], several)
    return usable, kind


def _short(place: str) -> str:
    """A place without its file: `line 3`, `row 3`."""
    return " ".join(place.rsplit(" ", 2)[-2:])


def _is_text(value: Any) -> bool:
    """Nothing, or text without half a surrogate pair."""
    return value is None or (isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value))


def _values(cell: Any) -> list[Any]:
    """What a cell holds, without what is empty: one value, or those of a list, also of one written out as text."""
    if isinstance(cell, str) and re.fullmatch(r"\s*\[.*\]\s*", cell, re.DOTALL):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):  # a text in brackets
            cell = ast.literal_eval(cell.strip())
    if isinstance(cell, list | tuple):
        return [value for one in cell for value in ([one] if isinstance(one, list | dict) else _values(one))]
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    if isinstance(cell, float) and cell.is_integer():
        cell = int(cell)
    if isinstance(cell, int | float):
        cell = str(cell)
    return [cell.strip()] if isinstance(cell, str) and cell.strip() else [] if isinstance(cell, str) else [cell]


def _codes(values: Iterable[str]) -> tuple[str, ...] | None:
    """The codes of a cell, without dots, each once; None where anything in it is no code."""
    parts = [part for value in values for part in re.split(r"[\s;,|/&+]+", value) if part and part.lower() != "and"]
    if not parts or not all(map(icd10.is_code, parts)):
        return None
    return tuple(dict.fromkeys(map(icd10.normal, parts)))


def _check_labels(rows: Sequence[_Row], column: str | None, several: str) -> None:
    for row in rows:
        longest = max(map(len, row.labels))
        if longest > LONGEST_LABEL:
            raise ValueError(
                f"{row.place} holds {longest} characters in {column!r}, a label has at most {LONGEST_LABEL}; "
                "name the column of the labels as label_column"
            )
    more = [row for row in rows if len(row.labels) > 1]
    if more and several == "refuse":
        named = ", ".join(repr(label[:40]) for label in more[0].labels[:5])
        raise ValueError(
            f"{more[0].place} holds {len(more[0].labels)} labels in {column!r}: {named} ({len(more)} such rows); give "
            "several='any', where any one of them is right, or one label a row"
        )


def _label_list(path: str | Path) -> list[str]:
    """The labels of a text file, one a line; empty lines are none."""
    try:
        lines = Path(os.path.expanduser(path)).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError:
        lines = []
    if not any(map(str.strip, lines)):
        raise ValueError(f"labels must be a text file in UTF-8 with one label a line, {str(path)!r} is none")
    return [line for line in lines if line.strip()]


def _canonical(labels: Iterable[str], kind: str) -> set[str]:
    """A label list as rows are compared with it. ValueError for what is no code where rows have codes."""
    for label in labels if kind == "icd10" else ():
        if not icd10.is_code(label):
            raise ValueError(f"labels must be codes of ICD-10-CM, as of the rows, got {label[:40]!r}; correct it")
    return {icd10.normal(label) if kind == "icd10" else label.strip() for label in labels}


def _check_known(rows: Sequence[_Row], known: set[str]) -> None:
    strange = [(row, label) for row in rows for label in row.labels if label not in known]
    if strange:
        row, label = strange[0]
        near = get_close_matches(label, known, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"{row.place} has the label {label[:40]!r}{hint}, which is none of the {len(known)} labels given "
            f"({len(strange)} such labels); add it to them or leave the row out"
        )


def _unrepeated(rows: Sequence[_Row], several: str, faults: dict[str, list[str]]) -> tuple[list[_Row], dict[str, int]]:
    """Each dialogue once, the first of its rows. Different labels: all of them, or no row of that dialogue."""
    same: dict[str, list[_Row]] = {}
    for row in rows:
        same.setdefault(" ".join(row.text.split()), []).append(row)
    kept, joined = [], {"dialogues": 0, "rows": 0}
    for together in same.values():
        first = together[0]
        if len({frozenset(row.labels) for row in together}) == 1:
            faults["duplicate"] += [_short(row.place) for row in together[1:]]
        elif several == "any":
            joined = {"dialogues": joined["dialogues"] + 1, "rows": joined["rows"] + len(together)}
            first = first._replace(labels=tuple(dict.fromkeys(label for row in together for label in row.labels)))
        else:
            faults["contradictory"] += [_short(row.place) for row in together]
            continue
        kept.append(first)
    return kept, joined


def _descriptions(rows: Iterable[_Row]) -> dict[str, str]:
    """What most rows of a label say of it; rows with several labels do not tell which one they describe."""
    said: dict[str, Counter[str]] = {}
    for row in rows:
        if len(row.labels) == 1 and 0 < len(row.description) <= LONGEST_LABEL:
            said.setdefault(row.labels[0], Counter())[row.description] += 1
    return {label: min(found, key=lambda text: (-found[text], text)) for label, found in sorted(said.items())}


def _near(rows: Sequence[Dialogue]) -> dict[str, int]:
    """Groups of more than one row, their rows, and the groups whose rows have different labels."""
    groups: dict[int, list[Dialogue]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    several = [found for found in groups.values() if len(found) > 1]
    different = sum(len({row.labels for row in found}) > 1 for found in several)
    return {"groups": len(several), "rows": sum(map(len, several)), "groups_with_different_labels": different}


def _says(cleaning: Mapping[str, Any]) -> list[str]:
    """What a reader should know, each in a line."""
    lines = [f"{cleaning[name]['rows']} {words}" for name, words in FAULTS.items() if cleaning[name]["rows"]]
    if joined := cleaning["joined"]["rows"]:
        lines.append(f"{joined} rows joined to {cleaning['joined']['dialogues']} with several labels, any one right")
    if listed := cleaning["labels_without_rows"]:
        lines.append(f"{listed} of the labels given stand at no row; they can be answered all the same")
    if near := cleaning["near_duplicates"]["rows"]:
        lines.append(f"{near} rows in {cleaning['near_duplicates']['groups']} groups of near-duplicates, kept together")
    return lines
