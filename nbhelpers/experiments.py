"""What does closing attention heads cost, and does fine-tuning bring it back?

One run: baseline -> heads closed -> fine-tuned -> saved and loaded again, beside an unpruned control with the same
budget. Everything that is said afterwards is in the run directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from nbhelpers import compact, data, evaluate, facts, heads, memory, models, records, runtime, training
from nbhelpers.architecture import architecture, geometry
from nbhelpers.heads import STRATEGIES
from nbhelpers.registry import unknown
from nbhelpers.stages import FACT_ROWS, StagedExperiment, check_window, sample_rows, shown
from nbhelpers.stats import digits
from nbhelpers.strict import StrictConfig
from nbhelpers.tracking import ExperimentConfig, ExperimentTracker

SPEED_ROWS = 4  # windows in the batch on which speed is measured


class PruningConfig(StrictConfig):
    """Everything that decides a pruning run. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("pruning", min_length=1, description="what the run is called in its record")
    model: str = Field("tiny-gpt2", description="bundled name, local folder or hub id")
    text: str = Field("bundled", description="bundled, a .txt or .jsonl file, wikitext-2, or a hub data set")
    strategy: str = Field("gradient", description=f"how importance is measured: {', '.join(STRATEGIES)}")
    level: float = Field(0.3, ge=0, le=1, description="share of all heads to close, 0-1")
    iterative: bool = Field(False, description="score again after every few heads instead of once")
    heads_per_round: int | None = Field(
        None, ge=1, description="heads closed between scorings; None = a twentieth of all"
    )
    kv_groups: bool = Field(False, description="close whole groups of heads that share keys and values")
    min_heads_per_layer: int = Field(0, ge=0, description="heads that every layer keeps at least")
    remove: bool = Field(False, description="take the closed heads out of the saved model, so that it is smaller")
    scoring_windows: int = Field(16, ge=1, description="training windows, drawn by the seed, on which heads are scored")
    steps: int = Field(40, ge=0, description="fine-tuning steps; 0 = no fine-tuning")
    method: Literal["full", "lora"] = Field("full", description="train all weights, or low-rank adapters")
    learning_rate: float | None = Field(None, gt=0, le=1, description="peak learning rate; None = 5e-4 full, 1e-3 lora")
    batch_size: int = Field(8, ge=1, description="windows per optimizer step")
    control: bool = Field(True, description="also fine-tune the unpruned model with the same budget")
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
    seed: int = Field(0, ge=0, lt=2**32, description="seed of random scores, data order and samples")

    @field_validator("strategy")
    @classmethod
    def _known_strategy(cls, value: str) -> str:
        if value not in STRATEGIES:
            raise ValueError(unknown("strategy", value, STRATEGIES))
        return value


# Of a run with remove, None in others. Bytes: of the tensors in the weights file, without its header; before: of the
# same model saved with gates. Speed: medians of forward passes over one batch, gated and compact model in turn.
REMOVAL_KEYS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "tokens_per_second_before")
REMOVAL_KEYS += ("tokens_per_second_after", "loads_with")
LEARNING_RATES = {"full": 5e-4, "lora": 1e-3}

# What fits where: values for the fields that are left open. Every one of them fixes the amount of work.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"model": "tiny-llama", "text": "bundled", "steps": 40},
    "gpu": {"model": "gpt2", "text": "wikitext-2", "steps": 200, "window": 512, "evaluation_windows": 200},
    "full": {
        "model": "gpt2-medium",
        "text": "wikitext-2",
        "steps": 1000,
        "window": 1024,
        "evaluation_windows": 250,
        "iterative": True,
        "scoring_windows": 64,
    },
}


def from_preset(preset: str, **values: Any) -> PruningConfig:
    """The config of a preset, with every value that is not None in its place. LookupError for an unknown preset."""
    if preset not in PRESETS:
        raise LookupError(unknown("preset", preset, PRESETS))
    return PruningConfig(**PRESETS[preset] | {name: value for name, value in values.items() if value is not None})


class PruningExperiment(StagedExperiment):
    """`PruningExperiment.run(config)` does the whole job and returns what result.json holds."""

    kind = "pruning"

    def __init__(self, config: PruningConfig, tracker: ExperimentTracker, progress, should_stop) -> None:
        super().__init__(config, tracker, progress, should_stop)
        self.removal = dict.fromkeys(REMOVAL_KEYS)

    @classmethod
    def run(
        cls,
        config: PruningConfig,
        *,
        root: str | Path = "runs",
        run_dir: str | Path | None = None,
        command: list[str] | None = None,
        progress: Callable[[dict], None] | None = None,
        should_stop: Callable[[], bool] | None = None,
    ) -> dict:
        """Run `config` and leave a run directory; returns its result.

        Raises LookupError or ValueError for what cannot be run, before a run directory exists;
        tracking.Interrupted after should_stop, tracking.Diverged where training does not stay finite.
        """
        plan = cls._check(config)
        record = ExperimentConfig(kind=cls.kind, **config.model_dump())
        with ExperimentTracker(record, root, run_dir=run_dir, command=command) as tracker:
            experiment = cls(config, tracker, progress, should_stop)
            result = experiment._run(*plan)
            tracker.finish(result)
        return result

    @staticmethod
    def _check(config: PruningConfig) -> tuple[Any, data.Corpus, int, dict[str, list[dict]]]:
        """(tokenizer, corpus, window, rows by part), before any weights: what is wrong with them is said here."""
        runtime.check_supported()
        model_config = models.load_config(config.model)
        geo = geometry(model_config)
        architecture(_Shell(model_config))
        models.check_prunable(config.model)
        if config.remove:
            compact.check_whole_groups(geo, config.kv_groups)
        group = geo.group_size if config.kv_groups else 1
        number = heads.count(config.level, geo.total // group) * group
        heads.check_budget(geo, number, config.min_heads_per_layer, group_size=group)
        tokenizer, window = models.load_tokenizer(config.model), check_window(config.window, model_config)
        corpus = data.load_corpus(config.text)
        rows = {part: data.rows(tokenizer, getattr(corpus, part), window) for part in ("train", "validation", "test")}
        return tokenizer, corpus, window, rows

    def _run(self, tokenizer, corpus: data.Corpus, window: int, rows: dict[str, list[dict]]) -> dict:
        config = self.config
        self._prepare(tokenizer, corpus, rows)
        model = self._fresh()
        self.device = str(next(model.parameters()).device)
        self.tracker.set_fingerprints(
            model=models.fingerprint(model),
            tokenizer=models.tokenizer_fingerprint(tokenizer),
            text=corpus.sha256,
        )
        count = models.parameters(model)
        pruned, tuned, model_dir = self._pruned_model(model)
        control = self._control() if config.control and config.steps else None
        if tuned and control:
            self.facts.append(facts.same_budget(tuned, control))
        return self._result(corpus, window, count, model.config, pruned, tuned, model_dir)

    def _fresh(self):
        return self._load(self.config.model, trained=self.config.method if self.config.steps else None).model

    def _pruned_model(self, model):
        """baseline -> closed -> fine-tuned -> saved, on one copy of the model; its memory is given back."""
        config, few = self.config, self.test[:FACT_ROWS]
        self._stage("baseline", model)
        self.facts.append(facts.gates_change_nothing_while_open(model, few))
        before = facts.logits(model, few)

        scoring = sample_rows(self.train, config.scoring_windows, config.seed)
        self.facts.append(facts.strategy_sees_the_model(model, scoring[:FACT_ROWS], config.strategy, config.seed))
        self._tell("scoring heads", done=0, total=heads.count(config.level, geometry(model.config).total))
        selection = heads.prune(
            model,
            scoring,
            config.strategy,
            config.level,
            iterative=config.iterative,
            heads_per_round=config.heads_per_round,
            min_per_layer=config.min_heads_per_layer,
            kv_groups=config.kv_groups,
            seed=config.seed,
            progress=lambda now: self._tell("scoring heads", **now),
            should_stop=self.should_stop,
        )
        closed = [list(head) for head in selection.closed]
        self._tell("heads chosen", done=len(closed), total=len(closed), scores=selection.scores, closed=closed)
        self.facts += [
            facts.lowest_scores_were_closed(selection, config.kv_groups, config.min_heads_per_layer),
            facts.pruning_changed_the_logits(before, facts.logits(model, few), selection.newly_closed),
            facts.closed_heads_add_nothing(model, few, selection.closed, "after_pruning"),
        ]
        last = self._stage("pruned", model)
        tuned = None
        if config.steps:
            tuned = self._fine_tune(model, "fine_tuned")
            last = self._stage("fine_tuned", model)
            self.facts.append(facts.closed_heads_add_nothing(model, few, selection.closed, "after_fine_tuning"))
        still_closed, removed, model_dir = selection.closed, None, self.tracker.run_dir / "model"
        if config.remove:
            still_closed, removed = [], self._save_without_heads(model, model_dir, few, len(selection.closed))
        else:
            self._tell("saving")
            models.save_model(model, self.tokenizer, model_dir)
        memory.release(model)
        self.facts += facts.saved_model_is_the_same(
            model_dir, self.test, last["nll"], still_closed, self.device, removal=removed, should_stop=self.should_stop
        )
        return selection, tuned, model_dir

    def _save_without_heads(self, model, model_dir: Path, few: list[dict], closed: int) -> compact.Removal:
        """Save the model without its closed heads; measure what that gave, beside the model with gates."""
        self._tell("removing heads")
        narrow = compact.remove_heads(model)
        found = compact.removal(narrow)
        self.facts.append(facts.removal_changed_nothing(model, narrow, few))
        speed = evaluate.tokens_per_second([model, narrow], self.test[:SPEED_ROWS], should_stop=self.should_stop)
        self._tell("saving")
        models.save_model(narrow, self.tokenizer, model_dir)
        parameters = models.parameters(model), models.parameters(narrow)
        size = models.weight_bytes(model), models.stored_bytes(model_dir)
        self.facts.append(facts.removal_made_it_smaller(parameters, size, closed))
        self.removal = dict(zip(REMOVAL_KEYS, (*parameters, *size, *speed, found.loads_with), strict=True))
        self.tracker.event("stage", stage="removed", **self.removal)
        return found

    def _control(self):
        """The unpruned model, loaded afresh and fine-tuned with the same budget."""
        with memory.loaded(self._fresh) as model:
            control = self._fine_tune(model, "control")
            self._stage("control", model)
        return control

    def _fine_tune(self, model, stage: str, sparse: tuple | None = None) -> training.TrainingResult:
        config = self.config
        settings = training.TrainingConfig(
            method=config.method,
            steps=config.steps,
            learning_rate=config.learning_rate or LEARNING_RATES[config.method],
            batch_size=config.batch_size,
            eval_every=max(1, config.steps // 4),
            seed=config.seed,
        )
        return self._train(model, stage, settings, sparse=sparse)

    def _result(self, corpus, window, count, model_config, selection, tuned, model_dir) -> dict:
        config, geo = self.config, geometry(model_config)
        by_stage = {row["stage"]: row for row in self.stages}
        perplexities = {stage: row["perplexity"] for stage, row in by_stage.items()}
        rounds = self.tracker.run_dir / "artefacts" / "selection.json"
        records.write_json(rounds, {"strategy": config.strategy, "rounds": selection.rounds})
        return {
            "kind": "pruning",
            "model": config.model,
            "strategy": config.strategy,
            "level": config.level,
            "iterative": config.iterative,
            "baseline": shown(by_stage["baseline"]),
            "pruned": shown(by_stage["pruned"]),
            "fine_tuned": shown(by_stage.get("fine_tuned")),
            "control": shown(by_stage.get("control")),
            **outcome(perplexities),
            "verdict": verdict(perplexities),
            "pruned_heads": [list(head) for head in selection.closed],
            "total_heads": geo.total,
            "layers": geo.layers,
            "heads_per_layer": geo.heads,
            "scores": selection.scores,
            "parameters": count,
            **self.removal,
            "trainable_parameters": tuned.trainable_parameters if tuned else None,
            **self._told(corpus, window),
            "model_dir": str(model_dir),
        }


class _Shell:
    """Just enough of a model to look up its architecture by its config."""

    def __init__(self, config) -> None:
        self.config = config


def outcome(perplexity: Mapping[str, float]) -> dict[str, float | None]:
    """recovery_percent = (pruned - tuned) / (pruned - base) * 100 where pruning hurt, else
    improvement_percent = (base - tuned) / base * 100; None without fine-tuning."""
    base, pruned, tuned = perplexity["baseline"], perplexity["pruned"], perplexity.get("fine_tuned")
    if pruned > base:
        return {"recovery_percent": None if tuned is None else (pruned - tuned) / (pruned - base) * 100}
    return {"improvement_percent": None if tuned is None else (base - tuned) / base * 100}


def verdict(perplexity: Mapping[str, float], what: str = "Closing the heads") -> str:
    """One sentence with both perplexities, and whether pruning and fine-tuning beats fine-tuning alone."""
    base, pruned, tuned = perplexity["baseline"], perplexity["pruned"], perplexity.get("fine_tuned")
    text = f"{what} took perplexity from {digits(base)} to {digits(pruned)}"
    if tuned is None:
        return text + "; not fine-tuned."
    ((name, value),) = outcome(perplexity).items()
    text += f"; fine-tuning took it to {digits(tuned)} ({value:.0f} % {name.removesuffix('_percent')})."
    control = perplexity.get("control")
    if control is None:
        return text + " No unpruned control was run, so this may be learning of the text rather than recovery."
    beats = "beats" if tuned < control else "does not beat"
    return text + f" That {beats} fine-tuning the whole model, which reaches {digits(control)} with the same budget."
