"""What did a comparison take? Measured memory of each model and time of each phase, beside what was estimated."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MultipleLocator

from nbhelpers.plots_comparison import (
    GREY,
    LONGEST,
    NotMeasured,
    cut,
    gigabytes,
    legend_above,
    looks,
    new_figure,
    ordered,
    peak_memory,
    row_labels,
    rows_with_headings,
    seconds_said,
    share_axis,
    short,
)

PHASES = {
    "baselines": "baselines",
    "llm_evaluation": "large models answer",
    "llm_finetuning": "large models: tuning, answers",
    "slm_zero_shot": "small models answer",
    "slm_finetuning": "small models: tuning, answers",
    "slm_evaluation": "small models: answers, tuned",
    "break_even": "tuned on fewer dialogues",
}
TICK = {"color": "#111111", "linestyle": "none", "marker": "|", "markersize": 11, "markeredgewidth": 2.2}


def round_step(reach: float) -> float:
    """1, 2 or 5 times a power of ten, of which three to six fit."""
    power = 10 ** math.floor(math.log10(reach / 3))
    return max(step for step in (1, 2, 5) if step * power <= reach / 3) * power


def estimated_bytes(result: Mapping[str, Any]) -> dict[str, int]:
    """What was estimated for each model before it was loaded."""
    phases = result.get("phases") or ()
    return {one["model"]: one["estimated"]["bytes"] for one in phases if (one.get("estimated") or {}).get("bytes")}


def _tick(axes, x: float, y: float) -> None:
    axes.plot((x, x), (y - 0.42, y + 0.42), color="#111111", linewidth=2.2, label="_estimate")


def memory(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Measured memory of each model: its weights, and the most while it worked; a line at what was estimated."""
    look, estimated = looks(result), estimated_bytes(result)
    shown = {key: one for key, one in ordered(result).items() if peak_memory(one) is not None}
    if not shown:
        raise NotMeasured("no model's memory was measured")
    rows = rows_with_headings(shown)
    figure = new_figure(result, narrow, 0.27 * len(rows) + 1.2)
    axes = figure.add_subplot()
    most = max([*(peak_memory(one) for one in shown.values()), *(estimated.get(key, 0) for key in shown)])
    for y, (key, _) in enumerate(rows):
        if key is None:
            continue
        found = shown[key]["memory"]
        axes.barh(y, found["peak_bytes"], height=0.62, color=look[key]["color"], alpha=0.35, label="_peak")
        if found.get("weights_bytes") is not None:
            axes.barh(y, found["weights_bytes"], height=0.62, color=look[key]["color"], label="_weights")
        if key in estimated:
            _tick(axes, estimated[key], y)
        end = max(found["peak_bytes"], estimated.get(key, 0))
        said = gigabytes(found["peak_bytes"])
        axes.annotate(said, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    row_labels(axes, rows)
    share_axis(axes, 1.25 * most)
    unit = 2**30 if most >= 2**30 else 2**20
    axes.xaxis.set_major_locator(MultipleLocator(unit * round_step(1.25 * most / unit)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _at: f"{value / unit:g}"))
    kinds = {one["memory"]["kind"] for one in shown.values()}
    axes.set_xlabel(f"memory{' of the GPU' if kinds == {'cuda'} else ''} ({'GB' if unit == 2**30 else 'MB'})")
    handles = [Line2D([], [], color=GREY, linewidth=7, label="weights")]
    handles += [Line2D([], [], color=GREY, alpha=0.35, linewidth=7, label="most while it worked")]
    handles += [Line2D([], [], label="estimated before", **TICK)] if estimated.keys() & shown.keys() else []
    legend_above(figure, handles, 2 if narrow else 3)
    return figure


def phases(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Minutes of each phase and model, a line at what was estimated before."""
    found = [one for one in result.get("phases") or () if one.get("seconds") is not None]
    if not found:
        raise NotMeasured("no phase has been timed")
    look = looks(result)
    rows: list[tuple[Mapping | None, str]] = []
    for number, one in enumerate(found):
        if number == 0 or one["name"] != found[number - 1]["name"]:
            rows.append((None, PHASES.get(one["name"], one["name"].replace("_", " "))))
        rows.append((one, cut(phase_model(result, one), LONGEST)))
    figure = new_figure(result, narrow, 0.27 * len(rows) + 1.2)
    axes = figure.add_subplot()
    most = max(max(one["seconds"], one.get("estimated_seconds") or 0) for one in found)
    unit, name = (3600, "hours") if most >= 7200 else (60, "minutes") if most >= 90 else (1, "seconds")
    for y, (one, _) in enumerate(rows):
        if one is None:
            continue
        color = look.get(_tuned_key(one.get("model")), {}).get("color", GREY)
        axes.barh(y, one["seconds"] / unit, height=0.62, color=color, label="_measured")
        if one.get("estimated_seconds") is not None:
            _tick(axes, one["estimated_seconds"] / unit, y)
        end = max(one["seconds"], one.get("estimated_seconds") or 0) / unit
        said = seconds_said(one["seconds"]) + (", cached" if one.get("came") == "cached" else "")
        axes.annotate(said, (end, y), (5, 0), textcoords="offset points", va="center", fontsize=9)
    row_labels(axes, rows)
    share_axis(axes, (1.35 if narrow else 1.18) * most / unit)
    axes.set_xlabel(name)
    handles = [Line2D([], [], color=GREY, linewidth=7, label="measured")]
    if any(one.get("estimated_seconds") is not None for one in found):
        handles += [Line2D([], [], label="estimated before", **TICK)]
    legend_above(figure, handles, 2)
    return figure


def phase_model(result: Mapping[str, Any], phase: Mapping[str, Any]) -> str:
    """Whose phase it was; for a small model that was tuned on fewer rows how many."""
    key = str(phase.get("model") or "all models")
    if key in result["models"]:
        return short(result["models"][key])
    _, on, rows = key.rpartition("_on_")
    return f"on {rows} rows" if on else key


def _tuned_key(key: str | None) -> str:
    """`SLM_x_on_24` is of the same model as `SLM_x_finetuned`."""
    name, on, _ = str(key).rpartition("_on_")
    return f"{name}_finetuned" if on else str(key)
