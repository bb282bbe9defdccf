"""Are dialogues and labels found in every kind of file, cleaned with honest counts, and refused in one clear line?"""

from __future__ import annotations

import csv
import json
import logging

import pytest

from nbhelpers import dialogues, generated_dialogues, task_files

TALKS = [f"Doctor: Number {number}?\nPatient: I have {number} of them." for number in range(6)]
MEDSYNTH = (" Dialogue", " ICD10", " ICD10_desc", "Note")


def jsonl(path, *rows) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def labelled(path, *labels, text=None) -> str:
    return jsonl(path, *({"text": text or TALKS[n], "label": label} for n, label in enumerate(labels)))


def kept(found: dialogues.Dialogues) -> list[tuple]:
    return [(row.text, row.labels) for row in found.rows]


# ------------------------------------------------------------------------------------------------ columns


def test_the_hubs_columns_are_found_also_with_a_leading_space(tmp_path, monkeypatch):
    rows = [
        dict(zip(MEDSYNTH, (talk, code, f"title {code}", "a note"), strict=True))
        for talk, code in zip(TALKS, ("E119", "I10"), strict=False)
    ]
    asked = []

    def of_hub(path, config, split):
        asked.append((path, config, split))
        return (task_files.Found(f"{path!r} row {number}", row) for number, row in enumerate(rows, 1))

    monkeypatch.setattr(task_files, "of_hub", of_hub)
    found = dialogues.read(None)
    assert kept(found) == [(TALKS[0], ("E119",)), (TALKS[1], ("I10",))]
    assert found.kind == "icd10" and found.labels == ("E119", "I10") and not found.generated
    assert found.descriptions == {"E119": "title E119", "I10": "title I10"}
    assert found.source == "Ahmad0067/MedSynth"
    dialogues.read("someone/other")
    assert asked == [("Ahmad0067/MedSynth", None, "train"), ("someone/other", None, "train")]


def table(path, header, rows) -> str:
    """The same rows as csv, xlsx, json, jsonl or parquet."""
    if path.suffix == ".csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
    elif path.suffix == ".xlsx":
        from openpyxl import Workbook

        book = Workbook()
        for row in (header, *rows):
            book.active.append(row)
        book.save(path)
    elif path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.table({name: [row[at] for row in rows] for at, name in enumerate(header)}), path)
    else:
        named = [dict(zip(header, row, strict=True)) for row in rows]
        path.write_text(json.dumps(named) if path.suffix == ".json" else "\n".join(map(json.dumps, named)))
    return str(path)


@pytest.mark.parametrize("suffix", task_files.TABLES)
def test_every_kind_of_file_gives_the_same_rows_and_digest(tmp_path, suffix):
    rows = [
        (number, talk, code) for number, (talk, code) in enumerate(zip(TALKS, ["e11.9", "I10"] * 3, strict=True), 7)
    ]
    found = dialogues.read(table(tmp_path / f"a{suffix}", ["ID", "Transcript", "Code"], rows))
    assert kept(found) == [(talk, (code.upper().replace(".", ""),)) for _, talk, code in rows]
    assert [(row.id, row.position) for row in found.rows] == [(number + 7, number) for number in range(6)]
    other = dialogues.read(table(tmp_path / "b.csv", ["ID", "Transcript", "Code"], rows))
    assert found.sha256 == other.sha256
    assert found.sha256 != dialogues.read(table(tmp_path / "c.csv", ["ID", "Transcript", "Code"], rows[1:])).sha256


def test_the_digest_is_of_ids_and_texts_and_labels(tmp_path):
    rows = [{"id": 1, "text": "a", "label": "x"}, {"id": 2, "text": "b", "label": "y"}]
    changed = [rows, *([rows[0] | change, rows[1]] for change in ({"id": 3}, {"text": "c"}, {"label": "y"}))]
    digests = [dialogues.read(jsonl(tmp_path / f"{n}.jsonl", *of)).sha256 for n, of in enumerate(changed)]
    assert len(set(digests)) == 4


def test_columns_are_taken_as_they_are_named(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "no", "What they said": "yes", "y": "A", "in words": "letter A"})
    found = dialogues.read(
        path, dialogue_column="what they said", label_column="y", description_column="in words", kind="labels"
    )
    assert kept(found) == [("yes", ("A",))] and found.descriptions == {"A": "letter A"}
    assert found.cleaning["columns"] == {
        "dialogue": "What they said",
        "label": "y",
        "description": "in words",
        "id": None,
    }


def test_a_missing_column_is_named_with_its_names_and_the_candidates(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "t", "mood": "x", "colour": "y"})
    with pytest.raises(
        ValueError,
        match=r"has no column for the label \(icd10, .*header.*\); name it as label_column: it has 'text', 'mood', ",
    ):
        dialogues.read(path)
    with pytest.raises(LookupError, match="label_column must be a column of '.*', got 'mod'; it has 'text', 'mood'"):
        dialogues.read(path, label_column="mod")
    with pytest.raises(ValueError, match="has no column for the dialogue .*dialogue, dialog, conversation"):
        dialogues.read(jsonl(tmp_path / "b.jsonl", {"label": "t"}))
    with pytest.raises(ValueError, match="dialogue and label must be two columns of .*, got 'text' for both"):
        dialogues.read(path, label_column="text")


def test_two_columns_that_fit_are_never_chosen_between(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"text": "t", "label": "x", "code": "y"})
    with pytest.raises(
        ValueError, match="more than one column for the label: 'label', 'code'; name it as label_column"
    ):
        dialogues.read(path)
    assert dialogues.read(path, label_column="code").labels == ("y",)


def test_a_file_without_a_header_shows_none_of_its_text(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"I am Canary and my head hurts since May",E11.9\n"another talk",I10\n')
    with pytest.raises(ValueError, match="it has one of 39 characters, 'E11.9'") as caught:
        dialogues.read(path)
    assert "Canary" not in str(caught.value)


def test_ids_that_repeat_give_way_to_positions(tmp_path):
    rows = [{"id": 0, "text": talk, "label": "x"} for talk in TALKS[:3]]
    assert [row.id for row in dialogues.read(jsonl(tmp_path / "a.jsonl", *rows)).rows] == [0, 1, 2]
    assert dialogues.read(jsonl(tmp_path / "a.jsonl", *rows)).cleaning["columns"]["id"] is None
    named = [row | {"id": name} for row, name in zip(rows, ("a", "12", "c"), strict=True)]
    assert [row.id for row in dialogues.read(jsonl(tmp_path / "b.jsonl", *named)).rows] == ["a", 12, "c"]


# ------------------------------------------------------------------------------------------------ labels


def test_nine_codes_in_ten_make_the_labels_codes_and_the_tenth_is_left_out(tmp_path):
    rows = [{"text": f"talk {n}", "code": "E11.9"} for n in range(9)]
    found = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows, {"text": "other", "code": "E11.9 or so"}))
    assert found.kind == "icd10" and len(found) == 9 and found.cleaning["no_code"] == {"rows": 1, "places": ["line 10"]}
    fewer = dialogues.read(jsonl(tmp_path / "b.jsonl", *rows[:8], {"text": "other", "code": "none"}))
    assert fewer.kind == "labels" and fewer.labels == ("E11.9", "none")  # 8 of 9
    assert len(dialogues.read(tmp_path / "b.jsonl", kind="icd10")) == 8
    assert dialogues.read(tmp_path / "a.jsonl", kind="labels").labels == ("E11.9", "E11.9 or so")


def test_labels_are_text_as_it_stands_but_for_spaces_around_it(tmp_path):
    found = dialogues.read(labelled(tmp_path / "a.jsonl", " FAM/SOCHX ", "a; b", 3, 4.0, True))
    assert [row.labels for row in found.rows] == [("FAM/SOCHX",), ("a; b",), ("3",), ("4",), ("True",)]
    assert found.labels == ("3", "4", "FAM/SOCHX", "True", "a; b")


@pytest.mark.parametrize(
    "cell",
    ["E11.9; I10", "E119,i10", "E11.9 I10", "E11.9 and I10", ["E11.9", "I10"], '["E11.9", "I10"]', "['E11.9']; I10"],
)
def test_several_codes_of_a_cell_are_refused_or_any_of_them_is_right_but_never_the_first_alone(tmp_path, cell):
    path = labelled(tmp_path / "a.jsonl", *["A00.0"] * 5, cell)
    if cell == "['E11.9']; I10":
        assert dialogues.read(path, several="any", kind="icd10").cleaning["no_code"]["rows"] == 1
        return
    with pytest.raises(
        ValueError, match=r"line 6 holds 2 labels in 'label': 'E119', 'I10' \(1 such rows\); give several='any'"
    ):
        dialogues.read(path, kind="icd10")
    found = dialogues.read(path, kind="icd10", several="any")
    assert found.rows[5].labels == ("E119", "I10") and found.cleaning["rows_with_several_labels"] == 1


def test_one_code_written_twice_is_one_label(tmp_path):
    assert dialogues.read(labelled(tmp_path / "a.jsonl", "E11.9; e119")).rows[0].labels == ("E119",)


def test_several_labels_of_a_list_are_several(tmp_path):
    path = labelled(tmp_path / "a.jsonl", ["a", "b"], "a")
    with pytest.raises(ValueError, match="line 1 holds 2 labels in 'label': 'a', 'b'"):
        dialogues.read(path)
    assert [row.labels for row in dialogues.read(path, several="any").rows] == [("a", "b"), ("a",)]


def test_a_label_that_is_not_in_the_given_list_is_refused_by_name(tmp_path):
    path = labelled(tmp_path / "a.jsonl", "E119", "E1165")
    with pytest.raises(
        ValueError,
        match=r"line 2 has the label 'E1165', did you mean 'E116'\?, which is none of the 3 labels given \(1 such",
    ):
        dialogues.read(path, labels=["e11.9", "I10", "E11.6"])
    assert dialogues.read(path, labels=["E11.9", "E11.65", "I10"]).labels == ("E1165", "E119", "I10")


def test_the_given_labels_may_stand_in_a_text_file_and_those_without_a_row_belong_to_the_set(tmp_path):
    path, listed = labelled(tmp_path / "a.jsonl", "E119", "E1165"), tmp_path / "codes.txt"
    listed.write_text("\ufeffe11.9\r\n\r\nI10\nE11.65\nE11.9\n", encoding="utf-8")
    found = dialogues.read(path, labels=str(listed))
    assert found.labels == ("E1165", "E119", "I10") and found.cleaning["labels"] == 2
    assert "1 of the labels given stand at no row; they can be answered all the same" in found.cleaning["says"]
    listed.write_text("E11.6\nI10\n")
    with pytest.raises(
        ValueError, match=r"has the label 'E119'.* none of the 2 labels given \(2 such labels\); add it"
    ):
        dialogues.read(path, labels=listed)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b" \n\n", "labels must be a text file in UTF-8 with one label a line, .* is none"),
        (b"\xff\xfe\x00", "labels must be a text file in UTF-8 with one label a line, .* is none"),
        (b"E11.9\ncode,description\n", "labels must be codes of ICD-10-CM, as of the rows, got 'code,description'"),
    ],
)
def test_a_label_list_that_is_none_is_refused(tmp_path, content, says):
    (tmp_path / "codes.txt").write_bytes(content)
    with pytest.raises(ValueError, match=says):
        dialogues.read(labelled(tmp_path / "a.jsonl", "E119", "E119"), labels=tmp_path / "codes.txt")


def test_a_column_of_long_texts_is_no_column_of_labels(tmp_path):
    path = labelled(tmp_path / "a.jsonl", "canary " * 60)
    with pytest.raises(ValueError, match="line 1 holds 419 characters in 'label', a label has at most 200") as caught:
        dialogues.read(path)
    assert "canary" not in str(caught.value)


# ------------------------------------------------------------------------------------------------ cleaning


def test_rows_that_cannot_be_used_are_counted_by_their_fault_and_place(tmp_path, caplog):
    path = tmp_path / "a.jsonl"
    jsonl(
        path,
        {"text": TALKS[0], "label": "E119"},
        {"text": "  ", "label": "E119"},
        {"text": None, "label": "E119"},
        {"label": "E119"},
        {"text": TALKS[1], "label": ""},
        {"text": TALKS[1], "label": None},
        {"text": 7, "label": "E119"},
        {"text": "half a pair \ud800", "label": "E119"},
        {"text": TALKS[1], "label": {"a": 1}},
        {"text": TALKS[2], "label": "I10"},
    )
    with open(path, "a") as file:
        file.write("{\n")
    with caplog.at_level(logging.WARNING):
        cleaning = dialogues.read(path).cleaning
    assert (cleaning["rows"], cleaning["kept"]) == (11, 2)
    assert cleaning["empty_dialogue"] == {"rows": 3, "places": ["line 2", "line 3", "line 4"]}
    assert cleaning["empty_label"] == {"rows": 2, "places": ["line 5", "line 6"]}
    assert cleaning["unreadable"] == {"rows": 4, "places": ["line 7", "line 8", "line 9", "line 11"]}
    assert cleaning["says"][0] == "4 rows that cannot be read left out" in caplog.text


def test_a_repeated_row_is_kept_once_and_white_space_makes_no_other_row(tmp_path):
    rows = [{"text": text, "label": "x"} for text in ("a  b", "a b", "a\r\nb", "c")]
    found = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows))
    assert kept(found) == [("a  b", ("x",)), ("c", ("x",))]
    assert found.cleaning["duplicate"] == {"rows": 2, "places": ["line 2", "line 3"]}


def test_a_dialogue_with_different_labels_is_left_out_or_has_them_all(tmp_path):
    rows = [{"text": text, "label": label} for text, label in zip("aabca", "xyxxx", strict=True)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    found = dialogues.read(path)
    assert kept(found) == [("b", ("x",)), ("c", ("x",))]
    assert found.cleaning["contradictory"] == {"rows": 3, "places": ["line 1", "line 2", "line 5"]}
    assert "3 rows of dialogues with different labels left out; several='any' makes" in found.cleaning["says"][0]
    found = dialogues.read(path, several="any")
    assert kept(found) == [("a", ("x", "y")), ("b", ("x",)), ("c", ("x",))]
    assert found.cleaning["joined"] == {"dialogues": 1, "rows": 3} and found.cleaning["contradictory"]["rows"] == 0


def test_near_duplicates_are_kept_in_one_group(tmp_path):
    long = " ".join(f"word{n}" for n in range(40))
    rows = [
        {"text": text, "label": label}
        for text, label in ((long, "x"), ("other", "x"), (long + "!", "y"), (long + " end", "x"))
    ]
    found = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows))
    assert [row.group for row in found.rows] == [0, 1, 0, 0]
    assert found.cleaning["near_duplicates"] == {"groups": 1, "rows": 3, "groups_with_different_labels": 1}


def test_most_places_are_counted_and_not_named(tmp_path):
    rows = [{"text": "", "label": "x"}] * 50 + [{"text": "a", "label": "x"}]
    cleaning = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows)).cleaning
    assert cleaning["empty_dialogue"]["rows"] == 50 and len(cleaning["empty_dialogue"]["places"]) == 20


def test_no_dialogue_stands_in_cleaning_or_log(tmp_path, caplog):
    rows = [{"text": f"canary {n % 3}", "label": n % 2, "description": "canary " * 100} for n in range(9)]
    with caplog.at_level(logging.DEBUG):
        found = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows, rows[0] | {"text": "canary", "label": 3}))
    assert found.cleaning["contradictory"]["rows"] == 9
    assert "canary" not in json.dumps(found.cleaning) + caplog.text + json.dumps(dict(found.descriptions))


def test_a_limit_takes_the_first_rows_and_looks_at_no_other(tmp_path):
    path = labelled(tmp_path / "a.jsonl", "x", "y", ["a", "b"])
    assert dialogues.read(path, limit=2).cleaning["rows"] == 2
    with pytest.raises(ValueError, match="limit must be at least 1 row, got 0"):
        dialogues.read(path, limit=0)


def test_markup_and_very_long_dialogues_stay_what_they_are(tmp_path):
    script, long = "<script>alert(1)</script> &amp; {{x}}", "hm " * 100_000
    rows = [{"text": script, "label": "x"}, {"text": long, "label": "y"}]
    found = dialogues.read(jsonl(tmp_path / "a.jsonl", *rows))
    assert [row.text for row in found.rows] == [script, long.strip()]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", "", "a.jsonl' holds no row"),
        ("a.jsonl", "{\n", "a.jsonl' holds no row: .* line 1 is not JSON"),
        ("a.csv", "text,label\n", "a.csv' holds no row"),
        ("a.csv", "text,label\n,x\nhello,\n", "holds no dialogue with a label: 1 empty dialogue, 1 empty label"),
        ("a.xlsx", "no", "a.xlsx' is not an xlsx workbook"),
        ("a.txt", "x", "data must be a .csv, .xlsx, .json, .jsonl or .parquet file, got"),
    ],
)
def test_a_source_without_dialogues_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        dialogues.read(tmp_path / name)


def test_wrong_names_are_refused(tmp_path):
    with pytest.raises(LookupError, match="data file '.*nothing.csv' does not exist"):
        dialogues.read(tmp_path / "nothing.csv")
    with pytest.raises(LookupError, match="unknown kind 'icd'. Did you mean 'icd10'?"):
        dialogues.read("bundled", kind="icd")
    with pytest.raises(LookupError, match="unknown several 'all'. .*Available: refuse, any"):
        dialogues.read("bundled", several="all")


# ------------------------------------------------------------------------------------------------ whole sources


def test_the_bundled_dialogues_are_clean_and_stamped():
    found = dialogues.read("bundled")
    assert found.generated and found.kind == "icd10" and len(found) == len(generated_dialogues.rows()) == 713
    assert found.cleaning["says"] == [] and len(found.labels) == 32
    assert len({row.group for row in found.rows}) == 713  # no two are near-duplicates
    assert found.descriptions["I10"] == "Essential (primary) hypertension" and len(found.descriptions) == 32
    assert len(dialogues.read("bundled", limit=10)) == 10


def test_real_dialogues_are_read_and_their_faults_counted(data_dir):
    path = data_dir / "mts_dialog.jsonl"
    said = [
        (" ".join(row["dialogue"].split()), row["section_header"])
        for row in map(json.loads, path.open(encoding="utf-8"))
    ]
    labels: dict[str, set[str]] = {}
    for talk, label in said:
        labels.setdefault(talk, set()).add(label)
    found = dialogues.read(path)
    assert found.kind == "labels" and len(found.labels) == 20 and found.cleaning["rows"] == 1301
    assert len(found) == sum(len(of) == 1 for of in labels.values()) == 1296
    assert found.cleaning["duplicate"]["rows"] == 3 and found.cleaning["contradictory"]["rows"] == 2
    both = dialogues.read(path, several="any")
    assert len(both) == len(labels) == 1297 and both.cleaning["joined"] == {"dialogues": 1, "rows": 2}
