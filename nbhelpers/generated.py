"""What text do the bundled models read, and how predictable is it at best?

Four kinds of English-like documents, all drawn from one small world (`generated_words`): stories in which things
change hands, facts with yes/no questions, arithmetic word problems, symptom dialogues. Most words of a document
repeat or follow from earlier ones, so a model has to look back to predict them.

The text is its own account. A `Teller` writes a document from left to right and adds up -log p of every choice that
it makes. Each choice is told at once in words that no other option would have given, so a document determines its
choices: there is exactly one way to tell it, its probability is the product over that way, and its -log is `nats`.
Divided by the number of tokens, the mean of `nats` is the loss per token that no model can beat on average.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

from nbhelpers import generated_words as words
from nbhelpers.registry import unknown

T = TypeVar("T")
MODEL_SEED = 2_000_001  # the bundled models were trained on documents(n, MODEL_SEED)
HELD_OUT_SEED = 2_000_002  # they were measured on documents(n, HELD_OUT_SEED); any other seed is new to them too


class Document(NamedTuple):
    """One document: its text, its kind (one of KINDS), and -log of its probability in nats."""

    text: str
    kind: str
    nats: float


class Teller:
    """Writes one document and keeps account of its own surprise.

    `draw` gives the only randomness: uniform floats in [0, 1), as `random.Random(seed).random` makes them
    (the one method that Python promises to keep the same from version to version).
    """

    def __init__(self, draw: Callable[[], float]) -> None:
        self._draw = draw
        self._parts: list[str] = []
        self.nats = 0.0

    @property
    def text(self) -> str:
        return "".join(self._parts)

    def say(self, text: str) -> None:
        self._parts.append(text)

    def pick(self, options: Sequence[T]) -> T:
        """One of the options, each equally likely; costs log(len(options)) nats."""
        self.nats += math.log(len(options))
        return options[self._choose([1 / len(options)] * len(options))]

    def flip(self, probability: float) -> bool:
        """True with this probability; costs -log of the probability of what came out."""
        yes = self._choose([probability, 1 - probability]) == 0
        self.nats -= math.log(probability if yes else 1 - probability)
        return yes

    def tell(self, options: Iterable[str], without: Iterable[str] = ()) -> str:
        """Pick one of the options that are not in `without`, say it, return it."""
        left_out = set(without)
        chosen = self.pick([option for option in options if option not in left_out])
        self.say(chosen)
        return chosen

    def _choose(self, probabilities: Sequence[float]) -> int:
        """Index drawn with these probabilities (they sum to 1)."""
        level, total = self._draw(), 0.0
        for index, probability in enumerate(probabilities):
            total += probability
            if level < total:
                return index
        return len(probabilities) - 1


# Stories ---------------------------------------------------------------------------------------------------------


class Cast(NamedTuple):
    """The state of a story: who is where (name -> place) and who has what (name -> things in the order received)."""

    place: dict[str, str]
    things: dict[str, list[str]]

    def names(self, without: Iterable[str] = ()) -> list[str]:
        left_out = set(without)
        return [name for name in self.place if name not in left_out]


def tell_story(t: Teller) -> None:
    """Three friends, each at a place with a thing; 2 to 6 events; at the end the whole state once more."""
    t.say(t.pick(("This is a story about ", "Once there were three friends called ", "One morning the sun woke up ")))
    names: list[str] = []
    for before in ("", ", ", " and "):
        t.say(before)
        names.append(t.tell(words.NAMES, without=names))
    t.say(".")
    cast = Cast({}, {})
    for name in names:
        _introduce(t, cast, name)
    events = 0
    while events < 2 or (events < 6 and t.flip(0.75)):
        t.pick((_go, _give, _use, _ask_where, _ask_who))(t, cast)
        events += 1
    t.say(t.pick((" In the end", " When the day was over")))
    for name in names:
        t.say(f" {name} was in the {cast.place[name]} and had {_listed(cast.things[name])}.")


def _introduce(t: Teller, cast: Cast, name: str) -> None:
    place_first = t.flip(0.5)
    if place_first:
        t.say(f" {name} was in the ")
        cast.place[name] = t.tell(words.PLACES)
        t.say(" with a ")
    else:
        t.say(f" {name} had a ")
    colour = t.tell(words.COLOURS)
    t.say(" ")
    taken = [thing.split()[1] for things in cast.things.values() for thing in things]
    cast.things[name] = [f"{colour} {t.tell(words.OBJECTS, without=taken)}"]
    if not place_first:
        t.say(" and was in the ")
        cast.place[name] = t.tell(words.PLACES)
    t.say(".")


def _listed(things: Sequence[str]) -> str:
    return " and ".join(f"the {thing}" for thing in things) or "nothing"


def _go(t: Teller, cast: Cast) -> None:
    """Somebody goes to a friend (half of the time) or to a place where none of the three is."""
    t.say(" Then ")
    name = t.tell(cast.names())
    here = cast.place[name]
    t.say(f" went from the {here} to the ")
    with_friends = sorted(set(cast.place.values()) - {here})
    if with_friends and t.flip(0.5):
        cast.place[name] = t.tell(with_friends)
    else:
        cast.place[name] = t.tell(words.PLACES, without=cast.place.values())
    friends = [other for other in cast.names([name]) if cast.place[other] == cast.place[name]]
    t.say(f". There {name} met {' and '.join(friends)}." if friends else f". There {name} was alone.")


def _give(t: Teller, cast: Cast) -> None:
    """Somebody who has a thing gives it to a friend, who thanks for it."""
    t.say(" Later ")
    name = t.tell([name for name in cast.names() if cast.things[name]])
    t.say(" gave the ")
    thing = t.tell(cast.things[name])
    t.say(" to ")
    friend = t.tell(cast.names([name]))
    t.say(f". {friend} thanked {name} for the {thing}.")
    cast.things[name].remove(thing)
    cast.things[friend].append(thing)


def _use(t: Teller, cast: Cast) -> None:
    """Somebody who has a thing does something with it, and where that was."""
    t.say(" For a while ")
    name = t.tell([name for name in cast.names() if cast.things[name]])
    t.say(t.pick((" looked at", " played with", " cleaned", " hid")) + " the ")
    t.tell(cast.things[name])
    t.say(f" in the {cast.place[name]}.")


def _ask_where(t: Teller, cast: Cast) -> None:
    """One asks where another is, and the third knows."""
    t.say(' "Where is ')
    wanted = t.tell(cast.names())
    t.say('?" asked ')
    asking = t.tell(cast.names([wanted]))
    (third,) = cast.names([wanted, asking])
    t.say(f'. "{wanted} is in the {cast.place[wanted]}," said {third}.')


def _ask_who(t: Teller, cast: Cast) -> None:
    """Somebody asks who has a thing, and its owner answers."""
    t.say(' "Who has the ')
    thing = t.tell([thing for things in cast.things.values() for thing in things])
    (owner,) = (name for name, things in cast.things.items() if thing in things)
    t.say('?" asked ')
    t.tell(cast.names([owner]))
    t.say(f'. "I have the {thing}," said {owner}.')


# Facts and questions ---------------------------------------------------------------------------------------------


def tell_facts(t: Teller) -> None:
    """Three or four people with two facts each, then two to five questions: yes, no, or who."""
    t.say("Facts:")
    facts: dict[str, dict[words.Relation, str]] = {}
    relations: list[words.Relation] = []
    while len(facts) < 3 or (len(facts) < 4 and t.flip(0.5)):
        t.say(" ")
        name = t.tell(words.NAMES, without=facts)
        mine: dict[words.Relation, str] = {}
        for joint, which in ((" ", 0), (" and ", 1)):
            if len(facts) == 0:
                relations.append(t.pick([relation for relation in words.RELATIONS if relation not in relations]))
            relation = relations[which]
            before, after = relation.stated.split("{}")
            t.say(joint + before)
            mine[relation] = t.tell(relation.values, without=[other[relation] for other in facts.values()])
            t.say(after)
        t.say(".")
        facts[name] = mine
    asked = [(name, relation) for name in facts for relation in relations]
    count = 0
    while count < 2 or (count < 5 and t.flip(0.75)):
        t.say("\nQuestion: ")
        if t.flip(0.3):
            _ask_owner(t, facts, t.pick(relations))
        else:
            _ask_yes_or_no(t, facts, relations, asked)
        count += 1
    t.say("\nEnd.")


def _ask_owner(t: Teller, facts: dict, relation: words.Relation) -> None:
    before, after = relation.who.split("{}")
    t.say(before)
    value = t.tell([mine[relation] for mine in facts.values()])
    (owner,) = (name for name, mine in facts.items() if mine[relation] == value)
    t.say(f"{after}?\nAnswer: {owner} {relation.stated.format(value)}.")


def _ask_yes_or_no(t: Teller, facts: dict, relations: Sequence[words.Relation], asked: list) -> None:
    """Asks for a pair of person and relation that was not asked yet; a wrong value is another person's."""
    t.say("Does ")
    name = t.pick([name for name in facts if any(pair[0] == name for pair in asked)])
    t.say(name)
    relation = t.pick([relation for relation in relations if (name, relation) in asked])
    asked.remove((name, relation))
    before, after = relation.asked.replace("{}", name, 1).removeprefix(f"Does {name}").split("{}")
    t.say(before)
    truth = facts[name][relation]
    if t.flip(0.5):
        t.say(truth)
        answer = "yes"
    else:
        t.tell([mine[relation] for mine in facts.values()], without=[truth])
        answer = "no"
    t.say(f"{after}?\nAnswer: {answer}, {name} {relation.stated.format(truth)}.")


# Word problems ---------------------------------------------------------------------------------------------------


def tell_problem(t: Teller) -> None:
    """Somebody has goods and one to three things happen to them; then the sums one by one and the answer."""
    t.say("Problem: ")
    name = t.tell(words.NAMES)
    steps: list[str] = []
    if t.flip(0.3):
        t.say(" has ")
        boxes = int(t.tell([str(number) for number in range(2, 7)]))
        t.say(" boxes with ")
        each = int(t.tell([str(number) for number in range(2, 7)]))
        t.say(" ")
        goods = t.tell(words.FOODS)
        t.say(" in each box.")
        total = boxes * each
        steps.append(f"{boxes} x {each} = {total}.")
    else:
        t.say(" has ")
        total = int(t.tell([str(number) for number in range(2, 21)]))
        t.say(" ")
        goods = t.tell(words.FOODS)
        t.say(".")
    count = 0
    while count < 1 or (count < 3 and t.flip(0.5)):
        more = t.flip(0.5) if total > 2 else True
        total = (_gain if more else _lose)(t, name, goods, total, steps)
        count += 1
    t.say(f" How many {goods} does {name} have now?\nSolution: {' '.join(steps)} {name} has {total} {goods}.")
    t.say(f"\nAnswer: {total}")


def _gain(t: Teller, name: str, goods: str, total: int, steps: list[str]) -> int:
    kind = t.pick((0, 1, 2))
    if kind == 0:
        t.say(" Then ")
        t.tell(words.NAMES, without=[name])
        t.say(f" gives {name} ")
    else:
        t.say(f" Then {name} {('finds', 'buys')[kind - 1]} ")
    number = int(t.tell([str(number) for number in range(1, 11)]))
    t.say(f" more {goods}.")
    steps.append(f"{total} + {number} = {total + number}.")
    return total + number


def _lose(t: Teller, name: str, goods: str, total: int, steps: list[str]) -> int:
    kind = t.pick((0, 1, 2))
    t.say(f" Then {name} {('eats', 'loses', 'gives')[kind]} ")
    number = int(t.tell([str(number) for number in range(1, min(10, total - 1) + 1)]))
    t.say(f" of the {goods}")
    if kind == 2:
        t.say(" to ")
        t.tell(words.NAMES, without=[name])
    t.say(".")
    steps.append(f"{total} - {number} = {total - number}.")
    return total - number


# Symptom dialogues -----------------------------------------------------------------------------------------------


def tell_dialogue(t: Teller) -> None:
    """A patient tells symptoms, the doctor asks about them and sums up. Symptoms only: never what it might be."""
    t.say(t.pick(("Doctor: Good morning, ", "Doctor: Hello, ", "Doctor: Please sit down, ")))
    name = t.tell(words.NAMES)
    t.say(t.pick((". What is wrong?", ". How can I help you?", ". What brings you here?")) + "\nPatient: I have ")
    first = t.tell(words.SYMPTOMS)
    t.say(" and ")
    second = t.tell(words.SYMPTOMS, without=[first])
    t.say(".")
    first_since = _ask_since(t, first)
    second_since = _ask_since(t, second)
    had, denied = [first, second], []
    while not denied and len(had) < 4 and (len(had) < 3 or t.flip(0.5)):
        _ask_also(t, had, denied)
    t.say("\nDoctor: When is it worse?\nPatient: The ")
    worse = _bare(t.tell([_bare(symptom) for symptom in had]))
    t.say(" is worse ")
    moment = t.tell(words.MOMENTS)
    t.say(f".\nDoctor: So, {name}, you have {first} {first_since} and {second} {second_since}.")
    for symptom in had[2:]:
        t.say(f" You also have {symptom}.")
    for symptom in denied:
        t.say(f" You have no {_bare(symptom)}.")
    t.say(f" The {worse} is worse {moment.replace(' I ', ' you ')}.\nPatient: ")
    t.say(t.pick(("Yes, that is right.", "Yes, thank you, doctor.")))


def _bare(symptom: str) -> str:
    return symptom.removeprefix("a ")


def _ask_since(t: Teller, symptom: str) -> str:
    if t.flip(0.5):
        t.say(f"\nDoctor: How long have you had the {_bare(symptom)}?\nPatient: For ")
        number = t.tell([str(number) for number in range(2, 11)])
        t.say(" days.")
        return f"for {number} days"
    t.say(f"\nDoctor: When did the {_bare(symptom)} start?\nPatient: On ")
    day = t.tell(words.WEEKDAYS)
    t.say(".")
    return f"since {day}"


def _ask_also(t: Teller, had: list[str], denied: list[str]) -> None:
    t.say("\nDoctor: Do you also have ")
    symptom = t.tell(words.SYMPTOMS, without=had)
    if t.flip(0.5):
        t.say(f"?\nPatient: Yes, I also have {symptom}.")
        had.append(symptom)
    else:
        t.say(f"?\nPatient: No, I have no {_bare(symptom)}.")
        denied.append(symptom)


# Documents -------------------------------------------------------------------------------------------------------

_TELL = {"story": tell_story, "facts": tell_facts, "problem": tell_problem, "dialogue": tell_dialogue}
KINDS = tuple(_TELL)


def tell_document(t: Teller, kinds: Sequence[str] = KINDS) -> str:
    """Pick a kind, tell a document of it, return the kind."""
    kind = t.pick(kinds)
    _TELL[kind](t)
    return kind


def documents_with_nats(n: int, seed: int, kinds: Sequence[str] = KINDS) -> list[Document]:
    """`n` documents from a seed, each with its -log probability; fewer documents are a prefix of more.

    The choice of the kind is part of `nats` (log(len(kinds))). Raises ValueError for negative n or seed and for no
    kind or one twice, LookupError for an unknown kind.
    """
    if n < 0 or seed < 0:
        raise ValueError(f"n and seed must be at least 0, got n={n}, seed={seed}")
    for kind in kinds:
        if kind not in _TELL:
            raise LookupError(unknown("kind of document", kind, KINDS))
    if not kinds or len(set(kinds)) < len(kinds):
        raise ValueError(f"kinds must name at least one kind and none twice, got {tuple(kinds)}")
    draw = random.Random(seed).random
    told = []
    for _ in range(n):
        teller = Teller(draw)
        kind = tell_document(teller, tuple(kinds))
        told.append(Document(teller.text, kind, teller.nats))
    return told


def documents(n: int, seed: int, kinds: Sequence[str] = KINDS) -> list[str]:
    """The texts of `documents_with_nats`.

    >>> documents(1, seed=0) == documents(2, seed=0)[:1]
    True
    """
    return [document.text for document in documents_with_nats(n, seed, kinds)]
