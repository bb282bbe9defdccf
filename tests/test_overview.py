"""Does the overview of many runs say what their files say, and leave as one archive?"""

from __future__ import annotations

import csv
import io
import json
import zipfile

import pytest
from many_runs import a_run, pruning_run

from nbhelpers import overview, plots
from nbhelpers.analysis import ExperimentAnalyzer
from nbhelpers.overview import FIGURES, NONE, Overview, coverage, coverage_line


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two models; m: gradient at 10 % (two seeds) and 50 %, random at 10 %; n: gradient at 10 %."""
    place = tmp_path_factory.mktemp("runs")
    pruning_run(place / "g1", 4.0, 6.0, 5.0, control=3.6, level=0.1)
    pruning_run(place / "g2", 4.0, 6.0, 4.0, control=3.6, level=0.1, seed=1)
    pruning_run(place / "g3", 4.0, 12.0, 8.0, level=0.5)
    pruning_run(place / "r1", 4.0, 6.0, 5.5, strategy="random", level=0.1)
    pruning_run(place / "n1", 9.0, 9.5, 9.25, model="n", level=0.1)
    return place


@pytest.fixture
def runs(folder):
    return Overview(ExperimentAnalyzer(folder), folder)


def plan_of(folder, *jobs):
    """A sweep's plan with these jobs."""
    described = {job: {"id": job, "config": {"model": "m"}, "values": {}, "name": job} for job in jobs}
    rows = [{"values": {}, "job": job, "alias": False} for job in jobs]
    plan = {"name": "p", "kind": "pruning"}
    folder.mkdir(exist_ok=True)
    (folder / "plan.json").write_text(json.dumps({"format": 1, "plan": plan, "rows": rows, "jobs": described}))


def points(figure):
    """label -> heights of the means of a by_setting figure."""
    axes = figure.axes[0]
    found = zip(*axes.get_legend_handles_labels(), strict=True)
    return {label: list(bars[0].get_ydata()) for bars, label in found}


def test_what_the_runs_suggest_is_asked_where_nobody_says_it(runs):
    assert (runs.metric, runs.group_by, runs.color_by) == ("fine_tuned/perplexity", "level", "strategy")


def test_nothing_is_grouped_where_none_is_asked(folder):
    runs = Overview(ExperimentAnalyzer(folder), folder, group_by=NONE, color_by=NONE)
    assert (runs.group_by, runs.color_by) == (None, None) and set(runs.figures("by_setting")) == {"m", "n"}


def test_settings_are_means_over_seeds_in_the_order_of_model_colour_and_axis(runs):
    rows = [(row["model"], row["strategy"], row["level"], row["fine_tuned/perplexity"]) for row in runs.setting_rows()]
    assert rows == [
        ("m", "random", 0.1, 5.5),
        ("m", "gradient", 0.1, 4.5),
        ("m", "gradient", 0.5, 8.0),
        ("n", "gradient", 0.1, 9.25),
    ]
    assert [row["seeds"] for row in runs.setting_rows()] == [1, 2, 1, 1]
    assert "[-1.85, 10.9]" in runs.settings_text()  # 4.5 +- 12.706 * 0.7071 / sqrt(2)


def test_each_model_has_a_figure_of_its_own_with_the_means_of_its_settings(runs):
    figures = runs.figures("by_setting")
    assert list(figures) == ["m", "n"]
    assert points(figures["m"]) == {"random": [5.5], "gradient": [4.5, 8.0]}
    assert "m: mean and 95 % interval over 2 seeds" in figures["m"].axes[0].get_title()


def test_what_is_filtered_is_what_is_drawn(folder):
    kept = ExperimentAnalyzer(folder).filter(strategy="gradient", model="m")
    assert points(Overview(kept, folder, color_by="strategy").figures("by_setting")[""]) == {"gradient": [4.5, 8.0]}


def test_another_metric_is_another_figure_and_another_best(folder):
    runs = Overview(ExperimentAnalyzer(folder), folder, metric="recovery_percent")
    assert points(runs.figures("by_setting")["m"]) == {"random": [25.0], "gradient": [75.0, 50.0]}
    assert runs.best() == {"m": (runs.runs.experiment(g2_id(folder)).run_id, 100.0), "n": runs.best()["n"]}
    assert runs.best_lines()[0].startswith("m: highest recovery_percent as a mean over 2 seeds 75.0")


def g2_id(folder):
    return json.loads((folder / "g2" / "manifest.json").read_text())["run_id"]


def test_every_figure_is_drawn_or_says_why_not_in_one_line(runs, tmp_path):
    assert runs.drawable() == dict.fromkeys(FIGURES)
    a_run(tmp_path / "loop", (3.0, 2.0), {"accuracy": 0.5}, lr=1)
    why = Overview(ExperimentAnalyzer(tmp_path), tmp_path).drawable()
    assert {name for name, text in why.items() if text is None} == {"by_setting", "learning_curves"}
    assert "no finished pruning run among these 1 runs" in why["recovery"]
    assert "unknown logged metric 'learning_rate'" in why["learning_rate"] and "\n" not in why["learning_rate"]


def test_an_unknown_figure_is_named(runs):
    with pytest.raises(LookupError, match="unknown figure 'recovry'. Did you mean 'recovery'"):
        runs.figures("recovry")


def test_no_run_at_all_is_said_and_not_drawn(folder):
    runs = Overview(ExperimentAnalyzer(folder).where(lambda run: False), folder)
    assert "0 runs fit the filter" in runs.summary() and runs.setting_rows() == []
    with pytest.raises(ValueError, match="no run fits the filter"):
        runs.figures("by_setting")


def test_runs_of_plain_loops_are_compared_by_their_own_settings(tmp_path):
    for at, lr in enumerate((0.1, 0.01)):
        for seed in (0, 1):
            a_run(tmp_path / f"{at}{seed}", (2.0,), {"accuracy": 0.5 + at / 10 + seed / 100}, lr=lr, seed=seed)
    runs = Overview(ExperimentAnalyzer(tmp_path), tmp_path)
    assert (runs.metric, runs.group_by, runs.color_by) == ("accuracy", "lr", None)
    assert points(runs.figures("by_setting")[""]) == {"all": pytest.approx([0.605, 0.505])}  # 0.01 before 0.1
    assert len(runs.setting_rows()) == 2


# ------------------------------------------------------------------------------------------------ facts and coverage


def test_the_facts_hold_and_a_mean_that_is_not_that_of_the_files_reads_failed(folder, tmp_path):
    runs = Overview(ExperimentAnalyzer(folder), folder)
    assert [fact["ok"] for fact in runs.facts()] == [True]
    result = folder / "g2" / "result.json"
    whole = result.read_text()
    try:
        result.write_text(whole.replace('"perplexity": 4.0', '"perplexity": 4.5'))
        [fact] = runs.facts()
    finally:
        result.write_text(whole)
    assert not fact["ok"] and "5 values read again, 1 differ" in fact["says"]


def test_a_fact_of_a_run_that_does_not_hold_reads_failed_here_too(tmp_path):
    a_run(tmp_path / "a", (1.0,), {"accuracy": 0.5, "facts": [{"ok": False, "says": "x"}, {"ok": True, "says": "y"}]})
    facts = Overview(ExperimentAnalyzer(tmp_path), tmp_path).facts()
    assert [(fact["ok"], "(1 of 2 facts)" in fact["says"]) for fact in facts][-1] == (False, True)


def test_coverage_counts_what_is_planned_done_missing_and_done_twice(tmp_path):
    plan_of(tmp_path, "aa", "bb", "cc")
    for name in ("aa-1", "aa-2", "bb-1"):
        pruning_run(tmp_path / "runs" / name, 4.0, 6.0, 5.0)
    assert coverage_line(tmp_path) == "3 planned, 2 finished, 0 failed, 0 running, 1 missing, 1 twice"
    [fact] = [f for f in Overview(ExperimentAnalyzer(tmp_path), tmp_path).facts() if "counts twice" in f["says"]]
    assert not fact["ok"]


def test_a_folder_that_is_no_sweep_has_no_coverage(folder):
    assert coverage(folder) is None and coverage_line(folder) == ""


# ------------------------------------------------------------------------------------------------ the archive


def test_the_archive_holds_runs_values_settings_and_every_figure_twice(runs, tmp_path):
    path = runs.export(tmp_path / "deep" / "a.zip")
    with zipfile.ZipFile(path) as bundle:
        names = set(bundle.namelist())
        rows = list(csv.DictReader(io.StringIO(bundle.read("settings.csv").decode())))
        wide = list(csv.DictReader(io.StringIO(bundle.read("runs.csv").decode())))
        about = bundle.read("about.txt").decode()
        assert bundle.read("figures/recovery-m.png").startswith(b"\x89PNG")
        assert b"<svg" in bundle.read("figures/recovery-m.svg")
    assert [float(row["fine_tuned/perplexity"]) for row in rows] == [5.5, 4.5, 8.0, 9.25] and len(wide) == 5
    figures = {f"figures/{name}-{model}.{end}" for name in FIGURES for model in "mn" for end in ("svg", "png")}
    assert names == {"about.txt", "runs.csv", "values.csv", "settings.csv"} | figures
    assert "metric fine_tuned/perplexity, grouped by level" in about


def test_the_archive_is_the_same_for_the_same_runs_and_holds_only_those_that_are_shown(folder, tmp_path):
    kept = Overview(ExperimentAnalyzer(folder).filter(model="n"), folder)
    first, again = (kept.export(tmp_path / name).read_bytes() for name in ("a.zip", "b.zip"))
    assert first == again
    with zipfile.ZipFile(tmp_path / "a.zip") as bundle:
        assert bundle.read("runs.csv").decode().count("\n") == 2


def test_what_a_figure_holds_is_said_without_intervals_and_dividing_lines(runs):
    from nbhelpers.analysis_plots import holds

    figures = runs.figures("by_setting")
    assert holds(figures["m"]) == "perplexity, fine-tuned: 5 points from 4 to 8"  # 3 means, and 2 seeds of one of them
    assert holds(runs.figures("quadrants")["m"]) == "change by fine-tuning: 4 points from -100 to -12.5"
    assert plots.fingerprint(figures["m"]) != holds(figures["m"])


def test_trials_that_a_search_ended_early_are_counted_in_words_where_there_are_some():
    found = {"planned": 5, "done": 2, "failed": 0, "running": 0, "missing": 0, "pruned": 3}
    assert overview.counts(found).endswith("0 running, 0 missing, 3 ended early by the search")
    assert "early" not in overview.counts(found | {"pruned": 0})
