"""Is each label split as the table says, by seed and text alone, with no row or near-duplicate on two sides?"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from nbhelpers import dialogues, label_split
from nbhelpers.dialogues import Dialogue, Dialogues

PARTS = ("train", "validation", "test")


def source(counts: dict[str, int], groups: dict[str, list[int]] | None = None, labels=None) -> Dialogues:
    """So many rows of each label, all different; groups: sizes of groups of near-duplicates at a label's beginning."""
    rows: list[Dialogue] = []
    for label, count in counts.items():
        sizes = list((groups or {}).get(label, []))
        sizes += [1] * (count - sum(sizes))
        for number, size in enumerate(sizes):
            first = len(rows)
            for copy in range(size):
                words = " ".join(f"{label}{number}w{at}" for at in range(30)) + " and so on" * copy
                rows.append(Dialogue(len(rows), len(rows), words, (label,), first))
    return made(rows, labels)


def made(rows: list[Dialogue], labels=None) -> Dialogues:
    seen = tuple(sorted({label for row in rows for label in row.labels})) if labels is None else labels
    return Dialogues(tuple(rows), "labels", seen, {}, "a file", False, "", {})


def by_label(found: label_split.Split) -> dict[str, tuple[int, ...]]:
    counts = [Counter(row.labels[0] for row in getattr(found, part)) for part in PARTS]
    return {label: tuple(count[label] for count in counts) for label in sorted(set().union(*counts))}


TABLE = [(1, 0, 0), (1, 0, 1), (2, 0, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1), (4, 1, 2), (5, 1, 2), (5, 2, 2), (6, 2, 2)]


def test_the_table_of_the_docstring_is_what_is_done():
    counts = {f"label{n:02}": n for n in range(1, 11)}
    split = label_split.split(source(counts))
    assert by_label(split) == {f"label{n:02}": row for n, row in enumerate(TABLE, 1)}
    lines = [line.split() for line in label_split.__doc__.splitlines()]
    for part, at in zip(PARTS, range(3), strict=True):
        (line,) = (line for line in lines if line[:1] == [part] and line[1:2] and line[1].isdigit())
        assert list(map(int, line[1:])) == [row[at] for row in TABLE]


@pytest.mark.parametrize("rows", [*range(30), 101, 2037])
def test_shares_are_three_fifths_and_a_fifth_each_within_one_row(rows):
    found = label_split.shares(rows)
    assert sum(found.values()) == rows
    assert all(abs(found[part] - rows * share / 5) < 1 for part, share in label_split.SHARES.items())


def test_two_thousand_labels_of_five_rows_are_split_three_one_one():
    split = label_split.split(source({f"L{n:04}": 5 for n in range(2037)}))
    assert set(by_label(split).values()) == {(3, 1, 1)} and len(split.test) == len(split.validation) == 2037
    assert split.record["labels"] == {"train": 2037, "validation": 2037, "test": 2037}
    assert split.record["overlap"] == {"exact": 0, "near": 0} and split.record["labels_without_test"] == 0


@pytest.mark.parametrize("mode", ["per_label", "unseen_labels"])
def test_the_same_seed_gives_the_same_split_whatever_the_order_of_the_file(mode):
    whole = source({f"L{n}": 7 for n in range(9)}, groups={"L1": [3, 2], "L2": [2]})
    rows = list(whole.rows)
    random.Random(0).shuffle(rows)
    moved = [replace(row, id=at, position=at, group=1000 - row.group) for at, row in enumerate(rows)]
    one, other = label_split.split(whole, seed=3, mode=mode), label_split.split(made(moved), seed=3, mode=mode)
    for part in PARTS:
        assert [row.text for row in getattr(one, part)] == [row.text for row in getattr(other, part)]
    assert one.record == other.record
    another = label_split.split(whole, seed=4, mode=mode)
    assert another.record["sha256"] != one.record["sha256"] and another.seed == 4


def test_a_group_of_near_duplicates_stays_on_one_side():
    groups = {f"L{n}": [4, 3, 2, 2] for n in range(6)}
    found = label_split.split(source({f"L{n}": 15 for n in range(6)}, groups))
    sides = defaultdict(set)
    for part in PARTS:
        for row in getattr(found, part):
            sides[row.group].add(part)
    assert all(len(of) == 1 for of in sides.values()) and len(found.train + found.validation + found.test) == 90
    assert found.record["overlap"] == {"exact": 0, "near": 0}
    assert set(by_label(found).values()) == {(9, 3, 3)}  # 4+2+2+1, 3, 2+1 or the like


def test_a_label_that_is_one_group_trains():
    found = label_split.split(source({"a": 5, "b": 5}, groups={"a": [5]}))
    assert by_label(found) == {"a": (5, 0, 0), "b": (3, 1, 1)}
    assert found.record["labels_without_test"] == 1


def test_overlap_is_measured_on_the_rows_and_not_taken_from_the_groups():
    rows = source({"a": 6, "b": 4}, groups={"a": [2]}).rows
    same = replace(rows[5], text=f" {rows[4].text}\n")
    parts = {"train": rows[:1] + rows[4:5], "validation": (rows[1], same), "test": (*rows[2:4], rows[1])}
    # the 2nd of a's group stands in validation beside the 1st in train, and in test again; `same` equals a train row
    assert label_split.overlap(parts) == {"exact": 2, "near": 3}
    assert label_split.overlap({"train": rows[:2], "validation": (), "test": rows[2:]}) == {"exact": 0, "near": 0}


def test_split_parts_of_ungrouped_near_duplicates_would_be_seen_in_the_record():
    rows = [replace(row, group=at) for at, row in enumerate(source({"a": 10, "b": 5}, groups={"a": [10]}).rows)]
    assert label_split.split(made(rows)).record["overlap"]["near"] > 0


def test_a_row_of_several_labels_counts_for_its_rarest():
    rows = list(source({"common": 10, "rare": 4}).rows)
    rows[0] = replace(rows[0], labels=("common", "rare"))  # rare has 5 rows then, common's others are 9
    for seed in range(8):
        found = label_split.split(made(rows), seed=seed)
        counts = {part: sum("rare" in row.labels for row in getattr(found, part)) for part in PARTS}
        assert counts == {"train": 3, "validation": 1, "test": 1}
        assert found.record["rows"] == {"train": 8, "validation": 3, "test": 3}  # 3 + 5, 1 + 2, 1 + 2


# ------------------------------------------------------------------------------------------------ unseen labels


def test_whole_labels_are_held_out_for_validation_and_for_test():
    found = label_split.split(source({f"L{n:02}": 4 for n in range(20)}), mode="unseen_labels")
    sets = {part: {row.labels[0] for row in getattr(found, part)} for part in PARTS}
    assert {part: len(of) for part, of in sets.items()} == {"train": 12, "validation": 4, "test": 4}
    assert len(set().union(*sets.values())) == 20  # no label is in two parts
    assert set(map(sum, by_label(found).values())) == {4}
    assert found.record["test_labels_without_train"] == 4 and found.mode == found.record["mode"] == "unseen_labels"


def test_rows_that_belong_to_labels_of_two_parts_are_left_out_and_counted():
    rows = list(source({f"L{n}": 5 for n in range(5)}).rows)
    rows.append(replace(rows[0], text="all of them", labels=tuple(f"L{n}" for n in range(5)), group=99))
    rows += [replace(rows[n * 5], text=f"one of a group over all labels {n}", group=100) for n in range(5)]
    found = label_split.split(made(rows), mode="unseen_labels")
    assert found.record["left_out"]["labels_of_several_parts"] == 6
    assert sum(found.record["rows"].values()) == 25


# ------------------------------------------------------------------------------------------------ limit and refusals


def test_a_limit_draws_test_rows_as_frequent_as_they_are():
    """Of 300 and 100 test rows a draw of 100 holds about 75 and 25: not 50 of each."""
    whole = source({"many": 1500, "some": 500})
    counts = Counter(row.labels[0] for row in label_split.split(whole, limit_test=100).test)
    assert counts.total() == 100 and 15 <= counts["some"] <= 36, "outside, one draw in a hundred"
    whole = source({"many": 50, "some": 20, "few": 5})  # test: 10, 4, 1
    assert len(label_split.split(whole, limit_test=99).test) == 15
    limited, full = label_split.split(whole, limit_test=5), label_split.split(whole)
    assert limited.train == full.train and set(limited.test) < set(full.test)
    assert limited.record["left_out"]["test_limit"] == 10 and limited.record["limit_test"] == 5


def test_what_cannot_be_split_is_refused():
    with pytest.raises(ValueError, match="a split per_label needs rows of at least 2 labels, 'a file' has 1"):
        label_split.split(source({"a": 20}))
    with pytest.raises(ValueError, match="a split unseen_labels needs rows of at least 4 labels, 'a file' has 3"):
        label_split.split(source({"a": 20, "b": 3, "c": 5}), mode="unseen_labels")
    with pytest.raises(ValueError, match="'a file' has 7 rows for 9 labels; give more rows, or fewer labels"):
        label_split.split(source({"a": 4, "b": 3}, labels=tuple("abcdefghi")))
    with pytest.raises(ValueError, match="3 rows of 3 labels leave no row to test on; give more rows of each label"):
        label_split.split(source({"a": 1, "b": 1, "c": 1}))
    with pytest.raises(LookupError, match="unknown mode 'unseen'. Did you mean 'unseen_labels'?"):
        label_split.split(source({"a": 5, "b": 5}), mode="unseen")
    with pytest.raises(ValueError, match="limit_test must be at least 1 row, got 0"):
        label_split.split(source({"a": 5, "b": 5}), limit_test=0)


# ------------------------------------------------------------------------------------------------ whole sources


def test_every_bundled_code_trains_and_is_tested():
    found = label_split.split(dialogues.read("bundled"))
    rows = by_label(found)
    assert len(rows) == 32 and all(min(row) >= 1 for row in rows.values())
    assert rows["E109"] == rows["T360X5A"] == (3, 1, 1) and rows["I10"] == (24, 8, 8)
    assert sum(found.record["rows"].values()) == 713 and found.record["overlap"] == {"exact": 0, "near": 0}


def test_real_dialogues_are_split_without_overlap(data_dir):
    found = label_split.split(dialogues.read(data_dir / "mts_dialog.jsonl"))
    assert sum(found.record["rows"].values()) == 1296 and found.record["overlap"] == {"exact": 0, "near": 0}
    assert found.record["labels"]["train"] == found.record["labels"]["test"] == 20
