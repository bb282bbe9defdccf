"""What does an older config or result file say, in the words of today?

Older files name one small model (`slm_name`) and `baseline_llms`; their results have the keys `Baseline_*` and
`Finetuned_SLM`. Nothing is dropped silently: what has no place today is kept as unknown and said in a note, a measure
that an old file does not hold is null. An old file is never written to.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from nbhelpers import records, yaml_files
from nbhelpers.baselines import BASELINES
from nbhelpers.comparison_config import ComparisonConfig
from nbhelpers.errors import one_line

SUFFIX, NOTES_SUFFIX = ".migrated.json", ".migrated.notes.json"
SECTIONS = ("model", "training", "data", "evaluation", "experiment", "paths", "logging")
MODEL_FIELDS = ("size", "description", "load_in_4bit", "load_in_8bit", "dtype")
QUANTISED = ("load_in_4bit", "load_in_8bit")
LLM_KEYS = ("baseline_llms", "baseline_llm_names", "baseline_llm_name", "baseline_llm", "llm_name")
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "half": "float16"}
RENAMED = {  # old key -> field of today
    "dataset_name": "data",
    "dataset": "data",
    "text_column": "dialogue_column",
    "max_sequence_length": "window",
    "max_seq_length": "window",
    "max_new_tokens": "new_tokens",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "lora_r": "lora_rank",
    "experiment_name": "name",
    "price_per_gpu_hour": "price_per_hour",
}
SEEDS = (("experiment", "seed"), ("", "seed"), ("training", "seed"), ("data", "dataset_split_seed"))
RESULT_KEYS = {  # of old results -> (type, status); the model's short name is the last group
    re.compile(r"Baseline_SLM(?:_(.+))?"): ("SLM", "zero_shot"),
    re.compile(r"SLM_zero_?shot(?:_(.+))?"): ("SLM", "zero_shot"),
    re.compile(r"Baseline_LLM_(.+)"): ("LLM", "untrained"),
    re.compile(r"Baseline_(.+)"): ("LLM", "untrained"),
    re.compile(r"Finetuned_SLM(?:_(.+))?"): ("SLM", "finetuned"),
    re.compile(r"Finetuned_(.+)"): ("SLM", "finetuned"),
}
TODAY = re.compile(r"(LLM_.+_(untrained|finetuned)|SLM_.+_(zero_shot|finetuned)|BASELINE_.+|ENSEMBLE_.+)")
SHARES = {  # measure of today -> its names in old files
    "exact_match_accuracy": ("exact_match_accuracy", "exact_match", "accuracy"),
    "category_accuracy": ("category_accuracy", "category_match", "icd_category_accuracy"),
    "chapter_accuracy": ("chapter_accuracy", "chapter_match", "icd_chapter_accuracy"),
    "f1": ("f1", "f1_weighted", "weighted_f1", "f1_score"),
    "macro_f1": ("macro_f1", "f1_macro"),
    **{f"top_{k}_accuracy": (f"top_{k}_accuracy", f"top{k}_accuracy", f"top_{k}", f"top{k}") for k in (1, 3, 5)},
}
OTHERS = {
    "n_samples": ("n_samples", "num_samples", "total_samples"),
    "model_size": ("model_size", "size"),
    "training_metrics": ("training_metrics",),
}
RECALLS = ("recall", "weighted_recall", "recall_weighted")
NAMES = ("model", "model_name", "name")
NOTHING = {  # what results of today hold beside the measures, where an old file says nothing
    **dict.fromkeys(("model_size", "parameters", "precision", "training_metrics", "n_samples", "no_valid_answer")),
    **dict.fromkeys(("by_chapter", "by_frequency", "performance", "memory", "truncated", "predictions")),
}


@dataclass(frozen=True)
class Migrated:
    """kind: what the file was. document: it today. notes: a line for everything that was decided. unknown: what has no
    place today, as it stood."""

    kind: Literal["config", "results"]
    document: dict[str, Any]
    notes: tuple[str, ...]
    unknown: dict[str, Any] = field(default_factory=dict)


def read(path: str | Path) -> Any:
    """What a JSON or YAML file holds; ValueError in one line where it is neither."""
    path = Path(path)
    return yaml_files.read(path) if path.suffix.lower() in (".yaml", ".yml") else records.read_json(path)


def write(path: str | Path, *, slm_name: str | None = None, percent: bool | None = None) -> tuple[Path, Migrated]:
    """Migrate a file into FILE.migrated.json beside it, notes and unknown keys into FILE.migrated.notes.json.

    FileExistsError where one of them is there already.
    """
    path = Path(path)
    found = migrate(read(path), slm_name=slm_name, percent=percent)
    to, notes = (path.with_name(path.name + suffix) for suffix in (SUFFIX, NOTES_SUFFIX))
    for place in (to, notes):
        if place.exists():
            raise FileExistsError(f"'{place}' is there already: move it away, then migrate again")
    records.write_json(to, found.document)
    records.write_json(notes, {"kind": found.kind, "notes": found.notes, "unknown": found.unknown})
    return to, found


def migrate(document: Any, *, slm_name: str | None = None, percent: bool | None = None) -> Migrated:
    """An older config or results in the form of today; what is of today already stays as it is.

    slm_name: of the small model, where results only call it `Finetuned_SLM`. percent: whether shares are 0-100; None
    decides measure by measure, percent where a value of it is above 1, and says so. ValueError for what is neither a
    config nor results.
    """
    if isinstance(document, Mapping):
        results = document.get("results", document)
        if isinstance(results, Mapping) and any(_target(key) for key in results):
            beside = {key: value for key, value in document.items() if key != "results"}
            return _results(results, beside if results is not document else {}, slm_name, percent)
        if _is_config(document):
            return _config(document)
    said = f"the keys {', '.join(map(repr, list(document)[:8]))}" if isinstance(document, Mapping) else "no mapping"
    raise ValueError(
        f"neither an older config nor older results: looked for {LLM_KEYS[0]}, slm_name or llm_models (config) and for "
        f"Baseline_*, Finetuned_* or LLM_*_untrained (results), found {said or 'nothing'}; name the right file"
    )


# configs --------------------------------------------------------------------------------------------------------------


def _is_config(document: Mapping) -> bool:
    wanted = {*LLM_KEYS, "slm_name", "llm_models", "slm_models"}
    return any(key in wanted for _, key, _ in _settings(document))


def _settings(document: Mapping) -> Iterator[tuple[str, str, Any]]:
    """(section or "", key, value) of a config in sections or a flat one."""
    for key, value in document.items():
        if key in SECTIONS and isinstance(value, Mapping):
            yield from ((key, inner, what) for inner, what in value.items())
        else:
            yield "", key, value


def _config(document: Mapping) -> Migrated:
    made: dict[str, Any] = {}
    notes: list[str] = []
    unknown: dict[str, Any] = {}
    left = {(section, key): value for section, key, value in _settings(document)}

    def take(*keys: str) -> Any:
        """The value of the first of these keys, in whatever section; it is then dealt with."""
        places = [place for key in keys for place in left if place[1] == key]
        return left.pop(places[0]) if places else None

    everywhere = {name: take(name) for name in QUANTISED}
    large = [model for key in LLM_KEYS for model in _listed(take(key))]
    shared = {name: take(f"baseline_llm_{name}") for name in MODEL_FIELDS}
    if large:
        made["llm_models"] = [_model(model, shared, unknown, "baseline_llms") for model in large]
        notes.append(f"{len(large)} baseline_llms are llm_models now, whatever their size: move small ones by hand")
    small, own = _listed(take("slm_name")), {name: take(f"slm_{name}") for name in MODEL_FIELDS}
    if small:
        made["slm_models"] = [_model(model, own, unknown, "slm_name") for model in small]
        notes.append("slm_name is a list now, slm_models")
    _training(left, take, made, notes)
    _experiment(take, made, notes)
    _seed(left, made, notes)
    for (section, key), value in left.items():
        name = RENAMED.get(key, key)
        loader = (section, key) == ("data", "batch_size")
        if name in ComparisonConfig.model_fields and name not in made and not loader:
            made[name] = value
            if name != key:
                notes.append(f"{key} is called {name} now")
        else:
            unknown[f"{section}.{key}" if section else key] = value
    _for_every_model(everywhere, made, notes)
    targets = made.pop("lora_target_modules", None)
    for model in made.get("slm_models", []) if targets else ():
        if isinstance(model, dict):
            model.setdefault("lora_targets", targets)
    notes += [f"{key} has no place today and is left out: it was {_short(value)}" for key, value in unknown.items()]
    notes += _checked(made)
    return Migrated("config", made, tuple(notes), unknown)


def _for_every_model(given: Mapping[str, Any], made: dict[str, Any], notes: list[str]) -> None:
    """What stands once beside the models in the old file holds for each that does not say otherwise itself."""
    given = {name: value for name, value in given.items() if value is not None}
    for side in ("llm_models", "slm_models") if given else ():
        models = [{"name": one} if isinstance(one, str) else one for one in _listed(made.get(side))]
        silent = [one for one in models if isinstance(one, dict) and not {*QUANTISED} & {*one}]
        for model in silent:
            model |= given
        if silent:
            made[side] = models
            said = " and ".join(f"{name}: {str(value).lower()}" for name, value in given.items())
            names = ", ".join(str(model.get("name")) for model in silent)
            notes.append(f"{said} stands at each of {side} now that had neither: {names}")


def _checked(made: Mapping[str, Any]) -> Iterator[str]:
    """What a user should look at before this config is run."""
    for side in ("llm_models", "slm_models"):
        for model in made.get(side) or ():
            if isinstance(model, dict) and not {*QUANTISED} & {*model}:
                yield f"{model['name']}: load_in_4bit is not in the old file; today it is then false"
    try:
        ComparisonConfig(**made)
    except ValueError as error:
        yield f"today's config refuses it: {one_line(error)}"


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _model(given: Any, shared: Mapping[str, Any], unknown: dict[str, Any], where: str) -> dict[str, Any]:
    """A model's entry of today from its name or its old entry, completed by what stood beside for all of them."""
    own = {"name": given} if isinstance(given, str) else given
    if not isinstance(own, Mapping) or not isinstance(own.get("name"), str):
        raise ValueError(f"{where} must hold names or entries with a name, got {_short(given)}: correct the old file")
    found = {"name": own["name"]}
    for name in MODEL_FIELDS:
        value = own.get(name, shared[name])
        if value is not None:
            value = str(value).removeprefix("torch.") if name == "dtype" else value
            found[name] = DTYPES.get(value, value) if name == "dtype" else value
    unknown |= {f"{where}[{own['name']}].{key}": own[key] for key in own if key not in (*MODEL_FIELDS, "name")}
    return found


def _training(left: dict, take: Any, made: dict[str, Any], notes: list[str]) -> None:
    a_pass, times = take("per_device_train_batch_size"), take("gradient_accumulation_steps")
    if a_pass is not None:
        made |= {"batch_size": a_pass * (times or 1), "micro_batch_size": a_pass}
        notes.append(f"batch_size is {a_pass} x {times or 1}: today it is the whole batch of an optimizer step")
    elif times is not None:
        left["training", "gradient_accumulation_steps"] = times
    use_lora = take("use_lora")
    if use_lora is not None:
        made["method"] = "lora" if use_lora else "full"
    targets = take("lora_target_modules")
    if targets:
        made["lora_target_modules"] = targets
        notes.append("lora_target_modules stands at each small model now, as lora_targets")


def _experiment(take: Any, made: dict[str, Any], notes: list[str]) -> None:
    runs = {name: take(f"run_{name}") for name in ("baseline_llm", "baseline_slm", "finetuned_slm")}
    if runs["baseline_llm"] is not None or runs["finetuned_slm"] is not None:
        large, small = runs["baseline_llm"] is not False, runs["finetuned_slm"] is not False
        if not large and not small:
            raise ValueError("run_baseline_llm and run_finetuned_slm are both false: nothing would be compared")
        made["experiment"] = "full" if large and small else "baseline" if large else "training"
        notes.append(f"the run_* switches are experiment {made['experiment']!r} now")
    if runs["baseline_slm"] is False:
        notes.append("run_baseline_slm was false: small models are always asked before tuning too")


def _seed(left: dict, made: dict[str, Any], notes: list[str]) -> None:
    given = {place: left.pop(place) for place in SEEDS if place in left}
    if given:
        made["seed"] = next(iter(given.values()))
        if len(set(given.values())) > 1:
            said = ", ".join(f"{'.'.join(filter(None, place))} {value}" for place, value in given.items())
            notes.append(f"there is one seed now, {made['seed']}; the old file had {said}")


# results --------------------------------------------------------------------------------------------------------------


def _target(key: Any) -> tuple[str, str, str | None] | None:
    """(type, status, short name) of a results key; None for what is none."""
    if not isinstance(key, str):
        return None
    if TODAY.fullmatch(key):
        return "today", key, None
    rest = key.removeprefix("Baseline_").lower()
    if key.startswith("Baseline_") and rest in BASELINES:
        return "BASELINE", "fitted", rest
    found = ((kind, pattern.fullmatch(key)) for pattern, kind in RESULT_KEYS.items())
    return next(((*kind, match[1]) for kind, match in found if match), None)


def _results(results: Mapping, beside: Mapping, slm_name: str | None, percent: bool | None) -> Migrated:
    made: dict[str, Any] = {}
    notes: list[str] = []
    unknown = {key: value for key, value in results.items() if not _target(key) or not isinstance(value, Mapping)}
    unknown |= beside
    old = {}
    for key, value in results.items():
        if key in unknown:
            continue
        if _target(key)[0] == "today":
            made[key] = dict(value)
            notes.append(f"{key} is of today already and stays as it is")
        else:
            nested = value.get("metrics")
            old[key] = {**value, **nested} if isinstance(nested, Mapping) else dict(value)
            old[key].pop("metrics", None)
    scales = _scales(old, percent, notes)
    for key, entry in old.items():
        name, found = _entry(key, entry, slm_name, scales, notes)
        if name in made:
            raise ValueError(f"two results are both {name!r} today, one of them {key!r}: take one out of the old file")
        made[name] = found
    notes += [f"{key} is no result of a model and is left out: it was {_short(unknown[key])}" for key in unknown]
    return Migrated("results", made, tuple(notes), unknown)


def _scales(old: Mapping[str, dict], percent: bool | None, notes: list[str]) -> dict[str, float]:
    """What each measure is divided by: 100 where one of its kind is above 1 in this file, or as `percent` says.

    Accuracies are of one kind, F1s of another: 0.68 of exact match beside 31 of chapters is 0.68 percent.
    """
    scales: dict[str, float] = {}
    for f1s in (False, True):
        found: dict[str, list[float]] = {}
        for measure, names in SHARES.items():
            values = [_share(key, name, entry[name]) for key, entry in old.items() for name in names if name in entry]
            if ("f1" in measure) == f1s and (values := [value for value in values if value is not None]):
                found[measure] = values
        if not found:
            continue
        most = max(found, key=lambda measure: max(found[measure]))
        highest = max(found[most])
        if percent is False and highest > 1:
            raise ValueError(f"{most} has a value of {highest}, which is no fraction: migrate with percent")
        scale = 100.0 if percent or (percent is None and highest > 1) else 1.0
        why = "as asked" if percent is not None else f"the largest value is {highest:g}"
        notes.append(f"{', '.join(found)}: read as {'percent, 0-100' if scale > 1 else 'fractions, 0-1'}, {why}")
        scales |= dict.fromkeys(found, scale)
    return scales


def _share(key: str, name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 100:
        raise ValueError(f"{key}.{name} must be a share, 0-1 or 0-100, got {_short(value)}: correct the old file")
    return float(value)


def _entry(
    key: str, entry: dict[str, Any], slm_name: str | None, scales: Mapping[str, float], notes: list[str]
) -> tuple[str, dict[str, Any]]:
    kind, status, short = _target(key)
    named = next((entry[name] for name in NAMES if isinstance(entry.get(name), str)), None)
    model = named or short or (slm_name if kind == "SLM" else None)
    if model is None:
        notes.append(f"{key} does not say which model it is: it is called 'unnamed', migrate with slm_name to name it")
    short = records.slug(short or Path(model or "unnamed").name)
    found: dict[str, Any] = {"model": model, "model_type": kind, "training_status": status} | NOTHING
    used = {name for name in NAMES if isinstance(entry.get(name), str)} | {"model_type", "training_status"}
    for measure, names in SHARES.items():
        given = {name: entry[name] for name in names if entry.get(name) is not None}
        found[measure] = next(iter(given.values())) / scales[measure] if given else None
        used |= {name for name in given if given[name] == next(iter(given.values()))}
        used |= {name for name in names if name in entry and entry[name] is None}
        if len(set(given.values())) > 1:
            notes.append(f"{key}: {measure} was taken from {next(iter(given))}; {', '.join(list(given)[1:])} differs")
    for today, names in OTHERS.items():
        given = [name for name in names if name in entry]
        found[today] = entry[given[0]] if given else None
        used |= set(given[:1])
    if isinstance(entry.get("precision"), str):
        found["precision"] = entry["precision"]
        used.add("precision")
    used |= set(_recall(key, entry, found, notes))
    unknown = {name: value for name, value in entry.items() if name not in used}
    if unknown:
        notes.append(f"{key}: {', '.join(unknown)} have no place today and are kept under 'unknown'")
    found |= {"intervals": {}, "errors": [], "facts": [], "came": "migrated", "unknown": unknown}
    name = f"BASELINE_{short}" if kind == "BASELINE" else f"{kind}_{short}_{status}"
    return name, found


def _recall(key: str, entry: Mapping[str, Any], found: Mapping[str, Any], notes: list[str]) -> Iterator[str]:
    """Names of recalls that are the accuracy once more, which are dropped with a note."""
    for name in RECALLS:
        value, accuracy = entry.get(name), found["exact_match_accuracy"]
        if not isinstance(value, int | float) or accuracy is None:
            continue
        if any(math.isclose(value / scale, accuracy, abs_tol=5e-5) for scale in (1, 100)):
            notes.append(f"{key}: {name} is dropped, weighted recall equals the accuracy")
            yield name
        else:
            notes.append(f"{key}: {name} {value} is not the accuracy, so it is no weighted recall")


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
