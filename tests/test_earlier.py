"""Are earlier runs found wherever they lie, and can an uploaded archive do no harm?"""

from __future__ import annotations

import shutil
import stat
import zipfile
from pathlib import Path

import pytest
from run_folders import killed_run, tracker

from nbhelpers import earlier, report
from nbhelpers.records import read_json, write_json
from nbhelpers.runs import read_run
from nbhelpers.tracking import ExperimentConfig

RESULT = {"verdict": "it got smaller", "facts": [], "text": {"generated": True}}


def run(folder: Path, name: str = "try", created: str = "2026-01-01T00:00:00Z", result=RESULT, model=True) -> Path:
    """A finished run, with a saved model of one small file."""
    config = ExperimentConfig(name=name, kind="pruning", model="tiny-llama")
    with tracker(folder, config) as t:
        if model:
            (folder / "model").mkdir()
            (folder / "model" / "config.json").write_text("{}")
        t.finish(result)
    manifest = read_json(folder / "manifest.json")
    write_json(folder / "manifest.json", {**manifest, "created": created, "run_id": folder.name})
    return folder


def zipped(path: Path, **files: str | bytes) -> Path:
    with zipfile.ZipFile(path, "w") as bundle:
        for name, content in files.items():
            bundle.writestr(name, content)
    return path


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    """The folder of a notebook, with uploads in it and runs below."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ------------------------------------------------------------------------------------------------ finding


def test_runs_of_this_machine_and_of_drive_are_listed_newest_first_and_once(place):
    run(place / "runs" / "a", created="2026-01-01T00:00:00Z")
    run(place / "runs" / "b", created="2026-01-03T00:00:00Z")
    run(place / "drive" / "c", created="2026-01-02T00:00:00Z")
    shutil.copytree(place / "runs" / "a", place / "drive" / "a")
    found = earlier.find_runs("runs", "drive")
    assert [r.run_id for r in found] == ["b", "c", "a"]
    assert found[2].folder == Path("runs/a"), "the one of this machine"


def test_of_two_copies_the_finished_one_counts(place):
    run(place / "drive" / "a")
    shutil.copytree(place / "drive" / "a", place / "runs" / "a")
    (place / "runs" / "a" / "result.json").unlink()
    assert [(r.folder, r.status) for r in earlier.find_runs("runs", "drive")] == [(Path("drive/a"), "finished")]


def test_where_there_is_nothing_there_are_no_runs_and_nothing_is_made(place):
    assert earlier.find_runs("runs", None, uploads="nowhere") == [] and list(place.iterdir()) == []
    assert earlier.table([]) == "no earlier runs"


def test_a_broken_run_is_told_in_one_line_and_the_others_are_listed(place):
    run(place / "runs" / "a")
    (place / "runs" / "broken").mkdir()
    (place / "runs" / "broken" / "manifest.json").write_text('{"run_id":')
    said = []
    assert [r.run_id for r in earlier.find_runs("runs", tell=said.append)] == ["a"]
    assert len(said) == 1 and "broken/manifest.json" in said[0] and "\n" not in said[0]


def test_the_table_names_run_kind_model_status_saved_model_and_headline(place):
    run(place / "runs" / "a")
    killed_run(place / "runs" / "k")
    rows = {r.run_id: r for r in earlier.find_runs("runs")}
    rows["a"].manifest["created"] = "9999"
    shown = earlier.table(sorted(rows.values(), key=lambda r: r.kind)).splitlines()
    assert shown == [
        "run  kind     model       status       saved model",
        "try  pruning  tiny-llama  finished     runs/a/model",
        "    it got smaller",
        "try  test                 interrupted  none",
    ]


def test_a_result_without_a_headline_is_listed_without_one(place):
    run(place / "runs" / "a", result={"facts": []}, model=False)
    assert earlier.table(earlier.find_runs("runs")).splitlines()[1:] == ["try  pruning  tiny-llama  finished  none"]


# ------------------------------------------------------------------------------------------------ archives


def test_an_archived_run_comes_back_the_same(place):
    made = run(place / "there" / "a-1")
    before = files_of(made)
    archive = earlier.archive_run(made)
    assert archive == made / "a-1.zip"
    shutil.copy(archive, place / "run a-1.zip")
    assert [r.folder for r in earlier.find_runs("runs")] == [Path("runs/a-1")]
    assert files_of(place / "runs" / "a-1") == before


def test_archiving_twice_gives_the_same_bytes(place):
    made = run(place / "there" / "a-1")
    first = earlier.archive_run(made).read_bytes()
    assert earlier.archive_run(made).read_bytes() == first


def test_the_archive_of_a_whole_suite_gives_all_its_runs(place):
    run(place / "results" / "runs" / "a")
    run(place / "results" / "runs" / "b", created="2026-01-02T00:00:00Z")
    shutil.move(report.archive(place / "results"), place / "results (1).zip")
    assert [r.folder for r in earlier.find_runs("runs")] == [Path("runs/b"), Path("runs/a")]
    assert not (place / "runs" / "results").exists()


def test_a_run_that_is_there_is_not_overwritten(place):
    made = run(place / "runs" / "a")
    shutil.copy(earlier.archive_run(made), place / "results.zip")
    (made / "a.zip").unlink()
    (made / "note.txt").write_text("mine")
    assert earlier.unpack("results.zip", "runs") == [] and (made / "note.txt").read_text() == "mine"


def test_a_run_inside_a_run_is_a_part_of_it(place):
    outer = run(place / "there" / "a")
    shutil.copytree(run(place / "there" / "b"), outer / "artefacts" / "b")
    shutil.move(earlier.archive_run(outer), place / "results.zip")
    assert earlier.unpack("results.zip", "runs") == [Path("runs/a")]
    assert read_run("runs/a/artefacts/b").run_id == "b"


def torn(path: Path) -> None:
    run(path.parent / "there" / "a")
    content = earlier.archive_run(path.parent / "there" / "a").read_bytes()
    path.write_bytes(content[: len(content) // 2])


def altered(path: Path) -> None:
    run(path.parent / "there" / "a")
    content = bytearray(earlier.archive_run(path.parent / "there" / "a").read_bytes())
    content[content.index(b"manifest.json") + 40] ^= 0xFF
    path.write_bytes(content)


def with_entry(name: str, mode: int = 0):
    def make(path: Path) -> None:
        run(path.parent / "there" / "a")
        shutil.copy(earlier.archive_run(path.parent / "there" / "a"), path)
        with zipfile.ZipFile(path, "a") as bundle:
            entry = zipfile.ZipInfo("x")
            entry.filename, entry.external_attr = name, mode << 16
            bundle.writestr(entry, "outside")

    return make


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (torn, "is no whole zip archive"),
        (altered, "is no whole zip archive"),
        (lambda path: path.write_text("hello"), "is no whole zip archive"),
        (lambda path: zipped(path, **{"photos/a.txt": "x"}), "holds no run"),
        (lambda path: zipped(path, **{"assets/manifest.json": '{"format": 1}'}), "holds no run"),
        (lambda path: zipped(path, **{"a/manifest.json": "{"}), "holds no run"),
        (lambda path: zipped(path), "holds no run"),
        (
            lambda path: zipped(path, **{"a/manifest.json": '{"run_id":1,"kind":1,"config":1,"status":1}'}),
            "is not the manifest of a run",
        ),
        (with_entry("../../outside.txt"), "'../../outside.txt' would leave its folder"),
        (with_entry("/outside.txt"), "would leave its folder"),
        (with_entry("a/../../outside.txt"), "would leave its folder"),
        (with_entry("..\\outside.txt"), "would leave its folder"),
        (with_entry("C:outside.txt"), "would leave its folder"),
        (with_entry("link", stat.S_IFLNK | 0o777), "is a link or a device"),
    ],
)
def test_a_bad_archive_is_told_in_one_line_and_leaves_nothing(place, make, reason):
    make(place / "bad.zip")
    outside = files_of(place)
    said = []
    assert earlier.find_runs("runs", uploads=".", tell=said.append) == []
    assert len(said) == 1 and said[0].startswith("bad.zip: ") and reason in said[0] and "\n" not in said[0]
    assert files_of(place) == outside and not (place.parent / "outside.txt").exists()
    assert not (place / "runs").exists() or list((place / "runs").iterdir()) == []


def test_an_archive_that_is_too_large_is_refused_before_anything_is_written(place, monkeypatch):
    shutil.move(earlier.archive_run(run(place / "there" / "a")), place / "results.zip")
    monkeypatch.setattr(earlier, "MOST_BYTES", 100)
    with pytest.raises(ValueError, match="the limit is 20000 of 0 MB: nothing of it was unpacked"):
        earlier.unpack("results.zip", "runs")
    monkeypatch.setattr(earlier, "MOST_BYTES", 2**30)
    monkeypatch.setattr(earlier, "MOST_FILES", 2)
    with pytest.raises(ValueError, match="the limit is 2 of"):
        earlier.unpack("results.zip", "runs")
    assert not (place / "runs").exists()


# ------------------------------------------------------------------------------------------------ keeping


def test_a_kept_run_is_the_same_elsewhere(place):
    made = run(place / "runs" / "a")
    before = files_of(made)
    earlier.archive_run(made)
    assert earlier.keep(made, place / "drive") == place / "drive" / "a"
    assert files_of(place / "drive" / "a") == before
    assert [path.name for path in (place / "drive").iterdir()] == ["a"]


def test_keeping_again_replaces_the_earlier_copy(place):
    made = run(place / "runs" / "a")
    earlier.keep(made, "drive")
    (made / "note.txt").write_text("later")
    (made / "model" / "config.json").unlink()
    assert files_of(earlier.keep(made, "drive")) == files_of(made)
    assert [path.name for path in (place / "drive").iterdir()] == ["a"]


def test_a_run_at_work_is_not_kept(place):
    with tracker(place / "runs" / "a"), pytest.raises(ValueError, match="still running: keep it when it has ended"):
        earlier.keep("runs/a", "drive")
    assert not (place / "drive").exists()


@pytest.mark.parametrize("fault", ["copy", "rename", "short"])
def test_a_copy_that_fails_leaves_the_earlier_one_and_nothing_else(place, monkeypatch, fault):
    made = run(place / "runs" / "a")
    before = files_of(earlier.keep(made, "drive"))
    (made / "note.txt").write_text("later")
    rename, copytree = Path.rename, shutil.copytree

    def full(self, target):
        if self.name.endswith(".part"):
            raise OSError(28, "No space left on device")
        return rename(self, target)

    def fail(source, target, *more, **options):
        copytree(source, target, *more, **options)
        if not str(target).endswith(".part"):  # a folder inside
            return
        if fault == "copy":
            raise shutil.Error([("a", "b", "No space left on device")])
        (Path(target) / "manifest.json").write_text("{")

    if fault == "rename":
        monkeypatch.setattr(Path, "rename", full)
    else:
        monkeypatch.setattr(earlier.shutil, "copytree", fail)
    with pytest.raises(OSError, match="could not be kept in 'drive'"):
        earlier.keep(made, "drive")
    assert files_of(place / "drive" / "a") == before
    assert [path.name for path in (place / "drive").iterdir()] == ["a"]
