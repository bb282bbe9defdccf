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
        "By one measurement tuning SLM_b_finetuned pays in time against LLM_a_untrained after 500 dialogues; "
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


def spread(entry, low, high):
    return entry | {"performance": entry["performance"] | {"spread": {"low": low, "high": high, "parts": 5}}}


@pytest.mark.parametrize("seconds", [3.3, 3.9])
def test_where_the_spreads_overlap_nothing_is_told(seconds):
    tuned = TUNED | {"performance": {"seconds_per_dialogue": seconds}}
    (found,) = table(spread(LARGE, 3.5, 3.7), spread(tuned, seconds - 0.3, seconds + 0.3))["pays"]
    assert found["dialogues"] is found["dialogues_between"] is None
    assert found["sentence"].startswith(
        "Whether tuning SLM_b_finetuned pays in time against LLM_a_untrained cannot be told: "
        f"the two rates do not differ beyond their spread ({seconds} s [{seconds - 0.3:.3g}, {seconds + 0.3:.3g}] and "
        "3.6 s [3.5, 3.7] a dialogue)"
    )


def test_one_measurement_within_the_spread_of_the_other_tells_nothing_and_outside_it_is_called_one():
    within = TUNED | {"performance": {"seconds_per_dialogue": 3.55}}
    assert "cannot be told" in table(spread(LARGE, 3.5, 3.7), within)["pays"][0]["sentence"]
    (found,) = table(spread(LARGE, 3.5, 3.7), TUNED)["pays"]
    assert found["sentence"].startswith("By one measurement tuning") and found["dialogues_between"] is None
    slow = TUNED | {"performance": {"seconds_per_dialogue": 5.0}}
    assert table(tuned=slow)["pays"][0]["sentence"].startswith("By one measurement it never happens that tuning")


def test_spreads_apart_bound_the_dialogues_by_their_far_and_near_ends():
    """900 s over 3.8 - 1.6 = 2.2 s saved at most, and over 3.4 - 2.0 = 1.4 s at least."""
    (found,) = table(spread(LARGE, 3.4, 3.8), spread(TUNED, 1.6, 2.0))["pays"]
    assert (found["dialogues"], found["dialogues_between"]) == (500, {"low": 410, "high": 643})
    assert found["sentence"].startswith(
        "By measured seconds tuning SLM_b_finetuned pays in time against LLM_a_untrained after 500 dialogues [410, 643]"
    )


def test_spreads_apart_the_other_way_never_pay():
    slow = spread(TUNED | {"performance": {"seconds_per_dialogue": 5.0}}, 4.8, 5.2)
    (found,) = table(spread(LARGE, 3.5, 3.7), slow)["pays"]
    assert found["sentence"].startswith("It never happens that tuning SLM_b_finetuned pays in time")
    assert found["reason"] == "5 s [4.8, 5.2] a dialogue is not less than 3.6 s [3.5, 3.7]"


def test_what_two_measurements_of_one_model_differ_by_counts_to_every_spread():
    """3.6 / 1.8 is 2 times; the small model's own two measurements differ by 2.7 / 1.8 = 1.5, then by 2.1 times."""
    large, tuned = spread(LARGE, 3.5, 3.7) | {"model": "a"}, spread(TUNED, 1.7, 1.9) | {"model": "b"}

    def found(before, **more):
        entries = {"LLM_a_untrained": large, "SLM_b_finetuned": tuned | more}
        entries["SLM_b_zero_shot"] = {"model": "b", "performance": {"seconds_per_dialogue": before}}
        return costs.table(entries, headline="top_1_accuracy", device="one H200")

    some = found(2.7)
    assert some["drift"] == pytest.approx(1.5)
    (pays,) = some["pays"]
    half = 1.5**0.5  # 900 s over what is saved at most, and at least
    ends = [900 / (3.7 * half - 1.7 / half), 900 / (3.5 / half - 1.9 * half)]
    assert pays["dialogues"] == 500 and [*pays["dialogues_between"].values()] == [-(-end // 1) for end in ends]
    much = found(1.8 * 2.1)["pays"][0]
    assert "cannot be told" in much["sentence"] and much["reason"].endswith("; one model's own differ by 2.1 times)")
    assert found(1.8 * 2.1, precision="float32")["drift"] is None, "of another precision is another model's"
    assert found(1.8 * 2.1, training_metrics={"seconds": 900, "method": "qlora"})["drift"] is None, "adapters slow it"


def test_written_answers_are_shorter_after_tuning_so_that_they_show_no_drift():
    entries = {"SLM_b_finetuned": TUNED | {"model": "b"}, "SLM_b_zero_shot": LARGE | {"model": "b"}}
    drift = {
        headline: costs.table(entries, headline=headline, device="one H200")["drift"]
        for headline in ("top_1_accuracy", "exact_match_accuracy")
    }
    assert drift == {"top_1_accuracy": 2.0, "exact_match_accuracy": None}


def test_single_measurements_that_differ_by_no_more_than_ones_own_tell_nothing():
    entries = {"LLM_a_untrained": LARGE | {"model": "a"}, "SLM_b_finetuned": TUNED | {"model": "b"}}
    entries["SLM_b_zero_shot"] = {"model": "b", "performance": {"seconds_per_dialogue": 4.0}}
    (pays,) = costs.table(entries, headline="top_1_accuracy", device="one H200")["pays"]
    assert "cannot be told" in pays["sentence"] and pays["dialogues"] is None


def test_a_model_is_not_held_against_itself():
    assert table(LARGE | {"model": "a"}, TUNED | {"model": "a"})["pays"] == []
    assert len(table(LARGE | {"model": "a"}, TUNED | {"model": "b"})["pays"]) == 1
    assert len(table(LARGE | {"model": None}, TUNED | {"model": None})["pays"]) == 1, "not known to be the same"


def test_whether_answers_came_from_before_is_what_the_run_says_and_not_what_they_do():
    phases = [{"model": "LLM_a_untrained", "came": "cached"}, {"model": "SLM_b_on_12", "came": "measured"}]
    assert [row["came"] for row in table(phases=phases)["rows"]] == ["cached", "measured"]


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
