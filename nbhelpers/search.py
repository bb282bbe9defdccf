"""Which values shall be tried next, which run is not worth its end, and which trial was best? Optuna, an extra.

The section `search` of a plan takes the place of its axes:

    search:
      metric: fine_tuned_perplexity      # a column of the results
      direction: minimize
      sampler: tpe                       # a name in SAMPLERS
      trials: 20
      space: {learning_rate: {low: 1.0e-5, high: 1.0e-2, log: true}, lora_rank: {choices: [4, 8, 16]}}
      pruner: successive_halving         # none, or another name in PRUNERS
      first_rung: 10                     # steps after which a run may be stopped for the first time

Nothing is kept here. For every question a study is built anew from the trials on record, and the sampler of trial n is
seeded by (seed, n): a search that was killed goes on with the trials that it would have had without the kill.

Successive halving is Optuna's, asynchronous (Li et al. 2020): at first_rung, reduction_factor * first_rung, ... steps a
run goes on only if its validation loss is among the best 1 / reduction_factor of those that came so far. Runs are not
shortened for it: each has the schedule of its full number of steps and is stopped on the way, as by Stop, so what it
has logged stays. A run that starts slowly and would have won in the end is lost, and no later result says so.
"""

from __future__ import annotations

import contextlib
import math
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

from pydantic import BaseModel, Field, model_validator

from nbhelpers.records import canonical_json, sha256_text
from nbhelpers.registry import Registry, unknown
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import Interrupted

SAMPLERS = Registry("sampler")  # name -> function (optuna, search, seed of this trial) -> sampler
PRUNERS = Registry("pruner")  # name -> function (optuna, search) -> pruner


class Pruned(Interrupted):
    """The search stopped this run: its record says interrupted, the ledger pruned."""


class Values(StrictConfig):
    """The values of one field: from low to high (`log`: evenly over orders of magnitude), or one of choices."""

    low: float | None = Field(None, allow_inf_nan=False)
    high: float | None = Field(None, allow_inf_nan=False)
    log: bool = False
    choices: list[bool | int | float | str | None] | None = Field(None, min_length=1)

    def bounds(self, whole: bool) -> list[Any]:
        """What must all be valid for the whole to be: both ends, or every choice."""
        ends = (self.low, self.high)
        return self.choices or [int(end) if whole else end for end in ends]


class Search(StrictConfig):
    """How values are searched for, as it stands in a plan."""

    metric: str = Field(min_length=1)
    direction: Literal["minimize", "maximize"]
    space: dict[str, Values] = Field(min_length=1)
    sampler: str = "tpe"
    trials: int = Field(20, ge=1, le=10_000)
    startup_trials: int = Field(10, ge=1)  # drawn at random before tpe looks at results
    pruner: str = "none"
    first_rung: int | None = Field(None, ge=1)  # steps
    reduction_factor: int = Field(3, ge=2)
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _names_and_bounds(self) -> Search:
        for registry, name in ((SAMPLERS, self.sampler), (PRUNERS, self.pruner)):
            if name not in registry:
                raise ValueError(unknown(registry.kind, name, registry))
        if (self.pruner == "none") != (self.first_rung is None):
            raise ValueError(
                f"pruner {self.pruner!r} does not go with first_rung {self.first_rung}: successive_halving needs the "
                "steps after which a run may be stopped for the first time, none needs nothing"
            )
        for name, values in self.space.items():
            _check_space(name, values)
        return self


def _check_space(name: str, values: Values) -> None:
    ends = values.low, values.high
    if (values.choices is None) == (None in ends) or (values.choices and (ends != (None, None) or values.log)):
        raise ValueError(f"space {name!r} needs low and high, or choices, got {values.model_dump(exclude_none=True)}")
    if values.choices is None and not values.low < values.high:
        raise ValueError(f"space {name!r} needs low below high, got low {values.low:g} and high {values.high:g}")
    if values.log and values.low <= 0:
        raise ValueError(f"space {name!r} with log needs low above 0, got {values.low:g}")


def whole_numbers(search: Search, config: type[BaseModel]) -> set[str]:
    """The fields of the space that take whole numbers only; ValueError for low and high where no number goes."""
    found = set()
    for name, values in search.space.items():
        types = _types(config.model_fields[name].annotation)
        if values.choices is not None or float in types:
            continue
        if int not in types:
            raise ValueError(f"space {name!r} is no number, so it has no low and high: give choices")
        if values.low % 1 or values.high % 1:
            raise ValueError(f"space {name!r} takes whole numbers, got low {values.low:g} and high {values.high:g}")
        found.add(name)
    return found


def _types(annotation: Any) -> set[Any]:
    parts = typing.get_args(annotation)
    return {annotation} if not parts else {kind for part in parts for kind in _types(part)}


# --- samplers and pruners -------------------------------------------------------------------------------------------


@SAMPLERS.register("tpe")
def tpe(optuna: Any, search: Search, seed: int) -> Any:
    """Where good trials lie densely and bad ones do not: tree-structured Parzen estimators (Bergstra et al. 2011)."""
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup_trials)


@SAMPLERS.register("random")
def random(optuna: Any, search: Search, seed: int) -> Any:
    """Evenly over the space, whatever came out so far (Bergstra and Bengio 2012): the baseline of every search."""
    return optuna.samplers.RandomSampler(seed=seed)


@PRUNERS.register("none")
def none(optuna: Any, search: Search) -> Any:
    """Every run goes to its end."""
    return optuna.pruners.NopPruner()


@PRUNERS.register("successive_halving")
def successive_halving(optuna: Any, search: Search) -> Any:
    """Of those that reached a rung, the best 1 / reduction_factor go on; the next rung is reduction_factor as far."""
    return optuna.pruners.SuccessiveHalvingPruner(search.first_rung, search.reduction_factor)


def installed() -> Any:
    """Optuna; ImportError with the command that installs it."""
    try:
        return import_module("optuna")
    except ImportError as error:
        raise ImportError(
            f"a plan with `search` needs Optuna, which is not installed ({error}): pip install 'nbhelpers[search]', "
            "or pip install optuna"
        ) from error


# --- from the trials on record --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """A trial as the run records tell it. status: of its job; value: of the metric, where it came to its end.

    reported: (step, validation loss) on the way, lower is better whatever the metric.
    """

    values: dict[str, Any]
    status: str
    value: float | None = None
    reported: tuple[tuple[int, float], ...] = ()


def next_values(search: Search, whole: set[str], trials: Sequence[Trial]) -> dict[str, Any]:
    """The values of trial number len(trials), in the order of the space."""
    with _study(search, whole, trials) as study:
        seed = int(sha256_text(f"{search.seed}/{len(trials)}")[:8], 16)
        study.sampler = SAMPLERS[search.sampler](installed(), search, seed)
        found = study.ask(_distributions(search, whole)).params
    return {name: found[name] for name in search.space}


def best(search: Search, trials: Sequence[Trial]) -> int | None:
    """The number of the best trial that came to its end, the first one of several; None before there is one."""
    sign = _sign(search)
    ended = [n for n, t in enumerate(trials) if t.status == "finished" and _finite(t.value)]
    return min(ended, key=lambda number: sign * trials[number].value, default=None)


class Watch:
    """A run on its way, beside the other trials: `hear` what it reports, and whether to stop it."""

    def __init__(self, search: Search, whole: set[str], others: Sequence[Trial], values: Mapping[str, Any]) -> None:
        self.search, self.told = search, set()
        with _study(search, whole, others) as study:
            study.enqueue_trial(dict(values))
            self.trial = study.ask(_distributions(search, whole))

    def hear(self, step: int, loss: float, earlier: Sequence[tuple[int, float]] = ()) -> str | None:
        """Why the run shall stop after `step`, None where it may go on. earlier: what it had reported before a kill."""
        for at, value in (*((at, value) for at, value in earlier if at < step), (step, loss)):
            if at not in self.told:
                self.trial.report(_sign(self.search) * value, at)
                self.told.add(at)
        if not self.trial.should_prune():
            return None
        return (
            f"stopped by the search after step {step}: validation loss {loss:.4g} is not among the best "
            f"1 / {self.search.reduction_factor} of the trials that came as far"
        )


@contextlib.contextmanager
def _study(search: Search, whole: set[str], trials: Sequence[Trial]) -> Iterator[Any]:
    """A study in memory in which all of these trials were told."""
    optuna = installed()
    loudness = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            direction=search.direction,
            sampler=optuna.samplers.RandomSampler(seed=0),  # never asked: what is told was enqueued
            pruner=PRUNERS[search.pruner](optuna, search),
        )
        for trial in trials:
            _tell(optuna, study, search, whole, trial)
        yield study
    finally:
        optuna.logging.set_verbosity(loudness)


def _tell(optuna: Any, study: Any, search: Search, whole: set[str], trial: Trial) -> None:
    """One trial as it was. A diverged one has the worst of all values, so that the sampler keeps away from it."""
    study.enqueue_trial(trial.values)
    told = study.ask(_distributions(search, whole))
    for step, loss in trial.reported:
        told.report(_sign(search) * loss, step)
        told.should_prune()  # marks the rungs that it came to
    states = optuna.trial.TrialState
    if trial.status == "finished" and _finite(trial.value):
        study.tell(told, trial.value)
    elif trial.status == "diverged":
        study.tell(told, _sign(search) * math.inf)
    elif trial.status == "pruned":
        study.tell(told, state=states.PRUNED)
    elif trial.status in ("finished", "failed"):
        study.tell(told, state=states.FAIL)


def _distributions(search: Search, whole: set[str]) -> dict[str, Any]:
    kinds = installed().distributions
    found = {}
    for name, values in search.space.items():
        if values.choices is not None:
            found[name] = kinds.CategoricalDistribution(values.choices)
        elif name in whole:
            found[name] = kinds.IntDistribution(int(values.low), int(values.high), log=values.log)
        else:
            found[name] = kinds.FloatDistribution(values.low, values.high, log=values.log)
    return found


def _sign(search: Search) -> int:
    return 1 if search.direction == "minimize" else -1


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def same_search(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether two plans (as dicts) ask the same question, so that the trials of one are trials of the other."""

    def question(plan: Mapping[str, Any]) -> str:
        search = {name: value for name, value in (plan.get("search") or {}).items() if name != "trials"}
        return canonical_json({"kind": plan["kind"], "base": plan["base"], "search": search})

    return question(ours) == question(theirs)
