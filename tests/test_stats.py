"""Intervals against printed t tables and sums that can be redone with a pencil."""

import math

import numpy as np
import pytest

from nbhelpers.stats import (
    Interval,
    bootstrap,
    digits,
    mean,
    mean_interval,
    paired_bootstrap_difference,
    student_t_quantile,
)


@pytest.mark.parametrize(
    ("probability", "degrees", "printed"),
    [
        (0.975, 1, 12.706),
        (0.975, 2, 4.303),
        (0.975, 4, 2.776),
        (0.975, 9, 2.262),
        (0.975, 30, 2.042),
        (0.975, 120, 1.980),
        (0.95, 10, 1.812),
        (0.995, 4, 4.604),
        (0.9995, 3, 12.924),
        (0.975, 1e7, 1.960),
        (0.5, 3, 0.0),
        (0.025, 4, -2.776),
    ],
)
def test_t_quantiles_are_those_of_the_printed_table(probability, degrees, printed):
    assert student_t_quantile(probability, degrees) == pytest.approx(printed, abs=6e-4)


def test_one_degree_of_freedom_is_the_cauchy_distribution_to_twelve_digits():
    assert student_t_quantile(0.9, 1) == pytest.approx(math.tan(math.pi * 0.4), rel=1e-12)


def test_two_degrees_of_freedom_follow_their_closed_form():
    p = 0.99
    closed = (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    assert student_t_quantile(p, 2) == pytest.approx(closed, rel=1e-12)


def test_the_interval_of_five_seeds_is_the_one_worked_out_by_hand():
    # 2 4 6 8 10: mean 6, squares 16 + 4 + 0 + 4 + 16 = 40, s^2 = 10, s / sqrt(5) = sqrt(2), t(4) = 2.7764
    found = mean_interval([2, 4, 6, 8, 10])
    assert found.mean == 6
    assert found.high - 6 == pytest.approx(2.7764 * math.sqrt(2), abs=1e-4)
    assert 6 - found.low == pytest.approx(found.high - 6)
    assert (found.n, found.over, found.confidence) == (5, "seeds", 0.95)


def test_more_confidence_is_a_wider_interval():
    narrow, wide = mean_interval([1, 2, 4], 0.5), mean_interval([1, 2, 4], 0.99)
    assert wide.low < narrow.low < narrow.high < wide.high


@pytest.mark.parametrize("interval", [mean_interval, bootstrap])
def test_one_value_has_a_mean_and_no_interval(interval):
    found = interval([3.5])
    assert (found.mean, found.low, found.high, found.n) == (3.5, None, None, 1)
    assert "no interval: n = 1" in str(found)


def test_about_95_of_100_intervals_hold_the_true_mean():
    generator = np.random.default_rng(1)
    held = sum((i := mean_interval(generator.normal(5, 2, 4))).low <= 5 <= i.high for _ in range(1000))
    assert 930 <= held <= 970


def test_a_bootstrap_interval_of_a_mean_is_close_to_the_normal_one():
    values = np.random.default_rng(2).normal(10, 3, 400)
    found = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.03)
    assert found.high == pytest.approx(values.mean() + half, abs=0.03)
    assert (found.n, found.over) == (400, "documents")


def test_the_same_seed_gives_the_same_bootstrap_and_another_seed_another_one():
    values = np.random.default_rng(0).normal(size=30)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


def test_the_global_generators_are_left_alone():
    before = np.random.get_state()[1].copy()
    bootstrap([1.0, 2.0])
    assert (np.random.get_state()[1] == before).all()


def test_rows_of_sums_are_resampled_whole_so_that_a_ratio_of_equal_rows_has_no_width():
    rows = [(2.0 * tokens, tokens) for tokens in (1, 5, 10, 100)]  # 2 nats a token in every document
    found = bootstrap(rows, lambda chosen: chosen[:, 0].sum() / chosen[:, 1].sum())
    assert found.mean == pytest.approx(2) and found.low == pytest.approx(2) and found.high == pytest.approx(2)


def test_rows_of_several_columns_need_a_statistic_of_their_own():
    with pytest.raises(ValueError, match=r"mean takes one column, got rows of shape \(2, 2\)"):
        bootstrap([(1, 2), (3, 4)])


def test_a_paired_difference_cancels_what_the_documents_share():
    hard = np.random.default_rng(5).normal(0, 100, 50)
    found = paired_bootstrap_difference(hard + 1, hard)
    assert found.mean == pytest.approx(1) and found.low == pytest.approx(1) and found.high == pytest.approx(1)


def test_a_paired_difference_has_the_sign_of_a_minus_b_and_says_over_what():
    found = paired_bootstrap_difference([1.0, 2.0, 3.0], [0.0, 2.0, 1.0])
    assert found.mean == pytest.approx(1)
    assert found.low <= 1 <= found.high
    assert found.over == "documents"


def test_paired_values_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match="must have equal length, got 2 and 3"):
        paired_bootstrap_difference([1, 2], [1, 2, 3])


@pytest.mark.parametrize("interval", [mean_interval, bootstrap])
@pytest.mark.parametrize(
    ("values", "text"),
    [([], "at least one value, got none"), ([1.0, float("nan")], "must be finite, got nan at index 1")],
)
def test_missing_and_infinite_values_are_refused_by_place(interval, values, text):
    with pytest.raises(ValueError, match=text):
        interval(values)


@pytest.mark.parametrize("confidence", [0, 1, 95])
def test_confidence_is_a_fraction(confidence):
    with pytest.raises(ValueError, match=rf"confidence must be in \(0, 1\), got {confidence}"):
        mean_interval([1, 2], confidence)


def test_an_interval_says_over_what_it_was_taken():
    with pytest.raises(ValueError, match="over must be 'seeds' or 'documents', got 'rows'"):
        mean_interval([1, 2], over="rows")
    assert str(Interval(2, 1, 3, 5, "seeds")) == "2 [1, 3] (95% over 5 seeds)"


def test_zero_resamples_and_impossible_quantiles_are_refused():
    with pytest.raises(ValueError, match="n must be at least 1 resample, got 0"):
        bootstrap([1, 2], n=0)
    with pytest.raises(ValueError, match=r"probability must be in \(0, 1\), got 1"):
        student_t_quantile(1, 3)
    with pytest.raises(ValueError, match="degrees of freedom must be above 0, got 0"):
        student_t_quantile(0.9, 0)


def test_mean_of_a_list_and_of_an_array_agree():
    assert mean([1, 2, 6]) == mean(np.array([1, 2, 6])) == 3


@pytest.mark.parametrize(("value", "text"), [(1.9, "1.90"), (12.345, "12.3"), (127.6, "128"), (0.05, "0.0500")])
def test_numbers_for_people_have_three_significant_digits(value, text):
    assert digits(value) == text
