"""How is a comparison of models drawn? One name and look a model in every figure; accuracy in all and in parts.

Each function takes the result of a comparison and gives a figure for a page or, with `narrow`, for a phone. What was
not measured is not drawn: `NotMeasured` says in a line why a figure is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, MaxNLocator

from nbhelpers.plots import _short
from nbhelpers.stats import digits
from nbhelpers.verdicts import BASELINE_NAMES

WIDE, NARROW = 8.0, 4.1  # inches: of a page, and of a phone at about 90 pixels an inch
LONGEST = 26  # letters of a name where there is little room
GREY, LIGHT = "#767676", "#e2e2e2"
STAMP = "on rows that this project generated"
# Okabe-Ito and Tol, told apart by colour-blind readers; one colour a model in every figure, the mark says its role.
LARGE_COLORS = ("#0072B2", "#56B4E9", "#332288", "#44AA99")
SMALL_COLORS = ("#D55E00", "#E69F00", "#CC79A7", "#999933", "#882255", "#661100")
BASELINE_COLORS = ("#555555", "#777777", "#999999")
ENSEMBLE_COLOR = "#117733"
MARKS = {"LLM": "s", "SLM": "o", "BASELINE": "D", "ENSEMBLE": "*"}
GROUPS = {  # (model type, was it tuned?) -> heading, in the order of the page
    ("LLM", False): "Large, as they are",
    ("LLM", True): "Large, fine-tuned",
    ("SLM", False): "Small, before tuning",
    ("SLM", True): "Small, fine-tuned",
    ("ENSEMBLE", False): "Large and small together",
    ("BASELINE", False): "Baselines",
}
MEASURES = {
    "top_1_accuracy": "accuracy (first of the ranked labels is right)",
    "exact_match_accuracy": "accuracy (the written answer is right)",
}
MEASURE_NAMES = {"top_1_accuracy": "top-1 accuracy", "exact_match_accuracy": "exact match"}


class NotMeasured(ValueError):
    """Nothing of what a figure shows was measured; the text says what is missing and why."""


# --- names and looks --------------------------------------------------------------------------------------------------


def group(entry: Mapping[str, Any]) -> tuple[str, bool]:
    kind = entry["model_type"]
    return kind, kind in ("LLM", "SLM") and entry["training_status"] == "finetuned"


def short(entry: Mapping[str, Any]) -> str:
    """`small-llama`, `TF-IDF + linear`."""
    name = _short(str(entry["model"]))
    return BASELINE_NAMES.get(name, name) if entry["model_type"] == "BASELINE" else name


def full_name(entry: Mapping[str, Any], most: int = 80) -> str:
    """With what was done to it: `small-llama (not fine-tuned)`. most: letters of the name itself."""
    done = {"untrained": " (not fine-tuned)", "zero_shot": " (not fine-tuned)", "finetuned": " (fine-tuned)"}
    tuned = entry["model_type"] in ("LLM", "SLM")
    return cut(short(entry), most) + (done.get(entry["training_status"], "") if tuned else "")


def cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1].rstrip() + "…"


def ordered(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """The entries by group, the best first in each; one without the measure last."""
    order = list(GROUPS)
    measure = result["headline"]

    def place(item: tuple[str, Mapping]) -> tuple:
        value = item[1].get(measure)
        return order.index(group(item[1])), value is None, -(value or 0)

    return dict(sorted(result["models"].items(), key=place))


def looks(result: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Colour, mark and face of every entry; a model has one colour, hollow before tuning."""
    colors: dict[tuple[str, str], str] = {}
    taken = {"LLM": 0, "SLM": 0, "BASELINE": 0}
    palettes = {"LLM": LARGE_COLORS, "SLM": SMALL_COLORS, "BASELINE": BASELINE_COLORS}
    found = {}
    for key, entry in result["models"].items():
        kind, name = entry["model_type"], str(entry["model"])
        if kind == "ENSEMBLE":
            color = ENSEMBLE_COLOR
        elif (kind, name) in colors:
            color = colors[kind, name]
        else:
            color = colors[kind, name] = palettes[kind][taken[kind] % len(palettes[kind])]
            taken[kind] += 1
        hollow = entry["training_status"] == "zero_shot"
        found[key] = {"color": color, "marker": MARKS[kind], "markerfacecolor": "white" if hollow else color}
    return found


def interval(entry: Mapping[str, Any], measure: str) -> tuple[float, float] | None:
    """95 % over the test rows; None where there is none."""
    found = (entry.get("intervals") or {}).get(measure) or {}
    return None if found.get("low") is None else (found["low"], found["high"])


def best(result: Mapping[str, Any], kind: str) -> str | None:
    """Key of the best entry of a type, as the answer names it; of small models a tuned one where there is any."""
    side = (result.get("answer") or {}).get({"LLM": "best_large", "SLM": "best_small"}.get(kind, ""))
    if side:
        return side["key"]
    of = {
        key: one for key, one in result["models"].items()
        if one["model_type"] == kind and one.get(result["headline"]) is not None
    }  # fmt: skip
    tuned = {key: one for key, one in of.items() if one["training_status"] == "finetuned"}
    among = tuned if kind == "SLM" and tuned else of
    return max(among, key=lambda key: among[key][result["headline"]], default=None)


def peak_memory(entry: Mapping[str, Any]) -> int | None:
    return (entry.get("memory") or {}).get("peak_bytes") or None


def seconds_said(seconds: float) -> str:
    """`4.0 s`, `23.0 min`, `2.50 h`."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 1.5 * unit:
            return f"{digits(seconds / unit)} {name}"
    return f"{digits(seconds)} s"


def parameters_said(count: float) -> str:
    """`1.2M`, `8B`."""
    for unit, name in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= 0.9995 * unit:
            return f"{count / unit:.3g}{name}"
    return f"{count:.0f}"


def gigabytes(count: float) -> str:
    """`1.4 GB`, `86 MB`."""
    return f"{count / 2**30:.3g} GB" if count >= 0.95 * 2**30 else f"{count / 2**20:.3g} MB"


def percent(value: float) -> str:
    """`84.4 %` of a share."""
    return f"{100 * value:.1f} %"


def plain_text(name: object) -> str:
    """A name as matplotlib shows it: nobody's dollar sign begins a formula."""
    return str(name).replace("$", r"\$")


def new_figure(result: Mapping[str, Any], narrow: bool, height: float) -> Figure:
    width = NARROW if narrow else WIDE
    figure = Figure(figsize=(width, height), layout="constrained")
    if result["data"]["generated"]:
        figure.get_layout_engine().set(rect=(0, 0.22 / height, 1, 1 - 0.22 / height))  # room below for the stamp
        figure.text(0.995, 0.01, STAMP, ha="right", va="bottom", fontsize=8, color=GREY)
    return figure


def in_percent(axis, label: str) -> None:
    """Name an axis of shares and count it in percent; the sign stands once, which leaves room on a phone."""
    axis.set_major_formatter(FuncFormatter(lambda value, _at: f"{round(100 * value, 6):g}"))
    axis.set_label_text(f"{label}, %")


def share_axis(axes, highest: float = 1.0) -> None:
    axes.set_xlim(0, highest)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(axis="x", color=LIGHT, linewidth=0.8)
    axes.set_axisbelow(True)


def top_of_axis(values: Sequence[float], room: float = 1.08) -> float:
    """The end of an axis of shares that holds all values."""
    return min(1.04, max(0.1, room * max(values, default=1.0)))


# --- accuracy ---------------------------------------------------------------------------------------------------------


def accuracy(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Every entry as a point with its interval, grouped by what it is, its number beside it; guessing as a line."""
    measure, look = result["headline"], looks(result)
    shown = {key: one for key, one in ordered(result).items() if one.get(measure) is not None}
    if not shown:
        raise NotMeasured("no model has been evaluated yet")
    rows = rows_with_headings(shown)
    figure = new_figure(result, narrow, 0.27 * len(rows) + 0.95)
    axes = figure.add_subplot()
    ends = []
    for y, (key, _) in enumerate(rows):
        if key is None:
            continue
        entry, ends_of = shown[key], interval(shown[key], measure)
        if ends_of:
            axes.plot(
                ends_of, (y, y), color=look[key]["color"], linewidth=1.6, solid_capstyle="butt", label="_interval"
            )
        size = 11 if look[key]["marker"] == "*" else 7.5
        axes.plot(
            entry[measure],
            y,
            linestyle="none",
            markersize=size,
            markeredgewidth=1.6,
            label="_point",
            clip_on=False,
            **look[key],
        )
        ends += [entry[measure], *(ends_of or ())]
        said = percent(entry[measure])
        if ends_of and not narrow:
            said += f"  [{100 * ends_of[0]:.1f}, {100 * ends_of[1]:.1f}]"
        axes.annotate(
            said, (1, y), (6, 0), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center",
            fontsize=9, annotation_clip=False,
        )  # fmt: skip
    chance = result["data"].get("chance")
    if chance is not None:
        axes.axvline(chance, color=GREY, linewidth=1.1, linestyle=(0, (1, 3)), label=f"guessing: {percent(chance)}")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), borderaxespad=0, frameon=False, fontsize=8.5)
    row_labels(axes, rows)
    share_axis(axes, top_of_axis(ends))
    in_percent(axes.xaxis, MEASURES.get(measure, measure) if not narrow else MEASURE_NAMES.get(measure, measure))
    return figure


def rows_with_headings(shown: Mapping[str, Mapping[str, Any]]) -> list[tuple[str | None, str]]:
    """(key, name) of each entry, and (None, heading) before each group."""
    rows: list[tuple[str | None, str]] = []
    before = None
    for key, entry in shown.items():
        if group(entry) != before:
            before = group(entry)
            rows.append((None, GROUPS[before]))
        rows.append((key, cut(short(entry), LONGEST)))
    return rows


def row_labels(axes, rows: Sequence[tuple[str | None, str]]) -> None:
    """Names beside the axis, headings inside it, where long ones have room."""
    named = [(y, name) for y, (key, name) in enumerate(rows) if key is not None]
    axes.set_yticks([y for y, _ in named], [plain_text(name) for _, name in named], fontsize=9.5)
    for y, (key, name) in enumerate(rows):
        if key is None:
            axes.annotate(
                name, (0, y), (1, -1), xycoords=axes.get_yaxis_transform(), textcoords="offset points", va="center",
                fontsize=9, fontweight="bold", color="#444444", zorder=1.5,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )  # fmt: skip
    axes.set_ylim(len(rows) - 0.4, -0.7)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def chapters(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """Accuracy in each chapter of the best large and the best small model, with the number of rows."""
    return _bars_by(result, "by_chapter", "chapter", narrow, str)


def frequencies(result: Mapping[str, Any], narrow: bool = False) -> Figure:
    """The same by how many training rows a label has."""
    return _bars_by(
        result, "by_frequency", "training_rows", narrow, lambda rows: f"{rows} training row{'' if rows == '1' else 's'}"
    )


def _bars_by(result: Mapping[str, Any], part: str, field: str, narrow: bool, name_of: Callable[[str], str]) -> Figure:
    pair = [key for key in (best(result, "LLM"), best(result, "SLM")) if key and result["models"][key].get(part)]
    if not pair:
        raise NotMeasured(f"no large or small model has its accuracy by {part.removeprefix('by_')}")
    cells = {key: {str(one[field]): one for one in result["models"][key][part]} for key in pair}
    places = list(dict.fromkeys(name for of in cells.values() for name in of))
    figure = new_figure(result, narrow, 0.3 * len(places) * (len(pair) + 1) * 0.72 + 1.2)
    axes, look = figure.add_subplot(), looks(result)
    step, ends = len(pair) + 1, []
    for at, place in enumerate(places):
        counted = [cells[key][place]["n"] for key in pair if place in cells[key]]
        said = f"{cut(name_of(place), 40 if narrow else 90)}  (n = {counted[0]})"
        axes.text(0.004, at * step - 0.02, plain_text(said), va="center", fontsize=9, color="#333333")
        for below, key in enumerate(pair, 1):
            if place in cells[key]:
                ends.append(_bar(axes, at * step + 0.86 * below, cells[key][place], look[key]["color"]))
    axes.set_yticks([])
    axes.set_ylim(len(places) * step - 0.3, -0.6)
    axes.spines[["top", "right"]].set_visible(False)
    share_axis(axes, top_of_axis(ends))
    in_percent(axes.xaxis, MEASURE_NAMES.get(result["headline"], result["headline"]))
    names = [full_name(result["models"][key], LONGEST if narrow else 80) for key in pair]
    handles = [
        Line2D([], [], color=look[key]["color"], linewidth=7, label=plain_text(name))
        for key, name in zip(pair, names, strict=True)
    ]
    legend_above(figure, handles, 1 if narrow else 2)
    return figure


def _bar(axes, y: float, cell: Mapping[str, Any], color: str) -> float:
    """One bar with its interval; returns how far it reaches."""
    axes.barh(y, cell["accuracy"], height=0.74, color=color, label="_bar")
    if cell.get("low") is None:
        return cell["accuracy"]
    axes.plot((cell["low"], cell["high"]), (y, y), color="#222222", linewidth=1, label="_interval")
    return cell["high"]


def legend_above(figure: Figure, handles: Sequence[Line2D], columns: int, **more: Any) -> None:
    """Read row by row, where matplotlib would go down the columns."""
    look = {"frameon": False, "fontsize": 9, "handlelength": 1.4} | more
    handles = [handles[at] for at in sorted(range(len(handles)), key=lambda at: (at % columns, at // columns))]
    figure.legend(handles=handles, loc="outside upper left", ncols=columns, **look)
