"""A comparison as it would be recorded, of planted answers: two large models, two small ones, baselines, an ensemble.

Every number that the package works out is worked out by the package on the planted answers, so no key can drift.
"""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
from run_folders import tracker

from nbhelpers import break_even, coding_metrics, costs, routing, verdicts
from nbhelpers.tracking import ExperimentConfig

CODES = (
    *("A084", "A090", "B349", "C50911", "D509", "D649", "E119", "E1165", "E039", "E785", "F329", "F411"),
    *("G43909", "G4733", "H6690", "I10", "I4891", "I2510", "J189", "J45909", "K219", "L209", "M545", "N390"),
)
TRAIN = {code: 1 + number % 3 + (9 if number % 8 == 0 else 0) for number, code in enumerate(CODES)}
A_CODE = 4  # test rows of each code
BYTES = 2**20


def rows(seed: int = 0) -> list[SimpleNamespace]:
    return [SimpleNamespace(id=f"row-{i}", labels=(CODES[i % len(CODES)],)) for i in range(A_CODE * len(CODES))]


def scores(skill: float, seed: int) -> numpy.ndarray:
    """Normalised log-probabilities of a model that tells the gold label by `skill` deviations of its noise."""
    asked = rows()
    noise = numpy.random.default_rng(seed).normal(size=(len(asked), len(CODES)))
    for number, row in enumerate(asked):
        noise[number, CODES.index(row.labels[0])] += skill
    noise *= 1.6
    return (noise - numpy.log(numpy.exp(noise).sum(axis=1, keepdims=True))).astype(numpy.float32)


def lines(skill: float, seed: int, written: bool = True) -> list[dict[str, Any]]:
    """Answers of such a model, ranked and written; a weak one writes no code at all in part of its answers."""
    found = coding_metrics.ranked_lines(rows(), scores(skill, seed), CODES)
    lost = numpy.random.default_rng(seed + 1).random(len(found)) < 0.5 / (1 + skill)
    if written:
        for line, none in zip(found, lost, strict=True):
            line["written"] = None if none else line["ranked"][0]
    return found


# key -> skill, type, status, parameters, bytes of weights, seconds a dialogue
MODELS = {
    "LLM_Llama-3.1-8B-Instruct_untrained": (0.9, "LLM", "untrained", 8_030_000_000, 5200 * BYTES, 0.42),
    "LLM_Mistral-7B-Instruct-v0.3_untrained": (0.6, "LLM", "untrained", 7_250_000_000, 4800 * BYTES, 0.39),
    "SLM_Llama-3.2-3B-Instruct_zero_shot": (0.35, "SLM", "zero_shot", 3_210_000_000, 6100 * BYTES, 0.18),
    "SLM_Qwen2.5-3B-Instruct_zero_shot": (0.2, "SLM", "zero_shot", 3_090_000_000, 5900 * BYTES, 0.17),
    "SLM_Llama-3.2-3B-Instruct_finetuned": (3.1, "SLM", "finetuned", 3_210_000_000, 6100 * BYTES, 0.18),
    "SLM_Qwen2.5-3B-Instruct_finetuned": (2.4, "SLM", "finetuned", 3_090_000_000, 5900 * BYTES, 0.17),
    "BASELINE_majority": (0.0, "BASELINE", "fitted", None, None, None),
    "BASELINE_tfidf_linear": (2.0, "BASELINE", "fitted", None, None, None),
    "BASELINE_nearest": (1.5, "BASELINE", "fitted", None, None, None),
    "ENSEMBLE_Llama-3.1-8B-Instruct_Llama-3.2-3B-Instruct": (3.2, "ENSEMBLE", "fitted", None, None, None),
}
LARGE = [key for key in MODELS if key.startswith("LLM_")]
SMALL = [key for key in MODELS if key.startswith("SLM_")]


def answers() -> dict[str, list[dict[str, Any]]]:
    found = {}
    for number, (key, (skill, kind, *_)) in enumerate(MODELS.items()):
        found[key] = lines(skill, 100 * number, written=kind in ("LLM", "SLM"))
    for line in found["BASELINE_majority"]:
        line["ranked"] = ["E119", *(code for code in line["ranked"] if code != "E119")][:10]
    return found


def entry(key: str, said: list[dict[str, Any]]) -> dict[str, Any]:
    _, kind, status, parameters, weights, seconds = MODELS[key]
    name = "Llama-3.1-8B-Instruct + Llama-3.2-3B-Instruct" if kind == "ENSEMBLE" else key.split("_", 1)[1]
    if kind in ("LLM", "SLM"):
        name = key.split("_")[1]
    latency = None if seconds is None else {"p50": seconds, "p95": 1.4 * seconds, "p99": 1.9 * seconds, "n": 20}
    return {
        "model": name,
        "model_type": kind,
        "model_size": "" if parameters is None else f"{parameters / 1e9:.2f}B parameters",
        "parameters": parameters,
        "training_status": status,
        "precision": None if weights is None else "4bit nf4, compute bfloat16" if kind == "LLM" else "bfloat16",
        "training_metrics": TRAINED if kind == "SLM" and status == "finetuned" else None,
        **coding_metrics.measure(said, kind="icd10", train_counts=TRAIN, resamples=400),
        "performance": None
        if seconds is None
        else {
            "came": "measured",
            "seconds_per_dialogue": seconds,
            "dialogues_per_second": 1 / seconds,
            "prompt_tokens_per_second": 900 / seconds,
            "latency": latency,
        },
        "memory": None
        if weights is None
        else {"weights_bytes": weights, "peak_bytes": weights + 700 * BYTES, "kind": "cuda"},
        "truncated": 2 if kind == "LLM" else 0,
        "facts": [],
        "predictions": f"models/{key}/predictions.jsonl",
    }


TRAINED = {
    "steps": 120,
    "epochs": 3.0,
    "rows": sum(TRAIN.values()),
    "truncated": 0,
    "seconds": 1380.0,
    "tokens_per_second": 2150.0,
    "trainable_parameters": 24_300_000,
    "total_parameters": 3_234_000_000,
    "lora_rank": 16,
    "lora_alpha": 32,
    "learning_rate": 2e-4,
    "train_losses": [[step, 2.5 * 0.98**step] for step in range(1, 121, 10)],
    "validation_nlls": [[step, 1.0 + 0.99**step] for step in range(0, 121, 40)],
    "best_step": 120,
}


def result(**changes: Any) -> dict[str, Any]:
    """What result.json of such a run holds, to be changed at will; changes: parts that differ."""
    return copy.deepcopy(_result()) | changes


@functools.cache
def _result() -> dict[str, Any]:
    said = answers()
    measure = "top_1_accuracy"
    right = {key: coding_metrics.outcomes(of, measure) for key, of in said.items()}
    large, small = _of(right, "LLM_"), {key: right[key] for key in SMALL if key.endswith("_finetuned")}
    zero_shot = {key: right[key] for key in SMALL if key.endswith("_zero_shot")}
    answer = verdicts.decide(large, small, _of(right, "BASELINE_"), zero_shot, measure=measure, resamples=400)
    models = {key: entry(key, of) for key, of in said.items()}
    return {
        "kind": "comparison",
        "experiment": "full",
        "verdict": answer["sentence"],
        "answer": answer,
        "headline": measure,
        "data": {
            "source": "bundled",
            "generated": True,
            "kind": "icd10",
            "labels": len(CODES),
            "chance": 1 / len(CODES),
            "rows": {"train": sum(TRAIN.values()), "validation": len(CODES), "test": len(rows())},
            "split": {"mode": "per_label", "seed": 0, "overlap": {"exact": 0, "near": 0}, "left_out": 3},
            "cleaning": {"rows": 230, "empty": 2, "duplicates": 3, "near_duplicates": 4, "several_labels": 0},
            "frequency": TRAIN,
            "sha256": "ab" * 32,
        },
        "protocol": {
            "sha256": "3f9a1c0d" * 8,
            "system_prompt": "You code doctor-patient dialogues in ICD-10-CM.",
            "shots": 0,
            "labels_listed": 0,
            "answers": ["ranking", "writing"],
            "new_tokens": 16,
        },
        "models": models,
        "paired_tests": verdicts.pairs(right, measure, resamples=200),
        "break_even": break_even_of(right["LLM_Llama-3.1-8B-Instruct_untrained"]),
        "routing": {key: routing_of(key, said) for key in SMALL if key.endswith("_finetuned")},
        "cost": costs.table(
            {key: models[key] for key in (*LARGE, *SMALL)},
            headline=measure,
            device="one GPU",
            price_per_gpu_hour=2.0,
            currency="EUR",
        ),
        "ensemble": None,
        "phases": PHASES,
        "budget": None,
        "facts": FACTS,
        "all_facts_hold": True,
        "notice": "Research software. Its answers may be wrong in any way; it is not for diagnosis or treatment.",
        "text": {"generated": True},
        "run_dir": "runs/comparison",
    }


def _of(right: dict[str, Any], start: str) -> dict[str, Any]:
    return {key: values for key, values in right.items() if key.startswith(start)}


def _phase(name: str, key: str, seconds: float, weights: int | None, **more: Any) -> dict[str, Any]:
    estimated = None if weights is None else {"bytes": int(1.1 * weights), "job": "inference_4bit"}
    return {"name": name, "model": key, "seconds": seconds, "came": "measured", "estimated": estimated} | more


PHASES = [
    _phase("baselines", "BASELINE_tfidf_linear", 4.0, None, memory=None),
    *(
        _phase(phase, key, seconds, MODELS[key][4], estimated_seconds=estimated)
        for phase, key, seconds, estimated in (
            ("llm_evaluation", "LLM_Llama-3.1-8B-Instruct_untrained", 310.0, 280.0),
            ("llm_evaluation", "LLM_Mistral-7B-Instruct-v0.3_untrained", 290.0, 280.0),
            ("slm_zero_shot", "SLM_Llama-3.2-3B-Instruct_zero_shot", 130.0, 150.0),
            ("slm_zero_shot", "SLM_Qwen2.5-3B-Instruct_zero_shot", 120.0, 150.0),
            ("slm_finetuning", "SLM_Llama-3.2-3B-Instruct_finetuned", 1380.0, 1500.0),
            ("slm_finetuning", "SLM_Qwen2.5-3B-Instruct_finetuned", 1290.0, 1500.0),
        )
    ),
    _phase("break_even", "SLM_Llama-3.2-3B-Instruct_on_24", 420.0, None, came="cached"),
]
FACTS = [
    {
        "name": "prompt_prefix",
        "ok": True,
        "says": "the training prefix equals the prompt",
        "saw": "40 rows",
    },
    {"name": "no_overlap", "ok": True, "says": "no row is on both sides of the split", "saw": "0 exact, 0 near"},
]


def without(*starts: str) -> dict[str, Any]:
    """The result of a run that evaluated nothing whose key begins so, and made nothing of it."""
    found = result()
    gone = {key for key in found["models"] if key.startswith(starts)}
    found["models"] = {key: one for key, one in found["models"].items() if key not in gone}
    found["paired_tests"] = [test for test in found["paired_tests"] if not {test["a"], test["b"]} & gone]
    found["phases"] = [phase for phase in found["phases"] if phase["model"] in found["models"]]
    found["answer"] = verdicts.decide({}, {})
    return found | {"break_even": None, "routing": {}, "cost": cost_of(found["models"], found["headline"], None)}


def run(folder: Path, found: dict[str, Any] | None = None, **config: Any) -> Path:
    """A finished run directory with such a result; config: fields that it says besides."""
    large = {"name": "Llama-3.1-8B-Instruct", "load_in_4bit": True}
    fingerprints = {"data": "ab" * 32, "split": "cd" * 32}
    fields = {"name": "comparison", "kind": "comparison", "data": "bundled", "llm_models": [large]} | config
    with tracker(folder, ExperimentConfig(**fields), fingerprints=fingerprints) as at_work:
        at_work.finish(result() if found is None else found)
    return folder


def break_even_of(large: list[bool]) -> dict[str, Any]:
    """A small model that learns from 0, 12, 24, ... labelled dialogues."""
    skills = {0: 0.35, 6: 0.6, 12: 1.0, 24: 1.6, 48: 2.3, 96: 3.1}
    points = [
        (count, coding_metrics.outcomes(lines(skill, 900 + count), "top_1_accuracy")) for count, skill in skills.items()
    ]
    return break_even.curve(points, large, resamples=400)


def routing_of(key: str, said: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Thresholds of as many validation rows as there are test rows, of the same skill."""
    validation = lines(MODELS[key][0], 5000 + list(MODELS).index(key), written=False)
    parts = []
    for of in (validation, said[key]):
        parts += [[line["probability"] for line in of], coding_metrics.outcomes(of, "top_1_accuracy")]
    return routing.curve(*parts)


def cost_of(models: dict[str, Any], measure: str, price: float | None) -> dict[str, Any]:
    asked = {key: models[key] for key in (*LARGE, *SMALL) if key in models}
    return costs.table(asked, headline=measure, device="one GPU", price_per_gpu_hour=price, currency="EUR")
