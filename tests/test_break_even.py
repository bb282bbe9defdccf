"""Crossings of planted curves, worked out by hand."""

import math
from collections import Counter
from itertools import pairwise

import pytest

from nbhelpers import break_even


def right(hits, n=100):
    return [row < hits for row in range(n)]


def quick(points, large, **options):
    return break_even.curve([(rows, right(hits)) for rows, hits in points], right(large), resamples=300, **options)


def test_the_crossing_lies_between_two_points_linear_in_the_logarithm():
    # -20 at 3 rows, +20 at 15: half way from log 4 to log 16 is log 8
    found = quick([(0, 10), (3, 20), (15, 60)], 40)
    assert found["crossing"]["state"] == "crosses"
    assert found["crossing"]["rows"] == pytest.approx(7)
    assert found["crossing"]["low"] < 7 < found["crossing"]["high"]
    assert found["crossing"]["share_of_resamples"] == 1 and found["crossing"]["between"] == [3, 15]
    assert found["sentence"].startswith(
        "The small model gets ahead of the large one (40.0%) at about 7 labelled dialogues ["
    )


def test_labels_that_no_point_counts_are_said_beside_the_crossing():
    found = quick([(0, 10), (3, 20), (15, 60)], 40)
    said = break_even.with_uncounted(found, 64)
    assert said["sentence"] == f"{found['sentence']} Plus 64 validation dialogues, which chose each tuning's best step."
    assert (said["validation_rows"], said["shots"], said["crossing"]) == (64, 0, found["crossing"])
    assert break_even.with_uncounted(found, 9, 2)["sentence"].endswith("best step, and 2 solved in every prompt.")


def test_a_crossing_a_quarter_of_the_way_up_is_a_quarter_of_the_logarithm():
    found = quick([(0, 30), (15, 70)], 40)
    assert found["crossing"]["rows"] == pytest.approx(math.exp(math.log(16) / 4) - 1)


def test_a_small_model_that_never_ends_ahead_has_no_crossing():
    found = quick([(0, 10), (3, 60), (15, 40)], 40)  # ahead for a while, equal at the end
    assert found["crossing"]["state"] == "never" and found["crossing"]["rows"] is None
    assert found["crossing"]["low"] is found["crossing"]["high"] is None
    assert found["sentence"].startswith("With up to 15 labelled dialogues the small model does not end ahead")


def test_a_small_model_that_is_always_ahead_is_so_from_the_start():
    found = quick([(0, 60), (8, 80)], 10)
    assert (found["crossing"]["state"], found["crossing"]["rows"]) == ("from the start", 0)
    assert (found["crossing"]["low"], found["crossing"]["high"]) == (0, 0)
    assert "from 0 labelled dialogues on; in 100% of resamples" in found["sentence"]


def test_the_last_crossing_counts_where_the_curve_goes_up_and_down():
    found = quick([(0, 60), (1, 20), (3, 60)], 40)
    # down and up again: half way from log 2 to log 4 is log 2.83
    assert found["crossing"]["rows"] == pytest.approx(math.sqrt(8) - 1)


def test_a_curve_that_is_equal_and_then_ahead_gets_ahead_somewhere_between_and_nothing_narrower_is_claimed():
    found = quick([(0, 40), (194, 60), (778, 70)], 40)
    crossing = found["crossing"]
    assert (crossing["state"], crossing["between"]) == ("between", [0, 194])
    assert crossing["rows"] is crossing["low"] is crossing["high"] is None and crossing["share_of_resamples"] == 1
    assert "with 0 labelled dialogues and ahead with 194" in found["sentence"] and "[" not in found["sentence"]


def test_only_some_resamples_cross_where_the_lead_is_within_the_noise():
    points = [(0, right(10)), (8, [29 <= row < 71 for row in range(100)])]  # 42 against 40, right on other documents
    share = break_even.curve(points, right(40), resamples=500)["crossing"]["share_of_resamples"]
    assert 0.5 < share < 0.75


def test_a_curve_that_ends_behind_has_no_interval_though_some_resamples_cross():
    points = [(0, right(10)), (8, [31 <= row < 69 for row in range(100)])]  # 38 against 40
    crossing = break_even.curve(points, right(40), resamples=500)["crossing"]
    assert (crossing["rows"], crossing["low"], crossing["high"]) == (None, None, None)
    assert 0.2 < crossing["share_of_resamples"] < 0.5


def test_points_carry_their_accuracy_and_interval():
    found = quick([(0, 0), (8, 80)], 40)
    assert [(point["rows"], point["accuracy"]) for point in found["points"]] == [(0, 0), (8, 0.8)]
    assert found["points"][0]["high"] == pytest.approx(1 - 0.025 ** (1 / 100))  # none of 100
    assert found["points"][1]["low"] < 0.8 < found["points"][1]["high"]
    assert (found["large"]["accuracy"], found["n"]) == (0.4, 100)


@pytest.mark.parametrize(
    "n, points, expected",
    [(384, 6, [0, 24, 48, 96, 192, 384]), (100, 3, [0, 50, 100]), (5, 6, [0, 1, 2, 5]), (1, 2, [0, 1])],
)
def test_sizes_double_up_to_all_rows(n, points, expected):
    assert break_even.sizes(n, points) == expected


def test_subsets_are_nested_and_hold_as_many_rows_of_each_label():
    labels = ["a"] * 10 + ["b"] * 10 + ["c"] * 2
    found = break_even.subsets(labels, [0, 3, 7, 12, 22], seed=1)
    assert [len(rows) for rows in found] == [0, 3, 7, 12, 22]
    for smaller, larger in pairwise(found):
        assert set(smaller) < set(larger) and larger == sorted(larger)
    counts = [Counter(labels[row] for row in rows) for rows in found]
    assert counts[1] == {"a": 1, "b": 1, "c": 1}
    assert sorted(counts[2].values()) == [2, 2, 3] and counts[2]["c"] == 2
    assert counts[3] == {"a": 5, "b": 5, "c": 2}


def test_the_seed_decides_which_rows_of_a_label_and_which_labels_come_first():
    labels = list("aabbccdd")
    assert break_even.subsets(labels, [3], seed=1) == break_even.subsets(labels, [3], seed=1)
    drawn = {tuple(break_even.subsets(labels, [3], seed=seed)[0]) for seed in range(20)}
    assert len(drawn) > 10


@pytest.mark.parametrize(
    "points, large, says",
    [
        ([], [True], "at least one point"),
        ([(0, [True]), (0, [True])], [True], r"growing numbers of training rows from 0 on, got \[0, 0\]"),
        ([(0, [True, False])], [True], r"same documents, got \[1, 2\] of them"),
    ],
)
def test_a_curve_that_makes_no_sense_is_refused(points, large, says):
    with pytest.raises(ValueError, match=says):
        break_even.curve(points, large)


def test_more_rows_than_there_are_cannot_be_taken():
    with pytest.raises(ValueError, match=r"sizes must be 0 to 2 training rows, got \[3\]"):
        break_even.subsets(["a", "b"], [3])
    with pytest.raises(ValueError, match="at least 1 row and 2 points"):
        break_even.sizes(0)
