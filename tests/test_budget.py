"""What fits into a budget, in round rates that can be added up by hand."""

import pytest

from nbhelpers import verdicts
from nbhelpers.budget import Rates, Wanted, choose

# 3 s a test row (2 + 1), 1 s a training row and epoch, 100 s for the rest
RATES = Rates({"LLM_a_untrained": 2.0, "SLM_b_finetuned": 1.0}, {"b": 1.0}, {"a": 40.0, "b": 20.0}, 40.0)
WANTED = Wanted(test_rows=200, training_rows=400, epochs=3)


def test_all_that_is_wanted_is_taken_where_it_fits():
    found = choose(1900, RATES, WANTED)  # 100 + 200 * 3 + 400 * 3 = 1900
    assert (found.test_rows, found.training_rows, found.epochs, found.seconds) == (200, 400, 3, 1900)


def test_epochs_are_given_up_first():
    found = choose(1899, RATES, WANTED)
    assert (found.test_rows, found.training_rows, found.epochs, found.seconds) == (200, 400, 2, 1500)
    assert choose(1100, RATES, WANTED).epochs == 1


def test_then_test_and_training_rows_shrink_by_the_same_share():
    found = choose(600, RATES, WANTED)  # 100 + share * 1000
    assert (found.test_rows, found.training_rows, found.epochs, found.seconds) == (100, 200, 1, 600)


def test_neither_part_falls_below_fifty_rows():
    found = choose(320, RATES, WANTED)  # 100 + 50 * 3 leave 70 training rows
    assert (found.test_rows, found.training_rows, found.seconds) == (50, 70, 320)
    other = choose(600, RATES, Wanted(test_rows=1000, training_rows=60))  # 100 + 150 * 3 + 50
    assert (other.test_rows, other.training_rows, other.seconds) == (150, 50, 600)


def test_fewer_than_fifty_rows_are_all_taken():
    found = choose(190, RATES, Wanted(test_rows=20, training_rows=30, epochs=2))  # 100 + 20 * 3 + 30
    assert (found.test_rows, found.training_rows, found.epochs) == (20, 30, 1)


def test_a_budget_below_the_least_names_the_least():
    with pytest.raises(
        ValueError, match=r"50 test rows and 1 epoch of 50 training rows take about 5.0 minutes; give at least 5m"
    ):
        choose(299, RATES, WANTED)
    with pytest.raises(ValueError, match="give at least 6m"):
        choose(299, Rates(RATES.answer_seconds, RATES.training_seconds, {}, 101.0), WANTED)


@pytest.mark.parametrize("budget", range(300, 2000, 97))
def test_no_choice_is_over_the_budget_and_none_could_be_much_larger(budget):
    found = choose(budget, RATES, WANTED)
    assert found.seconds <= budget
    assert found.seconds == RATES.total(found.test_rows, found.training_rows, found.epochs)
    if found.epochs == 1 and found.test_rows < 200:
        assert budget - found.seconds < 4  # less than a row of each part


def test_the_choice_is_said_with_the_smallest_difference_that_it_can_tell():
    found = choose(600, RATES, WANTED)
    assert found.detectable_difference == verdicts.detectable_difference(100, 0.5)
    assert found.text == (
        "In 10.0 minutes: 200 of 400 training rows, 1 of 3 epochs, 100 of 200 test rows, about 10.0 minutes at the "
        "measured rates; the smallest difference that 100 test rows can tell is 19.6 points (80 % power; for two "
        "independent models, exactly one of them right on 50% of the rows)."
    )


def test_with_several_pairs_of_models_the_choice_promises_what_the_corrected_verdict_can_tell():
    found = choose(600, RATES, WANTED, pairs=4)
    assert found.detectable_difference == verdicts.detectable_difference(100, 0.5, level=0.05 / 4) > 0.23
    assert "(80 % power, corrected over 4 pairs of models; for two" in found.text


def test_a_test_of_a_few_rows_says_that_it_can_tell_nothing():
    found = choose(500, RATES, Wanted(test_rows=5))
    assert found.detectable_difference is None
    assert "5 test rows can tell no difference" in found.text and "training rows" not in found.text


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan")])
def test_a_rate_that_was_not_measured_is_refused(seconds):
    with pytest.raises(ValueError, match="answer_seconds of a must be above 0"):
        Rates({"a": seconds})


def test_a_run_without_test_rows_is_refused():
    with pytest.raises(ValueError, match="test_rows and epochs must be at least 1"):
        Wanted(test_rows=0)
