"""Do the figures of a comparison show every number and its interval, one look a model, and nothing not measured?"""

from __future__ import annotations

import math

import planted_comparison as planted
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.text import Text

from nbhelpers import comparison_html, plots, plots_comparison, plots_comparison_curves, plots_comparison_size
from nbhelpers import plots_comparison_use as use
from nbhelpers.plots_comparison import NotMeasured, accuracy, chapters, frequencies

LARGE, SMALL = "LLM_Llama-3.1-8B-Instruct_untrained", "SLM_Llama-3.2-3B-Instruct_finetuned"
BEFORE = "SLM_Llama-3.2-3B-Instruct_zero_shot"
DRAWN = {name: draw for name, (draw, _) in comparison_html.FIGURES.items()}


def lines(figure, label: str) -> list:
    return [line for line in figure.axes[0].lines if line.get_label() == label]


def words(figure) -> list[str]:
    held = [*figure.texts, *figure.axes[0].texts, *(text for one in figure.legends for text in one.get_texts())]
    return [text.get_text() for text in held]


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_has_a_form_for_a_page_and_one_for_a_phone_with_the_stamp_where_rows_are_generated(name):
    made = planted.result()
    for narrow, width in ((False, plots_comparison.WIDE), (True, plots_comparison.NARROW)):
        figure = DRAWN[name](made, narrow)
        assert figure.get_figwidth() == width
        assert [text.get_text() for text in figure.texts] == [plots_comparison.STAMP]
        assert plots.svg(figure) == plots.svg(DRAWN[name](made, narrow)), "the same bytes for the same result"
    made["data"]["generated"] = False
    assert DRAWN[name](made).texts == []


@pytest.mark.parametrize("name", DRAWN)
def test_nothing_reaches_beyond_the_edge_of_a_figure(name):
    for narrow in (False, True):
        figure = DRAWN[name](planted.result(), narrow)
        figure.draw_without_rendering()
        box, canvas = figure.get_tightbbox(), figure.bbox_inches
        assert box.x0 >= -0.03 and box.x1 <= canvas.width + 0.03, "a name would be cut off"
        assert box.y0 >= -0.03 and box.y1 <= canvas.height + 0.03


def test_each_entry_is_a_point_at_its_accuracy_with_its_interval_best_first_in_its_group():
    made = planted.result()
    figure = accuracy(made)
    entries = plots_comparison.ordered(made)
    assert [line.get_xdata()[0] for line in lines(figure, "_point")] == [e["top_1_accuracy"] for e in entries.values()]
    ends = [tuple(e["intervals"]["top_1_accuracy"][end] for end in ("low", "high")) for e in entries.values()]
    assert [tuple(line.get_xdata()) for line in lines(figure, "_interval")] == ends
    low, high = (100 * end for end in plots_comparison.interval(entries[SMALL], "top_1_accuracy"))
    assert f"84.4 %  [{low:.1f}, {high:.1f}]" in words(figure), "81 of 96 in percent, as in the tables"
    assert [key.split("_")[0] for key in entries] == ["LLM"] * 2 + ["SLM"] * 4 + ["ENSEMBLE"] + ["BASELINE"] * 3
    small = [e["top_1_accuracy"] for e in entries.values() if e["training_status"] == "finetuned"]
    assert small == sorted(small, reverse=True)


def test_guessing_is_a_line_where_it_is_known_and_an_entry_without_the_measure_is_left_out():
    made = planted.result()
    assert [line.get_xdata()[0] for line in lines(accuracy(made), "guessing: 4.2 %")] == [1 / 24]
    del made["data"]["chance"]
    assert accuracy(made).axes[0].get_legend() is None
    made["models"][LARGE]["top_1_accuracy"] = None
    assert len(lines(accuracy(made), "_point")) == len(made["models"]) - 1


def test_a_model_has_one_colour_in_all_figures_hollow_before_tuning_and_no_two_share_one():
    made = planted.result()
    look = plots_comparison.looks(made)
    assert look[BEFORE]["color"] == look[SMALL]["color"]
    assert look[BEFORE]["markerfacecolor"] == "white" != look[SMALL]["markerfacecolor"]
    models = {(e["model_type"], e["model"]): look[key]["color"] for key, e in made["models"].items()}
    assert len(set(models.values())) == len(models)
    bars = {to_hex(patch.get_facecolor(), keep_alpha=False) for patch in chapters(made).axes[0].patches}
    curve = {line.get_color() for line in lines(DRAWN["break_even"](made), "_small")}
    assert bars == {look[LARGE]["color"].lower(), look[SMALL]["color"].lower()} and curve == {look[SMALL]["color"]}


def test_bars_are_the_accuracies_of_each_part_of_the_two_that_the_answer_names_with_their_numbers_of_rows():
    made = planted.result()
    for draw, part, field in ((chapters, "by_chapter", "chapter"), (frequencies, "by_frequency", "training_rows")):
        figure = draw(made)
        large, small = ({one[field]: one for one in made["models"][key][part]} for key in (LARGE, SMALL))
        wanted = [cells[name]["accuracy"] for name in large for cells in (large, small)]
        assert [patch.get_width() for patch in figure.axes[0].patches] == pytest.approx(wanted)
        said = [text for text in words(figure) if "(n = " in text]
        assert [f"(n = {one['n']})" in text for text, one in zip(said, large.values(), strict=True)] == [True] * len(
            said
        )
    assert "1 training row  (n = 28)" in words(frequencies(made))


def test_bubbles_have_areas_as_their_memories_and_names_that_do_not_overlap():
    made = planted.result()
    shown = [e for e in made["models"].values() if e["parameters"]]
    for narrow in (False, True):
        figure = plots_comparison_size.size(made, narrow)
        areas = [part.get_sizes()[0] for part in figure.axes[0].collections]
        memories = [e["memory"]["peak_bytes"] for e in shown]
        assert [a / areas[0] for a in areas] == pytest.approx([m / memories[0] for m in memories])
        places = [tuple(part.get_offsets()[0]) for part in figure.axes[0].collections]
        assert places == [(e["parameters"], e["top_1_accuracy"]) for e in shown]
        names = [text for text in figure.axes[0].texts if "\n" in text.get_text()]
        assert len(names) == 4, "those before tuning are told by their colour and arrow"
        assert overlapping(figure, names) == []


def overlapping(figure, texts) -> list:
    figure.draw_without_rendering()
    boxes = [(text.get_text(), Text.get_window_extent(text)) for text in texts]  # without its line to the point
    return [(a, b) for i, (a, one) in enumerate(boxes) for b, other in boxes[:i] if one.overlaps(other)]


def test_twelve_models_of_one_size_and_accuracy_each_get_a_place_for_their_name():
    made = planted.result()
    one = made["models"][LARGE]
    made["models"] = {f"LLM_{n}": one | {"model": f"model-{n}", "parameters": 10**9 + n} for n in range(12)}
    figure = plots_comparison_size.size(made | {"answer": None})
    assert overlapping(figure, [text for text in figure.axes[0].texts if "model-" in text.get_text()]) == []


def test_memory_that_was_not_measured_is_no_bubble_size():
    made = planted.result()
    made["models"][LARGE]["memory"] = None
    styles = [part.get_linestyle()[0][1] for part in plots_comparison_size.size(made).axes[0].collections]
    assert [style is not None for style in styles] == [True] + [False] * 5, "a dotted edge"
    for entry in made["models"].values():
        entry["memory"] = None
    assert "memory was not measured: all bubbles have one size" in words(plots_comparison_size.size(made))


def test_the_cost_is_money_where_a_price_was_named_and_time_where_not():
    made = planted.result()
    figure = plots_comparison_size.cost(made)
    points = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines(figure, "_point")]
    assert points == [(row["price_per_1000"], row["accuracy"]) for row in made["cost"]["rows"]]
    assert points[0][0] == pytest.approx(0.42 * 1000 / 3600 * 2), "0.42 s a dialogue at 2 EUR an hour"
    assert figure.axes[0].get_xlabel() == "EUR for 1,000 dialogues"
    made["cost"] = planted.cost_of(made["models"], made["headline"], None)
    figure = plots_comparison_size.cost(made)
    assert lines(figure, "_point")[0].get_xdata()[0] == pytest.approx(7.0), "420 s are 7 minutes"
    assert figure.axes[0].get_xlabel() == "minutes for 1,000 dialogues"


def test_break_even_shows_nought_and_every_point_the_large_models_line_and_the_crossing_with_its_interval():
    made = planted.result()
    found = made["break_even"]
    figure = plots_comparison_curves.break_even(made)
    (curve,) = lines(figure, "_small")
    assert [round(math.expm1(x)) for x in curve.get_xdata()] == [0, 6, 12, 24, 48, 96]
    assert list(curve.get_ydata()) == [one["accuracy"] for one in found["points"]]
    assert lines(figure, "_large")[0].get_ydata()[0] == found["large"]["accuracy"]
    assert math.expm1(lines(figure, "_crossing")[0].get_xdata()[0]) == pytest.approx(found["crossing"]["rows"])
    ends = [math.expm1(x) for x in lines(figure, "_crossing_interval")[0].get_xdata()]
    assert ends == pytest.approx([found["crossing"][end] for end in ("low", "high")])
    ticks = [label.get_text() for label in plots_comparison_curves.break_even(made, True).axes[0].get_xticklabels()]
    assert (ticks[0], ticks[-1], len(ticks)) == ("0", "96", 6) and "" in ticks, "a phone has room for some"


def test_where_the_small_model_never_overtakes_no_crossing_is_drawn():
    made = planted.result(break_even=planted.break_even_of([True] * len(planted.rows())))
    figure = plots_comparison_curves.break_even(made)
    assert made["break_even"]["crossing"]["state"] == "never" and not lines(figure, "_crossing")


def test_thresholds_of_validation_are_marked_where_they_landed_on_the_test_and_only_where_there_is_one():
    made = planted.result()
    found = made["routing"][SMALL]
    figure = plots_comparison_curves.routing(made)
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in lines(figure, "_chosen")]
    assert marks == [(p["test"]["coverage"], p["test"]["precision"]) for p in found["points"] if p["test"]]
    assert len(marks) == 2 and [p["threshold"] for p in found["points"]][2] is None
    assert [text for text in words(figure) if "wanted" in text] == ["wanted 80 %", "wanted 90 %"], "no mark, no entry"
    (curve,) = lines(figure, "_curve")
    assert list(curve.get_xdata()) == [one["coverage"] for one in found["curve"]]
    (bins,) = lines(plots_comparison_curves.calibration(made), "_bins")
    assert list(bins.get_ydata()) == [one["accuracy"] for one in found["bins"]]


def test_memory_and_time_are_bars_as_measured_with_a_line_at_what_was_estimated():
    made = planted.result()
    figure = use.memory(made)
    entries = [(key, e["memory"]) for key, e in plots_comparison.ordered(made).items() if e["memory"]]
    widths = [patch.get_width() for patch in figure.axes[0].patches]
    assert widths == [m[part] for _, m in entries for part in ("peak_bytes", "weights_bytes")]
    estimated = use.estimated_bytes(made)
    assert [line.get_xdata()[0] for line in lines(figure, "_estimate")] == [estimated[key] for key, _ in entries]
    figure = use.phases(made)
    assert [p.get_width() for p in figure.axes[0].patches] == [one["seconds"] / 60 for one in made["phases"]]
    ticks = [line.get_xdata()[0] for line in lines(figure, "_estimate")]
    assert ticks == [one["estimated_seconds"] / 60 for one in made["phases"] if "estimated_seconds" in one]
    assert "7.00 min, cached" in words(figure)
    bar = figure.axes[0].patches[-1]
    assert to_hex(bar.get_facecolor()) == plots_comparison.looks(made)[SMALL]["color"].lower(), "on 24 rows: its model"


def no_estimates(made):
    return made | {"phases": [phase | {"estimated": None, "estimated_seconds": None} for phase in made["phases"]]}


def test_without_an_estimate_no_line_and_no_entry_in_the_legend():
    made = no_estimates(planted.result())
    for draw in (use.memory, use.phases):
        assert not lines(draw(made), "_estimate") and "estimated before" not in words(draw(made))


def bare(**changes):
    """A result in which nothing was measured but what changes say."""
    made = planted.result(break_even=None, routing={}, cost=None, phases=[], answer=None)
    for entry in made["models"].values():
        entry |= dict.fromkeys(("top_1_accuracy", "parameters", "memory", "by_chapter", "by_frequency"))
    return made | changes


@pytest.mark.parametrize("name", DRAWN)
def test_what_was_not_measured_is_a_line_and_not_an_empty_figure(name):
    with pytest.raises(NotMeasured, match=r"^(no .*|no model's .*)$"):
        DRAWN[name](bare())


def test_a_name_with_dollars_is_no_formula_and_a_long_one_is_cut():
    made = planted.result()
    made["models"][LARGE]["model"] = "$x^2$_{"
    made["models"][SMALL]["model"] = "model-" * 10
    shown = [label.get_text() for label in accuracy(made).axes[0].get_yticklabels()]
    assert r"\$x^2\$_{" in shown and "model-" * 4 + "m…" in shown
    for draw in DRAWN.values():
        plots.svg(draw(made, narrow=True))


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (plots_comparison.gigabytes(1.5 * 2**30), "1.5 GB"),
        (plots_comparison.gigabytes(86 * 2**20), "86 MB"),
        (plots_comparison.seconds_said(4), "4.00 s"),
        (plots_comparison.seconds_said(1380), "23.0 min"),
        (plots_comparison.seconds_said(9000), "2.50 h"),
        (plots_comparison.parameters_said(8_030_000_000), "8.03B"),
        (plots_comparison.parameters_said(999_900), "1M"),
        (plots_comparison_size._round_below(1.9 * 2**30) / 2**30, 1),
        (plots_comparison_size._round_below(700 * 2**20) / 2**20, 500),
        (use.round_step(8.3), 2),
    ],
)
def test_numbers_for_people_are_short_and_round(said, wanted):
    assert said == wanted


@pytest.mark.parametrize("names, columns", [("abcd", 3), ("abcde", 2), ("abc", 5)])
def test_a_legend_is_read_row_by_row(names, columns):
    figure = Figure()
    plots_comparison.legend_above(figure, [Line2D([], [], label=name) for name in names], columns)
    [legend] = figure.legends
    FigureCanvasAgg(figure).draw()
    places = {text.get_text(): text.get_window_extent().p0 for text in legend.get_texts()}
    assert sorted(places, key=lambda name: (-round(places[name][1] / 6), places[name][0])) == list(names)
