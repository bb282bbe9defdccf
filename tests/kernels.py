"""Notebooks for tests, executed in a kernel: with the package at hand, or without it and without a network.

No assert stands here: PYTEST_DONT_REWRITE.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"
VARIABLES = ("NBHELPERS_HEADLESS", "NBHELPERS_SOURCE", "NBHELPERS_RUNS", "HF_HUB_OFFLINE", "PYTHONPATH")
# Python imports this by itself at its start, after the .pth file through which an editable package is found.
ALONE = """
import os, socket, sys

HERE = ("127.0.0.1", "::1", "localhost")

sys.meta_path[:] = [finder for finder in sys.meta_path if "nbhelpers" not in getattr(finder, "__module__", "")]
sys.path[:] = [place for place in sys.path if "nbhelpers" not in place]


def guarded(name):
    original = getattr(socket.socket, name)

    def guard(self, *arguments):
        if self.family in (socket.AF_INET, socket.AF_INET6) and arguments[-1][0] not in HERE:
            with open(os.environ["REACHED_OUT"], "a") as file:
                print(name, arguments[-1], file=file)
            raise RuntimeError(f"{name} {arguments[-1]}: this kernel has no network")
        return original(self, *arguments)

    return guard


for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, guarded(name))
look_up = socket.getaddrinfo


def guarded_look_up(host, *arguments, **options):
    if host not in (None, "", *HERE):
        with open(os.environ["REACHED_OUT"], "a") as file:
            print("look-up", host, file=file)
        raise RuntimeError(f"look-up of {host}: this kernel has no network")
    return look_up(host, *arguments, **options)


socket.getaddrinfo = guarded_look_up
"""


def alone(monkeypatch, folder: Path) -> Path:
    """From here on new Python processes know no nbhelpers and reach loopback only; returns where attempts are noted."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    place = folder / "alone"
    place.mkdir()
    (place / "sitecustomize.py").write_text(ALONE)
    monkeypatch.setenv("PYTHONPATH", str(place))
    monkeypatch.setenv("REACHED_OUT", str(folder / "reached_out.txt"))
    return folder / "reached_out.txt"


def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """The notebook with its outputs, executed in `folder`; nbclient's CellExecutionError where a cell fails."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = nbformat.from_dict(notebook)
    resources = {"metadata": {"path": str(folder)}}
    return NotebookClient(copy, kernel_name="python3", timeout=1800, resources=resources).execute()


def shown_widgets(notebook: nbformat.NotebookNode) -> int:
    """How many widgets are displayed in it."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return sum(WIDGET in output.get("data", {}) for output in outputs)


def printed(notebook: nbformat.NotebookNode) -> str:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)
