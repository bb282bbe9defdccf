"""Does the browser harness see what a person would: a set slider, a chosen option, a new picture, a broken handler?"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from browser_lab import copy_notebook, missing_browser, need_browser, open_lab, until

# A panel of five widgets with the classes of the real one; its run shows four pictures and says what was set.
STUB = """
import io, threading, time
import ipywidgets as w
from matplotlib.figure import Figure

def named(widget, *names):
    for name in names:
        widget.add_class(name)
    return widget

def png(points):
    figure, file = Figure(figsize=(2, 1)), io.BytesIO()
    figure.subplots().plot(range(points))
    figure.savefig(file, format="png")
    return file.getvalue()

strategy = named(w.Dropdown(options=["gradient", "magnitude"]), "nbh-field-strategy")
level = named(w.FloatSlider(0.3, min=0, max=1, step=0.05), "nbh-field-level")
button = named(w.Button(description="Run"), "nbh-run")
broken = named(w.Button(description="Broken"), "nbh-broken")
status, live = named(w.HTML("ready"), "nbh-status"), w.Image(format="png", value=png(2))

def job():
    for points in range(3, 7):
        live.value = png(points)
        time.sleep(0.8)
    live.value = png(6)  # the same bytes again
    status.value = f"finished {strategy.value} {level.value:.2f}"
    button.disabled = False

def run(_):
    button.disabled = True
    status.value = "running"
    threading.Thread(target=job).start()

def fail(_):
    raise RuntimeError("shown nowhere")

button.on_click(run)
broken.on_click(fail)
named(w.VBox([strategy, level, button, broken, status, named(w.HBox([live]), "nbh-live")]), "nbh-panel")
"""

MOVES_UNDER_THE_MOUSE = """() => document.addEventListener('mousedown',
    () => { document.querySelector('.nbh-panel').style.marginTop = '90px'; }, {once: true, capture: true})"""


@pytest.fixture
def stub(tmp_path) -> Path:
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [nbformat.v4.new_code_cell("import os\nprint(os.getcwd())"), nbformat.v4.new_code_cell(STUB)]
    path = tmp_path / "stub.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def test_what_is_set_is_what_runs_a_page_that_moves_is_clicked_again_and_a_broken_handler_is_noticed(stub, tmp_path):
    """One start of JupyterLab for all claims: it is most of the time."""
    need_browser()
    began = time.monotonic()
    with open_lab(tmp_path / "lab") as lab:
        with lab.open(stub) as page:
            print(f"kernel connected after {time.monotonic() - began:.1f} s")
            page.run_all()
            page.choose("strategy", "magnitude")
            page.slide("level", 0.45)
            page.watch_pictures()
            page.press("nbh-run")
            page.wait_status("running")
            assert not page.is_enabled("nbh-run")
            assert page.wait_status("finished", seconds=30) == "finished magnitude 0.45"
            until("five pictures", lambda: page.most_pictures_of_one_slot() >= 5, 60)
            assert page.most_pictures_of_one_slot() == 5, "one before, four while it ran, none for the same bytes"

            page.page.evaluate(MOVES_UNDER_THE_MOUSE)
            page.press("nbh-run")
            page.wait_status("running")
            page.wait_status("finished", seconds=30)

            page.press("nbh-broken")
            with pytest.raises(AssertionError, match="status never began with"):
                page.wait_status("failed", seconds=2)

            path = page.screenshot(tmp_path / "panel.png", ".nbh-panel")
            assert path.stat().st_size > 1000
        assert lab.foreign == []
        server, kernels = lab.server, lab.kernels()
        assert len(kernels) == 1
    assert not server.is_running() and not any(kernel.is_running() for kernel in kernels)
    print(f"all in {time.monotonic() - began:.1f} s")


@pytest.mark.slow
def test_a_failed_cell_is_seen_and_nothing_is_left_after_an_error_inside(stub, tmp_path):
    need_browser()
    held = []

    def fail() -> None:
        with open_lab(tmp_path / "lab") as lab, lab.open(stub, before="ipywidgets", cell="1 / 0") as page:
            held.extend([lab.server, *lab.kernels()])
            page.run_all()

    with pytest.raises(AssertionError, match="cells failed.*ZeroDivisionError"):
        fail()
    assert len(held) == 2 and not any(process.is_running() for process in held)


@pytest.mark.slow
def test_a_killed_and_a_restarted_kernel_can_run_the_cells_again(stub, tmp_path):
    need_browser()
    with open_lab(tmp_path / "lab") as lab, lab.open(stub) as page:
        page.run_all()
        page.kill_kernel()
        page.run_all()
        [first] = lab.kernels()
        page.restart_kernel()
        [second] = until("the new kernel", lambda: [new for new in lab.kernels() if new != first], 30)
        page.run_all()
        page.press("nbh-run")
        page.wait_status("finished")
        assert psutil.pid_exists(second.pid)


@pytest.mark.slow
def test_a_saved_panel_is_there_again_after_a_reload(stub, tmp_path):
    need_browser()
    with open_lab(tmp_path / "lab") as lab, lab.open(stub) as page:
        page.run_all()
        page.slide("level", 0.5)
        page.save()
        page.reload()
        page.part("nbh-panel").wait_for()
        assert page.slider("level") == 0.5
        page.press("nbh-run")
        assert page.wait_status("finished") == "finished gradient 0.50"


def test_a_cell_is_put_in_where_it_was_asked_for(stub, tmp_path):
    copy = copy_notebook(stub, tmp_path / "copy.ipynb", before="ipywidgets", cell="x = 1")
    assert [cell.source == "x = 1" for cell in nbformat.read(copy, as_version=4).cells] == [False, True, False]
    with pytest.raises(ValueError, match="no code cell of stub.ipynb holds 'not there'"):
        copy_notebook(stub, tmp_path / "copy.ipynb", before="not there", cell="x = 1")


@pytest.mark.parametrize("required, outcome", [("1", "1 failed"), ("0", "1 skipped")])
def test_a_missing_browser_skips_with_the_reason_and_fails_where_it_is_required(tmp_path, required, outcome):
    (tmp_path / "test_inner.py").write_text(
        "import browser_lab\nbrowser_lab.CHROMIUM = 'nowhere/chromium'\n\ndef test(): browser_lab.need_browser()\n"
    )
    environ = os.environ | {"NBHELPERS_REQUIRE_BROWSER": required, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-m", "pytest", "-q", "-rsf", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, env=environ, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert outcome in done.stdout and "no browser at nowhere/chromium" in done.stdout, done.stdout


def test_the_reason_for_a_missing_browser_is_one_line():
    reason = missing_browser()
    assert reason is None or (reason and "\n" not in reason)
