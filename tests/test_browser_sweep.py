"""Does the sweep notebook do in a browser what a person sets, and go on in its folder after its kernel was killed?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_lab import STEP_SECONDS, SWEEP, Lab, need_browser, open_lab, until
from test_browser import RUN_SECONDS

from nbhelpers import sweep
from nbhelpers.ledger import Ledger

VALUES = 'models, tasks, methods, steps, limit = "tiny-gpt2", "boolq", "unstructured", 40, 20'
QUICK = {"before": "SweepPanel(", "cell": VALUES}  # what papermill would put in: 6 rows, 5 jobs
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    need_browser()
    with open_lab(tmp_path / "lab") as lab:
        yield lab


def folder(lab: Lab) -> Path:
    """The one sweep that is there."""
    [found] = [path.parent for path in lab.runs.glob("*/plan.json")]
    return found


def done(lab: Lab) -> list[str]:
    return sorted(path.parent.name for path in folder(lab).glob("runs/*/result.json"))


def test_after_a_killed_kernel_the_same_cells_go_on_and_a_changed_form_adds_to_the_sweep(lab):
    with lab.open(SWEEP, **QUICK) as page:
        page.run_above("panel.run_now", RUN_SECONDS)
        until("what it will do is said", lambda: "5\ntrainings" in page.text("nbh-before"), STEP_SECONDS)
        assert len(done(lab)) == 1, "the job that is explained"
        page.write("sparsities", "0, 0.5, 1.7")
        until("it is refused", lambda: "must be in [0, 1], got 1.7" in page.text("nbh-field-sparsities"), STEP_SECONDS)
        assert not page.is_enabled("nbh-run")
        page.write("sparsities", "0, 0.5, 0.9")
        page.press("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        until("two more jobs are done", lambda: len(done(lab)) >= 3, RUN_SECONDS)
        page.kill_kernel()
        before = done(lab)
        assert sweep.status(folder(lab))["missing"] > 0

        page.run_above("panel.run_now", RUN_SECONDS)
        until("what is done is said", lambda: "of 5 jobs are done" in page.text("nbh-estimate"), STEP_SECONDS)
        page.watch_pictures()
        page.double_click("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        assert set(before) <= set(done(lab)) and sweep.status(folder(lab))["done"] == 5
        until("the curve is drawn", page.pictures, STEP_SECONDS)

        page.click(page.page.locator(".nbh-field-methods label", has_text="random").first)
        until("the tiles follow", lambda: "9\ntrainings" in page.text("nbh-before"), STEP_SECONDS)
        page.press("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        found = sweep.status(folder(lab))
        assert found["done"] == found["planned"] == 9 and "9 finished" in page.text("nbh-coverage")
        notes = [note for of_job in Ledger(folder(lab)).notes().values() for note in of_job]
        finished = [note["job"] for note in notes if note["event"] == "ended" and note["status"] == "finished"]
        assert len(finished) == len(set(finished)) == 9, "no job was done twice"
        assert page.text("nbh-verdict").startswith("tiny-gpt2 on boolq")
        for width in (1280, 800):
            page.set_width(width)
            page.page.wait_for_timeout(500)
            cut_off = page.page.evaluate(
                """() => [...document.querySelectorAll('.nbh-panel, .nbh-panel *')]
                    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible'
                        && !e.closest('.nbh-wide'))
                    .map(e => `${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""
            )
            assert (width, cut_off) == (width, [])
    assert lab.foreign == [], "the page asked for something beyond this machine"
