"""What does a sweep's folder say to a person so far? Figures, a table, sentences and checked facts, read from it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment

from nbhelpers import mask_files, mask_sets, overview, plots, plots_sparsity, report, sparsity_answers, sparsity_report
from nbhelpers.ledger import Ledger
from nbhelpers.records import slug
from nbhelpers.runs import read_run
from nbhelpers.sparsity_results import TOLERANCE, ResultRow, both_modes, dense_said, goes_said, headline, rows
from nbhelpers.sparsity_tables import column_names, denominators_said, share_beside
from nbhelpers.tables import aligned

MASKS = "masks"
MOST_FIGURES = 4  # pairs of a model and a task that are drawn; the page of the report holds all
MOST_SENTENCES = 8
STATES = {"running": "nbh-blue", "failed": "nbh-bad", "diverged": "nbh-bad"}
TABLE = Environment(autoescape=True).from_string(
    '{% for part in parts %}<div class="nbh-section">{{ part.title }}</div><div class="nbh-wide">'
    '<table class="nbh-runs nbh-grid"><tr><th>sparsity</th>{% for name in part.columns %}<th>{{ name }}</th>'
    "{% endfor %}</tr>{% for row in part.rows %}<tr><td>{{ row.level }}</td>{% for cell in row.cells %}"
    '<td><span class="{{ cell.look }}">{{ cell.value }}</span>{% if cell.more %} '
    '<span class="nbh-note">{{ cell.more }}</span>{% endif %}</td>{% endfor %}</tr>{% endfor %}</table></div>'
    '{% endfor %}{% if said %}<span class="nbh-note">{{ said }}</span>{% endif %}'
)


@dataclass(frozen=True)
class SweepResults:
    """What is in a sweep's folder at one moment. tolerance: points below the dense model that still pass."""

    folder: Path
    tolerance: float = TOLERANCE

    @cached_property
    def rows(self) -> list[ResultRow]:
        return rows(self.folder, self.tolerance)

    @cached_property
    def coverage(self) -> dict[str, Any]:
        return overview.coverage(self.folder)

    @property
    def pairs(self) -> list[tuple[str, str, int]]:
        """(model, task, seed) of which each has a figure."""
        return list(dict.fromkeys((row.model, row.task, row.seed) for row in self.rows))

    def _named(self, model: str, task: str, seed: int) -> str:
        several = len({row.seed for row in self.rows}) > 1
        return f"{plots._short(model)} {task}" + (f" seed {seed}" if several else "")

    # figures ------------------------------------------------------------------------------------------------------

    def curves(self) -> dict[str, plots.Figure]:
        """Accuracy against sparsity, a figure a model, task and seed."""
        return {
            self._named(*pair): plots_sparsity.curves(self.rows, model=pair[0], task=pair[1], seed=pair[2])
            for pair in self.pairs[:MOST_FIGURES]
        }

    def heat_maps(self) -> dict[str, plots.Figure]:
        """Method by sparsity, a figure a model, task, seed and mode."""
        drawn = {}
        for model, task, seed in self.pairs[:MOST_FIGURES]:
            for mode in dict.fromkeys(row.mode for row in self.rows if row.sparsity and row.mode):
                named = f"{self._named(model, task, seed)} {mode}"
                drawn[named] = plots_sparsity.heat_map(self.rows, model=model, task=task, mode=mode, seed=seed)
        return drawn

    # tables -------------------------------------------------------------------------------------------------------

    def _parts(self) -> list[dict[str, Any]]:
        parts = []
        for pair in self.pairs:
            here = [row for row in self.rows if (row.model, row.task, row.seed) == pair]
            metric = next((f" ({row.metric})" for row in here if row.metric), "")
            columns = list(dict.fromkeys((row.method, row.mode) for row in here))
            cells = {(row.sparsity, row.method, row.mode): row for row in here}
            levels = sorted({row.sparsity for row in here})
            table = [(level, [cells.get((level, *column)) for column in columns]) for level in levels]
            names = column_names(here, columns)
            parts.append({"title": f"{self._named(*pair)}{metric}", "columns": names, "table": table})
        return parts

    def table(self) -> str:
        """A table a model and task as HTML: sparsities down, methods and modes across; what is missing says so."""
        parts = [
            part
            | {
                "rows": [
                    {"level": f"{level:g}", "cells": [_cell(row) for row in row_]} for level, row_ in part["table"]
                ]
            }
            for part in self._parts()
        ]
        judged = any(row.within_tolerance for row in self.rows)
        green = f"green: within {self.tolerance:g} of {dense_said(self.rows)}; " if judged else ""
        return TABLE.render(parts=parts, said=green + self.caution())

    def text(self) -> str:
        """The same as text."""
        told = []
        for part in self._parts():
            table = [
                {"sparsity": f"{level:g}"} | dict(zip(part["columns"], map(_said, cells), strict=True))
                for level, cells in part["table"]
            ]
            told.append(f"{part['title']}\n{aligned(table)}")
        return "\n\n".join([*told, self.caution()])

    def caution(self) -> str:
        """How much the numbers can bear."""
        steps = sorted({row.steps for row in self.rows if row.steps is not None})
        if not any(row.tuned is not None for row in self.rows):
            return ""
        rows_ = max((row.n or 0) for row in self.rows)
        made = " that this project generated" if any(row.generated for row in self.rows) else ""
        tuned = "nothing was trained"
        if steps:
            tuned = f"after {steps[0]}{'' if len(steps) == 1 else f' to {steps[-1]}'} steps of LoRA in each cell"
            tuned += " that was tuned" if any(row.tuning == "none" for row in self.rows) else ""
        said = f"{tuned}, on {rows_} rows{made}; intervals are 95 % over them"
        return f"{said}. {denominators_said(self.rows)}"

    # sentences ----------------------------------------------------------------------------------------------------

    def verdicts(self) -> list[str]:
        """How far one can go, a sentence a model, task, method and mode; what both modes differ in; what failed."""
        told = [self._highest(*pair) for pair in self.pairs[:MOST_SENTENCES]]
        if len(self.pairs) > MOST_SENTENCES:
            told.append(f"and {len(self.pairs) - MOST_SENTENCES} more: see the report")
        return [*told, *self.modes()]

    def _highest(self, model: str, task: str, seed: int) -> str:
        here = [one for one in headline(self.rows) if (one["model"], one["task"], one["seed"]) == (model, task, seed)]
        says = f"{plots._short(model)} on {task}: "
        if untold := list(dict.fromkeys(one["cannot_tell"] for one in here if one["cannot_tell"])):
            return says + "; ".join(untold)
        if not any(one["sparsity"] for one in here) and not all(one["known"] for one in here):
            return f"{says}not known yet, cells at the lowest sparsities are missing"
        if not any(one["sparsity"] for one in here):
            rule = f"within {self.tolerance:g} of {dense_said(self.rows)}"
            return f"{says}no sparsity of the plan stays {rule}, whatever the method and mode"
        found = [f"{one['method']}, {(one['mode'] or 'dense').replace('_', ' ')} {_where(one)}" for one in here]
        return f"{says}highest sparsity within {self.tolerance:g} of {dense_said(self.rows)}: {'; '.join(found)}"

    def modes(self) -> list[str]:
        """sparse_to_dense against sparse_to_sparse, document by document, a line a model and task."""
        told = []
        for one in sparsity_answers.modes_compared(self.folder, self.rows):
            if one["model"] is None and len(self.pairs) > 1:
                where = "all together"
            elif one["model"] is None:
                continue
            else:
                where = f"{plots._short(one['model'])} on {one['task']}"
            said = sparsity_answers.difference_said(one, "modes")
            told.append(f"{where}: sparse to dense minus sparse to sparse {said}")
        return told

    # facts --------------------------------------------------------------------------------------------------------

    def facts(self) -> list[dict[str, Any]]:
        """What was checked in the runs, each fact over all of them, and about the sweep itself."""
        ledger = Ledger(self.folder)
        by_name: dict[str, list[tuple[str, dict]]] = {}
        for job, state in ledger.states().items():
            if state.status == "finished":
                for fact in (read_run(state.run_dir).result or {}).get("facts", ()):
                    by_name.setdefault(fact["name"], []).append((ledger.jobs[job].name, fact))
        return [self._every_job(), self._once(), *self._modes_differ(), *map(_together, by_name.values())]

    def _every_job(self) -> dict[str, Any]:
        found = self.coverage
        ok = found["done"] == found["planned"]
        failed = ", ".join(f"{count} {name}" for name, count in found["failed_by_class"].items() if count)
        return {
            "name": "every_job_is_done",
            "ok": ok,
            "says": "every job of the plan came to its end",
            "saw": f"{found['done']} of {found['planned']}" + (f", failed: {failed}" if failed else ""),
        }

    def _once(self) -> dict[str, Any]:
        twice = self.coverage["twice"]
        return {"name": "no_job_twice", "ok": not twice, "says": "no job was done twice", "saw": f"{twice} were"}

    def _modes_differ(self) -> list[dict[str, Any]]:
        pairs = both_modes([row for row in self.rows if row.status == "finished" and not row.alias])
        same = sum(one.validation_nll == other.validation_nll for one, other in pairs)
        says = "sparse to dense and sparse to sparse train different models"
        saw = f"validation loss differs in {len(pairs) - same} of {len(pairs)} cells"
        return [{"name": "modes_differ", "ok": not same, "says": says, "saw": saw}] if pairs else []

    def result(self) -> dict[str, Any]:
        """What a panel shows of a sweep that has ended."""
        facts = self.facts()
        told = {"kind": "sweep", "run_dir": str(self.folder), "coverage": self.coverage, "facts": facts}
        told |= {"all_facts_hold": all(fact["ok"] for fact in facts), "verdicts": self.verdicts()}
        return told | {"verdict": " ".join(told["verdicts"]), "rows": [row.model_dump() for row in self.rows]}

    def said(self) -> str:
        """`9 planned, 9 finished, 0 failed, 0 running, 0 missing, 0 twice`."""
        return overview.coverage_line(self.folder)

    def save(self) -> str:
        """Write the report into the sweep's folder, the masks beside it under names that say what they are; what there
        is, a line each."""
        sparsity_report.write(self.folder, tolerance=self.tolerance)
        place = self.folder / "report"
        (place / MASKS).mkdir(exist_ok=True)
        told = sorted(f"report/{path.name}" for path in place.iterdir() if path.is_file())
        sets = []
        for path in (self.folder / "runs" / mask_sets.FOLDER).glob("*.safetensors"):
            header = mask_files.load(path).header
            said = f"{header['how'].get('pattern')}-{header['importance']}-{header['sha256'][:12]}"
            name = f"{slug(said)}.safetensors"  # the header may be anybody's
            if not (place / MASKS / name).exists():
                _link(path, place / MASKS / name)
            many = f"{len(header['sparsities'])} sparsities of {header['numbers']:,} weights"
            sets.append(f"report/{MASKS}/{name}: {many}")
        told += sorted(sets)
        return "\n".join(told)

    def archive(self) -> Path:
        """Everything in the folder as one zip in it, masks included; weights above 50 MB and answers stay here."""
        return report.archive(self.folder, f"{self.folder.resolve().name}.zip")


def _link(path: Path, place: Path) -> None:
    """The same file under another name, or a copy where the file system has no second names."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copy2(path, place)


def _where(one: Mapping[str, Any]) -> str:
    if one["sparsity"] is None:
        return "none" if one["known"] else "not known yet"
    goes = goes_said(one["sparsity"], one["sparsity_of"], one["measured_sparsity"])
    return f"{goes}: {one['tuned']:.3f}{_between(one['tuned_low'], one['tuned_high'])}"


def _cell(row: ResultRow | None) -> dict[str, str]:
    if row is None:
        return {"value": "not planned", "look": "nbh-note", "more": ""}
    if row.tuned is None:
        waiting = row.status in ("planned", "interrupted")
        said = "missing" if waiting else row.status.upper() if row.failure else row.status
        return {"value": said, "look": STATES.get(row.status, "nbh-note"), "more": row.failure or ""}
    between = (_between(row.tuned_low, row.tuned_high) + share_beside(row)).strip(" ,")
    if not row.all_facts_hold:
        return {"value": f"{row.tuned:.3f}", "look": "nbh-bad", "more": f"{between} A FACT FAILED"}
    return {"value": f"{row.tuned:.3f}", "look": "nbh-strong" if row.within_tolerance else "", "more": between}


def _said(row: ResultRow | None) -> str:
    cell = _cell(row)
    return f"{cell['value']} {cell['more']}".strip()


def _between(low: float | None, high: float | None) -> str:
    """Empty where one document gives no interval."""
    return "" if low is None else f" [{low:.3f}, {high:.3f}]"


def _together(found: list[tuple[str, dict]]) -> dict[str, Any]:
    """One fact over all runs that checked it; where it failed, what the first of them saw."""
    held = sum(fact["ok"] for _, fact in found)
    broken = next((f": {job}, {fact['saw']}" for job, fact in found if not fact["ok"]), "")
    first = found[0][1]
    saw = f"{held} of {len(found)} runs{broken}"
    return {"name": first["name"], "ok": held == len(found), "says": first["says"], "saw": saw}
