"""Does the analysis panel show the runs that its form describes, follow those being written, and export them?"""

from __future__ import annotations

import base64
import re
import threading
import time
import zipfile

import pytest
from many_runs import a_run, pruning_run
from run_folders import tracker

from nbhelpers import analysis_panel, example_grid, overview_html
from nbhelpers.analysis_panel import ALL, EXAMPLE, AnalysisPanel
from nbhelpers.overview import FIGURES, NONE
from nbhelpers.tracking import ExperimentConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """m: gradient at 10 % (two seeds) and 50 %, random at 10 %; n: gradient at 10 %; and a plain loop."""
    place = tmp_path_factory.mktemp("runs")
    pruning_run(place / "g1", 4.0, 6.0, 5.0, control=3.6, level=0.1)
    pruning_run(place / "g2", 4.0, 6.0, 4.0, control=3.6, level=0.1, seed=1)
    pruning_run(place / "g3", 4.0, 12.0, 8.0, level=0.5)
    pruning_run(place / "r1", 4.0, 6.0, 5.5, strategy="random", level=0.1)
    pruning_run(place / "n1", 9.0, 9.5, 9.25, model="n", level=0.1)
    a_run(place / "loop", (3.0, 2.0), {"accuracy": 0.5}, name="<my loop>")
    return place


@pytest.fixture
def panel(folder, tmp_path):
    made = AnalysisPanel(folder, kind="pruning", root=tmp_path / "root")
    made.run_now()
    yield made
    made.follow.value = False
    made.wait(20)


def put(panel, **values):
    """Set form fields as a person does, and wait until what they ask is shown."""
    for name, value in values.items():
        panel.controls[name].put(value)
    until(lambda: panel._worker is None)


def until(probe, seconds=120):
    give_up = time.monotonic() + seconds
    while not (found := probe()):
        assert time.monotonic() < give_up, "not within the time"
        time.sleep(0.02)
    return found


def shown_means(panel):
    return re.findall(r"<b>([^<]*)</b>", panel.tables.value)


# ------------------------------------------------------------------------------------------------ the form


def test_without_a_folder_the_example_runs_are_shown_with_their_stamp(tmp_path):
    made = AnalysisPanel(root=tmp_path)
    runs = made.run_now()
    assert made.controls["folder"].get() == EXAMPLE and "48 runs (48 finished)" in made.status.value
    assert "48 planned, 48 finished, 0 failed, 0 running, 0 missing" in made.coverage.value
    assert example_grid.stamp(made.folder) in made.stamp.value and made.stamp.layout.display == ""
    assert example_grid.stamp(made.folder) in runs.summary()
    said = [text.get_text() for text in runs.figures("recovery")["tiny-llama"].texts]
    assert any("example runs recorded" in text for text in said), "in the pictures too"
    assert [place.name for place in tmp_path.iterdir()] == [made.folder.name]


def test_a_folder_of_ones_own_has_no_stamp(panel):
    assert panel.stamp.value == "" and panel.stamp.layout.display == "none"


def test_choices_are_what_the_runs_hold(panel):
    options = {name: list(panel.controls[name].parts[0].options) for name in ("kind", "model", "status", "metric")}
    assert options["kind"] == [ALL, "pruning", "test"] and options["model"] == [ALL, "m", "n"]
    assert options["status"] == [ALL, "finished"]
    assert options["metric"][0] == "fine_tuned/perplexity" and set(options["metric"]) == set(panel.view.metrics())
    assert "accuracy" not in options["metric"], "no run that is shown has it"
    assert list(panel.controls["group_by"].parts[0].options) == [NONE, "model", "strategy", "level", "control"][:4]


def test_what_was_resolved_stands_in_the_form(panel):
    values = panel.values()
    assert (values["metric"], values["group_by"], values["color_by"]) == ("fine_tuned/perplexity", "level", "strategy")
    assert "metric     fine_tuned/perplexity" in panel.settings()


def test_what_is_filtered_is_what_stands_in_the_table_and_in_the_picture(panel):
    assert shown_means(panel) == ["5.50", "4.50", "8.00", "9.25"] and list(panel.pictures) == ["m", "n"]
    before = panel.pictures["m"].value
    put(panel, filter="strategy=gradient", model="m")
    assert shown_means(panel) == ["4.50", "8.00"] and list(panel.pictures) == [""]
    assert panel.pictures[""].value not in (before, b"") and "3 of 6 runs shown" in panel.status.value
    assert {run.config["strategy"] for run in panel.overview.runs.experiments} == {"gradient"}


def test_another_metric_changes_table_best_and_picture(panel):
    before = panel.pictures["m"].value
    put(panel, metric="recovery_percent")
    assert shown_means(panel) == ["25.0", "75.0", "50.0", "50.0"] and panel.pictures["m"].value != before
    assert "highest recovery_percent" in panel.verdict.value


def test_grouping_and_colours_go_where_the_form_says(panel):
    put(panel, group_by="strategy", color_by="level")
    axes = panel.overview.figures("by_setting")["m"].axes[0]
    assert axes.get_xlabel() == "strategy" and axes.get_legend_handles_labels()[1] == ["10 %", "50 %"]
    put(panel, group_by=NONE, color_by=NONE)
    assert panel.overview.group_by is None and panel.values()["color_by"] == NONE


def test_every_figure_of_the_menu_is_drawn_or_says_why_not(panel):
    for text in FIGURES.values():
        put(panel, figure=text)
        assert panel.pictures and panel.error.value == "", text
    put(panel, kind="test")
    assert not panel.pictures and "cannot be drawn here" in panel.picture_note.value
    put(panel, figure=FIGURES["recovery"])
    assert "no finished pruning run among these 1 runs" in panel.picture_note.value
    assert "more figures need other runs" not in panel.missing.value or panel.error.value == ""


def test_several_changes_end_in_what_was_asked_last(panel):
    for value in ("level=0.1", "level=0.5", "strategy=random"):
        panel.controls["filter"].put(value)
    until(lambda: panel._worker is None)
    assert shown_means(panel) == ["5.50"]


def test_text_of_runs_is_shown_as_text(folder, tmp_path):
    made = AnalysisPanel(folder, kind="test", root=tmp_path)
    made.run_now()
    assert "&lt;my loop&gt;" in made.verdict.value + made.all_runs.value and "<my loop>" not in made.all_runs.value


# ------------------------------------------------------------------------------------------------ mistakes


@pytest.mark.parametrize(
    ("field", "value", "line"),
    [
        ("filter", "levl=3", "unknown field &#39;levl&#39;. Did you mean &#39;level&#39;"),
        ("filter", "level>high", "needs a number after &gt;"),
        ("folder", "nowhere/at/all", "does not exist: name a folder with runs in it"),
    ],
)
def test_a_mistake_is_one_line_in_the_panel_and_the_next_look_takes_it_away(panel, folder, field, value, line):
    put(panel, **{field: value})
    assert line in panel.error.value and "Traceback" not in panel.error.value and panel.state == "failed"
    put(panel, **{field: "" if field == "filter" else str(folder)})
    assert panel.error.value == "" and panel.state == "ready"


def test_a_fault_of_ours_is_shown_with_its_traceback(panel, monkeypatch):
    monkeypatch.setattr(analysis_panel, "settings_html", lambda _view: [][1])
    put(panel, filter="level=0.1")
    assert "list index out of range" in panel.error.value


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"figure": "recovry"}, "unknown figure 'recovry'. Did you mean 'recovery'"),
        ({"metric": "perplexty"}, "unknown metric 'perplexty'"),
        ({"group_by": "levl"}, "unknown group_by 'levl'. Did you mean 'level'"),
        ({"filter": "a 'b"}, "opens a quotation mark"),
        ({"folder": "nowhere"}, "'nowhere' does not exist"),
    ],
)
def test_a_bad_parameter_is_an_error_of_the_cell(folder, tmp_path, values, message):
    with pytest.raises((ValueError, LookupError), match=message):
        AnalysisPanel(**{"folder": folder, "root": tmp_path} | values).run_now()


def test_a_folder_without_runs_says_so_and_stays_usable(tmp_path):
    (tmp_path / "empty").mkdir()
    made = AnalysisPanel(tmp_path / "empty", root=tmp_path / "root")
    assert made.run_now().metric is None and "no run here has finished yet" in made.tables.value
    pruning_run(tmp_path / "empty" / "g", 4.0, 6.0, 5.0)
    assert made.run_now().metric == "fine_tuned/perplexity"


# ------------------------------------------------------------------------------------------------ following


def test_a_run_that_is_being_written_appears_goes_on_and_ends_while_it_is_followed(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis_panel, "FOLLOW_SECONDS", 0.05)
    a_run(tmp_path / "runs" / "old", (3.0,), {"accuracy": 0.25}, name="old", lr=1)
    made = AnalysisPanel(tmp_path / "runs", root=tmp_path / "root")
    made.run_now()
    with tracker(tmp_path / "runs" / "new", ExperimentConfig(name="newcomer", kind="test", lr=2)) as run:
        run.log_metrics(train_loss=1.75)
        made.follow.value = True
        until(lambda: "newcomer" in made.running.value and "1.75" in made.running.value)
        assert "1 at work" in made.running.value
        until(lambda: made.state == "running")
        run.log_metrics(train_loss=1.25)
        until(lambda: "1.25" in made.running.value)
        looks, mark = [], made._mark
        made._mark = lambda: looks.append(1) or mark()
        until(lambda: len(looks) > 2 * analysis_panel.QUIET_LOOKS or not made.follow.value)
        assert made.follow.value, "it goes on as long as something runs"
        run.finish({"accuracy": 0.75})
    until(lambda: not made.follow.value)
    assert "nothing runs any more" in made.status.value and made.running.value == ""
    assert shown_means(made) == ["0.250", "0.750"]
    made._follower.join(60)
    assert not made._follower.is_alive()


def test_following_ends_where_it_is_switched_off(tmp_path, monkeypatch):
    monkeypatch.setattr(analysis_panel, "FOLLOW_SECONDS", 0.05)
    with tracker(tmp_path / "runs" / "new", ExperimentConfig(name="n", kind="test")) as run:
        run.log_metrics(train_loss=1.0)
        made = AnalysisPanel(tmp_path / "runs", root=tmp_path / "root")
        made.follow.value = True
        until(lambda: made.view is not None)
        made.follow.value = False
        made._follower.join(60)
        assert not made._follower.is_alive()
        run.finish({})


def test_a_folder_that_goes_away_while_it_is_followed_is_said(panel, monkeypatch):
    monkeypatch.setattr(analysis_panel, "FOLLOW_SECONDS", 0.05)
    monkeypatch.setattr(panel.analyzer, "load_all", lambda: (_ for _ in ()).throw(OSError("the disk is gone")))
    panel.follow.value = True
    until(lambda: not panel.follow.value)
    assert "the disk is gone" in panel.error.value


# ------------------------------------------------------------------------------------------------ tables, two runs, zip


def test_a_long_table_says_how_many_rows_it_shows(panel, monkeypatch):
    monkeypatch.setattr(overview_html, "MOST_ROWS", 2)
    put(panel, filter="level=0.1")
    assert "2 of 4 runs shown, newest first; the export holds all" in panel.all_runs.value
    monkeypatch.setattr(overview_html, "MOST_SETTINGS", 1)
    put(panel, filter="")
    assert "1 of 4 settings shown, the export holds all" in panel.tables.value


def test_two_chosen_runs_show_the_fields_in_which_they_differ(panel):
    ids = {run.folder.name: run.run_id for run in panel.view.experiments}
    panel.pair[0].value, panel.pair[1].value = ids["g3"], ids["r1"]
    cells = re.findall(r"<td>([^<]*)</td>", panel.difference.value)
    assert cells == ["strategy", "gradient", "random", "level", "0.5", "0.1"]
    panel.pair[1].value = ids["g3"]
    assert "no config field differs" in panel.difference.value


def test_the_export_button_offers_a_zip_of_what_is_shown(panel, tmp_path):
    put(panel, filter="strategy=gradient", model="m")
    panel.export_button.click()
    content = re.search(
        r'download="(analysis-[^"]*\.zip)" href="data:application/zip;base64,([^"]*)"', panel.export_link.value
    )
    (path,) = (tmp_path / "root" / "exports").iterdir()
    assert path.name == content[1] and path.read_bytes() == base64.b64decode(content[2])
    with zipfile.ZipFile(path) as bundle:
        assert bundle.read("runs.csv").decode().count("\n") == 1 + 3
        assert {"values.csv", "settings.csv", "figures/by_setting.svg", "figures/by_setting.png"} <= set(
            bundle.namelist()
        )


def test_a_link_stays_while_the_runs_are_looked_at_again_and_goes_with_the_next_change(panel):
    panel.export_button.click()
    link = panel.export_link.value
    panel.run_now()
    assert "data:application/zip" in link and panel.export_link.value == link
    panel.controls["filter"].put("level>0.1")
    assert panel.export_link.value == ""
    panel.wait()


def test_an_export_waits_for_what_was_asked_just_before(panel):
    """The look is held up; the archive asked for meanwhile is of the new question all the same."""
    with panel._looking:
        panel.controls["filter"].put("level>99")
        asked = threading.Thread(target=panel.export_button.click)
        asked.start()
        asked.join(0.2)
        assert asked.is_alive()
    asked.join(60)
    assert "0 of 6 runs" in panel.status.value and not panel.view.experiments


def test_an_export_that_fails_is_said(panel, monkeypatch):
    monkeypatch.setattr(panel, "export", lambda: 1 / 0)
    panel.export_button.click()
    assert "division by zero" in panel.error.value and not panel.export_button.disabled


def test_headless_nothing_is_displayed_and_no_picture_is_drawn(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("NBHELPERS_HEADLESS", "1")
    made = AnalysisPanel(folder, kind="pruning", root=tmp_path)
    assert not made.live and made.show() is None and made.run_now().metric and made.pictures == {}
