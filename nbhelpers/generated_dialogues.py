"""What can a model be asked to code without the hub? Short generated talks of doctor and patient, a code for each.

The codes and titles are real codes of ICD-10-CM, the patients are not: what stands here is no medicine. A talk holds
something that the patient has and that belongs to one code alone, besides what several codes have in common; what a
relative has, what was long ago and what is denied are told in the same words and count for nothing. So a reader can
code all but the few talks (`UNCLEAR`) that hold only what codes have in common, and who counts words is often misled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from nbhelpers.generated_tasks import Dice
from nbhelpers.generated_words import JOBS, NAMES, WEEKDAYS

SEED = 4_000_001  # away from the seeds of the other generated text
UNCLEAR = 0.05  # share of the talks in which nothing tells the code from another one that has the same in common
LATE = 0.5  # share of the clear talks that begin with what codes have in common; the doctor asks for what tells them
TWICE = 0.4  # share of the clear talks in which two things tell the code
DENIED = 0.4  # share of the clear talks in which the patient denies what tells another code
MISLEADING = 0.3  # share of the talks in which somebody else has, or the patient once had, what tells another code

FILLED = 3  # questions that tell nothing fill a talk up to so many turns; no talk gets longer to mislead


class Disease(NamedTuple):
    """A code, its title, the number of its talks; what it has in common with others, and what is its own."""

    code: str
    title: str
    rows: int
    common: tuple[str, ...]
    own: tuple[str, ...]


DISEASES = (
    Disease("B02.9", "Zoster without complications", 18, ("a rash",), ("blisters in a band", "burning on one side")),
    Disease("D50.9", "Iron deficiency anemia, unspecified", 22, ("no strength",), ("low iron", "very pale skin")),
    Disease("E03.9", "Hypothyroidism, unspecified", 20, ("no strength",), ("cold hands", "a slow thyroid")),
    Disease(
        "E10.9",
        "Type 1 diabetes mellitus without complications",
        5,
        ("a great thirst",),
        ("insulin since childhood", "sugar since childhood"),
    ),
    Disease(
        "E11.65",
        "Type 2 diabetes mellitus with hyperglycemia",
        24,
        ("a great thirst", "pills for sugar"),
        ("sugar above three hundred", "sugar that is too high"),
    ),
    Disease(
        "E11.42",
        "Type 2 diabetes mellitus with diabetic polyneuropathy",
        22,
        ("a great thirst", "pills for sugar"),
        ("numb feet", "burning feet"),
    ),
    Disease(
        "E11.9",
        "Type 2 diabetes mellitus without complications",
        40,
        ("a great thirst", "pills for sugar"),
        ("sugar that is good now", "a good sugar test"),
    ),
    Disease(
        "F32.A", "Depression, unspecified", 28, ("poor sleep", "no strength"), ("a low mood", "no joy in anything")
    ),
    Disease(
        "F41.0",
        "Panic disorder [episodic paroxysmal anxiety]",
        15,
        ("a racing heart",),
        ("sudden panic", "attacks of fear"),
    ),
    Disease("F41.1", "Generalized anxiety disorder", 26, ("poor sleep",), ("worries all day", "fear of every day")),
    Disease(
        "G43.109",
        "Migraine with aura, not intractable, without status migrainosus",
        18,
        ("a headache",),
        ("flashes of light", "zigzag lines in the eyes"),
    ),
    Disease(
        "G44.209",
        "Tension-type headache, unspecified, not intractable",
        24,
        ("a headache",),
        ("a tight band around the head", "a pressing head"),
    ),
    Disease(
        "G47.00",
        "Insomnia, unspecified",
        16,
        ("poor sleep", "no strength"),
        ("hours awake in bed", "nights without sleep"),
    ),
    Disease(
        "H66.91",
        "Otitis media, unspecified, right ear",
        30,
        ("a fever", "an ear ache"),
        ("pain in the right ear", "a blocked right ear"),
    ),
    Disease(
        "H66.92",
        "Otitis media, unspecified, left ear",
        26,
        ("a fever", "an ear ache"),
        ("pain in the left ear", "a blocked left ear"),
    ),
    Disease(
        "I10",
        "Essential (primary) hypertension",
        40,
        ("a headache", "dizzy spells"),
        ("high blood pressure", "too much pressure"),
    ),
    Disease(
        "I48.91",
        "Unspecified atrial fibrillation",
        20,
        ("a racing heart", "dizzy spells"),
        ("an uneven pulse", "a heart that skips"),
    ),
    Disease("J02.9", "Acute pharyngitis, unspecified", 28, ("a fever",), ("a sore throat", "a red throat")),
    Disease(
        "J18.9",
        "Pneumonia, unspecified organism",
        22,
        ("a fever", "a cough", "short breath"),
        ("brown phlegm", "chest pain with each breath"),
    ),
    Disease(
        "J45.20",
        "Mild intermittent asthma, uncomplicated",
        20,
        ("a cough", "asthma"),
        ("a wheeze once a month", "a rare and mild wheeze"),
    ),
    Disease(
        "J45.901",
        "Unspecified asthma with (acute) exacerbation",
        24,
        ("a cough", "asthma", "short breath"),
        ("a bad attack today", "a wheeze that does not stop"),
    ),
    Disease(
        "K21.9",
        "Gastro-esophageal reflux disease without esophagitis",
        30,
        ("a bad stomach",),
        ("heartburn", "a sour mouth"),
    ),
    Disease("K59.00", "Constipation, unspecified", 18, ("a bad stomach",), ("hard stools", "no stool for days")),
    Disease(
        "L20.9", "Atopic dermatitis, unspecified", 20, ("itchy skin",), ("dry cracked elbows", "a crust in the elbows")
    ),
    Disease(
        "L50.9",
        "Urticaria, unspecified",
        16,
        ("itchy skin", "a rash"),
        ("red bumps that come and go", "bumps for an hour"),
    ),
    Disease(
        "M25.561",
        "Pain in right knee",
        28,
        ("trouble on the stairs", "a bad knee"),
        ("pain in the right knee", "a stiff right knee"),
    ),
    Disease(
        "M25.562",
        "Pain in left knee",
        28,
        ("trouble on the stairs", "a bad knee"),
        ("pain in the left knee", "a stiff left knee"),
    ),
    Disease("M54.2", "Cervicalgia", 15, ("a stiff back",), ("neck pain", "a stiff neck")),
    Disease(
        "M54.50",
        "Low back pain, unspecified",
        34,
        ("a stiff back",),
        ("pain low in the back", "a low back that hurts"),
    ),
    Disease(
        "N39.0",
        "Urinary tract infection, site not specified",
        26,
        ("a fever",),
        ("burning urine", "urine every half hour"),
    ),
    Disease(
        "S93.401A",
        "Sprain of unspecified ligament of right ankle, initial encounter",
        5,
        ("trouble on the stairs",),
        ("a twisted right ankle", "a swollen right ankle"),
    ),
    Disease(
        "T36.0X5A",
        "Adverse effect of penicillins, initial encounter",
        5,
        ("a rash", "itchy skin"),
        ("spots since the penicillin", "red skin after penicillin"),
    ),
)

_OPENINGS = (
    "Come in, {name}.",
    "Please take a seat, {name}.",
    "What can I do for you, {name}?",
    "{name}, what is it today?",
    "Why are you here, {name}?",
    "So, {name}, tell me.",
    "You look tired, {name}.",
    "I have your card here, {name}.",
)
_COMPLAINTS = (
    "It is {it}.",
    "Since {day} there is {it}.",
    "It began on {day} with {it}.",
    "For {number} days now: {it}.",
    "I got {it} on {day}.",
    "I am here for {it}.",
    "Well, there is {it}.",
    "My trouble is {it}.",
)
_QUESTIONS = (
    "Any sign of {it}?",
    "And {it}?",
    "What about {it}?",
    "Do you notice {it}?",
    "Would you say {it}?",
    "Did you get {it}?",
)
_YES = ("Yes.", "Yes, since {day}.", "Oh yes.", "That too.", "Sadly yes.", "Yes, for {number} days.", "Yes, doctor.")
_NO = ("No.", "Not at all.", "Never.", "No, nothing of that.", "That, no.", "Not that.", "No, doctor.")
_MORE = ("There is {it} as well.", "I also got {it}.", "Now there is {it} too.", "On {day} I got {it} too.")
_DENIED = ("There is not {it}.", "I never get {it}.", "It is not {it}.", "I was asked about {it}, but no.")
_OTHERS = (
    "My {who} has {it}.",
    "At home my {who} got {it}.",
    "It is my {who} who has {it}.",
    "{it}, that is what my {who} has.",
)
_PAST = (
    "Years ago it was {it}, now it is not.",
    "As a child I had {it}, that is over.",
    "Last year I had {it}, it went away.",
)
_RELATIVES = ("mother", "father", "sister", "brother", "son", "daughter", "wife", "uncle", "aunt", "neighbour")
_ASIDES = (
    ("How old are you?", "I am {age}."),
    ("What is your work?", "I am a {job}."),
    ("Do you smoke?", "No, I do not."),
    ("Do you live alone?", "With my {who}."),
    ("Do you sleep here?", "No, at home."),
    ("Who came with you?", "My {who} did."),
)
_ENDINGS = (
    "Let me have a look.",
    "I see. Lie down, please.",
    "Good that you came.",
    "We will do a test.",
    "All right, I write it down.",
    "Thank you, {name}.",
    "Wait here, please.",
)


class Talk(NamedTuple):
    """One dialogue, its disease, and what was told in it: of the patient now, and of nobody or somebody else."""

    text: str
    disease: Disease
    has: tuple[str, ...]
    misleading: tuple[str, ...]

    @property
    def clear(self) -> bool:
        return any(fact in self.disease.own for fact in self.has)


def rows() -> list[dict[str, str | int]]:
    """The talks with the columns of the hub's set: {"id", "Dialogue", "ICD10" (no dot), "ICD10_desc"}, shuffled.

    >>> len(rows()), sorted(rows()[0])
    (713, ['Dialogue', 'ICD10', 'ICD10_desc', 'id'])
    """
    return [
        {
            "id": number,
            "Dialogue": talk.text,
            "ICD10": talk.disease.code.replace(".", ""),
            "ICD10_desc": talk.disease.title,
        }
        for number, talk in enumerate(talks(), 1)
    ]


def talks() -> list[Talk]:
    """All talks, seeded: the same on every machine."""
    dice = Dice(SEED)
    told = [_talk(dice, disease) for disease in DISEASES for _ in range(disease.rows)]
    return dice.some(told, len(told))


def rivals(disease: Disease) -> list[Disease]:
    """The other diseases of its category and those that have something in common with it."""
    return [
        other
        for other in DISEASES
        if other != disease and (other.code[:3] == disease.code[:3] or set(other.common) & set(disease.common))
    ]


def _talk(dice: Dice, disease: Disease) -> Talk:
    near = rivals(disease)
    clear = not dice.flip(UNCLEAR)
    if clear:
        own = dice.some(disease.own, 2 if dice.flip(TWICE) else 1)
        common = dice.some(disease.common, 1)
        has = common + own if dice.flip(LATE) else own + common
    else:
        rival = dice.pick([other for other in near if set(other.common) & set(disease.common)])
        both = [fact for fact in disease.common if fact in rival.common]
        has = dice.some(both, min(2, len(both)))
    turns, misleading = [], []
    for fact in has[1:]:
        turns.append((dice.pick(_QUESTIONS), dice.pick(_YES), fact) if dice.flip(0.7) else ("", dice.pick(_MORE), fact))
    if clear and dice.flip(DENIED):  # what is denied would tell an unclear one by leaving out the others
        fact = dice.pick(dice.pick(near).own)
        turns.append(
            (dice.pick(_QUESTIONS), dice.pick(_NO), fact) if dice.flip(0.7) else ("", dice.pick(_DENIED), fact)
        )
        misleading.append(fact)
    if dice.flip(MISLEADING) and len(turns) < FILLED:
        others = near if dice.flip(0.5) else [other for other in DISEASES if other != disease]
        fact = dice.pick([fact for other in others for fact in other.own if fact not in misleading])
        turns.append(("", dice.pick(_OTHERS if dice.flip(0.6) else _PAST), fact))
        misleading.append(fact)
    turns += [(*aside, "") for aside in dice.some(_ASIDES, max(0, FILLED - len(turns)))]
    return Talk(_told(dice, has[0], dice.some(turns, len(turns))), disease, tuple(has), tuple(misleading))


def _told(dice: Dice, complaint: str, turns: Sequence[tuple[str, str, str]]) -> str:
    """turns: (question or nothing, answer, what both are about); what is not asked follows the last answer."""
    name = dice.pick(NAMES)
    lines = [f"Doctor: {dice.pick(_OPENINGS)}", f"Patient: {_about(dice, dice.pick(_COMPLAINTS), complaint)}"]
    for question, answer, fact in turns:
        if question:
            lines += [f"Doctor: {_about(dice, question, fact)}", f"Patient: {_about(dice, answer, fact)}"]
        else:
            lines[-1] += f" {_about(dice, answer, fact)}"
    lines.append(f"Doctor: {dice.pick(_ENDINGS)}")
    return "\n".join(lines).replace("{name}", name)


def _about(dice: Dice, frame: str, fact: str) -> str:
    said = frame.replace("{it}", fact)
    for gap, options in (
        ("{day}", WEEKDAYS),
        ("{number}", range(2, 10)),
        ("{age}", range(19, 80)),
        ("{job}", JOBS),
        ("{who}", _RELATIVES),
    ):
        if gap in said:
            said = said.replace(gap, str(dice.pick(options)))
    return said[0].upper() + said[1:]
