"""Is one uploaded file enough? The self-contained notebooks, executed where there is no package and no network."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import kernels
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from test_cli import answer, call
from test_repository import NOTEBOOKS

from nbhelpers import headless, models, selfcontained


def notebook(parameters: str = "level: float = 0.3  # share"):
    cells = [
        new_markdown_cell("# A question"),
        new_code_cell("import nbhelpers", execution_count=1),
        new_code_cell(parameters, metadata={"tags": ["parameters"]}),
    ]
    return new_notebook(cells=cells, metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})


@pytest.fixture(scope="module")
def bundle() -> zipfile.ZipFile:
    return zipfile.ZipFile(io.BytesIO(selfcontained.package_zip(["tiny-llama"])))


# ------------------------------------------------------------------------------------------------ what is inside


def test_the_whole_package_is_inside_with_one_model_and_the_licence(bundle):
    package = selfcontained.PACKAGE
    files = {f"nbhelpers/{path.relative_to(package).as_posix()}" for path in package.rglob("*") if path.is_file()}
    files = {name for name in files if "__pycache__" not in name}
    others = {name for name in files if "assets/models/" in name and "/tiny-llama/" not in name}
    assert others and set(bundle.namelist()) == files - others | {"LICENSE"}
    weights = "nbhelpers/assets/models/tiny-llama/model.safetensors"
    assert bundle.read(weights) == (models.BUNDLED / "tiny-llama" / "model.safetensors").read_bytes()


def test_the_manifest_inside_lists_only_what_is_inside(bundle):
    inside = json.loads(bundle.read("nbhelpers/assets/manifest.json"))
    whole = json.loads((models.BUNDLED.parent / "manifest.json").read_text())
    assert inside == {**whole, "models": {"tiny-llama": whole["models"]["tiny-llama"]}} and len(whole["models"]) > 1


def test_the_same_files_give_the_same_bytes():
    assert selfcontained.package_zip(["tiny-llama"]) == selfcontained.package_zip(["tiny-llama"])


def test_the_models_are_those_of_the_parameters_beside_the_default():
    assert selfcontained.models_needed(notebook()) == ["tiny-llama"]
    assert selfcontained.models_needed(notebook('model: str = "tiny-opt"  # name')) == ["tiny-llama", "tiny-opt"]
    assert selfcontained.models_needed(notebook('model: str = "gpt2"  # name')) == ["tiny-llama"]


def test_a_model_that_is_not_here_is_named():
    with pytest.raises(LookupError, match="bundled model 'tiny-bert' is not here"):
        selfcontained.package_zip(["tiny-bert"])


def test_one_hidden_cell_comes_before_the_first_and_everything_else_stays():
    before = notebook()
    copy, carried = selfcontained.self_contained(before)
    assert carried == ["tiny-llama"] and len(before.cells) == 3
    cell = copy.cells.pop(1)
    assert copy == before, "outputs and counts as they were"
    assert (
        cell.metadata.cellView == "form"
        and cell.source.startswith("#@title")
        and max(map(len, cell.source.splitlines())) < 5000
    )
    nbformat.validate(nbformat.from_dict({**before, "cells": [*before.cells, cell]}))


def test_the_cell_unpacks_the_package_once_and_puts_it_before_an_installed_one(tmp_path, monkeypatch):
    kernels.alone(monkeypatch, tmp_path)
    (tmp_path / "alone" / "nbhelpers").mkdir()
    (tmp_path / "alone" / "nbhelpers" / "__init__.py").write_text("raise RuntimeError('the installed one')")
    source = selfcontained.self_contained(notebook())[0].cells[1].source
    code = f"{source}\nimport nbhelpers.runtime\nprint(nbhelpers.__file__)"
    (tmp_path / "cell.py").write_text(code)  # too long for a command line
    place = tmp_path / "empty"
    place.mkdir()
    done = [
        subprocess.run([sys.executable, tmp_path / "cell.py"], cwd=place, capture_output=True, text=True, check=True)
        for _ in range(2)
    ]
    [folder] = place.iterdir()
    assert folder.name.startswith(".nbhelpers-") and not folder.name.endswith(".part")
    assert [run.stdout.strip() for run in done] == [str(folder / "nbhelpers" / "__init__.py")] * 2


def test_another_content_is_unpacked_to_another_folder():
    sources = [
        selfcontained.self_contained(notebook(p))[0].cells[1].source for p in ("a: int = 1", 'a: str = "tiny-opt"')
    ]
    folders = [
        ast.literal_eval(next(line for line in s.splitlines() if line.startswith("folder"))[9:].split("  #")[0])
        for s in sources
    ]
    assert folders[0] != folders[1]


# ------------------------------------------------------------------------------------------------ the files


def test_every_notebook_is_written_and_those_with_one_model_are_smaller_than_five_megabytes(tmp_path):
    found = answer("notebooks", "colab", "--out", tmp_path)["notebooks"]
    assert [row["notebook"] for row in found] == [path.stem for path in NOTEBOOKS]
    assert all(Path(row["path"]).stat().st_size == row["bytes"] < 12 * 10**6 for row in found)
    assert all(row["bytes"] < 5 * 10**6 or "small-llama" in row["models"] for row in found)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    call("notebooks", "colab", "--out", tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_one_that_does_not_fit_is_refused_with_its_size(tmp_path, monkeypatch):
    monkeypatch.setattr(selfcontained, "MOST_BYTES", 10**6)
    with pytest.raises(
        ValueError, match=r"00_setup would have [23]\.\d MB with tiny-llama and its outputs, the limit is 1 MB"
    ):
        selfcontained.write_all(tmp_path / "out", ["00_setup"])
    assert not (tmp_path / "out").exists()


def test_an_installed_package_without_notebooks_says_where_to_go(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(headless, "__file__", str(tmp_path / "site-packages" / "nbhelpers" / "headless.py"))
    done = call("notebooks", "colab", "--out", tmp_path / "out")
    assert done.exit_code == 2 and "no folder 'notebooks' here; run this in the project's folder" in done.stderr


# ------------------------------------------------------------------------------------------------ alone


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_one_uploaded_file_is_enough(path, tmp_path, monkeypatch):
    """An empty folder, a kernel that knows no nbhelpers and reaches nothing but loopback."""
    [written] = selfcontained.write_all(tmp_path / "dist", [path.stem])
    reached_out = kernels.alone(monkeypatch, tmp_path)
    folder = tmp_path / "content" / "deep"
    done = kernels.execute(nbformat.read(written["path"], 4), folder)
    assert not reached_out.exists(), reached_out.read_text()
    said = kernels.printed(done)
    assert "OK     " in said and "FAILED" not in said
    tags = [tag for cell in done.cells for tag in cell.metadata.get("tags", [])]
    runs = [place for place in (folder / "runs").iterdir() if (place / "manifest.json").is_file()]
    assert len(runs) == tags.count(headless.RUN_TAG), "its runs, beside the notebook"
    assert str(os.path.dirname(selfcontained.PACKAGE)) not in said


@pytest.mark.slow
def test_without_the_cell_that_carries_the_package_the_same_kernel_fails(tmp_path, monkeypatch):
    kernels.alone(monkeypatch, tmp_path)
    with pytest.raises(CellExecutionError, match="nbhelpers is not here: upload its wheel"):
        kernels.execute(nbformat.read(NOTEBOOKS[0], 4), tmp_path / "content" / "deep")


@pytest.mark.slow
def test_a_kernel_that_reaches_out_is_noticed(tmp_path, monkeypatch):
    reached_out = kernels.alone(monkeypatch, tmp_path)
    source = "import socket\nsocket.create_connection(('192.0.2.1', 80), timeout=5)"
    with pytest.raises(CellExecutionError, match="this kernel has no network"):
        kernels.execute(new_notebook(cells=[new_code_cell(source)]), tmp_path / "content")
    assert "192.0.2.1" in reached_out.read_text()
