"""Is the index one self-contained page, escaped, and the archive complete?"""

from __future__ import annotations

import zipfile
from pathlib import Path

from nbhelpers import report
from nbhelpers.runs import Run

FACT = {"name": "f", "ok": True, "says": "the claim", "saw": "1.0"}


def run(**changes) -> Run:
    result = {"verdict": "It went <b>well</b>.", "facts": [FACT], "text": {"generated": True}}
    fields = {
        "folder": Path("runs/x-1"),
        "run_id": "x-1",
        "name": "x",
        "kind": "other",
        "config": {},
        "status": "finished",
    }
    return Run(**{**fields, "metrics": [], "events": [], "result": result, "manifest": {}, "torn": {}, **changes})


def page(tmp_path, *entries) -> str:
    return report.index_page(list(entries), tmp_path / "index.html").read_text()


def test_the_index_says_headline_facts_and_stamp_with_everything_escaped(tmp_path):
    text = page(tmp_path, {"title": "<script>", "error": None, "runs": [run()]})
    assert "It went &lt;b&gt;well&lt;/b&gt;." in text and "&lt;script&gt;" in text and "<script>" not in text
    assert "holds: the claim" in text and "On text that this project generated itself." in text


def test_a_failed_notebook_and_a_failed_fact_are_said_in_the_index(tmp_path):
    bad = run(result={"verdict": "v", "facts": [FACT | {"ok": False}], "text": {"generated": False}})
    text = page(
        tmp_path, {"title": "t", "error": "cell 3 failed", "runs": [bad, run(result=None, status="interrupted")]}
    )
    assert "cell 3 failed" in text and "FAILED: the claim" in text and "x: interrupted" in text


def test_the_index_needs_nothing_from_outside(tmp_path):
    text = page(tmp_path, {"title": "t", "error": None, "runs": [run()]})
    assert "http" not in text and "src=" not in text.replace('src="data:', "")


def test_the_archive_holds_every_file_and_is_the_same_twice(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "a.txt").write_text("a")
    first = report.archive(tmp_path).read_bytes()
    assert zipfile.ZipFile(tmp_path / "results.zip").namelist() == ["runs/a.txt"]
    assert report.archive(tmp_path).read_bytes() == first


def test_large_weights_stay_out_of_the_archive_and_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LARGE_MODEL", 3)
    (tmp_path / "model.safetensors").write_bytes(b"1234")
    bundle = zipfile.ZipFile(report.archive(tmp_path))
    assert bundle.namelist() == ["LEFT_OUT.txt"]
    assert bundle.read("LEFT_OUT.txt") == b"model.safetensors (4 bytes)\n"


def test_kept_answers_of_a_comparison_stay_out_of_archives(tmp_path):
    place = tmp_path / "runs" / ".predictions" / "coding-1"
    place.mkdir(parents=True)
    (place / "answers.json").write_text("said by a patient")
    (tmp_path / "runs" / "result.json").write_text("{}")
    with zipfile.ZipFile(report.archive(tmp_path)) as bundle:
        assert bundle.namelist() == ["runs/result.json"]
