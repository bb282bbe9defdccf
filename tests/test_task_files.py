"""Are the rows of a workbook read as they were saved, and is a broken one named? (Other files: test_tasks.)"""

from __future__ import annotations

import re
import zipfile
from datetime import date
from pathlib import Path

import pytest
from openpyxl import Workbook

from nbhelpers import task_files


def workbook(path: Path, *sheets: list[list]) -> Path:
    book = Workbook()
    book.remove(book.active)
    for number, rows in enumerate(sheets):
        sheet = book.create_sheet(f"sheet {number}")
        for row in rows:
            sheet.append(row)
    book.save(path)
    return path


def read(path: Path) -> list[task_files.Found]:
    return list(task_files.of_file(path, task_files.TABLES))


def test_rows_of_the_first_sheet_with_a_header_are_read_with_their_numbers(tmp_path):
    rows = [[], ["id", " Dialogue", "n"], [1, "a\nb", 2.5], [], ["x", None, date(2020, 1, 2)]]
    found = read(workbook(tmp_path / "a.xlsx", [], rows, [["other"], ["no"]]))
    assert [one.place.rsplit("' ", 1)[1] for one in found] == ["row 3", "row 5"]
    assert found[0].fields == {"id": 1, " Dialogue": "a\nb", "n": 2.5}
    assert (found[1].fields["id"], found[1].fields[" Dialogue"], found[1].fields["n"].year) == ("x", None, 2020)


def test_a_formula_is_never_computed_and_named_where_its_value_was_not_saved(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["a", "b"], ["x", "=1+1"], ["y", "2"]])
    first, second = read(path)
    assert first.fields is None and first.problem == "holds a formula whose value was never saved; save values instead"
    assert second.fields == {"a": "y", "b": "2"}


def test_a_formula_with_a_saved_value_is_that_value(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["a"], ["=1+1"]])
    rewrite(path, "xl/worksheets/sheet1.xml", lambda text: re.sub("</f><v ?/?>(</v>)?", "</f><v>7</v>", text))
    assert [one.fields for one in read(path)] == [{"a": 7}]  # not 2


def test_rows_beyond_the_size_that_a_program_wrote_are_read(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["a"], ["x"], ["y"]])
    rewrite(path, "xl/worksheets/sheet1.xml", lambda text: text.replace('ref="A1:A3"', 'ref="A1"'))
    assert [one.fields for one in read(path)] == [{"a": "x"}, {"a": "y"}]


def rewrite(path: Path, name: str, change) -> None:
    with zipfile.ZipFile(path) as archive:
        parts = {part: archive.read(part) for part in archive.namelist()}
    changed = change(parts[name].decode()).encode()
    assert changed != parts[name]
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in (parts | {name: changed}).items():
            archive.writestr(part, content)


def test_cells_without_a_column_are_a_problem_of_their_row(tmp_path):
    found = read(workbook(tmp_path / "a.xlsx", [["a", None, "b"], ["x", None, "y"], ["x", "z", "y"], [1, None, 2, 3]]))
    assert [one.fields for one in found] == [{"a": "x", "b": "y"}, None, None]
    assert found[1].problem == found[2].problem == "has more cells than the header"


def test_a_workbook_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "a.xlsx").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"a.xlsx' is not an xlsx workbook \(File is not a zip file\); save it again"):
        read(tmp_path / "a.xlsx")
    with zipfile.ZipFile(tmp_path / "b.xlsx", "w") as archive:
        archive.writestr("x", "y")
    with pytest.raises(ValueError, match=r"b.xlsx' is not an xlsx workbook"):
        read(tmp_path / "b.xlsx")
    path = workbook(tmp_path / "c.xlsx", [["a"], ["x"]])
    rewrite(path, "xl/worksheets/sheet1.xml", lambda text: text[: len(text) // 2])
    with pytest.raises(ValueError, match=r"c.xlsx' is not an xlsx workbook"):
        read(path)


def test_a_workbook_without_a_header_or_with_a_column_twice_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has no sheet with a header; its first filled row must name the columns"):
        read(workbook(tmp_path / "a.xlsx", [], []))
    with pytest.raises(ValueError, match="names 1 of its columns twice; give each column its own name"):
        read(workbook(tmp_path / "a.xlsx", [["a", "b", "a"], [1, 2, 3]]))


def test_a_workbook_is_refused_where_it_is_not_asked_for(tmp_path):
    path = workbook(tmp_path / "a.xlsx", [["a"], ["x"]])
    with pytest.raises(ValueError, match=r"data must be a .csv, .json, .jsonl, .parquet or .txt file, got"):
        task_files.of_file(path)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"data must be a .csv, .xlsx, .json, .jsonl or .parquet file, got"):
        task_files.of_file(tmp_path / "a.txt", task_files.TABLES)
