"""Does the comparison's notebook do in a browser what a person sets, show it live, and take answers from before?"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from browser_lab import COMPARISON, STEP_SECONDS, Lab, need_browser, open_lab, until
from test_browser import RUN_SECONDS

VALUES = 'max_eval_samples, epochs, more = 32, 1, {"max_train_samples": 96, "latency_requests": 2}'
QUICK = {"before": "ComparisonPanel(", "cell": VALUES}  # what papermill would put in
pytestmark = pytest.mark.slow


@pytest.fixture
def lab(tmp_path) -> Iterator[Lab]:
    need_browser()
    with open_lab(tmp_path / "lab") as lab:
        yield lab


def test_what_is_set_is_compared_live_then_saved_and_a_second_run_takes_answers_from_before(lab, tmp_path):
    with lab.open(COMPARISON, **QUICK) as page:
        page.run_above("panel.run_now", RUN_SECONDS)
        until("the data are said", lambda: "713\ndialogues" in page.text("nbh-before"), RUN_SECONDS)
        page.write("max_eval_samples", "0")
        until("it is refused", lambda: "greater than or equal to 1" in page.text("nbh-field-max_eval_samples"), 20)
        assert not page.is_enabled("nbh-run")
        page.write("max_eval_samples", "40")
        page.click(page.page.locator(".nbh-field-slm_models label", has_text="tiny-llama"))
        page.click(page.page.locator(".nbh-field-slm_models label", has_text="tiny-gpt2"))
        until("the models follow", lambda: "tiny-llama answers, tuning" in page.text("nbh-fitting"), RUN_SECONDS)
        until("the data follow", lambda: "40\nto test on" in page.text("nbh-before"), RUN_SECONDS)
        page.watch_pictures()
        page.double_click("nbh-run")
        page.wait_status("running: tiny-llama (fine-tuned)", seconds=RUN_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        [folder] = lab.run_folders()
        config = json.loads((folder / "manifest.json").read_text())["config"]
        assert config["max_eval_samples"] == 40 and [one["name"] for one in config["slm_models"]] == ["tiny-llama"]
        result = json.loads((folder / "result.json").read_text())
        assert page.text("nbh-verdict").startswith(result["verdict"])
        accuracy = result["models"]["BASELINE_tfidf_linear"]["top_1_accuracy"]
        assert f"{100 * accuracy:.1f} %" in page.text("nbh-table")
        until("accuracy drawn as it came", lambda: page.most_pictures_of_one_slot() >= 3, STEP_SECONDS)
        saved = page.download(tmp_path, "nbh-report")
        assert saved.read_bytes() == (folder / "report.html").read_bytes()
        assert "FAILED" not in page.text("nbh-facts")

        until("it is all there", lambda: "answers are taken from" in page.text("nbh-estimate"), RUN_SECONDS)
        page.press("nbh-run")
        page.wait_status("running", seconds=STEP_SECONDS)
        page.wait_status("finished", seconds=RUN_SECONDS)
        assert "taken from before" in page.text("nbh-table") and len(lab.run_folders()) == 2
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
