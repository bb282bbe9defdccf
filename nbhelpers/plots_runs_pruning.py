"""What did pruning cost in many runs, and what did fine-tuning bring back? By stage, level, quadrant, and as a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
from matplotlib.colors import FuncNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter

from nbhelpers.analysis import NOT_DECIDING, varying
from nbhelpers.collection import Experiment, flat
from nbhelpers.plots import COLORS, LABELS, _figure, _plain, _short
from nbhelpers.plots_runs import (
    LEGEND_RIGHT,
    MARKS,
    MOST_NAMED,
    legend_below,
    room_for_values,
    setting_said,
    strategy_color,
    strategy_handle,
    strategy_looks,
    strategy_rank,
)
from nbhelpers.stats import Interval, digits, mean_interval

_STAGES = ("baseline", "pruned", "fine_tuned")
_ASIDE = {"seed", "level", "strategy", "kind", "device", *NOT_DECIDING}
_QUADRANTS = (
    (5, 0.99, "left", "top", "both hurt"),
    (5, 0.01, "left", "bottom", "pruning hurt,\nfine-tuning helped"),
    (-5, 0.99, "right", "top", "pruning helped,\nfine-tuning hurt"),
    (-5, 0.01, "right", "bottom", "both\nhelped"),
)
_NAME = {"fontsize": 9, "color": "#555555", "style": "italic"}
_SMALL = {"textcoords": "offset points", "fontsize": 8, "color": "#555555"}


def stages_of_runs(runs: Sequence[Experiment]) -> Figure:
    """Perplexity at each stage, a line for each setting (mean over its seeds), the control as a line across."""
    runs = _pruning(runs)
    series = _series(runs, by_level=True)
    figure = _figure(8.4, 3.6, _generated(runs))
    axes = figure.add_subplot()
    at = range(len(_STAGES))
    looks = strategy_looks([key for key, _ in series])
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
        handles += [strategy_handle(name) for name in _strategies(runs)]
    axes.legend(handles=handles, fontsize=9 if len(handles) <= MOST_NAMED else 7, **LEGEND_RIGHT)
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
    looks = strategy_looks([key for key, _ in series])
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
        room_for_values(axes, [*means, mark], [y for part in segments for _, y in part])
        axes.set_xlabel("level (% of heads closed)")
        _plain(axes)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, ncols=5, fontsize=9, **legend_below(runs))
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
    handles = [strategy_handle(name) for name in _strategies(runs)]
    handles.append(Line2D([], [], color=COLORS["baseline"], linestyle="--", label="back at baseline\n(below: better)"))
    if len(levels) > 1:
        handles += [_size_handle(level, levels) for level in (levels[0], levels[-1])]
    axes.legend(handles=handles, fontsize=9, **LEGEND_RIGHT)
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


# --- pieces ---------------------------------------------------------------------------------------------------


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
        said = ", ".join(filter(None, (setting_said(name, setting.get(name)) for name in apart)))
        groups.setdefault((run.config["strategy"], said), []).append(run)
    keys = sorted(groups, key=lambda key: (strategy_rank(key[0]), key))
    counts: dict[str, int] = {}
    found = []
    for strategy, said in keys:
        place = counts[strategy] = counts.get(strategy, -1) + 1
        found.append(((strategy, place, f"{strategy}, {said}" if said else strategy), groups[strategy, said]))
    return found


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
    look = {"marker": MARKS.get(strategy, "o"), "color": strategy_color(strategy), "markersize": size}
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
