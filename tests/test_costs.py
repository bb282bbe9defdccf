"""Prices and break-even in dialogues, worked out by hand."""

import json

import pytest

from nbhelpers import costs

LARGE = {
    "training_status": "untrained",
    "performance": {"came": "measured", "seconds_per_dialogue": 3.6},
    "training_metrics": None,
    "top_1_accuracy": 0.1,
}
TUNED = {
    "training_status": "finetuned",
    "performance": {"came": "measured", "seconds_per_dialogue": 1.8},
    "training_metrics": {"seconds": 900.0},
    "top_1_accuracy": 0.3,
}


def table(large=LARGE, tuned=TUNED, **options):
    entries = {"LLM_a_untrained": large, "SLM_b_finetuned": tuned}
    return costs.table(entries, headline="top_1_accuracy", device="one H200", **options)


def test_a_thousand_dialogues_cost_their_hours_times_the_price():
    found = table(price_per_gpu_hour=3.0, currency="EUR")
    large, tuned = found["rows"]
    assert large["hours_per_1000"] == pytest.approx(1.0)  # 3.6 s * 1000 / 3600 s
    assert large["price_per_1000"] == pytest.approx(3.0)
    assert tuned["price_per_1000"] == pytest.approx(1.5)
    assert (tuned["tuning_hours"], tuned["tuning_price"]) == (0.25, 0.75)
    assert large["tuning_seconds"] is large["tuning_price"] is None
    assert (found["currency"], found["measured_on"]) == ("EUR", "measured on one H200")


def test_without_a_price_there_are_hours_and_no_money():
    found = table(currency="EUR")
    assert [row["price_per_1000"] for row in found["rows"]] == [None, None]
    assert found["rows"][1]["tuning_price"] is found["price_per_gpu_hour"] is found["currency"] is None
    assert found["rows"][0]["hours_per_1000"] == pytest.approx(1.0)
    assert table(price_per_gpu_hour=0.0)["rows"][0]["price_per_1000"] == 0


def test_tuning_has_paid_when_the_seconds_saved_are_those_it_took():
    (found,) = table()["pays"]
    assert (found["tuned"], found["large"], found["dialogues"]) == ("SLM_b_finetuned", "LLM_a_untrained", 500)
    assert found["accuracy_difference"] == pytest.approx(0.2)
    assert found["sentence"] == (
        "By measured seconds tuning SLM_b_finetuned pays in time against LLM_a_untrained after 500 dialogues; "
        "its accuracy differs by +20.0 points."
    )


def test_a_part_of_a_dialogue_is_a_whole_one():
    (found,) = table(tuned=TUNED | {"training_metrics": {"seconds": 900.1}})["pays"]
    assert found["dialogues"] == 501


@pytest.mark.parametrize("seconds", [3.6, 5.0])
def test_a_small_model_that_is_not_faster_never_pays(seconds):
    (found,) = table(tuned=TUNED | {"performance": {"seconds_per_dialogue": seconds}})["pays"]
    assert found["dialogues"] is None
    assert found["reason"] == f"{seconds:.3g} s a dialogue is not less than 3.6 s"


def test_what_was_not_measured_is_named_and_not_made_up():
    (found,) = table(large=LARGE | {"performance": None}, tuned=TUNED | {"training_metrics": None})["pays"]
    assert found["dialogues"] is None
    assert found["reason"] == "seconds a dialogue of LLM_a_untrained and tuning seconds not measured"
    assert found["sentence"].startswith(
        "Whether tuning SLM_b_finetuned pays in time against LLM_a_untrained cannot be told"
    )
    assert table(large=LARGE | {"performance": None})["rows"][0]["hours_per_1000"] is None


def test_the_table_is_strict_json_and_keeps_what_was_cached_apart():
    found = table(large=LARGE | {"performance": {"came": "cached", "seconds_per_dialogue": 3.6}})
    assert [row["came"] for row in json.loads(json.dumps(found, allow_nan=False))["rows"]] == ["cached", "measured"]


@pytest.mark.parametrize("price", [-1.0, float("nan"), float("inf")])
def test_a_price_that_is_none_is_refused(price):
    with pytest.raises(ValueError, match="price_per_gpu_hour must be at least 0"):
        table(price_per_gpu_hour=price)
