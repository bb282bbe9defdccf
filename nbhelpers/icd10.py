"""What is a code of ICD-10-CM, which one does an answer give, and where does it stand in the classification?

A code is kept without its dot and in upper case (`E1165`), and written with it (`E11.65`): that is how codes compare.
The shape alone is judged here, a letter, a digit, a digit or letter, then up to four more: whether a code is in this
year's list is not known.
"""

from __future__ import annotations

import re
from collections.abc import Container

_SHAPE = re.compile(r"[A-Z][0-9][0-9A-Z](?:\.?[0-9A-Z]{1,4})?", re.ASCII)
# In an answer: no part of a longer word or number (A1Cs, HLA-B27.1, E11.9.2, E11.99999), in one case (not B12.The).
_REST, _NO_MORE = r"[0-9{letters}](?:\.?[0-9{letters}]{{1,4}})?", r"(?![A-Za-z0-9_])(?!\.[0-9])"
_CASES = "|".join(f"[{letters}][0-9]" + _REST.format(letters=letters) for letters in ("A-Z", "a-z"))
_WRITTEN = re.compile(rf"(?<![A-Za-z0-9_.])(?<![A-Za-z]-)(?:{_CASES}){_NO_MORE}", re.ASCII)
# What makes the three characters behind it a code: `code:`, `code for it is`, `answer:`, `ICD`, `ICD-10-CM code:`.
_SAID = re.compile(
    r"(?:\b(?:codes?\b|answer\b|icd)[^.;\n]{0,60}?(?::|=|\bis\b)|\bicd(?:-?10)?(?:-?cm)?(?:\s+codes?)?)[\s\"'`*(\[]*$",
    re.ASCII | re.IGNORECASE,
)
_SAID_WITHIN = 100  # characters before it
_AROUND = " \t\r\n\"'`*.,;:()[]<>"  # what may stand around an answer that is a code alone

CHAPTERS = (  # number, first and last category, title, in words of the official title
    ("I", "A00", "B99", "infectious and parasitic diseases"),
    ("II", "C00", "D49", "neoplasms"),
    ("III", "D50", "D89", "blood and immune mechanism"),
    ("IV", "E00", "E89", "endocrine, nutritional and metabolic"),
    ("V", "F01", "F99", "mental and behavioral"),
    ("VI", "G00", "G99", "nervous system"),
    ("VII", "H00", "H59", "eye and adnexa"),
    ("VIII", "H60", "H95", "ear and mastoid process"),
    ("IX", "I00", "I99", "circulatory system"),
    ("X", "J00", "J99", "respiratory system"),
    ("XI", "K00", "K95", "digestive system"),
    ("XII", "L00", "L99", "skin and subcutaneous tissue"),
    ("XIII", "M00", "M99", "musculoskeletal system"),
    ("XIV", "N00", "N99", "genitourinary system"),
    ("XV", "O00", "O9A", "pregnancy, childbirth and the puerperium"),
    ("XVI", "P00", "P96", "perinatal period"),
    ("XVII", "Q00", "Q99", "congenital malformations"),
    ("XVIII", "R00", "R99", "symptoms and abnormal findings"),
    ("XIX", "S00", "T88", "injury, poisoning and external causes"),
    ("XX", "V00", "Y99", "external causes of morbidity"),
    ("XXI", "Z00", "Z99", "health status and health services"),
    ("XXII", "U00", "U85", "special purposes"),
)


def is_code(text: object) -> bool:
    """Has a text the shape of a code, with or without the dot, in either case?

    >>> [is_code(text) for text in ("S82.891A", "e119", "F32.A", "C7A.1", "B12 level", "E11.", "A1C1234567")]
    [True, True, True, True, False, False, False]
    """
    return isinstance(text, str) and text.isascii() and _SHAPE.fullmatch(text.strip().upper()) is not None


def normal(code: str) -> str:
    """Upper case, no dot. ValueError for what is no code.

    >>> normal(" e11.65")
    'E1165'
    """
    if not is_code(code):
        raise ValueError(f"code must be a letter, a digit, a digit or letter, then up to four more, got {code!r}")
    return code.strip().upper().replace(".", "")


def dotted(code: str) -> str:
    """As it is written.

    >>> dotted("E1165"), dotted("i10")
    ('E11.65', 'I10')
    """
    code = normal(code)
    return f"{code[:3]}.{code[3:]}" if len(code) > 3 else code


def category(code: str) -> str:
    """The first three characters."""
    return normal(code)[:3]


def chapter(code: str) -> str | None:
    """The chapter's number, bounds and title; None outside all 22 (which is no chapter: it equals no other).

    >>> chapter("I48.91"), chapter("D49.2"), chapter("D50.9")[:12], chapter("H59.0")[:11], chapter("F00")
    ('IX I00-I99 circulatory system', 'II C00-D49 neoplasms', 'III D50-D89 ', 'VII H00-H59', None)
    """
    found = category(code)  # digits sort before letters, so O9A is the last of its letter and C7A stands after C79
    return next((f"{number} {a}-{z} {title}" for number, a, z, title in CHAPTERS if a <= found <= z), None)


def find(text: str, known: Container[str] = frozenset()) -> list[str]:
    """The codes that a written answer gives, without dots, in order.

    Three characters alone (I10, but also B12, A1C), or with a letter as the third and no dot (T2DM, H1N1), are a code
    only as the whole answer, after `code:`, `ICD` or `answer:`, or where `known` (codes without dot) holds them.

    >>> find("Her B12 level is low, so D51.9 or e11.65; the A1C of a T2DM is no code")
    ['D519', 'E1165']
    >>> find("B12 level"), find("I10."), find("The code is I10, I think"), find("I10 it is", known={"I10"})
    ([], ['I10'], ['I10'], ['I10'])
    """
    whole, found = text.strip(_AROUND), []
    for match in _WRITTEN.finditer(text):
        written, code = match[0], match[0].upper().replace(".", "")
        sure = "." in written or (len(code) > 3 and code[2].isdigit()) or written == whole or code in known
        if sure or _SAID.search(text[max(0, match.start() - _SAID_WITHIN) : match.start()]):
            found.append(code)
    return found


def extract(text: str, known: Container[str] = frozenset()) -> str | None:
    """The first code that an answer gives, without dot; None where it gives none: that is an answer of its own."""
    return next(iter(find(text, known)), None)
