"""Which figures show many runs beside each other, and what does one show, in a line? Drawn by plots_runs_*.py."""

from __future__ import annotations

import math
from collections.abc import Callable

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from nbhelpers.analysis import ExperimentAnalyzer, Trajectory
from nbhelpers.plots import COLORS
from nbhelpers.plots_runs_curves import learning_curves_of_runs, learning_rates, throughput
from nbhelpers.plots_runs_pruning import change_grid, quadrants, recovery, stages_of_runs

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
