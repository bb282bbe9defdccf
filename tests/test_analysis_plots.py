"""Do the figures over many runs show the numbers that the runs hold, in the same colours everywhere?"""

from __future__ import annotations

import math

import pytest
from many_runs import a_run, pruning_run
from matplotlib.colors import to_hex

from nbhelpers import analysis_plots as figures
from nbhelpers import plots
from nbhelpers.analysis import ExperimentAnalyzer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """gradient at 10 % (two seeds) and 50 %, random at 10 %; the control reaches 3.6 from 4."""
    place = tmp_path_factory.mktemp("runs")
    pruning_run(place / "g1", 4.0, 6.0, 5.0, control=3.6, level=0.1)
    pruning_run(place / "g2", 4.0, 6.0, 4.0, control=3.6, level=0.1, seed=1)
    pruning_run(place / "g3", 4.0, 12.0, 8.0, level=0.5)
    pruning_run(place / "r1", 4.0, 3.0, 5.0, strategy="random", level=0.1)
    return place


@pytest.fixture
def analyzer(folder):
    return ExperimentAnalyzer(folder)


@pytest.fixture
def runs(analyzer):
    return analyzer.experiments


def line(axes, label):
    """The one line or bar series of this label."""
    (found,) = [handle for handle, said in zip(*axes.get_legend_handles_labels(), strict=True) if said == label]
    return found[0] if hasattr(found, "lines") else found


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


def test_a_strategy_has_the_same_colour_in_every_figure_and_no_stage_has_it(analyzer, runs):
    wanted = figures.strategy_color("gradient")
    recovery = line(figures.recovery(runs).axes[1], "gradient").get_color()
    stages = line(figures.stages_of_runs(runs).axes[0], "gradient, 10 %").get_color()
    curves = figures.learning_curves_of_runs(analyzer.filter(strategy="gradient").trajectories("loss"))
    assert {recovery, stages, *(line.get_color() for line in curves.axes[0].lines)} == {wanted}
    quadrants = figures.quadrants(analyzer.filter(level=0.5).experiments).axes[0]
    assert wanted in {to_hex(line.get_color()).upper() for line in quadrants.lines}
    colors = [*figures.STRATEGY_COLORS.values(), *plots.COLORS.values()]
    assert len(set(colors)) == len(colors)
    assert figures.strategy_color("never heard of") == figures.strategy_color("never heard of")


def test_every_registered_strategy_has_a_colour_of_its_own():
    from nbhelpers.heads import STRATEGIES

    assert set(STRATEGIES.names()) <= figures.STRATEGY_COLORS.keys()


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


def test_every_figure_has_a_vector_form_that_is_the_same_each_time(analyzer):
    for name, draw in figures.FIGURES.items():
        if name in ("recovery", "learning_curves"):
            assert plots.svg(draw(analyzer)).startswith("<?xml"), name


def test_figures_on_generated_text_are_stamped(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 6.0, 5.0, generated=True)
    analyzer = ExperimentAnalyzer(tmp_path)
    for name, draw in figures.FIGURES.items():
        assert any("generated" in text.get_text() for text in draw(analyzer).texts), name


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


def test_plain_loops_without_a_strategy_have_a_colour_a_run(tmp_path):
    for name in "ab":
        a_run(tmp_path / name, [2.0, 1.0], name=name)
    figure = figures.learning_curves_of_runs(ExperimentAnalyzer(tmp_path).trajectories("loss"))
    assert len({line.get_color() for line in figure.axes[0].lines}) == 2
    assert [text.get_text() for text in figure.axes[1].texts] == ["not measured"]
