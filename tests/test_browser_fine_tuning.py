"""Does the fine-tuning notebook do in a real browser what a person sets, and go on after its kernel was killed?"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from browser_lab import FINE_TUNING, STEP_SECONDS, Lab, need_browser, open_lab, until
from test_browser import RUN_SECONDS, run_cells, runs, set_form, start

QUICK = {"before": "FineTuningPanel(", "cell": "steps = 2"}  # what papermill would put in: Run all is short
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    need_browser()
    with open_lab(tmp_path / "lab") as lab:
        yield lab


def test_what_is_set_in_the_form_is_what_is_trained_and_watched(lab, tmp_path):
    with lab.open(FINE_TUNING, **QUICK) as page:
        run_cells(page)
        already = len(runs(lab))
        assert not page.part("nbh-resume").is_visible(), "nothing was interrupted"
        wanted = {"model": "tiny-gpt2", "data": "bundled", "method": "lora", "steps": 12}
        set_form(page, **wanted)
        until("what fits is said", lambda: "LoRA (chosen)" in page.text("nbh-fitting"), STEP_SECONDS)
        page.watch_pictures()
        page.double_click("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        until("three pictures", lambda: page.different_pictures() >= 3, STEP_SECONDS)
        assert len(runs(lab)) == already + 1, "the second click started no second run"
        done = runs(lab)[-1]
        assert done.status == "finished" and {name: done.config[name] for name in wanted} == wanted
        assert "What it writes as it learns" in page.text("nbh-samples")
        assert done.run_id in page.download(tmp_path).name
        for width in (1280, 800):
            page.set_width(width)
            page.page.wait_for_timeout(500)
            cut_off = page.page.evaluate(
                """() => [...document.querySelectorAll('.nbh-panel, .nbh-panel *')]
                    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible')
                    .map(e => `${e.className}: ${e.scrollWidth} > ${e.clientWidth}`)"""
            )
            assert (width, cut_off) == (width, [])
    assert lab.foreign == [], "the page asked for something beyond this machine"


def test_after_its_kernel_was_killed_a_run_goes_on_from_its_checkpoint_in_its_own_folder(lab):
    with lab.open(FINE_TUNING, **QUICK) as page:
        page.run_above("panel.run_now", RUN_SECONDS)
        page.write("steps", 60)
        page.write("checkpoint_every", 5)
        start(page, lab)
        folder = lab.run_folders()[-1]
        checkpoints = folder / "artefacts" / "fine_tuned"
        until("a checkpoint", lambda: list(checkpoints.glob("checkpoint-*/COMPLETE")), RUN_SECONDS)
        page.kill_kernel()
        [killed] = runs(lab)
        assert killed.status == "interrupted"
        page.run_above("panel.run_now", RUN_SECONDS)
        assert "1 interrupted here" in page.text("nbh-resume")
        label = page.page.locator(".nbh-resume select option").nth(1).inner_text()
        page.page.locator(".nbh-resume select").select_option(label)
        until("it says from where", lambda: "goes on from its newest checkpoint" in page.text("nbh-resume"), 20)
        assert page.text("nbh-run").strip() == "Go on"
        page.press("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        [went_on] = runs(lab)
        assert went_on.folder == folder and went_on.status == "finished" and len(went_on.manifest["attempts"]) == 2
        assert went_on.curve("train_loss", "fine_tuned")[0] == list(range(1, 61))
        assert "went on from the checkpoint of step" in page.text("nbh-events")
        assert not page.part("nbh-resume").is_visible()
