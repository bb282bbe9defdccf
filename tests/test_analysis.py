"""Do tables, the best run, seed groups and exports say what the runs hold, and nothing that they do not?"""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from many_runs import a_run, pruning_run
from run_folders import tracker

from nbhelpers.analysis import ExperimentAnalyzer, diff_configs, lower_is_better_by_name, varying
from nbhelpers.tables import aligned, shown, withheld
from nbhelpers.tracking import ExperimentConfig

CANARY = "canary-7f3a the patient said"


@pytest.fixture
def three(tmp_path):
    """Runs a, b, c with final losses 2, 1, 3 and accuracies 0.5, 0.0, 0.9."""
    for name, loss, accuracy in (("a", 2.0, 0.5), ("b", 1.0, 0.0), ("c", 3.0, 0.9)):
        a_run(tmp_path / name, [loss], {"accuracy": accuracy}, name=name, rate=loss / 10, lora={"rank": 8})
    return ExperimentAnalyzer(tmp_path)


def test_the_best_is_the_lowest_loss_and_the_highest_accuracy(three):
    assert three.get_best_experiment("train_loss") == ("b", 1.0)
    assert three.get_best_experiment("accuracy") == ("c", 0.9)
    assert three.get_best_experiment("accuracy", lower_is_better=True) == ("b", 0.0)


def test_an_unknown_metric_is_an_error_with_the_list(three):
    with pytest.raises(LookupError, match="unknown metric 'acuracy_error'.*Available: accuracy, best_train_loss"):
        three.get_best_experiment("acuracy_error")
    with pytest.raises(LookupError, match="unknown logged metric 'accuracy'.*Available: train_loss"):
        three.trajectories("accuracy")


@pytest.mark.parametrize(
    "metric, lower",
    [
        ("fine_tuned/perplexity", True),
        ("best_val_loss", True),
        ("iter_time_ms", True),
        ("seconds", True),
        ("recovery_percent", False),
        ("tokens_per_sec", False),
        ("macro_f1", False),
        ("control/tokens_per_second", False),
    ],
)
def test_the_name_of_a_metric_says_which_way_is_better(metric, lower):
    assert lower_is_better_by_name(metric) is lower


def test_where_the_name_does_not_say_it_the_caller_must():
    with pytest.raises(ValueError, match="not known for 'gizmo': pass lower_is_better"):
        lower_is_better_by_name("gizmo")


def test_a_run_that_is_not_finished_is_never_the_best(three, tmp_path):
    a_run(tmp_path / "d", [0.1], name="d", status="failed")
    three.load_all()
    assert three.get_best_experiment("train_loss") == ("b", 1.0)


def test_a_value_that_is_not_finite_is_never_the_best(three, tmp_path):
    a_run(tmp_path / "d", [float("nan")], name="d")
    a_run(tmp_path / "e", [float("-inf")], name="e")
    three.load_all()
    assert three.get_best_experiment("train_loss") == ("b", 1.0)


def test_a_name_that_several_runs_share_lists_them_instead_of_picking_one(tmp_path):
    for folder in "ab":
        a_run(tmp_path / folder, [1.0], name="same")
    analyzer = ExperimentAnalyzer(tmp_path)
    ids = [run.run_id for run in analyzer.experiments]
    with pytest.raises(LookupError, match="2 runs are named 'same'.*by its run id") as error:
        analyzer.experiment("same")
    assert all(run_id in str(error.value) for run_id in ids)
    name, _ = analyzer.get_best_experiment("train_loss")
    assert analyzer.experiment(name).run_id == ids[0] == name
    with pytest.raises(LookupError, match="unknown run 'other'"):
        analyzer.experiment("other")


def test_the_table_holds_the_chosen_columns_with_raw_values_and_zero_is_not_missing(three):
    table = three.get_comparison_table(["status", "rate", "lora.rank", "accuracy"])
    assert table[1] == {"run": "b", "status": "finished", "rate": 0.1, "lora.rank": 8, "accuracy": 0.0}
    assert "0.500" in three.comparison_text(["accuracy"]) and shown(0.0) == "0" and shown(None) == "-"
    with pytest.raises(LookupError, match="unknown column 'accuracies'. Did you mean 'accuracy'"):
        three.get_comparison_table(["accuracies"])


def test_the_table_shows_by_itself_the_fields_in_which_runs_differ(three):
    assert list(three.get_comparison_table()[0]) == ["run", "status", "rate", "accuracy", "final_train_loss"]


def test_filters_take_a_value_a_list_or_a_function_of_any_config_field(three):
    def names(found):
        return [run.name for run in found.experiments]

    assert names(three.filter(rate=0.1)) == ["b"]
    assert names(three.filter(rate=[0.1, 0.3])) == ["b", "c"]
    assert names(three.filter(rate=lambda rate: rate > 0.15)) == ["a", "c"]
    assert names(three.filter(**{"lora.rank": 8}, name="a", status="finished", kind="test")) == ["a"]
    assert names(three.filter(status="failed")) == []
    with pytest.raises(LookupError, match="unknown config field 'ratio'. Did you mean 'rate'"):
        three.filter(ratio=1)


def test_trajectories_are_aligned_with_their_steps_per_run_and_stage(tmp_path):
    pruning_run(tmp_path / "a", 4.0, 8.0, 5.0)
    analyzer = ExperimentAnalyzer(tmp_path)
    (loss,) = analyzer.trajectories("loss")
    assert (loss.stage, loss.steps, loss.values) == ("fine_tuned", [0, 1, 2], [3.0, 2.0, 1.5])
    assert analyzer.trajectories("validation")[0].values == pytest.approx([3.1, 2.1, 1.6])
    assert analyzer.trajectories("throughput")[0].values == [100.0, 101.0, 102.0]
    assert analyzer.trajectories("learning_rate", "fine_tuned")[0].values[0] == 1e-3
    with pytest.raises(LookupError, match="unknown stage 'control'"):
        analyzer.trajectories("loss", "control")


def test_seeds_are_grouped_with_their_mean_and_interval(tmp_path):
    for seed, tuned in enumerate((4.0, 5.0, 6.0)):
        pruning_run(tmp_path / f"g{seed}", 3.0, 8.0, tuned, seed=seed)
    pruning_run(tmp_path / "r", 3.0, 8.0, 7.0, strategy="random")
    first, second = ExperimentAnalyzer(tmp_path).seed_groups("fine_tuned/perplexity")
    assert first.values == {0: 4.0, 1: 5.0, 2: 6.0} and first.differs == {"strategy": "gradient"}
    half = 4.302653 / math.sqrt(3)  # t of 2 degrees at 97.5 %, sample deviation 1
    assert (first.interval.mean, first.interval.low) == pytest.approx((5.0, 5.0 - half))
    assert (second.interval.mean, second.interval.low, second.interval.n) == (7.0, None, 1)


def test_a_seed_that_was_run_twice_counts_once_and_is_named(tmp_path):
    import time

    pruning_run(tmp_path / "old", 3.0, 8.0, 4.0)
    time.sleep(0.005)  # manifests tell times apart by the millisecond
    pruning_run(tmp_path / "new", 3.0, 8.0, 6.0)
    (group,) = ExperimentAnalyzer(tmp_path).seed_groups("fine_tuned/perplexity")
    assert group.values == {0: 6.0} and group.interval.low is None and len(group.left_out) == 1


def test_runs_on_another_model_under_the_same_config_are_no_seeds_of_each_other(tmp_path):
    for seed in (0, 1):
        with tracker(tmp_path / str(seed), ExperimentConfig(name="x", seed=seed)) as run:
            run.set_fingerprints(model=f"weights {seed}")
            run.finish({"loss": 1.0})
    assert len(ExperimentAnalyzer(tmp_path).seed_groups("loss")) == 2


def test_the_difference_of_two_configs_names_fields_and_both_values(three):
    assert three.diff("a", "b") == {"name": ("a", "b"), "rate": (0.2, 0.1)}
    assert diff_configs({"a": {"b": 1}}, {"a": {"b": 2}, "c": None}) == {"a.b": (1, 2), "c": ("(absent)", None)}
    assert varying([{"a": 1}, {"a": True}]) == ["a"]


def test_the_summary_says_how_many_the_best_and_what_could_not_be_read(three, tmp_path, capsys):
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "metrics.jsonl").write_text("{}\n")
    with open(tmp_path / "a" / "metrics.jsonl", "ab") as file:
        file.write(b'{"torn')
    three.load_all()
    three.print_summary()
    said = capsys.readouterr().out
    for text in ("3 runs: 3 finished", "best accuracy: 0.900 (c)", "1 torn lines skipped", "no manifest.json"):
        assert text in said


def test_an_empty_folder_is_no_error(tmp_path):
    analyzer = ExperimentAnalyzer(tmp_path)
    assert analyzer.load_all() == [] and analyzer.summary() == "0 runs" and analyzer.comparison_text() == "no runs"
    assert analyzer.filter(rate=1).experiments == [] and analyzer.csv() == "\n"


def test_csv_wide_is_a_row_a_run_and_long_a_row_a_value(three, tmp_path):
    three.load_all()
    wide = list(csv.DictReader(io.StringIO(three.export_csv(tmp_path / "w.csv").read_text())))
    assert [row["accuracy"] for row in wide] == ["0.5", "0.0", "0.9"]
    assert wide[0]["config.lora.rank"] == "8" and wide[0]["status"] == "finished"
    long = list(csv.DictReader(io.StringIO(three.export_csv(tmp_path / "l.csv", "long").read_text())))
    assert (long[1]["name"], long[1]["step"], long[1]["metric"], long[1]["value"]) == ("b", "0", "train_loss", "1.0")
    with pytest.raises(LookupError, match="unknown form 'tall'"):
        three.rows("tall")


def test_a_missing_cell_is_empty_and_not_a_number_is_said(tmp_path):
    a_run(tmp_path / "a", [float("nan")], name="a")
    a_run(tmp_path / "b", [], {"accuracy": 0.0}, name="b")
    rows = list(csv.DictReader(io.StringIO(ExperimentAnalyzer(tmp_path).csv())))
    assert [(row["train_loss"], row["accuracy"]) for row in rows] == [("nan", ""), ("", "0.0")]
    strict = json.loads(ExperimentAnalyzer(tmp_path).json(), parse_constant=pytest.fail)
    assert strict["runs"][0]["train_loss"] is None and strict["runs"][0]["not_finite"]["train_loss"] == "nan"


def test_a_data_frame_has_a_row_a_run(three):
    frame = three.to_dataframe()
    assert frame["accuracy"].tolist() == [0.5, 0.0, 0.9]
    assert len(three.to_dataframe("long")) == 3


def test_no_text_of_a_user_leaves_with_an_export(tmp_path):
    config = {"sample_prompt": CANARY, "data": {"notes": ["short " + CANARY]}, "other": CANARY + " and more words here"}
    with tracker(tmp_path / "a", ExperimentConfig(name="x", **config)) as run:
        run.log_metrics(train_loss=1.0, sample=CANARY)
        run.finish({"samples": {"baseline": CANARY}, "answer": CANARY, "facts": [{"saw": CANARY, "ok": True}]})
    log = {"config": {"name": "y"}, "end_time": "x", "metrics_history": [], "notes": CANARY, "final_train_loss": 1.0}
    (tmp_path / "experiment_y.json").write_text(json.dumps(log))
    analyzer = ExperimentAnalyzer(tmp_path)
    exports = [analyzer.csv(), analyzer.csv("long"), analyzer.json(), analyzer.to_dataframe().to_csv()]
    exports.append(analyzer.summary())
    assert not [text for text in exports if "canary" in text]
    assert "sha256:" in exports[0]
    assert CANARY in analyzer.csv(include_text=True)


@pytest.mark.parametrize("value", ["gradient", "tiny-gpt2", 3, None, True, 0.5])
def test_settings_are_exported_as_they_are(value):
    assert withheld("strategy", value) == value


def test_the_text_table_puts_numbers_to_the_right():
    rows = [{"run": "a", "loss": 10.5}, {"run": "bb", "loss": None}]
    assert aligned(rows).splitlines() == ["run  loss", "a    10.5", "bb      -"]
