"""What do all experiments on one model share? Stages that are measured and sampled, trainings, and what is told."""

from __future__ import annotations

import logging
from typing import Any

import torch
from pydantic import BaseModel

from nbhelpers import data, evaluate, facts, models, records, training
from nbhelpers.tracking import ExperimentTracker, Interrupted

WINDOW = 256  # tokens of a window where the config names none and the model's positions allow it
VALIDATION_WINDOWS = 32  # windows that choose the best state while fine-tuning
FACT_ROWS = 2  # windows on which facts about logits are checked
log = logging.getLogger(__name__)


class StagedExperiment:
    """One run on one model: what was measured at which stage, what was checked, and who is told.

    config: has sample_prompt, sample_tokens, evaluation_windows and seed.
    """

    def __init__(self, config: BaseModel, tracker: ExperimentTracker, progress, should_stop) -> None:
        self.config: Any = config
        self.tracker, self.progress, self.should_stop = tracker, progress, should_stop
        self.facts: list[facts.Fact] = []
        self.stages: list[dict] = []
        self.doing, self.training = "starting", False

    def _prepare(self, tokenizer, corpus: data.Corpus, rows: dict[str, list[dict]]) -> None:
        """What is trained and measured on; the first fact is that no test text is trained on."""
        (self.tracker.run_dir / "artefacts").mkdir(exist_ok=True)
        self.tokenizer = tokenizer
        self.train, self.test = rows["train"], rows["test"][: self.config.evaluation_windows]
        self.validation = rows["validation"][:VALIDATION_WINDOWS]
        self.prompt = self.config.sample_prompt or first_words(corpus.test[0])
        self.facts.append(facts.texts_are_disjoint(corpus))

    def _load(self, name: str, *, trained: str | None) -> models.LoadedModel:
        """Load a model that hears Stop; trained: the method by which it will be, None where it will not."""
        self._tell("loading", model=name)
        dtype = self.config.dtype
        if dtype == "auto" and trained == "full":
            dtype = "float32"  # masters of the weights that are trained
        quantization = "4bit" if trained == "qlora" else None
        loaded = models.load_model(name, device=self.config.device, dtype=dtype, quantization=quantization)
        loaded.model.register_forward_pre_hook(lambda *_: self._stop_here())
        return loaded

    def _stop_here(self) -> None:
        """Before every forward pass, whatever asks for it: so Stop is heard while heads are scored and text is written.
        Training looks for itself, so that it can say in which step it stopped."""
        if self.should_stop is not None and not self.training and self.should_stop():
            raise Interrupted(f"stopped while {self.doing}")

    def _stage(self, stage: str, model) -> dict:
        """Measure the model as it is now on the whole test text and let it write a sample."""
        self._tell("measuring", at=stage)
        measured = evaluate.perplexity(model, self.test, should_stop=self.should_stop)
        sample = self._sample(model)
        row = {"stage": stage, **vars(measured), "sample": sample}
        self.stages.append(row)
        self.tracker.event("stage", stage=stage, perplexity=measured.perplexity, nll=measured.nll)
        self._tell("measured", at=stage, perplexity=measured.perplexity, sample=sample)
        return row

    def _sample(self, model) -> str:
        return evaluate.generate(
            model, self.tokenizer, self.prompt, max_new_tokens=self.config.sample_tokens, seed=self.config.seed
        )

    def _train(
        self,
        model,
        stage: str,
        settings: training.TrainingConfig,
        *,
        resume: bool = False,
        samples: bool = False,
        sparse: tuple | None = None,
    ) -> training.TrainingResult:
        """Fine-tune the model in place; its curves go under `stage`, its record beside. Interrupted after a stop.

        samples: let it write a text at each validation. sparse: (mask, mode), see training.fine_tune.
        """
        self.tracker.event("stage", stage=f"training {stage}")
        self.training = True
        result = training.fine_tune(
            model,
            self.train,
            self.validation,
            settings,
            output_dir=self.tracker.run_dir / "artefacts" / stage,
            tracker=_Prefixed(self.tracker, stage),
            progress=lambda now: self._tell(f"training {stage}", **now),
            should_stop=self.should_stop,
            sampler=(lambda: self._sample(model)) if samples else None,
            resume=resume,
            sparse=sparse,
        )
        self.training = False
        if result.status == "stopped":
            raise Interrupted(f"stopped in step {result.steps} of {settings.steps} of training {stage}")
        records.write_json(self.tracker.run_dir / "artefacts" / f"training_{stage}.json", result.record())
        if stage == "fine_tuned":
            self.facts.append(facts.loss_is_the_models_own(result.loss_check, result.packing))
        if stage == "fine_tuned" and result.labels["prompt_label_tokens"] is not None:
            self.facts.append(facts.loss_leaves_out_the_prompt(result.labels))
        return result

    def _told(self, corpus: data.Corpus, window: int) -> dict[str, Any]:
        """The part of every result that says on what and how it was measured, what was written and what was checked."""
        first = self.stages[0]
        return {
            "text": {
                "source": corpus.source,
                "generated": corpus.generated,
                "sha256": corpus.sha256,
                "test_documents": len(corpus.test),
            },
            "protocol": {
                "measure": "perplexity = exp(sum of token nll / scored tokens)",
                "split": "test",
                "window": window,
                "windows": first["windows"],
                "tokens": first["tokens"],
                "dtype": self.config.dtype,
                "came": "measured",
            },
            "samples": {row["stage"]: row["sample"] for row in self.stages},
            "facts": [fact.as_dict() for fact in self.facts],
            "all_facts_hold": all(fact.ok for fact in self.facts),
            "run_dir": str(self.tracker.run_dir),
        }

    def _tell(self, stage: str, **what) -> None:
        self.doing = stage
        if what.get("step", 1) == 1 or what.get("validation_nll") is not None:  # every step stands in metrics.jsonl
            log.info("%s %s", stage, "" if "done" in what else what or "")
        if self.progress is not None:
            self.progress({"stage": stage, **what})


class _Prefixed:
    """The tracker as one training sees it: every line says which training it belongs to."""

    def __init__(self, tracker: ExperimentTracker, stage: str) -> None:
        self.tracker, self.stage = tracker, stage

    def log_metrics(self, iteration: int | None = None, **metrics) -> None:
        self.tracker.log_metrics(iteration=iteration, stage=self.stage, **metrics)

    def log_eval(self, **metrics) -> None:
        self.tracker.log_eval(stage=self.stage, **metrics)

    def increment_gradient_step(self, n: int = 1) -> None:
        self.tracker.increment_gradient_step(n)

    def event(self, kind: str, **data) -> None:
        self.tracker.event(kind, stage=self.stage, **data)


def check_window(window: int | None, model_config, default: int = WINDOW) -> int:
    """Tokens per window: as asked (ValueError where the model has fewer positions), or what the positions allow."""
    positions = models.max_positions(model_config)
    if window is None:
        return min(default, positions or default)
    if positions is not None and window > positions:
        raise ValueError(
            f"window must be at most the model's {positions} positions, got {window}; use a smaller --window"
        )
    return window


def sample_rows(rows: list[dict], number: int, seed: int) -> list[dict]:
    """`number` rows drawn without replacement from a seeded generator (all of them where there are fewer)."""
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return [rows[at] for at in order[:number].tolist()]


def first_words(document: data.Document, words: int = 5) -> str:
    """What text samples begin with: the prompt, or the first words of a document."""
    return document.prompt or " ".join(document.text.split()[:words])


def shown(row: dict | None) -> dict | None:
    """What result.json holds of a stage."""
    return None if row is None else {key: row[key] for key in ("perplexity", "nll", "tokens")}
