"""Which people, things and places is the bundled text about?

No list holds a word twice, and no word stands in two lists, so that a word says by itself which list it was
drawn from. Later tasks are built in the same world and read the same lists.
"""

from typing import NamedTuple


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NAMES = _words(
    "Mia Tom Ben Anna Sam Lily Max Rosa Jack Nora Leo Ella Finn Clara Hugo Ida Paul Vera Oscar Maya Peter "
    "Julia Felix Grace Noah Emma Lucas Sofia Adam Jane Carl Dora Simon Helen Victor Ruth Martin Olga "
    "David Kate"
)

COLOURS = _words("red blue green yellow black white brown purple silver golden")

OBJECTS = _words(
    "ball hat drum book lamp key cup box bag rope coat kite bell clock spoon mirror basket candle ring "
    "shell knife whistle flag pencil bottle button blanket hammer ladder mask pillow puppet ribbon saddle "
    "scarf shovel stone sword ticket tray violin wagon wheel wallet map letter"
)

PLACES = _words(
    "kitchen garden barn forest school market castle church library harbour station tower mill museum "
    "bakery cellar meadow valley tunnel theatre"
)

ANIMALS = _words("dog cat horse goat rabbit parrot turtle duck mouse pony sheep frog hamster donkey")

FOODS = _words(
    "plums apples pears cherries figs grapes lemons melons peaches carrots beans nuts cakes cookies pies "
    "muffins rolls sausages pancakes berries"
)

JOBS = _words(
    "baker farmer teacher singer painter sailor waiter driver pilot dancer cook gardener hunter judge "
    "nurse writer tailor lawyer miner barber"
)

WEEKDAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")

# With the article that English wants after "I have".
SYMPTOMS = (
    "a headache",
    "a cough",
    "a fever",
    "a sore throat",
    "a runny nose",
    "a rash",
    "a stiff neck",
    "a swollen knee",
    "a swollen ankle",
    "a dry mouth",
    "a ringing ear",
    "a burning stomach",
    "a twitching eye",
    "a tight chest",
    "a weak arm",
    "a numb hand",
    "a painful hip",
    "a bleeding gum",
    "back pain",
    "tooth pain",
    "shoulder pain",
    "chills",
    "nausea",
    "dizziness",
    "cramps",
    "heartburn",
    "hiccups",
    "insomnia",
    "night sweats",
    "blurred vision",
    "short breath",
    "itchy skin",
)

MOMENTS = (
    "at night",
    "in the morning",
    "after meals",
    "when I walk",
    "when I lie down",
    "in cold air",
    "under stress",
    "at work",
)


class Relation(NamedTuple):
    """How a fact is stated, how it is asked, how its owner is asked for, and what can be filled in."""

    stated: str
    asked: str
    who: str
    values: tuple[str, ...]


RELATIONS = (
    Relation("works as a {}", "Does {} work as a {}", "Who works as a {}", JOBS),
    Relation("has a {}", "Does {} have a {}", "Who has a {}", ANIMALS),
    Relation("likes {}", "Does {} like {}", "Who likes {}", FOODS),
    Relation("lives near the {}", "Does {} live near the {}", "Who lives near the {}", PLACES),
    Relation("wears {} shoes", "Does {} wear {} shoes", "Who wears {} shoes", COLOURS),
)
