"""Measures of codes against scikit-learn, scipy and counts that can be redone with a pencil."""

import numpy as np
import pytest
from sklearn.metrics import f1_score

from nbhelpers import coding_metrics
from nbhelpers.coding_metrics import measure


def ranked(id, gold, *said):
    return {"id": id, "gold": [gold] if isinstance(gold, str) else gold, "ranked": list(said), "probability": 0.5}


def written(id, gold, said):
    return {"id": id, "gold": [gold] if isinstance(gold, str) else gold, "written": said}


def quick(lines, kind="labels", counts=None, **options):
    return measure(lines, kind=kind, train_counts=counts or {}, resamples=200, **options)


def test_the_accuracies_of_four_ranked_codes_are_those_counted_by_hand():
    lines = [
        ranked(0, "E119", "E119", "E116"),  # right
        ranked(1, "E119", "E116", "I10", "E119"),  # right category, third place
        ranked(2, "E119", "E039", "I10", "I11", "I12", "E119"),  # right chapter, fifth place
        ranked(3, "E119", "I10", "E039"),  # nothing right
    ]
    found = quick(lines, "icd10")
    assert [found[f"top_{k}_accuracy"] for k in (1, 3, 5)] == [0.25, 0.5, 0.75]
    assert (found["category_accuracy"], found["chapter_accuracy"]) == (0.5, 0.75)
    assert found["exact_match_accuracy"] is None and found["no_valid_answer"] is None
    assert found["n_samples"] == 4


def test_an_answer_without_a_valid_code_is_wrong_and_counted_on_its_own():
    found = quick([written(0, "I10", "I10"), written(1, "I10", None), written(2, "I10", "I11")], "icd10")
    assert found["exact_match_accuracy"] == pytest.approx(1 / 3)
    assert found["no_valid_answer"] == 1
    assert found["errors"] == [{"id": 1, "gold": ["I10"], "said": None}, {"id": 2, "gold": ["I10"], "said": "I11"}]
    assert [found[f"top_{k}_accuracy"] for k in (1, 3, 5)] == [None] * 3


def test_what_a_label_set_does_not_have_is_none_and_not_zero():
    found = quick([ranked(0, "FAM/SOCHX", "CC"), ranked(1, "CC", "CC")])
    assert found["category_accuracy"] is found["chapter_accuracy"] is found["by_chapter"] is None
    assert "category_accuracy" not in found["intervals"]


def test_written_answers_count_beside_a_ranking_and_the_ranking_is_the_prediction():
    line = {"id": 0, "gold": ["I10"], "ranked": ["I10", "I11"], "written": "I11"}
    found = quick([line, {**line, "id": 1}], "icd10")
    assert (found["exact_match_accuracy"], found["top_1_accuracy"], found["f1"]) == (0, 1, 1)


def test_the_f1_scores_are_those_of_scikit_learn_with_invalid_answers_as_a_class():
    generator = np.random.default_rng(0)
    labels = [f"l{number}" for number in range(6)]
    gold = [labels[number] for number in generator.integers(0, 5, 80)]  # one label is only ever predicted
    said = [labels[number] if number < 6 else None for number in generator.integers(0, 7, 80)]
    found = quick([written(row, g, s) for row, (g, s) in enumerate(zip(gold, said, strict=True))])
    with_class = [label or "no valid answer" for label in said]
    assert None in said
    assert found["f1"] == pytest.approx(f1_score(gold, with_class, average="weighted"))
    assert found["macro_f1"] == pytest.approx(f1_score(gold, with_class, average="macro"))


def test_any_of_several_gold_labels_is_right_and_the_first_stands_for_a_miss():
    lines = [ranked(0, ["A", "B"], "B"), ranked(1, ["A", "B"], "C"), ranked(2, ["C"], "C")]
    found = quick(lines, counts={"A": 1, "B": 2, "C": 0})
    assert found["top_1_accuracy"] == pytest.approx(2 / 3)
    # gold B A C against B C C: F1 of A 0, of B 1, of C 2 * 1 / (1 + 2)
    assert found["macro_f1"] == pytest.approx((0 + 1 + 2 / 3) / 3)
    assert [(row["training_rows"], row["n"], row["accuracy"]) for row in found["by_frequency"]] == [
        ("0", 1, 1.0),
        ("1", 2, 0.5),
    ]


def test_where_a_document_is_counted_does_not_depend_on_what_the_model_said():
    gold = ["E11.9", "I10"]
    found = quick([ranked(row, gold, "I10" if row < 5 else "J06.9") for row in range(10)], "icd10", {"E11.9": 1})
    (chapter,), (bucket,) = found["by_chapter"], found["by_frequency"]
    assert chapter["chapter"].startswith("IV ") and (chapter["n"], chapter["accuracy"]) == (10, 0.5)
    assert (bucket["training_rows"], bucket["labels"], bucket["n"], bucket["accuracy"]) == ("1", 1, 10, 0.5)


def test_every_number_of_training_rows_is_in_one_bucket():
    counts = {f"l{rows}": rows for rows in (0, 1, 2, 3, 5, 6, 10, 11, 20, 21, 999)}
    found = quick([ranked(label, label, label) for label in counts], counts=counts)["by_frequency"]
    assert {row["training_rows"]: row["labels"] for row in found} == dict(
        zip(("0", "1", "2", "3-5", "6-10", "11-20", "21+"), (1, 1, 1, 2, 2, 2, 2), strict=True)
    )


def test_chapters_stand_in_their_order_with_an_exact_interval():
    lines = [ranked(0, "I10", "I10"), ranked(1, "A001", "I10"), ranked(2, "I119", "I119"), ranked(3, "F00", "F00")]
    found = quick(lines, "icd10")["by_chapter"]
    names = ["I A00-B99 infectious and parasitic diseases", "in no chapter", "IX I00-I99 circulatory system"]
    assert [row["chapter"] for row in found] == names
    assert (found[2]["n"], found[2]["accuracy"], found[2]["high"]) == (2, 1.0, 1.0)
    assert found[2]["low"] == pytest.approx(0.025**0.5)  # p^2 = 0.025


@pytest.mark.parametrize("right, n", [(0, 7), (7, 7), (3, 10), (1, 200), (1999, 2037)])
def test_the_exact_interval_is_the_one_of_scipy(right, n):
    scipy = pytest.importorskip("scipy.stats")
    known = scipy.binomtest(right, n).proportion_ci(0.95, "exact")
    assert coding_metrics.exact_interval(right, n) == pytest.approx((known.low, known.high), abs=1e-9)


def test_all_wrong_is_not_known_without_doubt():
    interval = quick([ranked(row, "A", "B") for row in range(20)])["intervals"]
    # (1 - p)^20 = 0.025
    assert interval["top_1_accuracy"] == {
        "low": 0.0,
        "high": pytest.approx(1 - 0.025 ** (1 / 20)),
        "by": "exact binomial",
    }
    assert interval["f1"] == {"low": None, "high": None, "by": None}


def test_an_interval_of_an_accuracy_is_as_wide_as_the_binomial_deviation_says():
    lines = [ranked(row, "A", "A" if row % 2 else "B") for row in range(400)]
    interval = measure(lines, kind="labels", train_counts={})["intervals"]["top_1_accuracy"]
    assert interval["by"] == "bootstrap"
    assert (interval["low"], interval["high"]) == (pytest.approx(0.451, abs=0.006), pytest.approx(0.549, abs=0.006))


def test_the_interval_of_f1_holds_f1_where_classes_have_one_document_each():
    generator = np.random.default_rng(0)
    said = [row if generator.random() < 0.4 else int(generator.integers(0, 600)) for row in range(600)]
    found = quick([ranked(row, f"l{row}", f"l{answer}") for row, answer in enumerate(said)])
    for name in ("f1", "macro_f1"):
        assert found["intervals"][name]["low"] < found[name] < found["intervals"][name]["high"]


def test_kinds_of_documents_resample_as_documents_do():
    generator = np.random.default_rng(1)
    a, b = generator.random(60) < 0.3, generator.random(60) < 0.6
    drawn = coding_metrics.resampled_accuracies([a, b], 4000)
    rows = generator.integers(0, 60, (4000, 60))
    plain = np.stack([a[rows].mean(1), b[rows].mean(1)], 1)
    assert drawn.mean(0) == pytest.approx(plain.mean(0), abs=0.006)
    assert np.cov(drawn.T) == pytest.approx(np.cov(plain.T), rel=0.12, abs=1e-4)


def test_the_same_seed_gives_the_same_measures():
    lines = [ranked(row, "A", "AB"[row % 3 == 0]) for row in range(30)]
    assert quick(lines, seed=3) == quick(lines, seed=3) != quick(lines, seed=4)
    first, again, other = (
        coding_metrics.resampled_accuracies([[True, False]], 50, seed).tolist() for seed in (3, 3, 4)
    )
    assert first == again != other


def test_outcomes_are_right_or_wrong_by_the_measure_that_was_asked_for():
    lines = [{"id": 0, "gold": ["I10"], "ranked": ["I11", "I10"], "written": "I10"}]
    asked = ("exact_match_accuracy", "top_1_accuracy", "top_3_accuracy", "chapter_accuracy")
    assert [coding_metrics.outcomes(lines, name) for name in asked] == [[True], [False], [True], [True]]
    with pytest.raises(ValueError, match="top_1_accuracy is not there for 1 of 1 answers"):
        coding_metrics.outcomes([written(0, "A", "A")], "top_1_accuracy")
    with pytest.raises(LookupError, match="unknown measure 'top_2_accuracy'. Did you mean"):
        coding_metrics.outcomes(lines, "top_2_accuracy")


def test_errors_hold_labels_and_ids_and_are_fifty_at_most():
    found = quick([{**ranked(row, "A", "B"), "text": "canary"} for row in range(80)])
    assert len(found["errors"]) == 50 and found["n_samples"] == 80
    assert "canary" not in str(found)


def test_lines_of_scores_are_ranked_with_the_first_of_equal_labels_first():
    class Row:
        id, labels = 7, ("b",)

    scores = np.log(np.array([[0.25, 0.5, 0.25]]))
    assert coding_metrics.ranked_lines([Row], scores, ["a", "b", "c"]) == [
        {"id": 7, "gold": ["b"], "ranked": ["b", "a", "c"], "probability": pytest.approx(0.5)}
    ]


@pytest.mark.parametrize(
    "lines, kind, says",
    [
        ([], "labels", "no answers to measure"),
        ([ranked(1, "A", "A")], "codes", "kind must be 'icd10' or 'labels', got 'codes'"),
        ([ranked(1, "A", "A")] * 2, "labels", "document 1 was answered 2 times"),
        ([{"id": 1, "gold": ["A"]}], "labels", "neither 'ranked' nor 'written'"),
        ([{"id": 1, "gold": [], "written": None}], "labels", "document 1 has no gold label"),
    ],
)
def test_answers_that_cannot_be_measured_are_refused(lines, kind, says):
    with pytest.raises(ValueError, match=says):
        quick(lines, kind)
