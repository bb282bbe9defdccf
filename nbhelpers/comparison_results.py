"""What came out of a comparison? From answers to entries of results.json, the verdict, and its curves."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from nbhelpers import (
    break_even,
    coding_metrics,
    costs,
    ensemble,
    generated,
    label_answers,
    models,
    routing,
    runtime,
    verdicts,
)
from nbhelpers.comparison_answers import VALIDATION_ROWS
from nbhelpers.comparison_data import ComparisonData
from nbhelpers.kept_answers import Answers

NOTICE = (
    "Research software. Nothing here is for diagnosis or treatment: codes and labels come from models, and are wrong "
    "as often as the table says."
)
READ_DOCUMENTS = 3000  # of the bundled models' training text that are searched; a test searches all


def right(answers: Answers, headline: str, part: str = "test") -> list[bool]:
    """Right or not of each document by the comparison's measure."""
    return coding_metrics.outcomes(answers.lines[part], headline)


def is_right(line: Mapping[str, Any], headline: str) -> bool:
    """The same of one line; False while the line lacks what the measure looks at."""
    return bool(coding_metrics.MEASURES[headline](line))


def result(
    on: ComparisonData,
    answered: Mapping[str, Answers],
    phases: Sequence[Mapping[str, Any]],
    curve: Mapping[str, Any] | None = None,
    chosen: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole result of a comparison but its folder; `models` is results.json.

    answered: key of results.json -> answers. curve: points of the break-even curve. chosen: what a budget chose.
    """
    counts = Counter(label for row in on.train for label in row.labels)
    combined = _ensemble(on, answered)
    answers = dict(answered) | ({combined["key"]: combined["answers"]} if combined else {})
    entries = {key: entry(key, one, on, counts) for key, one in answers.items()}
    outcomes = {key: right(one, on.config.headline) for key, one in answers.items()}
    sides = _sides(outcomes)
    options = {"measure": on.config.headline, "seed": on.config.seed}
    verdict = verdicts.decide(sides["large"], sides["small"], sides["baselines"], sides["zero_shot"], **options)
    facts = [fact | {"model": key} for key, one in answers.items() for fact in one.about.get("facts", [])]
    facts += _own_facts(on)
    return {
        "kind": "comparison",
        "experiment": on.config.experiment,
        "verdict": verdict["text"] if on.config.experiment == "full" else _one_side(on, entries),
        "answer": verdict,
        "headline": on.config.headline,
        "data": _data(on, counts),
        "protocol": _protocol(on),
        "models": entries,
        "paired_tests": verdicts.pairs(outcomes, **options),
        "break_even": _break_even(on, curve, sides["large"]),
        "routing": _routing(answered),
        "cost": _costs(on, entries, phases),
        "ensemble": None if combined is None else {k: v for k, v in combined.items() if k != "answers"},
        "phases": list(phases),
        "budget": chosen,
        "facts": facts,
        "all_facts_hold": all(fact["ok"] for fact in facts),
        "notice": NOTICE,
        "text": {
            "source": on.data.source,
            "generated": on.data.generated,
            "sha256": on.data.sha256,
            "test_documents": len(on.test),
        },
    }


def entry(key: str, answers: Answers, on: ComparisonData, counts: Mapping[str, int]) -> dict[str, Any]:
    """One entry of results.json. A measure that does not apply is None, never 0."""
    about = answers.about
    kind, _, rest = key.partition("_")
    model = about.get("model") or {}
    parameters = about.get("parameters")
    status = "fitted" if kind in ("BASELINE", "ENSEMBLE") else rest.rpartition("_")[2]
    return {
        "model": model.get("name", rest),
        "model_type": kind,
        "model_size": model.get("size") or (None if parameters is None else _size(parameters)),
        "description": model.get("description") or None,
        "parameters": parameters,
        "training_status": {"shot": "zero_shot"}.get(status, status),
        "precision": about.get("precision"),
        "training_metrics": about.get("training"),
        **coding_metrics.measure(answers.lines["test"], kind=on.data.kind, train_counts=counts, seed=on.config.seed),
        "performance": _performance(about.get("performance"), on.config.headline),
        "memory": about.get("memory"),
        "truncated": about.get("truncated", {}).get("test"),
        "facts": about.get("facts", []),
        "fitted": about.get("info"),
        "model_dir": about.get("model_dir"),
        "predictions": None if kind == "ENSEMBLE" else f"models/{key}/predictions.jsonl",
    }


def _size(parameters: int) -> str:
    for unit, word in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{word} parameters"
    return f"{parameters} parameters"


def _performance(found: Mapping[str, Any] | None, headline: str) -> dict[str, Any] | None:
    """Speed of what the headline measures, None where it is not known, beside that of each kind of answer."""
    if not found or not (found["kinds"] or found.get("latency")):
        return None
    first = "writing" if headline == "exact_match_accuracy" else "ranking"
    speed = found["kinds"].get(first) or label_answers.NOT_TIMED
    came = {name: found.get(name) for name in ("came", "device", "latency")}
    return {**speed, **came, "kinds": found["kinds"]}


def _sides(outcomes: Mapping[str, Sequence[bool]]) -> dict[str, dict[str, Sequence[bool]]]:
    def those(start: str, end: str = "") -> dict[str, Sequence[bool]]:
        return {key: one for key, one in outcomes.items() if key.startswith(start) and key.endswith(end)}

    return {
        "large": those("LLM_", "_untrained"),
        "small": those("SLM_", "_finetuned"),
        "zero_shot": those("SLM_", "_zero_shot"),
        "baselines": those("BASELINE_"),
    }


def _one_side(on: ComparisonData, entries: Mapping[str, Mapping[str, Any]]) -> str:
    """One sentence where only one side was evaluated, so that there is nothing to decide."""
    side = {"baseline": "LLM", "training": "SLM"}[on.config.experiment]
    keys = [key for key in entries if key.startswith(side)]
    key = max(keys, key=lambda key: entries[key][on.config.headline])
    found = entries[key]
    bounds = found["intervals"][on.config.headline]
    return (
        f"{verdicts.name(key)} is right on {found[on.config.headline]:.1%} of {found['n_samples']} documents "
        f"[{bounds['low']:.1%}, {bounds['high']:.1%}]; the other side was not evaluated, so nothing is decided."
    )


def _data(on: ComparisonData, counts: Mapping[str, int]) -> dict[str, Any]:
    data = on.data
    return {
        "source": data.source,
        "generated": data.generated,
        "kind": data.kind,
        "labels": len(data.labels),
        "label_list": list(data.labels) if len(data.labels) <= 100 else None,
        "rows": {"train": len(on.train), "validation": len(on.validation), "test": len(on.test)},
        "split": on.split.record,
        "cleaning": data.cleaning,
        "chance": sum(len(row.labels) for row in on.test) / len(on.test) / len(data.labels),
        "frequency": dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))),
        "sha256": data.sha256,
    }


def _protocol(on: ComparisonData) -> dict[str, Any]:
    return {
        **on.wording().record(),
        "answers": list(on.kinds),
        "new_tokens": on.config.new_tokens,
        "split": "test",
        "rows": len(on.test),
        "device": (on.config.device or runtime.device()).split(":")[0],
        "ranking": "sum of log-probabilities of the label's tokens and the end token, over the whole label set",
    }


# Curves ---------------------------------------------------------------------------------------------------------------


def _break_even(
    on: ComparisonData, curve: Mapping[str, Any] | None, large: Mapping[str, Sequence[bool]]
) -> dict[str, Any] | None:
    if curve is None or not large:
        return None
    line = verdicts.best(large)
    found = break_even.curve(curve["points"], large[line], seed=on.config.seed)
    found = break_even.with_uncounted(found, min(len(on.validation), VALIDATION_ROWS), len(on.shots))
    return {"model": curve["model"], "small": curve["key"], "large_key": line} | found


def _routing(answered: Mapping[str, Answers]) -> dict[str, Any]:
    """Accept or route, for each tuned model: thresholds from validation, judged on the test."""
    found = {}
    for key, answers in answered.items():
        if key.endswith("_finetuned") and answers.scores.get("test") is not None:
            parts = []
            for part in ("validation", "test"):
                lines = answers.lines[part]
                parts += [[line["probability"] for line in lines], right(answers, "top_1_accuracy", part)]
            found[key] = routing.curve(*parts)
    return found


def _costs(
    on: ComparisonData, entries: Mapping[str, Mapping[str, Any]], phases: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    own = {key: one for key, one in entries.items() if one["model_type"] in ("LLM", "SLM")}
    return costs.table(
        own,
        headline=on.config.headline,
        device=runtime.device_name(on.config.device or runtime.device()),
        price_per_gpu_hour=on.config.price_per_hour,
        phases=phases,
    )


def _ensemble(on: ComparisonData, answered: Mapping[str, Answers]) -> dict[str, Any] | None:
    """The best of each side on validation, their label scores weighted together on validation, answering the test."""
    if not on.config.ensemble:
        return None
    best = []
    for side, ending in (("LLM_", "_untrained"), ("SLM_", "_finetuned")):
        keys = [key for key in answered if key.startswith(side) and key.endswith(ending)]
        best.append(max(keys, key=lambda key: sum(right(answered[key], on.config.headline, "validation"))))
    large, small = (answered[key] for key in best)
    labels = list(on.data.labels)
    gold = [[labels.index(label) for label in row.labels if label in labels] for row in on.validation]
    weights = ensemble.grid(large.scores["validation"], small.scores["validation"], gold)
    weight = ensemble.choose(large.scores["validation"], small.scores["validation"], gold)
    scores = ensemble.combine(large.scores["test"], small.scores["test"], weight)
    lines = coding_metrics.ranked_lines(on.test, scores, labels)  # it ranks; it writes nothing
    short = [key.partition("_")[2].rpartition("_")[0] for key in best]
    return {
        "key": f"ENSEMBLE_{short[0]}_{short[1]}",
        "large": best[0],
        "small": best[1],
        "weight": weight,
        "validation": weights,
        "sentence": (
            f"Together, {verdicts.name(best[0])} counts {weight:.0%} and {verdicts.name(best[1])} {1 - weight:.0%}, "
            f"chosen on {len(on.validation)} validation dialogues."
        ),
        "answers": Answers(
            {"test": lines}, {"test": scores}, {"info": {"weight": weight}, "model": {"name": " + ".join(short)}}
        ),
    }


def _own_facts(on: ComparisonData) -> list[dict[str, Any]]:
    """What must hold of the comparison as a whole: nothing tested was taught, nor read by a large model before."""
    taught = {row.text for row in (*on.train, *on.validation)}
    groups = {row.group for row in (*on.train, *on.validation)}
    same = sum(row.text in taught for row in on.test)
    near = sum(row.group in groups for row in on.test)
    facts = [
        {
            "name": "test_is_unseen",
            "ok": same == near == 0,
            "says": "no test dialogue, nor one nearly the same, stands in the training or validation part",
            "saw": f"{same} equal and {near} nearly equal of {len(on.test)}",
            "values": {"equal": same, "near": near},
        }
    ]
    large = [model.name for model in on.config.sides["LLM"]]
    if large and all(models.locate(name)[0] == "bundled" for name in large):
        facts.append(_not_read_before(on))
    return facts


def _not_read_before(on: ComparisonData) -> dict[str, Any]:
    """Of bundled models the training text is known: does a part of it share eight words in a row with the test?"""
    ours = set().union(*(_eight_words(row.text) for row in on.test))
    texts = generated.documents(READ_DOCUMENTS, generated.MODEL_SEED)
    shared = sum(bool(_eight_words(text) & ours) for text in texts)
    return {
        "name": "large_models_have_not_read_it",
        "ok": shared == 0,
        "says": "no eight words in a row of a test dialogue stand in the text that the large models were trained on",
        "saw": f"in {shared} of its first {len(texts):,} documents",
        "values": {"documents": len(texts), "shared": shared},
    }


def _eight_words(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[at : at + 8]) for at in range(len(words) - 7)}
