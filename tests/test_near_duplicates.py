"""Are exactly those texts in one group that share four in five of their sequences of five words?"""

from __future__ import annotations

import random
from itertools import combinations

import pytest

from nbhelpers import near_duplicates


def words(start: int, count: int) -> str:
    return " ".join(f"w{number}" for number in range(start, start + count))


def test_four_in_five_is_near_and_less_is_not():
    # 40 words have 36 sequences of 5; without the last 4 words 32 of 36 stand in both: 0.89; without 8: 28/36 = 0.78
    assert near_duplicates.groups([words(0, 40), words(0, 36), words(100, 40)]) == [0, 0, 2]
    assert near_duplicates.groups([words(0, 40), words(0, 32)]) == [0, 1]
    # 5 sequences of which 4 stand in both: 4/5 exactly
    assert near_duplicates.groups([words(0, 9), words(0, 8)]) == [0, 0]
    assert near_duplicates.groups([words(0, 8), words(0, 7)]) == [0, 1]  # 3/4


def test_a_text_within_a_much_longer_one_is_not_near_to_it():
    common = words(0, 40)  # twice more, so that what the short text shares with the long one is rare
    short = words(100, 14)
    assert near_duplicates.groups([f"{short} {common}", short, f"{common} {words(200, 30)}", common]) == [0, 1, 2, 3]


def test_case_punctuation_and_white_space_are_nothing():
    assert near_duplicates.groups(["Doctor: Hello, Mia.", "doctor  hello\nMIA", "Doctor: Hello, Ben."]) == [0, 0, 2]


def test_what_is_near_to_one_of_a_group_belongs_to_it():
    chain = [words(0, 40), words(2, 40), words(4, 40), words(6, 40)]  # each near to the next: 34/38; ends: 30/42
    assert near_duplicates.groups([chain[0], chain[3]]) == [0, 1]
    assert near_duplicates.groups([chain[0], chain[3], "x", chain[1], chain[2]]) == [0, 0, 2, 0, 0]


def test_short_and_wordless_texts_are_near_only_to_their_like():
    assert near_duplicates.groups(["", "?", "yes", "Yes!", "yes no", "?", ""]) == [0, 1, 2, 2, 4, 1, 0]
    assert near_duplicates.groups([]) == []


def similarity(one: str, other: str) -> float:
    shingles = [
        {tuple(text.split()[at : at + 5]) for at in range(max(1, len(text.split()) - 4))} for text in (one, other)
    ]
    return len(shingles[0] & shingles[1]) / len(shingles[0] | shingles[1])


@pytest.mark.parametrize("seed", range(5))
def test_groups_are_those_of_comparing_every_pair(seed):
    draw = random.Random(seed)
    texts = []
    for _ in range(60):
        said = (draw.choice(texts).split() if texts and draw.random() < 0.7 else []) or draw.choices("abcdefgh", k=30)
        for _ in range(draw.choice([0, 1, 1, 2, 6])):
            said[draw.randrange(len(said))] = draw.choice("abcdefgh")
        texts.append(" ".join(said[: draw.choice([30, 30, 28, 25])] or said))
    expected = list(range(len(texts)))
    for one, other in combinations(range(len(texts)), 2):
        if similarity(texts[one], texts[other]) >= 0.8:
            low, high = sorted((expected[one], expected[other]))
            expected = [low if group == high else group for group in expected]
    assert len(set(expected)) < 55
    assert near_duplicates.groups(texts) == expected
