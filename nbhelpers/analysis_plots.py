"""How do many runs look beside each other? Runs in, matplotlib figures out, in the colours of plots.py."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator

from nbhelpers.analysis import (
    NOT_DECIDING,
    ExperimentAnalyzer,
    SeedGroup,
    Trajectory,
    lower_is_better_by_name,
    varying,
)
from nbhelpers.collection import Experiment, flat
from nbhelpers.plots import COLORS, LABELS, _figure, _plain, _short
from nbhelpers.stats import Interval, digits, mean_interval

# One colour and mark a strategy, in every figure; none of them is a stage's. (Okabe-Ito and Tol: colour-blind safe.)
STRATEGY_COLORS = {
    "random": "#999933",
    "magnitude": "#CC79A7",
    "entropy": "#56B4E9",
    "gradient": "#E69F00",
    "ablation": "#332288",
    "taylor": "#882255",
    "wanda": "#44AA99",
}
_MARKS = dict(zip(STRATEGY_COLORS, "ovs^DPX", strict=True))
_OTHERS = ("#117733", "#661100", "#6699CC", "#888888")
_STYLES = ("-", "--", ":", "-.")
_STAGES = ("baseline", "pruned", "fine_tuned")
_ASIDE = {"seed", "level", "strategy", "kind", "device", *NOT_DECIDING}
MOST_NAMED = 10  # curves with a line each in the legend


def strategy_color(name: str) -> str:
    """The colour of a strategy; one that is not listed gets the same one of the others every time."""
    return STRATEGY_COLORS.get(name) or _OTHERS[int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(_OTHERS)]


# --- pruning runs ---------------------------------------------------------------------------------------------------


def stages_of_runs(runs: Sequence[Experiment]) -> Figure:
    """Perplexity at each stage, a line for each setting (mean over its seeds), the control as a line across."""
    runs = _pruning(runs)
    series = _series(runs, by_level=True)
    figure = _figure(8.4, 3.6, _generated(runs))
    axes = figure.add_subplot()
    at = range(len(_STAGES))
    looks = _looks([key for key, _ in series])
    for key, group in series:
        means = [_mean(group, f"{stage}/perplexity") for stage in _STAGES]
        points = [(x, found.mean) for x, found in zip(at, means, strict=True) if found]
        label = key[2] if len(series) <= 2 * MOST_NAMED else None
        axes.plot(*zip(*points, strict=True), label=label, markersize=5, linewidth=1.5, **looks[key])
    _control_line(axes, _mean(runs, "control/perplexity"))
    axes.set_xticks(at, [LABELS[stage] for stage in _STAGES])
    axes.set_xlim(-0.15, len(_STAGES) - 0.85)
    axes.set_ylabel("test perplexity (lower is better)")
    axes.set_title(f"{_model(runs)}: perplexity across stages{_seeds_said(runs)}", fontsize=11)
    handles = axes.get_legend_handles_labels()[0]
    if len(series) > 2 * MOST_NAMED:  # too many to tell one from the other
        handles += [_handle(name) for name in _strategies(runs)]
    axes.legend(handles=handles, fontsize=9 if len(handles) <= MOST_NAMED else 7, **_RIGHT)
    _plain(axes)
    return figure


def recovery(runs: Sequence[Experiment]) -> Figure:
    """Left: recovery against level, where pruning hurt. Right: improvement over the baseline, beside the control.

    Means over seeds with their 95 % interval as bars, where there are two seeds.
    """
    runs = [run for run in _pruning(runs) if "fine_tuned/perplexity" in run.numbers]
    if not runs:
        raise ValueError("no run was fine-tuned: recovery needs runs with steps above 0")
    figure = _figure(8.4, 3.7, _generated(runs))
    left, right = figure.subplots(1, 2)
    series = _series(runs)
    looks = _looks([key for key, _ in series])
    levels = sorted({run.config["level"] for run in runs})
    nudge = 0.008 * (levels[-1] - levels[0] or 0.1) * 100
    for place, (key, group) in enumerate(series):
        aside = (place - (len(series) - 1) / 2) * nudge
        _with_bars(left, group, _recovery, aside, looks[key], key[2])
        _with_bars(right, group, _improvement, aside, looks[key], key[2])
    left.axhline(100, color=COLORS["baseline"], linewidth=1)
    left.annotate("back at baseline", (0.01, 100), xycoords=("axes fraction", "data"), xytext=(0, 2), **_SMALL)
    left.set_ylabel("recovery (% of what pruning cost)")
    if not left.containers:
        left.text(0.5, 0.5, "pruning hurt in no run", ha="center", transform=left.transAxes)
    right.axhline(0, color=COLORS["baseline"], linewidth=1)
    right.annotate("baseline", (0.01, 0), xycoords=("axes fraction", "data"), xytext=(0, 2), **_SMALL)
    _control_line(right, _mean_of(runs, lambda run: _improvement(run, "control")))
    right.set_ylabel("improvement over baseline (%)")
    for axes, mark in ((left, 100), (right, 0)):
        means = [y for bars in axes.containers for y in bars.lines[0].get_ydata()]
        segments = [part for bars in axes.containers for lines in bars.lines[2] for part in lines.get_segments()]
        _room_for_values(axes, [*means, mark], [y for part in segments for _, y in part])
        axes.set_xlabel("level (% of heads closed)")
        _plain(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=9, **_below(runs))
    figure.suptitle(f"{_model(runs)}: what fine-tuning brings back{_seeds_said(runs)}", fontsize=11)
    return figure


def quadrants(runs: Sequence[Experiment]) -> Figure:
    """What pruning changed against what fine-tuning changed, in percent of baseline perplexity; a point a run."""
    runs = [run for run in _pruning(runs) if "fine_tuned/perplexity" in run.numbers]
    if not runs:
        raise ValueError("no run was fine-tuned: this figure needs runs with steps above 0")
    figure = _figure(7.4, 4.8, _generated(runs))
    axes = figure.add_subplot()
    points = [(run, _change(run, "baseline", "pruned"), _change(run, "pruned", "fine_tuned")) for run in runs]
    levels = sorted({run.config["level"] for run in runs})
    for run, x, y in points:
        axes.plot(x, y, **_point(run, levels))
    axes.axhline(0, color=COLORS["baseline"], linewidth=1)
    axes.axvline(0, color=COLORS["baseline"], linewidth=1)
    wide = _quadrant_scale(axes, [(x, y) for _, x, y in points])
    axes.plot([-wide, wide], [wide, -wide], color=COLORS["baseline"], linewidth=1, linestyle="--", zorder=1)
    for x, y, across, up, name in _QUADRANTS:
        axes.annotate(name, (0, y), (x, 0), ("data", "axes fraction"), "offset points", ha=across, va=up, **_NAME)
    axes.set_xlabel("change by pruning (% of baseline perplexity)")
    axes.set_ylabel("change by fine-tuning (% of baseline perplexity)")
    axes.set_title(f"{_model(runs)}: pruning against fine-tuning", fontsize=11)
    handles = [_handle(name) for name in _strategies(runs)]
    handles.append(Line2D([], [], color=COLORS["baseline"], linestyle="--", label="back at baseline\n(below: better)"))
    if len(levels) > 1:
        handles += [_size_handle(level, levels) for level in (levels[0], levels[-1])]
    axes.legend(handles=handles, fontsize=9, **_RIGHT)
    _plain(axes)
    return figure


def change_grid(runs: Sequence[Experiment]) -> Figure:
    """The final change of perplexity by strategy and level, in percent of the baseline, a number in each cell."""
    runs = _pruning(runs)
    series = _series(runs)
    levels = sorted({run.config["level"] for run in runs})
    cells = [[_mean_of(_at(group, level), _final) for level in levels] for _, group in series]
    known = [cell.mean for row in cells for cell in row if cell]
    reach = max(map(abs, known)) or 1.0
    figure = _figure(max(4.6, 0.95 * len(levels) + 3.4), max(2.2, 0.48 * len(series) + 1.5), _generated(runs))
    axes = figure.add_subplot()
    shades = [[cell.mean if cell else math.nan for cell in row] for row in cells]
    image = axes.imshow(shades, cmap="PuOr_r", norm=FuncNorm((_root, _square), -reach, reach), aspect="auto")
    for y, row in enumerate(cells):
        for x, cell in enumerate(row):
            text = f"{_signed(cell.mean)}" + (f"\n({cell.n})" if cell.n > 1 else "") if cell else "not run"
            dark = cell is not None and abs(cell.mean) > 0.4 * reach
            axes.text(x, y, text, ha="center", va="center", fontsize=8.5, color="white" if dark else "#222222")
    axes.set_xticks(range(len(levels)), [f"{level * 100:g}" for level in levels])
    axes.set_yticks(range(len(series)), [key[2] for key, _ in series])
    axes.set_xlabel("level (% of heads closed)")
    several = any(cell and cell.n > 1 for row in cells for cell in row)
    axes.set_title(f"{_model(runs)}: final change{', mean of (n) seeds' if several else ''}", fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, label="final change (% of baseline\nperplexity; below 0: better)")
    bar.ax.set_ylim(min(0, *known), max(0, *known) or None)  # shades are symmetric: do not show the half that is empty
    return figure


# --- along the steps ------------------------------------------------------------------------------------------------


def learning_curves_of_runs(losses: Sequence[Trajectory], validation: Sequence[Trajectory] = ()) -> Figure:
    """Training loss beside validation loss, in nats a token, a curve for each run and stage."""
    both = [*losses, *validation]
    figure = _figure(8.4, 3.9, any(curve.generated for curve in both))
    left, right = figure.subplots(1, 2)
    looks = _curve_looks(both)
    _curves(left, losses, looks)
    _curves(right, validation, looks, mark=True)
    left.set_ylabel("training loss (nats a token)")
    right.set_ylabel("validation loss (nats a token)")
    _curve_legend(figure, both, looks)
    return figure


def learning_rates(curves: Sequence[Trajectory]) -> Figure:
    """Learning rate against the optimizer step; runs with the same one share a line."""
    alike: dict[tuple, list[Trajectory]] = {}
    for curve in curves:
        alike.setdefault((*curve.steps, *curve.values), []).append(curve)
    figure = _one_measure([group[0] for group in alike.values()], "learning rate", list(alike.values()))
    figure.axes[0].ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return figure


def throughput(curves: Sequence[Trajectory]) -> Figure:
    """Tokens per second against the optimizer step, from 0, so that heights can be compared."""
    return _one_measure(curves, "throughput (tokens per second)")


def _one_measure(curves: Sequence[Trajectory], label: str, alike: Sequence[Sequence[Trajectory]] = ()) -> Figure:
    figure = _figure(8.4, 3.4, any(curve.generated for curve in curves))
    axes = figure.add_subplot()
    looks = _curve_looks(curves)
    for curve, group in zip(curves, alike, strict=False):
        if len(group) > 1:  # it belongs to no single strategy
            looks[curve.run_id, curve.stage]["color"] = COLORS["baseline"]
    _curves(axes, curves, looks)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    _curve_legend(figure, curves, looks, [len(group) for group in alike])
    return figure


def _curves(axes, curves: Sequence[Trajectory], looks: Mapping, mark: bool = False) -> None:
    for curve in curves:
        look = looks[curve.run_id, curve.stage]
        axes.plot(curve.steps, curve.values, linewidth=1.4, marker="o" if mark else None, markersize=3, **look)
    if not curves:
        axes.set_yticks([])
        axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes)
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain(axes)


def _curve_looks(curves: Sequence[Trajectory]) -> dict[tuple[str, str | None], dict[str, Any]]:
    """Colour by strategy (the control's where it is one, else by run), line style within a colour."""
    used: dict[str, int] = {}
    looks: dict[tuple[str, str | None], dict[str, Any]] = {}
    strategies = {curve.config.get("strategy") for curve in curves}
    plain = [*dict.fromkeys(curve.run_id for curve in curves)]
    palette = [*STRATEGY_COLORS.values(), *_OTHERS]
    for curve in curves:
        key = (curve.run_id, curve.stage)
        if key in looks:
            continue
        strategy = curve.config.get("strategy")
        color = strategy_color(strategy) if strategy else palette[plain.index(curve.run_id) % len(palette)]
        color = COLORS["control"] if curve.stage == "control" else color
        looks[key] = {"color": color, "linestyle": _STYLES[used.get(color, 0) % len(_STYLES)]}
        used[color] = used.get(color, 0) + 1
    if len(looks) > MOST_NAMED and strategies != {None}:  # too many to tell one from the other: show the strategies
        looks = {key: look | {"linestyle": "-", "alpha": 0.55} for key, look in looks.items()}
    return looks


def _curve_legend(figure: Figure, curves: Sequence[Trajectory], looks: Mapping, counts: Sequence[int] = ()) -> None:
    """A line each below the figure; of many curves one for each strategy. counts: how many runs a curve stands for."""
    fields = [name for name in varying([curve.config for curve in curves]) if name.split(".")[-1] not in _UNSAID]
    names = {(curve.run_id, curve.stage): _curve_name(curve, fields) for curve in curves}
    if len(set(names.values())) < len(names):  # their settings do not tell them apart: their names do
        names = {(curve.run_id, curve.stage): _curve_name(curve, fields, curve.run) for curve in curves}
    for at, count in enumerate(counts):
        if count > 1:
            key = curves[at].run_id, curves[at].stage
            names[key] = f"{count} curves alike" if len(counts) == 1 else f"{names[key]} and {count - 1} alike"
    many = len(looks) > MOST_NAMED
    handles: dict[str, Line2D] = {}
    for curve in sorted(curves, key=lambda curve: (curve.stage == "control", _rank(curve.config.get("strategy")))):
        look = looks[curve.run_id, curve.stage]
        short = LABELS["control"] if curve.stage == "control" else str(curve.config.get("strategy") or curve.run)
        name = short if many else names[curve.run_id, curve.stage]
        handles.setdefault(name, Line2D([], [], label=name, linewidth=1.8, **look | {"alpha": 1}))
    some = list(handles.values())[: 2 * MOST_NAMED]
    figure.legend(handles=some, ncols=6 if many else 3, fontsize=8.5, **_below(curves))


def _rank(strategy: object) -> int:
    order = list(STRATEGY_COLORS)
    return order.index(strategy) if strategy in order else len(order)


_UNSAID = {"name", "control", "device", "sample_prompt", "sample_tokens"}


def _curve_name(curve: Trajectory, fields: Iterable[str], name: str = "") -> str:
    values = flat(curve.config)
    parts = [_said(field, values[field]) for field in fields if field in values]
    said = ", ".join([*([name] if name else []), *filter(None, parts)]) or curve.run
    return f"{said} (control)" if curve.stage == "control" else said


# What `runs compare --figures` draws of an analyzer's runs
FIGURES: dict[str, Callable[[ExperimentAnalyzer], Figure]] = {
    "stages": lambda runs: stages_of_runs(runs.experiments),
    "recovery": lambda runs: recovery(runs.experiments),
    "quadrants": lambda runs: quadrants(runs.experiments),
    "change_grid": lambda runs: change_grid(runs.experiments),
    "learning_curves": lambda runs: learning_curves_of_runs(runs.trajectories("loss"), _validation(runs)),
    "learning_rate": lambda runs: learning_rates(runs.trajectories("learning_rate")),
    "throughput": lambda runs: throughput(runs.trajectories("throughput")),
}


def _validation(runs: ExperimentAnalyzer) -> list[Trajectory]:
    return (
        runs.trajectories("validation")
        if any("val_loss" in key for run in runs.experiments for key in run.curves)
        else []
    )


def holds(figure: Figure) -> str:
    """What a figure of many runs shows, as a line that can be compared: of each axes its points and their range.

    Intervals, the control and lines that only divide are no points.
    """
    parts = []
    for axes in figure.axes:
        drawn = [line for line in axes.lines if line.get_transform() == axes.transData]
        drawn = [line for line in drawn if line.get_marker() not in ("_", "|") and not _divides(line)]
        values = [y for line in drawn for y in line.get_ydata()]
        values += [value for image in axes.images for value in image.get_array().ravel() if math.isfinite(value)]
        if values:
            name = axes.get_ylabel().partition(" (")[0] or "cells"
            parts.append(f"{name}: {len(values)} points from {min(values):.3g} to {max(values):.3g}")
    return "; ".join(parts)


def _divides(line: Line2D) -> bool:
    return line.get_linestyle() == "--" and line.get_color() == COLORS["baseline"]


# --- any runs -------------------------------------------------------------------------------------------------------


def by_setting(
    groups: Sequence[SeedGroup],
    group_by: str | None = None,
    color_by: str | None = None,
    generated: bool = False,
    title: str = "",
) -> Figure:
    """One metric of runs of any kind: a mean with its interval for each setting, and a small point for each seed.

    groups: of `ExperimentAnalyzer.seed_groups`. group_by: the setting along x; color_by: the one that has the colours.
    ValueError where there is no group.
    """
    if not groups:
        raise ValueError("no finished run has this metric: choose another metric or wait for a run to finish")
    metric = groups[0].metric
    figure = _figure(8.4, 3.7, generated)
    axes = figure.add_subplot()
    places = _places([group.config.get(group_by) for group in groups])
    series = _setting_series(groups, group_by, color_by)
    numeric = all(isinstance(place, int | float) and not isinstance(place, bool) for place in places)
    several = [group for group in groups if group.interval.low is not None]
    for at, ((color, style, label), members) in enumerate(series):
        aside = 0.0 if len(series) == 1 else 0.44 * (at / (len(series) - 1) - 0.5)
        members = sorted(members, key=lambda group: places.index(group.config.get(group_by)))
        xs = [places.index(group.config.get(group_by)) + aside for group in members]
        means = [group.interval.mean for group in members]
        halves = [0.0 if g.interval.high is None else g.interval.high - g.interval.mean for g in members]
        look = {"color": color, "marker": _MARKS.get(label.split(",")[0], "o"), "markersize": 6, "linewidth": 1.2}
        line = style if numeric and len(members) > 1 else "none"
        bars = halves if any(halves) else None
        axes.errorbar(xs, means, yerr=bars, label=label, linestyle=line, elinewidth=1, capsize=2.5, **look)
        for x, group in zip(xs, members, strict=True):
            if len(group.values) > 1:
                values = list(group.values.values())
                axes.plot([x] * len(values), values, "o", color=color, markersize=2.8, alpha=0.55, zorder=4)
    ends = [end for group in groups for end in (group.interval.low, group.interval.high) if end is not None]
    _room_for_values(axes, [value for group in groups for value in group.values.values()], ends)
    axes.set_xticks(range(len(places)), [_place_name(group_by, place) for place in places])
    if max(len(_place_name(group_by, place)) for place in places) * len(places) > 70:
        axes.tick_params(axis="x", labelrotation=25)
    axes.set_xlim(-0.5, len(places) - 0.5)
    axes.set_xlabel(AXIS_NAMES.get(group_by, str(group_by).replace("_", " ")) if group_by else "")
    axes.set_ylabel(metric_name(metric))
    said = (
        f"mean and 95 % interval over {max(group.interval.n for group in several)} seeds"
        if several
        else "one seed a setting"
    )
    said += ", a small point a seed" if several else ""
    axes.set_title(f"{title}: {said}" if title else said, fontsize=11)
    if len(series) > 1:
        axes.legend(fontsize=9 if len(series) <= MOST_NAMED else 7, **_RIGHT)
    _plain(axes)
    return figure


AXIS_NAMES = {"level": "level (% of heads closed)"}
_UNITS = {
    "loss": "nats a token",
    "nll": "nats a token",
    "percent": "%",
    "seconds": "s",
    "bytes": "bytes",
    "ms": "ms",
}


def metric_name(metric: str) -> str:
    """A metric as an axis says it: in words, with its unit, and which way is better where its name tells.

    >>> metric_name("fine_tuned/perplexity"), metric_name("control/best_val_loss")
    ('perplexity, fine-tuned (lower is better)', 'best val loss, control (unpruned) (nats a token, lower is better)')
    """
    stage, _, last = metric.rpartition("/")
    words = last.split("_")
    unit = next((_UNITS[word] for word in words if word in _UNITS), None)
    try:
        better = "lower is better" if lower_is_better_by_name(metric) else "higher is better"
    except ValueError:
        better = None
    said = " ".join(word for word in words if word not in ("percent", "seconds", "ms") or len(words) == 1)
    stage = f", {LABELS.get(stage, stage.replace('_', ' '))}" if stage else ""
    more = ", ".join(filter(None, [unit, better]))
    return f"{said}{stage} ({more})" if more else f"{said}{stage}"


def _places(values: Iterable[Any]) -> list[Any]:
    """The different values in order: numbers by size, words as they come."""
    found = list(dict.fromkeys(values))
    numbers = [value for value in found if isinstance(value, int | float)]
    return sorted(found) if len(numbers) == len(found) else found


def _place_name(field: str | None, value: Any) -> str:
    if field == "level" and isinstance(value, int | float):
        return f"{value * 100:g}"
    return "" if field is None else f"{value:g}" if isinstance(value, float) else _short(str(value))


def _setting_series(
    groups: Sequence[SeedGroup], group_by: str | None, color_by: str | None
) -> list[tuple[tuple[str, str, str], list[SeedGroup]]]:
    """((colour, line style, label), groups) of each setting but the one along x."""
    members: dict[tuple[Any, str], list[SeedGroup]] = {}
    for group in groups:
        rest = {name: value for name, value in group.differs.items() if name not in (group_by, color_by)}
        said = ", ".join(filter(None, (_said(name, value) for name, value in rest.items())))
        members.setdefault((group.config.get(color_by) if color_by else None, said), []).append(group)
    colors = {value: at for at, value in enumerate(dict.fromkeys(value for value, _ in members))}
    palette, used, found = [*STRATEGY_COLORS.values(), *_OTHERS], {}, []
    for value, said in sorted(members, key=lambda key: (_rank(key[0]), colors[key[0]])):
        color = strategy_color(value) if color_by == "strategy" else palette[(colors[value] + 4) % len(palette)]
        style = _STYLES[used.setdefault(value, 0) % len(_STYLES)]
        used[value] += 1
        name = "" if color_by is None else str(value) if color_by in ("strategy", "model") else _said(color_by, value)
        found.append(((color, style, ", ".join(filter(None, [_short(name), said])) or "all"), members[value, said]))
    return found


def _room_for_values(axes, values: Sequence[float], ends: Sequence[float]) -> None:
    """Where intervals are many times as wide as the values differ, the values decide the range and bars are cut off."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    if ends and max(ends) - min(ends) > 4 * span:
        bottom = low - 1.2 * span
        axes.set_ylim(max(bottom, 0) if low > 0 else bottom, high + 1.2 * span)
        axes.annotate("bars are cut off", (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=8)


# --- pieces ---------------------------------------------------------------------------------------------------------

_RIGHT = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}


def _below(drawn: Sequence[Experiment] | Sequence[Trajectory]) -> dict[str, Any]:
    """Where a legend below the axes goes: above the stamp, where there is one."""
    pad = 1.4 if any(one.generated for one in drawn) else 0.4  # of the font's size; the layout leaves room for it
    return {"loc": "outside lower center", "borderpad": pad, "frameon": False}


_QUADRANTS = (
    (5, 0.99, "left", "top", "both hurt"),
    (5, 0.01, "left", "bottom", "pruning hurt,\nfine-tuning helped"),
    (-5, 0.99, "right", "top", "pruning helped,\nfine-tuning hurt"),
    (-5, 0.01, "right", "bottom", "both\nhelped"),
)
_NAME = {"fontsize": 9, "color": "#555555", "style": "italic"}
_SMALL = {"textcoords": "offset points", "fontsize": 8, "color": "#555555"}


def _pruning(runs: Sequence[Experiment]) -> list[Experiment]:
    """The finished pruning runs; ValueError where there is none, or where they are of several models or texts."""
    kept = [
        run
        for run in runs
        if run.status == "finished"
        and {"strategy", "level", "model"} <= run.config.keys()
        and {"baseline/perplexity", "pruned/perplexity"} <= run.numbers.keys()
    ]
    if not kept:
        raise ValueError(f"no finished pruning run among these {len(runs)} runs: run nbhelpers prune-heads first")
    for field in ("model", "text"):
        found = sorted({str(run.config.get(field)) for run in kept})
        if len(found) > 1:
            raise ValueError(f"runs of several {field}s ({', '.join(found)}): choose one with filter({field}=...)")
    return kept


def _series(runs: Sequence[Experiment], by_level: bool = False) -> list[tuple[tuple[str, int, str], list[Experiment]]]:
    """((strategy, which one of this strategy, label), runs) of each setting but seed (and level), by strategy."""
    aside = _ASIDE - ({"level"} if by_level else set())
    groups: dict[tuple[str, str], list[Experiment]] = {}
    settings = [{k: v for k, v in flat(run.config).items() if k not in aside} for run in runs]
    apart = varying(settings)
    for run, setting in zip(runs, settings, strict=True):
        said = ", ".join(filter(None, (_said(name, setting.get(name)) for name in apart)))
        groups.setdefault((run.config["strategy"], said), []).append(run)
    keys = sorted(groups, key=lambda key: (_rank(key[0]), key))
    counts: dict[str, int] = {}
    found = []
    for strategy, said in keys:
        place = counts[strategy] = counts.get(strategy, -1) + 1
        found.append(((strategy, place, f"{strategy}, {said}" if said else strategy), groups[strategy, said]))
    return found


def _said(field: str, value: Any) -> str:
    """A setting as a few words of a legend."""
    name = field.rsplit(".", 1)[-1].replace("_", " ")
    if isinstance(value, bool):
        return name if value else ""
    if field == "level" and isinstance(value, int | float):
        return f"{value * 100:g} %"
    if field in ("strategy", "model"):
        return _short(str(value))
    return "" if value is None else f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def _looks(keys: Iterable[tuple[str, int, str]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    return {
        key: {
            "color": strategy_color(key[0]),
            "marker": _MARKS.get(key[0], "o"),
            "linestyle": _STYLES[key[1] % len(_STYLES)],
        }
        for key in keys
    }


def _at(runs: Sequence[Experiment], level: float) -> list[Experiment]:
    return [run for run in runs if run.config["level"] == level]


def _mean(runs: Sequence[Experiment], metric: str) -> Interval | None:
    return _mean_of(runs, lambda run: run.numbers.get(metric))


def _mean_of(runs: Sequence[Experiment], measure) -> Interval | None:
    """Mean over seeds of a measure, one value a seed (their mean where a seed ran twice); None without any."""
    by_seed: dict[Any, list[float]] = {}
    for run in runs:
        value = measure(run)
        if value is not None and math.isfinite(value):
            by_seed.setdefault(run.config.get("seed"), []).append(value)
    values = [math.fsum(found) / len(found) for found in by_seed.values()]
    return mean_interval(values) if values else None


def _recovery(run: Experiment) -> float | None:
    return run.numbers.get("recovery_percent")


def _improvement(run: Experiment, stage: str = "fine_tuned") -> float | None:
    """(baseline - tuned) / baseline * 100."""
    return -_change(run, "baseline", stage) if f"{stage}/perplexity" in run.numbers else None


def _change(run: Experiment, before: str, after: str) -> float:
    """(after - before) / baseline * 100: perplexities as percent of the baseline's."""
    of = {stage: run.numbers[f"{stage}/perplexity"] for stage in (before, after, "baseline")}
    return (of[after] - of[before]) / of["baseline"] * 100


def _final(run: Experiment) -> float:
    return _change(run, "baseline", "fine_tuned" if "fine_tuned/perplexity" in run.numbers else "pruned")


def _with_bars(axes, group: Sequence[Experiment], measure, aside: float, look: Mapping, label: str) -> None:
    """Mean against level with the interval as a bar; a mean of one seed has none."""
    levels = sorted({run.config["level"] for run in group})
    found = [(level, _mean_of(_at(group, level), measure)) for level in levels]
    points = [(level * 100 + aside, interval) for level, interval in found if interval]
    if not points:
        return
    half = [interval.high - interval.mean if interval.high is not None else 0.0 for _, interval in points]
    axes.errorbar(
        [x for x, _ in points],
        [interval.mean for _, interval in points],
        yerr=half if any(half) else None,
        label=label,
        markersize=4.5,
        linewidth=1.4,
        elinewidth=0.9,
        capsize=2,
        **look,
    )


def _control_line(axes, found: Interval | None) -> None:
    """The control across the figure: its mean over seeds, and its interval as a band."""
    if found is None:
        return
    axes.axhline(found.mean, color=COLORS["control"], linewidth=1.6, linestyle=(0, (6, 2)), label=LABELS["control"])
    if found.low is not None:
        axes.axhspan(found.low, found.high, color=COLORS["control"], alpha=0.12, linewidth=0)


def _point(run: Experiment, levels: Sequence[float]) -> dict[str, Any]:
    strategy = run.config["strategy"]
    size = _size(run.config["level"], levels)
    look = {"marker": _MARKS.get(strategy, "o"), "color": strategy_color(strategy), "markersize": size}
    return look | {"linestyle": "none", "alpha": 0.85, "markeredgecolor": "white", "markeredgewidth": 0.5}


def _size(level: float, levels: Sequence[float]) -> float:
    return 4.5 + 4 * levels.index(level) / max(len(levels) - 1, 1)


def _quadrant_scale(axes, points: Sequence[tuple[float, float]]) -> float:
    """Room for all four quadrants; logarithmic far out where only a few points lie there. Returns the largest limit."""
    sizes = sorted(abs(value) for point in points for value in point)
    reach, middle = (sizes[-1] or 1.0) * 1.3, sizes[len(sizes) // 2]
    least = 0.4 * reach
    if sizes[-1] > 8 * middle > 0:
        least = near = 10 ** math.floor(math.log10(middle))
        ticks = [near * 10**power for power in range(12) if near * 10**power <= reach]
        for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
            set_scale("symlog", linthresh=near)
            axis.set_major_locator(FixedLocator([*(-tick for tick in ticks), 0, *ticks]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:+g}" if value else "0"))
    for values, set_limits in zip(zip(*points, strict=True), (axes.set_xlim, axes.set_ylim), strict=True):
        set_limits(min(-least, 1.3 * min(values)), max(least, 1.3 * max(values)))
    return reach


def _handle(strategy: str) -> Line2D:
    look = {"marker": _MARKS.get(strategy, "o"), "color": strategy_color(strategy)}
    return Line2D([], [], linestyle="none", markersize=7, label=strategy, **look)


def _size_handle(level: float, levels: Sequence[float]) -> Line2D:
    look = {"marker": "o", "color": "#BBBBBB", "markersize": _size(level, levels)}
    return Line2D([], [], linestyle="none", label=f"{level * 100:g} % of heads", **look)


def _strategies(runs: Sequence[Experiment]) -> list[str]:
    return list(dict.fromkeys(key[0] for key, _ in _series(runs)))


def _root(values):
    """Signed square root: small changes get a shade of their own beside a large one."""
    return numpy.sign(values) * numpy.sqrt(numpy.abs(values))


def _square(values):
    return numpy.sign(values) * numpy.square(values)


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else '−' if value < 0 else ''}{digits(abs(value))}"


def _model(runs: Sequence[Experiment]) -> str:
    return _short(str(runs[0].config["model"]))


def _generated(runs: Sequence[Experiment]) -> bool:
    return any(run.generated for run in runs)


def _seeds_said(runs: Sequence[Experiment]) -> str:
    seeds = {run.config.get("seed") for run in runs}
    return f" (mean over up to {len(seeds)} seeds)" if len(seeds) > 1 else ""
