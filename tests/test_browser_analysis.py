"""Does the analysis notebook do in a real browser what a person sets: filter, metric, figure, two runs, export?"""

from __future__ import annotations

import csv
import io
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser_lab import ANALYSIS, STEP_SECONDS, Lab, LabPage, need_browser, open_lab, until

CELLS_SECONDS = 240
LOOK_SECONDS = 60  # most a look at 48 runs may take on a busy machine

pytestmark = pytest.mark.slow


@pytest.fixture
def page(tmp_path) -> Iterator[LabPage]:
    """The notebook with all its cells run on the example runs."""
    need_browser()
    with open_lab(tmp_path / "lab") as lab, lab.open(ANALYSIS) as page:
        page.run_all(CELLS_SECONDS)
        page.wait_status("ready", seconds=STEP_SECONDS)
        yield page
        assert lab.foreign == [], "the page asked for something beyond this machine"


def table(page: LabPage) -> list[str]:
    """The means of the table of settings."""
    return page.page.locator(".nbh-table td b").all_inner_texts()


def press_enter_in(page: LabPage, name: str, text: str) -> None:
    page.write(name, text)


def test_what_is_set_in_the_form_is_what_is_shown_and_exported(page, tmp_path):
    lab: Lab = page.lab
    assert "example runs that come with the package" in page.text("nbh-stampline")
    assert "48 planned, 48 finished" in page.text("nbh-coverage") and len(table(page)) == 24

    page.watch_pictures()
    until("the pictures of both models", lambda: page.different_pictures() >= 2, STEP_SECONDS)
    began = time.monotonic()
    press_enter_in(page, "filter", "strategy=gradient,random level>0.1")
    until("fewer settings", lambda: len(table(page)) == 8, LOOK_SECONDS)
    print(f"\na filter was shown after {time.monotonic() - began:.1f} s")
    until("other pictures", lambda: page.different_pictures() >= 4, LOOK_SECONDS)
    until("its count", lambda: "16 of 48 runs shown" in page.status(), LOOK_SECONDS)

    before = table(page)
    page.choose("metric", "recovery_percent")
    until("another metric", lambda: table(page) != before and len(table(page)) == 8, LOOK_SECONDS)
    assert "highest recovery_percent" in page.text("nbh-best")
    until("pictures of it", lambda: page.different_pictures() >= 6, LOOK_SECONDS)

    page.choose("model", "tiny-llama")
    until("one model", lambda: len(table(page)) == 4, LOOK_SECONDS)
    page.choose("figure", "recovery against level")
    until("one picture of it", lambda: page.page.locator(".nbh-live img").count() == 1, LOOK_SECONDS)

    archive = page.download(tmp_path)
    kept = lab.runs / "exports" / archive.name
    assert kept.read_bytes() == archive.read_bytes(), "what the browser saved is what lies on disk"
    with zipfile.ZipFile(archive) as bundle:
        rows = list(csv.DictReader(io.StringIO(bundle.read("runs.csv").decode())))
        names = bundle.namelist()
    assert {row["config.model"] for row in rows} == {"tiny-llama"} and len(rows) == 8
    assert {row["config.strategy"] for row in rows} == {"gradient", "random"}
    assert {"figures/recovery.svg", "figures/recovery.png", "values.csv", "settings.csv"} <= set(names)


def test_a_mistake_is_one_line_and_the_next_value_takes_it_away(page):
    press_enter_in(page, "filter", "levl=0.1")
    page.wait_status("failed", seconds=LOOK_SECONDS)
    assert "Did you mean 'level'" in page.text("nbh-error")
    press_enter_in(page, "filter", "level=0.1")
    page.wait_status("ready", seconds=LOOK_SECONDS)
    assert not page.part("nbh-error").first.is_visible() and len(table(page)) == 8


RUNNING = """
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker
mine = ExperimentTracker(ExperimentConfig(name="my loop", kind="loop", lr=0.1), notebook.runs_root()).start()
mine.log_metrics(train_loss=2.5)
"""


def test_a_run_that_goes_on_is_followed_until_it_ends_and_nothing_is_cut_off(page):
    lab: Lab = page.lab
    page.page.evaluate(
        """(source) => { window.nbhKernel = (code) => window.jupyterapp.shell.currentWidget.sessionContext.session
            .kernel.requestExecute({code}).done; return window.nbhKernel(source).then(() => true); }""",
        RUNNING,
    )
    page.choose("folder", str(lab.runs) if page.page.locator(f'option[value="{lab.runs}"]').count() else "other ...")
    if page.page.locator(".nbh-own input").is_visible():
        box = page.page.locator(".nbh-own input")
        box.fill(str(lab.runs))
        box.press("Enter")
    until("the run at work", lambda: "my loop" in page.text("nbh-running"), LOOK_SECONDS)
    page.click(page.page.locator("button.nbh-follow"))
    page.page.evaluate("() => window.nbhKernel('mine.log_metrics(train_loss=1.25)').then(() => true)")
    until("its next step", lambda: "1.25" in page.text("nbh-running"), LOOK_SECONDS)
    page.page.evaluate("""() => window.nbhKernel('mine.finish({"accuracy": 0.5})').then(() => true)""")
    until("following ends by itself", lambda: "nothing runs any more" in page.status(), LOOK_SECONDS)
    for width in (1280, 800):
        page.set_width(width)
        page.page.wait_for_timeout(500)
        cut_off = page.page.evaluate(
            """() => [...document.querySelectorAll('.nbh-panel, .nbh-panel *')]
                .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX === 'hidden')
                .map(e => `${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""
        )
        assert (width, cut_off) == (width, [])


def test_the_folder_of_the_project_is_not_written_to():
    """The example is unpacked beside the runs of whoever looks, never into the package."""
    package = Path(ANALYSIS).parent.parent / "nbhelpers" / "assets"
    assert [path.name for path in package.glob("example*")] == ["example_grid.zip"]
