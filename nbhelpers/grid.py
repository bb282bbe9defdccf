"""Which jobs does a plan hold? Axes and seeds -> rows -> unique jobs, and an order in which few already span the grid.

A plan is a YAML or JSON file or a dict:

    kind: pruning                              # what a job is: a name in KINDS
    base: {text: bundled, steps: 20}           # fields that every job shares
    axes: {model: [tiny-gpt2, tiny-llama], level: [0.1, 0.3]}
    seeds: [0, 1]                              # the same as an axis `seed`
    # an axis may also be named values of several fields: {best: {strategy: entropy, iterative: true}, fast: {...}}
    aliases: [{when: {level: 0}, ignore: [strategy]}]   # where these fields do not matter

or `search` in place of axes, seeds and aliases (search.py): its jobs come one by one, each from what came out so far.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from nbhelpers import yaml_files
from nbhelpers.errors import one_line, refusal
from nbhelpers.records import canonical_json, plain, sha256_json
from nbhelpers.registry import Registry, unknown
from nbhelpers.search import Search, whole_numbers

MOST_ROWS = 100_000
ID_LETTERS = 16  # of the sha256: what is shown and what run directories are called
LOOK_AHEAD = 256  # jobs among which the next one is chosen, so that a large plan is ordered in seconds


@dataclass(frozen=True)
class JobKind:
    """What the sweep must know of a kind of job. `config` is a pydantic model; `run(config, run_dir=, progress=,
    should_stop=)` leaves an ordinary run directory there and raises what went wrong."""

    config: type[BaseModel]
    run: Callable[..., Any]
    format: int = 1  # counts up when the same config comes to mean another computation: old results stay apart
    resolve: Callable[[BaseModel], dict[str, Any]] = lambda config: config.model_dump(exclude={"name"})
    fingerprint: Callable[[BaseModel], dict[str, Any]] = lambda config: {}  # of data and models, where that is cheap
    similar: Callable[[Mapping[str, Any]], Any] = lambda config: None  # jobs of equal key cost about the same
    estimate: Callable[[BaseModel], float | None] = lambda config: None  # seconds, where nothing was measured yet
    columns: Callable[[Mapping[str, Any]], dict[str, Any]] = dict  # a run's result -> columns of a results table
    early: Callable[[Mapping[str, Any]], int] = lambda config: 0  # jobs of a lower number come first
    shares: Callable[[Mapping[str, Any]], Any] = lambda config: None  # jobs of equal key come together (one model, say)
    price: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]] = lambda configs: {}  # what jobs do in all: counts
    reads: Callable[[BaseModel], dict[str, str]] = lambda config: {}  # sha256 of the data a job reads, by what it is
    close: Callable[[], None] = lambda: None  # gives back what jobs of one process shared
    resumes: bool = False  # run(..., resume=True) goes on in the run directory of a try that was interrupted
    # validation losses on the way, lower is better: of one progress report, and of a Run; None where there are none
    heard: Callable[[Mapping[str, Any]], tuple[int, float] | None] | None = None
    seen: Callable[[Any], list[tuple[int, float]]] = lambda run: []


KINDS = Registry("job kind")  # name -> function without arguments that makes the JobKind: heavy imports stay inside it


class Alias(BaseModel):
    """Rows where all of `when` holds do not depend on the fields in `ignore`: these take their axis's first value."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    when: dict[str, Any] = Field(min_length=1)
    ignore: list[str] = Field(min_length=1)


class Plan(BaseModel):
    """A grid of jobs as it was asked for; `expand` checks it against its kind."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str = Field("sweep", min_length=1)
    kind: str
    base: dict[str, Any] = Field(default_factory=dict)
    axes: dict[str, list[Any] | dict[str, dict[str, Any]]] = Field(default_factory=dict)
    seeds: list[int] | None = None
    aliases: list[Alias] = Field(default_factory=list)
    order_seed: int = Field(0, ge=0)
    search: Search | None = None

    @model_validator(mode="before")
    @classmethod
    def _known_fields_only(cls, values: Any) -> Any:
        for name in values if isinstance(values, Mapping) else ():
            if name not in cls.model_fields:
                raise ValueError(unknown("plan field", name, cls.model_fields))
        axes = values.get("axes") if isinstance(values, Mapping) else None
        for name, found in axes.items() if isinstance(axes, Mapping) else ():
            named = isinstance(found, Mapping) and all(isinstance(value, Mapping) for value in found.values())
            if not isinstance(found, list | tuple) and not named:
                raise ValueError(f"axis {name!r} must be a list of values, or named values of fields, got {found!r}")
        return values

    def all_axes(self) -> dict[str, list[Any]]:
        """The values of each axis; of one that is named values of several fields, the names."""
        return {name: list(values) for name, values in self.axes.items()} | (
            {} if self.seeds is None else {"seed": self.seeds}
        )

    def fields(self, place: Mapping[str, Any]) -> dict[str, Any]:
        """What a place on the axes means for the config."""
        found: dict[str, Any] = {}
        for name, value in place.items():
            values = self.axes.get(name)
            found |= values[value] if isinstance(values, dict) else {name: value}
        return found

    def axis_fields(self, name: str) -> list[str]:
        """The config fields that an axis sets."""
        values = self.axes.get(name)
        return list(next(iter(values.values()), {})) if isinstance(values, dict) else [name]


@dataclass(frozen=True)
class Job:
    """One thing to do. config: whole, as its kind's config class writes it; values: its place on the axes."""

    id: str
    name: str
    config: dict[str, Any]
    values: dict[str, Any]
    sha256: str = ""


@dataclass(frozen=True)
class Row:
    """One cell of the grid; an alias is done by the job of an earlier row."""

    values: dict[str, Any]
    job: str
    alias: bool


@dataclass(frozen=True)
class Expansion:
    plan: Plan
    kind: JobKind
    rows: list[Row]
    jobs: dict[str, Job] = field(default_factory=dict)

    @property
    def aliases(self) -> int:
        return sum(row.alias for row in self.rows)


# --- reading --------------------------------------------------------------------------------------------------------


def read_plan(source: str | Path | Mapping[str, Any] | Plan) -> Plan:
    """The plan of a YAML or JSON file, a dict, or a plan itself. ValueError in one line for anything else."""
    if isinstance(source, Plan):
        return source
    values = source if isinstance(source, Mapping) else yaml_files.read(source, "plan")
    where = "plan" if isinstance(source, Mapping) else f"plan '{source}'"
    if not isinstance(values, Mapping):
        raise ValueError(f"{where} must be a mapping with kind, base and axes, got {type(values).__name__}")
    try:
        return Plan(**{str(key): value for key, value in values.items()})
    except ValidationError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


# --- rows and jobs --------------------------------------------------------------------------------------------------


def expand(plan: Plan) -> Expansion:
    """All rows and unique jobs of a plan, each config checked. ValueError or LookupError, one line, names the axis."""
    if plan.kind not in KINDS:
        raise LookupError(unknown("job kind", plan.kind, KINDS))
    kind = KINDS[plan.kind]()
    if plan.search is not None:
        _check_search(plan, plan.search, kind)
        return Expansion(plan, kind, [])
    axes = plan.all_axes()
    _check_names(plan, kind, axes)
    _check_values(plan, kind, axes)
    rows, jobs = [], {}
    for values in itertools.product(*axes.values()):
        place = dict(zip(axes, values, strict=True))
        job = _job(plan, kind, axes, place)
        rows.append(Row(plain(place), job.id, job.id in jobs))
        jobs.setdefault(job.id, job)
    return Expansion(plan, kind, rows, jobs)


def _check_names(plan: Plan, kind: JobKind, axes: Mapping[str, list]) -> None:
    fields = kind.config.model_fields
    ignored = [name for alias in plan.aliases for name in (*alias.when, *alias.ignore)]
    set_by_axes = [field for name in axes for field in plan.axis_fields(name)]
    for where, names in (("base", plan.base), ("axes", set_by_axes)):
        for name in names:
            if name not in fields:
                raise ValueError(f"{where}: {unknown('field', name, fields)}")
    for name in axes:
        _check_named_values(plan, name, fields)
        for field_ in plan.axis_fields(name):
            seeds = field_ == "seed" and plan.seeds is not None and "seed" in plan.axes
            if field_ in plan.base or seeds:
                other = "base" if field_ in plan.base else "seeds"
                raise ValueError(f"field {field_!r} stands in axes and in {other}: name it in one of them")
            if set_by_axes.count(field_) > 1:
                raise ValueError(f"field {field_!r} is set by two axes: name it in one of them")
        if not axes[name]:
            raise ValueError(f"axis {name!r} has no values: give at least one, or leave it out")
    for name in ignored:
        if name not in axes:
            raise ValueError(f"aliases: {unknown('axis', name, axes)}")
    size = 1
    for values in axes.values():
        size *= len(values)
    if size > MOST_ROWS:
        raise ValueError(f"a plan holds at most {MOST_ROWS} rows, got {size}: shorten an axis")


def _check_named_values(plan: Plan, name: str, fields: Mapping[str, Any]) -> None:
    """An axis of named values: each sets the same fields; where its name is a field, that one to the value's name."""
    values = plan.axes.get(name)
    if not isinstance(values, dict):
        return
    if name in fields and any(said.get(name) != label for label, said in values.items()):
        raise ValueError(
            f"axis {name!r} is a field, so its values are a list: call named values of several otherwise, or let each "
            f"set {name!r} to its own name"
        )
    wanted = plan.axis_fields(name)
    for label, said in values.items():
        if sorted(said) != sorted(wanted) or not said:
            raise ValueError(
                f"axis {name!r}, value {label!r} sets {', '.join(said) or 'nothing'}: each value sets the same fields "
                f"({', '.join(wanted) or 'at least one'})"
            )


def _check_search(plan: Plan, search: Search, kind: JobKind) -> None:
    """What is wrong with a search is said now: names, values, metric, and a pruner that would never hear anything."""
    for name in ("axes", "seeds", "aliases"):
        if getattr(plan, name):
            raise ValueError(f"search takes the place of {name}: take one of them out")
    _check_names(plan, kind, {name: [None] for name in search.space})
    whole = whole_numbers(search, kind.config)
    _check_values(plan, kind, {name: values.bounds(name in whole) for name, values in search.space.items()})
    known = kind.columns({})
    if known and search.metric not in known:
        raise LookupError(unknown("metric", search.metric, known))
    if search.pruner != "none" and kind.heard is None:
        raise ValueError(f"pruner {search.pruner!r} hears nothing from {plan.kind!r} jobs on their way: use none")


def trial_job(expansion: Expansion, values: Mapping[str, Any]) -> Job:
    """The job that does a trial of a search."""
    return _job(expansion.plan, expansion.kind, {}, values)


def _check_values(plan: Plan, kind: JobKind, axes: Mapping[str, list]) -> None:
    """Each value of each axis by itself, so that an error names the axis and the value; then twice the same value."""
    firsts = plan.fields({name: values[0] for name, values in axes.items()})
    faults = []
    for name, values in axes.items():
        seen: dict[str, Any] = {}
        own = plan.axis_fields(name)
        for value in values:
            config, found = _try(kind, {**plan.base, **firsts, **plan.fields({name: value})})
            faults += [f"axis {name!r}, value {value!r}: {fault}" for at, fault in found if at in own]
            if config is None:
                continue
            text = canonical_json({field: getattr(config, field) for field in own})
            if text in seen:
                raise ValueError(f"axis {name!r} has {value!r} twice: every value once")
            seen[text] = value
    if faults:
        raise ValueError("; ".join(faults))
    _, found = _try(kind, {**plan.base, **firsts})
    if found:
        raise ValueError("; ".join(f"base: {fault}" for _, fault in found))


def _try(kind: JobKind, values: Mapping[str, Any]) -> tuple[BaseModel | None, list[tuple[Any, str]]]:
    """The config, or [(field, what is wrong)]."""
    try:
        return kind.config(**values), []
    except ValidationError as error:
        return None, [(found["loc"][0] if found["loc"] else None, refusal(found)) for found in error.errors()]


def _job(plan: Plan, kind: JobKind, axes: Mapping[str, list], place: Mapping[str, Any]) -> Job:
    values = dict(place)
    for alias in plan.aliases:
        if all(
            place[name] == v and isinstance(place[name], bool) == isinstance(v, bool) for name, v in alias.when.items()
        ):
            values |= {name: axes[name][0] for name in alias.ignore}
    config, found = _try(kind, {**plan.base, **plan.fields(values)})
    if config is None:
        said = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise ValueError(f"row {said}: {'; '.join(fault for _, fault in found)}")
    content = {"kind": plan.kind, "format": kind.format, "config": plain(kind.resolve(config))}
    digest = sha256_json(content | {"data": plain(kind.fingerprint(config))})
    short = {name: float(f"{v:.3g}") if plan.search and isinstance(v, float) else v for name, v in values.items()}
    label = " ".join(f"{name} {value}" if not isinstance(value, str) else value for name, value in short.items())
    written = plain(config.model_dump())
    if "name" in kind.config.model_fields and not {"name"} & {*plan.base, *axes}:
        written["name"] = label or plan.name
    return Job(digest[:ID_LETTERS], label or plan.name, written, plain(values), digest)


def in_order(expansion: Expansion, jobs: Sequence[Job]) -> list[Job]:
    """`spread`, and of these first those that their kind wants early, and together those that share something."""
    kind, ordered = expansion.kind, spread(jobs, expansion.plan.order_seed)
    met: dict[str, int] = {}
    for job in ordered:
        met.setdefault(repr(kind.shares(job.config)), len(met))
    stages = sorted({kind.early(job.config) for job in ordered})
    found = []
    for number, stage in enumerate(stages):  # to and fro: what was shared last in one stage is shared first in the next
        part = [job for job in ordered if kind.early(job.config) == stage]
        found += sorted(part, key=lambda job: (-1) ** number * met[repr(kind.shares(job.config))])
    return found


# --- order ----------------------------------------------------------------------------------------------------------


def spread(jobs: Sequence[Job], seed: int = 0) -> list[Job]:
    """The jobs in a seeded order in which every beginning covers the axes evenly.

    Greedy: the next job is the one whose axis values were taken least often so far (the sum, over axes, of how far its
    value is ahead of that axis's rarest one), then the one whose pairs of values were; ties go by a seeded shuffle.
    """
    waiting = sorted(jobs, key=lambda job: job.id)
    random.Random(seed).shuffle(waiting)
    places = {job.id: [(name, canonical_json({"v": value})) for name, value in job.values.items()] for job in waiting}
    counts: Counter = Counter({part: 0 for place in places.values() for part in place})
    pairs: Counter = Counter()
    ordered = []
    while waiting:
        rarest = {}
        for (name, _), count in counts.items():
            rarest[name] = min(count, rarest.get(name, count))

        def ahead(job: Job, rarest=rarest) -> tuple[int, int]:
            place = places[job.id]
            return (
                sum((counts[part] - rarest[part[0]]) ** 2 for part in place),
                sum(pairs[pair] for pair in itertools.combinations(place, 2)),
            )

        chosen = min(waiting[:LOOK_AHEAD], key=ahead)
        waiting.remove(chosen)
        counts.update(places[chosen.id])
        pairs.update(itertools.combinations(places[chosen.id], 2))
        ordered.append(chosen)
    return ordered
