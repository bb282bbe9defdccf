"""Do the figures show the numbers that they were given?"""

from __future__ import annotations

import pytest
from matplotlib.colors import to_hex

from nbhelpers import plots

RESULT = {
    "model": "some/tiny-llama",
    "strategy": "gradient",
    "level": 0.3,
    "baseline": {"perplexity": 4.0},
    "pruned": {"perplexity": 8.0},
    "fine_tuned": {"perplexity": 5.0},
    "control": None,
    "scores": [[0.1, 0.9], [0.5, 0.2]],
    "pruned_heads": [[0, 0]],
    "layers": 2,
    "heads_per_layer": 2,
    "total_heads": 4,
    "text": {"generated": True},
}


def test_stage_bars_are_as_high_as_the_perplexities_and_leave_out_what_was_not_run():
    axes = plots.stages(RESULT).axes[0]
    assert [bar.get_height() for bar in axes.patches] == [4.0, 8.0, 5.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["baseline", "pruned", "fine-tuned"]


def test_the_same_thing_has_the_same_colour_in_every_figure():
    bars = plots.stages(RESULT).axes[0].patches
    curve = {"train_losses": [(1, 2.0)], "validation_nlls": [(0, 1.0)]}
    line = plots.learning_curves({"fine_tuned": curve}, RESULT).axes[0].lines[0]
    assert to_hex(bars[2].get_facecolor()).upper() == line.get_color() == plots.COLORS["fine_tuned"]


def test_the_head_map_shows_the_scores_and_a_cross_on_each_closed_head():
    axes = plots.head_map(RESULT).axes[0]
    assert axes.images[0].get_array().tolist() == RESULT["scores"]
    assert {(line.get_xdata()[0], line.get_ydata()[0]) for line in axes.lines} == {(0, 0)}
    assert axes.get_title() == "1 of 4 heads closed (gradient)"


def test_validation_loss_is_drawn_as_perplexity():
    curve = {"train_losses": [(1, 2.0)], "validation_nlls": [(0, 0.0), (5, 1.0)]}
    right = plots.learning_curves({"control": curve}, RESULT).axes[1]
    assert right.lines[0].get_ydata() == pytest.approx([1.0, 2.718281828])


@pytest.mark.parametrize("generated", [True, False])
def test_figures_on_generated_text_are_stamped_and_others_are_not(generated):
    figure = plots.stages(RESULT | {"text": {"generated": generated}})
    assert any("generated" in text.get_text() for text in figure.texts) is generated


def test_the_same_figure_gives_the_same_bytes():
    assert plots.png(plots.head_map(RESULT)) == plots.png(plots.head_map(RESULT))
    assert plots.svg(plots.stages(RESULT)).startswith("<?xml")


def test_a_model_with_no_head_closed_still_has_a_map():
    figure = plots.head_map(RESULT | {"scores": [], "pruned_heads": []})
    assert figure.axes[0].get_title().startswith("0 of 4")


def test_without_a_training_the_curves_say_so():
    assert [text.get_text() for text in plots.learning_curves({}, RESULT).axes[0].texts] == ["not fine-tuned"]
