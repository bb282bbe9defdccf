"""How did many runs go along their steps? Loss, validation loss, learning rate and speed, a curve for each run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nbhelpers.analysis import Trajectory, varying
from nbhelpers.collection import flat
from nbhelpers.plots import COLORS, LABELS, _figure, _plain
from nbhelpers.plots_runs import (
    MOST_NAMED,
    OTHER_COLORS,
    STRATEGY_COLORS,
    STYLES,
    legend_below,
    setting_said,
    strategy_color,
    strategy_rank,
)

_UNSAID = {"name", "control", "device", "sample_prompt", "sample_tokens"}


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
    palette = [*STRATEGY_COLORS.values(), *OTHER_COLORS]
    for curve in curves:
        key = (curve.run_id, curve.stage)
        if key in looks:
            continue
        strategy = curve.config.get("strategy")
        color = strategy_color(strategy) if strategy else palette[plain.index(curve.run_id) % len(palette)]
        color = COLORS["control"] if curve.stage == "control" else color
        looks[key] = {"color": color, "linestyle": STYLES[used.get(color, 0) % len(STYLES)]}
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
    for curve in sorted(
        curves, key=lambda curve: (curve.stage == "control", strategy_rank(curve.config.get("strategy")))
    ):
        look = looks[curve.run_id, curve.stage]
        short = LABELS["control"] if curve.stage == "control" else str(curve.config.get("strategy") or curve.run)
        name = short if many else names[curve.run_id, curve.stage]
        handles.setdefault(name, Line2D([], [], label=name, linewidth=1.8, **look | {"alpha": 1}))
    some = list(handles.values())[: 2 * MOST_NAMED]
    figure.legend(handles=some, ncols=6 if many else 3, fontsize=8.5, **legend_below(curves))


def _curve_name(curve: Trajectory, fields: Iterable[str], name: str = "") -> str:
    values = flat(curve.config)
    parts = [setting_said(field, values[field]) for field in fields if field in values]
    said = ", ".join([*([name] if name else []), *filter(None, parts)]) or curve.run
    return f"{said} (control)" if curve.stage == "control" else said
