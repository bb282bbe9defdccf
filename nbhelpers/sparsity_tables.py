"""Which tables does a sparsity sweep's report show, on a page and in Markdown? (names, lines of texts) of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nbhelpers.sparsity_answers import difference_said
from nbhelpers.sparsity_results import (
    WEIGHTS,
    ResultRow,
    dense_said,
    goes_said,
    headline,
    is_untuned,
    units,
    weights_said,
)

Table = tuple[list[str], list[list[str]]]


def lead(found: Sequence[ResultRow], told: Sequence[Mapping[str, Any]], tolerance: float) -> list[str]:
    """The answer in a few sentences: how much can go, where that cannot be told, whether filling the zeros helps."""
    if not any(row.tuned is not None for row in found):
        return ["No cell is measured yet."]
    best = headline(found)
    untold = list(dict.fromkeys(_untold(one, found) for one in best if one["cannot_tell"]))
    best = [one for one in best if not one["cannot_tell"]]
    if not best:
        return untold
    sentences = [_how_far(found, best, tolerance), *untold]
    overall = told[-1] if told else {}
    if (overall.get("modes") or {}).get("difference") is not None:
        both = difference_said(overall["modes"], "")
        sentences.append(f"Letting the zeros fill again in tuning (sparse to dense) changes accuracy by {both}.")
    return sentences


def _untold(one: Mapping[str, Any], found: Sequence[ResultRow]) -> str:
    """Why there is no headline, named where there are several models and tasks."""
    several = len({(row.model, row.task) for row in found}) > 1
    text = one["cannot_tell"]
    return (f"{one['model']} on {one['task']}: {text}" if several else text[:1].upper() + text[1:]) + "."


def _how_far(found: Sequence[ResultRow], best: Sequence[Mapping[str, Any]], tolerance: float) -> str:
    of = {one["sparsity_of"] for one in best}
    rank = "sparsity" if len(of) == 1 else "measured_sparsity"  # shares of one kind, else all as shares of weights
    least: dict[tuple, tuple[float, float]] = {}  # of all seeds, so that none is picked
    for one in best:
        if one["sparsity"] is None and not one["known"]:
            continue
        key = (one["model"], one["task"], one["method"], one["mode"])
        shares = {"sparsity": one["sparsity"] or 0.0, "measured_sparsity": one["measured_sparsity"] or 0.0}
        if one["sparsity_of"] == WEIGHTS:
            shares["measured_sparsity"] = shares["measured_sparsity"] or shares["sparsity"]
        goes = (shares[rank], shares["measured_sparsity"])
        least[key] = min(least.get(key, goes), goes)
    tops: dict[tuple[str, str], tuple[float, float]] = {}
    for (model, task, *_), goes in least.items():
        tops[model, task] = max(tops.get((model, task), goes), goes)
    within = f"within {tolerance:g} of {dense_said(found)}"
    how = "method" if is_untuned(found) else "method and mode"
    if not any(row.within_tolerance is not None and row.sparsity > 0 for row in found):
        return f"No masked cell can be judged yet: it takes {dense_said(found)} beside it."
    if not tops:
        return "How far one can go is not known yet: cells at the lowest sparsities are missing."
    if not any(goes for goes, _ in tops.values()) and not all(one["known"] for one in best):
        return f"So far no {how} keeps accuracy {within}; cells at low sparsities are missing."
    if not any(goes for goes, _ in tops.values()):
        return f"No {how} keeps accuracy {within} even at the lowest sparsity of the plan."
    asked, shares = (_from_to([goes[place] for goes in tops.values()]) for place in (0, 1))
    where = f"{asked} of the projections' weights"
    if len(of) == 1 and of != {WEIGHTS}:
        where = f"{asked} of {next(iter(of))} ({shares} of the projections' weights)"
    several = "" if len(tops) == 1 else " of each model and task"
    so_far = "Accuracy" if all(one["known"] for one in best) else "So far accuracy"
    return f"{so_far} stays {within} up to a sparsity of {where}, with the best {how}{several}."


def _from_to(shares: Sequence[float]) -> str:
    low, high = (f"{100 * share:.3g} %" for share in (min(shares), max(shares)))
    return high if low == high else f"{low} to {high}"


def denominators_said(found: Sequence[ResultRow]) -> str:
    """What the sparsities of these rows are shares of, in a sentence."""
    told = "A sparsity is a share of the weights of the covered projections"
    others = {method: of for method, of in units(found).items() if of != WEIGHTS}
    if not others:
        return f"{told}."
    named = ", ".join(f"{method}: of {of}" for method, of in others.items())
    if len(others) == len(units(found)):
        return f"A sparsity is a share of what goes as a whole ({named}); the share of weights is named beside it."
    return f"{told}, or of what goes as a whole ({named}), with the share of weights named beside it."


def level_table(told: Sequence[Mapping[str, Any]], untuned: bool = False) -> Table:
    """(names, lines) a model and task: the dense model, and the masked one before tuning beside chance.

    untuned: whether nothing was trained in any row."""
    here = [one for one in told if one["model"] is not None]
    top = max((one["masked_at"] or 0 for one in here), default=0)
    lines = []
    for one in here:
        dense = value_said(*one["dense"].values()) if one["dense"] else "missing"
        at = f"at {100 * one['masked_at']:g} %: " if one["masked_at"] not in (top, None) else ""
        shares = {method: f" ({weights_said(share)})" for method, share in one["masked_shares"].items()}
        masked = ", ".join(
            f"{method} {value:.3f}{shares.get(method, '')}"
            for method, value in one["masked"].items()
            if value is not None
        )
        chance = "not known" if one["chance"] is None else f"{one['chance']:.3g}"
        lines.append([one["model"], one["task"], dense, at + masked if masked else "missing", chance])
    masked_at = f"masked at {100 * top:g} %" + ("" if untuned else ", before tuning")
    return ["model", "task", "dense, untuned" if untuned else "dense, tuned", masked_at, "chance"], lines


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
    """(names, lines) of `headline`, a line a model, task, method and seed, a column a mode; where it cannot be told, a
    line that says why."""
    best = headline(found)
    modes = list(dict.fromkeys(str(one["mode"]) for one in best))
    several = len({one["seed"] for one in best}) > 1
    lines: dict[tuple, dict[str, str]] = {}
    for one in best:
        key = (one["model"], one["task"], one["method"], *([str(one["seed"])] if several else []))
        if one["cannot_tell"]:
            key = (*key[:2], "any", *key[3:])
            lines.setdefault((*key, one["cannot_tell"]), dict.fromkeys(modes, "") | {modes[0]: one["cannot_tell"]})
            continue
        there = "none" if one["known"] else "not known yet"
        if one["sparsity"] is not None:
            there = goes_said(one["sparsity"], one["sparsity_of"], one["measured_sparsity"])
        there += "" if one["tuned"] is None else f": {value_said(one['tuned'], one['tuned_low'], one['tuned_high'])}"
        lines.setdefault(key, {})[str(one["mode"])] = there
    names = ["model", "task", "method", *(["seed"] if several else []), *(mode.replace("_", " ") for mode in modes)]
    wide = len(names) - len(modes)
    return names, [[*key[:wide], *(cells.get(mode, "not planned") for mode in modes)] for key, cells in lines.items()]


def accuracy_table(found: Sequence[ResultRow], model: str, task: str, seed: int) -> Table:
    """(names, lines) of one model, task and seed: sparsities down, methods and modes across."""
    here = [row for row in found if (row.model, row.task, row.seed) == (model, task, seed)]
    cells = {(row.sparsity, row.method, row.mode): row for row in here}
    columns = list(dict.fromkeys((method, mode) for _, method, mode in cells))
    names = ["sparsity", *column_names(here, columns)]
    levels = sorted({sparsity for sparsity, _, _ in cells})
    return names, [[f"{level:g}", *(said(cells.get((level, *column))) for column in columns)] for level in levels]


def column_names(found: Sequence[ResultRow], columns: Sequence[tuple[str, str | None]]) -> list[str]:
    """`magnitude, sparse to dense`, and what goes where that is no single weight, of each (method, mode)."""
    of = {method: "" if unit == WEIGHTS else f" (of {unit})" for method, unit in units(found).items()}
    return [f"{method}, {(mode or 'dense').replace('_', ' ')}{of[method]}" for method, mode in columns]


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
    """A cell: its measure at the end with its interval, or why there is none."""
    if row is None:
        return "not planned"
    if row.tuned is None:
        return f"{row.status}: {row.failure}" if row.failure else "missing"
    value = value_said(row.tuned, row.tuned_low, row.tuned_high) + share_beside(row)
    return value + ("" if row.all_facts_hold else " FACT FAILED")


def share_beside(row: ResultRow) -> str:
    """`, 33.3 % of weights`, where its sparsity is a share of something else."""
    return f", {weights_said(row.measured_sparsity)}" if row.sparsity and row.sparsity_of != WEIGHTS else ""


def value_said(value: float, low: float | None, high: float | None) -> str:
    """With its interval, where more than one document gives one."""
    return f"{value:.3f}" + ("" if low is None else f" [{low:.3f}, {high:.3f}]")


def cell_name(row: Mapping[str, Any]) -> str:
    """`tiny-llama boolq random 0.5 sparse to dense`, and `0.5 of MLP channels` where no single weights go."""
    mode = (row["mode"] or "").replace("_", " ") if row["sparsity"] else "dense"
    of = row.get("sparsity_of", WEIGHTS)
    share = f"{row['sparsity']:g}" + (f" of {of}" if row["sparsity"] and of != WEIGHTS else "")
    return f"{row['model']} {row['task']} {row['method']} {share} {mode}".strip()
