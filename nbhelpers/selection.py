"""Which of these runs are meant? `strategy=gradient level>0.1 tuned`: conditions on fields, and words of names."""

from __future__ import annotations

import operator
import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from nbhelpers.analysis import ABSENT, SHOWN, ExperimentAnalyzer
from nbhelpers.collection import Experiment, flat
from nbhelpers.registry import unknown

_CONDITION = re.compile(r"([^<>=!]+?)(<=|>=|!=|=|<|>)(.*)")
_WHO = ("name", "run_id", "kind", "status")
_ORDER: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Condition:
    """A word that stands in the run's name, or (with a field) how its value is."""

    word: str
    field: str | None = None
    how: str = "="

    def holds(self, run: Experiment) -> bool:
        if self.field is None:
            return self.word.casefold() in f"{run.name} {run.run_id}".casefold()
        value = value_of(run, self.field)
        if self.how in _ORDER:
            return _is_number(value) and _ORDER[self.how](value, float(self.word))
        found = any(_same(value, word) for word in self.word.split(","))
        return found == (self.how == "=")


def select(
    analyzer: ExperimentAnalyzer,
    text: str = "",
    kind: str | None = None,
    model: str | None = None,
    status: str | None = None,
) -> ExperimentAnalyzer:
    """The runs that fit all of it; None and an empty text let every run through.

    text: words and conditions with spaces between them, quoted where they hold one themselves. A word stands in the
    run's name; `field=value`, `!=`, `<`, `<=`, `>` and `>=` ask for a config field, a metric, or kind, name, status;
    `field=a,b` is any of them. LookupError for a field that no run has, ValueError for a text that cannot be read.
    """
    conditions = parse(text)
    there = analyzer.metrics() if conditions else []
    for condition in conditions:
        if condition.field is not None and analyzer.experiments:
            known = fields(analyzer)
            if condition.field not in (*known, *there):
                raise LookupError(unknown("field", condition.field, [*known, *(n for n in SHOWN if n in there)]))
    exactly = [(field, value) for field, value in (("kind", kind), ("model", model), ("status", status)) if value]

    def keep(run: Experiment) -> bool:
        said = all(str(value_of(run, field)) == value for field, value in exactly)
        return said and all(condition.holds(run) for condition in conditions)

    return analyzer.where(keep)


def parse(text: str) -> list[Condition]:
    """The conditions of a text.

    >>> parse("tuned level>0.1")
    [Condition(word='tuned', field=None, how='='), Condition(word='0.1', field='level', how='>')]
    """
    try:
        parts = shlex.split(text)
    except ValueError:
        raise ValueError(f"the filter {text!r} opens a quotation mark and does not close it") from None
    found = []
    for part in parts:
        match = _CONDITION.fullmatch(part)
        if match is None and re.search("[<>=!]", part):
            raise ValueError(f"the filter {part!r} says no field: write it as field=value, without spaces")
        field, how, word = (match[1], match[2], match[3]) if match else (None, "=", part)
        if how in _ORDER and not _reads_as_number(word):
            raise ValueError(f"the filter {part!r} compares by size, which needs a number after {how}")
        found.append(Condition(word, field, how))
    return found


def fields(analyzer: ExperimentAnalyzer) -> list[str]:
    """What can be asked for beside metrics: config fields, and who the run is."""
    config = [field for run in analyzer.experiments for field in flat(run.config)]
    return list(dict.fromkeys([*config, *_WHO]))


def value_of(run: Experiment, field: str) -> Any:
    """A config field, else what the run is (kind, status, ...), else a metric; ABSENT where it has none."""
    config = flat(run.config)
    if field in _WHO:
        return getattr(run, field)
    return config[field] if field in config else run.numbers.get(field, ABSENT)


def _same(value: Any, word: str) -> bool:
    """Whether a value is what was written: 0.10 is 0.1, True is true, none is None."""
    if isinstance(value, bool) or value is None:
        return str(value).casefold() == word.casefold()
    if _is_number(value) and _reads_as_number(word):
        return value == float(word)
    return str(value) == word


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _reads_as_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True
