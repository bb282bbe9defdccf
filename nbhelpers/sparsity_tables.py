"""Which tables does a sparsity sweep's report show, on a page and in Markdown? (names, lines of texts) of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbhelpers.sparsity_answers import difference_said
from nbhelpers.sparsity_results import ResultRow, headline

Table = tuple[list[str], list[list[str]]]


def lead(found: Sequence[ResultRow], told: Sequence[Mapping[str, Any]], tolerance: float) -> list[str]:
    """The answer in one or two sentences: how much can go, and whether filling the zeros helps."""
    least: dict[tuple, float] = {}  # of all seeds, so that none is picked
    best = headline(found)
    for one in best:
        if one["sparsity"] is None and not one["known"]:
            continue
        key = (one["model"], one["task"], one["method"], one["mode"])
        least[key] = min(least.get(key, 1.0), one["sparsity"] or 0.0)
    tops: dict[tuple[str, str], float] = {}
    for (model, task, *_), sparsity in least.items():
        tops[model, task] = max(tops.get((model, task), 0.0), sparsity)
    within = f"within {tolerance:g} of the tuned dense model"
    if not any(row.tuned is not None for row in found):
        return ["No cell is measured yet."]
    if not any(row.within_tolerance is not None and row.sparsity > 0 for row in found):
        sentences = ["No masked cell can be judged yet: it takes a tuned dense model beside it."]
    elif not tops:
        sentences = ["How far one can go is not known yet: cells at the lowest sparsities are missing."]
    elif not any(tops.values()) and not all(one["known"] for one in best):
        sentences = [f"So far no method and mode keeps accuracy {within}; cells at low sparsities are missing."]
    elif not any(tops.values()):
        sentences = [f"No method and mode keeps accuracy {within} even at the lowest sparsity of the plan."]
    else:
        low, high = min(tops.values()), max(tops.values())
        where = f"{100 * high:g} %" if low == high else f"{100 * low:g} % to {100 * high:g} %"
        of = "" if len(tops) == 1 else " of each model and task"
        so_far = "Accuracy" if all(one["known"] for one in best) else "So far accuracy"
        sentences = [f"{so_far} stays {within} up to a sparsity of {where}, with the best method and mode{of}."]
    overall = told[-1] if told else {}
    if (overall.get("modes") or {}).get("difference") is not None:
        both = difference_said(overall["modes"], "")
        sentences.append(f"Letting the zeros fill again in tuning (sparse to dense) changes accuracy by {both}.")
    return sentences


def level_table(told: Sequence[Mapping[str, Any]]) -> Table:
    """(names, lines) a model and task: the tuned dense model, and the masked one before tuning beside chance."""
    here = [one for one in told if one["model"] is not None]
    top = max((one["masked_at"] or 0 for one in here), default=0)
    lines = []
    for one in here:
        dense = value_said(*one["dense"].values()) if one["dense"] else "missing"
        at = f"at {100 * one['masked_at']:g} %: " if one["masked_at"] not in (top, None) else ""
        masked = ", ".join(f"{method} {value:.3f}" for method, value in one["masked"].items() if value is not None)
        chance = "not known" if one["chance"] is None else f"{one['chance']:.3g}"
        lines.append([one["model"], one["task"], dense, at + masked if masked else "missing", chance])
    return ["model", "task", "dense, tuned", f"masked at {100 * top:g} %, before tuning", "chance"], lines


def difference_table(told: Sequence[Mapping[str, Any]]) -> Table:
    """(names, lines) a model and task, then of all where there are several: two methods and two modes after tuning."""
    lines = [
        [
            *(one["model"] or "all", one["task"] or "all"),
            *(difference_said(one["methods"], "importances"), difference_said(one["modes"], "modes")),
        ]
        for one in (told[:1] if len(told) == 2 else told)
    ]
    return ["model", "task", "magnitude - random at 50 %", "sparse to dense - sparse to sparse"], lines


def headline_table(found: Sequence[ResultRow]) -> Table:
    """(names, lines) of `headline`, a line a model, task, method and seed, a column a mode."""
    best = headline(found)
    modes = list(dict.fromkeys(str(one["mode"]) for one in best))
    several = len({one["seed"] for one in best}) > 1
    lines: dict[tuple, dict[str, str]] = {}
    for one in best:
        key = (one["model"], one["task"], one["method"], *([str(one["seed"])] if several else []))
        none = "none" if one["known"] else "not known yet"
        there = none if one["sparsity"] is None else f"{100 * one['sparsity']:g} %"
        there += "" if one["tuned"] is None else f": {value_said(one['tuned'], one['tuned_low'], one['tuned_high'])}"
        lines.setdefault(key, {})[str(one["mode"])] = there
    names = ["model", "task", "method", *(["seed"] if several else []), *(mode.replace("_", " ") for mode in modes)]
    return names, [[*key, *(cells.get(mode, "not planned") for mode in modes)] for key, cells in lines.items()]


def accuracy_table(found: Sequence[ResultRow], model: str, task: str, seed: int) -> Table:
    """(names, lines) of one model, task and seed: sparsities down, methods and modes across."""
    here = [row for row in found if (row.model, row.task, row.seed) == (model, task, seed)]
    cells = {(row.sparsity, row.method, row.mode): row for row in here}
    columns = list(dict.fromkeys((method, mode) for _, method, mode in cells))
    names = ["sparsity", *(f"{method}, {(mode or '').replace('_', ' ')}" for method, mode in columns)]
    levels = sorted({sparsity for sparsity, _, _ in cells})
    return names, [[f"{level:g}", *(said(cells.get((level, *column))) for column in columns)] for level in levels]


def comparison_table(compared: Mapping[str, Any]) -> Table:
    """(names, lines): ours with its interval, theirs, the difference, and whether theirs is outside our interval."""
    names = ["cell", "ours", "theirs", "ours - theirs", "theirs outside our interval"]
    verdicts = {True: "outside", False: "within", None: ""}
    lines = []
    for row in compared["rows"]:
        known = row["ours"] is not None
        ours = value_said(row["ours"], row["ours_low"], row["ours_high"]) if known else row["status"]
        gap = f"{row['difference']:+.3f}" if known else ""
        lines.append([cell_name(row), ours, f"{row['theirs']:.3f}", gap, verdicts[row["outside"]]])
    return names, lines


def said(row: ResultRow | None) -> str:
    """A cell: its measure after tuning with its interval, or why there is none."""
    if row is None:
        return "not planned"
    if row.tuned is None:
        return f"{row.status}: {row.failure}" if row.failure else "missing"
    return value_said(row.tuned, row.tuned_low, row.tuned_high) + ("" if row.all_facts_hold else " FACT FAILED")


def value_said(value: float, low: float | None, high: float | None) -> str:
    """With its interval, where more than one document gives one."""
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def cell_name(row: Mapping[str, Any]) -> str:
    """`tiny-llama boolq random 0.5 sparse to dense`."""
    mode = (row["mode"] or "").replace("_", " ") if row["sparsity"] else "dense"
    return f"{row['model']} {row['task']} {row['method']} {row['sparsity']:g} {mode}".strip()
