"""Which tables does the report of a comparison show? (names, lines of texts) of each; nothing measured is `-`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
CLEANED = {  # dotted names of the cleaning report, those of rows that were left out first
    "unreadable.rows": "left out: cannot be read",
    "empty_dialogue.rows": "left out: without a dialogue",
    "empty_label.rows": "left out: without a label",
    "no_code.rows": "left out: label is no code of ICD-10-CM",
    "duplicate.rows": "left out: repeats a dialogue and its label",
    "contradictory.rows": "left out: one dialogue with different labels",
    "joined.rows": "rows joined to dialogues with several labels",
    "joined.dialogues": "dialogues that they became",
    "rows_with_several_labels": "rows with several labels, any one right",
    "near_duplicates.rows": "rows nearly the same as another, kept in one part",
    "near_duplicates.groups": "groups of such rows",
    "near_duplicates.groups_with_different_labels": "of them with different labels",
    "labels_without_rows": "labels of the list given that stand at no row",
}
SPLIT = {
    "mode": "how",
    "limit_test": "most test rows, as asked for",
    "left_out.labels_of_several_parts": "rows left out: their labels stand in several parts",
    "left_out.test_limit": "rows left out: above the most test rows",
    "labels_without_test": "labels without a test row",
    "test_labels_without_train": "labels of the test without a training row",
    "overlap.exact": "dialogues in two parts",
    "overlap.near": "dialogues in two parts, nearly the same",
}
PARTS = {"train": "to train on", "validation": "to choose by", "test": "to test on"}
WAYS = {"per_label": "each label in every part", "unseen_labels": "whole labels held out"}
PROTOCOL = {
    "system_prompt": "said before each dialogue",
    "question": "asked after it",
    "labels_listed": "labels that stand in the prompt",
    "shots": "solved dialogues that stand in the prompt",
    "answers": "ways to answer",
    "new_tokens": "most tokens of a written answer",
    "split": "part that they were asked about",
    "rows": "its rows",
    "device": "computed on",
    "ranking": "what labels are ranked by",
    "sha256": "fingerprint of the wording",
}
ENVIRONMENT = {
    "platform": "system",
    "cpu.name": "processor",
    "cpu.cores": "cores",
    "cpu.logical_cores": "threads of the cores",
    "cpu.threads": "threads that compute",
    "cpu.ram_bytes": "memory",
    "device.type": "computed on",
    "device.name": "name of the device",
    "device.total_bytes": "memory of the device",
    "device.count": "devices",
    "where": "started from",
    "git.commit": "commit of the code",
    "git.dirty": "code changed since",
}


def share(value: float | None, ends: tuple[float, float] | None = None) -> str:
    """`84.4 % [76.0, 90.6]`."""
    if value is None:
        return NONE
    return f"{100 * value:.1f} %" + (f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else "")


def points(difference: float) -> str:
    """`+69.8` percentage points of a difference of shares; none has no sign."""
    said = f"{100 * difference:+.1f}"
    return "0.0" if said in ("+0.0", "-0.0") else said


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
    return ["model", first, "rows", "precision", *others, "no valid answer"], lines


def effort(result: Mapping[str, Any]) -> Table:
    """What each model takes: size, memory, speed, and the wait of a single request."""
    names = ["model", "parameters", "weights", "peak memory", "dialogues/s", "prompt tokens/s"]
    names += ["p50", "p95", "p99", "requests timed", "prompts cut", "answers came from"]
    came = {phase.get("model"): phase.get("came") for phase in result.get("phases") or ()}
    lines = []
    for key, entry in ordered(result).items():
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
                {"measured": "this run", "cached": "the cache"}.get(came.get(key) or performance.get("came"), NONE),
            ]
        )
    return names, lines


def licences(result: Mapping[str, Any]) -> Table:
    """Licence and gate of each model, as the catalogue has them; no lines in older results."""
    gates = {True: "asks for consent on its hub page", False: "none", None: "unknown"}
    found = result.get("licences") or {}
    lines = [[PurePath(name).name, one["licence"], gates[one["gated"]]] for name, one in found.items()]
    return ["model", "licence", "gate"], lines


def training(result: Mapping[str, Any]) -> Table:
    """How each tuned model was tuned; no lines where none was."""
    names = ["model", "rows", "epochs", "prompts cut", "steps (best)", "time", "tokens/s"]
    names += ["trained parameters", "LoRA rank, alpha"]
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
                *(full_name(entry), number(made.get("rows")), _count(made.get("epochs"))),
                number(made.get("truncated")),
                f"{number(made.get('steps'))} ({number(made.get('best_step'))})",
                *(NONE if spent is None else seconds(spent), number(made.get("tokens_per_second")), part, adapters),
                NONE if made.get("learning_rate") is None else f"{made['learning_rate']:g}",
            ]
        )
    return [*names, "learning rate"], lines


def pairs(result: Mapping[str, Any], tests: Sequence[Mapping[str, Any]]) -> Table:
    """Paired tests: first minus second with interval, rows only one got right, p by McNemar, p corrected by Holm."""
    lines = []
    for test in tests:
        gap = test["difference"]
        said = points(gap["mean"])
        if gap.get("low") is not None:
            said += f" [{points(gap['low'])}, {points(gap['high'])}]"
        both = f"{_name(result, test['a'])} against {_name(result, test['b'])}"
        only, p_values = [str(test[side]) for side in ("only_a", "only_b")], (test["mcnemar_p"], test["holm_p"])
        lines.append([both, said, *only, *map(_p, p_values)])
    return ["first against second", "points", "only first right", "only second right", "p (McNemar)", "p (Holm)"], lines


def routes(result: Mapping[str, Any]) -> Table:
    """What each threshold chosen on validation does on the test rows."""
    names = ["model", "wanted right", "threshold", "coded alone", "of them rightly", "kept its promise"]
    lines = []
    for key, found in (result.get("routing") or {}).items():
        for point in found["points"]:
            test, line = point["test"], [_name(result, key), f"{100 * point['wanted']:.0f} %"]
            if not test:
                lines.append([*line, NONE, "none", NONE, NONE])
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
    money = [f"price of 1,000 dialogues{unit}"], [f"price of tuning{unit}"]
    first, second = money if priced else ([], [])
    return ["model", "accuracy", "time for 1,000 dialogues", *first, "time of tuning", *second], lines


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


def cleaning(found: Mapping[str, Any]) -> Table:
    """What became of the rows that were read; counts of 0 are left out, and columns are those that were taken."""
    shown = {name: value for name, value in found.items() if name not in ("kind", "labels", "says", "columns")}
    shown = {name: value for name, value in flat(shown).items() if value != 0 or name in ("rows", "kept")}
    columns = {
        f"column of the {name}": withheld("column", value) for name, value in (found.get("columns") or {}).items()
    }
    return settings(shown | columns, words={"rows": "rows read", "kept": "rows kept"} | CLEANED)


def parts(split: Mapping[str, Any]) -> Table:
    """What each part of the split holds; no lines where the record does not say."""
    labels = split.get("labels") or {}
    lines = [
        [PARTS.get(part, part), str(rows), str(labels.get(part, NONE))]
        for part, rows in (split.get("rows") or {}).items()
    ]
    return ["part", "rows", "labels"], lines


def splitting(split: Mapping[str, Any]) -> Table:
    """How the rows were split, without what `parts` shows."""
    found = dict(split) | {"mode": WAYS.get(split.get("mode", ""), split.get("mode"))}
    return settings(found, ("rows", "labels", "sha256"), SPLIT)


def fingerprints(found: Mapping[str, Any], split: Mapping[str, Any]) -> Table:
    """Of the data and the split, and of each part."""
    of = {f"rows {PARTS.get(part, part)}": value for part, value in (split.get("sha256") or {}).items()}
    return settings(dict(found) | of)


def protocol(found: Mapping[str, Any], own: bool) -> Table:
    """How models were asked. own: the wording is this project's and nobody's secret, else its sha256 stands here."""
    shown = ("ranking", "question", *(("system_prompt",) if own else ()))
    _, lines = settings({name: value for name, value in found.items() if name not in shown}, ("format",), PROTOCOL)
    return ["", ""], [[PROTOCOL[name], str(found[name])] for name in reversed(shown) if found.get(name)] + lines


def environment(found: Mapping[str, Any], leave_out: Sequence[str] = ()) -> Table:
    """What the numbers depend on outside the config: the machine first, versions of libraries last."""
    machine = {name: value for name, value in found.items() if name != "libs"}
    return settings(machine | dict(found.get("libs") or {}), leave_out, ENVIRONMENT)


def checks(facts: Sequence[Mapping[str, Any]], named: Callable[[str], str] = str) -> list[dict[str, Any]]:
    """Each claim once, with what was seen of every model; those that failed first. named: a model's key for people."""
    found: dict[tuple, list[dict[str, Any]]] = {}
    for fact in facts:
        model = named(fact.get("model") or "")
        claim = bool(fact.get("ok")), fact.get("says", ""), bool(model)
        found.setdefault(claim if model else (*claim, len(found)), []).append(dict(fact) | {"model": model})
    in_order = sorted(found.items(), key=lambda item: item[0][0])
    return [{"ok": claim[0], "says": claim[1], "seen": seen} for claim, seen in in_order]


def settings(values: Mapping[str, Any], leave_out: Sequence[str] = (), words: Mapping[str, str] | None = None) -> Table:
    """A nested record as lines; texts of users as their sha256, files by their name alone. words: for dotted names."""
    lines = []
    for name, value in flat(values).items():
        if name.split(".")[0] in leave_out or value is None or value in ({}, [], ""):
            continue
        said = (words or {}).get(name) or name.replace(".", ": ").replace("_", " ")
        lines.append([said, _setting(name, value)])
    return ["", ""], lines


def _setting(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return _one_of_several(value)
    if isinstance(value, list | tuple):
        more = f", ... ({len(value)} in all)" if len(value) > MOST_PLACES else ""
        return "; ".join(_setting(name, one) for one in value[:MOST_PLACES]) + more
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith("_bytes"):
        return gigabytes(value)
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    said = f"{value:g}" if isinstance(value, float) else str(withheld(name, value))
    return said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"


def _one_of_several(value: Mapping[str, Any]) -> str:
    """`small-llama (load in 4bit, dtype auto)`: its name, then what is set of the rest."""
    rest = [
        key.replace("_", " ") + ("" if one is True else f" {_setting(key, one)}")
        for key, one in value.items()
        if key != "name" and one not in (None, "", False)
    ]
    said = ", ".join(rest)
    if "name" not in value:
        return said
    return _setting("name", value["name"]) + (f" ({said})" if said else "")


def _name(result: Mapping[str, Any], key: str) -> str:
    entry = result["models"].get(key)
    return full_name(entry) if entry else key


def _label(label: str, codes: bool) -> str:
    return icd10.dotted(label) if codes and icd10.is_code(label) else label


def number(value: float | None) -> str:
    if value is None:
        return NONE
    return (
        f"{value:,}" if isinstance(value, int) else f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else digits(value)
    )


def _count(value: float | None) -> str:
    """`3` for 3.0 epochs, and 2.25 for those that ended early."""
    return NONE if value is None else f"{value:.3g}"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-4 else "< 0.0001"
