"""Is a code told from a word, compared without its dot, found in an answer, and put into the official chapter?"""

from __future__ import annotations

import csv
import itertools

import pytest

from nbhelpers import icd10


@pytest.mark.parametrize("text", ["S82.891A", "T36.0X1A", "F32.A", "C7A.1", "Z3A.20", "O9A.111", "E11.9", "i10"])
def test_real_codes_are_codes_with_dot_and_without_and_in_either_case(text):
    assert icd10.is_code(text) and icd10.is_code(text.replace(".", "")) and icd10.is_code(f" {text.lower()} ")
    assert icd10.normal(text.lower()) == text.upper().replace(".", "") == icd10.normal(icd10.dotted(text))


@pytest.mark.parametrize(
    "text", ["", "B1", "11.9", "EE1", "E11.", "E11.99999", "E1.19", "E11..9", "B12 level", "E11.9 I10", "E１1", None, 7]
)
def test_what_has_another_shape_is_no_code(text):
    assert not icd10.is_code(text)


def test_a_code_is_written_with_its_dot_after_the_third_character():
    assert [icd10.dotted(code) for code in ("E119", "E11.9", "I10", "s82891a")] == ["E11.9", "E11.9", "I10", "S82.891A"]
    assert icd10.category("e11.65") == "E11"


@pytest.mark.parametrize("function", [icd10.normal, icd10.dotted, icd10.category, icd10.chapter])
def test_what_is_no_code_is_refused(function):
    with pytest.raises(ValueError, match="code must be a letter, a digit, .*, got 'GENHX'"):
        function("GENHX")


def test_every_real_code_is_accepted_and_found_alone_and_lies_in_a_chapter(data_dir):
    with open(data_dir / "icd10cm_2018_categories.csv", newline="", encoding="utf-8") as file:
        codes = [row["code"] for row in csv.DictReader(file)]
    assert len(codes) == 24_628
    assert [code for code in codes if not icd10.is_code(code)] == []
    assert [code for code in codes if icd10.normal(icd10.dotted(code)) != code] == []
    assert [code for code in codes if icd10.extract(icd10.dotted(code)) != code] == []
    # in a sentence: all but the bare three characters
    said = [code for code in codes if icd10.find(f"It is {icd10.dotted(code)}, I think.") != [code]]
    assert {len(code) for code in said} == {3}
    assert [code for code in codes if icd10.chapter(code) is None] == []
    assert len({icd10.chapter(code) for code in codes}) == 21  # XXII is empty in 2018


# ------------------------------------------------------------------------------------------------ in an answer


@pytest.mark.parametrize(
    "text, codes",
    [
        ("E11.9", ["E119"]),
        ("It is E11.65, not E11.9.", ["E1165", "E119"]),
        ("e11.9\nDoctor: and now?", ["E119"]),
        ("coded as S82891A (initial encounter)", ["S82891A"]),
        ("**J45.901**", ["J45901"]),
        ("E11.9-E11.65", ["E119", "E1165"]),
        ("诊断E11.9。", ["E119"]),
    ],
)
def test_codes_are_found_in_the_order_in_which_they_are_written(text, codes):
    assert icd10.find(text) == codes and icd10.extract(text) == codes[0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B12 level",
        "Her vitamin B12 is low and her A1C is 7.5",
        "the T12 vertebra, the L4 disc",
        "H1N1 flu in a T2DM patient",  # the third is a letter and no dot says that it is a code
        "HLA-B27.1 was found",
        "version E11.9.2",
        "E11.99999",
        "I take B12.The doctor knows",
        "A1B2C3D4E5",
        "No code fits.",
        "the code B12 level",
        "Answer the patient. B12 is low",
    ],
)
def test_words_that_look_like_codes_are_none(text):
    assert icd10.find(text) == [] and icd10.extract(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "I10",
        " i10.\n",
        "**I10**",
        "`I10`",
        "code: I10",
        "Answer: I10 (hypertension)",
        "**Answer:** I10",
        "ICD I10",
        "ICD-10: I10",
        "ICD10CM: I10",
        "ICD-10-CM code I10 fits",
        "The ICD-10 code for this is I10, a high pressure",
        "The code is **I10**",
    ],
)
def test_three_characters_are_a_code_as_the_whole_answer_and_where_the_answer_calls_them_one(text):
    assert icd10.find(text) == ["I10"]


def test_three_characters_are_a_code_where_the_labels_hold_them():
    assert icd10.find("I10 with B12 level", known={"I10", "E119"}) == ["I10"]
    assert icd10.extract("well, H1N1", known=frozenset({"H1N1"})) == "H1N1"


# ------------------------------------------------------------------------------------------------ chapters


@pytest.mark.parametrize(
    "code, number",
    [
        ("A00", "I"),
        ("B99.9", "I"),
        ("C00.0", "II"),
        ("C7A.1", "II"),
        ("D49.9", "II"),
        ("D50.9", "III"),
        ("D89.9", "III"),
        ("E89.8", "IV"),
        ("F01.50", "V"),
        ("G99.8", "VI"),
        ("H59.89", "VII"),
        ("H60.00", "VIII"),
        ("H95.89", "VIII"),
        ("I10", "IX"),
        ("J45.20", "X"),
        ("K95.89", "XI"),
        ("L99", "XII"),
        ("M1A.00X0", "XIII"),
        ("N99.9", "XIV"),
        ("O9A.111", "XV"),
        ("P96.9", "XVI"),
        ("Q99.9", "XVII"),
        ("R99", "XVIII"),
        ("S00.00XA", "XIX"),
        ("T88.9XXA", "XIX"),
        ("V00.01XA", "XX"),
        ("Y99.9", "XX"),
        ("Z3A.20", "XXI"),
        ("U07.1", "XXII"),
        ("U85", "XXII"),
    ],
)
def test_a_code_lies_in_its_official_chapter(code, number):
    assert icd10.chapter(code).split()[0] == number


@pytest.mark.parametrize("code", ["D90", "E90", "F00", "H96", "K96", "P97", "T89", "U86"])
def test_a_code_between_the_chapters_lies_in_none(code):
    assert icd10.chapter(code) is None


def test_a_chapter_is_called_by_number_bounds_and_title():
    assert icd10.chapter("I10") == "IX I00-I99 circulatory system"
    bounds = [(first, last) for _, first, last, _ in icd10.CHAPTERS]
    assert len(bounds) == 22 and all(first < last for first, last in bounds)
    ordered = sorted(bounds)  # no two overlap
    assert all(before[1] < after[0] for before, after in itertools.pairwise(ordered))
