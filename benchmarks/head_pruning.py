"""What does closing attention heads cost a real model, by strategy and level, and what does fine-tuning bring back?

    python benchmarks/head_pruning.py --model MODEL --text TEXT [--out benchmarks/results] [--readme README.md]

Every cell is one run of the product (nbhelpers.experiments.PruningExperiment) with its checked facts. Finished cells
are kept in --runs, so an interrupted grid goes on. Writes head_pruning.json and head_pruning.md; --readme puts the same
text between the marks in that file.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from _measuring import RESULTS, processor, publish

LEVELS = (0.1, 0.2, 0.3, 0.4, 0.5)
INFORMED = ("magnitude", "entropy", "gradient", "ablation")
RANDOM_SEEDS, SEEDS = 5, 3
COMMAND = "python benchmarks/head_pruning.py --readme README.md"
MARK = "<!-- head_pruning: made by benchmarks/head_pruning.py -->"
SETTINGS = {"steps": 30, "window": 256, "scoring_windows": 16, "evaluation_windows": 64, "sample_tokens": 8}


def grid() -> list[dict]:
    """The cells, each a few config fields. Magnitude and random do not look at the closed heads: scored once."""
    cells = [{"strategy": "random", "level": level, "seed": seed} for level in LEVELS for seed in range(RANDOM_SEEDS)]
    cells += [
        {"strategy": strategy, "level": level, "seed": seed, "iterative": iterative}
        for strategy in INFORMED
        for iterative in ((False,) if strategy == "magnitude" else (False, True))
        for level in LEVELS
        for seed in range(SEEDS)
    ]
    return sorted(
        cells, key=lambda cell: (cell["seed"], cell["level"] not in (0.3, 0.5), cell["level"], cell["strategy"])
    )


def name(cell: dict) -> str:
    kind = "iterative" if cell.get("iterative") else "one-shot"
    return f"{cell['strategy']}-{kind}-{cell['level']}-{cell['seed']}"


def run_cell(task: tuple[dict, str, str, str]) -> str:
    """One run, or nothing where it is already there. One control a seed is enough."""
    cell, model, text, runs = task
    folder = Path(runs) / name(cell)
    if (folder / "result.json").is_file():
        return f"{name(cell)}: kept"
    import shutil

    import torch

    from nbhelpers.experiments import PruningConfig, PruningExperiment

    torch.set_num_threads(1)
    shutil.rmtree(folder, ignore_errors=True)
    control = cell["strategy"] == "random" and cell["level"] == LEVELS[0]
    config = PruningConfig(model=model, text=text, device="cpu", control=control, **SETTINGS, **cell)
    result = PruningExperiment.run(config, run_dir=folder)
    return f"{name(cell)}: {result['pruned']['perplexity']:.3f} -> {result['fine_tuned']['perplexity']:.3f}"


def collect(runs: str) -> list[dict]:
    """One row a finished cell: nats per token at each stage."""
    rows = []
    for path in sorted(Path(runs).glob("*/result.json")):
        result = json.loads(path.read_text())
        rows.append(
            {
                "cell": path.parent.name,
                "strategy": result["strategy"],
                "iterative": result["iterative"],
                "level": result["level"],
                "seed": int(path.parent.name.rsplit("-", 1)[1]),
                "closed": len(result["pruned_heads"]),
                "heads": result["total_heads"],
                **{
                    stage: (result[stage] or {}).get("nll") for stage in ("baseline", "pruned", "fine_tuned", "control")
                },
                "facts": len(result["facts"]),
                "facts_failed": sum(not fact["ok"] for fact in result["facts"]),
                "protocol": result["protocol"],
            }
        )
    return rows


def summarise(rows: list[dict], text: str) -> dict:
    """Means over seeds (perplexity = exp of the mean nats) and the three answers with their intervals."""
    from nbhelpers.stats import mean_interval

    controls = {row["seed"]: row["control"] for row in rows if row["control"] is not None}
    groups = defaultdict(list)
    for row in rows:
        groups[row["strategy"], row["iterative"], row["level"]].append(row)

    def over_seeds(values: list[float]) -> dict:
        interval = mean_interval(values)
        return {"mean": interval.mean, "low": interval.low, "high": interval.high, "n": interval.n}

    table = [
        {
            "strategy": strategy,
            "iterative": iterative,
            "level": level,
            "pruned": over_seeds([row["pruned"] for row in group]),
            "fine_tuned": over_seeds([row["fine_tuned"] for row in group]),
            "above_control": over_seeds([row["fine_tuned"] - controls[row["seed"]] for row in group]),
            "beats_control": sum(row["fine_tuned"] < controls[row["seed"]] for row in group),
        }
        for (strategy, iterative, level), group in sorted(groups.items())
    ]

    def difference(first: tuple, second: tuple) -> dict:
        """nats by which `first` is worse than `second` after pruning, paired by seed."""
        other = {row["seed"]: row["pruned"] for row in groups[second]}
        return over_seeds([row["pruned"] - other[row["seed"]] for row in groups[first] if row["seed"] in other])

    random_mean = {
        level: sum(r["pruned"] for r in groups["random", False, level]) / len(groups["random", False, level])
        for level in LEVELS
    }
    return {
        "model": rows[0]["protocol"] | {"heads": rows[0]["heads"]},
        "text": Path(text).name,
        "settings": SETTINGS,
        "baseline": rows[0]["baseline"],
        "control": over_seeds(list(controls.values())),
        "table": table,
        "entropy_minus": {
            f"{other} {'iterative' if iterative else 'one-shot'}": {
                str(level): difference(("entropy", it, level), (other, iterative, level))
                for level in LEVELS
                for it in (iterative if other != "magnitude" else False,)
            }
            for other in ("magnitude", "gradient", "ablation")
            for iterative in ((False,) if other == "magnitude" else (False, True))
        },
        "entropy_minus_random": {
            str(level): over_seeds([row["pruned"] - random_mean[level] for row in groups["entropy", False, level]])
            for level in LEVELS
        },
        "gradient_minus_random_at_0.3": over_seeds(
            [row["pruned"] - random_mean[0.3] for row in groups["gradient", False, 0.3]]
        ),
        "iterative_minus_one_shot_at_0.5": {
            strategy: difference((strategy, True, 0.5), (strategy, False, 0.5))
            for strategy in ("entropy", "gradient", "ablation")
        },
        "iterative_hurt_less_at_0.5": {
            strategy: sum(
                iterative["pruned"] < once["pruned"]
                for iterative, once in zip(groups[strategy, True, 0.5], groups[strategy, False, 0.5], strict=True)
            )
            for strategy in ("entropy", "gradient", "ablation")
        },
        "runs": len(rows),
        "facts": sum(row["facts"] for row in rows),
        "facts_failed": sum(row["facts_failed"] for row in rows),
        "runs_that_beat_the_control": sum(row["fine_tuned"] < controls[row["seed"]] for row in rows),
        "gain": {
            "control": over_seeds([rows[0]["baseline"] - value for value in controls.values()]),
            **{
                str(level): over_seeds([row["pruned"] - row["fine_tuned"] for row in rows if row["level"] == level])
                for level in LEVELS
            },
        },
    }


def ppl(nats: float | None) -> str:
    return "-" if nats is None else f"{math.exp(nats):.2f}"


def span(found: dict, scale=lambda value: value, digits: int = 2) -> str:
    low, high = found["low"], found["high"]
    return f"{scale(found['mean']):+.{digits}f}" + (
        "" if low is None else f" [{scale(low):+.{digits}f}, {scale(high):+.{digits}f}]"
    )


def percent(nats: float) -> float:
    """A difference in nats as a relative difference of perplexity in percent."""
    return (math.exp(nats) - 1) * 100


KINDS = [("random", False), ("magnitude", False)]
KINDS += [(strategy, iterative) for strategy in ("entropy", "gradient", "ablation") for iterative in (False, True)]


def called(strategy: str, iterative: bool) -> str:
    if strategy in ("random", "magnitude"):
        return strategy
    return f"{strategy}, {'iterative' if iterative else 'one-shot'}"


def perplexity_table(by: dict, stage: str) -> list[str]:
    lines = ["| strategy | " + " | ".join(f"{level:g}" for level in LEVELS) + " |", "|---" * (len(LEVELS) + 1) + "|"]
    for kind in KINDS:
        cells = " | ".join(ppl(by[*kind, level][stage]["mean"]) for level in LEVELS)
        lines.append(f"| {called(*kind)} | {cells} |")
    return lines


def markdown(found: dict, command: str) -> str:
    """The README's section: tables and answers, every number and every yes or no from `found`."""
    by = {(row["strategy"], row["iterative"], row["level"]): row for row in found["table"]}
    control, facts = ppl(found["control"]["mean"]), f"{found['facts']} checked facts, {found['facts_failed']} failed"
    intro = (
        f"Test perplexity of stories260K ({found['model']['heads']} heads) on TinyStories, {found['model']['tokens']} "
        f"scored tokens in windows of {found['model']['window']}: **{ppl(found['baseline'])}** with all heads, "
        f"**{control}** for the unpruned control after {found['settings']['steps']} steps of full fine-tuning. "
        f"Means over {RANDOM_SEEDS} seeds for random and {SEEDS} for the others; intervals are 95 % over seeds. "
        f"{found['runs']} runs, {facts}. Training keeps its best validation state, step 0 included. "
        f"Made by `{command}`; all numbers with their intervals are in "
        "[benchmarks/results/head_pruning.json](benchmarks/results/head_pruning.json)."
    )
    lines = [
        intro,
        "",
        "Perplexity after closing the share of heads in the column head:",
        "",
        *perplexity_table(by, "pruned"),
        "",
        f"And after fine-tuning with the control's budget (control: {control}):",
        "",
        *perplexity_table(by, "fine_tuned"),
        "",
        f"- **Is entropy the best strategy?** {_answer_entropy(found, by)}",
        f"- **Is 30 % a good level?** {_answer_level(by)}",
        f"- **Does fine-tuning recover more than the control gains?** {_answer_recovery(found)}",
        f"- {_answer_gradient(found)}",
    ]
    return "\n".join(lines) + "\n"


def _answer_entropy(found: dict, by: dict) -> str:
    best = {level: min((by[*kind, level]["pruned"]["mean"], called(*kind)) for kind in KINDS)[1] for level in LEVELS}
    wins = sum(name.startswith("entropy") for name in best.values())
    cells = [
        (f"{other} at {level}", gap) for other, row in found["entropy_minus"].items() for level, gap in row.items()
    ]
    worse = sum(gap["low"] is not None and gap["low"] > 0 for _, gap in cells)
    better = sum(gap["high"] is not None and gap["high"] < 0 for _, gap in cells)
    random_gaps = found["entropy_minus_random"]
    beaten = [level for level, gap in random_gaps.items() if gap["high"] is not None and gap["high"] < 0]
    return (
        (
            "Yes, at every level. "
            if wins == len(LEVELS)
            else f"No: it is the least harmful at {wins} of {len(LEVELS)} levels. "
        )
        + "Least harmful are "
        + "; ".join(f"{name} at {level:g}" for level, name in best.items())
        + f". Against magnitude, gradient and ablation of its own kind, level by level, entropy is worse beyond the "
        f"interval in {worse} of {len(cells)} comparisons and better in {better}; it beats the mean of random at "
        + (", ".join(beaten) or "no level")
        + "."
    )


def _answer_level(by: dict) -> str:
    def cheapest(level: float) -> str:
        _, kind = min((by[*kind, level]["above_control"]["mean"], kind) for kind in KINDS)
        return f"{span(by[*kind, level]['above_control'], percent, 1)} % at {level:g} ({called(*kind)})"

    return (
        "That depends on what one pays for. After fine-tuning, perplexity stands above the control, with the cheapest "
        "strategy of each level, by " + "; ".join(map(cheapest, LEVELS)) + "."
    )


def _answer_recovery(found: dict) -> str:
    gain, wins = found["gain"], found["runs_that_beat_the_control"]
    more = [f"{level:g}" for level in LEVELS if gain[str(level)]["low"] > gain["control"]["high"]]
    return (
        (
            f"Yes, beyond both intervals, at {', '.join(more)}. "
            if more
            else "No, not beyond the intervals at any level. "
        )
        + f"The control gains {span(gain['control'], digits=3)} nats a token; fine-tuning a pruned model gains "
        + ", ".join(f"{span(gain[str(level)], digits=3)} at {level:g}" for level in LEVELS)
        + f" (all strategies). {wins} of {found['runs']} pruned and fine-tuned models beat the control: closing heads "
        + ("sometimes paid." if wins else "never paid in perplexity.")
    )


def _answer_gradient(found: dict) -> str:
    iterative, wins = found["iterative_minus_one_shot_at_0.5"], found["iterative_hurt_less_at_0.5"]
    return (
        f"`gradient` against the mean of `random` at 0.3: {span(found['gradient_minus_random_at_0.3'], digits=3)} nats "
        "(negative: hurts less). Iterative against one-shot at 0.5: "
        + ", ".join(
            f"{strategy} {span(gap, digits=3)} (hurt less on {wins[strategy]} of {SEEDS} seeds)"
            for strategy, gap in iterative.items()
        )
        + f" nats (negative: scoring again helps). With {SEEDS} seeds a 95 % interval is 4.3 standard errors each way, "
        "and one-shot scores depend much on which 16 windows were drawn."
        + (" Entropy closes the same heads either way." if iterative["entropy"]["mean"] == 0 else "")
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    data = Path(os.environ.get("NBHELPERS_TEST_DATA", "data"))
    parser.add_argument("--model", default=str(data / "models" / "stories260K-hf"))
    parser.add_argument("--text", default=str(data / "tinystories.jsonl"))
    parser.add_argument("--runs", default="results/head_pruning")
    parser.add_argument("--out", default=RESULTS)
    parser.add_argument("--readme")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()

    tasks = [(cell, options.model, options.text, options.runs) for cell in grid()]
    with ProcessPoolExecutor(options.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, line in enumerate(pool.map(run_cell, tasks), 1):
            print(f"{number}/{len(tasks)} {line}", flush=True)
    found = summarise(collect(options.runs), options.text)
    found["machine"] = {"processor": processor(), "cores": os.cpu_count()}
    publish("head_pruning", found, markdown(found, COMMAND), options.out, options.readme, MARK)


if __name__ == "__main__":
    main()
