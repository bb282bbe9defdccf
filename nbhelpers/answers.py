"""Which answer does a written text give? Numbers of word problems, as lm-evaluation-harness 0.4.13 reads them.

Two readings, both reported: strict wants the form that was taught, flexible takes the last number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

INVALID = "[invalid]"  # what a text without a number gives; it equals no gold answer
_STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_IGNORED = tuple(re.compile(pattern) for pattern in (",", r"\$", r"(?s).*#### ", r"\.$"))


@dataclass(frozen=True)
class Graded:
    """What was read out of a text, as it stands there, and whether it is the gold answer."""

    strict: str
    flexible: str
    strict_match: bool
    flexible_match: bool


def grade(text: str, gold: str) -> Graded:
    """Both readings of a text beside the gold answer (whole, steps included).

    >>> grade(" 3 + 4 = 7.\\n#### 7", "3 + 4 = <<3+4=7>>7\\n#### 7").strict_match
    True
    """
    first, last = strict(text), flexible(text)
    return Graded(first, last, same(first, gold), same(last, gold))


def strict(text: str) -> str:
    """The first number after `#### `.

    >>> strict("#### 1,000. #### 2"), strict("####7")
    ('1,000.', '[invalid]')
    """
    found = _STRICT.search(text)
    return found.group(1) if found else INVALID


def flexible(text: str) -> str:
    """The last number, wherever it stands. Two marks of `$.,` alone count as one, as in the harness.

    >>> flexible("It costs $18.50 or -3"), flexible("Well...")
    ('-3', '...')
    """
    found = _FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group) if found else INVALID


def same(answer: str, gold: str) -> bool:
    """Whether two answers are equal once both are normalised."""
    return normalised(answer) == normalised(gold)


def normalised(answer: str) -> str:
    """Without `,` and `$`, what stands before the last `#### `, and a final dot; lower case.

    >>> normalised("So $1,200 it is.\\n#### 1,200.")
    '1200'
    """
    for pattern in _IGNORED:
        answer = pattern.sub("", answer)
    return answer.lower()
