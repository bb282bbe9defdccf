"""Is an estimate the sum it claims to be, and is the time left what a pencil says?"""

from __future__ import annotations

import json
import time

import pytest
import torch

from nbhelpers import durations
from nbhelpers.durations import Speed, Timetable
from nbhelpers.experiments import PruningConfig
from nbhelpers.fine_tuning import FineTuningConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker


@pytest.fixture
def one_flop(monkeypatch):
    """A device that makes one operation a second and starts kernels for nothing; a model of 10 parameters."""
    monkeypatch.setattr(durations, "measure_speed", lambda device, dtype, width: Speed(1.0, 0.0))
    monkeypatch.setattr(durations.estimates, "shape_of", lambda config: type("Shape", (), {"parameters": 10})())
    monkeypatch.setattr(durations, "REACHED", 1.0)
    monkeypatch.setattr(durations, "LOADING_BYTES_PER_SECOND", 40.0)


CONFIG = PruningConfig(
    model="tiny-gpt2",
    window=5,
    evaluation_windows=2,
    scoring_windows=3,
    steps=4,
    batch_size=2,
    level=0.5,
    strategy="gradient",
)


def test_phases_are_two_operations_a_parameter_and_token_and_three_times_that_with_a_backward_pass(one_flop):
    found = durations.pruning_phases(CONFIG)
    test, validation = 2 * 10 * 5 * 2, 2 * 10 * 5 * 5 * 32
    training = 3 * 4 * 2 * 10 * 5 * 2 + validation
    assert found["baseline"] == found["pruned"] == found["control"] == test
    assert found["scoring heads"] == 3 * 2 * 10 * 5 * 3
    assert found["training fine_tuned"] == training
    assert found["loading"] == pytest.approx(0.3 + 1) and found["training control"] == pytest.approx(training + 1.3)


def test_the_phases_are_those_that_a_run_reports_in_its_order():
    names = list(durations.pruning_phases(CONFIG))
    assert names == [
        *("loading", "baseline", "scoring heads", "pruned", "training fine_tuned", "fine_tuned"),
        *("saving", "training control", "control"),
    ]
    assert "training fine_tuned" not in durations.pruning_phases(CONFIG.model_copy(update={"steps": 0}))


@pytest.mark.parametrize(
    "changes, factor", [({"strategy": "random"}, 0), ({"strategy": "entropy"}, 2 / 3), ({"iterative": True}, 6)]
)
def test_scoring_costs_what_the_strategy_does(one_flop, changes, factor):
    once = durations.pruning_phases(CONFIG)["scoring heads"]
    assert durations.pruning_phases(CONFIG.model_copy(update=changes))["scoring heads"] == pytest.approx(once * factor)


TUNING = FineTuningConfig(
    model="tiny-gpt2", window=5, evaluation_windows=2, steps=4, batch_size=2, validations=2, samples=False
)


def test_fine_tuning_takes_its_steps_and_its_validations(one_flop):
    found = durations.fine_tuning_phases(TUNING)
    assert list(found) == ["loading", "baseline", "training fine_tuned", "fine_tuned", "saving"]
    step, validation = 3 * 2 * 10 * 5 * 2, 2 * 10 * 5 * 32
    assert found["training fine_tuned"] == 4 * step + 3 * validation  # at the steps 0, 2 and 4
    assert found["baseline"] == found["fine_tuned"] == 2 * 10 * 5 * 2


@pytest.mark.parametrize(
    "changes, factor",
    [({"method": "lora"}, 2 / 3), ({"method": "qlora"}, 2 / 3), ({"gradient_checkpointing": True}, 4 / 3)],
)
def test_a_step_costs_what_the_method_does(one_flop, changes, factor):
    step, validations = 3 * 2 * 10 * 5 * 2, 3 * 2 * 10 * 5 * 32
    found = durations.fine_tuning_phases(TUNING.model_copy(update=changes))["training fine_tuned"]
    assert found - validations == pytest.approx(4 * step * factor)


def test_steps_that_are_done_are_left_out_and_a_control_has_phases_of_its_own(one_flop):
    left = durations.fine_tuning_phases(TUNING, done=2)["training fine_tuned"]
    assert left == 2 * 3 * 2 * 10 * 5 * 2 + 2 * 2 * 10 * 5 * 32
    both = durations.phases(TUNING.model_copy(update={"control": "tiny-opt"}))
    assert list(both)[-2:] == ["training control", "control"]
    assert both["training control"] == pytest.approx(both["training fine_tuned"] + both["loading"])


def test_a_run_of_another_kind_or_method_corrects_nothing(one_flop, tmp_path):
    total = sum(durations.phases(TUNING).values())
    record(tmp_path, "tiny-gpt2", 1.0, "here")
    assert durations.correction(TUNING, tmp_path, "here") is None
    record(tmp_path, "tiny-gpt2", total * 2, "here", TUNING, "fine_tuning")
    assert durations.correction(TUNING, tmp_path, "here") == pytest.approx(2)
    assert durations.correction(TUNING.model_copy(update={"method": "lora"}), tmp_path, "here") is None


def test_an_open_amount_of_text_on_the_hub_has_no_estimate():
    open_config = CONFIG.model_copy(update={"text": "wikitext-2", "evaluation_windows": None})
    with pytest.raises(LookupError, match="known once the text is here"):
        durations.pruning_phases(open_config)
    assert durations.pruning_phases(open_config.model_copy(update={"evaluation_windows": 3}))


def test_a_faster_device_is_measured_as_faster_than_none():
    speed = durations.measure_speed("cpu", torch.float32, 64)
    assert speed.flops_per_second > 1e6 and 0 < speed.kernel_seconds < 0.1


def record(root, model: str, seconds: float, host: str, config=CONFIG, kind: str = "pruning") -> None:
    config = config.model_copy(update={"model": model})
    with ExperimentTracker(
        ExperimentConfig(kind=kind, **config.model_dump()), root, environment={"host": host}
    ) as tracker:
        tracker.finish({})
    line = {"utc": "", "attempt": 1, "wallclock_time": seconds, "kind": "stage"}
    with (tracker.run_dir / "events.jsonl").open("a") as events:
        events.write(json.dumps(line) + "\n")


def test_an_earlier_run_of_this_model_on_this_host_corrects_the_estimate(one_flop, tmp_path):
    total = sum(durations.pruning_phases(CONFIG).values())
    record(tmp_path, "tiny-gpt2", total / 4, "here")
    record(tmp_path, "tiny-opt", total * 9, "here")
    record(tmp_path, "tiny-gpt2", total * 9, "elsewhere")
    assert durations.correction(CONFIG, tmp_path, "here") == pytest.approx(0.25)
    assert durations.correction(CONFIG, tmp_path, "nowhere") is None


@pytest.mark.parametrize(
    "seconds, words",
    [(0.4, "1 s"), (9, "9 s"), (42, "40 s"), (99, "100 s"), (200, "3 min"), (5000, "83 min"), (9000, "2.5 h")],
)
def test_durations_read_as_people_say_them(seconds, words):
    assert durations.in_words(seconds) == words


def test_the_share_done_follows_the_phases_and_the_parts_within():
    table = Timetable({"a": 10.0, "b": 30.0})
    assert table.fraction == 0 and table.seconds_left is None
    table.hear("a", 1, 2)
    assert table.fraction == pytest.approx(5 / 40)
    table.hear("b", 15, 30)
    assert table.fraction == pytest.approx(25 / 40)
    table.hear("something else", 1, 1)
    assert table.fraction == pytest.approx(25 / 40)
    table.hear("b", 30, 30)
    assert table.fraction == 0.99


def test_the_seconds_left_follow_the_runs_own_pace():
    table = Timetable({"a": 10.0, "b": 30.0})
    table.hear("b")
    table.started = time.monotonic() - 5000  # a quarter took 5,000 s
    assert table.seconds_left == pytest.approx(15_000, abs=100)
