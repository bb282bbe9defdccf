"""What must whoever gets a tuned model know about it? A model card in the hub's format, filled from the run's record.

Nothing in it is made up: a value that the record does not hold is said to be not known, a measure that was not taken to
be not measured. No text of a dialogue stands in it, so a prompt with solved dialogues in it is not copied.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from nbhelpers import adapters, catalogue, models, records, verdicts
from nbhelpers.registry import unknown

NAME = "README.md"
DIALOGUE = "{dialogue}"  # stands in the prompt where the dialogue goes
NOT_KNOWN, NOT_MEASURED = "not known", "not measured"
NOTICE = (
    "Research software, not for diagnosis. Nothing here is medical advice, and no answer of this model may be acted on "
    "without a person who is qualified to judge it."
)
METRICS = {  # measure of the record -> the hub's type of metric
    "top_1_accuracy": "accuracy",
    "top_3_accuracy": "accuracy",
    "top_5_accuracy": "accuracy",
    "exact_match_accuracy": "exact_match",
    "category_accuracy": "accuracy",
    "chapter_accuracy": "accuracy",
    "f1": "f1",
    "macro_f1": "f1",
}
TASKS = {"icd10": "ICD-10-CM code of a doctor-patient dialogue", "labels": "label of a dialogue"}
LIBRARIES = ("torch", "transformers", "peft", "nbhelpers")


def write(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    key: str,
    folder: Path,
    *,
    prompt: str,
    new_tokens: int,
    special_tokens: bool = True,
    end: int | None = None,
) -> Path:
    """Write README.md beside the saved model of `key`, and return its path.

    prompt: the whole prompt as a text with {dialogue} where the dialogue goes, `Prompts.text("{dialogue}")`.
    new_tokens: most tokens that an answer was given, `Prompts.room`. special_tokens: whether the prompt is the plain
    form, which the tokenizer begins with its own and whose answer ends with its line (not where a chat template has
    written them). end: the token that ends an answer. LookupError for an unknown key; ValueError for a model that was
    not tuned, a prompt without {dialogue} and a folder without a model.
    """
    how = {"prompt": prompt, "new_tokens": new_tokens, "special_tokens": special_tokens, "end": end}
    card = text(result, manifest, key, Path(folder), **how)
    path = Path(folder) / NAME
    records.write_atomic(path, card)
    return path


def text(
    result: Mapping[str, Any],
    manifest: Mapping[str, Any],
    key: str,
    folder: Path,
    *,
    prompt: str,
    new_tokens: int,
    special_tokens: bool = True,
    end: int | None = None,
) -> str:
    """The card as a text; see `write`."""
    if key not in result["models"]:
        raise LookupError(unknown("model of this run", key, result["models"]))
    entry = result["models"][key]
    if entry["training_status"] != "finetuned":
        raise ValueError(f"{key!r} was not fine-tuned ({entry['training_status']}): hand over a tuned model")
    if DIALOGUE not in prompt:
        raise ValueError(f"prompt must hold {DIALOGUE} where the dialogue goes, got {len(prompt)} characters without")
    adapted = (folder / adapters.CONFIG).is_file()
    if not adapted and not (folder / "config.json").is_file():
        raise ValueError(f"{folder.name!r} holds no saved model (no config.json): save the tuned model there first")
    base = base_model(manifest, entry, key)
    front = front_matter(result, key, base, adapted)
    parts = [
        f"# {_plain(verdicts.name(key))}",
        f"> {NOTICE}",
        *(["> **Made with generated data**: these numbers say nothing about real dialogues."] * _generated(result)),
        *_what(result, entry, base, adapted),
        *_trained(entry),
        *_data(result, manifest),
        *_results(result, key),
        *_use(result, prompt, new_tokens, special_tokens, end, adapted),
        *_limits(result, manifest, key, base),
    ]
    header = yaml.safe_dump(front, sort_keys=False, allow_unicode=True, default_flow_style=False, width=1000)
    return f"---\n{header}---\n\n" + "\n\n".join(parts) + "\n"


def base_model(manifest: Mapping[str, Any], entry: Mapping[str, Any], key: str) -> str:
    """The name of the model that was tuned, as the run's config names it; a local folder by its last part alone."""
    config = manifest.get("config") or {}
    named = [
        model["name"] if isinstance(model, Mapping) else str(model)
        for side in ("slm_models", "llm_models")
        for model in config.get(side) or ()
    ]
    name = entry["model"]
    if name not in named:  # older results hold the short name alone
        short = key.split("_", 1)[1].removesuffix("_finetuned")
        name = next((one for one in named if records.slug(Path(one.rstrip("/")).name) == short), name)
    return name if _is_hub_id(name) or name in models.bundled_names() else Path(name).name


def front_matter(result: Mapping[str, Any], key: str, base: str, adapted: bool = False) -> dict[str, Any]:
    """The card's YAML: licence, base model, tags and the measures as the hub reads them."""
    entry, data = result["models"][key], result["data"]
    found: dict[str, Any] = {"library_name": "peft" if adapted else "transformers", "pipeline_tag": "text-generation"}
    known = catalogue.known(base)
    licence = _licence(base)
    simple = licence is not None and re.fullmatch(r"[a-z0-9.-]+", licence)
    found["license"] = "unknown" if licence is None else licence if simple else "other"
    if found["license"] == "other":
        found["license_name"] = licence
    if known is not None or _is_hub_id(base):
        found["base_model"] = known.hub_id if known else base
    if _is_hub_id(data["source"]):
        found["datasets"] = [data["source"]]
    tags = ["nbhelpers", "icd-10-cm" if data["kind"] == "icd10" else "text-classification", "not-for-diagnosis"]
    found["tags"] = tags + ["generated-data"] * _generated(result)
    measures = [
        {"type": kind, "name": name, "value": entry[name]}
        for name, kind in METRICS.items()
        if entry.get(name) is not None
    ]
    source = _source(data["source"])
    tested = {
        "task": {"type": "text-classification", "name": TASKS[data["kind"]]},
        "dataset": {"type": source, "name": source, "split": "test"},
        "metrics": measures,
    }
    found["model-index"] = [{"name": key, "results": [tested] if measures else []}]
    return found


# sections -------------------------------------------------------------------------------------------------------------


def _what(result: Mapping[str, Any], entry: Mapping[str, Any], base: str, adapted: bool) -> list[str]:
    kind, licence = result["data"]["kind"], _licence(base)
    whole = "adapters, which belong on the base model" if adapted else "a whole model, for plain transformers"
    lines = [
        f"- Task: {TASKS[kind]}, one of {_known(result['data'].get('labels'))} labels.",
        f"- Base model: {_code(base)}{' (comes with nbhelpers)' if base in models.bundled_names() else ''}.",
        f"- Size: {_known(entry.get('parameters'), ',')} parameters; this folder holds {whole}.",
        f"- Precision when measured: {_known(entry.get('precision'))}.",
        f"- Licence of the base model: {_known(licence)}. What may be done with these weights follows from it.",
    ]
    return ["## What it is", "\n".join(lines)]


def _trained(entry: Mapping[str, Any]) -> list[str]:
    how = entry.get("training_metrics") or {}
    share = None
    if how.get("trainable_parameters") is not None and how.get("total_parameters"):
        share = how["trainable_parameters"] / how["total_parameters"]
    last = [how[curve][-1] if how.get(curve) else None for curve in ("train_losses", "validation_nlls")]
    rows = {
        "method": how.get("method") or ("lora" if how.get("lora_rank") else None),
        "training rows": how.get("rows"),
        "training dialogues that were cut": how.get("truncated"),
        "optimizer steps": how.get("steps"),
        "epochs": how.get("epochs"),
        "learning rate (peak)": how.get("learning_rate"),
        "LoRA rank": how.get("lora_rank"),
        "LoRA alpha": how.get("lora_alpha"),
        "trained parameters": how.get("trainable_parameters"),
        "share of all parameters": None if share is None else f"{share:.2%}",
        "last training loss (nats a token)": last[0] and last[0][1],
        "last validation loss (nats a token)": last[1] and last[1][1],
        "step whose weights these are": how.get("best_step"),
        "seconds": how.get("seconds"),
        "tokens a second": how.get("tokens_per_second"),
    }
    table = ["| | |", "|---|---|", *(f"| {name} | {_known(value)} |" for name, value in rows.items())]
    return ["## How it was trained", "The loss was on the answer and the end token alone.", "\n".join(table)]


def _data(result: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    data = result["data"]
    rows, split = data.get("rows") or {}, data.get("split") or {}
    overlap = split.get("overlap") or {}
    both = f"{_known(overlap.get('exact'))} equal, {_known(overlap.get('near'))} nearly equal"
    lines = [
        f"- Source: {_code(_source(data['source']))}{', generated by a program' if _generated(result) else ''}.",
        f"- sha256 of the data: {_known((manifest.get('fingerprints') or {}).get('data'))}.",
        *(f"- {part} rows: {_known(rows.get(part))}." for part in ("train", "validation", "test")),
        f"- Split: {_known(split.get('mode'))}, seed {_known(split.get('seed'))}; rows on both sides: {both}.",
    ]
    return ["## Data", "\n".join(lines), "No dialogue is stored in this folder."]


def _results(result: Mapping[str, Any], key: str) -> list[str]:
    measure, found = result["headline"], result["models"]
    columns = [measure, *(name for name in ("exact_match_accuracy", "top_3_accuracy", "macro_f1") if name != measure)]
    order = {"SLM": 1, "LLM": 2, "BASELINE": 3}
    keys = sorted(found, key=lambda name: (name != key, order.get(found[name]["model_type"], 4)))
    head = ["model", "precision", "n", *columns, "seconds a dialogue"]
    table = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    for name in keys:
        entry = found[name]
        title = _cell(verdicts.name(name))
        performance = entry.get("performance") or {}
        cells = [f"**{title}**" if name == key else title, _cell(entry.get("precision") or "-"), entry["n_samples"]]
        cells += [_with_interval(entry, column) for column in columns]
        cells.append(_number(performance.get("seconds_per_dialogue")))
        table.append(f"| {' | '.join(map(str, cells))} |")
    said = [f"Verdict of the run: {_plain(result['verdict'])}"] if result.get("verdict") else []
    paired = _paired(result, key)
    note = f"Brackets are 95 % intervals over test documents. Models are compared by {measure}."
    return ["## Results", note, "\n".join(table), *said, *([paired] if paired else [])]


def _paired(result: Mapping[str, Any], key: str) -> str:
    lines = []
    for test in result.get("paired_tests") or ():
        if key not in (test["a"], test["b"]):
            continue
        other, sign = (test["b"], 1) if test["a"] == key else (test["a"], -1)
        gap = test["difference"]
        ends = sorted(sign * gap[end] for end in ("low", "high") if gap.get(end) is not None)
        interval = f" [{ends[0]:+.3f}, {ends[1]:+.3f}]" if len(ends) == 2 else ""
        lines.append(
            f"- against {_plain(verdicts.name(other))}: {sign * gap['mean']:+.3f}{interval}, corrected p "
            f"{_number(test.get('holm_p'))}"
        )
    return "Differences on the same test documents:\n\n" + "\n".join(lines) if lines else ""


def _use(
    result: Mapping[str, Any], prompt: str, new_tokens: int, special_tokens: bool, end: int | None, adapted: bool
) -> list[str]:
    shots = (result.get("protocol") or {}).get("shots") or 0
    if shots:
        told = (
            f"The prompt that it was trained and measured with holds {shots} solved dialogues, which are not copied "
            "here. Build it with `nbhelpers.prompts` from the run's config and data; with another prompt the numbers "
            "above do not hold."
        )
        return ["## How to use it", told]
    if adapted:
        load = [
            "from nbhelpers import models",
            "",
            "loaded = models.load_model('.')  # the folder of this file: the base model with these adapters",
            "model, tokenizer = loaded.model, loaded.tokenizer",
        ]
    else:
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            "folder = '.'  # the folder of this file",
            "tokenizer = AutoTokenizer.from_pretrained(folder)",
            "model = AutoModelForCausalLM.from_pretrained(folder).eval()",
        ]
    stop = "" if end is None else f", eos_token_id={int(end)}"
    line = ".split('\\n')[0]" if special_tokens else ""
    code = [
        *load,
        f"prompt = {prompt!r}",
        "dialogue = 'Doctor: ...\\nPatient: ...'",
        f"asked = prompt.replace({DIALOGUE!r}, dialogue.strip())",
        f"inputs = tokenizer(asked, return_tensors='pt', add_special_tokens={bool(special_tokens)})",
        f"written = model.generate(**inputs, max_new_tokens={int(new_tokens)}, do_sample=False{stop})",
        "answer = tokenizer.decode(written[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True)",
        f"print(answer{line}.strip())",
    ]
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", prompt)), default=0))
    told = "It was trained and measured with this prompt; with another one the numbers above do not hold."
    return ["## How to use it", told, "\n".join([f"{fence}python", *code, fence])]


def _limits(result: Mapping[str, Any], manifest: Mapping[str, Any], key: str, base: str) -> list[str]:
    entry = result["models"][key]
    tuned = [other for other in result["models"].values() if other["training_status"] == "finetuned"]
    tuned = sum(other["model_type"] == entry["model_type"] for other in tuned)
    libs = (manifest.get("environment") or {}).get("libs") or {}
    versions = ", ".join(f"{name} {libs[name]}" for name in LIBRARIES if name in libs) or NOT_KNOWN
    facts = {True: "all held", False: "some FAILED"}.get(result.get("all_facts_hold"), NOT_KNOWN)
    invalid, run = _known(entry.get("no_valid_answer")), _known(manifest.get("run_id"))
    before = f"What {_code(base)} was trained on before, and language, region and time of the dialogues"
    lines = [
        f"- It knows {_known(result['data'].get('labels'))} labels and cannot give another one reliably.",
        f"- Written answers without a valid label: {invalid} of {entry['n_samples']} test dialogues.",
        f"- Prompts that were cut because they were too long: {_known(entry.get('truncated'))}.",
        f"- Models of its kind tuned and tested in this run: {tuned}. The best of several is a little too good.",
        f"- {before}: {NOT_KNOWN} to this card.",
        f"- Facts checked while it ran: {facts}.",
        f"- Run {run}, config sha256 {_known(manifest.get('config_sha256'))}; versions: {versions}.",
    ]
    return ["## Limits", "\n".join(lines), NOTICE]


# values ---------------------------------------------------------------------------------------------------------------


def _generated(result: Mapping[str, Any]) -> bool:
    return bool(result["data"].get("generated") or (result.get("text") or {}).get("generated"))


def _licence(base: str) -> str | None:
    known = catalogue.known(base)
    return known.licence if known else "mit" if base in models.bundled_names() else None


def _is_hub_id(name: str) -> bool:
    """owner/name, and no file or folder on this machine."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).exists() and not _is_file(name)


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() in (".csv", ".xlsx", ".json", ".jsonl", ".parquet")


def _source(source: str) -> str:
    """Where data came from, without the folders of this machine."""
    return source if _is_hub_id(source) else Path(source).name


def _known(value: Any, form: str = "") -> str:
    if value is None:
        return NOT_KNOWN
    return format(value, form) if form else _cell(f"{value:.4g}" if isinstance(value, float) else str(value))


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3g}"


def _with_interval(entry: Mapping[str, Any], measure: str) -> str:
    value = entry.get(measure)
    if value is None:
        return NOT_MEASURED
    interval = (entry.get("intervals") or {}).get(measure) or {}
    low, high = interval.get("low"), interval.get("high")
    return f"{value:.3f}" if low is None or high is None else f"{value:.3f} [{low:.3f}, {high:.3f}]"


def _plain(said: str) -> str:
    """A text on one line that is neither markup nor HTML, whatever a user called his model."""
    return re.sub(r"([\\`*_\[\]<>|#!])", r"\\\1", " ".join(said.split()))


_cell = _plain


def _code(name: str) -> str:
    return f"`{' '.join(name.replace('`', '').split())}`"
