"""Which dialogues train, which choose the best state, which test? Split within each label, or whole labels held out.

Of the rows of a label 3 in 5 train, 1 in 5 validates and 1 in 5 tests: whole fifths first, then one more to the part
that lacks most, on equal shares train before test before validation.

    rows of a label   1      2      3      4      5      6      7      8      9      10
    train             1      1      2      2      3      4      4      5      5      6
    validation        0      0      0      1      1      1      1      1      2      2
    test              0      1      1      1      1      1      2      2      2      2

A group of near-duplicates goes to one side as a whole, to the part that then lacks most; so with groups a label's parts
may differ from the table. The split is drawn from the seed and the texts: the order of the rows in a file is nothing.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from nbhelpers import near_duplicates
from nbhelpers.dialogues import Dialogue, Dialogues
from nbhelpers.registry import unknown

Mode = Literal["per_label", "unseen_labels"]
PARTS = ("train", "validation", "test")
SHARES = {"train": 3, "test": 1, "validation": 1}  # in the order in which equals are served
FIFTHS = sum(SHARES.values())
FEWEST_LABELS = 4  # of which whole ones can be held out for validation and for test


@dataclass(frozen=True)
class Split:
    """The parts, each in an order drawn from the seed.

    record: {"mode", "seed", "limit_test"; by part "rows", "labels" (how many), "sha256" (of texts and labels);
    "left_out": rows by reason; "labels_without_test"; "test_labels_without_train"; "overlap": see `overlap`}.
    """

    train: tuple[Dialogue, ...]
    validation: tuple[Dialogue, ...]
    test: tuple[Dialogue, ...]
    mode: str
    seed: int
    record: dict[str, Any]


def shares(rows: int) -> dict[str, int]:
    """How many of so many rows of a label go to each part.

    >>> [tuple(shares(rows)[part] for part in PARTS) for rows in (1, 2, 3, 4, 5, 6)]
    [(1, 0, 0), (1, 0, 1), (2, 0, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)]
    """
    found = {part: rows * share // FIFTHS for part, share in SHARES.items()}
    lacking = sorted(SHARES, key=lambda part: -(rows * SHARES[part] % FIFTHS))  # a stable sort: equals as in SHARES
    for part in lacking[: rows - sum(found.values())]:
        found[part] += 1
    return found


def split(dialogues: Dialogues, *, seed: int = 0, mode: Mode = "per_label", limit_test: int | None = None) -> Split:
    """The parts of a source. mode "unseen_labels": of the labels, drawn, 3 in 5 train, 1 in 5 validates, 1 in 5 tests.

    limit_test: at most so many test rows, drawn: labels stay as frequent as they are. ValueError where there are fewer
    than 2 labels (4 to hold some out), or too few rows for a test row.
    """
    _check(dialogues, mode, limit_test)
    keys = {row: _key(seed, row) for row in dialogues.rows}
    groups: dict[int, list[Dialogue]] = {}
    for row in sorted(dialogues.rows, key=keys.__getitem__):
        groups.setdefault(row.group, []).append(row)
    whole = list(groups.values())
    parts = _within_labels(whole) if mode == "per_label" else _whole_labels(whole, seed)
    left_out = {"labels_of_several_parts": len(dialogues) - sum(map(len, parts.values()))}
    ordered = {part: sorted(parts[part], key=keys.__getitem__) for part in PARTS}
    if not ordered["train"] or not ordered["test"]:
        raise ValueError(
            f"{len(dialogues)} rows of {len(dialogues.labels)} labels leave no row to "
            f"{'train on' if not ordered['train'] else 'test on'}; give more rows of each label, at least 5"
        )
    tested = len(ordered["test"])
    if limit_test is not None:
        ordered["test"] = ordered["test"][:limit_test]  # their order is drawn: as frequent as in the whole part
    left_out["test_limit"] = tested - len(ordered["test"])
    record = {"mode": mode, "seed": seed, "limit_test": limit_test} | _record(ordered, dialogues, left_out)
    return Split(*(tuple(ordered[part]) for part in PARTS), mode, seed, record)


def _check(dialogues: Dialogues, mode: str, limit_test: int | None) -> None:
    if mode not in get_args(Mode):
        raise LookupError(unknown("mode", mode, get_args(Mode)))
    if limit_test is not None and limit_test < 1:
        raise ValueError(f"limit_test must be at least 1 row, got {limit_test}")
    seen = len({label for row in dialogues.rows for label in row.labels})
    fewest = 2 if mode == "per_label" else FEWEST_LABELS
    if seen < fewest:
        raise ValueError(f"a split {mode} needs rows of at least {fewest} labels, {dialogues.source!r} has {seen}")
    if len(dialogues) < len(dialogues.labels):
        raise ValueError(
            f"{dialogues.source!r} has {len(dialogues)} rows for {len(dialogues.labels)} labels; give more rows, or "
            "fewer labels"
        )


def _key(seed: int, row: Dialogue) -> bytes:
    """What orders a row: nothing of its place or id, which another order of the file would change."""
    return hashlib.sha256(f"{seed}\0{_content(row)}".encode()).digest()


def _content(row: Dialogue) -> str:
    """What makes two rows one, whatever the order of the file that they came from."""
    return "\0".join([_words(row), *sorted(row.labels)])


def _words(row: Dialogue) -> str:
    return " ".join(row.text.split())


def _within_labels(groups: Sequence[list[Dialogue]]) -> dict[str, list[Dialogue]]:
    """Each label's groups, the largest first, each to the part that lacks most rows."""
    counts = Counter(label for rows in groups for row in rows for label in row.labels)
    by_label: dict[str, list[list[Dialogue]]] = {}
    for rows in groups:  # a group, or row, of several labels counts for its rarest
        rarest = min((label for row in rows for label in row.labels), key=lambda label: (counts[label], label))
        by_label.setdefault(rarest, []).append(rows)
    parts: dict[str, list[Dialogue]] = {part: [] for part in PARTS}
    for label in sorted(by_label):
        lacking = shares(sum(map(len, by_label[label])))
        for rows in sorted(by_label[label], key=len, reverse=True):
            part = max(SHARES, key=lacking.__getitem__)  # the first of equals
            lacking[part] -= len(rows)
            parts[part] += rows
    return parts


def _whole_labels(groups: Sequence[list[Dialogue]], seed: int) -> dict[str, list[Dialogue]]:
    """Each group to the part of its labels; it stays out where they are not all of one part."""
    labels = {label for rows in groups for row in rows for label in row.labels}
    drawn = iter(sorted(labels, key=lambda label: hashlib.sha256(f"{seed}\0{label}".encode()).digest()))
    part_of = {next(drawn): part for part, count in shares(len(labels)).items() for _ in range(count)}
    parts: dict[str, list[Dialogue]] = {part: [] for part in PARTS}
    for rows in groups:
        of = {part_of[label] for row in rows for label in row.labels}
        if len(of) == 1:
            parts[of.pop()] += rows
    return parts


def overlap(parts: Mapping[str, Sequence[Dialogue]]) -> dict[str, int]:
    """Rows of validation and test that stand in a part before theirs (train, validation, test): equal but for white
    space; and near-duplicates or such."""
    rows = [row for part in PARTS for row in parts[part]]
    sides = [number for number, part in enumerate(PARTS) for _ in parts[part]]
    found = {}
    for name, same in (
        ("exact", list(map(_words, rows))),
        ("near", near_duplicates.groups([row.text for row in rows])),
    ):
        first: dict[str | int, int] = {}
        found[name] = sum(first.setdefault(one, side) < side for one, side in zip(same, sides, strict=True))
    return found


def _record(parts: Mapping[str, Sequence[Dialogue]], dialogues: Dialogues, left_out: Mapping[str, int]) -> dict:
    labels = {part: {label for row in rows for label in row.labels} for part, rows in parts.items()}
    return {
        "rows": {part: len(rows) for part, rows in parts.items()},
        "labels": {part: len(found) for part, found in labels.items()},
        "left_out": dict(left_out),
        "labels_without_test": len(set(dialogues.labels) - labels["test"]),
        "test_labels_without_train": len(labels["test"] - labels["train"]),
        "overlap": overlap(parts),
        "sha256": {part: _sha256(rows) for part, rows in parts.items()},
    }


def _sha256(rows: Sequence[Dialogue]) -> str:
    """Of what the rows hold, whatever their order and ids."""
    return hashlib.sha256("\n".join(sorted(map(_content, rows))).encode()).hexdigest()
