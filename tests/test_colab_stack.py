"""Do the notebooks run as a person runs them, in both generations of widgets? `make test-slow` calls this in both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import kernels
import nbformat
import pytest
from test_repository import NOTEBOOKS

from nbhelpers import headless
from nbhelpers.runs import read_run

FIRST = "from nbhelpers import notebook"


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def set_up(path: Path) -> str:
    """What a notebook does to find the package."""
    return code_cells(path)[0].source.partition(FIRST)[0]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom_with_its_widgets(path, tmp_path, monkeypatch):
    for name in kernels.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NBHELPERS_RUNS", str(tmp_path / "runs"))
    notebook = nbformat.read(path, 4)
    done = kernels.execute(notebook, tmp_path / "notebooks")
    source = "\n".join(cell.source for cell in code_cells(path))
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    runs = (
        [read_run(found.parent) for found in (tmp_path / "runs").glob("*/manifest.json")]
        if headless.RUN_TAG in tags
        else []
    )
    assert [run.status for run in runs] == ["finished"] * tags.count(headless.RUN_TAG)
    assert all(run.result["all_facts_hold"] for run in runs)
    assert (kernels.shown_widgets(done) > 0) == ("panel.show()" in source), "a form is displayed where there is one"
    assert "running in jupyter" in kernels.printed(done), "somebody may be looking: widgets are really made"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_notebook_finds_the_package_in_the_same_way(path):
    assert set_up(path) == set_up(NOTEBOOKS[0]) and "nbhelpers" in set_up(path)


def set_up_alone(folder: Path) -> subprocess.CompletedProcess:
    code = set_up(NOTEBOOKS[0]) + "import nbhelpers\nprint(nbhelpers.__file__)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, env=dict(os.environ))


def test_where_the_package_is_not_one_sentence_says_what_to_do(tmp_path, monkeypatch):
    kernels.alone(monkeypatch, tmp_path)
    (tmp_path / "notebooks").mkdir()
    done = set_up_alone(tmp_path / "notebooks")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("ModuleNotFoundError: nbhelpers is not here: upload its wheel")


def test_the_package_in_the_parent_folder_is_found(tmp_path, monkeypatch):
    kernels.alone(monkeypatch, tmp_path)
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "nbhelpers").mkdir()
    (tmp_path / "nbhelpers" / "__init__.py").write_text("")
    assert set_up_alone(tmp_path / "notebooks").stdout.strip() == str(tmp_path / "nbhelpers" / "__init__.py")


@pytest.mark.parametrize("place", ["nbhelpers-0.1.0-py3-none-any.whl", "drive/MyDrive/nbhelpers/nbhelpers-0-any.whl"])
def test_an_uploaded_wheel_is_installed_from_its_file_and_never_from_an_index(tmp_path, monkeypatch, place):
    """A stand-in for subprocess notes what pip would be told."""
    kernels.alone(monkeypatch, tmp_path)
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("a wheel")
    code = "import subprocess\nsubprocess.run = lambda command, check: print(*command[1:])\n" + set_up(NOTEBOOKS[0])
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"-m pip install -q --no-index --no-deps {place}"
