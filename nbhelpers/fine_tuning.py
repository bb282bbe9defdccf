"""What does fine-tuning bring? One run: baseline -> fine-tuned -> saved and loaded again, resumed after a kill.

Any model that loads here, pruned ones included: their closed heads stay closed. With a mask: baseline -> masked ->
fine-tuned, with its zeros kept. Beside it, if asked, another model (the unpruned one, say) with the same budget.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nbhelpers import (
    attention,
    compact,
    data,
    estimates,
    facts,
    instructions,
    mask_choice,
    mask_sets,
    masked_training,
    masks,
    memory,
    models,
    ranks,
    runtime,
    tasks,
    training,
)
from nbhelpers.architecture import is_supported
from nbhelpers.registry import unknown
from nbhelpers.stages import FACT_ROWS, VALIDATION_WINDOWS, StagedExperiment, check_window, sample_rows, shown
from nbhelpers.stats import digits
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker

# method -> what estimates calls it
JOBS = {"full": "full_finetuning", "lora": "lora", "qlora": "qlora", "sparse_lora": "lora"}
SPARSITY = 0.5  # of sparse_lora where none is named


class FineTuningConfig(StrictConfig):
    """Everything that decides a fine-tuning run. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("fine-tuning", min_length=1, description="what the run is called in its record")
    model: str = Field("tiny-gpt2", description="bundled name, local folder, run directory or hub id")
    data: str = Field(
        "bundled",
        description="bundled, bundled-instructions, a .txt or .jsonl file (text, or prompt and completion), hub, "
        "or a task: task:boolq (hub), task:boolq:bundled, task:boolq:FILE",
    )
    method: Literal["full", "lora", "qlora", "sparse_lora"] = Field(
        "full",
        description="train all weights, low-rank adapters, adapters on the model in 4 bits, or adapters that keep a "
        "masked model masked",
    )
    steps: int = Field(100, ge=1, le=10_000_000, description="optimizer steps")
    learning_rate: float | None = Field(
        None, gt=0, le=1, description="peak learning rate; None = 5e-5 full, 2e-4 lora, qlora and sparse_lora"
    )
    batch_size: int = Field(8, ge=1, le=65_536, description="windows per optimizer step (effective batch)")
    micro_batch_size: int | None = Field(
        None, ge=1, description="windows per pass; None = all; halved when memory ends"
    )
    packing: bool = Field(
        True, description="short rows share a window without seeing each other: the same loss, faster"
    )
    lora_rank: int = Field(8, ge=1, le=1024, description="rank of the adapters (not for full)")
    lora_alpha: float = Field(16.0, gt=0, description="adapters are scaled by lora_alpha / lora_rank (not for full)")
    sparsity: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"sparse_lora and full: share of the projections' weights that go, 0-1; None = {SPARSITY:g} for "
        "sparse_lora, none for full; of a mask file: which of its sparsities",
    )
    pattern: mask_choice.Pattern = "unstructured"
    importance: mask_choice.Importance = "magnitude"
    scope: mask_choice.Scope = "layer"
    dimension: mask_choice.Dimension = "outputs"
    mode: mask_choice.Mode = "sparse_to_sparse"
    masks: str | None = Field(
        None, description="mask file, or the folder of masks create, in place of pattern, importance and scope"
    )
    calibration_rows: mask_choice.CalibrationRows = 64
    gradient_checkpointing: bool = Field(False, description="compute activations twice to need less memory")
    validations: int = Field(4, ge=1, description="how often the validation text is measured, spread over the steps")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="end after this many validations without a better one; None = off"
    )
    checkpoint_every: int | None = Field(100, ge=1, description="steps between checkpoints to resume from; None = off")
    control: str | None = Field(None, description="another model to fine-tune with the same budget; None = no control")
    window: int | None = Field(None, ge=2, description="tokens per window; None = 256, or the model's positions")
    evaluation_windows: int | None = Field(
        None, ge=1, description="most test windows scored; None = the whole test text"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision of the weights")
    device: str | None = Field(None, description="cpu, cuda or mps; None = what is found")
    sample_prompt: str | None = Field(
        None, description="start of the text samples; None = first words of the test text"
    )
    sample_tokens: int = Field(60, ge=1, le=2048, description="tokens written per sample")
    samples: bool = Field(True, description="write a sample at each validation too, to read how training goes on")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of data order, adapters and samples")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> FineTuningConfig:
        mask_choice.check_fields(self)
        if self.method == "sparse_lora" and not self.is_masked:
            raise ValueError("method 'sparse_lora' needs a mask: sparsity must be above 0, got 0; or use 'lora'")
        if self.is_masked and self.method not in ("full", "sparse_lora"):
            raise ValueError(f"a mask is for methods 'sparse_lora' and 'full', got {self.method!r}: drop the mask")
        self.training()
        return self

    @property
    def share(self) -> float | None:
        """The sparsity as it is meant: what None stands for depends on the method, and on whether a file is named."""
        left_open = self.sparsity is None and self.method == "sparse_lora" and self.masks is None
        return SPARSITY if left_open else self.sparsity

    @property
    def is_masked(self) -> bool:
        """Whether weights go before training."""
        return self.masks is not None or bool(self.share)

    def training(self) -> training.TrainingConfig:
        """The same as the trainer takes it."""
        same = ("method", "steps", "learning_rate", "batch_size", "micro_batch_size", "packing", "lora_rank")
        same += ("lora_alpha", "gradient_checkpointing", "early_stopping_patience", "checkpoint_every", "seed")
        every = max(1, self.steps // self.validations)
        values = {name: getattr(self, name) for name in same}
        if self.method == "sparse_lora":
            values["method"] = "lora"
        return training.TrainingConfig(eval_every=every, **values)


# What fits where: values for the fields that are left open. Every one of them fixes the amount of work.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "model": "tiny-llama",
        "data": instructions.BUNDLED,
        "steps": 60,
        "learning_rate": 2e-3,
        "validations": 6,
        "checkpoint_every": 20,
    },
    "gpu": {"model": "gpt2", "data": "wikitext-2", "steps": 200, "window": 512, "evaluation_windows": 200},
    "full": {
        "model": "gpt2-medium",
        "data": "wikitext-2",
        "steps": 1000,
        "window": 1024,
        "evaluation_windows": 250,
        "gradient_checkpointing": True,
    },
}


def from_preset(preset: str, more: Mapping[str, Any] | None = None, **values: Any) -> FineTuningConfig:
    """The config of a preset with every value that is not None in its place, and those of `more` as they are.

    LookupError for an unknown preset.
    """
    if preset not in PRESETS:
        raise LookupError(unknown("preset", preset, PRESETS))
    given = {name: value for name, value in values.items() if value is not None}
    return FineTuningConfig(**PRESETS[preset] | given | dict(more or {}))


class FineTuningExperiment(StagedExperiment):
    """`FineTuningExperiment.run(config)` does the whole job and returns what result.json holds."""

    @classmethod
    def run(
        cls,
        config: FineTuningConfig,
        *,
        root: str | Path = "runs",
        run_dir: str | Path | None = None,
        resume: bool = False,
        command: list[str] | None = None,
        estimated_seconds: float | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict:
        """Run `config` and leave a run directory; returns its result.

        estimated_seconds: what the run was expected to take, to stand beside what it took.
        resume: go on in `run_dir` from its newest complete checkpoint (its config must be the same). Raises
        LookupError or ValueError for what cannot be run, before a run directory exists; tracking.Interrupted after
        should_stop, tracking.Diverged where training does not stay finite.

        Started by torchrun, every process calls this alike: all of them train, the first one measures, writes and
        returns the result, the others return {}.
        """
        plan = cls._check(config)
        record = ExperimentConfig(kind="fine_tuning", **config.model_dump())
        with ranks.joined(config.device or runtime.device()):
            if not ranks.is_first():
                return cls(config, None, None, should_stop)._follow(*plan)
            with ExperimentTracker(record, root, run_dir=run_dir, resume=resume, command=command) as tracker:
                ranks.told_by_first(str(tracker.run_dir))
                result = cls(config, tracker, progress, should_stop)._run(*plan)
                result["time"] = {"estimated_seconds": estimated_seconds, "seconds": tracker.seconds()}
                tracker.finish(result)
        return result

    @staticmethod
    def _check(config: FineTuningConfig) -> tuple[Any, data.Corpus, int, dict[str, list[dict]]]:
        """(tokenizer, corpus, window, rows by part), before any weights: what is wrong with them is said here."""
        runtime.check_supported()
        if config.masks is not None:
            mask_choice.level_in(config.masks, config.share)
        window = check_window(config.window, models.load_config(config.model))
        tokenizer = models.load_tokenizer(config.model)
        if config.control is not None:
            check_window(window, models.load_config(config.control))
            _same_tokens(tokenizer, models.load_tokenizer(config.control), config)
        corpus = tasks.load_corpus(config.data)
        rows = {part: data.rows(tokenizer, getattr(corpus, part), window) for part in ("train", "validation", "test")}
        if config.is_masked:
            mask_choice.check_rows(config, len(rows["train"]))
        return tokenizer, corpus, window, rows

    def _run(self, tokenizer, corpus: data.Corpus, window: int, rows: dict[str, list[dict]]) -> dict:
        config = self.config
        self._prepare(tokenizer, corpus, rows)
        self.estimate = required_memory(config)
        with memory.peak() as used:
            model = self._load(config.model, trained=config.method).model
            self.tracker.set_fingerprints(
                model=models.fingerprint(model),
                tokenizer=models.tokenizer_fingerprint(tokenizer),
                text=corpus.sha256,
            )
            closed = attention.closed_heads(model) if is_supported(model) else []
            self._stage("baseline", model)
            choice = self._mask(model) if config.is_masked else None
            sparse = None if choice is None else (choice.mask, config.mode)
            tuned = self._train(
                model, "fine_tuned", config.training(), resume=True, samples=config.samples, sparse=sparse
            )
        if choice is not None:
            self.facts += masked_training.proofs(tuned, config.mode)
            if config.mode == "sparse_to_sparse":
                self.facts.append(mask_choice.holds(model, choice.mask, "fine_tuned"))
        last = self._stage("fine_tuned", model)
        if closed:
            few = self.test[:FACT_ROWS]
            self.facts.append(facts.closed_heads_add_nothing(model, few, closed, "after_fine_tuning"))
        model_dir, parameters = self._save(model, last["nll"], closed), tuned.total_parameters
        control = None
        if config.control is not None:
            with memory.loaded(lambda: self._load(config.control, trained=config.method).model) as other:
                control = self._train(other, "control", config.training(), resume=True)
                self._stage("control", other)
            self.facts.append(facts.same_budget(tuned, control))
        return self._result(corpus, window, tuned, used, parameters, model_dir, choice)

    def _mask(self, model) -> mask_choice.Choice:
        """Choose the mask, set its weights to zero, and measure what that did."""
        self._tell("masking")
        choice = choose_mask(model, self.config, self.train, self.tracker.run_dir, self.should_stop)
        masks.apply(model, choice.mask)
        self.tracker.set_fingerprints(mask=choice.sha256)
        self.facts += [*choice.facts, mask_choice.holds(model, choice.mask, "masked")]
        self._stage("masked", model)
        return choice

    def _follow(self, tokenizer, corpus: data.Corpus, window: int, rows: dict[str, list[dict]]) -> dict:
        """What a process beside the first one does: train along."""
        artefacts = Path(ranks.told_by_first(None)) / "artefacts"
        self.training = True  # it hears Stop through the first one
        validation = rows["validation"][:VALIDATION_WINDOWS]
        for name, stage in ((self.config.model, "fine_tuned"), (self.config.control, "control")):
            if name is not None:
                with memory.loaded(lambda name=name: self._load(name, trained=self.config.method).model) as model:
                    sparse = None
                    if stage == "fine_tuned" and self.config.is_masked:
                        found = choose_mask(model, self.config, rows["train"], artefacts.parent, self.should_stop)
                        sparse = (found.mask, self.config.mode)
                    training.fine_tune(
                        model,
                        rows["train"],
                        validation,
                        self.config.training(),
                        output_dir=artefacts / stage,
                        resume=True,
                        sparse=sparse,
                    )
        return {}

    def _save(self, model, nll: float, closed: list) -> Path:
        """Write the model (an unfinished folder of an earlier attempt goes) and check what was written."""
        self._tell("saving")
        device = str(next(model.parameters()).device)
        model_dir = self.tracker.run_dir / "model"
        if model_dir.exists():  # of an attempt that was killed after saving
            shutil.rmtree(model_dir)
        removal = compact.removal(model)
        models.save_model(model, self.tokenizer, model_dir)
        memory.release(model)
        self.facts += facts.saved_model_is_the_same(
            model_dir, self.test, nll, closed, device, removal=removal, should_stop=self.should_stop
        )
        return model_dir

    def _result(self, corpus, window, tuned, used: memory.MemoryMark, parameters: int, model_dir: Path, choice) -> dict:
        config = self.config
        by_stage = {row["stage"]: row for row in self.stages}
        perplexities = {stage: row["perplexity"] for stage, row in by_stage.items()}
        return {
            "kind": "fine_tuning",
            "model": config.model,
            "method": config.method,
            "baseline": shown(by_stage["baseline"]),
            "masked": shown(by_stage.get("masked")),
            "fine_tuned": shown(by_stage["fine_tuned"]),
            "control": shown(by_stage.get("control")),
            "improvement_percent": improvement(perplexities),
            "verdict": verdict(perplexities, config.control, kept_start=tuned.weights_step == 0),
            "mask": None if choice is None else dict(choice.record) | {"mode": config.mode},
            "merge": None if not tuned.merged else {k: v for k, v in tuned.merged.items() if k != "facts"},
            "parameters": parameters,
            "trainable_parameters": tuned.trainable_parameters,
            "tokens_per_second": tuned.tokens_per_second,
            "micro_batch_size": tuned.micro_batch_size,
            "skipped_steps": tuned.skipped_steps,
            "processes": tuned.processes,
            "packing": tuned.packing,
            "steps": tuned.steps,
            "best_step": tuned.best_step,
            "memory": {
                "estimated_bytes": self.estimate.total,
                "estimated": self.estimate.text,
                "resident_peak_bytes": used.resident_peak,
                "resident_grown_bytes": used.resident_grown,
                "cuda_peak_bytes": used.cuda_peak,
            },
            **self._told(corpus, window),
            "model_dir": str(model_dir),
        }


def choose_mask(model, config: FineTuningConfig, train: list[dict], run_dir: Path, should_stop) -> mask_choice.Choice:
    """The mask that the config asks for, of a file or by importance; sets of masks are kept beside the runs."""
    rows = sample_rows(train, config.calibration_rows, config.seed)
    folder = run_dir.parent / mask_sets.FOLDER
    return mask_choice.choose(model, config, config.share, rows, folder=folder, should_stop=should_stop)


def required_memory(config: FineTuningConfig) -> estimates.Requirement:
    """What training needs in memory, by a sum: to plan with, and to stand beside what was then measured."""
    model = models.load_config(config.model)
    sequences = min(config.micro_batch_size or config.batch_size, config.batch_size)
    tokens = sequences * check_window(config.window, model)
    float32 = config.dtype == "float32" or (config.device or runtime.device()) == "cpu"
    return estimates.required_bytes(
        model, JOBS[config.method], tokens=tokens, rank=config.lora_rank, weight_bytes=4 if float32 else 2
    )


def _same_tokens(tokenizer, other, config: FineTuningConfig) -> None:
    """Perplexities of two models can be compared only where both count the same tokens."""
    if models.tokenizer_fingerprint(tokenizer) != models.tokenizer_fingerprint(other):
        raise ValueError(
            f"control {config.control!r} has another tokenizer than {config.model!r}, so their perplexities cannot be "
            "compared; name a model of the same family, or none"
        )


def improvement(perplexity: Mapping[str, float]) -> float:
    """(baseline - fine-tuned) / baseline * 100: what fine-tuning took off the perplexity, in percent."""
    return (perplexity["baseline"] - perplexity["fine_tuned"]) / perplexity["baseline"] * 100


def verdict(perplexity: Mapping[str, float], control: str | None, *, kept_start: bool = False) -> str:
    """One sentence with the perplexities, and how the control did.

    kept_start: no validation was better than the one before the first step, so the model is the untrained one.
    """
    base, tuned = perplexity["baseline"], perplexity["fine_tuned"]
    text = f"Fine-tuning took perplexity from {digits(base)} to {digits(tuned)} ({-improvement(perplexity):+.1f} %)."
    if "masked" in perplexity:
        text = f"Masking took perplexity from {digits(base)} to {digits(perplexity['masked'])}; fine-tuning took it to "
        text += f"{digits(tuned)} ({-improvement(perplexity):+.1f} % of the baseline)."
    elif kept_start:
        text = "Fine-tuning did not get below the validation loss of the start, whose weights were kept "
        text += f"({digits(base)})."
    if "control" not in perplexity:
        return text
    beats = "better than" if tuned < perplexity["control"] else "not better than"
    return text + f" That is {beats} {control}, which reaches {digits(perplexity['control'])} with the same budget."
