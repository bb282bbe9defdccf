"""Are answers timed warm, kept as they were asked, and tuned models taught and chosen on all that rows say?"""

from __future__ import annotations

import itertools
import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from nbhelpers import (
    comparison_answers,
    comparison_results,
    facts,
    kept_answers,
    label_answers,
    models,
    records,
    training,
)
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


BOTH = ("ranking", "writing")


def left_behind(lines, folder) -> None:
    """A partial file of an attempt that was killed after these lines."""
    folder.mkdir()
    (folder / comparison_answers.PARTIAL).write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def partial(loaded, prompts, config, tmp_path):
    """The lines that a whole attempt leaves: nine rankings, then nine texts."""
    asked = asking(config, prompts, kinds=BOTH)
    comparison_answers._answer(asked, config, loaded.model, tmp_path, lambda now: None, None)
    return records.read_lines(tmp_path / comparison_answers.PARTIAL)[0]


@pytest.fixture
def ticking(monkeypatch):
    """A clock that is a microsecond later each time it is looked at."""
    ticks = itertools.count()
    monkeypatch.setattr(label_answers.time, "perf_counter", lambda: 1e-6 * next(ticks))


def gone_on(lines, loaded, prompts, config, folder, kinds=BOTH):
    """{kind: speed} of an attempt that takes over these lines, and all lines that are then there."""
    left_behind(lines, folder)
    asked = asking(config, prompts, kinds=kinds)
    found = comparison_answers._answer(asked, config, loaded.model, folder, lambda now: None, None)
    assert all("ranked" in line for line in found.lines["test"])
    return found.about["performance"]["kinds"], records.read_lines(folder / comparison_answers.PARTIAL)[0]


def test_the_rate_of_a_run_that_went_on_is_that_of_all_its_dialogues(
    partial, ticking, loaded, prompts, config, tmp_path
):
    """The four longest took 100 s in the first attempt; by pencil nine take 100 s and microseconds."""
    tokens = [len(prompts.prompt(row.text).ids) for row in TEST]
    longest = sorted(partial[:9], key=lambda line: -tokens[line["number"]])[:4]
    took = [{**line, "seconds": 25.0 * (at + 1)} for at, line in enumerate(longest)]
    kinds, lines = gone_on(took, loaded, prompts, config, tmp_path / "on", ("ranking",))
    speed = kinds["ranking"]
    assert speed["seconds_per_dialogue"] == pytest.approx(100 / 9, rel=1e-4)
    assert speed["prompt_tokens_per_second"] == pytest.approx(sum(tokens) / 100, rel=1e-4)
    assert speed["spread"] is None, "the parts of this attempt are not like those of the first one"
    assert len(lines) == 9 and all(line["seconds"] > 100 for line in lines[4:]), "a third attempt counts both"


def test_each_answer_is_kept_with_the_seconds_until_it(partial):
    for kind in (partial[:9], partial[9:]):
        seconds = [line["seconds"] for line in kind]
        assert seconds == sorted(seconds) and seconds[0] > 0


def test_a_kind_that_was_answered_before_the_kill_keeps_its_rate(partial, ticking, loaded, prompts, config, tmp_path):
    took = [{**line, "seconds": 2.0 * (at + 1)} for at, line in enumerate(partial[:9])]
    kinds, _ = gone_on(took, loaded, prompts, config, tmp_path / "on")
    assert kinds["ranking"]["seconds_per_dialogue"] == pytest.approx(2, rel=1e-4) and "writing" in kinds
    performance = comparison_results._performance({"kinds": kinds}, "top_1_accuracy")
    assert performance["seconds_per_dialogue"] == pytest.approx(2, rel=1e-4)


def test_where_every_answer_is_there_already_the_rates_are_too(partial, ticking, loaded, prompts, config, tmp_path):
    took = [{**line, "seconds": float(at % 9 + 1)} for at, line in enumerate(partial)]
    kinds, lines = gone_on(took, loaded, prompts, config, tmp_path / "on")
    assert [kinds[kind]["seconds_per_dialogue"] for kind in BOTH] == pytest.approx([1, 1], rel=1e-4)
    assert lines == took


@pytest.mark.parametrize("known", [0, 1], ids=["no line says its seconds", "a later one does"])
def test_a_rate_is_unknown_where_earlier_answers_do_not_say_their_seconds(
    partial, loaded, prompts, config, tmp_path, known
):
    took = [{**line, "seconds": None} for line in partial[:4]]
    for line in took[: 4 - known]:
        del line["seconds"]
    kinds, lines = gone_on(took, loaded, prompts, config, tmp_path / "on")
    assert set(kinds) == {"writing"} and {line["seconds"] for line in lines[4:9]} == {None}
    performance = comparison_results._performance({"kinds": kinds}, "top_1_accuracy")
    assert performance["seconds_per_dialogue"] is performance["spread"] is None, "a text's rate is no ranking's"
    assert performance["kinds"] == kinds


def test_a_latency_stands_also_where_no_rate_is_known():
    latency = {"p50": 1.0, "n": 2}
    found = comparison_results._performance({"kinds": {}, "latency": latency}, "top_1_accuracy")
    assert found["latency"] == latency and found["dialogues_per_second"] is None
    assert set(label_answers.NOT_TIMED) == set(label_answers.Speed(1.0, 1, 1).record())
    assert comparison_results._performance({"kinds": {}}, "top_1_accuracy") is None


# ------------------------------------------------------------------------------------------------ kept answers


@pytest.mark.parametrize("change", [{"cache": False}, {"cache": True, "cache_days": 1e-9}])
def test_a_run_that_goes_on_asks_no_finished_state_again_and_another_run_does(
    prompts, config, tmp_path, monkeypatch, change
):
    config, tracker = config.model_copy(update=change), Tracker(tmp_path)
    other = Tracker(tmp_path)
    other.run_dir = tmp_path / "another"
    first = comparison_answers.obtain(asking(config, prompts), config, tracker, print)
    comparison_answers.obtain(asking(config, prompts, kinds=("writing",)), config, other, print)

    def load_model(*_, **__):
        raise Stopped("a model was loaded")

    monkeypatch.setattr(models, "load_model", load_model)
    again = comparison_answers.obtain(asking(config, prompts), config, tracker, print)
    assert (again.came, again.lines, again.about) == ("cached", first.lines, first.about)
    for run, kind in ((other, "ranking"), (tracker, "writing")):  # what only the other one has asked
        with pytest.raises(Stopped, match="a model was loaded"):
            comparison_answers.obtain(asking(config, prompts, kinds=(kind,)), config, run, print)


def test_two_runs_that_finish_the_same_state_together_both_go_on(tmp_path, monkeypatch):
    place, honest = tmp_path / "coding-1", shutil.rmtree
    answers = Answers({"test": []}, {"test": None}, {"one": 1})
    kept_answers.write(place, answers)

    def rmtree(path, **options):
        if path != place:  # else the other run has put its own there since
            honest(path, **options)

    monkeypatch.setattr(comparison_answers.shutil, "rmtree", rmtree)
    kept_answers.write(place, answers)
    assert kept_answers.read(place).about == {"one": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["coding-1"]
    (place / "answers.json").write_text("{")
    with pytest.raises(OSError, match="not empty"):
        kept_answers.write(place, answers)


def test_clearing_deletes_what_a_killed_write_has_left_too(tmp_path, monkeypatch):
    def killed(*_):
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr(comparison_answers.Path, "replace", killed)
        with pytest.raises(Stopped):
            kept_answers.write(tmp_path / ".predictions" / "coding-1", Answers({}, {}, {}))
    assert kept_answers.clear(tmp_path, older_than_days=1) == 0
    assert kept_answers.clear(tmp_path) == 1
    assert not list((tmp_path / ".predictions").iterdir())


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
    kept_answers.write(place, Answers({"test": []}, {"test": None}, about))
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


# ------------------------------------------------------------------------------------------------ tuned, and gone on


@pytest.fixture
def killed(config, prompts, tmp_path, monkeypatch):
    """How to tune a model until one function raises, and go on afterwards without any tuning."""
    train = rows([("cold",), ("pain",)])
    tuning = Tuning(train, train, config.training(config.slm_models[0], 2))
    asked, tracker = asking(config, prompts, tuning=tuning), Tracker(tmp_path)

    def stop(*_, **__):
        raise Stopped

    def until(module, name):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, stop)
            with pytest.raises(Stopped):
                comparison_answers.obtain(asked, config, tracker, print)
        return tmp_path / "run" / "models" / asked.key

    def on():
        with monkeypatch.context() as patch:
            patch.setattr(training, "fine_tune", stop)
            return comparison_answers.obtain(asked, config, tracker, print)

    on.obtain = lambda: comparison_answers.obtain(asked, config, tracker, print)
    return until, on


def saved_is_the_same(found) -> dict:
    (fact,) = [fact for fact in found.about["facts"] if fact["name"] == "saved_model_is_the_same"]
    return fact


def test_a_check_of_what_was_saved_that_was_killed_is_made_when_the_run_goes_on(killed, monkeypatch):
    until, on = killed
    folder, seen, honest = until(facts, "saved_logits_are_the_same"), [], models.load_model
    monkeypatch.setattr(models, "load_model", lambda *args, **kw: seen.append("model") or honest(*args, **kw))
    check = facts.saved_logits_are_the_same
    monkeypatch.setattr(facts, "saved_logits_are_the_same", lambda *args: seen.append("check") or check(*args))
    fact = saved_is_the_same(on())
    assert fact["ok"] and fact["values"]["difference"] < 1e-5
    assert seen == ["check", "model"], "one copy after the other: two may have been too many"
    assert not (folder / comparison_answers.UNCHECKED).exists()


def test_what_was_saved_and_computes_something_else_is_reported_when_the_run_goes_on(killed, tmp_path):
    until, on = killed
    file = until(facts, "saved_logits_are_the_same") / "model" / "model.safetensors"
    save_file({name: 1.01 * tensor for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    assert not saved_is_the_same(on())["ok"]
    assert not (tmp_path / ".predictions").exists(), "and its answers are not kept"


def test_a_model_that_was_saved_and_can_be_checked_no_more_is_reported(killed):
    until, on = killed
    (until(facts, "saved_logits_are_the_same") / comparison_answers.UNCHECKED).unlink()
    fact = saved_is_the_same(on())
    assert not fact["ok"] and "was not checked" in fact["saw"]


@pytest.mark.parametrize("said", [True, False])
def test_the_memory_of_a_tuned_model_is_that_of_its_tuning_too_or_unknown(killed, said):
    until, on = killed
    folder = until(label_answers, "answered")
    assert not (folder / comparison_answers.UNCHECKED).exists()
    tuned = records.read_json(folder / comparison_answers.TRAINING)
    most = tuned.pop("memory")
    assert most["kind"] == "resident" and most["peak_bytes"] >= 0
    records.write_json(
        folder / comparison_answers.TRAINING, tuned | ({"memory": most | {"peak_bytes": 2**50}} if said else {})
    )
    found = on().about["memory"]
    assert found["peak_bytes"] == (2**50 if said else None) and found["kind"] == "resident"


def test_memory_of_tuning_counts_where_it_is_the_most_and_of_the_same_kind():
    now = {"peak_bytes": 5, "kind": "cuda"}
    assert comparison_answers._most(now, None) == now
    assert comparison_answers._most(now, {"memory": {"peak_bytes": 3, "kind": "cuda"}}) == now
    assert comparison_answers._most(now, {"memory": {"peak_bytes": 9, "kind": "resident"}}) == now


def test_a_tuned_model_that_somebody_deleted_is_tuned_and_saved_again(killed):
    until, on = killed
    folder = until(label_answers, "answered")
    shutil.rmtree(folder / "model")
    found = on.obtain()
    assert saved_is_the_same(found)["ok"] and (folder / "model" / "config.json").is_file()
