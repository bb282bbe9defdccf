"""What does it cost to mask single weights, or to take MLP channels out, and does fine-tuning bring it back?

One run: baseline -> weights masked, or channels removed -> fine-tuned -> saved and loaded again, beside an unpruned
control with the same budget. A mask alone makes nothing faster or smaller; removing channels does, and both are
measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from nbhelpers import (
    attention,
    channels,
    data,
    facts,
    importance,
    mask_choice,
    mask_sets,
    masked_training,
    masks,
    memory,
    models,
    runtime,
)
from nbhelpers.architecture import is_supported
from nbhelpers.experiments import SPEED_ROWS, PruningExperiment, _Shell, outcome, verdict
from nbhelpers.facts import Fact
from nbhelpers.registry import unknown
from nbhelpers.stages import FACT_ROWS, check_window, sample_rows, shown
from nbhelpers.strict import StrictConfig
from nbhelpers.tasks import load_corpus

SPARSITY = 0.5  # of a mask that the run makes itself, and of channels
OF_MASKS = ("pattern", "scope", "dimension", "mode", "masks")  # fields that say nothing of channels
GAINS = ("parameters_before", "parameters_after", "bytes_before", "bytes_after")
SPEEDS = ("tokens_per_second_before", "tokens_per_second_masks_alone", "tokens_per_second_after")


class WeightPruningConfig(StrictConfig):
    """Everything that decides a run. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("weight-pruning", min_length=1, description="what the run is called in its record")
    what: Literal["weights", "channels"] = Field(
        "weights", description="mask weights to zero, or take whole MLP channels out of the model"
    )
    model: str = Field("tiny-gpt2", description="bundled name, local folder or hub id")
    text: str = Field("bundled", description="bundled, a .txt or .jsonl file, wikitext-2, or a hub data set")
    sparsity: float | None = Field(
        None,
        ge=0,
        le=1,
        description="share that goes, 0-1: of the projections' weights, or of each MLP's channels; None = "
        f"{SPARSITY:g}; of a mask file: which of its sparsities, None = the only one",
    )
    importance: mask_choice.Importance = "magnitude"
    pattern: mask_choice.Pattern = "unstructured"
    scope: mask_choice.Scope = "layer"
    dimension: mask_choice.Dimension = "outputs"
    masks: str | None = Field(
        None, description="mask file, or the folder of masks create, in place of pattern, importance and scope"
    )
    calibration_rows: mask_choice.CalibrationRows = 64
    steps: int = Field(40, ge=0, description="fine-tuning steps; 0 = no fine-tuning")
    method: Literal["full", "lora"] = Field("full", description="train all weights, or low-rank adapters")
    mode: mask_choice.Mode = "sparse_to_sparse"
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
    seed: int = Field(0, ge=0, lt=2**32, description="seed of random scores, calibration rows, data order and samples")

    @model_validator(mode="before")
    @classmethod
    def _half_goes_where_nothing_is_said(cls, values: Any) -> Any:
        left_open = isinstance(values, Mapping) and values.get("sparsity") is None and values.get("masks") is None
        return {**values, "sparsity": SPARSITY} if left_open else values

    @model_validator(mode="after")
    def _fields_fit_together(self) -> WeightPruningConfig:
        mask_choice.check_fields(self)
        fields = type(self).model_fields
        changed = [name for name in OF_MASKS if getattr(self, name) != fields[name].default]
        if self.what == "channels" and changed:
            raise ValueError(f"{changed[0]} is of what 'weights': channels go whole, as many in each layer; leave it")
        return self


# What fits where: values for the fields that are left open. Every one of them fixes the amount of work.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {"model": "tiny-llama", "text": "bundled", "steps": 40},
    "gpu": {"model": "gpt2", "text": "wikitext-2", "steps": 200, "window": 512, "evaluation_windows": 200},
    "full": {"model": "gpt2-medium", "text": "wikitext-2", "steps": 1000, "window": 1024, "evaluation_windows": 250},
}


def from_preset(preset: str, **values: Any) -> WeightPruningConfig:
    """The config of a preset, with every value that is not None in its place. LookupError for an unknown preset."""
    if preset not in PRESETS:
        raise LookupError(unknown("preset", preset, PRESETS))
    given = {name: value for name, value in values.items() if value is not None}
    return WeightPruningConfig(**PRESETS[preset] | given)


class WeightPruningExperiment(PruningExperiment):
    """`WeightPruningExperiment.run(config)` does the whole job and returns what result.json holds."""

    kind = "weight_pruning"

    @staticmethod
    def _check(config: WeightPruningConfig) -> tuple[Any, data.Corpus, int, dict[str, list[dict]]]:
        """(tokenizer, corpus, window, rows by part), before any weights: what is wrong with them is said here."""
        runtime.check_supported()
        model_config = models.load_config(config.model)
        models.check_prunable(config.model)
        if config.masks is not None:
            mask_choice.level_in(config.masks, config.sparsity)
        if config.what == "channels":
            channels.mlp(_Shell(model_config))
            if config.sparsity == 1:
                raise ValueError("sparsity 1 would take every channel of every layer; lower it")
        tokenizer, window = models.load_tokenizer(config.model), check_window(config.window, model_config)
        corpus = load_corpus(config.text)
        rows = {part: data.rows(tokenizer, getattr(corpus, part), window) for part in ("train", "validation", "test")}
        mask_choice.check_rows(config, len(rows["train"]))
        return tokenizer, corpus, window, rows

    def _pruned_model(self, model) -> tuple[dict[str, Any], Any, Path]:
        """baseline -> masked or narrower -> fine-tuned -> saved; (what went, training, folder of the model)."""
        self.before, self.choice = (models.parameters(model), models.weight_bytes(model)), None
        self._stage("baseline", model)
        whole = model
        rows = sample_rows(self.train, self.config.calibration_rows, self.config.seed)
        if self.config.what == "channels":
            model, went = self._remove_channels(model, rows)
        else:
            went = self._mask_weights(model, rows)
        last, tuned = self._stage("pruned", model), None
        if self.config.steps:
            sparse = None if self.choice is None else (self.choice.mask, self.config.mode)
            tuned = self._fine_tune(model, "fine_tuned", sparse)
            last = self._stage("fine_tuned", model)
            if self.choice is not None:
                self.facts += masked_training.proofs(tuned, self.config.mode)
                if self.config.mode == "sparse_to_sparse":
                    self.facts.append(mask_choice.holds(model, self.choice.mask, "fine_tuned"))
        model_dir = self._save(model, last["nll"], went)
        memory.release(whole)  # a narrower copy shares all but the MLPs with it, so not before
        return went, tuned, model_dir

    def _mask_weights(self, model, rows: list[dict]) -> dict[str, Any]:
        self._tell("masking")
        few = self.test[:FACT_ROWS]
        before = facts.logits(model, few)
        folder = self.tracker.run_dir.parent / mask_sets.FOLDER
        self.choice = mask_choice.choose(
            model, self.config, self.config.sparsity, rows, folder=folder, should_stop=self.should_stop
        )
        masks.apply(model, self.choice.mask)
        self.tracker.set_fingerprints(mask=self.choice.sha256)
        record = self.choice.record
        self.facts += [*self.choice.facts, mask_choice.holds(model, self.choice.mask, "after_masking")]
        self.facts.append(_changed(before, facts.logits(model, few), record["masked"]))
        return {"mask": dict(record), "went": f"{record['masked']:,} of {record['numbers']:,} weights masked"}

    def _remove_channels(self, model, rows: list[dict]):
        """(the narrower model, what went): closed first, so that what removal changes can be measured: nothing."""
        config, few = self.config, self.test[:FACT_ROWS]
        self._tell("scoring channels")
        found = importance.scores(model, config.importance, rows, seed=config.seed, should_stop=self.should_stop)
        kept = channels.choose_channels(channels.channel_scores(model, found), config.sparsity)
        geo = channels.channel_geometry(model)
        self._tell("removing channels")
        speed = channels.measured_speed(model, kept, self.test[:SPEED_ROWS], should_stop=self.should_stop)
        before = facts.logits(model, few)
        channels.prune_channels(model, channels.others(kept, geo.channels))
        narrow = channels.remove_channels(model, kept)
        stay = len(kept[0][0])
        gone = (geo.channels - stay) * geo.layers * geo.experts
        self.facts += [
            _as_many(kept, geo, config.sparsity),
            _changed(before, facts.logits(model, few), gone),
            replace(
                facts.removal_changed_nothing(model, narrow, few),
                says="the model without the channels computes what it computed with them closed",
            ),
        ]
        went = f"{gone:,} of {geo.channels * geo.layers * geo.experts:,} MLP channels removed"
        record = {"before": geo.channels, "after": stay, "layers": geo.layers, "experts": geo.experts}
        seconds = dict(zip(SPEEDS, vars(speed).values(), strict=True))
        return narrow, {"channels": record, "went": went, "speed": speed.line(), "removed": gone, **seconds}

    def _save(self, model, nll: float, went: dict[str, Any]) -> Path:
        self._tell("saving")
        model_dir = self.tracker.run_dir / "model"
        models.save_model(model, self.tokenizer, model_dir)
        after = models.parameters(model), models.stored_bytes(model_dir)
        went |= dict(zip(GAINS, (self.before[0], after[0], self.before[1], after[1]), strict=True))
        self.facts.append(_smaller(self.before, after, went.get("removed", 0)))
        closed = attention.closed_heads(model) if is_supported(model) else []
        memory.release(model)
        self.facts += facts.saved_model_is_the_same(
            model_dir, self.test, nll, closed, self.device, should_stop=self.should_stop
        )
        return model_dir

    def _result(self, corpus, window, count, model_config, went, tuned, model_dir) -> dict[str, Any]:
        config, by_stage = self.config, {row["stage"]: row for row in self.stages}
        perplexities = {stage: row["perplexity"] for stage, row in by_stage.items()}
        done = "Masking the weights" if config.what == "weights" else "Removing the channels"
        merge = tuned.merged if tuned else None
        return {
            "kind": self.kind,
            "model": config.model,
            "what": config.what,
            "strategy": f"{config.what} by {chosen_by(went, config)}",
            "level": config.sparsity if self.choice is None else self.choice.level,
            **{stage: shown(by_stage.get(stage)) for stage in ("baseline", "pruned", "fine_tuned", "control")},
            **outcome(perplexities),
            "verdict": verdict(perplexities, done),
            "gain": gain(went),
            **dict.fromkeys(("mask", "channels", "speed", *SPEEDS)),
            **went,
            "merge": None if not merge else {name: value for name, value in merge.items() if name != "facts"},
            "parameters": count,
            "trainable_parameters": tuned.trainable_parameters if tuned else None,
            **self._told(corpus, window),
            "model_dir": str(model_dir),
        }


def chosen_by(went: Mapping[str, Any], config: Any) -> str:
    """What ranked the weights: of a stored mask what its file says."""
    return (went.get("mask") or {}).get("importance") or config.importance


def gain(went: Mapping[str, Any]) -> str:
    """One sentence: what pruning gave beside its perplexity, measured."""
    before, after, size, smaller = (went[name] for name in GAINS)
    if "removed" not in went:
        return (
            f"Masks alone make nothing faster or smaller: {after:,} parameters in {smaller:,} bytes, as before; a zero "
            "is stored and multiplied like any other number."
        )
    return (
        f"{after:,} parameters instead of {before:,} ({1 - after / before:.1%} fewer), {smaller:,} bytes instead of "
        f"{size:,}; {went['speed']}. The saved model loads with plain transformers."
    )


def _changed(before, after, gone: int) -> Fact:
    says = "what went changed the logits" if gone else "nothing went, no logit changed"
    return replace(facts.pruning_changed_the_logits(before, after, [None] * min(gone, 1)), says=says)


def _as_many(kept: channels.Channels, geo: channels.Geometry, sparsity: float) -> Fact:
    """Every layer (and expert) gives up equally many channels, as many as asked; experts keep a multiple of 8."""
    counts = sorted({geo.channels - len(one) for layer in kept for one in layer})
    asked = masks.count(sparsity, geo.channels)
    rounded = channels.EXPERT_MULTIPLE - 1 if geo.experts > 1 else 0
    return Fact(
        "every_layer_lost_as_many_channels_as_asked",
        len(counts) == 1 and asked - rounded <= counts[0] <= asked,
        "every layer lost equally many MLP channels, as many as asked",
        f"{counts[0]} of {geo.channels} in each of {geo.layers} layers, asked {asked}",
        {"counts": counts, "asked": asked, "channels": geo.channels},
    )


def _smaller(before: tuple[int, int], after: tuple[int, int], removed: int) -> Fact:
    """Parameters and bytes fell where channels were removed, and stayed where weights were only masked."""
    found = facts.removal_made_it_smaller((before[0], after[0]), (before[1], after[1]), removed)
    says = f"{removed:,} removed channels took their parameters and bytes with them"
    return replace(found, says=says if removed else "masks alone took no parameter and no byte away")
