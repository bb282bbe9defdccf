"""What does size buy, and what does it cost? Accuracy against parameters with memory, and against a price or time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import Bbox

from nbhelpers.plots import _plain
from nbhelpers.plots_comparison import (
    GREY,
    LIGHT,
    LONGEST,
    MEASURE_NAMES,
    NotMeasured,
    best,
    cut,
    gigabytes,
    in_percent,
    interval,
    legend_above,
    looks,
    new_figure,
    parameters_said,
    peak_memory,
    percent,
    plain_text,
    short,
    top_of_axis,
)

Way = tuple[tuple[float, float], tuple[float, float]]  # from and to, in units of the data
LARGEST_BUBBLE = 900.0  # square points; on a phone half of it


def size(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Accuracy against parameters; the area of a bubble is the measured memory, an arrow leads over tuning."""
    measure, look = result["headline"], looks(result)
    shown = {
        key: one for key, one in result["models"].items()
        if one.get(measure) is not None and one.get("parameters") and one["model_type"] != "BASELINE"
    }  # fmt: skip
    if not shown:
        raise NotMeasured("no evaluated model has a number of parameters")
    memories = {key: one["memory"] if peak_memory(one) else None for key, one in shown.items()}
    most, largest = max(peak_memory(one) or 0 for one in shown.values()), LARGEST_BUBBLE / (1 + narrow)
    figure = new_figure(result, narrow, 4.3 if narrow else 4.4)
    axes = figure.add_subplot()
    points = []
    for key, entry in shown.items():
        area = max(20.0, largest * peak_memory(entry) / most) if memories[key] else 40.0
        x, y = entry["parameters"], entry[measure]
        edge = {"edgecolor": look[key]["color"], "linewidth": 1.6, "linestyle": "-" if memories[key] else ":"}
        axes.scatter(x, y, s=area, facecolor=look[key]["markerfacecolor"], alpha=0.85, zorder=3, **edge)
        points.append((x, y, math.sqrt(area / math.pi), _said_of(entry, shown.values())))
    arrows = _arrows(axes, shown, measure, look)
    baseline = best(result, "BASELINE")
    if baseline:
        value = result["models"][baseline][measure]
        axes.axhline(value, color=GREY, linewidth=1.1, linestyle=(0, (4, 2)), zorder=1)
        _end_label(axes, value, f"{short(result['models'][baseline])}: {percent(value)}")
    _log_sizes(axes, [x for x, *_ in points])
    top = top_of_axis([y for _, y, *_ in points] + ([value] if baseline else []), 1.2)
    axes.set_ylim(-0.12 * top, top)  # whole bubbles and their names also at 0
    axes.set_xlabel("parameters")
    in_percent(axes.yaxis, MEASURE_NAMES.get(measure, measure))
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)
    _bubble_legend(figure, memories, largest)
    label_points(figure, axes, points, arrows)
    return figure


def cost(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Accuracy against what 1,000 dialogues cost: money where a price was named, else time."""
    found, look, measure = result.get("cost"), looks(result), result["headline"]
    priced = bool(found) and found["price_per_gpu_hour"] is not None
    of = "price_per_1000" if priced else "hours_per_1000"
    rows = [row for row in (found or {}).get("rows", ()) if row[of] and row["accuracy"] is not None]
    if not rows:
        raise NotMeasured("no model's seconds a dialogue were measured, so there is no cost")
    most = max(row[of] for row in rows)
    unit, name = (1, found["currency"] or "price") if priced else _time_unit(most)
    figure = new_figure(result, narrow, 3.9)
    axes, points, ways, ends = figure.add_subplot(), [], [], []
    for row in rows:
        entry, x, y = result["models"][row["key"]], row[of] * unit, row["accuracy"]
        around = interval(entry, measure)
        if around:
            axes.plot((x, x), around, color=look[row["key"]]["color"], linewidth=1.4, alpha=0.7, label="_interval")
            ways.append(((x, around[0]), (x, around[1])))
        axes.plot(x, y, markersize=8, markeredgewidth=1.6, linestyle="none", label="_point", **look[row["key"]])
        points.append((x, y, 5.0, _said_of(entry, [result["models"][one["key"]] for one in rows])))
        ends += [y, *(around or ())]
    if most > 8 * min(row[of] for row in rows):
        axes.set_xscale("log")
        axes.set_xlim(min(x for x, *_ in points) / 1.8, max(x for x, *_ in points) * 2.2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.set_xlim(0, 1.25 * most * unit)
    axes.set_ylim(0, top_of_axis(ends))
    axes.set_xlabel(f"{name} for 1,000 dialogues")
    in_percent(axes.yaxis, MEASURE_NAMES.get(measure, measure))
    axes.grid(color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)
    label_points(figure, axes, points, ways)
    return figure


def _time_unit(hours: float) -> tuple[float, str]:
    """(how many in an hour, its name)."""
    return next((of for of in ((1, "hours"), (60, "minutes")) if hours * of[0] >= 2), (3600, "seconds"))


def _said_of(entry: Mapping[str, Any], shown: Iterable[Mapping[str, Any]]) -> str:
    """Name and state; none for a small model before tuning beside the same one tuned, in the same colour."""
    status = entry["training_status"]
    if status == "zero_shot" and any(
        one["model"] == entry["model"] and one["training_status"] == "finetuned" for one in shown
    ):
        return ""
    said = {"zero_shot": "\nbefore tuning", "finetuned": "\nfine-tuned", "untrained": "\nas it is"}
    return cut(short(entry), LONGEST) + said.get(status, "")


def _bubble_legend(figure: Figure, memories: Mapping[str, Mapping[str, Any] | None], largest: float) -> None:
    """Two or three round sizes; a line where memory was not measured."""
    known = [one for one in memories.values() if one]
    if not known:
        handles = [Line2D([], [], linestyle="none", label="memory was not measured: all bubbles have one size")]
        legend_above(figure, handles, 1)
        return
    most = max(one["peak_bytes"] for one in known)
    of = "GPU memory" if {one["kind"] for one in known} == {"cuda"} else "memory"
    handles = [Line2D([], [], linestyle="none", label=f"peak {of}:")]
    for count in dict.fromkeys(
        _round_below(most / part) for part in ((8, 1) if largest < LARGEST_BUBBLE else (12, 3, 1))
    ):
        wide = 2 * math.sqrt(largest * count / most / math.pi)
        look = {"marker": "o", "markerfacecolor": "none", "markeredgecolor": "#444444", "markersize": wide}
        handles.append(Line2D([], [], linestyle="none", label=gigabytes(count), **look))
    legend_above(figure, handles, len(handles), handlelength=2.6, columnspacing=1.0, borderpad=0.9)


def _round_below(count: float) -> float:
    """The largest 1, 2 or 5 times a power of ten of MB or GB that is not above."""
    unit = 2**30 if count >= 2**30 else 2**20
    power = 10 ** math.floor(math.log10(count / unit))
    return max(step for step in (1, 2, 5) if step * power <= count / unit) * power * unit


def _arrows(axes, shown: Mapping[str, Mapping[str, Any]], measure: str, look: Mapping) -> list[Way]:
    """From a small model before tuning to the same one after; returns the ways."""
    ways = []
    before = {one["model"]: one for one in shown.values() if one["training_status"] == "zero_shot"}
    for key, entry in shown.items():
        first = before.get(entry["model"])
        if first and entry["training_status"] == "finetuned":
            arrow = {"arrowstyle": "->", "color": look[key]["color"], "linewidth": 1.2, "shrinkA": 8, "shrinkB": 10}
            way = (first["parameters"], first[measure]), (entry["parameters"], entry[measure])
            axes.annotate("", way[1], way[0], arrowprops=arrow)
            ways.append(way)
    return ways


def _log_sizes(axes, sizes: Sequence[float]) -> None:
    axes.set_xscale("log")
    low, high = min(sizes), max(sizes)
    room = max(2.2, (high / low) ** 0.22)
    axes.set_xlim(low / room, high * room)
    powers = range(math.floor(math.log10(low / room)), math.ceil(math.log10(high * room)) + 1)
    inside = [s * 10.0**p for p in powers for s in (1, 2, 5) if low / room <= s * 10.0**p <= high * room]
    axes.xaxis.set_major_locator(FixedLocator(inside if len(inside) < 8 else [t for t in inside if f"{t:e}"[0] == "1"]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: parameters_said(value)))
    axes.xaxis.set_minor_locator(NullLocator())


def _end_label(axes, y: float, said: str) -> None:
    axes.annotate(
        plain_text(said), (1, y), (-2, 3), xycoords=axes.get_yaxis_transform(), textcoords="offset points", ha="right",
        fontsize=8.5, color="#555555",
    )  # fmt: skip


def label_points(
    figure: Figure, axes, points: Sequence[tuple[float, float, float, str]], ways: Sequence[Way] = ()
) -> None:
    """A name beside each point, where it covers no other name or point and no way between two.

    points: (x, y, radius in points, name), all in units of the data.
    """
    FigureCanvasAgg(figure)
    figure.draw_without_rendering()  # the layout, so that places on the canvas are known
    scale, inside = figure.dpi / 72, axes.get_window_extent()
    centres = [(*axes.transData.transform((x, y)), radius * scale) for x, y, radius, _ in points]
    taken = [Bbox([[x - r, y - r], [x + r, y + r]]) for x, y, r in centres]
    for (x, y), (other_x, other_y) in (axes.transData.transform(way) for way in ways):
        stops = [(x + (other_x - x) * at / 12, y + (other_y - y) * at / 12) for at in range(13)]
        taken += [Bbox([[x - 2, y - 4], [x + 2, y + 4]]) for x, y in stops]
    for x, y, radius, name in sorted((point for point in points if point[3]), key=lambda point: -point[1]):
        found: list[tuple[float, Annotation]] = []
        for dx, dy, ha, va in _around(radius):
            line = {"arrowstyle": "-", "color": GREY, "linewidth": 0.7} if max(abs(dx), abs(dy)) > radius + 12 else None
            label = axes.annotate(
                plain_text(name), (x, y), (dx, dy), textcoords="offset points", ha=ha, va=va, fontsize=8.5, zorder=4,
                linespacing=1.05, arrowprops=line,
            )  # fmt: skip
            label.set_in_layout(False)
            label.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(label)  # of the words, without the line
            found.append((sum(_shared(box, other) for other in taken) + 3 * _outside(box, inside), label))
            if found[-1][0] == 0:
                break
        least = min(found, key=lambda one: one[0])[1]
        for _, label in found:
            if label is not least:
                label.remove()
        taken.append(Text.get_window_extent(least))


def _around(radius: float) -> Iterator[tuple[float, float, str, str]]:
    """(dx, dy, alignments) of places around a point, the nearest first."""
    for gap in (4, 18, 36, 56):
        far = radius + gap
        yield from (
            (far, 0, "left", "center"), (-far, 0, "right", "center"), (0, far, "center", "bottom"),
            (0, -far, "center", "top"), (0.75 * far, 0.75 * far, "left", "bottom"),
            (0.75 * far, -0.75 * far, "left", "top"), (-0.75 * far, 0.75 * far, "right", "bottom"),
            (-0.75 * far, -0.75 * far, "right", "top"),
        )  # fmt: skip


def _shared(a: Bbox, b: Bbox) -> float:
    both = Bbox.intersection(a, b)
    return 0.0 if both is None else both.width * both.height


def _outside(box: Bbox, inside: Bbox) -> float:
    return box.width * box.height - _shared(box, inside)
