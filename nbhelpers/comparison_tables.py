"""Which tables does the report of a comparison show? (names, lines of texts) of each; nothing measured is `-`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from nbhelpers import icd10
from nbhelpers.collection import flat
from nbhelpers.plots_comparison import full_name, gigabytes, interval, ordered, parameters_said
from nbhelpers.plots_comparison import seconds_said as seconds
from nbhelpers.stats import digits
from nbhelpers.tables import withheld

Table = tuple[list[str], list[list[str]]]
NONE = "-"
MOST_PLACES = 8  # of a list in the cleaning report
LONGEST = 120  # letters of a setting


def share(value: float | None, ends: tuple[float, float] | None = None) -> str:
    """`84.4 % [76.0, 90.6]`."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def quality(result: Mapping[str, Any]) -> Table:
    """How good each entry is: every measure with its interval where it is the headline's."""
    codes = result["data"]["kind"] == "icd10"
    measures = {"top_1_accuracy": "top-1", "exact_match_accuracy": "exact match (written)"}
    measures |= {"category_accuracy": "category", "chapter_accuracy": "chapter"} if codes else {}
    measures |= {"top_3_accuracy": "top-3", "top_5_accuracy": "top-5", "f1": "F1 (weighted)", "macro_f1": "F1 (macro)"}
    head = result["headline"]
    measures = {head: measures.get(head, head)} | {name: said for name, said in measures.items() if name != head}
    lines = []
    for entry in ordered(result).values():
        cells = [
            share(entry.get(name), interval(entry, name) if name in (head, "macro_f1") else None) for name in measures
        ]
        answered = entry.get("no_valid_answer")
        invalid = NONE if answered is None else f"{answered} of {entry['n_samples']}"
        precision = entry.get("precision") or NONE
        lines.append([full_name(entry), cells[0], str(entry["n_samples"]), precision, *cells[1:], invalid])
    first, *others = measures.values()
    return ["model", first, "n", "precision", *others, "no valid answer"], lines


def effort(result: Mapping[str, Any]) -> Table:
    """What each model takes: size, memory, speed, and the wait of a single request."""
    names = ["model", "parameters", "weights", "peak memory", "dialogues/s", "prompt tokens/s"]
    names += ["p50", "p95", "p99", "requests timed", "prompts cut", "answers came from"]
    lines = []
    for entry in ordered(result).values():
        performance, memory = entry.get("performance") or {}, entry.get("memory") or {}
        latency, parameters = performance.get("latency") or {}, entry.get("parameters")
        if not (performance or memory or parameters):
            continue  # what needs no language model
        weights, peak = memory.get("weights_bytes"), memory.get("peak_bytes")
        kind = {"cuda": " (GPU)", "resident": " (process)"}.get(memory.get("kind"), "")
        lines.append(
            [
                full_name(entry),
                parameters_said(parameters) if parameters else NONE,
                gigabytes(weights) if weights else NONE,
                gigabytes(peak) + kind if peak else NONE,
                *(number(performance.get(name)) for name in ("dialogues_per_second", "prompt_tokens_per_second")),
                *(seconds(latency[at]) if latency.get(at) is not None else NONE for at in ("p50", "p95", "p99")),
                *(number(latency.get("n")), number(entry.get("truncated"))),
                {"measured": "this run", "cached": "the cache"}.get(performance.get("came"), NONE),
            ]
        )
    return names, lines


def training(result: Mapping[str, Any]) -> Table:
    """How each tuned model was tuned; no lines where none was."""
    names = ["model", "rows", "epochs", "steps (best)", "time", "tokens/s", "trainable", "LoRA rank, alpha"]
    lines = []
    for entry in ordered(result).values():
        made = entry.get("training_metrics")
        if not made:
            continue
        trainable, total = made.get("trainable_parameters"), made.get("total_parameters")
        part = f"{parameters_said(trainable)} of {parameters_said(total)}" if trainable and total else NONE
        adapters = f"{made['lora_rank']}, {made['lora_alpha']:g}" if made.get("lora_rank") else "all weights"
        spent = made.get("seconds")
        lines.append(
            [
                *(full_name(entry), number(made.get("rows")), number(made.get("epochs"))),
                f"{number(made.get('steps'))} ({number(made.get('best_step'))})",
                *(NONE if spent is None else seconds(spent), number(made.get("tokens_per_second")), part, adapters),
                NONE if made.get("learning_rate") is None else f"{made['learning_rate']:g}",
            ]
        )
    return [*names, "learning rate"], lines


def pairs(result: Mapping[str, Any], tests: Sequence[Mapping[str, Any]]) -> Table:
    """Paired tests: difference with interval, documents only one got right, p by McNemar, p corrected by Holm."""
    lines = []
    for test in tests:
        gap = test["difference"]
        said = f"{100 * gap['mean']:+.1f}"
        if gap.get("low") is not None:
            said += f" [{100 * gap['low']:+.1f}, {100 * gap['high']:+.1f}]"
        both = f"{_name(result, test['a'])} - {_name(result, test['b'])}"
        only, p_values = [str(test[side]) for side in ("only_a", "only_b")], (test["mcnemar_p"], test["holm_p"])
        lines.append([both, said, *only, *map(_p, p_values)])
    return ["first - second", "points", "only first right", "only second", "p (McNemar)", "p (Holm)"], lines


def routes(result: Mapping[str, Any]) -> Table:
    """What each threshold chosen on validation does on the test rows."""
    names = ["model", "wanted", "threshold", "coded alone", "of them rightly", "kept its promise"]
    lines = []
    for key, found in (result.get("routing") or {}).items():
        for point in found["points"]:
            test, line = point["test"], [_name(result, key), f"{point['wanted']:.0%}"]
            if not test:
                lines.append([*line, "none", "none: all go to a person", NONE, NONE])
                continue
            ends = None if test["low"] is None else (test["low"], test["high"])
            kept = {True: "yes", False: "no", None: NONE}[test["reached"]]
            coded = f"{test['coded']} ({share(test['coverage'])})"
            lines.append([*line, f"{point['threshold']:.3f}", coded, share(test["precision"], ends), kept])
    return names, lines


def certainty(result: Mapping[str, Any]) -> Table:
    """How far the probabilities can be trusted."""
    lines = [
        [_name(result, key), f"{100 * found['calibration_error']:.1f} points", f"{found['brier']:.3f}"]
        for key, found in (result.get("routing") or {}).items()
    ]
    return ["model", "calibration error", "Brier score"], lines


def costs(result: Mapping[str, Any]) -> Table:
    """Time, and money where a price was named, of 1,000 dialogues and of tuning."""
    found = result["cost"]
    priced = found["price_per_gpu_hour"] is not None
    unit = f" ({found['currency']})" if found.get("currency") else ""
    lines = []
    for row in found["rows"]:
        hours, tuning = row["hours_per_1000"], row["tuning_seconds"]
        line = [_name(result, row["key"]), share(row["accuracy"]), NONE if hours is None else seconds(3600 * hours)]
        line += [number(row["price_per_1000"])] if priced else []
        line += [NONE if tuning is None else seconds(tuning)] + ([number(row["tuning_price"])] if priced else [])
        lines.append(line)
    money = [f"price of 1,000{unit}"], [f"price of tuning{unit}"]
    first, second = money if priced else ([], [])
    return ["model", "accuracy", "time for 1,000", *first, "time of tuning", *second], lines


def errors(result: Mapping[str, Any], entry: Mapping[str, Any], texts: Mapping[str, str]) -> Table:
    """Rows that a model got wrong: id and labels; the dialogue only where `texts` holds it by id."""
    codes = result["data"]["kind"] == "icd10"
    lines = [
        [
            *(str(one["id"]), " or ".join(_label(gold, codes) for gold in one["gold"])),
            "no valid answer" if one["said"] is None else _label(one["said"], codes),
            *([texts.get(str(one["id"]), NONE)] if texts else []),
        ]
        for one in entry.get("errors") or ()
    ]
    return ["row", "right", "said", *(["dialogue"] if texts else [])], lines


def settings(values: Mapping[str, Any], leave_out: Sequence[str] = ()) -> Table:
    """A nested record as lines; texts of users as their sha256, files by their name alone."""
    lines = []
    for name, value in flat(values).items():
        if name.split(".")[0] in leave_out or value is None or value in ({}, [], ""):
            continue
        lines.append([name.replace("_", " "), _setting(name, value)])
    return ["", ""], lines


def _setting(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_setting(key, one)}" for key, one in value.items() if one not in (None, "", False))
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)} in all)" if len(value) > MOST_PLACES else ""
        return "; ".join(_setting(name, one) for one in value[:MOST_PLACES]) + more
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    said = f"{value:g}" if isinstance(value, float) else str(withheld(name, value))
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def _name(result: Mapping[str, Any], key: str) -> str:
    entry = result["models"].get(key)
    return full_name(entry) if entry else key


def _label(label: str, codes: bool) -> str:
    return icd10.dotted(label) if codes and icd10.is_code(label) else label


def number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if value >= 1000 else digits(value)


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"
