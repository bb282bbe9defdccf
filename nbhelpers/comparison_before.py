"""What would a comparison take? Its rows and their parts, each model's memory, download, licence and gate, the time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

from jinja2 import Environment

from nbhelpers import (
    budget,
    catalogue,
    comparison_live,
    dialogues,
    durations,
    estimates,
    label_split,
    memory,
    models,
    prompts,
    runtime,
    verdicts,
)
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig
from nbhelpers.dialogues import Dialogues
from nbhelpers.label_split import Split

LISTED = 12  # labels that are named
FEW = 50  # dialogues whose length stands for all
LETTERS = 4  # a token, of models whose tokenizer is not here
LABEL_TOKENS = 5
CPU_WIDTH = 256  # from here on a CPU is about as fast, and wider layers take long to measure
TUNED = 4  # so many times as long as one that is asked alone, where nothing is known
_templates = Environment(autoescape=True)
BEFORE = _templates.from_string(
    '<div class="nbh-tiles">{% for number, what in tiles %}<div><b>{{ number }}</b>{{ what }}</div>{% endfor %}</div>'
    '<span class="nbh-note">{{ text }}</span>'
)
NEEDS = _templates.from_string(
    '<div class="nbh-section">What the models take</div><table class="nbh-fits">{% for row in rows %}<tr>'
    '<td>{{ row.name }} <span class="nbh-note">{{ row.job }}</span></td><td class="nbh-need">{{ row.needs }}</td>'
    '<td class="{{ "nbh-ok" if row.fits else "nbh-bad" }}">{{ row.verdict }}</td></tr>'
    '<tr><td colspan="3"><div class="nbh-bar {{ "" if row.fits else "nbh-over" }}"><i style="width:{{ row.percent }}%">'
    '</i></div><span class="nbh-note">{{ row.about }}</span></td></tr>{% endfor %}</table>'
    '<span class="nbh-note">of {{ free }} free {{ where }}, estimated, one model at a time</span>'
)
CATALOGUE = _templates.from_string(
    '<details class="nbh-details"><summary>Models that can be named</summary><div class="nbh-wide">'
    '<table class="nbh-runs"><tr><th>name</th><th class="nbh-right">answers</th><th class="nbh-right">in 4 bits</th>'
    '<th class="nbh-right">download</th><th>licence</th><th>gate</th></tr>{% for row in rows %}<tr><td>{{ row.name }}'
    '</td><td class="nbh-right">{{ row.needs }}</td><td class="nbh-right">{{ row.four }}</td>'
    '<td class="nbh-right">{{ row.download }}</td><td>{{ row.licence }}</td><td>{{ row.gate }}</td></tr>{% endfor %}'
    '</table></div><span class="nbh-note">memory estimated for 2,048 tokens; any other hub id or folder too</span>'
    "</details>"
)


# the data -------------------------------------------------------------------------------------------------------------


def is_here(source: str) -> bool:
    """Whether the rows can be looked at without the hub."""
    return source == dialogues.BUNDLED or Path(source).expanduser().is_file()


def look_at(config: ComparisonConfig) -> tuple[Dialogues, Split]:
    """The rows that a comparison would take and their parts. ValueError or LookupError for what is wrong with them."""
    place = Path(config.data).expanduser()
    mark = 0.0 if config.data == dialogues.BUNDLED else place.stat().st_mtime
    listed = Path(config.labels).expanduser().stat().st_mtime if config.labels else 0.0
    columns = (config.dialogue_column, config.label_column)
    data = _rows(config.data, *columns, config.label_kind, config.several, config.labels, mark, listed)
    return data, label_split.split(data, seed=config.seed, mode=config.split, limit_test=config.max_eval_samples)


@lru_cache(maxsize=2)
def _rows(
    source: str, dialogue: str | None, label: str | None, kind: str, several: str, labels: str | None, *_marks: float
) -> Dialogues:
    columns = {"dialogue_column": dialogue, "label_column": label}
    return dialogues.read(source, **columns, kind=kind, several=several, labels=labels)


def tiles(data: Dialogues, split: Split, config: ComparisonConfig) -> list[tuple[str, str]]:
    """(number, what it counts) of the data."""
    train = min(len(split.train), config.max_train_samples or len(split.train))
    told = detectable(len(split.test), config.pairs)
    return [
        (f"{len(data.rows):,}", "dialogues"),
        (f"{len(data.labels):,}", "codes" if data.kind == "icd10" else "labels"),
        (f"{train:,}", "to tune on"),
        (f"{len(split.validation):,}", "to choose by"),
        (f"{len(split.test):,}", "to test on"),
        *([(f"{100 * told:.0f} points", "smallest difference told")] if told is not None else []),
    ]


def detectable(rows: int, pairs: int = 1) -> float | None:
    """Smallest difference in accuracy that so many test rows tell, where two models are right independently.

    pairs: of a large and a small model, over which the verdict corrects its tests.
    """
    return verdicts.detectable_difference(rows, budget.DISCORDANT, level=verdicts.LEVEL / pairs)


def remarks(data: Dialogues, split: Split, config: ComparisonConfig) -> list[str]:
    """What the numbers do not say by themselves."""
    named = ", ".join(prompts.written(label, data.kind) for label in data.labels[:LISTED])
    said = [f"{named}, ..." if len(data.labels) > LISTED else f"{named}."]
    said += [f"{line[:1].upper()}{line[1:]}." for line in data.cleaning.get("says", ())]
    if detectable(len(split.test), config.pairs) is None:
        said.append(f"{len(split.test)} test dialogues can tell no difference: take more.")
    return said


# the models -----------------------------------------------------------------------------------------------------------


def needs(config: ComparisonConfig) -> list[dict[str, Any]]:
    """What each model would take: bytes of its heaviest job, download, licence and gate; None where not known here."""
    free, wide = memory.available_bytes(), (config.device or runtime.device()) == "cpu"
    chosen = [(model, "answers") for model in config.llm_models if config.experiment != "training"]
    tuned = [*config.slm_models] if config.experiment != "baseline" else []
    if config.fine_tune_llms:
        chosen = [(model, "answers, tuning") for model, _ in chosen]
    rows = []
    for model, job in [*chosen, *((model, "answers, tuning") for model in tuned)]:
        entry, shape = catalogue.known(model.name), _shape(model.name)
        need = None
        if shape is not None:
            window = config.window or min(_positions(model.name) or 2048, 2048)
            kind, at_once = _job(config, model, "tuning" in job), config.micro_batch_size or config.batch_size
            tokens = window * (at_once if "tuning" in job else 1)
            rank, size = model.lora_rank or config.lora_rank, 4 if wide else 2
            need = estimates.required_bytes(shape, kind, tokens=tokens, rank=rank, weight_bytes=size)
        hub = models.locate(model.name)[0] == "hub"
        rows.append(
            {
                "name": model.name,
                "job": job + (", 4 bits" if model.load_in_4bit else ", 8 bits" if model.load_in_8bit else ""),
                "parameters": None if shape is None else shape.parameters,
                "bytes": None if need is None else need.total,
                "sum": "" if need is None else need.text,
                "fits": need is not None and need.total <= free,
                "free": free,
                "download": _download(model.name, entry) if hub else 0,
                "licence": entry.licence
                if entry
                else ("not known here" if hub else "its own" if _is_folder(model.name) else "mit"),
                "gated": entry.gated if entry else (None if hub else False),
            }
        )
    return rows


def _is_folder(name: str) -> bool:
    return models.locate(name)[0] == "folder"


def _job(config: ComparisonConfig, model: ModelInstanceConfig, tuned: bool) -> str:
    if tuned:
        method = "qlora" if model.load_in_4bit else config.method
        return {"full": "full_finetuning"}.get(method, method)
    return f"inference_{model.quantization or '16bit'}"


@lru_cache(maxsize=64)
def _shape(name: str) -> estimates.Shape | None:
    """A model counted without its weights; None for one on the hub that the catalogue does not have."""
    if models.locate(name)[0] != "hub":
        return estimates.shape_of(models.load_config(name))
    entry = catalogue.known(name)
    return None if entry is None else entry.shape


@lru_cache(maxsize=64)
def _positions(name: str) -> int | None:
    if models.locate(name)[0] != "hub":
        return models.max_positions(models.load_config(name))
    entry = catalogue.known(name)
    return None if entry is None else models.max_positions(SimpleNamespace(**entry.config))


def _download(name: str, entry: catalogue.Entry | None) -> int | None:
    """Bytes to fetch; 0 where it lies in the hub's cache; None where that is not known."""
    if models.hub_commit(name) is not None:
        return 0
    return None if entry is None else entry.download_bytes


def gated(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Chosen models that ask for consent on their hub page, and are not here yet."""
    return [row["name"] for row in rows if row["gated"] and row["download"] != 0]


# the time -------------------------------------------------------------------------------------------------------------


def expected_seconds(config: ComparisonConfig, data: Dialogues, split: Split) -> dict[str, float]:
    """Seconds of each model and state by its key, at the speed measured on this device: a start to plan from.

    LookupError where a model's size is not known here.
    """
    train = min(len(split.train), config.max_train_samples or len(split.train))
    found = {}
    for key, entry in comparison_live.planned(config).items():
        if entry["model_type"] == "BASELINE":
            found[key] = 0.1
            continue
        pace = _Pace(config, entry["model"], data)
        tuned = entry["training_status"] == "finetuned"
        choosing = tuned or (config.ensemble and entry["model_type"] == "LLM")
        rows = len(split.test) + choosing * len(split.validation)
        found[key] = pace.loading + rows * pace.answer + min(config.latency_requests, len(split.test)) * pace.alone
        found[key] += tuned * (pace.loading + pace.tuning(train, len(split.validation)))
    tunings = [found[f"SLM_{model.short}_finetuned"] for model in config.slm_models if config.experiment != "baseline"]
    if tunings and config.break_even_points:  # each half of the next larger one
        found["break_even"] = max(tunings) * (1 - 0.5**config.break_even_points)
    return found


def relative_seconds(config: ComparisonConfig) -> dict[str, float]:
    """The same in any unit, where nothing is known: a tuned model takes longer than one that is asked alone."""
    weights = {"finetuned": TUNED, "fitted": 0.05}
    return {key: weights.get(one["training_status"], 1.0) for key, one in comparison_live.planned(config).items()}


class _Pace:
    """Seconds of what one model does with these dialogues on this device."""

    def __init__(self, config: ComparisonConfig, name: str, data: Dialogues) -> None:
        shape = _shape(name)
        if shape is None:
            raise LookupError(f"how long it takes is known once {name} is here")
        device = config.device or runtime.device()
        dtype = runtime.dtype_for(device)
        wide = shape.hidden if device != "cpu" else min(shape.hidden, CPU_WIDTH)
        speed = durations.measure_speed(device, dtype, wide)
        window = config.window or min(_positions(name) or 2048, 2048)
        self.config = config
        self.token = 2 * shape.parameters / speed.flops_per_second / durations.REACHED
        self.kernels = durations.OPERATIONS_A_LAYER * shape.layers * speed.kernel_seconds
        self.loading = 0.3 + shape.parameters * dtype.itemsize / durations.LOADING_BYTES_PER_SECOND
        self.read = min(window, _tokens(name, data) * (1 + config.shots)) * self.token
        self.taught = mean(len(row.labels) for row in data.rows)  # rows that a dialogue makes in training
        labels = len(data.labels) * LABEL_TOKENS * self.token
        ranking = self.read + labels + self.kernels
        writing = self.read + config.new_tokens * self.kernels / durations.TOGETHER
        self.answer = (config.answers != "writing") * ranking + (config.answers != "ranking") * writing
        self.alone = ranking if config.answers == "ranking" else self.read + config.new_tokens * self.kernels

    def tuning(self, rows: float, validation: int) -> float:
        """Seconds of a tuning on so many dialogues, and its validations. Adapters need no gradient of other weights."""
        config, rows = self.config, rows * self.taught
        times = 1 + (durations.BACKWARD if config.method == "full" else durations.BACKWARD / 2)
        steps = -(-rows * config.epochs // config.batch_size)
        validations = (config.epochs + 1) * min(validation, 64) * self.taught * self.read
        return (
            rows * config.epochs * self.read * (times + config.gradient_checkpointing)
            + steps * 3 * self.kernels
            + validations
        )


@lru_cache(maxsize=16)
def _mean_tokens(name: str, texts: tuple[str, ...]) -> float:
    if models.locate(name)[0] == "hub":
        return mean(map(len, texts)) / LETTERS
    return mean(len(ids) for ids in models.load_tokenizer(name)(list(texts))["input_ids"])


def _tokens(name: str, data: Dialogues) -> float:
    return _mean_tokens(name, tuple(row.text for row in data.rows[:FEW]))


# as HTML --------------------------------------------------------------------------------------------------------------


def needs_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Each model with the memory that it would need of what is free, as HTML."""
    shown = []
    for row in rows:
        size = row["bytes"]
        about = [f"{row['parameters'] / 1e6:,.1f} M parameters"] if row["parameters"] else []
        about += [
            "download of unknown size"
            if row["download"] is None
            else f"{estimates.megabytes(row['download'])} to download"
        ] * (row["download"] != 0)
        about += [f"licence {row['licence']}", *([gate(row["gated"])] if row["gated"] is not False else [])]
        shown.append(
            {
                "name": row["name"],
                "job": row["job"],
                "needs": "?" if size is None else estimates.megabytes(size),
                "fits": size is None or row["fits"],
                "verdict": "not known" if size is None else "✓ fits" if row["fits"] else "✗ too large",
                "percent": 0 if size is None else f"{min(100.0, 100 * size / row['free']):.1f}",
                "about": "; ".join(about),
            }
        )
    where = "on the GPU" if runtime.device() == "cuda" else "in RAM"
    free = estimates.megabytes(rows[0]["free"]) if rows else ""
    return NEEDS.render(rows=shown, free=free, where=where) if rows else ""


def gate(gated: bool | None) -> str:
    return {True: "gated", False: "open", None: "gate not certain"}[gated]


def catalogue_table() -> str:
    """Every model that can be called by a short name, as HTML."""
    whole, packed = (
        {one.name: one for one in catalogue.suggest(job, tokens=2048)} for job in ("inference_16bit", "inference_4bit")
    )
    rows = [
        {
            "name": one.name,
            "needs": estimates.megabytes(one.required_bytes),
            "four": estimates.megabytes(packed[one.name].required_bytes),
            "download": "comes with it" if one.source == "bundled" else estimates.megabytes(one.download_bytes),
            "licence": one.licence,
            "gate": gate(one.gated),
        }
        for one in sorted(whole.values(), key=lambda one: one.parameters)
    ]
    return CATALOGUE.render(rows=rows)
