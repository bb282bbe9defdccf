"""Do the curves of the classic sweep mean something? plans/sparsity_360.yaml on two bundled models, start to end.

    python benchmarks/sweep_demo.py [--folder results/sparsity_360] [--workers N] [--out benchmarks/results]
                                    [--docs docs] [--readme README.md]

360 rows, 330 trainings: about an hour on two cores. It goes on where it was stopped; a folder that is done is only
read. Writes sweep_demo.json (what was asked and what came out), sweep_demo.md (the README's section), sparsity_360.csv
(a row a cell), and docs/sparsity_360.md (all tables, with the curves in docs/images).
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from _measuring import put_into

PLAN = "plans/sparsity_360.yaml"
LEAST, MOST = 0.75, 0.97  # accuracy of the tuned dense model: room on both sides
NEAR = 0.15  # of chance, before tuning, at the highest sparsity
CELLS, PAGE = "sparsity_360.csv", "sparsity_360.md"
COMMAND = "make sweep-demo"
MARK = "<!-- sweep demo: made by benchmarks/sweep_demo.py -->"


def summarise(folder: Path) -> dict[str, Any]:
    """Answers, headline and what was wanted, read from a sweep's folder."""
    from nbhelpers import sparsity_answers, sparsity_results, sweep

    rows = sparsity_results.rows(folder)
    done = [row for row in rows if row.status == "finished" and not row.alias]
    told = sparsity_answers.answers(folder, rows)
    return {
        "plan": PLAN,
        "coverage": {key: value for key, value in sweep.status(folder).items() if isinstance(value, int)},
        "facts_failed": sum(not row.all_facts_hold for row in done),
        "generated": all(row.generated for row in done),
        "answers": told,
        "headline": sparsity_results.headline(rows),
        "tolerance": sparsity_results.TOLERANCE,
        "wanted": wanted(told, rows),
    }


def wanted(told: Sequence[Mapping[str, Any]], rows: Sequence[Any]) -> list[dict[str, Any]]:
    """What makes the curves mean something, each with what was seen."""
    cells, (whole,) = [one for one in told if one["model"]], [one for one in told if not one["model"]]
    dense = [one["dense"]["tuned"] for one in cells if one["dense"]]
    apart = [abs(value - (one["chance"] or 0.0)) for one in cells for value in one["masked"].values()]
    better, modes = whole["methods"], whole["modes"]
    done = [row for row in rows if row.status == "finished"]
    return [
        {
            "what": f"all {len(rows)} rows finished, every fact true",
            "seen": f"{len(done)} finished, {sum(not row.all_facts_hold for row in done)} with a false fact",
            "met": len(done) == len(rows) and all(row.all_facts_hold for row in done),
        },
        {
            "what": f"dense accuracy after tuning between {LEAST} and {MOST} on each task and model",
            "seen": f"{min(dense):.3f} to {max(dense):.3f}",
            "met": len(dense) == len(cells) and min(dense) >= LEAST and max(dense) <= MOST,
        },
        {
            "what": f"before tuning, {cells[0]['masked_at']:.0%} sparsity within {NEAR:g} of chance",
            "seen": f"at most {max(apart):.3f} from it (from 0 where an answer is written)",
            "met": max(apart) <= NEAR,
        },
        {
            "what": "magnitude above random at 50 % sparsity, over all tasks, models and modes",
            "seen": said(better),
            "met": bool(better and better["low"] is not None and better["low"] > 0),
        },
        {
            "what": "sparse to dense against sparse to sparse, with an interval",
            "seen": said(modes),
            "met": bool(modes and modes["low"] is not None),
        },
    ]


def said(one: Mapping[str, Any] | None) -> str:
    return "nothing to compare" if one is None else f"{one['difference']:+.3f} [{one['low']:+.3f}, {one['high']:+.3f}]"


def markdown(found: Mapping[str, Any]) -> str:
    """The README's section, every number from `found`."""
    cells = [one for one in found["answers"] if one["model"]]
    lines = [
        (
            f"`{found['plan']}`: {found['coverage']['rows']} rows, {found['coverage']['planned']} trainings of bundled "
            "models on rows that this project generated, which say nothing of the real tasks. Intervals are 95 % over "
            f"documents, one seed. Made by `{COMMAND}`: a row a cell in "
            f"[benchmarks/results/{CELLS}](benchmarks/results/{CELLS}), all tables and curves in "
            f"[docs/{PAGE}](docs/{PAGE})."
        ),
        "",
        (
            f"| model | task | chance | dense, tuned | {cells[0]['masked_at']:.0%} zeros, before tuning | "
            "magnitude - random at 50 % | sparse to dense - sparse to sparse |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for one in cells:
        dense = one["dense"]
        level = f"{dense['tuned']:.3f} [{dense['tuned_low']:.3f}, {dense['tuned_high']:.3f}]" if dense else "missing"
        masked = ", ".join(f"{method} {value:.3f}" for method, value in one["masked"].items())
        chance = "" if one["chance"] is None else f"{one['chance']:g}"
        lines.append(
            f"| {one['model']} | {one['task']} | {chance} | {level} | {masked} | {said(one['methods'])} | "
            f"{said(one['modes'])} |"
        )
    lines += [
        "",
        (
            "A model that was not tuned answers yes or no by leaning, and how often a word stands in a passage of "
            "these boolq rows tells something of the answer: so it may lie beside chance on either side."
        ),
    ]
    lines += ["", f"Highest sparsity within {found['tolerance']:g} of the tuned dense model:", ""]
    columns = list(dict.fromkeys((one["method"], one["mode"]) for one in found["headline"]))
    lines.append(
        "| model | task | " + " | ".join(f"{method}, {mode.replace('_', ' ')}" for method, mode in columns) + " |"
    )
    lines.append("|---|---|" + "---|" * len(columns))
    best = {(o["model"], o["task"], o["method"], o["mode"]): o["sparsity"] for o in found["headline"]}
    for one in cells:
        shown = [best[one["model"], one["task"], *column] for column in columns]
        cells_shown = " | ".join("none" if value is None else f"{value:g}" for value in shown)
        lines.append(f"| {one['model']} | {one['task']} | {cells_shown} |")
    others = {one["method"]: one["sparsity_of"] for one in found["headline"] if one["sparsity_of"] != "weights"}
    shares = "".join(f"; {method}: of the projections' {of}" for method, of in others.items())
    lines += ["", f"Sparsities are shares of the projections' weights{shares}.", ""]
    for one in found["wanted"]:
        lines.append(f"- {one['what']}: {one['seen']}: {'yes' if one['met'] else 'NO'}.")
    return "\n".join(lines) + "\n"


def write_page(folder: Path, docs: Path) -> None:
    """The report's tables, after them the curves of each model and task as pictures."""
    from nbhelpers import plots, plots_sparsity, sparsity_results

    rows = sparsity_results.rows(folder)
    lines = [(folder / "report" / "summary.md").read_text().rstrip(), "", "## Curves", ""]
    (docs / "images").mkdir(parents=True, exist_ok=True)
    for model, task in dict.fromkeys((row.model, row.task) for row in rows):
        name = f"images/sparsity-360-{model}-{task}.png"
        (docs / name).write_bytes(plots.png(plots_sparsity.curves(rows, model=model, task=task)))
        lines += [f"![accuracy of {model} on {task} against sparsity]({name})", ""]
    (docs / PAGE).write_text("\n".join(lines).rstrip() + "\n")


def main() -> None:
    from nbhelpers import sparsity_report, workers
    from nbhelpers.records import write_json

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", default="results/sparsity_360")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--out", default="benchmarks/results")
    parser.add_argument("--docs", default="docs")
    parser.add_argument("--readme")
    options = parser.parse_args()
    folder, out = Path(options.folder), Path(options.out)
    workers.run(PLAN, folder, options.workers)
    sparsity_report.write(folder)
    found = summarise(folder)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "sweep_demo.json", found)
    (out / CELLS).write_text((folder / "report" / "results.csv").read_text())
    write_page(folder, Path(options.docs))
    text = markdown(json.loads((out / "sweep_demo.json").read_text()))
    (out / "sweep_demo.md").write_text(text)
    if options.readme:
        put_into(Path(options.readme), text, MARK)
    print(text)


if __name__ == "__main__":
    main()
