"""Are two models compared on the same documents, with the right p-value, and refused on others?"""

from __future__ import annotations

import json

import pytest

from nbhelpers import predictions, stats


def choices(right: str, ids=None) -> list[dict]:
    """A line a letter: r = right, w = wrong, n = no valid answer. Gold is 1."""
    lines = []
    for at, letter in enumerate(right):
        prediction = {"r": 1, "w": 0, "n": None}[letter]
        lines.append({"id": ids[at] if ids else at, "gold": 1, "prediction": prediction, "prediction_norm": 1})
    return lines


def write(folder, lines) -> str:
    folder.mkdir()
    (folder / "predictions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


@pytest.mark.parametrize(
    "only_a, only_b, p",
    [(0, 0, 1.0), (5, 0, 2 / 32), (0, 5, 2 / 32), (3, 3, 1.0), (6, 1, 2 * 8 / 128), (1, 0, 1.0)],
)
def test_mcnemar_is_twice_the_smaller_binomial_tail(only_a, only_b, p):
    assert stats.mcnemar(only_a, only_b) == pytest.approx(p)


def test_mcnemar_is_the_binomial_test_of_scipy():
    scipy = pytest.importorskip("scipy.stats")
    for only_a, only_b in ((12, 30), (100, 80), (2, 9)):
        assert stats.mcnemar(only_a, only_b) == pytest.approx(scipy.binomtest(only_a, only_a + only_b).pvalue)


def test_the_standard_error_has_n_minus_1_below():
    assert stats.standard_error([1, 0, 0, 1]) == pytest.approx((1 / 3) ** 0.5 / 2)
    assert stats.standard_error([1.0]) is None


def test_what_only_one_of_two_models_got_right_is_counted():
    found = predictions.compare(choices("rrrwwn"), choices("rwwwrr"))["acc"]
    assert (found["n"], found["only_a"], found["only_b"]) == (6, 2, 2)
    assert (found["a"], found["b"], found["mcnemar_p"]) == (0.5, 0.5, 1.0)
    assert found["difference"]["mean"] == 0 and found["difference"]["over"] == "documents"


def test_an_answer_that_is_not_valid_counts_as_wrong_and_is_not_left_out():
    assert predictions.outcomes(choices("rn"))["acc"] == [True, None]
    assert predictions.compare(choices("rr"), choices("rn"))["acc"]["b"] == 0.5


def test_written_answers_have_measures_of_their_own():
    lines = [{"id": 0, "gold": "4", "text": "4", "strict": False, "flexible": True}]
    assert predictions.outcomes(lines) == {"exact_match_strict": [False], "exact_match_flexible": [True]}


def test_other_documents_or_other_gold_answers_are_not_compared():
    with pytest.raises(ValueError, match="predictions of 2 and of 3 documents"):
        predictions.compare(choices("rr"), choices("rrr"))
    with pytest.raises(ValueError, match="other ids"):
        predictions.compare(choices("rr", ids=["a", "b"]), choices("rr", ids=["b", "a"]))
    changed = [line | {"gold": 0} for line in choices("rr")]
    with pytest.raises(ValueError, match="other texts or gold answers"):
        predictions.compare(choices("rr"), changed)


def test_every_two_runs_with_predictions_are_compared_and_the_others_say_why_not(tmp_path):
    folders = [write(tmp_path / name, choices(right)) for name, right in {"a": "rrw", "b": "rww", "c": "rr"}.items()]
    (tmp_path / "none").mkdir()
    tests, problems = predictions.compare_runs([*folders, str(tmp_path / "none")])
    assert {(test["a_run"], test["b_run"]) for test in tests} == {(folders[0], folders[1])}
    assert [test["measure"] for test in tests] == ["acc", "acc_norm"]
    assert len(problems) == 2 and all("documents with other ids" in problem for problem in problems)


def test_a_torn_line_is_a_problem_and_not_a_smaller_test(tmp_path):
    folder = write(tmp_path / "a", choices("rr"))
    with (tmp_path / "a" / "predictions.jsonl").open("a") as file:
        file.write('{"id": 2, "go')
    tests, problems = predictions.compare_runs([folder])
    assert not tests and "1 lines that are no JSON" in problems[0]
