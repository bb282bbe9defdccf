"""Do the benchmarks count and summarise as a pencil does?"""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
import types
from pathlib import Path

import pytest

from nbhelpers import models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def head_pruning():
    return load("head_pruning")


def test_the_grid_is_every_strategy_and_level_with_its_seeds(head_pruning):
    cells = head_pruning.grid()
    assert len(cells) == len({head_pruning.name(cell) for cell in cells}) == 25 + 7 * 5 * 3
    assert {cell["level"] for cell in cells} == {0.1, 0.2, 0.3, 0.4, 0.5}


def row(
    strategy: str, level: float, seed: int, pruned: float, tuned: float, iterative: bool = False, control=None
) -> dict:
    protocol = {"window": 256, "tokens": 10}
    return {
        "strategy": strategy,
        "iterative": iterative,
        "level": level,
        "seed": seed,
        "baseline": 1.0,
        "pruned": pruned,
        "fine_tuned": tuned,
        "control": control,
        "facts": 9,
        "facts_failed": 0,
        "heads": 40,
        "protocol": protocol,
    }


def test_means_differences_and_counts_are_those_of_a_pencil(head_pruning):
    rows = [
        row(
            strategy,
            level,
            seed,
            2.0 + bonus + 0.1 * seed,
            1.2,
            iterative,
            1.1 if (strategy, level) == ("random", 0.1) else None,
        )
        for strategy, iterative, bonus in [
            ("random", False, 1.0),
            ("magnitude", False, 2.0),
            *((s, i, 0.5 - 0.25 * i) for s in ("entropy", "gradient", "ablation") for i in (False, True)),
        ]
        for level in head_pruning.LEVELS
        for seed in (0, 1)
    ]
    rows[0]["fine_tuned"] = 1.0
    found = head_pruning.summarise(rows, "text.jsonl")
    assert found["runs_that_beat_the_control"] == 1
    assert found["gradient_minus_random_at_0.3"]["mean"] == pytest.approx(-0.5)
    assert found["iterative_minus_one_shot_at_0.5"]["ablation"]["mean"] == pytest.approx(-0.25)
    assert found["entropy_minus"]["magnitude one-shot"]["0.3"]["mean"] == pytest.approx(-1.5)
    assert found["gain"]["control"]["mean"] == pytest.approx(-0.1)
    assert next(r for r in found["table"] if r["strategy"] == "magnitude" and r["level"] == 0.5)["pruned"][
        "mean"
    ] == pytest.approx(4.05)
    assert "No: it is the least harmful at 0 of 5 levels" in head_pruning.markdown(found, "x")


@pytest.fixture(scope="module")
def found() -> dict:
    return json.loads((RESULTS / "head_pruning.json").read_text(encoding="utf-8"))


def test_the_readme_says_what_the_measured_results_say(head_pruning, found):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(head_pruning.MARK)[1]
    assert section.strip() == head_pruning.markdown(found, head_pruning.COMMAND).strip()


def test_every_cell_of_the_grid_was_measured_and_no_fact_failed(head_pruning, found):
    assert found["runs"] == len(head_pruning.grid()) == 130
    assert found["facts"] >= 9 * found["runs"] and found["facts_failed"] == 0


@pytest.fixture(scope="module")
def removal():
    return load("removal")


def measured(weights: str, rounds: list[list[float]], ok: bool = True) -> dict:
    return {
        "model": f"model of {weights} weights",
        "weights": weights,
        "heads_removed": 20,
        "heads": 40,
        "parameters": [1000, 800],
        "bytes": [4000, 3200],
        "rounds": rounds,
        "fact": {"ok": ok, "saw": "difference 0"},
    }


def test_speeds_are_medians_over_rounds_and_the_ratio_is_taken_in_each_round(removal):
    found = removal.summarise(measured("random", [[100, 150], [200, 220], [50, 100]]))
    assert found["tokens_per_second"] == [100, 150]
    assert found["speed_ratio"] == {"median": 1.5, "low": pytest.approx(1.1), "high": 2.0}


def test_the_table_of_a_removal_says_random_weights_and_a_failed_fact(removal):
    rows = [removal.summarise(measured(kind, [[100, 125]], kind == "trained")) for kind in ("trained", "random")]
    text = removal.markdown({"models": rows, "machine": {"processor": "x86", "threads": 1}})
    assert "| model of random weights, random weights (20 of 40 heads) | parameters | 1,000 | 800 | 0.800 |" in text
    assert text.count("| | tokens a second | 100 | 125 | 1.25 [1.25, 1.25] |") == 2
    assert "model of trained weights: OK" in text and "model of random weights: FAILED" in text


def test_a_promise_says_whether_it_was_kept():
    measuring = load("_measuring")
    kept = measuring.target("times as fast", ">=", 100, 871.4)
    broken = measuring.target("difference", "<=", 1e-4, 2e-4)
    assert measuring.target_line(kept, seen=".3g") == "- times as fast: at least 100 was promised, 871 measured: met."
    assert measuring.target_line(broken) == "- difference: at most 0.0001 was promised, 2.0e-04 measured: NOT met."
    assert measuring.ratios([3, 8, 2], [1, 2, 1]) == {"median": 3, "low": 2, "high": 4}


def test_a_section_goes_between_its_own_marks(head_pruning, removal, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"a\n{removal.MARK}\nold\n{removal.MARK}\n{head_pruning.MARK}kept{head_pruning.MARK}\n")
    load("_measuring").put_into(path, "new\n", removal.MARK)
    expected = f"a\n{removal.MARK}\nnew\n{removal.MARK}\n{head_pruning.MARK}kept{head_pruning.MARK}\n"
    assert path.read_text() == expected


@pytest.fixture(scope="module")
def training():
    return load("training")


@pytest.mark.parametrize(("kind", "data"), [("llama", "dialogues"), ("gpt2", "boolq"), ("gpt2", "text")])
def test_the_benchmarks_two_ways_to_fine_tune_have_the_same_loss_at_every_step(training, kind, data):
    found = training.speed(training.TINY[kind], data, steps=3, warm=1, rounds=1)
    assert found["same_adapters"]
    plain, packed = found["losses"][training.PLAIN], found["losses"][training.PACKED]
    unpacked = found["losses"].get(training.UNPACKED, packed)
    assert len(plain) == len(packed) == len(unpacked) == 3
    assert training.furthest(unpacked, plain) <= 1e-5
    assert training.furthest(packed, plain) <= 1e-5


def test_adapters_from_another_seed_would_be_seen_in_the_losses(training, monkeypatch):
    shape = training.TINY["llama"]
    made = training.rows("dialogues", shape.vocabulary, 3 * training.BATCH)
    losses, _ = training.plain(training.build(shape), made, 3)
    model = training.build(shape)
    monkeypatch.setattr(training, "SEED", 1)
    others, _ = training.plain(model, made, 3)
    assert losses[0] == pytest.approx(others[0], abs=1e-5)  # adapters begin with B = 0
    assert training.furthest(losses, others) > 1e-4


@pytest.mark.data
def test_the_lengths_kept_in_the_benchmark_are_those_of_boolq(training, data_dir):
    from tokenizers.pre_tokenizers import ByteLevel

    pieces = ByteLevel(add_prefix_space=False)
    rows = map(json.loads, (data_dir / "boolq_train.jsonl").read_text(encoding="utf-8").splitlines())
    texts = (f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:" for row in rows)
    lengths = sorted(len(pieces.pre_tokenize_str(text)) for text in texts)
    counted = [lengths[min(len(lengths) - 1, share * len(lengths) // 100)] for share in range(101)]
    assert tuple(counted) == training.BOOLQ


def cell(data: str, rounds: dict[str, list[float]], losses: dict[str, list[float]]) -> dict:
    return {
        "shape": {"name": "a shape", "width": 8, "layers": 1, "vocabulary": 100},
        "data": data,
        "rows": {"lengths": [1, 2, 3], "padding": 0.5, "labels": 0.25},
        "head_share": 0.5,
        "rounds": rounds,
        "losses": losses,
        "same_adapters": True,
        "matmul_flops": 1e6,
        "flops_a_token": 1e3,
    }


def test_ratios_are_taken_round_by_round_and_a_broken_promise_is_said(training):
    plain, unpacked, packed = training.PLAIN, training.UNPACKED, training.PACKED
    answers = cell(
        "boolq",
        {plain: [100, 100, 200], unpacked: [110, 110, 220], packed: [200, 120, 200]},
        {plain: [2.0, 1.0], unpacked: [2.0, 1.5], packed: [2.0, 1.75]},
    )
    text = cell("text", {plain: [100], packed: [90]}, {plain: [1.0], packed: [1.0]})
    taken = {plain: [{"before": 100, "peak": 1000}], packed: [{"before": 100, "peak": 500}]}
    memory = {"shape": answers["shape"], "data": "boolq", "rounds": taken}
    about = {
        "machine": dict.fromkeys(("processor", "device", "threads", "precision", "torch", "transformers", "peft"), "x"),
        "steps": 8,
        "warm": 2,
        "rounds": 3,
        "not_compared": {"another": "it is not there"},
    }
    about["machine"]["matmul_flops"] = 1e6
    found = training.summarise({"cells": [answers, text], "memory": [memory], **about})
    first, row = found["cells"][0], found["memory"][0]
    assert first["ratio"] == {"median": 1.2, "low": 1.0, "high": 2.0}
    assert first["share_of_limit"][plain] == pytest.approx(0.1)
    assert (first["loss_difference"], first["loss_difference_packed"]) == (0.5, 0.25)
    assert (row["ratio"]["median"], row["ratio_grown"]["median"]) == (0.5, pytest.approx(400 / 900))
    assert [one["met"] for one in found["targets"]] == [False, False, True, False]
    said = training.markdown(found)
    assert said.count("NOT met.") == 3 and said.count(": met.") == 1
    assert "| 100 (10%) | 110 (11%) | 200 (20%) | 1.20 [1.00, 2.00] |" in said
    assert "Not compared: another (it is not there)." in said


def test_work_that_is_counted_leaves_out_padding_and_unneeded_logits(training):
    shape = training.Shape("by hand", "gpt2", width=32, layers=1, vocabulary=10)
    model, row = training.build(shape), training.labelled_row([1, 2, 3, 4], prompt_length=3)
    layers, head = 12 * 32 * 32, 10 * 32
    assert training.multiplied(model) == (layers, head)
    assert training.needed_flops(model, [row]) == 4 * layers * 4 + 4 * head * 1 + 6 * 32 * 4**2


@pytest.fixture(scope="module")
def measured_training() -> dict:
    return json.loads((RESULTS / "training.json").read_text(encoding="utf-8"))


def test_the_readme_says_what_the_measured_fine_tuning_says(training, measured_training):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(training.MARK)[1]
    assert section.strip() == training.markdown(measured_training).strip()


def test_every_cell_was_measured_and_every_promise_is_judged_by_its_number(training, measured_training):
    cells = [(cell["shape"]["name"], cell["data"]) for cell in measured_training["cells"]]
    assert set(cells) == {(shape.name, data) for shape in training.SHAPES.values() for data in training.DATA}
    assert all(cell["same_adapters"] and cell["loss_difference"] <= 1e-4 for cell in measured_training["cells"])
    assert {row["shape"]["vocabulary"] for row in measured_training["memory"]} == {training.MEMORY_VOCABULARY}
    assert measured_training["targets"] == training.targets(measured_training["cells"], measured_training["memory"])


@pytest.fixture(scope="module")
def soak():
    return load("soak")


def test_twenty_kills_fall_into_every_part_of_a_run_and_a_second_one_after_the_first(soak):
    cases = soak.cases()
    kills = [kill for case in cases for kill in case.kills]
    assert [kill.number for kill in kills] == list(range(1, 21)) and {kill.part for kill in kills} == set(soak.PARTS)
    assert vars(soak.cases()[3].kills[0]) == vars(cases[3].kills[0]), "seeded"
    assert {case.method for case in cases} == {"full", "lora"}
    for case in cases:
        places = [kill.at for kill in case.kills if kill.at]
        assert places == sorted(places) and all(0 <= kill.share < 1 for kill in case.kills)


def test_where_a_killed_process_was_is_the_innermost_part_that_it_had_not_left(soak):
    begun = ["0.1 enter before 0", "0.5 leave before 0", "0.6 enter step 1"]
    assert soak.doing([]) == "starting" and soak.doing(begun[:1]) == "before the first step"
    assert soak.doing(begun[:2]) == "before the first step (at its end)"
    assert soak.doing([*begun, "0.7 enter validation 1"]) == "in a validation, 1"
    assert soak.durations(begun) == {"before 0": pytest.approx(0.4)}


@pytest.mark.parametrize(
    "change, why",
    [
        ({}, ""),
        ({"final_loss": 1.1 + 2e-5}, "the same final loss"),
        ({"steps": [1, 2, 2]}, "each step once"),
        ({"losses": [3.0, 2.0, 1.5]}, "the same curve"),
        ({"attempts": 3}, "attempts counted"),
        ({"statuses": ["finished", "finished"]}, "statuses"),
        ({"litter": ["partial-1"]}, "no litter"),
        ({"facts": False}, "facts hold"),
    ],
)
def test_a_broken_promise_of_a_resumed_run_is_seen(soak, monkeypatch, change, why):
    monkeypatch.setattr(soak, "STEPS", 3)
    found = {"final_loss": 1.1, "facts": True, "status": "finished", "steps": [1, 2, 3], "losses": [3.0, 2.0, 1.0]}
    found |= {"validations": [[0, 3], [3.0, 1.0]], "attempts": 2, "attempt_events": 1, "resumed_from": [2]}
    found |= {"statuses": ["interrupted", "finished"], "torn_lines": 0, "litter": []}
    got = soak.compared(found | change, {"read": found}, attempts=2)
    assert (got["ok"], got["why"]) == (not why, why)


def test_in_the_committed_soak_every_killed_run_ended_like_the_one_that_was_not(soak):
    measured = json.loads((RESULTS / "soak.json").read_text(encoding="utf-8"))
    assert len(measured["kills"]) == 20 and measured["runs_ok"] == measured["runs"] == len(soak.KILLS)
    assert max(row["difference"] for row in measured["kills"]) <= soak.TOLERANCE
    assert (RESULTS / "soak.md").read_text(encoding="utf-8") == soak.markdown(measured)


@pytest.fixture(scope="module")
def evaluation():
    return load("evaluation")


def evaluated(model: str, task: str, ours: list[float], **peer: list[float]) -> dict:
    rounds = {"nbhelpers": ours, **{name.removeprefix("b"): values for name, values in peer.items()}}
    return {
        "model": model,
        "task": task,
        "documents": 4,
        "real_rows": True,
        "tokens": {"context": 50, "ending": 30},
        "rounds": rounds,
        "difference": 2e-5 if task != "gsm8k" else 0.0,
    }


def test_evaluation_is_judged_beside_the_peer_at_its_fastest_and_says_where_it_is_slower(evaluation):
    cells = [
        evaluated("a shape", "hellaswag", [30, 20, 40], b1=[10, 10, 10], b64=[5, 5, 5]),
        evaluated("a shape", "boolq", [12], b1=[8], b64=[10]),
        evaluated("a shape", "gsm8k", [2], b6=[1]),
        evaluated("stories260K", "boolq", [9], b1=[10]),
    ]
    memory = {
        "nbhelpers": [{"before": 10, "peak": 11}],
        "lm-eval hf": [{"before": 10, "peak": 14}],
    }
    ranked = {"labels": 2000, "ratio": {"median": 1.6, "low": 1.5, "high": 1.7}}
    names = ("processor", "device", "threads", "precision", "torch", "transformers", "lm_eval")
    found = evaluation.summarise(
        {
            "cells": cells,
            "memory": {"model": "a shape", "rounds": memory},
            "curve": {"model": "a shape", "documents": [[1, 0.5, 1.0]], "choices": [[2, 0.25, 2.0]]},
            "labels": ranked,
            "machine": dict.fromkeys(names, "x"),
            "rounds": 3,
            "not_measured": {"something": "no GPU here"},
        }
    )
    first = found["cells"][0]
    assert first["fastest"] == "1" and first["ratios"]["1"] == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert found["memory"]["ratio"]["median"] == 0.25
    assert [one["met"] for one in found["targets"]] == [True, False, True, True, True, False]
    said = evaluation.markdown(found)
    assert "BoolQ, documents a second beside the peer at its fastest (batch 64): at least 1.3 was promised, 1.2" in said
    assert "BoolQ, documents a second beside the peer as it comes (batch 1): at least 1.3 was promised, 1.5" in said
    assert "| a shape | HellaSwag | 4 | 10.00 (1), 5.00 (64) | 30.00 | 3.00 [2.00, 4.00] |" in said
    assert "| stories260K | BoolQ | 4 | 10.00 (1) | 9.00 | 0.90 [0.90, 0.90] slower |" in said
    assert said.count("NOT met.") == 2 and "Not measured: something (no GPU here)." in said
    assert "| harness, seconds | 1.00 |" in said and "| nbhelpers, seconds | 0.25 |" in said


@pytest.mark.slow
def test_random_weights_write_texts_as_long_as_the_right_answers_on_both_sides(evaluation):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    model, tokenizer = evaluation.load(evaluation.TINY, None)
    asked = evaluation.Documents(
        contexts=[
            f"Question: {word} has {n} bells and a red coat, and asks the dog. How many?\nAnswer:" * 2
            for n, word in enumerate(["Jane", "Leo", "Rosa"])
        ],
        choices=[[], [], []],
        answers=["one", "one and two and three", "a b"],
        stops=("Question:",),
        new_tokens=64,
    )
    lengths = [len(tokenizer(f" {answer}")["input_ids"]) for answer in asked.answers]
    assert len(set(lengths)) > 1
    with evaluation.as_long_as_the_right_answers(model, tokenizer, asked):
        mine = evaluation.ours(model, tokenizer, asked)
        theirs = evaluation.peer(model, tokenizer, asked, 2)
    first = evaluation.FIRST
    assert mine == theirs == [tokenizer.decode(range(first + n, first, -1)) for n in lengths]


@pytest.fixture(scope="module")
def measured_evaluation() -> dict:
    return json.loads((RESULTS / "evaluation.json").read_text(encoding="utf-8"))


def test_the_readme_says_what_the_measured_evaluation_says(evaluation, measured_evaluation):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(evaluation.MARK)[1]
    assert section.strip() == evaluation.markdown(measured_evaluation).strip()


def test_both_models_were_evaluated_on_all_tasks_and_gave_the_harness_s_answers(evaluation, measured_evaluation):
    cells = measured_evaluation["cells"]
    shapes = (evaluation.GPT2.name, evaluation.STORIES.name)
    assert {(cell["model"], cell["task"]) for cell in cells} == {(m, t) for m in shapes for t in evaluation.TASKS}
    assert all(cell["difference"] <= (0 if cell["task"] == "gsm8k" else 1e-3) for cell in cells)
    held, ranked = measured_evaluation["memory"], measured_evaluation["labels"]
    assert ranked["labels"] == evaluation.LABELS
    assert measured_evaluation["targets"] == evaluation.targets(cells, held, ranked)


@pytest.fixture(scope="module")
def bundled_tasks():
    return load("bundled_tasks")


def test_every_bundled_model_learns_each_bundled_task_to_between_0_75_and_0_97(bundled_tasks):
    measured = json.loads((RESULTS / "bundled_tasks.json").read_text(encoding="utf-8"))
    cells = {(cell["model"], cell["task"]): cell for cell in measured["cells"]}
    assert set(cells) == {(model, task) for model in models.bundled_names() for task in bundled_tasks.TASKS}
    for cell in cells.values():
        assert 0.75 <= cell["tuned"]["value"] <= 0.97 and cell["tuned"]["n"] == 500 and cell["facts_hold"], cell
        assert cell["tuned"]["value"] > cell["before"]["value"] + 0.2
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(bundled_tasks.MARK)[1]
    assert section.strip() == bundled_tasks.markdown(measured).strip()


@pytest.fixture(scope="module")
def parity():
    return load("parity")


@pytest.fixture(scope="module")
def measured_parity() -> dict:
    return json.loads((RESULTS / "parity.json").read_text(encoding="utf-8"))


def test_the_readme_says_what_the_measured_parity_says(parity, measured_parity):
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(parity.MARK)[1]
    assert section.strip() == parity.markdown(measured_parity).strip()


def test_every_model_gives_the_harness_s_answers_on_every_task(parity, measured_parity):
    cells = measured_parity["cells"]
    expected = {(name, task): rows for name in parity.model_names() for task, rows in parity.ROWS.items()}
    assert {(cell["model"], cell["task"]): cell["rows"] for cell in cells} == expected
    assert all(parity.equal(cell) and cell["equal"] and cell["flips"] == 0 for cell in cells)


def test_the_table_of_parity_says_where_it_does_not_hold(parity):
    right = {
        "model": "a",
        "task": "boolq",
        "rows": 2,
        "prompts_differ": 0,
        "texts_differ": 0,
        "delta": 1e-5,
        "flips": 0,
    }
    right |= {"metrics": {"acc,none": [0.5, 0.5]}, "equal": True}
    wrong = right | {"flips": 1, "metrics": {"acc,none": [0.5, 1.0]}, "equal": False}
    said = parity.markdown({"cells": [right, wrong], "versions": {"lm_eval": "x"}})
    assert "1 of 2 cells keep it" in said
    assert "| a | boolq | 2 | 0 | 1.0e-05 | 0 | 0.5000 | 0.5000 |" in said
    assert "| a | boolq | 2 | 0 | 1.0e-05 | 1 NOT equal | 0.5000 | 1.0000 |" in said


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_every_measured_table_stands_in_the_readme_as_it_was_measured(path):
    assert path.read_text(encoding="utf-8").strip() in (ROOT / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["importance", "masks", "sparse_lora", "sweep"])
def test_the_readme_says_what_was_measured_of_masks_of_training_with_them_and_of_sweeps(name):
    benchmark = load(name)
    measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(benchmark.MARK)[1]
    assert section.strip() == benchmark.markdown(measured).strip()


@pytest.mark.parametrize("name", ["importance", "masks", "sparse_lora"])
def test_what_was_promised_of_masks_and_of_training_with_them_was_measured(name):
    measured = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    assert all(one["met"] for one in measured["targets"] if "(an aim)" not in one["what"])


@pytest.fixture(scope="module")
def sweep_demo():
    return load("sweep_demo")


def test_the_readme_says_what_the_sweep_of_360_rows_answered(sweep_demo):
    found = json.loads((RESULTS / "sweep_demo.json").read_text(encoding="utf-8"))
    section = (ROOT / "README.md").read_text(encoding="utf-8").split(sweep_demo.MARK)[1]
    assert section.strip() == sweep_demo.markdown(found).strip()
    assert found["coverage"]["rows"] == 360 and found["coverage"]["done"] == found["coverage"]["planned"] == 330
    assert found["facts_failed"] == 0 and all(one["met"] for one in found["wanted"])


def test_the_table_of_360_cells_is_the_one_that_was_summarised(sweep_demo):
    with (RESULTS / sweep_demo.CELLS).open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 360 and {row["all_facts_hold"] for row in rows} == {"true"}
    found = json.loads((RESULTS / "sweep_demo.json").read_text(encoding="utf-8"))
    for one in (one for one in found["answers"] if one["model"]):
        dense = {
            float(row["tuned"])
            for row in rows
            if (row["model"], row["task"], float(row["sparsity"])) == (one["model"], one["task"], 0.0)
        }
        assert dense == {one["dense"]["tuned"]}
    page = (ROOT / "docs" / sweep_demo.PAGE).read_text(encoding="utf-8")
    assert all((ROOT / "docs" / name).is_file() for name in re.findall(r"\]\((images/[^)]+)\)", page))


def test_what_was_wanted_of_the_sweep_of_360_rows_can_fail(sweep_demo):
    dense = {"tuned": 0.8, "tuned_low": 0.75, "tuned_high": 0.85}
    better = {"difference": 0.1, "low": 0.05, "high": 0.15}
    cell = {"model": "m", "task": "t", "chance": 0.5, "dense": dense, "masked_at": 0.9, "masked": {"a": 0.6}}
    rows = [types.SimpleNamespace(status="finished", all_facts_hold=True)]

    def met(**changes) -> list[bool]:
        whole = {"model": None, "methods": changes.pop("methods", better), "modes": changes.pop("modes", better)}
        found = changes.pop("rows", rows)
        return [one["met"] for one in sweep_demo.wanted([cell | changes, whole], found)]

    assert met() == [True] * 5
    broken = [types.SimpleNamespace(status="finished", all_facts_hold=False)]
    assert met(rows=broken) == [False, True, True, True, True]
    assert met(rows=[types.SimpleNamespace(status="failed", all_facts_hold=None)])[0] is False
    assert met(dense=dense | {"tuned": 0.98}) == [True, False, True, True, True]
    assert met(dense=dense | {"tuned": 0.74}) == [True, False, True, True, True]
    assert met(masked={"a": 0.6, "b": 0.3}) == [True, True, False, True, True]
    assert met(methods=better | {"low": -0.01}) == [True, True, True, False, True]
    assert met(modes=None) == [True, True, True, True, False]


def test_the_sweep_s_share_of_the_time_is_taken_round_by_round():
    sweep = load("sweep")
    seconds = {sweep.SWEEP: [10.0, 20.0, 60.0], sweep.WORKERS: [4.0, 20.0, 60.0]}
    seconds |= {sweep.ALONE: [40.0, 40.0, 100.0], sweep.LIBRARIES: [40.0, 80.0, 180.0]}
    found = sweep.summarise({"seconds": seconds, "overhead_shares": [0.05, 0.2, 0.08]})
    assert [(one["seen"], one["met"]) for one in found["targets"]] == [
        (0.5, False),  # one process beside cells alone: of 0.25, 0.5, 0.6
        (0.25, True),  # beside libraries: of 0.25, 0.25, 0.33
        (0.5, False),  # two workers beside cells alone: of 0.1, 0.5, 0.6
        (0.25, True),  # beside libraries: of 0.1, 0.25, 0.33
        (0.08, True),
    ]


def test_what_scoring_takes_is_measured_of_every_score_and_said_with_its_promise():
    importance = load("importance")
    found = importance.measure(importance.TINY, 16)
    attention, mlp = 4 * 128 * 128, 3 * 128 * 344
    assert found["covered"] == found["scored"] == 2 * (attention + mlp) and found["groups"] == 1
    assert found["accumulator_bytes"] == 4 * found["covered"] and found["weights_bytes"] == 2 * found["parameters"]
    promised = importance.target("peak memory of scoring a 7B shape in GB", "<=", 24, 22.5)
    here = {"processor": "x86", "device": "CPU", "threads": 2, "torch": "2"}
    text = importance.markdown({"measured": found, "machine": here, "layers": 2, "targets": [promised]})
    assert text.endswith("- peak memory of scoring a 7B shape in GB: at most 24 was promised, 22.5 measured: met.\n")
    huge = importance.LLAMA_2_7B | {"num_hidden_layers": 10_000}
    assert importance.no_room(huge).startswith("it wants about 4057 GB")
