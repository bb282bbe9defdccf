"""What can the bundled models be asked without the hub? Yes/no questions, story endings, word problems, texts.

Rows have the official schemas of BoolQ, HellaSwag and GSM8K, so that the same code reads them; people and things are
those of `generated_words`. Most rows are told by the words that stand in them, the rest only by who did what: a tuned
bundled model gets 0.75 to 0.97 of them right, so that there is room on both sides. They say nothing about the real
tasks.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from nbhelpers import generated
from nbhelpers import generated_words as words

T = TypeVar("T")
ROWS = {"evaluation": 500, "train": 3000}  # told in this order, no row twice: so the parts share none
SEED = 3_000_001  # away from the seeds of the bundled models' training and held-out text
AGREEING, ONE_AGREES = 0.5, 0.15  # shares of the questions in whose passage both others, one other do as the one asked
STRANGE = 0.92  # share of the endings whose wrong things nobody had
LARGE = SECOND = 0.1  # share of the problems that begin with 10 or more; that have a second step
CHANGE = 4  # goods that are bought or eaten at a time, at most


class Dice:
    """Choices from uniform floats, the one method of `random.Random` that stays the same from version to version."""

    def __init__(self, seed: int) -> None:
        self._draw = random.Random(seed).random

    def flip(self, probability: float) -> bool:
        return self._draw() < probability

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._draw() * len(options))]

    def some(self, options: Iterable[T], count: int) -> list[T]:
        """So many different options, in any order."""
        left = list(options)
        return [left.pop(int(self._draw() * len(left))) for _ in range(count)]


def rows(make: Callable[[Dice, int], dict[str, Any]], split: str) -> list[dict[str, Any]]:
    """Rows of one part. make: one of the functions below, given the row's number, which decides its label.

    >>> len(rows(yes_no_question, "evaluation"))
    500
    """
    dice, parts, seen = Dice(SEED), {}, set()
    for part, count in ROWS.items():
        parts[part] = []
        while len(parts[part]) < count:
            row = make(dice, len(parts[part]))
            told = tuple(value for name, value in row.items() if name in ("passage", "question", "ctx_a", "text"))
            if told not in seen:
                seen.add(told)
                parts[part].append(row)
        if part == split:
            break
    return parts[split]


def text(dice: Dice, number: int) -> dict[str, Any]:
    """A document of the kind that the bundled models were trained on."""
    teller = generated.Teller(dice._draw)
    generated.tell_document(teller, generated.KINDS)
    return {"text": teller.text}


def yes_no_question(dice: Dice, number: int) -> dict[str, Any]:
    """Three people who do or do not; does one of them? Every other answer is yes.

    In most rows either everybody is alike or the two who are not asked about are unlike the third: how many do not
    tells the answer then, though not the more the surer. In the others only who did what tells it.
    """
    yes = number % 2 == 1
    relation, names = dice.pick(words.RELATIONS), dice.some(words.NAMES, 3)
    values, wanted = dice.some(relation.values, 3), dice.pick(range(3))
    others = [at for at in range(3) if at != wanted]
    if dice.flip(AGREEING):
        agreeing = others
    else:
        agreeing = [dice.pick(others)] if dice.flip(ONE_AGREES / (1 - AGREEING)) else []
    sentences = []
    for at, (name, value) in enumerate(zip(names, values, strict=True)):
        does = yes if at == wanted or at in agreeing else not yes
        verb = relation.stated if does else relation.asked.replace("Does {} ", "does not ")
        sentences.append(f"{name} {verb.format(value)}.")
    question = relation.asked.format(names[wanted], values[wanted])
    question = question[0].lower() + question[1:]
    return {"idx": number, "passage": " ".join(sentences), "question": question, "label": int(yes)}


def story_ending(dice: Dice, number: int) -> dict[str, Any]:
    """Three people with a thing each; which one does one of them look for? Each place is right once in four rows."""
    names, things = dice.some(words.NAMES, 3), dice.some(words.OBJECTS, 6)
    wanted, right = dice.pick(range(3)), number % 4
    strange = dice.flip(STRANGE)
    wrong = things[3:] if strange else [thing for thing in things[:3] if thing != things[wanted]] + things[3:4]
    offered = dice.some(wrong, 3)
    offered.insert(right, things[wanted])
    told = " ".join(f"{name} had a {thing}." for name, thing in zip(names, things[:3], strict=True))
    return {
        "ind": number,
        "activity_label": "Morning",
        "ctx_a": told,
        "ctx_b": "later",
        "ctx": f"{told} later",
        "endings": [f"{names[wanted]} looked for the {thing}." for thing in offered],
        "label": str(right),
    }


def word_problem(dice: Dice, number: int) -> dict[str, Any]:
    """Somebody has goods, buys or eats some, at times twice; the steps, then the number that is left."""
    name, goods = dice.pick(words.NAMES), dice.pick(words.FOODS)
    total = dice.pick(range(10, 21) if dice.flip(LARGE) else range(2, 10))
    question, steps = f"{name} has {total} {goods}.", []
    for _ in range(2 if dice.flip(SECOND) else 1):
        if total < 3 or dice.flip(0.5):
            change = dice.pick(range(1, CHANGE + 1))
            question += f" Then {name} buys {change} more {goods}."
            steps.append(f"{total} + {change} = {total + change}.")
            total += change
        else:
            change = dice.pick(range(1, min(CHANGE + 1, total)))
            question += f" Then {name} eats {change} of the {goods}."
            steps.append(f"{total} - {change} = {total - change}.")
            total -= change
    return {
        "question": f"{question} How many {goods} does {name} have now?",
        "answer": f"{' '.join(steps)}\n#### {total}",
    }
