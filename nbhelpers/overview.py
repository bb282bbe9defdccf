"""What do these runs say, put in order? Coverage, settings with intervals, figures one a model, facts, one archive."""

from __future__ import annotations

import json
import math
import statistics
import zipfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbhelpers import analysis_plots, example_grid, plots, selection
from nbhelpers.analysis import SHOWN, ExperimentAnalyzer, SeedGroup, diff_configs, lower_is_better_by_name, varying
from nbhelpers.collection import Experiment
from nbhelpers.errors import is_bad_input, one_line
from nbhelpers.ledger import Ledger
from nbhelpers.plots_runs import strategy_color, strategy_rank
from nbhelpers.plots_runs_settings import by_setting
from nbhelpers.records import slug, write_atomic
from nbhelpers.registry import unknown
from nbhelpers.stats import digits, student_t_quantile
from nbhelpers.tables import aligned, counted, csv_text, shown, withheld

FIGURES = {
    "by_setting": "the metric by setting",
    "change_grid": "final change by strategy and level",
    "recovery": "recovery against level",
    "quadrants": "pruning against fine-tuning",
    "stages": "perplexity across stages",
    "learning_curves": "learning curves",
    "learning_rate": "learning rate",
    "throughput": "throughput",
}
NONE = "none"  # said where nothing shall be grouped by, or have colours
MOST_PARTS = 4  # models (or texts) that get a figure each
_NOT_A_SETTING = ("name", "kind", "seed", "sample_prompt", "sample_tokens", "device")
_APART = ("model", "text")  # numbers of different ones are not drawn into one figure


@dataclass
class Overview:
    """Runs, and what is asked of them. None: what the runs themselves suggest, said by the properties."""

    runs: ExperimentAnalyzer
    folder: Path
    metric: str | None = None
    group_by: str | None = None
    color_by: str | None = None
    stamp: str = field(init=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        self.stamp = example_grid.stamp(self.folder)
        self.metric = self.metric or self.runs.headline()
        settings = self.settings()
        free = self.color_by is None
        if free:
            self.color_by = next((name for name in ("strategy", "method") if name in settings), None)
        if self.group_by is None:
            rest = [name for name in settings if name not in (self.color_by, *_APART)]
            first = ["level", *(name for name in rest if self._is_numeric(name)), *rest, self.color_by, "model"]
            self.group_by = next((name for name in first if name in settings), None)
        if free and self.color_by == self.group_by:
            self.color_by = None
        self.color_by = None if self.color_by == NONE else self.color_by
        self.group_by = None if self.group_by == NONE else self.group_by

    def _is_numeric(self, name: str) -> bool:
        values = [selection.value_of(run, name) for run in self.runs.experiments]
        return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)

    def settings(self) -> list[str]:
        """The config fields in which the runs differ and by which they can be grouped."""
        names = varying([run.config for run in self.runs.experiments])
        return [name for name in names if name.split(".")[-1] not in _NOT_A_SETTING]

    def metrics(self) -> list[str]:
        """The metrics that any of the runs has, those that people ask for first in front."""
        there = self.runs.metrics()
        first = [name for name in dict.fromkeys([self.runs.headline(), *SHOWN]) if name in there]
        return [*first, *(name for name in there if name not in first)]

    def parts(self) -> dict[str, ExperimentAnalyzer]:
        """label -> runs that may share a figure: of one model and one text."""
        names = [name for name in _APART if name in varying([run.config for run in self.runs.experiments])]
        found: dict[str, list[str]] = {}
        for run in self.runs.experiments:
            values = [str(selection.value_of(run, name)) for name in names]
            found.setdefault(", ".join(plots._short(value) for value in values), []).append(run.run_id)
        return {
            label: self.runs.where(lambda run, ids=frozenset(ids): run.run_id in ids) for label, ids in found.items()
        }

    # --- tables

    def groups(self, runs: ExperimentAnalyzer | None = None) -> list[SeedGroup]:
        """Settings with their mean over seeds, in the order of the table; [] where no finished run has the metric."""
        runs = self.runs if runs is None else runs
        finished = [run for run in runs.experiments if run.status == "finished"]
        if self.metric is None or not any(self.metric in run.numbers for run in finished):
            return []
        order = [name for name in ("model", self.color_by, self.group_by) if name]
        return sorted(
            runs.seed_groups(self.metric),
            key=lambda group: [_sort_key(name, group.config.get(name)) for name in [*order, *group.differs]],
        )

    def setting_rows(self) -> list[dict[str, Any]]:
        """A row a setting: what sets it apart, then mean, interval and how many seeds."""
        groups = self.groups()
        apart = dict.fromkeys(name for group in groups for name in group.differs)
        first = [name for name in ("model", self.color_by, self.group_by) if name in apart]
        names = [*first, *(name for name in apart if name not in first)]
        return [
            {
                **{name: group.config.get(name) for name in names},
                str(self.metric): group.interval.mean,
                "low": group.interval.low,
                "high": group.interval.high,
                "seeds": group.interval.n,
            }
            for group in groups
        ]

    def settings_text(self) -> str:
        """The settings for people: three digits, with the interval over seeds where there are two."""
        rows = [
            {
                **{
                    name: value_text(row[name])
                    for name in row
                    if name not in (str(self.metric), "low", "high", "seeds")
                },
                str(self.metric): row[str(self.metric)],
                "95 % interval": "-" if row["low"] is None else f"[{shown(row['low'])}, {shown(row['high'])}]",
                "seeds": row["seeds"],
            }
            for row in self.setting_rows()
        ]
        return aligned(rows) if rows else f"no finished run has {self.metric or 'a metric'} yet"

    def best(self) -> dict[str, tuple[str, float]]:
        """part -> (run, value) of the finished run that is best by the metric; a part that has none is not in it.

        ValueError where the metric's name does not tell which way is better.
        """
        lower = lower_is_better_by_name(self.metric) if self.metric else True
        found = {}
        for label, runs in self.parts().items():
            there = [run for run in runs.experiments if run.status == "finished"]
            if any(math.isfinite(run.numbers.get(self.metric, math.nan)) for run in there):
                found[label] = runs.get_best_experiment(self.metric, lower)
        return found

    def best_lines(self) -> list[str]:
        """A line a model: the best setting by its mean over seeds, and the best run. ValueError as for `best`."""
        word = "lowest" if self.metric and lower_is_better_by_name(self.metric) else "highest"
        lines, parts = [], self.parts()
        for label, (name, value) in self.best().items():
            setting = self._best_of(self.groups(parts[label]))
            said = ", ".join(f"{key} {value_text(item)}" for key, item in setting.differs.items())
            number, mean = setting.interval.n, digits(setting.interval.mean)
            line = f"{label + ': ' if label else ''}{word} {self.metric} "
            if number > 1 and said:
                line += f"as a mean over {number} seeds {mean} ({said}), "
            lines.append(f"{line}of a single run {digits(value)} ({name})")
        return lines

    def _best_of(self, groups: Sequence[SeedGroup]) -> SeedGroup:
        lower = lower_is_better_by_name(str(self.metric))
        return (min if lower else max)(groups, key=lambda group: group.interval.mean)

    def best_settings(self) -> set[int]:
        """The places in the table of the best setting of each model; none where the way to better is not known."""
        groups = self.groups()
        try:
            best = [self._best_of(self.groups(runs)) for runs in self.parts().values() if self.groups(runs)]
        except ValueError:
            return set()
        ids = {tuple(group.run_ids) for group in best}
        return (
            {place for place, group in enumerate(groups) if tuple(group.run_ids) in ids} if len(groups) > 1 else set()
        )

    def best_text(self) -> str:
        """`best_lines` for a cell."""
        if self.metric is None:
            return "nothing to compare yet: no finished run holds a metric"
        return "\n".join(self.best_lines()) or f"no finished run has a finite {self.metric} yet"

    def color(self, row: dict[str, Any]) -> str | None:
        """The colour that a row of the table has in the figures."""
        return strategy_color(row[self.color_by]) if self.color_by == "strategy" else None

    def seeds_note(self) -> str:
        """How wide an interval is by its very number of seeds: what a reader of two seeds has to know."""
        least = min((group.interval.n for group in self.groups()), default=0)
        if least == 0:
            return ""
        if least == 1:
            return "where there is one seed there is no interval"
        wide = student_t_quantile(0.975, least - 1)
        return f"with {least} seeds a 95 % interval is {wide:.1f} standard errors each way: more seeds make it narrow"

    def contrast_text(self) -> str:
        """In what the best and the worst setting of each model differ, and how far apart they are; by their means."""
        lines = []
        for label, runs in self.parts().items():
            groups = self.groups(runs)
            if len(groups) < 2:
                continue
            best = self._best_of(groups)
            worst = max(groups, key=lambda group: abs(group.interval.mean - best.interval.mean))
            differs = diff_configs(best.config, worst.config)
            said = ", ".join(f"{name} {value_text(a)} -> {value_text(b)}" for name, (a, b) in differs.items())
            means = f"{digits(best.interval.mean)} -> {digits(worst.interval.mean)}"
            lines.append(f"{label + ': ' if label else ''}from best to worst {self.metric} {means}: {said}")
        return "\n".join(lines) or "there are not two settings to compare"

    def summary(self) -> str:
        """The stamp of example runs, coverage, how many runs of which kind and status, and what could not be read."""
        runs = self.runs.experiments
        lines = [self.stamp] if self.stamp else []
        lines += [line] if (line := coverage_line(self.folder)) else []
        lines.append(f"{len(runs)} runs" + (f": {counted(run.status for run in runs)}" if runs else " fit the filter"))
        if runs:
            lines.append(f"kinds: {counted(run.kind for run in runs)}")
        if any(run.generated for run in runs) and not self.stamp:
            lines.append("measured on text generated by this project")
        return "\n".join([*lines, *(f"note: {problem}" for problem in self.runs.problems)])

    # --- figures

    def figures(self, name: str) -> dict[str, plots.Figure]:
        """part -> figure, for the first MOST_PARTS models or texts. ValueError, which says why, where there is none.

        LookupError for a name that is not in FIGURES.
        """
        if name not in FIGURES:
            raise LookupError(unknown("figure", name, FIGURES))
        drawn, refused = {}, "no run fits the filter: take a condition away"
        for label, runs in list(self.parts().items())[:MOST_PARTS]:
            try:
                drawn[label] = self._figure(name, label, runs)
            except Exception as error:
                if not is_bad_input(error):
                    raise
                refused = one_line(error)
        if not drawn:
            raise ValueError(refused)
        return drawn

    def _figure(self, name: str, label: str, runs: ExperimentAnalyzer) -> plots.Figure:
        if name == "by_setting":
            generated = any(run.generated for run in runs.experiments)
            figure = by_setting(self.groups(runs), self.group_by, self.color_by, generated, label)
        elif name == "learning_curves" and not any(key for run in runs.experiments for key in run.curves):
            raise ValueError("nothing was logged along the steps")
        else:
            figure = analysis_plots.FIGURES[name](runs)
        if label and not _has_title(figure, label):
            figure.suptitle(label, fontsize=11)
        if said := _short_stamp(self.folder):
            figure.text(0.005, 0.01, said, ha="left", va="bottom", fontsize=8, color="#777777")
        return figure

    def drawable(self) -> dict[str, str | None]:
        """figure -> None where it can be drawn of these runs, else why not, in one line."""
        found: dict[str, str | None] = {}
        for name in FIGURES:
            try:
                self.figures(name)
                found[name] = None
            except ValueError as error:
                found[name] = one_line(error)
        return found

    # --- what is checked, and what leaves

    def facts(self) -> list[dict[str, Any]]:
        """What was checked about what is shown, each {"ok", "says", "saw"}; recomputed from the files themselves."""
        runs = [run for run in self.runs.experiments if run.status == "finished"]
        facts = []
        if (found := coverage(self.folder)) is not None:
            facts.append(_fact(not found["twice"], "no job of the plan counts twice", f"{found['twice']} done twice"))
        if self.stamp:
            place = next(at for at in (self.folder, *self.folder.parents) if (at / example_grid.CARD).is_file())
            changed = example_grid.changed_files(place)
            facts.append(_fact(not changed, "the example runs are those that were recorded", f"{len(changed)} changed"))
        wrong, number = self._not_as_in_the_files(runs)
        if number:
            says = f"each mean of {self.metric} is that of the values in the runs' own files"
            facts.append(_fact(not wrong, says, f"{number} values read again, {len(wrong)} differ"))
        checked = [fact for run in runs for fact in (run.result or {}).get("facts") or [] if isinstance(fact, dict)]
        if checked:
            bad = sum(not fact.get("ok") for fact in checked)
            says = "what the runs checked about themselves holds"
            facts.append(_fact(not bad, says, f"{len(checked) - bad} of {len(checked)} facts"))
        return facts

    def _not_as_in_the_files(self, runs: Sequence[Experiment]) -> tuple[list[str], int]:
        """Settings whose mean is not that of their runs' files, read here anew, and how many values were read."""
        folders, wrong, number = {run.run_id: run.folder for run in runs}, [], 0
        for group in self.groups():
            values = [_in_result(folders[run_id], self.metric) for run_id in group.run_ids]
            if None in values:
                continue
            number += len(values)
            if not math.isclose(statistics.fmean(values), group.interval.mean, rel_tol=1e-12):
                wrong.append(str(group.differs))
        return wrong, number

    def export(self, path: str | Path) -> Path:
        """One zip: runs.csv (a row a run), values.csv (a row a logged value), settings.csv, every figure that can be
        drawn as SVG and PNG, and about.txt. The same bytes for the same runs and questions."""
        files: dict[str, bytes | str] = {
            "runs.csv": self.runs.csv("wide"),
            "values.csv": self.runs.csv("long"),
            "settings.csv": csv_text([_leaving(row) for row in self.setting_rows()]),
        }
        left_out = []
        for name in FIGURES:
            try:
                found = self.figures(name)
            except ValueError as error:
                left_out.append(f"not drawn: {name}: {one_line(error)}")
                continue
            for label, figure in found.items():
                place = f"figures/{slug(f'{name}-{label}' if label else name)}"
                files |= {f"{place}.svg": plots.svg(figure), f"{place}.png": plots.png(figure)}
        asked = f"metric {self.metric}, grouped by {self.group_by}, colours by {self.color_by}"
        files["about.txt"] = "\n".join([self.summary(), asked, *left_out]) + "\n"
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, example_grid.zipped(files))
        return path

    @staticmethod
    def contents(archive: str | Path) -> str:
        """What an export holds, a line a file or, of figures, a line each in both forms."""
        with zipfile.ZipFile(archive) as bundle:
            names = bundle.namelist()
        tables = [f"  {name}" for name in names if not name.startswith("figures/")]
        figures = dict.fromkeys(name.rpartition(".")[0] for name in names if name.startswith("figures/"))
        return "\n".join([*tables, *(f"  {name} (svg, png)" for name in figures)])


# --- coverage -------------------------------------------------------------------------------------------------------


def coverage(folder: str | Path) -> dict[str, Any] | None:
    """The counts of a sweep's folder, and `twice`: jobs with several finished runs. None where there is no plan."""
    folder = Path(folder)
    if not (folder / "plan.json").is_file():
        return None
    ledger = Ledger(folder)
    done = Counter(
        path.parent.name.rpartition("-")[0] for path in (folder / "runs").glob("*/result.json") if path.is_file()
    )
    return ledger.coverage() | {"twice": sum(number > 1 for number in done.values())}


def coverage_line(folder: str | Path) -> str:
    """`48 planned, 48 finished, 0 failed, 0 running, 0 missing, 0 twice`; empty for a folder that is no sweep."""
    found = coverage(folder)
    if found is None:
        return ""
    return f"{counts(found)}, {found['twice']} twice"


def counts(found: Mapping[str, Any]) -> str:
    """The counts of a sweep in words; trials that a search ended early are named where there are some."""
    names = {"planned": "planned", "done": "finished", "failed": "failed", "running": "running", "missing": "missing"}
    if found["pruned"]:
        names["pruned"] = "ended early by the search"
    return ", ".join(f"{found[key]} {said}" for key, said in names.items())


# --- pieces ---------------------------------------------------------------------------------------------------------


def value_text(value: Any) -> str:
    """A setting as it was written: 0.1, not 0.100."""
    return f"{value:g}" if isinstance(value, float) else shown(value)


def _fact(ok: bool, says: str, saw: str) -> dict[str, Any]:
    return {"ok": ok, "says": f"{says} ({saw})", "saw": saw}


def _in_result(run: Path, metric: str | None) -> float | None:
    """One number straight from result.json; None where it does not stand there."""
    try:
        value = json.loads((run / "result.json").read_text(encoding="utf-8"))
        for part in str(metric).split("/"):
            value = value[part]
    except (OSError, LookupError, TypeError, ValueError):
        return None
    return value if isinstance(value, int | float) and not isinstance(value, bool) else None


def _sort_key(name: str, value: Any) -> tuple:
    if name == "strategy":
        return (0, strategy_rank(value), str(value))
    return (0, value, "") if isinstance(value, int | float) else (1, 0, str(value))


def _has_title(figure: plots.Figure, label: str) -> bool:
    titles = [figure.get_suptitle(), *(axes.get_title() for axes in figure.axes)]
    return any(label in title for title in titles)


def _short_stamp(folder: Path) -> str:
    said = example_grid.card(folder)
    return f"example runs recorded {said['recorded']} with nbhelpers {said['nbhelpers']}" if said else ""


def _leaving(row: dict[str, Any]) -> dict[str, Any]:
    return {name: withheld(name, value) for name, value in row.items()}
