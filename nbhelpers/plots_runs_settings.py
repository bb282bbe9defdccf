"""How does one metric depend on the settings, in runs of any kind? Means with intervals, and each seed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.figure import Figure

from nbhelpers.analysis import SeedGroup, lower_is_better_by_name
from nbhelpers.plots import LABELS, _figure, _plain, _short
from nbhelpers.plots_runs import (
    LEGEND_RIGHT,
    MARKS,
    MOST_NAMED,
    OTHER_COLORS,
    STRATEGY_COLORS,
    STYLES,
    room_for_values,
    setting_said,
    strategy_color,
    strategy_rank,
)

AXIS_NAMES = {"level": "level (% of heads closed)"}
_UNITS = {
    "loss": "nats a token",
    "nll": "nats a token",
    "percent": "%",
    "seconds": "s",
    "bytes": "bytes",
    "ms": "ms",
}


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
        look = {"color": color, "marker": MARKS.get(label.split(",")[0], "o"), "markersize": 6, "linewidth": 1.2}
        line = style if numeric and len(members) > 1 else "none"
        bars = halves if any(halves) else None
        axes.errorbar(xs, means, yerr=bars, label=label, linestyle=line, elinewidth=1, capsize=2.5, **look)
        for x, group in zip(xs, members, strict=True):
            if len(group.values) > 1:
                values = list(group.values.values())
                axes.plot([x] * len(values), values, "o", color=color, markersize=2.8, alpha=0.55, zorder=4)
    ends = [end for group in groups for end in (group.interval.low, group.interval.high) if end is not None]
    room_for_values(axes, [value for group in groups for value in group.values.values()], ends)
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
        axes.legend(fontsize=9 if len(series) <= MOST_NAMED else 7, **LEGEND_RIGHT)
    _plain(axes)
    return figure


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
        said = ", ".join(filter(None, (setting_said(name, value) for name, value in rest.items())))
        members.setdefault((group.config.get(color_by) if color_by else None, said), []).append(group)
    colors = {value: at for at, value in enumerate(dict.fromkeys(value for value, _ in members))}
    palette, used, found = [*STRATEGY_COLORS.values(), *OTHER_COLORS], {}, []
    for value, said in sorted(members, key=lambda key: (strategy_rank(key[0]), colors[key[0]])):
        color = strategy_color(value) if color_by == "strategy" else palette[(colors[value] + 4) % len(palette)]
        style = STYLES[used.setdefault(value, 0) % len(STYLES)]
        used[value] += 1
        name = str(value) if color_by in ("strategy", "model") else setting_said(color_by, value) if color_by else ""
        found.append(((color, style, ", ".join(filter(None, [_short(name), said])) or "all"), members[value, said]))
    return found
