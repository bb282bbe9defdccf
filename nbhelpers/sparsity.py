"""What does sparsity cost on a task? One run: mask -> LoRA on the task's training rows -> merge -> evaluation.

The model is measured three times on the same documents: as it is, masked, and after tuning. What jobs of one sweep have
in common is done once: a loaded model is lent from job to job, weights are scored once for a model, importance and
calibration rows, and answers before tuning are taken from before where nothing that decides them differs.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nbhelpers import (
    answer_cache,
    data,
    evaluation,
    facts,
    mask_choice,
    mask_sets,
    models,
    predictions,
    records,
    runtime,
    shared_models,
    tasks,
    training,
)
from nbhelpers.stages import VALIDATION_WINDOWS, StagedExperiment, check_window, sample_rows
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker

DENSE = "dense"
MEASURED = ("dense", "masked", "tuned")
HELD = 6  # texts kept by a process


class SparsityConfig(StrictConfig):
    """Everything that decides one run. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("sparsity", min_length=1, description="what the run is called in its record")
    model: str = Field("tiny-llama", description="bundled name, local folder, run directory or hub id")
    task: str = Field("boolq", description=f"one of {', '.join(sorted(tasks.TASKS))}")
    data: str | None = Field(
        "bundled", description="evaluation rows: bundled, or a csv, json, jsonl or parquet file; None = the hub's"
    )
    train_data: str | None = Field(None, description="training rows, a file; None = those that belong to data")
    shots: int | None = Field(
        None, ge=0, le=100, description="solved rows before each question; None = as the task says"
    )
    limit: int | None = Field(None, ge=1, description="the first so many evaluation rows; None = all")
    sparsity: mask_choice.Sparsity = 0.5
    pattern: mask_choice.Pattern = "unstructured"
    importance: mask_choice.Importance = "magnitude"
    scope: mask_choice.Scope = "layer"
    dimension: mask_choice.Dimension = "outputs"
    mode: Literal["dense", "sparse_to_dense", "sparse_to_sparse"] = Field(
        "sparse_to_sparse", description="whether what is learned may fill the zeros again; dense takes sparsity 0"
    )
    tuning: Literal["lora", "none"] = Field("lora", description="adapters that are merged at the end, or no training")
    steps: int = Field(100, ge=1, le=10_000_000, description="optimizer steps")
    learning_rate: float = Field(5e-3, gt=0, le=1, description="peak learning rate")
    batch_size: int = Field(32, ge=1, le=65_536, description="rows per optimizer step (effective batch)")
    micro_batch_size: int | None = Field(None, ge=1, description="rows per pass; None = all; halved when memory ends")
    lora_rank: int = Field(8, ge=1, le=1024, description="rank of the adapters")
    lora_alpha: float = Field(16.0, gt=0, description="adapters are scaled by lora_alpha / lora_rank")
    gradient_checkpointing: bool = Field(False, description="compute activations twice to need less memory")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints to resume from; None = off")
    validations: int = Field(2, ge=1, description="how often the validation rows are measured, spread over the steps")
    window: int | None = Field(
        None, ge=2, description="most tokens of a training row; None = 256, or the model's positions"
    )
    calibration_rows: mask_choice.CalibrationRows = 64
    keep_model: bool = Field(False, description="save the merged model in the run directory")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="precision of the weights")
    device: str | None = Field(None, description="cpu, cuda or mps; None = what is found")
    seed: int = Field(0, ge=0, lt=2**32, description="seed of random scores, calibration rows, data order, adapters")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> SparsityConfig:
        if tasks.find(self.task).kind == "rolling":
            raise ValueError(f"task {self.task!r} asks nothing, so there is no accuracy: name another task")
        mask_choice.check_fields(self)
        if self.mode == DENSE and self.sparsity:
            raise ValueError(f"mode 'dense' has no mask: sparsity must be 0, got {self.sparsity}")
        self.training()
        return self

    def training(self) -> training.TrainingConfig:
        """The same as the trainer takes it."""
        same = ("steps", "learning_rate", "batch_size", "micro_batch_size", "lora_rank", "lora_alpha")
        same += ("gradient_checkpointing", "checkpoint_every", "seed")
        every = max(1, self.steps // self.validations)
        values = {name: getattr(self, name) for name in same}
        return training.TrainingConfig(method="lora", eval_every=every, **values)

    @property
    def is_dense(self) -> bool:
        """Whether no weight goes, whatever the mode says."""
        return self.sparsity == 0


class SparsityExperiment(StagedExperiment):
    """`SparsityExperiment.run(config)` does the whole job and returns what result.json holds."""

    @classmethod
    def run(
        cls,
        config: SparsityConfig,
        *,
        root: str | Path = "runs",
        run_dir: str | Path | None = None,
        resume: bool = False,
        sparsities: Iterable[float] = (),
        command: list[str] | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict[str, Any]:
        """Run `config` and leave a run directory with predictions.jsonl; returns its result.

        resume: go on in `run_dir`, training from its newest complete checkpoint. sparsities: all that a plan asks of
        the same ranking of weights, so that one scoring serves them. Raises LookupError or ValueError for what cannot
        be run, before a run directory exists; tracking.Interrupted after should_stop, tracking.Diverged.
        """
        plan = cls._check(config)
        record = ExperimentConfig(kind="sparsity", **config.model_dump())
        with ExperimentTracker(record, root, run_dir=run_dir, resume=resume, command=command) as tracker:
            experiment = cls(config, tracker, progress, should_stop)
            experiment.sparsities = tuple(sparsities)
            result = experiment._run(*plan)
            tracker.finish(result)
        return result

    @staticmethod
    def _check(config: SparsityConfig) -> tuple[tasks.Rows, list[tasks.Asked], data.Corpus | None]:
        """(rows, what is asked, training text), before any weights: what is wrong with them is said here."""
        runtime.check_supported()
        check_window(config.window, models.load_config(config.model))
        files = tuple(records.sha256_known(_path(name)) for name in (config.data, config.train_data) if _is_file(name))
        same = (config.task, config.data, config.train_data, config.shots, config.limit, files)
        if same not in _read:
            rows, asked = evaluation.questions(
                config.task, config.data, shots=config.shots, shots_data=config.train_data, limit=config.limit
            )
            _hold(_read, same, (rows, asked, training_text(config)))
        return _read[same]

    def _run(self, rows: tasks.Rows, asked: list[tasks.Asked], corpus: data.Corpus) -> dict[str, Any]:
        config = self.config
        self.rows, self.asked, self.seconds = rows, asked, {}
        (self.tracker.run_dir / "artefacts").mkdir(exist_ok=True)
        began = time.perf_counter()
        with self._borrowed() as loaded:
            model, self.tokenizer = loaded.model, loaded.tokenizer
            self._take_text(corpus)
            identity = self._identity()
            self.tracker.set_fingerprints(text=corpus.sha256, documents=identity["documents"])
            found = {"dense": self._before_tuning(model, identity, None)}
            chosen = None if config.is_dense else self._choose(model)
            found["masked"] = found["dense"]
            if chosen is not None:
                found["masked"] = self._before_tuning(model, identity, chosen)
            tuned = self._tune(model, chosen) if config.tuning == "lora" else None
            found["tuned"] = self._after_tuning(model, chosen) if tuned is not None else found["masked"]
            self._check_mask(model, chosen)
            self.precision = evaluation.precision_of(model) | {"device": next(model.parameters()).device.type}
            records.write_atomic(self.tracker.run_dir / predictions.FILE, predictions.as_lines(self.lines))
            if config.keep_model:
                shutil.rmtree(self.tracker.run_dir / "model", ignore_errors=True)  # of an attempt killed after saving
                models.save_model(model, self.tokenizer, self.tracker.run_dir / "model")
        self.seconds["total"] = time.perf_counter() - began
        return self._result(found, chosen, tuned, corpus)

    @contextmanager
    def _borrowed(self) -> Iterator[models.LoadedModel]:
        """The model that hears Stop before every forward pass, except in training, which looks for itself."""
        self._tell("loading", model=self.config.model)
        started = time.perf_counter()
        with shared_models.lent(self.config.model, device=self.config.device, dtype=self.config.dtype) as loaded:
            self.seconds["loading"] = time.perf_counter() - started
            hook = loaded.model.register_forward_pre_hook(lambda *_: self._stop_here())
            try:
                yield loaded
            finally:
                hook.remove()

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - started

    def _take_text(self, corpus: data.Corpus) -> None:
        window = check_window(self.config.window, models.load_config(self.config.model))
        same = (corpus.sha256, models.tokenizer_fingerprint(self.tokenizer), window)
        if same not in _tokenised:
            parts = (corpus.train, corpus.validation[:VALIDATION_WINDOWS])
            _hold(_tokenised, same, [data.rows(self.tokenizer, part, window) for part in parts])
        self.train, self.validation = _tokenised[same]
        self.facts.append(facts.texts_are_disjoint(corpus))

    # measuring

    def _identity(self) -> dict[str, Any]:
        config = self.config
        found = answer_cache.identity(config.model, self.rows, self.asked, device=config.device, dtype=config.dtype)
        return found | {"model": models.revision(config.model)}  # the model is loaded: a hub id's commit is known

    def _before_tuning(self, model, identity: Mapping[str, Any], chosen) -> dict[str, Any]:
        """Measures of the model as it is now; its answers may come from another run of the same weights and mask."""
        stage = "dense" if chosen is None else "masked"
        of_mask = None if chosen is None else chosen.sha256
        place = answer_cache.place(self.tracker.run_dir, {**identity, "mask": of_mask})
        if chosen is not None:
            chosen.apply(model)
        before = answer_cache.read(place, self.asked)
        came = "measured" if before is None else "cached"
        if before is None:
            lines = self._answers(model, stage)
            answer_cache.write(place, lines, [], evaluation.precision_of(model))
        else:
            lines = before["lines"]
        self.lines = lines
        return self._measured(stage, lines, came)

    def _after_tuning(self, model, chosen) -> dict[str, Any]:
        self.lines = self._answers(model, "tuned")
        return self._measured("tuned", self.lines, "measured")

    def _answers(self, model, stage: str) -> list[dict[str, Any]]:
        self._tell("evaluating", at=stage)
        lines: list[Any] = [None] * len(self.asked)
        with self._timed("evaluating"):
            for number, line in evaluation.answered(
                model, self.tokenizer, self.rows.task, self.asked, should_stop=self.should_stop
            ):
                lines[number] = line
        return lines

    def _measured(self, stage: str, lines: list[dict[str, Any]], came: str) -> dict[str, Any]:
        found = evaluation.measures(lines, self.rows.task.metrics) | {"came": came}
        value = found[self.rows.task.metrics[0]]
        self.tracker.event("stage", stage=stage, came=came, **{self.rows.task.metrics[0]: value})
        self._tell("measured", at=stage, accuracy=value)
        return found

    # masking and tuning

    def _choose(self, model):
        """The mask of this run, checked for its counts."""
        self._tell("masking")
        config = self.config
        mask_choice.check_rows(config, len(self.train))
        with self._timed("masking"):
            chosen = mask_sets.chosen(
                model,
                mask_sets.Wanted.of(config),
                config.sparsity,
                sample_rows(self.train, config.calibration_rows, config.seed),
                model_files=models.revision(config.model),
                folder=self.tracker.run_dir.parent / mask_sets.FOLDER,
                others=self.sparsities,
                should_stop=self.should_stop,
            )
            self.facts.append(chosen.fact(model))
        self.tracker.set_fingerprints(mask=chosen.sha256)
        return chosen

    def _tune(self, model, chosen) -> training.TrainingResult:
        mode = DENSE if chosen is None else self.config.mode
        mask = None if chosen is None else chosen.mask
        with self._timed("training"):
            tuned = self._train(model, "fine_tuned", self.config.training(), resume=True, sparse=(mask, mode))
        self.facts += [facts.Fact(**fact) for fact in tuned.merged["facts"]]
        return tuned

    def _check_mask(self, model, chosen) -> None:
        """The mask holds in the model that was evaluated last, unless its zeros were free to fill."""
        if chosen is not None and (self.config.tuning == "none" or self.config.mode == "sparse_to_sparse"):
            self.facts.append(chosen.holds_in(model))

    def _result(self, found: dict[str, dict], chosen, tuned, corpus: data.Corpus) -> dict[str, Any]:
        config, metric = self.config, self.rows.task.metrics[0]
        protocol = tasks.protocol(self.rows, config.shots)
        busy = self.seconds.get("training", 0.0) + self.seconds.get("evaluating", 0.0)
        return {
            "kind": "sparsity",
            **{name: getattr(config, name) for name in ("model", "task", "pattern", "importance", "mode")},
            "scope": mask_sets.Wanted.of(config).scope,
            "tuning": config.tuning,
            "sparsity": config.sparsity,
            "mask": None if chosen is None else chosen.record(),
            "metric": metric,
            **{name: found[name] for name in MEASURED},
            "change": found["tuned"][metric] - found["dense"][metric],
            "merge": None if tuned is None else {k: v for k, v in tuned.merged.items() if k != "facts"},
            "validation_nll": None if tuned is None else tuned.best_validation_nll,
            "steps": None if tuned is None else tuned.steps,
            "best_step": None if tuned is None else tuned.best_step,
            "skipped_steps": None if tuned is None else tuned.skipped_steps,
            "micro_batch_size": None if tuned is None else tuned.micro_batch_size,
            "tokens_per_second": None if tuned is None else tuned.tokens_per_second,
            "trainable_parameters": None if tuned is None else tuned.trainable_parameters,
            "protocol": protocol | self.precision | {"came": found["tuned"]["came"]},
            "text": {"source": corpus.source, "generated": corpus.generated, "sha256": corpus.sha256},
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "overhead_share": 1 - busy / self.seconds["total"],
            "facts": [fact.as_dict() for fact in self.facts],
            "all_facts_hold": all(fact.ok for fact in self.facts),
            "verdict": verdict(config, found, metric),
            "run_dir": str(self.tracker.run_dir),
        }


# What jobs after one another ask of the same text, so that it is read and tokenised once a process.
_read: dict[tuple, tuple[tasks.Rows, list[tasks.Asked], data.Corpus]] = {}
_tokenised: dict[tuple, list[list[dict]]] = {}


def _hold(where: dict, key: tuple, value: Any) -> None:
    """Keep a few: the tasks of one plan."""
    while len(where) >= HELD:
        where.pop(next(iter(where)))
    where[key] = value


def _path(name: str) -> Path:
    return Path(os.path.expanduser(name))  # an unknown ~user stays as it is


def _is_file(name: str | None) -> bool:
    return name is not None and _path(name).is_file()


def training_text(config: SparsityConfig) -> data.Corpus:
    """The task's training rows in parts, without any that stands among all of its evaluation rows."""
    every = tasks.read(config.task, config.data)
    train = tasks.read(config.task, training_source(config), "train")
    parts = tasks.training_parts(train, every)
    name = _corpus_name(config)
    return data.corpus(*parts[:3], source=name, generated=train.generated, left_out=parts.overlap)


def training_source(config: SparsityConfig) -> str | None:
    """Where the training rows are; None = the hub's. ValueError where evaluation rows are a file and these are not."""
    if config.train_data is None and config.data not in (None, tasks.BUNDLED):
        raise ValueError(f"data {config.data!r} holds evaluation rows: name a file of training rows as train_data")
    return config.train_data or config.data


def _corpus_name(config: SparsityConfig) -> str:
    source = config.train_data or config.data
    return f"{tasks.SOURCE}{config.task}" + ("" if source is None else f":{source}")


def verdict(config: SparsityConfig, found: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """One sentence: the measure as it is, masked and tuned, the last with its interval."""
    interval = found["tuned"][f"{metric}_interval"]
    between = "" if interval["low"] is None else f" [{interval['low']:.3f}, {interval['high']:.3f}]"
    text = f"{config.model} on {config.task}: {metric} {found['dense'][metric]:.3f} as it is"
    if not config.is_dense:
        text += f", {found['masked'][metric]:.3f} at {config.sparsity:.0%} {config.pattern} by {config.importance}"
    if config.tuning == "lora":
        text += f", {found['tuned'][metric]:.3f}{between} after tuning ({config.mode.replace('_', ' ')})"
    return text + f" (95 % over {found['tuned']['n']} documents)."
