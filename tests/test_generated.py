"""Does the bundled text say by itself how predictable it is, and is it the text we say it is?"""

import math
import random
import re
import subprocess
import sys

import pytest

from nbhelpers import generated, generated_words
from nbhelpers.generated import KINDS, Teller, documents, documents_with_nats


class Replayed(Teller):
    """A teller whose choices are given beforehand; it stops at the first that is not."""

    def __init__(self, choices):
        super().__init__(draw=None)
        self.choices, self.made, self.options = list(choices), 0, 0

    def _choose(self, probabilities):
        if self.made == len(self.choices):
            self.options = len(probabilities)
            raise StopIteration
        self.made += 1
        return self.choices[self.made - 1]


def tellings(text, tell):
    """Every sequence of choices with which `tell` writes exactly this text, with its nats: found by trying all."""
    found, open_ends = [], [[]]
    while open_ends:
        choices = open_ends.pop()
        teller = Replayed(choices)
        try:
            tell(teller)
        except StopIteration:
            if text.startswith(teller.text):
                open_ends.extend([*choices, option] for option in range(teller.options))
        else:
            if teller.text == text:
                found.append((choices, teller.nats))
    return found


def coin_story(teller):
    """A grammar for the pencil: one of four names, then "ran" with 1/4 or "slept" with 3/4."""
    teller.say("The ")
    teller.tell(("cat", "dog", "cow", "hen"))
    teller.say(" ran." if teller.flip(0.25) else " slept.")


def test_nats_of_a_grammar_are_what_a_pencil_gives():
    texts = {}
    for seed in range(200):
        teller = Teller(random.Random(seed).random)
        coin_story(teller)
        texts[teller.text] = teller.nats
    assert texts["The cat ran."] == pytest.approx(math.log(16))  # 1/4 * 1/4
    assert texts["The hen slept."] == pytest.approx(math.log(16 / 3))  # 1/4 * 3/4
    assert len(texts) == 8
    assert sum(math.exp(-nats) for nats in texts.values()) == pytest.approx(1)


def test_choices_come_as_often_as_their_nats_say():
    draw, count = random.Random(5).random, 0
    for _ in range(4000):
        teller = Teller(draw)
        coin_story(teller)
        count += teller.text == "The dog slept."
    assert count / 4000 == pytest.approx(3 / 16, abs=0.03)  # five standard deviations are 0.031


def test_two_ways_to_one_text_are_both_found():
    def either(teller):
        teller.say(teller.pick(("a", "b", "a")))

    assert [choices for choices, _ in sorted(tellings("a", either))] == [[0], [2]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_can_be_told_in_one_way_alone_and_that_way_costs_its_nats(kind):
    for document in documents_with_nats(4, seed=77, kinds=[kind]):
        ways = tellings(document.text, generated.tell_document)
        assert len(ways) == 1
        asked_alone = document.nats + math.log(len(KINDS))  # there the choice of the kind was free
        assert ways[0][1] == pytest.approx(asked_alone)


def test_the_kind_costs_its_share():
    alone = documents_with_nats(1, seed=3, kinds=["problem"])[0]
    assert alone.nats == pytest.approx(tellings(alone.text, generated.tell_problem)[0][1])


def test_same_seed_same_text_and_fewer_documents_are_a_prefix():
    assert documents(30, seed=4)[:10] == documents(10, seed=4)
    assert documents(10, seed=4) != documents(10, seed=5)


def test_the_global_generator_is_neither_read_nor_moved():
    random.seed(1)
    before = random.getstate()
    first = documents(5, seed=4)
    assert random.getstate() == before
    random.seed(2)
    assert documents(5, seed=4) == first


def test_training_and_held_out_text_share_practically_no_document():
    trained = set(documents(8_000, generated.MODEL_SEED))
    held_out = documents(800, generated.HELD_OUT_SEED)
    assert sum(text in trained for text in held_out) <= 2  # short word problems alone can meet
    assert len(trained) >= 7_980


def test_no_word_stands_in_two_lists_or_twice_in_one():
    lists = {name: words for name, words in vars(generated_words).items() if name.isupper() and name != "RELATIONS"}
    words = [word for words in lists.values() for word in words]
    assert len(words) == len(set(words))
    assert len(lists["NAMES"]) >= 30
    assert len(lists["OBJECTS"]) >= 40
    assert len(lists["PLACES"]) >= 15
    assert len(lists["SYMPTOMS"]) >= 25


def test_text_is_plain_ascii_without_empty_lines():
    for text in documents(400, seed=6):
        assert text.isascii()
        assert text == text.strip()
        assert "\n\n" not in text
        assert "  " not in text


def test_dialogues_never_name_a_diagnosis_or_a_code():
    text = "\n".join(documents(600, seed=8))
    assert not re.search(r"icd|diagnos|disease|\bcode", text, re.IGNORECASE)
    assert not re.search(r"\b[A-Z]\d\w(\.\w+)?\b", text)


def test_every_sum_is_right_and_the_answer_is_its_last_result():
    for text in documents(300, seed=9, kinds=["problem"]):
        sums = re.findall(r"(\d+) ([x+-]) (\d+) = (\d+)\.", text)
        results = [{"x": int(a) * int(b), "+": int(a) + int(b), "-": int(a) - int(b)}[op] for a, op, b, _ in sums]
        assert results == [int(result) for *_, result in sums]
        assert text.endswith(f"Answer: {results[-1]}")
        assert results[-1] > 0


def test_yes_and_no_are_true_of_the_facts_and_about_equally_frequent():
    answers = {"yes": 0, "no": 0}
    for text in documents(500, seed=10, kinds=["facts"]):
        facts = text.splitlines()[0]
        for name, verb, rest, answer in re.findall(r"Question: Does (\w+) (\w+) (.+)\?\nAnswer: (yes|no),", text):
            (sentence,) = re.findall(rf"{name} [^.]*\.", facts)
            stated = re.search(rf"\b{'has' if verb == 'have' else verb + 's'} {rest}(?: and|\.)", sentence)
            assert (stated is not None) == (answer == "yes"), text
            answers[answer] += 1
    assert answers["yes"] / sum(answers.values()) == pytest.approx(0.5, abs=0.06)  # 5 deviations at 1,200 questions


def test_the_end_of_a_story_says_where_things_went():
    """An independent reading of the events: who went where, who was given what."""
    for text in documents(300, seed=11, kinds=["story"]):
        body, end = re.split(r" In the end| When the day was over", text)
        place, things = {}, {}
        for sentence in re.split(r"(?<=\.) ", body):
            if found := re.fullmatch(r"(\w+) was in the (\w+) with a (\w+ \w+)\.", sentence):
                place[found[1]], things[found[1]] = found[2], [found[3]]
            elif found := re.fullmatch(r"(\w+) had a (\w+ \w+) and was in the (\w+)\.", sentence):
                place[found[1]], things[found[1]] = found[3], [found[2]]
            elif found := re.fullmatch(r"Then (\w+) went from the (\w+) to the (\w+)\.", sentence):
                assert place[found[1]] == found[2]
                place[found[1]] = found[3]
            elif found := re.fullmatch(r"Later (\w+) gave the (\w+ \w+) to (\w+)\.", sentence):
                things[found[1]].remove(found[2])
                things[found[3]].append(found[2])
        for name, where in place.items():
            had = " and ".join(f"the {thing}" for thing in things[name]) or "nothing"
            assert f" {name} was in the {where} and had {had}." in end


def test_the_doctor_repeats_what_the_patient_said():
    for text in documents(200, seed=12, kinds=["dialogue"]):
        first, second = re.search(r"Patient: I have (.+) and (.+)\.", text).groups()
        summary = text[text.rindex("Doctor: So") :]
        assert f"you have {first} " in summary
        assert f"and {second} " in summary


def test_nonsense_is_refused_by_name():
    with pytest.raises(ValueError, match="got n=-1, seed=0"):
        documents(-1, seed=0)
    with pytest.raises(ValueError, match="n=1, seed=-1"):  # random.Random(-1) is random.Random(1)
        documents(1, seed=-1)
    with pytest.raises(LookupError, match="unknown kind of document 'storys'. Did you mean 'story'"):
        documents(1, seed=0, kinds=["storys"])
    with pytest.raises(ValueError, match="at least one kind and none twice"):
        documents(1, seed=0, kinds=[])
    with pytest.raises(ValueError, match="none twice, got"):
        documents(1, seed=0, kinds=["story", "story"])


def test_the_generator_needs_the_standard_library_alone():
    code = (
        "import sys; before = set(sys.modules); import nbhelpers.generated; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['nbhelpers']"
