"""Do the benchmarks count and summarise as a pencil does?"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
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


def test_a_section_goes_between_its_own_marks(head_pruning, removal, tmp_path):
    path = tmp_path / "README.md"
    path.write_text(f"a\n{removal.MARK}\nold\n{removal.MARK}\n{head_pruning.MARK}kept{head_pruning.MARK}\n")
    head_pruning.put_into(path, "new\n", removal.MARK)
    expected = f"a\n{removal.MARK}\nnew\n{removal.MARK}\n{head_pruning.MARK}kept{head_pruning.MARK}\n"
    assert path.read_text() == expected


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.md")), ids=lambda path: path.stem)
def test_every_measured_table_stands_in_the_readme_as_it_was_measured(path):
    assert path.read_text(encoding="utf-8").strip() in (ROOT / "README.md").read_text(encoding="utf-8")
