"""Do curves of many runs show each logged value at its step, and say whose it is?"""

from __future__ import annotations

import pytest
from figures_of_runs import four_pruning_runs
from many_runs import a_run

from nbhelpers import plots_runs_curves as figures
from nbhelpers.analysis import ExperimentAnalyzer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return four_pruning_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def analyzer(folder):
    return ExperimentAnalyzer(folder)


def test_learning_curves_show_each_value_at_its_step(analyzer):
    chosen = analyzer.filter(level=0.5)
    left, right = figures.learning_curves_of_runs(chosen.trajectories("loss"), chosen.trajectories("validation")).axes
    assert (list(left.lines[0].get_xdata()), list(left.lines[0].get_ydata())) == ([0, 1, 2], [3.0, 2.0, 1.5])
    assert list(right.lines[0].get_ydata()) == pytest.approx([3.1, 2.1, 1.6])
    assert "nats" in left.get_ylabel() and left.get_xlabel() == "optimizer step"


def test_runs_with_the_same_learning_rate_share_a_line_and_say_how_many(analyzer):
    figure = figures.learning_rates(analyzer.trajectories("learning_rate"))
    assert [len(axes.lines) for axes in figure.axes] == [1]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["4 curves alike"]


def test_throughput_starts_at_zero_and_names_its_unit(analyzer):
    axes = figures.throughput(analyzer.trajectories("throughput")).axes[0]
    assert axes.get_ylim()[0] == 0 and "tokens per second" in axes.get_ylabel()
    assert list(axes.lines[0].get_ydata()) == [100.0, 101.0, 102.0]


def test_plain_loops_without_a_strategy_have_a_colour_a_run(tmp_path):
    for name in "ab":
        a_run(tmp_path / name, [2.0, 1.0], name=name)
    figure = figures.learning_curves_of_runs(ExperimentAnalyzer(tmp_path).trajectories("loss"))
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]
