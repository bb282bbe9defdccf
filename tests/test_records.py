"""Files whole or not at all; lines that survive; values that are strict JSON."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from nbhelpers import records
from nbhelpers.records import (
    append_line,
    canonical_json,
    check_output_folder,
    plain,
    read_json,
    read_lines,
    restore,
    sha256_file,
    sha256_json,
    sha256_text,
    slug,
    write_atomic,
    write_json,
)

REPOSITORY = Path(records.__file__).parents[1]


def no_space(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# values


class Colour(Enum):
    RED = "red"


@dataclass
class Point:
    x: int
    where: Path


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.float32(0.5), 0.5),
        (np.float64(0.25), 0.25),
        (np.longdouble(0.5), 0.5),
        (np.int64(3), 3),
        (np.bool_(True), True),
        (np.array([[1, 2]]), [[1, 2]]),
        (torch.tensor(0.5, requires_grad=True), 0.5),
        (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
        (torch.tensor([1, 2]), [1, 2]),
        ((1, (2,)), [1, [2]]),
        ({3, 1}, [1, 3]),
        (Path("a") / "b", os.path.join("a", "b")),
        (Colour.RED, "red"),
        (Point(1, Path("p")), {"x": 1, "where": "p"}),
        ({1: "a", None: "b"}, {"1": "a", "None": "b"}),
        (0.0, 0.0),
        (True, True),
        (None, None),
    ],
)
def test_values_of_numpy_torch_and_python_become_strict_json(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    json.dumps(found, allow_nan=False)


def test_a_pydantic_model_is_written_by_its_fields():
    pydantic = pytest.importorskip("pydantic")
    model = pydantic.create_model("Model", rate=(float, 0.5))()
    assert plain(model) == {"rate": 0.5}


def test_numbers_that_are_not_finite_become_null_with_a_flag_that_says_which_and_where():
    nan, inf = float("nan"), float("inf")
    assert plain({"a": nan, "b": [1, -inf], "c": {"d": np.float32("inf")}, "e": 0.0}) == {
        "a": None,
        "b": [1, None],
        "c": {"d": None, "not_finite": {"d": "inf"}},
        "e": 0.0,
        "not_finite": {"a": "nan", "b[1]": "-inf"},
    }
    assert plain(nan) is None


def test_plain_changes_nothing_the_second_time():
    once = plain({"a": float("inf"), "b": [[float("nan")]]})
    assert plain(once) == once


def test_restore_brings_back_what_plain_flagged():
    value = {"a": float("inf"), "b": [[1.0, float("-inf")]], "c": {"d[0]": float("inf")}, "e": None}
    assert restore(plain(value)) == value


def test_a_value_without_a_json_form_is_refused_by_type():
    with pytest.raises(ValueError, match="a value of type object has no JSON form"):
        plain({"a": object()})
    with pytest.raises(ValueError, match="a value of type bytes has no JSON form"):
        plain(b"x")


def test_two_keys_with_the_same_text_are_refused():
    with pytest.raises(ValueError, match="two keys are both written as '1'"):
        plain({1: "a", "1": "b"})
    with pytest.raises(ValueError, match=r"a key in a record must be text or a number, got \(1, 2\)"):
        plain({(1, 2): "a"})


def test_canonical_json_does_not_depend_on_order_type_or_spaces():
    assert canonical_json({"b": (1, np.int64(2)), "a": "é"}) == '{"a":"\\u00e9","b":[1,2]}'
    assert sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})


def test_the_hash_of_nan_is_not_the_hash_of_null():
    assert sha256_json({"a": float("nan")}) != sha256_json({"a": None})
    with pytest.raises(ValueError, match="needs a dict around it for its flag"):
        canonical_json([float("nan")])


def test_hashes_are_those_of_the_published_test_vector(tmp_path):
    abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    (tmp_path / "abc").write_bytes(b"abc")
    assert sha256_text("abc") == sha256_file(tmp_path / "abc") == abc
    assert sha256_json("abc") == hashlib.sha256(b'"abc"').hexdigest()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", "gpt2"),
        ("openai/gpt-2 (large)", "openai-gpt-2-large"),
        ("../../etc", "etc"),
        ("模型 é", "模型-é"),
        ("🚀", "unnamed"),
        ("", "unnamed"),
        ("...", "unnamed"),
        ("a\0b\nc", "a-b-c"),
        ("\ud800x", "x"),
        (7, "7"),
    ],
)
def test_a_slug_is_a_file_name_whatever_the_name_is(name, expected):
    assert slug(name) == expected


def test_a_slug_fits_in_bytes_and_cuts_no_letter(tmp_path):
    text = slug("模" * 300)
    assert text == "模" * 26 and len(text.encode()) <= 80
    (tmp_path / text).touch()


# whole files


def test_what_was_written_is_read_back(tmp_path):
    write_json(tmp_path / "a.json", {"é🚀": [1.5, None]})
    assert read_json(tmp_path / "a.json") == {"é🚀": [1.5, None]}
    write_atomic(tmp_path / "b", "é")
    assert (tmp_path / "b").read_bytes() == "é".encode()
    write_atomic(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"


@pytest.mark.parametrize("step", ["write", "fsync", "replace"])
@pytest.mark.parametrize("before", [None, "old"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, monkeypatch, step, before):
    path = tmp_path / "a.json"
    if before is not None:
        path.write_text(before)
    with monkeypatch.context() as patch:
        patch.setattr(os, step, no_space)
        with pytest.raises(OSError, match="No space left"):
            write_json(path, {"a": 1})
    assert os.listdir(tmp_path) == ([] if before is None else ["a.json"])
    assert before is None or path.read_text() == before


def test_a_file_is_written_whole_when_the_system_takes_it_in_pieces(tmp_path, monkeypatch):
    write = os.write
    monkeypatch.setattr(os, "write", lambda handle, data: write(handle, bytes(data[:3])))
    write_atomic(tmp_path / "a", "0123456789")
    assert (tmp_path / "a").read_text() == "0123456789"


def test_the_bytes_are_on_disk_before_the_name_points_to_them(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("replace"), replace(*paths)))
    write_atomic(tmp_path / "a", "x")
    assert order == ["fsync", "replace", "fsync"]


def test_a_value_that_is_not_json_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="no JSON form"):
        write_json(tmp_path / "a.json", {"a": object()})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("content", [b"", b'{"a": ', b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_reading_what_is_not_strict_json_names_the_file(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json' is not valid JSON"):
        read_json(tmp_path / "a.json")


# lines


def test_lines_are_read_back_in_order(tmp_path):
    for i in range(3):
        append_line(tmp_path / "a.jsonl", {"i": i, "text": "one\ntwo\u2028é"})
    rows, torn = read_lines(tmp_path / "a.jsonl")
    assert [row["i"] for row in rows] == [0, 1, 2] and rows[0]["text"] == "one\ntwo\u2028é"
    assert torn == 0


def test_a_line_is_one_write_to_a_file_opened_for_appending(tmp_path, monkeypatch):
    writes, flags = [], []
    write, opened = os.write, os.open
    monkeypatch.setattr(os, "write", lambda handle, data: (writes.append(bytes(data)), write(handle, data))[1])
    monkeypatch.setattr(os, "open", lambda path, flag, *rest: (flags.append(flag), opened(path, flag, *rest))[1])
    append_line(tmp_path / "a.jsonl", {"text": "x" * 100_000})
    assert len(writes) == 1 and writes[0].endswith(b"\n")
    assert flags[0] & os.O_APPEND


def test_every_cut_of_the_last_line_costs_only_that_line(tmp_path):
    path = tmp_path / "a.jsonl"
    last = b'{"i":2,"v":[1.5,null],"t":"\\u00e9"}'
    for cut in range(1, len(last)):
        path.write_bytes(b'{"i":0}\n{"i":1}\n' + last[:cut])
        assert read_lines(path) == ([{"i": 0}, {"i": 1}], 1), last[:cut]
        append_line(path, {"i": 3})
        assert read_lines(path) == ([{"i": 0}, {"i": 1}, {"i": 3}], 1), last[:cut]


def test_a_last_line_that_lacks_only_its_newline_is_whole(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"i":0}')
    assert read_lines(path) == ([{"i": 0}], 0)
    append_line(path, {"i": 1})
    assert read_lines(path) == ([{"i": 0}, {"i": 1}], 0)


@pytest.mark.parametrize(
    "bad", [b'{"i":', b"\x00\x00", b"\xff", b'{"i":NaN}', b"12", b"[1]", b"null", b'{"a":' * 50_000, b"9" * 5000]
)
def test_a_bad_line_in_the_middle_is_skipped_and_counted(tmp_path, bad):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"i":0}\n' + bad + b'\n\n{"i":1}\n')
    assert read_lines(path) == ([{"i": 0}, {"i": 1}], 1)


def test_a_missing_file_has_no_lines(tmp_path):
    assert read_lines(tmp_path / "none.jsonl") == ([], 0)


def test_a_line_that_the_disk_cut_short_is_an_error_and_counts_as_torn(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    write = os.write
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda handle, data: write(handle, data[:4]))
        with pytest.raises(OSError, match="only 4 of 8 bytes of a line were written"):
            append_line(path, {"i": 0})
    append_line(path, {"i": 1})
    assert read_lines(path) == ([{"i": 1}], 1)


def test_only_a_dict_makes_a_line(tmp_path):
    with pytest.raises(ValueError, match="a line must hold a dict, got list"):
        append_line(tmp_path / "a.jsonl", [1])
    assert not (tmp_path / "a.jsonl").exists()


def test_lines_of_four_processes_never_mix(tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from nbhelpers.records import append_line\n"
        "for i in range(200): append_line(sys.argv[1], {'who': sys.argv[2], 'i': i, 'fill': sys.argv[2] * 3000})"
    )
    path = tmp_path / "a.jsonl"
    jobs = [subprocess.Popen([sys.executable, "-I", "-S", "-c", code, path, who]) for who in "abcd"]
    assert [job.wait() for job in jobs] == [0, 0, 0, 0]
    rows, torn = read_lines(path)
    assert torn == 0
    for who in "abcd":
        assert [row["i"] for row in rows if row["who"] == who] == list(range(200))


# where to write


@pytest.mark.parametrize("resume", [False, True])
def test_a_missing_or_empty_folder_is_fine_and_nothing_is_made(tmp_path, resume):
    assert check_output_folder(tmp_path / "a" / "b", resume) == tmp_path / "a" / "b"
    check_output_folder(tmp_path, resume)
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_empty_is_refused_with_the_way_out_unless_resumed(tmp_path):
    (tmp_path / ".hidden").touch()
    text = rf"^output folder '{tmp_path}' is not empty: choose another folder$"
    with pytest.raises(ValueError, match=text):
        check_output_folder(tmp_path)
    assert check_output_folder(str(tmp_path), resume=True) == tmp_path


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match="/a' is a file: choose another folder"):
        check_output_folder(tmp_path / "a")
    with pytest.raises(ValueError, match="cannot write to output folder .*Not a directory"):
        check_output_folder(tmp_path / "a" / "b")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC])
def test_a_place_that_cannot_be_written_is_named_with_the_reason(tmp_path, monkeypatch, number):
    def refuse(**_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(records.tempfile, "TemporaryFile", refuse)
    with pytest.raises(ValueError, match=rf"cannot write to output folder '{tmp_path}/x' \({os.strerror(number)}\)"):
        check_output_folder(tmp_path / "x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; the case above injects the error")
def test_a_folder_without_write_permission_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(ValueError, match="Permission denied"):
        check_output_folder(tmp_path / "x")


def test_a_file_that_changed_has_another_sha256_also_where_it_is_asked_for_again(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"one")
    first = records.sha256_known(path)
    assert first == records.sha256_file(path) == records.sha256_known(path)
    path.write_bytes(b"two!")
    assert records.sha256_known(path) == records.sha256_file(path) != first
