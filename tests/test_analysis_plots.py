"""Does every figure over many runs have a vector form, and say where its text was generated?"""

from __future__ import annotations

import pytest
from figures_of_runs import four_pruning_runs
from many_runs import pruning_run

from nbhelpers import analysis_plots as figures
from nbhelpers import plots
from nbhelpers.analysis import ExperimentAnalyzer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return four_pruning_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def analyzer(folder):
    return ExperimentAnalyzer(folder)


def test_every_figure_has_a_vector_form_that_is_the_same_each_time(analyzer):
    for name, draw in figures.FIGURES.items():
        if name in ("recovery", "learning_curves"):
            assert plots.svg(draw(analyzer)).startswith("<?xml"), name


def test_figures_on_generated_text_are_stamped(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 6.0, 5.0, generated=True)
    analyzer = ExperimentAnalyzer(tmp_path)
    for name, draw in figures.FIGURES.items():
        assert any("generated" in text.get_text() for text in draw(analyzer).texts), name
