"""Does the pruning notebook do in a real browser what a person sets: form, Run, live pictures, Stop, download?"""

from __future__ import annotations

import json
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_lab import NOTEBOOK, STEP_SECONDS, Lab, LabPage, need_browser, open_lab, until

from nbhelpers.runs import Run, read_run

RUN_SECONDS = 240  # most a short run of the bundled model may take on a busy machine
QUICK = {
    "before": "PruningTabs(",
    "cell": "steps, control = 0, False",
}  # what papermill would put in: Run all is short


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    need_browser()
    with open_lab(tmp_path / "lab") as lab:
        yield lab


def runs(lab: Lab) -> list[Run]:
    """The runs on disk, oldest first."""
    return [read_run(folder) for folder in lab.run_folders()]


def run_id_inside(archive: Path) -> str:
    """What the one manifest in a downloaded zip says."""
    with zipfile.ZipFile(archive) as zipped:
        [manifest] = [name for name in zipped.namelist() if name.endswith("manifest.json")]
        return json.loads(zipped.read(manifest))["run_id"]


def set_form(page: LabPage, **values: object) -> None:
    """Set form fields as a person does: bool ticks a box, float moves a slider, int is written, str is chosen."""
    for name, value in values.items():
        match value:
            case bool():
                page.tick(name, value)
            case float():
                page.slide(name, value)
            case int():
                page.write(name, value)
            case _:
                page.choose(name, value)


def start(page: LabPage, lab: Lab) -> None:
    """Press Run and wait until the run's directory is there."""
    before = len(lab.run_folders())
    page.press("nbh-run")
    page.wait_status("running", seconds=STEP_SECONDS)
    until("a run directory", lambda: len(lab.run_folders()) > before, 60)


def run_cells(page: LabPage) -> None:
    """Run all cells, the run among them, and wait until the panel takes another one."""
    page.run_all(RUN_SECONDS)
    page.wait_status("finished", seconds=STEP_SECONDS)


def test_what_is_set_in_the_form_is_what_runs_and_stops_and_runs_again(lab, tmp_path):
    began = time.monotonic()
    with lab.open(NOTEBOOK, **QUICK) as page:
        run_cells(page)
        print(f"\nall cells ran after {time.monotonic() - began:.1f} s")
        already = len(runs(lab))
        assert page.is_enabled("nbh-run") and not page.is_enabled("nbh-stop")

        wanted = {"strategy": "magnitude", "level": 0.45, "steps": 8, "control": False}
        set_form(page, **wanted)
        page.watch_pictures()
        clicked = time.monotonic()
        page.double_click("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        assert page.is_enabled("nbh-stop") and not page.is_enabled("nbh-run")
        page.wait_status("finished", seconds=RUN_SECONDS)
        print(f"a run of 8 steps: {time.monotonic() - clicked:.1f} s, {len(page.pictures())} pictures")
        until("three pictures", lambda: page.different_pictures() >= 3, STEP_SECONDS)
        assert len(runs(lab)) == already + 1, "the second click started no second run"
        first = runs(lab)[-1]
        assert first.status == "finished"
        assert {name: first.config[name] for name in wanted} == wanted
        archive = page.download(tmp_path)
        assert first.run_id in archive.name and run_id_inside(archive) == first.run_id

        page.write("steps", 2000)
        page.watch_pictures()
        start(page, lab)
        until("live pictures", lambda: page.most_pictures_of_one_slot() >= 3, RUN_SECONDS)
        clicked = time.monotonic()
        page.press("nbh-stop")
        page.wait_status("stopped", seconds=60)
        print(f"Stop was honoured after {time.monotonic() - clicked:.2f} s")
        stopped = until("the record says so", lambda: [r for r in runs(lab)[-1:] if r.status == "interrupted"], 10)
        assert stopped[0].config["steps"] == 2000
        assert page.is_enabled("nbh-run") and not page.is_enabled("nbh-stop")

        page.write("steps", 2)
        start(page, lab)
        page.wait_status("finished", seconds=RUN_SECONDS)
        assert [run.status for run in runs(lab)[already:]] == ["finished", "interrupted", "finished"]
        assert runs(lab)[-1].config["steps"] == 2
    assert lab.foreign == [], "the page asked for something beyond this machine"
    print(f"all in {time.monotonic() - began:.1f} s")


BROKEN = """
from nbhelpers import experiments

def broken(*args, **kwargs):
    raise RuntimeError("the handler is broken")

experiments.PruningExperiment.run = broken
"""


@pytest.mark.slow
def test_a_broken_run_is_one_line_in_the_panel_with_its_traceback_folded(lab):
    with lab.open(NOTEBOOK, before="panel.run_now", cell=BROKEN) as page:
        with pytest.raises(AssertionError, match="cells failed.*the handler is broken"):
            page.run_all(RUN_SECONDS)
        page.press("nbh-run")
        status = page.wait_status("failed", seconds=30)
        assert "the handler is broken" in status and "\n" not in status.strip()
        details = page.part("nbh-error").locator("details")
        assert details.count() == 1 and details.get_attribute("open") is None
        assert "Traceback" in details.text_content()
        assert page.is_enabled("nbh-run") and not page.is_enabled("nbh-stop")
    assert runs(lab) == []


@pytest.mark.slow
def test_a_kernel_killed_in_a_run_leaves_it_interrupted_and_the_cells_run_again(lab):
    with lab.open(NOTEBOOK, **QUICK) as page:
        page.run_above("panel.run_now", RUN_SECONDS)
        page.write("steps", 2000)
        start(page, lab)
        assert runs(lab)[-1].status == "running"
        page.kill_kernel()
        assert runs(lab)[-1].status == "interrupted"
        run_cells(page)
        assert [run.status for run in runs(lab)] == ["interrupted", "finished"]


@pytest.mark.slow
def test_a_run_goes_on_through_a_reload_and_a_closed_tab_and_is_stopped_in_a_new_one(lab):
    """JupyterLab saves by itself every two minutes; here the notebook is saved at once."""
    with lab.open(NOTEBOOK, **QUICK) as page:
        run_cells(page)  # all of them: with outputs left that it did not make, JupyterLab trusts none after a reload
        page.write("steps", 2000)
        start(page, lab)
        page.save()
        page.reload()
        page.part("nbh-panel").wait_for(timeout=60_000)
        page.watch_pictures()
        until("the pictures go on", lambda: page.most_pictures_of_one_slot() >= 3, 60)
    steps = len(runs(lab)[-1].metrics)
    until("steps with no tab open", lambda: len(runs(lab)[-1].metrics) > steps + 1, 60, every=0.5)
    with lab.tab(NOTEBOOK.name) as page:
        page.part("nbh-panel").wait_for(timeout=60_000)
        page.wait_status("running", seconds=STEP_SECONDS)
        page.press("nbh-stop")
        page.wait_status("stopped", seconds=60)
        assert runs(lab)[-1].status == "interrupted" and page.is_enabled("nbh-run")


@pytest.mark.slow
def test_run_all_shows_a_picture_early_and_an_interrupt_stops_its_run(lab):
    """A cell that runs blocks the panel's own Stop, so the notebook's is pressed. Seconds are printed, not asserted."""
    with lab.open(NOTEBOOK, before="PruningTabs(", cell="steps = 2000") as page:
        page.watch_pictures()
        began = time.monotonic()
        page.start_all()
        until("a picture", page.pictures, RUN_SECONDS)
        print(f"\nfirst live picture {time.monotonic() - began:.1f} s after Run all")
        until("a training", lambda: page.most_pictures_of_one_slot() >= 3, RUN_SECONDS)
        clicked = time.monotonic()
        page.interrupt()
        page.wait_status("stopped", seconds=60)
        print(f"the interrupt was honoured after {time.monotonic() - clicked:.2f} s")
        assert runs(lab)[-1].status == "interrupted"


@pytest.mark.slow
def test_after_a_run_heads_are_closed_by_hand_and_nothing_is_cut_off_at_1280_and_at_800_pixels(lab):
    with lab.open(NOTEBOOK, **QUICK) as page:
        run_cells(page)
        closed = page.page.locator(".nbh-head.nbh-closed")
        chosen = closed.count()
        assert 0 < chosen == len(runs(lab)[-1].result["pruned_heads"])
        page.click(page.page.locator(".nbh-head:not(.nbh-closed)").first)
        until("one more head is closed", lambda: closed.count() == chosen + 1, STEP_SECONDS)
        until("it is measured", lambda: f"{chosen + 1} of" in page.text("nbh-heads"), 60)

        page.write("steps", -3)
        assert page.page.locator(".nbh-field-steps input").first.input_value() == "0", "out of range cannot be set"

        for width in (1280, 800):
            page.set_width(width)
            page.page.wait_for_timeout(500)
            cut_off = page.page.evaluate(
                """() => [...document.querySelectorAll('.nbh-panel, .nbh-panel *')]
                    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible')
                    .map(e => `${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""
            )
            assert (width, cut_off) == (width, [])
