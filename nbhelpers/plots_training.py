"""How is a training drawn while it goes on? Loss, validation, learning rate, speed and memory over the same steps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nbhelpers import curves
from nbhelpers.plots import COLORS, LOG_FROM, _columns, _figure, _plain, _plain_log, label
from nbhelpers.stats import digits

MARKS = {  # kind of event -> colour of its line; its word stands beside it
    "oom": "#E69F00",
    "non_finite": "#D55E00",
    "restored": "#CC79A7",
    "resume": "#56B4E9",
    "early_stop": "#777777",
}
WIDTH, HEIGHT = 8.4, 5.2  # inches


def training(trainings: Mapping[str, Mapping[str, Any]], result: Mapping) -> Figure:
    """One picture of a run's trainings: loss and validation perplexity above; below learning rate, tokens a second and
    memory, all over the same steps. Events are vertical lines with a word.

    trainings: {"fine_tuned" | "control": a training as `curves` holds it}. result: has model and text, as result.json.
    """
    figure = _figure(WIDTH, HEIGHT, result["text"]["generated"])
    grid = figure.add_gridspec(2, 6, height_ratios=(1.55, 1))
    loss, perplexity = figure.add_subplot(grid[0, :3]), figure.add_subplot(grid[0, 3:])
    below = [figure.add_subplot(grid[1, at : at + 2], sharex=loss) for at in (0, 2, 4)]
    everything = [loss, perplexity, *below]
    steps = max([curve["steps"] for curve in trainings.values()], default=1)
    for stage, curve in trainings.items():
        _draw(everything, curve, COLORS[stage], label(stage, result), alone=len(trainings) == 1)
    exponent = _scale_rate(below[0])
    rate = f"learning rate (×$10^{{{exponent}}}$)" if exponent else "learning rate"
    held = "GPU memory (MB)" if any(curve["cuda_bytes"] for curve in trainings.values()) else "memory (MB)"
    names = ("loss (nats a token)", "validation perplexity", rate, "tokens a second", held)
    for axes, name in zip(everything, names, strict=True):
        _finish(axes, name, steps)
    _scale(perplexity)
    for axes in below:
        axes.set_ylim(0, 1.12 * max([0.0, *(value for line in axes.lines for value in line.get_ydata())]) or None)
    _mark(everything, trainings)
    if any(line.get_label()[0] != "_" for line in loss.lines):
        columns = {"ncols": 2 * len(trainings), "columnspacing": 1.0, "handletextpad": 0.4, "handlelength": 1.4}
        place = {"loc": "lower right", "bbox_to_anchor": (1.02, 0.985), "borderaxespad": 0.0}
        loss.legend(frameon=False, fontsize=8.5, **columns, **place)
    return figure


def _draw(everything: Sequence, curve: Mapping[str, Any], color: str, name: str, *, alone: bool) -> None:
    loss, perplexity, rate, speed, memory = everything
    of = "" if alone else f", {name}"
    style = "--" if name.startswith("control") else "-"  # the same learning rate lies on the other one
    if curve["train_losses"]:
        loss.plot(*_columns(curve["train_losses"]), color=color, linewidth=1.3, label=f"training{of}")
    if curve["validation_nlls"]:
        steps, nlls = _columns(curve["validation_nlls"])
        loss.plot(
            steps,
            nlls,
            color=color,
            linewidth=0,
            marker="o",
            markersize=5,
            markerfacecolor="white",
            label=f"validation{of}",
        )
        perplexities = [math.exp(min(nll, 700.0)) for nll in nlls]
        perplexity.plot(
            steps, perplexities, color=color, linewidth=1.3, marker="o", markersize=5, markerfacecolor="white"
        )
        best = min(range(len(nlls)), key=nlls.__getitem__)
        perplexity.plot(steps[best], perplexities[best], color=color, marker="o", markersize=6, label="_best")
        perplexity.margins(y=0.14)  # room for the word below
        perplexity.annotate(
            f"best {digits(perplexities[best])}",
            (steps[best], perplexities[best]),
            xytext=(-6, -4),
            va="top",
            textcoords="offset points",
            ha="right",
            fontsize=9,
            color=color,
        )
    for axes, key, unit in (
        (rate, "learning_rates", 1),
        (speed, "tokens_per_second", 1),
        (memory, "cuda_bytes" if curve["cuda_bytes"] else "resident_bytes", 1e6),
    ):
        steps, values = _columns(curve[key])
        axes.plot(steps, [value / unit for value in values], style, color=color, linewidth=1.3)


def _finish(axes, name: str, steps: int) -> None:
    axes.set_title(name, fontsize=10, loc="left")
    axes.set_ylabel(name).set_visible(False)  # for `plots.fingerprint`; the title says it where there is room
    axes.set_xlim(-0.015 * steps, steps * 1.02)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(labelsize=9)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlabel("optimizer step", fontsize=9)
    if not any(len(line.get_ydata()) for line in axes.lines):
        axes.set_yticks([])
        axes.text(0.5, 0.5, "nothing measured yet", ha="center", transform=axes.transAxes, color="#777777", fontsize=9)
    _plain(axes)


def _scale(axes) -> None:
    values = [value for line in axes.lines for value in line.get_ydata()]
    if values and max(values) > LOG_FROM * min(values):
        _plain_log(axes)


def _scale_rate(axes) -> int:
    """Divide the learning rates by a power of ten that leaves short numbers, and return its exponent."""
    largest = max((value for line in axes.lines for value in line.get_ydata()), default=0.0)
    exponent = math.floor(math.log10(largest)) if largest > 0 else 0
    for line in axes.lines:
        line.set_ydata([value / 10**exponent for value in line.get_ydata()])
    axes.relim()
    axes.autoscale_view()
    return exponent


def _mark(everything: Sequence, trainings: Mapping[str, Mapping[str, Any]]) -> None:
    """A line through every panel at each event; its word in the first, each a little lower than the last one."""
    found = [(mark, stage) for stage, curve in trainings.items() for mark in curves.marks(curve)]
    for number, ((step, kind, word), stage) in enumerate(found):
        for axes in everything:
            axes.axvline(step, color=MARKS[kind], linewidth=1.3, linestyle=(0, (4, 2)), zorder=1, label="_event")
        everything[0].annotate(
            word if stage == "fine_tuned" else f"{stage}: {word}",
            (step, 0.97 - 0.09 * (number % 5)),
            xycoords=("data", "axes fraction"),
            xytext=(3, 0),
            textcoords="offset points",
            fontsize=8.5,
            va="top",
            bbox={"boxstyle": "round,pad=0.15", "facecolor": "white", "edgecolor": MARKS[kind], "linewidth": 1},
        )
