"""Does a strategy look the same in every figure of many runs?"""

from __future__ import annotations

import pytest
from figures_of_runs import four_pruning_runs, line
from matplotlib.colors import to_hex

from nbhelpers import plots, plots_runs, plots_runs_curves, plots_runs_pruning
from nbhelpers.analysis import ExperimentAnalyzer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return four_pruning_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def analyzer(folder):
    return ExperimentAnalyzer(folder)


@pytest.fixture
def runs(analyzer):
    return analyzer.experiments


def test_a_strategy_has_the_same_colour_in_every_figure_and_no_stage_has_it(analyzer, runs):
    wanted = plots_runs.strategy_color("gradient")
    recovery = line(plots_runs_pruning.recovery(runs).axes[1], "gradient").get_color()
    stages = line(plots_runs_pruning.stages_of_runs(runs).axes[0], "gradient, 10 %").get_color()
    curves = plots_runs_curves.learning_curves_of_runs(analyzer.filter(strategy="gradient").trajectories("loss"))
    assert {recovery, stages, *(line.get_color() for line in curves.axes[0].lines)} == {wanted}
    quadrants = plots_runs_pruning.quadrants(analyzer.filter(level=0.5).experiments).axes[0]
    assert wanted in {to_hex(line.get_color()).upper() for line in quadrants.lines}
    colors = [*plots_runs.STRATEGY_COLORS.values(), *plots.COLORS.values()]
    assert len(set(colors)) == len(colors)
    assert plots_runs.strategy_color("never heard of") == plots_runs.strategy_color("never heard of")


def test_every_registered_strategy_has_a_colour_of_its_own():
    from nbhelpers.heads import STRATEGIES

    assert set(STRATEGIES.names()) <= plots_runs.STRATEGY_COLORS.keys()
