"""Does a panel of stages keep what its run reports, and say how long one takes and from what that is known?"""

from __future__ import annotations

import platform

import pytest

from nbhelpers import durations, runtime
from nbhelpers.fine_tuning_panel import FineTuningPanel
from nbhelpers.pruning_panel import PruningPanel
from nbhelpers.staged_panel import StagedPanel, change, left_models


@pytest.fixture(params=[PruningPanel, FineTuningPanel], ids=["pruning", "fine_tuning"])
def made(request, tmp_path) -> StagedPanel:
    return request.param(root=tmp_path)


def measured(at: str, perplexity: float, sample: str = "text") -> dict:
    return {"stage": "measured", "at": at, "perplexity": perplexity, "sample": sample}


def test_stages_are_shown_in_their_order_against_the_baseline_and_escaped(made):
    made.hear(measured("fine_tuned", 6.0, "<b>"))
    made.hear(measured("baseline", 8.0))
    text = made.table()
    assert text.index("baseline</td>") < text.index("fine-tuned</td>")
    assert "-25.0 %" in text and "&lt;b&gt;" in text and "<b>" not in text


def test_nothing_is_shown_before_anything_was_measured(made):
    assert made.table() == "" and made.figures() == {}


def test_a_long_prompt_is_said_once(made):
    prompt = "A long story. " * 20
    for stage, answer in (("baseline", "alpha"), ("fine_tuned", "beta")):
        made.hear(measured(stage, 2.0, prompt + answer))
    text = made.table()
    assert text.count("A long story") == 20 and "alpha" in text and "after the same beginning" in text


def test_a_new_run_forgets_what_the_last_one_showed(made):
    made.hear(measured("baseline", 8.0))
    made.forget(made.form.config())
    assert made.table() == ""


def test_a_change_is_in_percent_of_the_baseline_where_one_is_known():
    assert change("fine_tuned", 6.0, 8.0) == "-25.0 %"
    assert change("baseline", 8.0, 8.0) == change("pruned", 8.0, None) == ""


@pytest.mark.parametrize("factor, says", [(None, "estimated from this device's speed"), (2.0, "going by the last run")])
def test_the_time_is_that_of_the_phases_corrected_by_the_last_run(made, factor, says, monkeypatch):
    asked = []
    monkeypatch.setattr(durations, "phases", lambda config: {"a": 20.0, "b": 10.0})
    monkeypatch.setattr(durations, "fine_tuning_phases", lambda config, done=0: {"a": 20.0, "b": 10.0})
    monkeypatch.setattr(durations, "correction", lambda *arguments: asked.append(arguments[2]) or factor)
    seconds, by_run = made.expected(made.form.config())
    assert (seconds, by_run) == (30.0 * (factor or 1), factor is not None)
    assert says in made.estimated(made.form.config()) and set(asked) == {platform.node()}


def test_with_a_gpu_the_next_preset_is_offered_and_used(made, monkeypatch):
    monkeypatch.setattr(runtime, "device", lambda: "cuda")
    monkeypatch.setattr(durations, "phases", lambda config: {"all": 300.0})
    again = type(made)(root=made.root)
    text, button = again.offer.children
    assert "preset gpu (gpt2 on wikitext-2) would take about 5 min" in text.value
    button.click()
    config = again.form.config()
    assert {name: getattr(config, name) for name in again.presets["gpu"]} == dict(again.presets["gpu"])


def test_no_models_are_offered_where_no_run_left_one():
    assert left_models([]) == []
