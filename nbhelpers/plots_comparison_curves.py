"""From how many labels on does it pay, how much can be coded alone, and can its certainty be trusted? The curves."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nbhelpers.plots import _plain
from nbhelpers.plots_comparison import (
    GREY,
    LIGHT,
    LONGEST,
    MEASURE_NAMES,
    NotMeasured,
    best,
    full_name,
    in_percent,
    legend_above,
    looks,
    new_figure,
    plain_text,
)


def break_even(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Accuracy against labelled dialogues (0 shown, then logarithmic), the large model's line, and the crossing."""
    found = result.get("break_even")
    if not found:
        raise NotMeasured("no small model was tuned on parts of the rows, so there is no break-even curve")
    look = looks(result)
    small = found.get("small") or best(result, "SLM")
    large = found.get("large_key") or best(result, "LLM")
    figure = new_figure(result, narrow, 3.9)
    axes = figure.add_subplot()
    points, line = found["points"], found["large"]
    at = [math.log1p(one["rows"]) for one in points]
    ours = look[small]["color"] if small else "#222222"
    theirs = look[large]["color"] if large else GREY
    axes.fill_between(at, *_ends(points), color=ours, alpha=0.16, linewidth=0, label="_band")
    axes.plot(at, [one["accuracy"] for one in points], color=ours, marker="o", linewidth=1.8, label="_small")
    axes.axhspan(line["low"], line["high"], color=theirs, alpha=0.14, linewidth=0, label="_band")
    axes.axhline(line["accuracy"], color=theirs, linewidth=1.8, label="_large")
    small_name = _named(result, small, narrow) if small else "small model"
    handles = [
        Line2D([], [], color=ours, marker="o", label=small_name),
        Line2D([], [], color=theirs, label=_named(result, large, narrow) if large else "large model"),
    ]
    handles += _crossing(axes, found)
    axes.set_xticks(at, [f"{one['rows']:,}" for one in points])
    _thin_out(axes, at, 6 if narrow else 12)
    axes.set_xlim(at[0] - 0.15, at[-1] + 0.15)
    top = max(one["high"] for one in [*points, line])
    axes.set_ylim(0, min(1.04, 1.12 * top))
    beside = found.get("validation_rows")  # older results do not say
    chose = f"\n(plus {beside} that chose each tuning's best step)" if beside else ""
    axes.set_xlabel(f"labelled dialogues it was tuned on{chose}")
    in_percent(axes.yaxis, MEASURE_NAMES.get(result["headline"], result["headline"]))
    axes.grid(axis="y", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)
    _plain(axes)
    legend_above(figure, handles, 1 if narrow else 3)
    return figure


def _ends(points: Sequence[Mapping[str, float]]) -> tuple[list[float], list[float]]:
    return [one["low"] for one in points], [one["high"] for one in points]


def _crossing(axes, found: Mapping[str, Any]) -> list[Line2D]:
    """A line where the small model gets ahead, its interval as a bar at the foot; none where it does not."""
    crossing = found["crossing"]
    if crossing["state"] != "crosses":
        return []
    x = math.log1p(crossing["rows"])
    axes.axvline(x, color="#222222", linewidth=1.1, linestyle=(0, (3, 2)), label="_crossing")
    if crossing["low"] is not None:
        ends = [math.log1p(crossing[end]) for end in ("low", "high")]
        foot = axes.get_xaxis_transform()
        axes.plot(ends, (0.012, 0.012), color="#222222", linewidth=5, transform=foot, label="_crossing_interval",
                  solid_capstyle="butt", clip_on=False)  # fmt: skip
    said = f"ahead from {crossing['rows']:.0f} on"
    if crossing["low"] is not None:
        said += f" [{crossing['low']:.0f}, {crossing['high']:.0f}]"
    return [Line2D([], [], color="#222222", linewidth=1.1, linestyle=(0, (3, 2)), label=said)]


def _thin_out(axes, at: Sequence[float], most: int) -> None:
    """Labels of points that lie close together are left out, the first and the last one stay."""
    room = (at[-1] - at[0]) / most if len(at) > 1 else 0
    labels, last = axes.get_xticklabels(), None
    for place, (x, label) in enumerate(zip(at, labels, strict=True)):
        ends = place in (0, len(at) - 1)
        if not ends and (x - last < room or at[-1] - x < room):
            label.set_text("")
        else:
            last = x
    axes.set_xticklabels([label.get_text() for label in labels])


# --- accept or route --------------------------------------------------------------------------------------------------


def routed(result: Mapping[str, Any]) -> list[str]:
    """The models that are drawn: the best large and the best small one, where their certainty is known."""
    known = result.get("routing") or {}
    found = [key for key in (best(result, "LLM"), best(result, "SLM")) if key in known]
    if not (found or known):
        raise NotMeasured("no model ranked the labels of validation and test rows, so its certainty is not known")
    return found or list(known)[:2]


def routing(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """How many of the accepted answers are right, against the share accepted; thresholds from validation are marked."""
    keys, look, found = routed(result), looks(result), result["routing"]
    figure = new_figure(result, narrow, 3.9)
    axes = figure.add_subplot()
    for key in keys:
        color = look[key]["color"]
        coverage, precision = _columns(found[key]["curve"], "coverage", "precision")
        axes.plot(coverage, precision, color=color, linewidth=1.7, label="_curve")
        for mark, point in zip("ovs^DP", found[key]["points"], strict=False):
            test = point["test"]
            if marked(point):
                axes.plot((test["coverage"],) * 2, (test["low"], test["high"]), color=color, linewidth=1, alpha=0.6)
                axes.plot(test["coverage"], test["precision"], mark, color=color, markersize=8, label="_chosen",
                          markeredgecolor="white", zorder=4)  # fmt: skip
    wanted = [point["wanted"] for point in found[keys[0]]["points"]]
    there = [any(marked(found[key]["points"][at]) for key in keys) for at in range(len(wanted))]
    for value in wanted:
        axes.axhline(value, color=GREY, linewidth=0.8, linestyle=(0, (1, 3)), zorder=1)
    names = [_named(result, key, narrow) for key in keys]
    handles = [Line2D([], [], color=look[key]["color"], label=name) for key, name in zip(keys, names, strict=True)]
    handles += [
        Line2D(
            [], [], color="#444444", marker=mark, linestyle="none", markersize=7, label=f"wanted {100 * value:.0f} %"
        )
        for mark, value, shown in zip("ovs^DP", wanted, there, strict=False)
        if shown
    ]
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.04)
    in_percent(axes.xaxis, "dialogues coded without a person")
    in_percent(axes.yaxis, "of them rightly")
    _plain(axes)
    legend_above(figure, handles, 1 if narrow else 3)
    return figure


def marked(point: Mapping[str, Any]) -> bool:
    """Whether a threshold was found that takes any test row."""
    return bool(point["test"] and point["test"]["coded"])


def calibration(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """How often an answer is right, against how certain the model was of it; on the diagonal they are the same."""
    keys, look, found = routed(result), looks(result), result["routing"]
    figure = new_figure(result, narrow, 3.9)
    axes = figure.add_subplot()
    axes.plot((0, 1), (0, 1), color=GREY, linewidth=1, linestyle=(0, (1, 3)))
    handles = []
    for key in keys:
        certain, right = _columns(found[key]["bins"], "confidence", "accuracy")
        color, error = look[key]["color"], found[key]["calibration_error"]
        axes.plot(certain, right, color=color, marker="o", markersize=5.5, linewidth=1.5, label="_bins")
        said = f"{_named(result, key, narrow)}:{chr(10) if narrow else ' '}off by {100 * error:.1f} points on average"
        handles.append(Line2D([], [], color=color, marker="o", label=said))
    handles.append(Line2D([], [], color=GREY, linewidth=1, linestyle=(0, (1, 3)), label="as certain as right"))
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.04)
    in_percent(axes.xaxis, "how certain it was" + ("" if narrow else " (a point is a tenth of the test rows)"))
    in_percent(axes.yaxis, "how often it was right")
    _plain(axes)
    legend_above(figure, handles, 1)
    return figure


def _named(result: Mapping[str, Any], key: str, narrow: bool) -> str:
    return plain_text(full_name(result["models"][key], LONGEST if narrow else 80))


def _columns(points: Sequence[Mapping[str, float]], x: str, y: str) -> tuple[list[float], list[float]]:
    return [one[x] for one in points], [one[y] for one in points]
