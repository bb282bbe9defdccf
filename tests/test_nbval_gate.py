"""Would nbval notice? The gate over the committed notebooks, and the proof that a changed number fails it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = ROOT / "notebooks" / "nbval_sanitize.cfg"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
NUMBER = re.compile(r"(?<![\w.-])\d+\.\d+(?![\w.])")


def nbval(path: Path) -> subprocess.CompletedProcess[str]:
    """The command of the Makefile over one notebook, in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-c",
        "/dev/null",
        "--rootdir",
        path.parent,
    ]
    command += [
        "--nbval",
        "--nbval-current-env",
        "--nbval-cell-timeout",
        "1200",
        "--nbval-sanitize-with",
        SANITIZE,
        path,
    ]
    environ = {**os.environ, "NBHELPERS_HEADLESS": "1"}  # as the Makefile: nobody looks, so no panel is displayed
    return subprocess.run(
        list(map(str, command)), cwd=path.parent, capture_output=True, text=True, check=False, env=environ
    )


def compared_texts(notebook: nbformat.NotebookNode) -> list[tuple[nbformat.NotebookNode, str]]:
    """(place, key) of every plain text that nbval compares, in order."""
    places = []
    for cell in notebook.cells:
        if cell.cell_type != "code" or {"nbval-ignore-output", "nbval-skip"} & set(cell.metadata.get("tags", [])):
            continue
        for output in cell.outputs:
            if output.output_type == "stream":
                places.append((output, "text"))
            elif "text/plain" in output.get("data", {}):
                places.append((output["data"], "text/plain"))
    return places


def change_one_number(notebook: nbformat.NotebookNode) -> str:
    """Turn the last digit of the last compared number into another one; returns what was changed."""
    for place, key in reversed(compared_texts(notebook)):
        if numbers := list(NUMBER.finditer(place[key])):
            old = numbers[-1]
            new = old.group()[:-1] + str((int(old.group()[-1]) + 5) % 10)
            place[key] = place[key][: old.start()] + new + place[key][old.end() :]
            return f"{old.group()} -> {new}"
    return ""


def small_notebook(path: Path, *sources: str) -> Path:
    """A notebook of these cells, executed, so that it holds true outputs."""
    from nbclient import NotebookClient

    new = nbformat.v4
    notebook = new.new_notebook(
        cells=[new.new_code_cell(source) for source in sources],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    NotebookClient(notebook, kernel_name="python3", timeout=60).execute()
    nbformat.write(notebook, path)
    return path


def test_a_true_notebook_passes_and_a_changed_number_fails(tmp_path):
    path = small_notebook(
        tmp_path / "small.ipynb",
        "print(f'perplexity {9 / 2:.3f}')",
        "import secrets, time\nprint(f'runs/a-{time.strftime(\"%Y%m%dT%H%M%SZ\")}-{secrets.token_hex(3)} {object()}')",
    )
    assert nbval(path).returncode == 0, nbval(path).stdout
    notebook = nbformat.read(path, as_version=4)
    assert change_one_number(notebook) == "4.500 -> 4.505"
    nbformat.write(notebook, path)
    spoiled = nbval(path)
    assert spoiled.returncode == 1
    assert "1 failed, 1 passed" in spoiled.stdout
    assert "4.505" in spoiled.stdout


def test_the_sanitize_file_replaces_names_and_never_a_measured_number():
    patterns = re.findall(r"^regex: (.*)$\n^replace: (.*)$", SANITIZE.read_text(), flags=re.MULTILINE)
    text = "loss 0.123456 steps 20261121 perplexity 4.4072 of 199290 tokens, head [3, 7], 30.5 %, 1e-05"
    for regex, replacement in patterns:
        assert re.sub(regex, replacement, text) == text
    assert patterns


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_a_number_that_nbval_compares(path):
    assert change_one_number(nbformat.read(path, as_version=4))


@pytest.mark.slow
def test_a_changed_number_in_a_committed_notebook_fails(tmp_path):
    path = next(path for path in NOTEBOOKS if path.stem.startswith("05"))  # as every one holds a number, see above
    notebook = nbformat.read(path, as_version=4)
    changed = change_one_number(notebook)
    assert changed, "no number in it is compared"
    copy = tmp_path / path.name
    nbformat.write(notebook, copy)
    spoiled = nbval(copy)
    assert spoiled.returncode == 1, f"{changed} went unnoticed:\n{spoiled.stdout}"
    assert re.search(r"\b1 failed", spoiled.stdout), spoiled.stdout
