"""How do runs look in every figure of many runs? A strategy's colour and mark, a setting in words, room and legends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib.lines import Line2D

from nbhelpers.analysis import Trajectory
from nbhelpers.collection import Experiment
from nbhelpers.plots import _short

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
MARKS = dict(zip(STRATEGY_COLORS, "ovs^DPX", strict=True))
OTHER_COLORS = ("#117733", "#661100", "#6699CC", "#888888")
STYLES = ("-", "--", ":", "-.")
MOST_NAMED = 10  # curves with a line each in the legend
LEGEND_RIGHT = {"loc": "center left", "bbox_to_anchor": (1.01, 0.5), "frameon": False}


def strategy_color(name: str) -> str:
    """The colour of a strategy; one that is not listed gets the same one of the others every time."""
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % len(OTHER_COLORS)
    return STRATEGY_COLORS.get(name) or OTHER_COLORS[place]


def strategy_rank(strategy: object) -> int:
    """The place of a strategy in STRATEGY_COLORS, in the order of legends; one that is not listed comes after them."""
    order = list(STRATEGY_COLORS)
    return order.index(strategy) if strategy in order else len(order)


def strategy_looks(keys: Iterable[tuple[str, int, str]]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Colour and mark of each (strategy, which one of this strategy, label), and a line style within a colour."""
    return {
        key: {
            "color": strategy_color(key[0]),
            "marker": MARKS.get(key[0], "o"),
            "linestyle": STYLES[key[1] % len(STYLES)],
        }
        for key in keys
    }


def strategy_handle(strategy: str) -> Line2D:
    """What a legend shows for a strategy."""
    look = {"marker": MARKS.get(strategy, "o"), "color": strategy_color(strategy)}
    return Line2D([], [], linestyle="none", markersize=7, label=strategy, **look)


def setting_said(field: str, value: Any) -> str:
    """A setting as a few words of a legend."""
    name = field.rsplit(".", 1)[-1].replace("_", " ")
    if isinstance(value, bool):
        return name if value else ""
    if field == "level" and isinstance(value, int | float):
        return f"{value * 100:g} %"
    if field in ("strategy", "model"):
        return _short(str(value))
    return "" if value is None else f"{name} {value:g}" if isinstance(value, int | float) else f"{name} {value}"


def legend_below(drawn: Sequence[Experiment] | Sequence[Trajectory]) -> dict[str, Any]:
    """Where a legend below the axes goes: above the stamp, where there is one."""
    pad = 1.4 if any(one.generated for one in drawn) else 0.4  # of the font's size; the layout leaves room for it
    return {"loc": "outside lower center", "borderpad": pad, "frameon": False}


def room_for_values(axes, values: Sequence[float], ends: Sequence[float]) -> None:
    """Where intervals are many times as wide as the values differ, the values decide the range and bars are cut off."""
    low, high = min(values), max(values)
    span = (high - low) or abs(high) or 1.0
    if ends and max(ends) - min(ends) > 4 * span:
        bottom = low - 1.2 * span
        axes.set_ylim(max(bottom, 0) if low > 0 else bottom, high + 1.2 * span)
        axes.annotate("bars are cut off", (0.99, 0.98), xycoords="axes fraction", ha="right", va="top", fontsize=8)
