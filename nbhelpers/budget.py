"""What fits into the time there is? Test rows, training rows and epochs from measured rates.

Only for planning: no number from here stands in a result.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from nbhelpers import verdicts

LEAST_ROWS = 50  # of test and of training rows; all where there are fewer
DISCORDANT = 0.5  # assumed before anything is known: what two independent models, each right half the time, reach


@dataclass(frozen=True)
class Rates:
    """Seconds, measured on this machine with these data.

    answer_seconds: evaluation (a key of results.json) -> per answered test dialogue. training_seconds: model -> per
    training row and epoch. load_seconds: evaluation or model -> once. other_seconds: what no choice changes.
    """

    answer_seconds: Mapping[str, float]
    training_seconds: Mapping[str, float] = field(default_factory=dict)
    load_seconds: Mapping[str, float] = field(default_factory=dict)
    other_seconds: float = 0.0

    def __post_init__(self) -> None:
        for name, rates in (("answer", self.answer_seconds), ("training", self.training_seconds)):
            for key, seconds in rates.items():
                if not (math.isfinite(seconds) and seconds > 0):
                    raise ValueError(f"{name}_seconds of {key} must be above 0, got {seconds}: measure it again")

    def total(self, test_rows: int, training_rows: int, epochs: int) -> float:
        """Seconds of the whole run."""
        answers = test_rows * math.fsum(self.answer_seconds.values())
        training = training_rows * epochs * math.fsum(self.training_seconds.values())
        return answers + training + math.fsum(self.load_seconds.values()) + self.other_seconds


@dataclass(frozen=True)
class Wanted:
    """What the run would take with time enough."""

    test_rows: int
    training_rows: int = 0
    epochs: int = 1

    def __post_init__(self) -> None:
        if self.test_rows < 1 or self.training_rows < 0 or self.epochs < 1:
            raise ValueError(f"test_rows and epochs must be at least 1, training_rows at least 0, got {self}")


@dataclass(frozen=True)
class Choice:
    """What was chosen; `text` says it. detectable_difference is None where the test rows can tell nothing."""

    test_rows: int
    training_rows: int
    epochs: int
    seconds: float
    budget_seconds: float
    detectable_difference: float | None
    assumed_discordant_share: float
    text: str


def choose(budget_seconds: float, rates: Rates, wanted: Wanted, pairs: int = 1) -> Choice:
    """The most that fits: first epochs are given up, down to 1, then the same share of test and of training rows.

    More rows teach and tell more than the same rows again. Neither part falls below 50 rows (or all, where there are
    fewer). pairs: of a large and a small model, over which the verdict corrects its tests. ValueError with the least
    budget where even those do not fit.
    """
    least = Wanted(min(LEAST_ROWS, wanted.test_rows), min(LEAST_ROWS, wanted.training_rows))
    needed = rates.total(least.test_rows, least.training_rows, 1)
    if needed > budget_seconds:
        raise ValueError(
            f"a budget of {_minutes(budget_seconds)} is too short: {least.test_rows} test rows and 1 epoch of "
            f"{least.training_rows} training rows take about {_minutes(needed)}; give at least "
            f"{math.ceil(needed / 60)}m, or compare fewer models"
        )
    for epochs in range(wanted.epochs, 0, -1):
        if rates.total(wanted.test_rows, wanted.training_rows, epochs) <= budget_seconds:
            return _choice(wanted.test_rows, wanted.training_rows, epochs, budget_seconds, rates, wanted, pairs)

    def rows(share: float) -> tuple[int, int]:
        test, training = math.floor(share * wanted.test_rows), math.floor(share * wanted.training_rows)
        return max(test, least.test_rows), max(training, least.training_rows)

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rates.total(*rows(middle), 1) <= budget_seconds else (low, middle)
    return _choice(*rows(low), 1, budget_seconds, rates, wanted, pairs)


def _choice(
    test_rows: int, training_rows: int, epochs: int, budget_seconds: float, rates: Rates, wanted: Wanted, pairs: int
) -> Choice:
    seconds = rates.total(test_rows, training_rows, epochs)
    told = verdicts.detectable_difference(test_rows, DISCORDANT, level=verdicts.LEVEL / pairs)
    corrected = f", corrected over {pairs} pairs of models" if pairs > 1 else ""
    training = f"{training_rows} of {wanted.training_rows} training rows, {epochs} of {wanted.epochs} epochs, "
    training = training if wanted.training_rows else ""
    limit = (
        f"the smallest difference that {test_rows} test rows can tell is {100 * told:.1f} points"
        if told is not None
        else f"{test_rows} test rows can tell no difference"
    )
    text = (
        f"In {_minutes(budget_seconds)}: {training}{test_rows} of {wanted.test_rows} test rows, about "
        f"{_minutes(seconds)} at the measured rates; {limit} (80 % power{corrected}; for two independent models, "
        f"exactly one of them right on {DISCORDANT:.0%} of the rows)."
    )
    return Choice(test_rows, training_rows, epochs, seconds, budget_seconds, told, DISCORDANT, text)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
