"""Does the report say what the runs said, show what is missing as missing, and judge by the tolerance?"""

from __future__ import annotations

import csv
import json
import re

import pytest
from fake_jobs import plan
from typer.testing import CliRunner

from nbhelpers import (
    cli,
    commands_sweep,
    records,
    sparsity_answers,
    sparsity_report,
    sparsity_results,
    stats,
    sweep,
    sweep_results,
)
from nbhelpers.sparsity_report import ResultRow, correctness, headline, methods_compared, modes_compared

MODES = ("sparse_to_dense", "sparse_to_sparse")


def cell(number: int, sparsity: float, tuned: float | None, mode: str = MODES[1], **more) -> ResultRow:
    told = {"row": number, "model": "m", "task": "t", "method": "magnitude", "mode": mode, "sparsity": sparsity}
    told |= {"pattern": "unstructured", "importance": "magnitude", "scope": "layer", "seed": 0, "job": f"j{number}"}
    told |= {"alias": False, "status": "finished" if tuned is not None else "planned", "metric": "acc", "tuned": tuned}
    told |= {"chance": 0.25}
    if tuned is not None:
        told |= {"tuned_low": tuned - 0.05, "tuned_high": tuned + 0.05, "all_facts_hold": True}
    return ResultRow(**told | more)


def judged(rows: list[ResultRow], tolerance: float = 0.02) -> list[ResultRow]:
    return sparsity_results.judged(rows, tolerance)


def summary(rows: list[ResultRow], tolerance: float = 0.02, folder="no such sweep") -> str:
    return sparsity_report.summary(rows, tolerance, sparsity_answers.answers(folder, rows))


def test_the_headline_is_the_highest_sparsity_up_to_which_all_are_within_tolerance():
    found = judged([cell(1, 0, 0.80), cell(2, 0.3, 0.79), cell(3, 0.5, 0.78), cell(4, 0.7, 0.70), cell(5, 0.9, 0.79)])
    assert [row.within_tolerance for row in found] == [True, True, True, False, True]
    (best,) = headline(found)
    assert best["sparsity"] == 0.5
    assert (best["tuned"], best["tuned_low"], best["tuned_high"]) == pytest.approx((0.78, 0.73, 0.83))
    (best,) = headline(judged([cell(1, 0, 0.80), cell(2, 0.3, 0.7)]))
    assert best["sparsity"] is None and best["tuned"] is None


def test_a_cell_that_is_missing_passes_nothing_and_ends_the_headline():
    found = judged([cell(1, 0, 0.80), cell(2, 0.3, 0.80), cell(3, 0.5, None), cell(4, 0.7, 0.80)])
    assert found[2].within_tolerance is None and headline(found)[0]["sparsity"] == 0.3
    assert judged([cell(2, 0.3, 0.8)])[0].within_tolerance is None, "without a dense run there is nothing to compare"


def test_a_cell_that_is_missing_is_no_answer_that_nothing_stays_within_tolerance():
    half_done = judged([cell(1, 0, 0.80), cell(2, 0.1, None), cell(3, 0.5, 0.80), cell(4, 0.9, 0.30)])
    (best,) = headline(half_done)
    assert (best["sparsity"], best["known"]) == (None, False)
    said = summary(half_done)
    assert "not known yet: cells at the lowest sparsities are missing" in said and "No method" not in said
    below = judged([cell(1, 0, 0.80), cell(2, 0.1, 0.5)])
    assert headline(below)[0]["known"] and "No method and mode keeps accuracy" in summary(below)
    going = judged([cell(1, 0, 0.80), cell(2, 0.1, 0.80), cell(3, 0.5, None)])
    assert "So far accuracy stays within 0.02 of the tuned dense model up to a sparsity of 10 %" in summary(going)


def test_of_several_seeds_the_mean_is_shown_and_none_is_picked():
    rows = [cell(1, 0, 0.8), cell(2, 0, 0.6, seed=1)]
    rows += [cell(3, 0.5, 0.5, masked=0.3), cell(4, 0.5, 0.5, seed=1, masked=0.5)]
    here, _ = sparsity_answers.answers("no such sweep", judged(rows))
    assert here["dense"] == {"tuned": pytest.approx(0.7), "tuned_low": None, "tuned_high": None}
    assert list(here["masked"].values()) == [pytest.approx(0.4)]


def test_another_model_task_or_seed_is_not_what_a_row_is_compared_with():
    rows = [cell(1, 0, 0.9), cell(2, 0, 0.5, task="u"), cell(3, 0.5, 0.5, task="u"), cell(4, 0.5, 0.5)]
    assert [row.within_tolerance for row in judged(rows)] == [True, True, True, False]


def test_a_run_whose_fact_failed_passes_nothing_and_no_other_is_judged_by_it():
    found = judged([cell(1, 0, 0.8), cell(2, 0.5, 0.8, all_facts_hold=False), cell(3, 0.9, 0.8)])
    assert [row.within_tolerance for row in found] == [True, None, True] and headline(found)[0]["sparsity"] is None
    found = judged([cell(1, 0, 0.8, all_facts_hold=False), cell(2, 0.5, 0.8)])
    assert found[1].within_tolerance is None


def test_seeds_have_tables_and_headlines_of_their_own():
    rows = [cell(1, 0, 0.8), cell(2, 0.5, 0.8), cell(3, 0, 0.9, seed=1), cell(4, 0.5, 0.3, seed=1)]
    found = judged(rows)
    assert [(one["seed"], one["sparsity"]) for one in headline(found)] == [(0, 0.5), (1, None)]
    said = summary(found, 0.02)
    assert "## m on t (acc), seed 0" in said and "## m on t (acc), seed 1" in said
    assert said.count("0.300 [0.250, 0.350]") == 1 == said.count("\n| 0.5 | 0.800 [0.750, 0.850] |")


def test_rows_that_differ_in_another_axis_are_told_apart(tmp_path):
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    axes = {"importance": ["magnitude", "random"], "scope": ["layer", "global"], "sparsity": [0, 0.5]}
    sweep.run({"kind": "sparsity", "base": base, "axes": axes}, tmp_path / "s", only=1)
    found = sparsity_report.rows(tmp_path / "s")
    named = ["magnitude, layer", "magnitude, global", "random, layer", "random, global"]
    assert [row.method for row in found] == [name for name in named for _ in range(2)]
    assert [row.status for row in found if row.sparsity == 0] == ["finished"] * 4, "the dense job serves all of them"


def test_one_document_gives_no_interval_and_no_error():
    said = summary(judged([cell(1, 0, 1.0, tuned_low=None, tuned_high=None), cell(2, 0.5, 1.0, tuned_low=None)]), 0.02)
    assert "| 0 | 1.000 |" in said


def test_a_table_shows_missing_failed_and_false_facts_as_what_they_are():
    rows = [
        cell(1, 0, 0.8, generated=True),
        cell(2, 0.5, None),
        cell(3, 0.7, None, status="failed", failure="out of memory"),
        cell(4, 0.9, 0.4, all_facts_hold=False),
        cell(5, 0.9, 0.45, mode=MODES[0]),
    ]
    said = summary(judged(rows), 0.02)
    assert "| 0.5 | missing | not planned |" in said and "| 0.7 | failed: out of memory | not planned |" in said
    assert "| 0.9 | 0.400 [0.350, 0.450] FACT FAILED | 0.450 [0.400, 0.500] |" in said
    assert "generated by this project" in said and "generated by this project" not in summary([cell(1, 0, 0.8)], 0.02)


def test_what_was_proved_is_counted_and_equal_modes_are_noticed():
    rows = [
        cell(
            1, 0.5, 0.8, MODES[0], validation_nll=1.0, merge_violations=7, merge_difference=1e-7, mask_sha256="a" * 64
        ),
        cell(2, 0.5, 0.8, MODES[1], validation_nll=1.5, merge_violations=0, merge_difference=0.0, mask_sha256="a" * 64),
        cell(3, 0.9, 0.8, MODES[0], validation_nll=2.0),
        cell(4, 0.9, 0.8, MODES[1], validation_nll=2.0, all_facts_hold=False),
        cell(5, 0.7, None, status="failed", failure="diverged"),
    ]
    said = correctness(rows)
    assert "4 runs finished, 3 with every fact true, 1 with a false one" in said
    assert "in 1 of 2 cells with both" in said and "not finished: 1 diverged" in said
    assert "7 (free to fill)" in said and "| FAILED |" in said


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A sweep of four cells of which the second is done."""
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    axes = {"method": {"big": {"importance": "magnitude"}, "any": {"importance": "random"}}, "sparsity": [0, 0.5]}
    place = tmp_path_factory.mktemp("sweep") / "s"
    sweep.run({"kind": "sparsity", "base": base, "axes": axes}, place, only=2)
    return place


def test_the_files_hold_every_row_of_the_plan_by_the_schema_that_stands_beside(folder):
    found = sparsity_report.write(folder)
    assert (found["rows"], found["finished"], found["facts_failed"]) == (4, 1, 0)
    assert found["facts"] == []
    with open(folder / "report" / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["status"] for row in rows] == ["planned", "finished", "planned", "planned"]
    assert [row["tuned"] == "" for row in rows] == [True, False, True, True]
    assert [(row["method"], row["sparsity"], row["alias"]) for row in rows] == [
        *(("big", "0.0", "false"), ("big", "0.5", "false")),
        *(("any", "0.0", "true"), ("any", "0.5", "false")),
    ]
    schema = json.loads((folder / "report" / "columns.json").read_text())
    assert list(rows[0]) == list(schema["properties"]) and schema["properties"]["tuned"]["description"]
    assert rows[1]["generated"] == "true" and rows[1]["chance"] == "0.5"
    assert rows[1]["protocol"] == "boolq 2.0, 0 shots, evaluation, 4 rows, bundled (generated)"
    report = folder / "report"
    assert "generated by this project" in (report / "summary.md").read_text(encoding="utf-8")
    assert {path.name for path in report.iterdir()} == {*sparsity_report.FILES, sparsity_report.FIGURES}
    page = (report / "report.html").read_text(encoding="utf-8")
    pictures = {path.name for path in (report / "figures").iterdir()}
    assert {path.rpartition(".")[0] for path in pictures} == {
        *("curves-01-tiny-gpt2-boolq", "map_untuned-01-tiny-gpt2-boolq", "training_speed"),
    }
    assert len(pictures) == 6 and page.count("<img") == 3, "a PNG and an SVG of each"
    assert "Every projection loses the same share in each of 1 masks" in page


# Where the dense model is at chance --------------------------------------------------------------------------------

AT_CHANCE = "he dense model is not above chance (0.500 [0.250, 0.750], chance 0.5): what masks cost cannot be told here"


def at_chance(**more) -> list[ResultRow]:
    wide = {"chance": 0.5, "tuned_low": 0.25, "tuned_high": 0.75}
    return [cell(1, 0, 0.5, **wide | more), cell(2, 0.5, 0.5, **wide | more)]


def test_beside_a_dense_model_at_chance_no_headline_is_given_and_no_row_passes():
    found = judged(at_chance())
    assert [(row.dense_above_chance, row.within_tolerance) for row in found] == [(False, None)] * 2
    (best,) = headline(found)
    assert best["sparsity"] is None and best["cannot_tell"] == f"t{AT_CHANCE}"
    said = summary(found)
    assert said.startswith(f"# Sparsity against accuracy\n\nT{AT_CHANCE}.\n") and "stays within" not in said
    assert f"| m | t | any | t{AT_CHANCE} |" in said and "| magnitude | 50 %" not in said


def test_the_lower_end_must_be_above_chance_and_an_answer_that_is_written_has_none():
    def told(**more) -> bool | None:
        return judged(at_chance(**more))[0].dense_above_chance

    assert told(chance=0.25) is False and told(chance=0.24) is True
    assert told(metric="exact_match_strict", chance=None) is True
    assert told(metric="exact_match_strict", chance=None, tuned_low=0.0) is False
    assert told(chance=None) is None, "answers by choice that are not in the folder"
    assert "chance is not known, as the answers are not in the folder" in summary(judged(at_chance(chance=None)))
    one = judged(at_chance(tuned_low=None, tuned_high=None))
    assert "One document cannot show the dense model above chance (0.500, chance 0.5)" in summary(one)


def test_a_model_and_task_at_chance_is_named_beside_those_that_are_not():
    good = [cell(3, 0, 0.9, task="u"), cell(4, 0.5, 0.9, task="u")]
    said = summary(judged([*at_chance(), *good]))
    assert "Accuracy stays within 0.02 of the tuned dense model up to a sparsity of 50 %" in said
    assert f"\nm on t: t{AT_CHANCE}.\n" in said and "| m | u | magnitude | 50 % of weights: 0.900" in said


# What was not trained, and what was cut ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def channels(tmp_path_factory):
    """A sweep that cuts MLP channels and trains nothing, both modes asked for, in two cells each."""
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    base |= {"pattern": "structured", "dimension": "channels"}
    axes = {"sparsity": [0, 0.5], "mode": list(MODES)}
    place = tmp_path_factory.mktemp("channels") / "s"
    sweep.run({"kind": "sparsity", "base": base, "axes": axes}, place)
    return place


def test_the_rows_say_that_nothing_was_trained_and_what_was_cut(channels):
    found = sparsity_report.rows(channels)
    assert {row.tuning for row in found} == {"none"} and {row.steps for row in found} == {None}
    assert [row.mode for row in found] == [f"{mode}_untuned" for mode in MODES] * 2
    assert {(row.dimension, row.sparsity_of) for row in found} == {("channels", "MLP channels")}
    (share,) = {row.measured_sparsity for row in found if row.sparsity}
    assert share == 0.25, "a block has 4 h^2 weights of attention and, at 2 h channels, 4 h^2 of MLP: half of these"
    properties = ResultRow.model_json_schema()["properties"]
    assert "sparsity_of names" in properties["sparsity"]["description"]
    assert "MLP channels" in properties["sparsity_of"]["description"] and properties["tuning"]["description"]


def test_the_report_of_untuned_channels_at_chance_says_all_three(channels, tmp_path):
    found = call("sweep", "report", channels, "--out", tmp_path)
    assert found.exit_code == 0
    assert "tiny-gpt2 on boolq: the dense model is not above chance (" in found.stdout
    assert "highest sparsity within" not in found.stdout
    told = {name: (tmp_path / name).read_text(encoding="utf-8") for name in ("summary.md", "correctness.md")}
    for words in (*told.values(), *sweep_results.SweepResults(channels).verdicts(), found.stdout):
        assert re.findall(r"\b(?:tuned|tuning)\b", words) == []
    assert "of MLP channels" in told["summary.md"] and "0.5 of MLP channels" in told["correctness.md"]
    assert ", 25 % of weights" in told["summary.md"]
    assert "nothing was trained, so there are no two modes" in told["correctness.md"]
    panel = sweep_results.SweepResults(channels)
    assert "the dense model is not above chance" in panel.verdicts()[0] and len(panel.verdicts()) == 1
    assert "25 % of weights" in panel.table() and "nothing was trained" in panel.text()
    assert all(fact["ok"] for fact in panel.facts()), "no two modes were trained, so none are alike"


def test_the_command_names_what_a_sparsity_is_a_share_of():
    rows = [cell(1, 0, 0.8, tuning="none"), cell(2, 0.5, 0.8, tuning="none")]
    cut = [row.model_copy(update={"sparsity_of": "MLP channels", "measured_sparsity": 1 / 3}) for row in rows]

    def shown(rows) -> str:
        told = {"finished": 2, "rows": 2, "facts_failed": 0, "tolerance": 0.02, "compared": None, "files": []}
        told |= {"headline": headline(judged(rows)), "judged_by": sparsity_results.dense_said(rows)}
        return commands_sweep.show_report(told)

    assert "highest sparsity within 0.02 of the dense model, untuned:" in shown(rows)
    assert shown(rows).endswith("  0.5  m t magnitude sparse_to_sparse (of weights)")
    assert shown(cut).endswith("  0.5  m t magnitude sparse_to_sparse (of MLP channels, 33.3 % of weights)")


def test_the_best_of_a_sweep_with_and_without_training_is_judged_each_by_its_own_dense_model():
    rows = [cell(1, 0, 0.9, method="lora", tuning="lora"), cell(2, 0.5, 0.6, method="lora", tuning="lora")]
    rows += [cell(3, 0, 0.6, "untuned", method="none", tuning="none")]
    rows += [cell(4, 0.5, 0.6, "untuned", method="none", tuning="none")]
    assert [row.within_tolerance for row in judged(rows)] == [True, False, True, True]
    said = summary(judged(rows))
    assert "of the dense model of the same tuning" in said
    assert "| m | t | 0.900 [" in said, "no mean of a tuned and an untuned one"


def test_an_alias_says_what_its_own_place_would_have_cut(tmp_path):
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    fields = {"single": ("unstructured", "outputs"), "whole": ("structured", "channels")}
    method = {name: dict(zip(("pattern", "dimension"), value, strict=True)) for name, value in fields.items()}
    sweep.run({"kind": "sparsity", "base": base, "axes": {"method": method, "sparsity": [0]}}, tmp_path / "s", only=1)
    found = sparsity_report.rows(tmp_path / "s")
    assert [row.sparsity_of for row in found] == ["weights", "MLP channels"] and found[1].alias


def test_weights_of_n_of_m_are_compared_within_their_group_whatever_the_plan_calls_a_scope(tmp_path):
    base = {"model": "tiny-gpt2", "task": "boolq", "limit": 4, "tuning": "none", "device": "cpu"}
    method = {name: {"pattern": name, "scope": "row"} for name in ("unstructured", "nm")}
    sweep.run({"kind": "sparsity", "base": base, "axes": {"method": method, "sparsity": [0.5]}}, tmp_path / "s", only=1)
    found = {row.method: row.scope for row in sparsity_report.rows(tmp_path / "s")}
    assert found == {"unstructured": "row", "nm": "group"}


# Hashes of the data, and what failed ------------------------------------------------------------------------------


def test_each_run_stands_with_the_hashes_of_the_data_that_it_recorded(channels, tmp_path):
    sparsity_report.write(channels, tmp_path)
    said = (tmp_path / "correctness.md").read_text(encoding="utf-8")
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        recorded = records.read_json(channels / "runs" / row["run"] / "manifest.json")["fingerprints"]
        assert (row["documents_sha256"], row["text_sha256"]) == (recorded["documents"], recorded["text"])
        assert len(row["text_sha256"]) == 64 and row["calibration_sha256"] == ""
        if row["alias"] == "false":
            (line,) = (line for line in said.splitlines() if line.startswith(f"| {row['row']} |"))
            assert f"| {recorded['documents'][:12]} | {recorded['text'][:12]} | none |" in line


def test_the_rows_that_weights_were_scored_on_have_their_hash(tmp_path):
    records.write_json(tmp_path / "manifest.json", {"fingerprints": {"text": "a" * 64}})
    records.write_json(tmp_path / "result.json", {"mask": {"scored_on": "b" * 64}})
    told = {"documents_sha256": None, "text_sha256": "a" * 64, "calibration_sha256": "b" * 64}
    assert sparsity_results._hashes(tmp_path) == told
    said = correctness([cell(1, 0.5, 0.8, **told)])
    assert f"| not recorded | {'a' * 12} | {'b' * 12} | OK |" in said


def test_each_run_that_failed_has_a_row_with_its_class_and_one_line():
    lost = {"status": "failed", "failure": "out of memory", "error": "no 3 GB|left\non cuda:0"}
    rows = [cell(1, 0, 0.8), cell(2, 0.5, None, **lost), cell(3, 0.5, None, alias=True, **lost), cell(4, 0.7, None)]
    said = correctness(rows).split("## What failed")[1]
    assert "| 2 | m t magnitude 0.5 sparse to sparse | out of memory | no 3 GB/left on cuda:0 |" in said
    assert len([line for line in said.splitlines() if line.startswith("| ")]) == 3, "names, a rule, one run"
    assert "What failed" not in correctness(rows[:1])


def test_a_sweep_of_another_kind_or_a_tolerance_that_is_none_is_refused(tmp_path):
    sweep.run(plan(), tmp_path / "s")
    with pytest.raises(ValueError, match="is a sweep of 'fake' runs, this report is of 'sparsity' ones"):
        sparsity_report.write(tmp_path / "s")
    with pytest.raises(ValueError, match="tolerance must be in"):
        sparsity_report.rows(tmp_path / "s", 1.5)


def test_a_cell_that_a_table_program_would_take_for_a_formula_is_text():
    assert "'=SUM(A1)" in sparsity_results.as_csv([cell(1, 0, 0.8, method="=SUM(A1)")])


# Differences, document by document --------------------------------------------------------------------------------


def answered(folder, run: str, right: list[int], first_id: int = 0) -> str:
    """A run directory in which the documents with a 1 were answered right; returns its name."""
    (folder / "runs" / run).mkdir(parents=True)
    for number, good in enumerate(right):
        line = {"id": first_id + number, "gold": 0, "loglikelihoods": [-1.0, -2.0], "prediction": 0 if good else 1}
        records.append_line(folder / "runs" / run / "predictions.jsonl", line)
    return run


def both(folder, number: int, dense: list[int], sparse: list[int], first_id: int = 0, **more) -> list[ResultRow]:
    """A cell in both modes."""
    runs = (answered(folder, f"d{number}", dense, first_id), answered(folder, f"s{number}", sparse, first_id))
    sparsity = more.pop("sparsity", number / 10)
    return [
        cell(2 * number + at, sparsity, 0.5, mode, run=run, **more)
        for at, (mode, run) in enumerate(zip(MODES, runs, strict=True))
    ]


def test_two_modes_are_compared_document_by_document_over_all_their_cells(tmp_path):
    rows = both(tmp_path, 1, [1, 1, 1, 0], [1, 0, 0, 0]) + both(tmp_path, 2, [1, 1, 0, 0], [0, 1, 0, 1])
    one, every = modes_compared(tmp_path, rows)
    assert (one["model"], one["task"], one["cells"], one["documents"], one["left_out"]) == ("m", "t", 2, 4, 0)
    assert one["difference"] == pytest.approx(((0 + 1 + 1 + 0) / 4 + (1 + 0 + 0 - 1) / 4) / 2)
    assert every | {"model": "m", "task": "t"} == one, "all together is the only one there is"


def test_the_interval_is_the_paired_bootstrap_over_documents(tmp_path):
    dense = [number % 3 != 0 for number in range(60)]
    sparse = [number % 4 != 0 for number in range(60)]
    (one, _) = modes_compared(tmp_path, both(tmp_path, 1, dense, sparse))
    paired = stats.paired_bootstrap_difference([float(x) for x in dense], [float(x) for x in sparse])
    assert (one["difference"], one["low"], one["high"]) == pytest.approx((paired.mean, paired.low, paired.high))


def test_cells_that_answer_alike_make_no_interval_narrower(tmp_path):
    dense, sparse = [1, 0] * 20, [1, 1, 0, 0] * 10
    once = modes_compared(tmp_path / "a", both(tmp_path / "a", 1, dense, sparse))[0]
    rows = [row for number in range(1, 10) for row in both(tmp_path / "b", number, dense, sparse)]
    nine = modes_compared(tmp_path / "b", rows)[0]
    assert (nine["cells"], once["cells"]) == (9, 1)
    assert [nine[name] for name in ("low", "high")] == pytest.approx([once[name] for name in ("low", "high")])


def test_of_several_tasks_every_cell_counts_the_same_and_documents_stay_within_their_task(tmp_path):
    rows = both(tmp_path, 1, [1, 1], [0, 0]) + both(tmp_path, 2, [1, 1], [0, 0])
    rows += both(tmp_path, 3, [0, 0, 0], [1, 1, 1], first_id=100, task="u")
    first, second, every = modes_compared(tmp_path, rows)
    assert (first["difference"], second["difference"]) == (1.0, -1.0)
    assert every["difference"] == pytest.approx((1 + 1 - 1) / 3) and every["documents"] == 5 and every["cells"] == 3
    assert every["low"] == every["high"] == pytest.approx(1 / 3), "within a task every document says the same here"


def test_a_pair_whose_predictions_are_gone_or_of_other_documents_is_left_out_and_counted(tmp_path):
    rows = both(tmp_path, 1, [1, 1], [0, 0])
    gone = [cell(10, 0.5, 0.5, mode, run="gone") for mode in MODES]
    other = both(tmp_path, 3, [0, 0], [1, 1], first_id=7)
    torn = [rows[0].model_copy(update={"sparsity": 0.9}), other[1].model_copy(update={"sparsity": 0.9})]
    one, _ = modes_compared(tmp_path, rows + gone + other + torn)
    assert (one["cells"], one["left_out"], one["difference"]) == (1, 3, 1.0)
    alone, _ = modes_compared(tmp_path, gone)
    assert (alone["difference"], alone["low"], alone["left_out"]) == (None, None, 1)
    assert sparsity_answers.difference_said(alone, "modes") == "the predictions of 1 pair are not there"
    assert sparsity_answers.difference_said(None, "modes") == "no cell has both modes yet"


def test_runs_that_failed_or_have_a_false_fact_are_not_compared(tmp_path):
    rows = both(tmp_path, 1, [1, 1], [0, 0])
    assert modes_compared(tmp_path, [rows[0], rows[1].model_copy(update={"all_facts_hold": False})]) == []
    assert modes_compared(tmp_path, [rows[0], rows[1].model_copy(update={"alias": True})]) == []


def test_methods_are_compared_where_nothing_but_the_importance_differs(tmp_path):
    big = {"method": "big", "importance": "magnitude"}
    any_ = {"method": "any", "importance": "random"}
    rows = both(tmp_path, 1, [1, 1, 1, 1], [1, 1, 0, 0], sparsity=0.5, **big)
    rows += both(tmp_path, 2, [1, 0, 0, 0], [0, 0, 0, 0], sparsity=0.5, **any_)
    rows += both(tmp_path, 3, [1, 1, 1, 1], [1, 1, 1, 1], sparsity=0.5, **big | {"pattern": "structured"})
    rows += both(tmp_path, 4, [0, 0, 0, 0], [0, 0, 0, 0], sparsity=0.9, **any_)
    one, _ = methods_compared(tmp_path, rows)
    assert (one["cells"], one["difference"]) == (2, pytest.approx((3 / 4 + 2 / 4) / 2))
    assert methods_compared(tmp_path, rows, "wanda", "random") == []
    longer = [row.model_copy(update={"setting": "steps 20"}) for row in rows]
    assert methods_compared(tmp_path, rows + longer)[0]["cells"] == 4, "another axis beside them hides no cell"


def test_the_summary_begins_with_the_answers(tmp_path):
    rows = both(tmp_path, 5, [1, 1, 1, 0], [1, 0, 0, 0], sparsity=0.5, method="big", chance=0.25, masked=0.26)
    rows += both(tmp_path, 6, [1, 0, 0, 0], [0, 0, 0, 0], sparsity=0.5, importance="random", method="any", masked=0.2)
    rows += [cell(1, 0, 0.5, method=name, chance=0.25) for name in ("big", "any")]
    said = summary(judged(rows), folder=tmp_path)
    answers, best = said.index("## The answers"), said.index("## Highest sparsity within")
    assert said.startswith("# Sparsity against accuracy\n\nAccuracy stays within 0.02 of the tuned dense model up to")
    assert "changes accuracy by +0.375" in said[:answers] and answers < best < said.index("## m on t (acc)")
    assert "| model | task | dense, tuned | masked at 50 %, before tuning | chance |" in said[answers:best]
    assert "| m | t | 0.500 [0.450, 0.550] | big 0.260, any 0.200 | 0.25 |" in said[answers:best]
    assert "| m | t | +0.375 [" in said[answers:best], "magnitude - random: (3 - 1) / 4 and (1 - 0) / 4"


def test_a_name_with_a_bar_or_a_new_line_breaks_no_table():
    said = summary([cell(1, 0, 0.8, method="a|b\nc")])
    assert "| sparsity | a/b c, sparse to sparse |" in said


def call(*arguments: object):
    words = [str(argument) for argument in arguments]
    return CliRunner().invoke(cli.build(words), words)


def test_the_command_compares_with_a_table_and_says_what_such_a_table_lacks(folder, tmp_path):
    theirs = tmp_path / "paper.csv"
    theirs.write_text("Data,Zeros,Acc\nboolq,50,70.5\nboolq,75,60\n")
    columns = "Data=task,Zeros=sparsity_percent,Acc=value_percent"
    report = ("sweep", "report", folder, "--out", tmp_path / "out", "--external", theirs, "--columns", columns)
    found = call(*report, "--protocol", "0 shots")
    assert found.exit_code == 0 and "beside the table: 2 matched, 0 outside, 1 not measured, 1 ours" in found.stdout
    assert str(tmp_path / "out" / "comparison.csv") in found.stdout
    with open(tmp_path / "out" / "comparison.csv", newline="") as file:
        beside, waiting = csv.DictReader(file)
    assert (beside["task"], beside["sparsity"], beside["theirs"], beside["their_protocol"]) == (
        *("boolq", "0.5", "0.705", "0 shots"),
    )
    assert (waiting["ours"], waiting["status"]) == ("", "planned")
    assert "## Beside paper.csv" in (tmp_path / "out" / "summary.md").read_text(encoding="utf-8")
    assert "Beside paper.csv" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    refused = call(*report)
    assert refused.exit_code == 2 and "does not say how its numbers were measured" in refused.stderr
    refused = call("sweep", "report", folder, "--protocol", "0 shots")
    assert refused.exit_code == 2 and "name it with --external CSV" in refused.stderr
