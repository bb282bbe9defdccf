"""Accepting answers: thresholds, coverage and calibration error worked out by hand and by simulation."""

import json

import numpy as np
import pytest

from nbhelpers import routing


def test_the_threshold_is_the_lowest_at_which_validation_promises_the_precision():
    # 40 right at 0.9, then 40 wrong at 0.5; 0.9^40 < 0.05, so 0.9 is promised at 0.9 and at nothing lower
    probability, right = [0.9] * 40 + [0.5] * 40, [True] * 40 + [False] * 40
    assert routing.threshold(probability, right, 0.9) == 0.9
    assert routing.threshold(probability, right, 0.4) == 0.5  # 40 of 80 are right


def test_29_right_answers_of_29_promise_nine_of_ten_and_28_do_not():
    assert routing.threshold([0.8] * 29, [True] * 29, 0.9) == 0.8  # 0.9^29 = 0.047
    assert routing.threshold([0.8] * 28, [True] * 28, 0.9) is None  # 0.9^28 = 0.052


def test_the_test_part_has_no_say_in_the_threshold():
    validation = ([0.9] * 40 + [0.5] * 40, [True] * 40 + [False] * 40)
    for right in ([True] * 4, [False] * 4):
        point = routing.curve(*validation, [0.9, 0.9, 0.6, 0.1], right, wanted=[0.9])["points"][0]
        assert point["threshold"] == 0.9
        assert (point["test"]["coded"], point["test"]["coverage"]) == (2, 0.5)
        assert point["test"]["reached"] is right[0]


def test_precision_has_its_exact_interval_on_both_parts():
    point = routing.curve([0.9] * 40, [True] * 40, [0.95] * 3 + [0.1], [True] * 4, wanted=[0.9])["points"][0]
    assert point["test"] | {"low": None} == {
        "coded": 3, "right": 3, "coverage": 0.75, "precision": 1.0, "low": None, "high": 1.0, "reached": True
    }  # fmt: skip
    assert point["test"]["low"] == pytest.approx(0.025 ** (1 / 3))
    assert point["validation"]["coded"] == 40
    assert point["says"] == "75.0% of the documents are coded, 100.0% of them rightly"


def test_a_precision_that_no_threshold_promises_is_said_so():
    point = routing.curve([0.9] * 10, [True] * 10, [0.9], [True], wanted=[0.95])["points"][0]
    assert point["threshold"] is point["test"] is point["validation"] is None
    assert point["says"] == "no threshold promises 95% on the 10 validation documents: all go to a person"


def test_a_threshold_that_no_test_document_reaches_has_no_precision():
    point = routing.curve([0.9] * 40, [True] * 40, [0.2, 0.3], [True, False], wanted=[0.9])["points"][0]
    assert (point["test"]["coded"], point["test"]["precision"], point["test"]["reached"]) == (0, None, None)
    assert point["says"] == "0.0% of the documents are coded: all go to a person"


def test_what_validation_promises_is_kept_in_nine_of_ten_worlds():
    kept = promised = 0  # of 150 worlds: many a promise is not made
    for world in range(150):
        generator = np.random.default_rng(world)
        probability = generator.random(200)
        right = generator.random(200) < probability  # calibrated: precision at or above t is (1 + t) / 2
        chosen = routing.threshold(probability, right, 0.8)
        if chosen is not None:
            promised += 1
            kept += (1 + chosen) / 2 >= 0.8
    assert promised > 70
    assert kept / promised > 0.9


@pytest.mark.parametrize(("rows", "wanted"), [(137, 0.8), (255, 0.9)])
def test_where_no_threshold_keeps_a_promise_at_most_one_world_in_twenty_gets_one(rows, wanted):
    broken, worlds = 0, 400
    for world in range(worlds):
        generator = np.random.default_rng(world)
        right = generator.random(rows) < wanted - 0.001  # how sure it is says nothing: the same precision everywhere
        broken += routing.threshold(generator.random(rows), right, wanted) is not None
    assert broken / worlds <= 0.05 + 2 * (0.05 * 0.95 / worlds) ** 0.5  # 17 % where the luckiest threshold is taken


def test_no_threshold_is_tried_below_one_that_promises_nothing():
    # 0.9^29 < 0.05: the first 29 would do, had they all been right; the 100 right ones below come too late
    probability, right = [0.9] * 29 + [0.5] * 100, [False] + [True] * 128
    assert routing.threshold(probability, right, 0.9) is None
    # fewer than 29 can promise nothing either way, so they do not end it
    assert routing.threshold([0.95] * 20 + [0.5] * 100, [False] + [True] * 119, 0.9) == 0.5


def test_the_calibration_error_is_that_of_two_bins_worked_out_by_hand():
    # 5 documents at 0.3 of which 1 is right, 5 at 0.9 of which 4 are: 0.5 * |0.2 - 0.3| + 0.5 * |0.8 - 0.9|
    probability = [0.3, 0.9] * 5
    right = [True, False] + [False, True] * 4
    assert routing.calibration_error(probability, right) == pytest.approx(0.1)
    found = routing.bins(probability, right)
    assert [(each["n"], each["confidence"], each["accuracy"]) for each in found] == [
        (5, pytest.approx(0.3), 0.2),
        (5, pytest.approx(0.9), 0.8),
    ]


def test_bins_hold_equal_numbers_where_probabilities_differ():
    probability = [number / 50 for number in range(50)]
    assert [each["n"] for each in routing.bins(probability, [True] * 50)] == [5] * 10
    shuffled = np.random.default_rng(0).permutation(50)
    same = routing.bins([probability[row] for row in shuffled], [True] * 50)
    assert same == routing.bins(probability, [True] * 50)


def test_equal_probabilities_share_the_bin_of_their_middle():
    # of 20 documents 2 make a bin: 3 equal ones behind the first have ranks 1 to 3, their middle is in the second bin
    probability = [0.1] + [0.2] * 3 + [0.3 + number / 100 for number in range(16)]
    assert [each["n"] for each in routing.bins(probability, [True] * 20)][:2] == [1, 3]


def test_the_brier_score_is_the_mean_square():
    found = routing.curve([0.5], [True], [0.5, 1.0], [True, False])
    assert found["brier"] == pytest.approx((0.25 + 1) / 2)


def test_the_curve_goes_from_the_surest_answer_to_all_of_them():
    found = routing.curve([0.5], [True], [0.2, 0.8, 0.8, 0.4], [False, True, False, True])["curve"]
    assert found == [
        {"threshold": 0.8, "coverage": 0.5, "precision": 0.5},
        {"threshold": 0.4, "coverage": 0.75, "precision": pytest.approx(2 / 3)},
        {"threshold": 0.2, "coverage": 1.0, "precision": 0.5},
    ]


def test_a_long_curve_is_thinned_out_to_fifty_points_and_keeps_its_ends():
    probability = np.random.default_rng(0).random(500)
    found = routing.curve([0.5], [True], probability, [True] * 500)
    assert len(found["curve"]) == 50
    assert (found["curve"][0]["coverage"], found["curve"][-1]["coverage"]) == (1 / 500, 1)
    json.dumps(found, allow_nan=False)


@pytest.mark.parametrize(
    "probability, right, says",
    [
        ([None], [True], "got None: leave models without probabilities out of routing"),
        ([1.2], [True], r"must be in \[0, 1\], got 1.2"),
        ([float("nan")], [True], r"must be in \[0, 1\], got nan"),
        ([0.5], [], "test needs one probability a document, got 1 for 0 documents"),
    ],
)
def test_what_is_no_probability_is_refused(probability, right, says):
    with pytest.raises(ValueError, match=says):
        routing.curve([0.5], [True], probability, right)


def test_certainty_cannot_be_wanted():
    with pytest.raises(ValueError, match="got 1.0: certainty cannot be promised"):
        routing.threshold([0.9], [True], 1.0)
