"""Which texts say nearly the same? Those of which at least 4 in 5 of all sequences of five words stand in both.

That is a Jaccard similarity of 0.8 or more, whatever case, punctuation and white space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

SHINGLE = 5  # words in a row


def groups(texts: Sequence[str]) -> list[int]:
    """For each text the number of the first text of its group: near-duplicates, and what they are near to in turn.

    Exact: of two such texts at least one of the rarest fifth of shingles stands in both (prefix filtering, Chaudhuri et
    al. 2006; Bayardo et al. 2007), so only texts that share one of those are compared.
    """
    vocabulary: dict[str, int] = {}
    shingles = _by_rarity([_shingles(text, vocabulary) for text in texts])
    first = list(range(len(texts)))

    def group(at: int) -> int:
        while first[at] != at:
            first[at] = at = first[first[at]]
        return at

    holders: dict[int, list[int]] = {}
    for number, (ranks, repeated) in enumerate(shingles):
        rarest = len(ranks) - -(-4 * len(ranks) // 5) + 1
        for rank in ranks[:rarest][repeated[:rarest]].tolist():
            holders.setdefault(rank, []).append(number)
    compared = set()
    for numbers in holders.values():
        together: dict[int, list[int]] = {}  # the texts that hold this shingle, by their group so far
        for number in numbers:
            for other in [root for root in together if root != group(number)]:
                for one in together[other]:
                    if (one, number) not in compared:
                        compared.add((one, number))
                        if _are_near(shingles[one][0], shingles[number][0]):
                            low, high = sorted((group(one), group(number)))
                            first[high] = low
                            break
            together.setdefault(group(number), []).append(number)
    return [group(number) for number in range(len(texts))]


def _shingles(text: str, vocabulary: dict[str, int]) -> np.ndarray:
    """The different sequences of words, each as one number; of a shorter text the whole."""
    words = re.findall(r"\w+", text.lower()) or [text]
    numbers = np.array([vocabulary.setdefault(word, len(vocabulary) + 1) for word in words], dtype=np.uint64)
    numbers = np.pad(numbers, (0, max(0, SHINGLE - len(numbers))))
    found = np.zeros(len(numbers) - SHINGLE + 1, dtype=np.uint64)
    for at in range(SHINGLE):  # a polynomial modulo 2^64 in the words' numbers
        found = found * np.uint64(0x9E3779B97F4A7C15) + numbers[at : at + len(found)]
    return np.unique(found)


def _by_rarity(shingles: Sequence[np.ndarray]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its shingles' ranks, rarest first, and whether another text has each, too."""
    if not shingles:
        return []
    _, which, counts = np.unique(np.concatenate(shingles), return_inverse=True, return_counts=True)
    ranks = np.empty(len(counts), dtype=np.int64)
    ranks[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    repeated = np.sort(counts) > 1
    ends = np.cumsum([len(found) for found in shingles])[:-1]
    ordered = [np.sort(part) for part in np.split(ranks[which], ends)]
    return [(part, repeated[part]) for part in ordered]


def _are_near(one: np.ndarray, other: np.ndarray) -> bool:
    """Is the Jaccard similarity of two sets of numbers, both sorted, at least 4/5?"""
    if 5 * min(len(one), len(other)) < 4 * max(len(one), len(other)):
        return False
    both = len(np.intersect1d(one, other, assume_unique=True))
    return 5 * both >= 4 * (len(one) + len(other) - both)
