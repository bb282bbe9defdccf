"""What do many runs say together? Tables, curves, the best one, seeds with their interval, and exports."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from nbhelpers.collection import Collection, Experiment, flat
from nbhelpers.records import canonical_json, plain, write_atomic
from nbhelpers.registry import unknown
from nbhelpers.stats import Interval, digits, mean_interval
from nbhelpers.tables import aligned, counted, csv_text, withheld

if TYPE_CHECKING:
    import pandas

# The plain word for a logged metric, where there is one
CURVES = {"loss": "train_loss", "validation": "val_loss", "throughput": "tokens_per_sec"}
# What a run is judged by where nobody says it: the first of these that is there
HEADLINES = ("fine_tuned/perplexity", "pruned/perplexity", "perplexity", "accuracy", "best_val_loss", "best_train_loss")
SHOWN = ("baseline/perplexity", "pruned/perplexity", "fine_tuned/perplexity", "control/perplexity")
SHOWN += ("recovery_percent", "improvement_percent", "perplexity", "accuracy", "best_val_loss", "final_train_loss")
IDENTITY = ("run_id", "name", "kind", "status", "created", "attempts", "torn_lines")
# Fields that decide no number of the runs that are compared by seed
NOT_DECIDING = ("name", "control", "sample_prompt", "sample_tokens")
ABSENT = "(absent)"
_LOWER = {"loss", "perplexity", "ppl", "nll", "seconds", "ms", "bytes", "error", "errors", "violations", "facts"}
_HIGHER = {"accuracy", "f1", "recall", "precision", "recovery", "improvement", "throughput"}
Form = Literal["wide", "long"]


@dataclass(frozen=True)
class Trajectory:
    """One metric of one run (and stage) along its steps; steps and values are equally long."""

    run: str  # its name, or its run id where several runs share the name
    run_id: str
    stage: str | None
    metric: str
    steps: list[int]
    values: list[float]
    config: Mapping[str, Any]
    generated: bool


@dataclass(frozen=True)
class SeedGroup:
    """Runs that differ by their seed alone. interval: of the metric's mean over the seeds, one run a seed."""

    config: dict[str, Any]  # without the seed
    differs: dict[str, Any]  # what sets it apart from the other groups
    metric: str
    values: dict[Any, float]  # seed -> value
    interval: Interval
    run_ids: list[str]
    left_out: list[str]  # run ids of repetitions with a seed that was counted, or whose value is not finite


class ExperimentAnalyzer:
    """The runs under one or more folders, also while they are still being written.

    >>> analyzer = ExperimentAnalyzer("runs")  # doctest: +SKIP
    >>> analyzer.get_best_experiment("fine_tuned/perplexity")  # doctest: +SKIP
    ('gradient-0.1', 4.61)

    folders: run directories, folders that hold them at any depth, or one-file JSON logs. ValueError for one that is
    not there. Nothing is read before it is asked for; `load_all()` looks again and reads what changed.
    """

    def __init__(self, folders: str | os.PathLike | Iterable[str | os.PathLike]) -> None:
        self._collection = Collection(folders)
        self._keep: list[Callable[[Experiment], bool]] = []
        self._loaded: list[Experiment] | None = None

    def load_all(self) -> list[Experiment]:
        """Every run, oldest first. What cannot be read is a line in `problems`; the rest goes on."""
        self._loaded = self._collection.refresh()
        return self.experiments

    @property
    def experiments(self) -> list[Experiment]:
        """The runs as they were loaded last."""
        if self._loaded is None:
            self._loaded = self._collection.refresh()
        return [run for run in self._loaded if all(keep(run) for keep in self._keep)]

    @property
    def problems(self) -> list[str]:
        """One line for each folder that cannot be read, and for each run with torn lines."""
        torn = [f"run {run.run_id}: {run.torn_lines} torn lines skipped" for run in self.experiments if run.torn_lines]
        return [*self._collection.problems, *torn]

    def filter(self, kind: Any = None, status: Any = None, name: Any = None, **config: Any) -> ExperimentAnalyzer:
        """The runs where each of these holds; a list means any of its values, a function decides by the value.

        config: any field of the runs' configs, inner ones by dotted name (`**{"lora.rank": 8}`). LookupError for a
        field that no run has.
        """
        known = list(dict.fromkeys(field for run in self.experiments for field in flat(run.config)))
        for field in config:
            if field not in known and self.experiments:
                raise LookupError(unknown("config field", field, known))
        kept = self.where(lambda run: True)
        for key, wanted in (("kind", kind), ("status", status), ("name", name)):
            if wanted is not None:
                kept._keep.append(lambda run, key=key, wanted=wanted: _fits(getattr(run, key), wanted))
        for field, wanted in config.items():
            kept._keep.append(lambda run, key=field, wanted=wanted: _fits(flat(run.config).get(key, ABSENT), wanted))
        return kept

    def where(self, keep: Callable[[Experiment], bool]) -> ExperimentAnalyzer:
        """The runs for which `keep(run)` is true."""
        kept = ExperimentAnalyzer.__new__(ExperimentAnalyzer)
        kept._collection, kept._loaded, kept._keep = self._collection, self._loaded, [*self._keep, keep]
        return kept

    def experiment(self, name: str) -> Experiment:
        """The run with this run id or name. A name that several runs share is a LookupError that lists them."""
        for run in self.experiments:
            if run.run_id == name:
                return run
        named = [run for run in self.experiments if run.name == name]
        if len(named) > 1:
            ids = ", ".join(run.run_id for run in named)
            raise LookupError(f"{len(named)} runs are named {name!r}: name one of them by its run id: {ids}")
        if not named:
            raise LookupError(unknown("run", name, self._labels().values()))
        return named[0]

    def label(self, run: Experiment) -> str:
        """What `experiment` finds this run by: its name, or its run id where the name is shared."""
        return self._labels()[run.run_id]

    def _labels(self) -> dict[str, str]:
        names = Counter(run.name for run in self.experiments)
        return {run.run_id: run.name if names[run.name] == 1 else run.run_id for run in self.experiments}

    def metrics(self) -> list[str]:
        """The names of all numbers that any run holds."""
        return sorted({name for run in self.experiments for name in run.numbers})

    # --- questions

    def get_best_experiment(self, metric: str, lower_is_better: bool | None = None) -> tuple[str, float]:
        """(label, value) of the finished run that is best by `metric`; a value that is not finite never is.

        LookupError for a metric that no finished run has. ValueError where the name does not tell which way is better
        and `lower_is_better` is not given.
        """
        lower = lower_is_better_by_name(metric) if lower_is_better is None else lower_is_better
        finished = [run for run in self.experiments if run.status == "finished"]
        self._check_metric(metric, finished)
        values = [(run, run.numbers[metric]) for run in finished if math.isfinite(run.numbers.get(metric, math.nan))]
        if not values:
            raise LookupError(f"no finished run has a finite {metric}")
        best, value = (min if lower else max)(values, key=lambda pair: pair[1])
        return self.label(best), value

    def _check_metric(self, metric: str, runs: Sequence[Experiment]) -> None:
        known = sorted({name for run in runs for name in run.numbers})
        if metric not in known:
            unfinished = " (runs that are not finished are left out)" if metric in self.metrics() else ""
            raise LookupError(unknown("metric", metric, known) + unfinished)

    def get_comparison_table(self, columns: Sequence[str] | None = None) -> list[dict[str, Any]]:
        """One row a run: `run` (its label), then the columns; None where a run has no such value.

        columns: of IDENTITY, config fields, metrics. None = status, the config fields in which the runs differ, and
        the measures that people ask for first. LookupError for a name that is none of them.
        """
        runs = self.experiments
        chosen = list(columns) if columns is not None else self._columns()
        known = list(dict.fromkeys([*IDENTITY, *(f for run in runs for f in flat(run.config)), *self.metrics()]))
        for column in chosen:
            if column not in known and runs:
                raise LookupError(unknown("column", column, known))
        labels = self._labels()
        return [{"run": labels[run.run_id], **{column: _cell(run, column) for column in chosen}} for run in runs]

    def _columns(self) -> list[str]:
        runs = self.experiments
        there = {name for run in runs for name in run.numbers}
        fields = [f for f in varying([run.config for run in runs]) if f not in ("name", "kind")]
        kind = ["kind"] if len({run.kind for run in runs}) > 1 else []
        fields = [f for f in fields if f.split(".")[-1] not in ("sample_prompt", "device")]
        return ["status", *kind, *fields, *(name for name in SHOWN if name in there)]

    def trajectories(self, metric: str, stage: str | None = None) -> list[Trajectory]:
        """One metric of every run and stage that logged it, each value with its step.

        metric: a logged name, or loss, validation, throughput. stage: None = every one. LookupError names the known
        metrics and stages.
        """
        wanted = CURVES.get(metric, metric)
        runs = self.experiments
        known = sorted({name for run in runs for _, name in run.curves})
        if wanted not in known:
            raise LookupError(unknown("logged metric", metric, known))
        stages = list(dict.fromkeys(at for run in runs for at, name in run.curves if name == wanted))
        if stage is not None and stage not in stages:
            raise LookupError(unknown("stage", stage, [str(at) for at in stages]))
        labels = self._labels()
        return [
            Trajectory(labels[run.run_id], run.run_id, at, name, *curve, run.config, run.generated)
            for run in runs
            for (at, name), curve in run.curves.items()
            if name == wanted and stage in (None, at)
        ]

    def seed_groups(self, metric: str, ignoring: Iterable[str] = NOT_DECIDING) -> list[SeedGroup]:
        """Finished runs with the same config but seed (and the same model and text), with mean and interval.

        ignoring: config fields that may differ within a group. A seed that was run twice counts once, the newest.
        """
        finished = [run for run in self.experiments if run.status == "finished"]
        self._check_metric(metric, finished)
        return seed_groups(finished, metric, ignoring)

    def diff(self, a: str, b: str) -> dict[str, tuple[Any, Any]]:
        """{config field: (value in a, value in b)} where they differ; runs by name or run id."""
        return diff_configs(self.experiment(a).config, self.experiment(b).config)

    # --- for people

    def summary(self) -> str:
        """How many runs of which status, the best by its headline, and what could not be read."""
        runs = self.experiments
        lines = [f"{len(runs)} runs" + (f": {counted(run.status for run in runs)}" if runs else "")]
        if runs:
            lines.append(f"kinds: {counted(run.kind for run in runs)}")
        metric = self.headline()
        if metric:
            name, value = self.get_best_experiment(metric)
            lines.append(f"best {metric}: {digits(value)} ({name})")
        return "\n".join([*lines, *(f"note: {problem}" for problem in self.problems)])

    def headline(self) -> str | None:
        """The metric by which these runs are judged where nobody says it; None without a finished run that has one."""
        there = {
            name
            for run in self.experiments
            if run.status == "finished"
            for name, value in run.numbers.items()
            if math.isfinite(value)
        }
        staged = sorted(name for name in there if name.endswith("/best_val_loss"))
        return next((name for name in (*HEADLINES, *staged) if name in there), None)

    def print_summary(self) -> None:
        print(self.summary())  # noqa: T201 - a published name that prints

    def comparison_text(self, columns: Sequence[str] | None = None) -> str:
        """The comparison table for people: three digits, aligned."""
        return aligned(self.get_comparison_table(columns))

    # --- exports

    def rows(self, form: Form = "wide", include_text: bool = False) -> list[dict[str, Any]]:
        """The export as rows. wide: one row a run, `config.<field>` and every number. long: one row a logged value.

        Texts of users (prompts, samples, notes, any long text) are replaced by their sha256 unless `include_text`.
        """
        if form not in ("wide", "long"):
            raise LookupError(unknown("form", form, ["wide", "long"]))
        return [row for run in self.experiments for row in (_wide if form == "wide" else _long)(run, include_text)]

    def csv(self, form: Form = "wide", include_text: bool = False) -> str:
        """The export as CSV; an empty cell was not measured, `nan` was not a number."""
        return csv_text(self.rows(form, include_text))

    def json(self, include_text: bool = False) -> str:
        """The export as strict JSON: {"runs": wide rows, "curves": long rows}."""
        document = {"runs": self.rows("wide", include_text), "curves": self.rows("long", include_text)}
        return canonical_json(plain(document)) + "\n"

    def export_csv(self, path: str | os.PathLike, form: Form = "wide", include_text: bool = False) -> Path:
        """Write `csv()` to a file, whole or not at all."""
        write_atomic(path, self.csv(form, include_text))
        return Path(path)

    def export_json(self, path: str | os.PathLike, include_text: bool = False) -> Path:
        """Write `json()` to a file, whole or not at all."""
        write_atomic(path, self.json(include_text))
        return Path(path)

    def to_dataframe(self, form: Form = "wide", include_text: bool = False) -> pandas.DataFrame:
        """The export as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.rows(form, include_text))


# --- pieces ---------------------------------------------------------------------------------------------------------


def lower_is_better_by_name(metric: str) -> bool:
    """True for losses, perplexities, seconds, bytes; False for accuracies, recoveries, tokens per second."""
    last = metric.rsplit("/", 1)[-1]
    words = set(last.split("_"))
    if words & _HIGHER or "tokens_per_sec" in last:
        return False
    if words & _LOWER:
        return True
    raise ValueError(f"whether lower or higher is better is not known for {metric!r}: pass lower_is_better")


def _fits(value: Any, wanted: Any) -> bool:
    if callable(wanted):
        return value != ABSENT and bool(wanted(value))
    if isinstance(wanted, list | tuple | set | frozenset):
        return value in wanted or value == wanted
    return value == wanted


def _cell(run: Experiment, column: str) -> Any:
    if column in IDENTITY:
        return _identity(run)[column]
    fields = flat(run.config)
    return fields[column] if column in fields else run.numbers.get(column)


def _identity(run: Experiment) -> dict[str, Any]:
    attempts = len(run.manifest.get("attempts", []))
    return dict(
        zip(IDENTITY, (run.run_id, run.name, run.kind, run.status, run.created, attempts, run.torn_lines), strict=True)
    )


def _wide(run: Experiment, include_text: bool) -> list[dict[str, Any]]:
    config = {
        f"config.{key}": value if include_text else withheld(key, value) for key, value in flat(run.config).items()
    }
    return [{**_identity(run), **config, **run.numbers}]


def _long(run: Experiment, include_text: bool) -> list[dict[str, Any]]:
    return [
        {"run_id": run.run_id, "name": run.name, "stage": stage, "step": step, "metric": metric, "value": value}
        for (stage, metric), curve in run.curves.items()
        for step, value in zip(*curve, strict=True)
    ]


def varying(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The fields, in their order, whose values are not the same in all configs."""
    rows = [flat(config) for config in configs]
    names = dict.fromkeys(name for row in rows for name in row)
    return [name for name in names if len({canonical_json(plain([row.get(name, ABSENT)])) for row in rows}) > 1]


def diff_configs(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{field: (value in a, value in b)} where they differ, inner fields by dotted name."""
    left, right = flat(a), flat(b)
    return {name: (left.get(name, ABSENT), right.get(name, ABSENT)) for name in varying([a, b])}


def seed_groups(runs: Sequence[Experiment], metric: str, ignoring: Iterable[str] = NOT_DECIDING) -> list[SeedGroup]:
    """`ExperimentAnalyzer.seed_groups` over these runs, in the order of their first one."""
    aside = {"seed", *ignoring}
    members: dict[str, list[Experiment]] = {}
    for run in runs:
        if metric in run.numbers:
            members.setdefault(_key(run, aside), []).append(run)
    configs = [{k: v for k, v in flat(group[0].config).items() if k not in aside} for group in members.values()]
    apart = varying(configs)
    groups = []
    for config, group in zip(configs, members.values(), strict=True):
        counted: dict[Any, Experiment] = {}
        for run in sorted(group, key=lambda run: run.created):
            if math.isfinite(run.numbers[metric]):
                counted[flat(run.config).get("seed")] = run
        if not counted:
            continue
        values = {seed: run.numbers[metric] for seed, run in counted.items()}
        ids = [run.run_id for run in counted.values()]
        rest = [run.run_id for run in group if run.run_id not in ids]
        differs = {name: config[name] for name in apart if name in config}
        groups.append(SeedGroup(config, differs, metric, values, mean_interval(list(values.values())), ids, rest))
    return groups


def _key(run: Experiment, aside: set[str]) -> str:
    config = {key: value for key, value in flat(run.config).items() if key not in aside}
    prints = run.manifest.get("fingerprints") or {}
    same = {key: prints.get(key) for key in ("model", "tokenizer", "text", "data")}
    return canonical_json(plain([run.kind, config, same]))
