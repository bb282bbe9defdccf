"""Do the figures of pruning runs show the numbers that the runs hold?"""

from __future__ import annotations

import math

import pytest
from figures_of_runs import four_pruning_runs, line
from many_runs import a_run, pruning_run

from nbhelpers import plots_runs_pruning as figures
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


def test_the_stages_of_each_setting_are_drawn_as_means_over_seeds(runs):
    axes = figures.stages_of_runs(runs).axes[0]
    assert list(line(axes, "gradient, 10 %").get_ydata()) == [4.0, 6.0, 4.5]
    assert list(line(axes, "gradient, 50 %").get_ydata()) == [4.0, 12.0, 8.0]
    assert line(axes, "control (unpruned)").get_ydata()[0] == 3.6


def test_recovery_is_drawn_against_level_with_the_control_beside_it(runs):
    left, right = figures.recovery(runs).axes
    gradient = line(left, "gradient")
    assert list(gradient.get_ydata()) == [75.0, 50.0]  # mean of 50 and 100; (12 - 8) / (12 - 4)
    assert list(line(right, "gradient").get_ydata()) == [-12.5, -100.0]  # mean of -25 and 0
    assert line(right, "control (unpruned)").get_ydata()[0] == pytest.approx(10.0)
    assert list(line(right, "random").get_ydata()) == [-25.0]


def test_recovery_has_its_interval_over_seeds_and_no_bar_for_one_seed(runs):
    (bars,) = [c for c in figures.recovery(runs).axes[0].containers if c.get_label() == "gradient"]
    (low, high), (one, same) = [[y for _, y in segment] for segment in bars.lines[2][0].get_segments()]
    half = 12.7062 * math.sqrt(1250 / 2)  # t of 1 degree at 97.5 %; values 50 and 100
    assert (low, high) == pytest.approx((75 - half, 75 + half), rel=1e-4)
    assert one == same == 50.0


def test_a_strategy_whose_pruning_did_not_hurt_has_no_recovery(runs):
    assert "random" not in figures.recovery(runs).axes[0].get_legend_handles_labels()[1]


def test_each_run_is_a_point_in_percent_of_baseline_and_the_quadrants_have_names(runs):
    axes = figures.quadrants(runs).axes[0]
    points = {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1}
    assert points == {(50.0, -25.0), (50.0, -50.0), (200.0, -100.0), (-25.0, 50.0)}
    said = {" ".join(text.get_text().split()) for text in axes.texts}
    assert said == {
        "both hurt",
        "both helped",
        "pruning hurt, fine-tuning helped",
        "pruning helped, fine-tuning hurt",
    }


def test_every_point_lies_within_the_limits_also_far_out(tmp_path):
    for at, pruned in enumerate((4.01, 4.02, 4.04, 4000.0)):
        pruning_run(tmp_path / str(at), 4.0, pruned, 4.0, level=at / 10)
    axes = figures.quadrants(ExperimentAnalyzer(tmp_path).experiments).axes[0]
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines if len(line.get_xdata()) == 1]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    assert all(left < x < right and low < y < high for x, y in points) and axes.get_xscale() == "symlog"


def test_the_grid_says_the_final_change_in_each_cell_and_what_was_not_run(runs):
    axes = figures.change_grid(runs).axes[0]
    cells = {text.get_position(): text.get_text() for text in axes.texts}
    # rows: random, gradient; columns: 10 %, 50 %
    assert cells == {(0, 0): "+25.0", (1, 0): "not run", (0, 1): "+12.5\n(2)", (1, 1): "+100"}
    assert [label.get_text() for label in axes.get_yticklabels()] == ["random", "gradient"]


def test_runs_of_several_models_are_not_drawn_as_one(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 6.0, 5.0)
    pruning_run(tmp_path / "b", 4.0, 6.0, 5.0, model="other")
    with pytest.raises(ValueError, match=r"several models \(m, other\): choose one with filter\(model=...\)"):
        figures.recovery(ExperimentAnalyzer(tmp_path).experiments)


def test_without_a_pruning_run_the_error_says_so(tmp_path):
    a_run(tmp_path / "a", [1.0])
    with pytest.raises(ValueError, match="no finished pruning run among these 1 runs"):
        figures.change_grid(ExperimentAnalyzer(tmp_path).experiments)


def test_a_run_that_was_not_fine_tuned_counts_by_what_pruning_left(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 6.0, None)
    runs = ExperimentAnalyzer(tmp_path).experiments
    assert [text.get_text() for text in figures.change_grid(runs).axes[0].texts] == ["+50.0"]
    assert list(figures.stages_of_runs(runs).axes[0].lines[0].get_ydata()) == [4.0, 6.0]
    with pytest.raises(ValueError, match="no run was fine-tuned"):
        figures.quadrants(runs)
