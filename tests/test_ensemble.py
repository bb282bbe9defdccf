"""Combined log-probabilities against products that can be redone with a pencil."""

import numpy as np
import pytest

from nbhelpers import ensemble


def logs(*rows):
    with np.errstate(divide="ignore"):
        return np.log(np.array(rows))


def test_half_and_half_is_the_normalised_product_of_square_roots():
    # sqrt(0.64 * 0.04) = 0.16, sqrt(0.36 * 0.96) = 0.5879: 0.16 / 0.7479
    found = np.exp(ensemble.combine(logs([0.64, 0.36]), logs([0.04, 0.96]), 0.5))
    assert found == pytest.approx(np.array([[0.2139, 0.7861]]), abs=1e-4)
    assert found.sum() == pytest.approx(1)


def test_the_weight_is_the_large_models():
    # odds 9 to the power of a quarter are 1.732: 1.732 / 2.732
    found = np.exp(ensemble.combine(logs([0.9, 0.1]), logs([0.5, 0.5]), 0.25))
    assert found[0, 0] == pytest.approx(0.6340, abs=1e-4)


def test_all_the_weight_on_one_model_is_that_model():
    large, small = logs([0.5, 0.5, 0.0]), logs([0.2, 0.3, 0.5])
    assert (ensemble.combine(large, small, 0) == small).all()
    assert (ensemble.combine(large, small, 1) == large).all()


def test_what_one_model_finds_impossible_is_impossible():
    found = np.exp(ensemble.combine(logs([0.5, 0.5, 0.0]), logs([0.2, 0.3, 0.5]), 0.5))
    assert found[0, 2] == 0 and found.sum() == pytest.approx(1)


def test_the_weight_is_the_one_with_the_most_right_validation_rows():
    # the small model is right on row 0 alone, the large one on row 1 alone; the middle is right on both
    large, small = logs([0.45, 0.55], [0.1, 0.9]), logs([0.9, 0.1], [0.55, 0.45])
    gold = [{0}, {1}]
    points = {point["weight"]: point["accuracy"] for point in ensemble.grid(large, small, gold)}
    assert list(points) == [pytest.approx(step / 20) for step in range(21)]
    assert (points[0.0], points[0.5], points[1.0]) == (0.5, 1.0, 0.5)
    # right on row 1 from w * log 9 = (1 - w) * log(55 / 45): w = 0.084 on, so 0.1 is the first
    assert ensemble.choose(large, small, gold) == 0.1


def test_of_equally_good_weights_the_small_model_has_it():
    same = logs([0.9, 0.1])
    assert ensemble.choose(same, same, [{0}]) == 0.0


def test_any_of_several_gold_columns_is_right():
    same = logs([0.2, 0.7, 0.1])
    assert ensemble.grid(same, same, [{0, 1}])[0]["accuracy"] == 1
    assert ensemble.grid(same, same, [{0, 2}])[0]["accuracy"] == 0


def test_float32_scores_of_thousands_of_labels_are_let_through():
    scores = np.log(np.random.default_rng(0).dirichlet(np.ones(2037), 4)).astype(np.float32)
    found = ensemble.combine(scores, scores, 0.3)
    assert found == pytest.approx(scores, abs=1e-4)


@pytest.mark.parametrize(
    "large, small, weight, says",
    [
        (logs([0.5, 0.5]), logs([1.0]), 0.5, r"same rows and labels, got \(1, 2\) and \(1, 1\)"),
        (logs([0.5, 0.2]), logs([0.5, 0.5]), 0.5, "the large model's probabilities of row 0 sum to 0.7"),
        (logs([0.5, 0.5]), logs([0.5, float("nan")]), 0.5, "the small model's probabilities of row 0 sum to nan"),
        (logs([1.0, 0.0]), logs([0.0, 1.0]), 0.5, "row 0 has no label that both models find possible"),
        (logs([0.5, 0.5]), logs([0.5, 0.5]), 1.5, r"weight must be in \[0, 1\], got 1.5"),
    ],
)
def test_scores_that_cannot_be_combined_are_refused(large, small, weight, says):
    with pytest.raises(ValueError, match=says):
        ensemble.combine(large, small, weight)


def test_the_weight_needs_the_right_columns_of_every_row():
    with pytest.raises(ValueError, match="right columns of each validation row, got 1 of 2"):
        ensemble.choose(logs([0.5, 0.5], [0.5, 0.5]), logs([0.5, 0.5], [0.5, 0.5]), [{0}])
