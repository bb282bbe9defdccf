"""Are numbers read out of written answers as the protocol says, and compared as it says?"""

from __future__ import annotations

import pytest

from nbhelpers import answers


@pytest.mark.parametrize(
    "text, strict, flexible",
    [
        ("3 + 4 = 7.\n#### 7", "7", "7"),
        ("#### 1,234.50 and #### 9", "1,234.50", "9"),
        ("#### -12", "-12", "-12"),
        ("####7", "[invalid]", "7"),
        ("####  7", "[invalid]", "7"),
        ("#### $18", "[invalid]", "$18"),
        ("She has $18.50 left.", "[invalid]", "$18.50"),
        ("It is 5.", "[invalid]", "5."),
        ("It is 5 .", "[invalid]", "5"),
        ("It is 5 ...", "[invalid]", "..."),
        ("from 3-4 of them", "[invalid]", "-4"),
        ("none", "[invalid]", "[invalid]"),
        ("", "[invalid]", "[invalid]"),
    ],
)
def test_strict_is_the_first_number_after_the_mark_and_flexible_the_last_number_of_all(text, strict, flexible):
    assert (answers.strict(text), answers.flexible(text)) == (strict, flexible)


@pytest.mark.parametrize(
    "answer, normalised",
    [
        ("1,200", "1200"),
        ("$18", "18"),
        ("18.", "18"),
        ("18.0", "18.0"),
        ("18..", "18."),
        ("a #### b\n#### 18", "18"),
        ("####18", "####18"),
        ("Seven", "seven"),
        (" 18 ", " 18 "),
        ("18.\n", "18\n"),
    ],
)
def test_before_comparing_commas_dollars_steps_and_a_final_dot_go(answer, normalised):
    assert answers.normalised(answer) == normalised


def test_an_answer_is_compared_as_text_once_both_sides_are_normalised():
    gold = "He pays 2 * 9 = $<<2*9=18>>18.\n#### 1,018"
    assert answers.same("$1018.", gold) and answers.same("1,0,18", gold)
    assert not answers.same("1018.0", gold) and not answers.same("018", gold)


def test_a_text_is_graded_both_ways():
    found = answers.grade(" 9 + 9 = 18.\n#### 18\n\nThat is 19.", "9 + 9 = 18\n#### 18")
    assert found == answers.Graded(strict="18", flexible="19.", strict_match=True, flexible_match=False)


def test_a_text_without_a_number_matches_nothing():
    found = answers.grade("I do not know", "#### 18")
    assert (found.strict_match, found.flexible_match) == (False, False)
    assert found.strict == found.flexible == "[invalid]"
