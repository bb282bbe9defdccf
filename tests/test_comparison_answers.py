"""Are answers timed warm, kept as they were asked, and tuned models taught and chosen on all that rows say?"""

from __future__ import annotations

import pytest

from nbhelpers import comparison_answers, label_answers, models, training
from nbhelpers.comparison_answers import Answers, Asking, Tuning
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.dialogues import Dialogue
from nbhelpers.prompts import Prompts, Wording

LABELS = ("cold", "pain", "rash")


def rows(labels, words=3) -> list[Dialogue]:
    """One dialogue for each labels; the n-th is n times as long as the first."""
    return [Dialogue(n, n, f"Patient: It is {n}. " + "It aches. " * words * n, one, n) for n, one in enumerate(labels)]


TEST = rows([("cold",), ("pain",), ("rash",)] * 3)


@pytest.fixture(scope="module")
def loaded():
    return models.load_model("tiny-llama", device="cpu")


@pytest.fixture(scope="module")
def prompts(loaded):
    return Prompts(loaded.tokenizer, Wording(kind="labels"), LABELS, 256, 4)


@pytest.fixture
def config():
    small = {"slm_models": "tiny-llama", "experiment": "training", "method": "full", "epochs": 1, "cache": False}
    return ComparisonConfig(data="bundled", device="cpu", answers="ranking", **small)


class Tracker:
    """What `obtain` needs of one."""

    def __init__(self, folder) -> None:
        self.run_dir, self.events = folder / "run", []

    def event(self, kind, **data) -> None:
        self.events.append({"kind": kind} | data)


def asking(config, prompts, **fields) -> Asking:
    return Asking(
        "SLM_tiny-llama_x", config.slm_models[0], prompts, **({"parts": {"test": TEST}, "kinds": ("ranking",)} | fields)
    )


# ------------------------------------------------------------------------------------------------ times


def test_some_dialogues_are_asked_before_the_clock_starts_and_leave_no_trace(
    loaded, prompts, config, tmp_path, monkeypatch
):
    calls, lines, honest = [], [], label_answers.answered
    clock = label_answers.Clock

    def answered(model, prompts, rows, kinds, **options):
        calls.append(len(rows))
        return honest(model, prompts, rows, kinds, **options)

    def started(*options):
        calls.append("clock")
        return clock(*options)

    monkeypatch.setattr(label_answers, "answered", answered)
    monkeypatch.setattr(label_answers, "Clock", started)
    asked = asking(config, prompts, kinds=("ranking", "writing"), parts={"test": TEST, "validation": TEST[:5]})
    found = comparison_answers._answer(asked, config, loaded.model, tmp_path, lines.append, None)
    assert calls == [4, "clock", 9, 4, "clock", 9, "clock", 5, "clock", 5], "validation is not timed"
    assert [line["done"] for line in lines] == list(range(1, 2 * 9 + 2 * 5 + 1))
    kept = (tmp_path / comparison_answers.PARTIAL).read_text().splitlines()
    assert len(kept) == 28
    monkeypatch.setattr(comparison_answers, "WARM_UP", 0)
    (tmp_path / comparison_answers.PARTIAL).unlink()
    cold = comparison_answers._answer(asked, config, loaded.model, tmp_path, lines.append, None)
    assert cold.lines == found.lines


def test_the_rate_of_answers_of_several_passes_has_a_spread(loaded, prompts, config, tmp_path):
    config = config.model_copy(update={"batch_tokens": 200})
    found = comparison_answers._answer(asking(config, prompts), config, loaded.model, tmp_path, print, None)
    speed = found.about["performance"]["kinds"]["ranking"]
    assert speed["spread"]["low"] <= speed["seconds_per_dialogue"] <= speed["spread"]["high"]
    assert speed["spread"]["parts"] > 2


# ------------------------------------------------------------------------------------------------ kept answers


@pytest.mark.parametrize(
    ("timed", "asked", "says"),
    [
        ({"n": 2}, 5, "latency of 2 requests is from the run that asked (you asked for 5)"),
        (None, 5, "latency of no requests is from the run that asked (you asked for 5)"),
        ({"n": 5}, 5, None),
        ({"n": 9}, 20, None),  # all there are
        ({"n": 2}, 0, None),
    ],
)
def test_kept_answers_say_where_their_latency_is_of_another_number_of_requests(
    config, tmp_path, monkeypatch, timed, asked, says
):
    monkeypatch.setattr(comparison_answers, "identity", lambda asking, config: {"one": 1})
    config, tracker, heard = config.model_copy(update={"cache": True}), Tracker(tmp_path), []
    place = tmp_path / ".predictions" / f"coding-{comparison_answers.records.sha256_json({'one': 1})}"
    about = {"performance": {"kinds": {}, "latency": timed} if timed else {"kinds": {}}, "model_dir": None}
    comparison_answers.write(place, Answers({"test": []}, {"test": None}, about))
    found = comparison_answers.obtain(asking(config, None, latency=asked), config, tracker, heard.append)
    assert found.came == "cached" and found.about == about, "the entry stays as it was"
    assert tracker.events[-1].get("latency") == says
    assert [now["says"] for now in heard] == ([says] if says else [])


# ------------------------------------------------------------------------------------------------ tuning


class Stopped(Exception):
    """Raised in place of training, with what was to be trained on."""


def taught(config, prompts, tuning, tmp_path, monkeypatch):
    """(training rows, validation rows) as they are given to training."""

    def fine_tune(model, train, held, *_, **__):
        raise Stopped(train, held)

    monkeypatch.setattr(training, "fine_tune", fine_tune)
    with pytest.raises(Stopped) as stopped:
        comparison_answers._tune(asking(config, prompts, tuning=tuning), None, tmp_path, print, None)
    return stopped.value.args


def test_a_validation_row_with_several_labels_is_one_for_each_as_in_training(config, prompts, tmp_path, monkeypatch):
    several = rows([("cold", "rash"), ("pain",)])
    parts = taught(
        config, prompts, Tuning(several, several, config.training(config.slm_models[0], 3)), tmp_path, monkeypatch
    )
    expected = [(several[0], "cold"), (several[0], "rash"), (several[1], "pain")]
    for part in parts:
        said = [row["input_ids"].tolist() for row in part]
        assert said == [[*prompts.prompt(row.text).ids, *prompts.answers[label]] for row, label in expected]


def test_answers_chosen_by_the_first_of_several_labels_do_not_serve_and_all_others_do(config):
    settings = config.training(config.slm_models[0], 3)
    one, several = rows([("cold",), ("pain",)]), rows([("cold", "rash"), ("pain",)])
    once = [settings.model_dump(), comparison_answers._digest(several), comparison_answers._digest(one)]
    assert comparison_answers._tuning_identity(Tuning(several, one, settings)) == once
    assert len(comparison_answers._tuning_identity(Tuning(one, several, settings))) > 3


@pytest.mark.parametrize("window", [128, 256])
def test_training_dialogues_that_are_cut_are_counted_and_said_once(loaded, config, tmp_path, window):
    prompts = Prompts(loaded.tokenizer, Wording(kind="labels"), LABELS, window, 4)
    train = rows([("cold", "rash"), *(("pain",),) * 5], words=4)
    lengths = [len(loaded.tokenizer(prompts.text(row.text.strip()))["input_ids"]) for row in train]
    cut = sum(length > window - prompts.room for length in lengths)
    tuning = Tuning(train, train[:2], config.training(config.slm_models[0], 7), keep=False)
    tracker = Tracker(tmp_path)
    found = comparison_answers.obtain(asking(config, prompts, tuning=tuning), config, tracker, print)
    assert found.about["training"]["truncated"] == cut == {128: 3, 256: 0}[window], lengths
    said = [event for event in tracker.events if event["kind"] == "training_prompts_cut"]
    assert said == (
        [{"kind": "training_prompts_cut", "key": "SLM_tiny-llama_x", "cut": cut, "dialogues": 6}] if cut else []
    )
