"""Is the bundled instruction text true to its stories, and new to the bundled models?"""

from __future__ import annotations

import pytest

from nbhelpers import data, facts, instructions


@pytest.fixture(scope="module")
def corpus() -> data.Corpus:
    return instructions.load_corpus(instructions.BUNDLED)


def test_a_story_becomes_a_question_and_its_ending_the_answer():
    told = "Leo met Rosa. In the end Leo was in the barn and had the bell and the cup."
    told += " Rosa was in the inn and had nothing."
    found = instructions.as_instruction(told)
    assert found.prompt == "Leo met Rosa.\nQuestion: Who is where, and who has what?\nAnswer:"
    assert found.text == " Leo is in the barn with the bell and the cup. Rosa is in the inn with nothing."


def test_a_text_without_an_ending_is_left_out():
    assert instructions.as_instruction("Problem: Leo has 3 cups. How many cups does Leo have?") is None


def test_the_answer_does_not_stand_in_the_prompt(corpus):
    for document in corpus.train:
        assert document.prompt.endswith(instructions.INSTRUCTION) and document.text not in document.prompt
        assert "and had the" not in document.prompt, "the ending that tells the answer is gone"


def test_the_parts_are_disjoint_generated_and_the_same_every_time(corpus):
    assert facts.texts_are_disjoint(corpus).ok and corpus.generated and len(corpus.test) > 30
    assert instructions.load_corpus(instructions.BUNDLED).sha256 == corpus.sha256


def test_any_other_source_is_that_of_data(monkeypatch):
    monkeypatch.setattr(data, "BUNDLED_DOCUMENTS", 60)
    assert instructions.load_corpus("bundled") == data.load_corpus("bundled")
    with pytest.raises(LookupError, match="'nothing.txt' does not exist"):
        instructions.load_corpus("nothing.txt")
