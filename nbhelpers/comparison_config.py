"""What decides a comparison of large models as they are with small ones that are fine-tuned?"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from nbhelpers import records
from nbhelpers.baselines import BASELINES
from nbhelpers.registry import unknown
from nbhelpers.strict import StrictConfig
from nbhelpers.training import TrainingConfig

FITTED = tuple(sorted(BASELINES))


class ModelInstanceConfig(StrictConfig):
    """One model of a comparison. Where lora_rank, lora_alpha and lora_targets are None, the comparison's own count."""

    name: str = Field(min_length=1, description="bundled name, local folder, run directory or hub id")
    size: str = Field("", description="how its size is called in tables; empty = its number of parameters")
    description: str = Field("", description="a remark that stands beside it in tables")
    load_in_4bit: bool = Field(False, description="weights in 4 bits; fine-tuned by qlora")
    load_in_8bit: bool = Field(False, description="weights in 8 bits; cannot be fine-tuned")
    dtype: Literal["auto", "stored", "float32", "bfloat16", "float16"] = Field(
        "auto", description="precision of weights"
    )
    lora_rank: int | None = Field(None, ge=1, le=1024, description="rank of its adapters")
    lora_alpha: float | None = Field(None, gt=0, description="its adapters are scaled by lora_alpha / lora_rank")
    lora_targets: tuple[str, ...] | None = Field(None, description="names of its layers that get adapters; None = all")

    @model_validator(mode="after")
    def _one_quantisation(self) -> ModelInstanceConfig:
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(f"{self.name}: load_in_4bit and load_in_8bit are both set; choose one")
        return self

    @property
    def short(self) -> str:
        """The last part of its name, as it stands in keys and folders; without "-hf", which says only that transformers
        loads it, and reads like the beginning of a token (hf_...) where "_finetuned" follows: it would be masked."""
        return re.sub(r"[-.]hf$", "", records.slug(Path(self.name.rstrip("/")).name))

    @property
    def quantization(self) -> str | None:
        return "4bit" if self.load_in_4bit else "8bit" if self.load_in_8bit else None


class ComparisonConfig(StrictConfig):
    """Everything that decides a comparison. Refuses nonsense and unknown names before anything is loaded."""

    name: str = Field("comparison", min_length=1, description="what the run is called in its record")
    experiment: Literal["full", "baseline", "training"] = Field(
        "full", description="both sides, the large models alone, or the small ones alone"
    )
    data: str = Field("bundled", description="bundled, a csv, xlsx, json, jsonl or parquet file, or a hub data set")
    dialogue_column: str | None = Field(None, description="column with the dialogue; None = found by its name")
    label_column: str | None = Field(None, description="column with the label; None = found by its name")
    label_kind: Literal["auto", "icd10", "labels"] = Field("auto", description="codes of ICD-10-CM, or any labels")
    labels: str | None = Field(
        None, description="text file with one label a line, the only ones there are; None = those of the rows"
    )
    several: Literal["refuse", "any"] = Field(
        "refuse", description="rows with several labels: refused, or one is enough"
    )
    split: Literal["per_label", "unseen_labels"] = Field(
        "per_label", description="each label in every part (3/1/1 of 5 rows), or whole labels held out"
    )
    max_train_samples: int | None = Field(None, ge=2, description="most training dialogues; None = all")
    max_eval_samples: int | None = Field(None, ge=1, description="most test dialogues; None = all")
    llm_models: tuple[ModelInstanceConfig, ...] = Field(
        (ModelInstanceConfig(name="small-llama"),), description="large models, asked as they are"
    )
    slm_models: tuple[ModelInstanceConfig, ...] = Field(
        (ModelInstanceConfig(name="tiny-llama"), ModelInstanceConfig(name="tiny-gpt2")),
        description="small models, asked as they are and fine-tuned",
    )
    fine_tune_llms: bool = Field(False, description="fine-tune the large models too, beside")
    baselines: tuple[Literal["majority", "nearest", "tfidf_linear"], ...] = Field(
        FITTED, description="what needs no language model"
    )
    answers: Literal["both", "ranking", "writing"] = Field(
        "both", description="labels ranked by log-probability, an answer written and read, or both"
    )
    new_tokens: int = Field(16, ge=1, le=512, description="most tokens of a written answer")
    system_prompt: str = Field("", description="what is said before each dialogue; empty = a short task")
    list_labels: int = Field(20, ge=0, description="labels stand in the prompt where there are at most this many")
    shots: int = Field(0, ge=0, le=20, description="solved training dialogues in every prompt")
    window: int | None = Field(
        None, ge=16, description="most tokens of prompt and answer; None = the model's, up to 2048"
    )
    method: Literal["lora", "full"] = Field("lora", description="how small models are tuned (4-bit ones by qlora)")
    epochs: int = Field(3, ge=1, le=10_000, description="times each training dialogue is read")
    learning_rate: float | None = Field(None, gt=0, le=1, description="peak; None takes the method's usual one")
    batch_size: int = Field(8, ge=1, le=65_536, description="dialogues per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="sequences per pass; halved when memory ends")
    lora_rank: int = Field(16, ge=1, le=1024, description="rank of the adapters")
    lora_alpha: float = Field(32.0, gt=0, description="adapters are scaled by lora_alpha / lora_rank")
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in front of the adapters")
    gradient_checkpointing: bool = Field(False, description="compute activations twice to need less memory")
    checkpoint_every: int | None = Field(None, ge=1, description="steps between checkpoints to resume from; None = off")
    break_even_points: int = Field(
        3, ge=0, le=12, description="trainings on fewer dialogues, for the curve of break-even; 0 = none"
    )
    ensemble: bool = Field(False, description="combine the best of both sides, weighted on validation")
    price_per_hour: float | None = Field(None, gt=0, description="what an hour of this machine costs you; None = hours")
    latency_requests: int = Field(20, ge=1, le=1000, description="requests that are timed one at a time")
    budget: str | None = Field(None, description="a time such as 90m or 2h that rows and epochs are chosen for")
    cache: bool = Field(True, description="take answers from before where nothing that decides them differs")
    cache_days: float | None = Field(None, gt=0, description="oldest answers that serve again; None = any")
    keep_text: bool = Field(False, description="show dialogues of wrong answers in the report")
    batch_tokens: int | None = Field(None, ge=1, description="most padded tokens of a pass; None = by device")
    device: str | None = Field(None, description="cpu, cuda or mps; None = what is found")
    seed: int = Field(0, ge=0, le=2**32 - 1, description="seed of split, shots, subsets and training")

    @field_validator("llm_models", "slm_models", mode="before")
    @classmethod
    def _names_are_models(cls, given: Any, info: ValidationInfo) -> Any:
        """A model may be given by its name alone, several as one text with commas."""
        given = _listed(given, info.field_name, "names, or of entries with a name", (str, Mapping, ModelInstanceConfig))
        return tuple({"name": one} if isinstance(one, str) else one for one in given)

    @field_validator("baselines", mode="before")
    @classmethod
    def _names_in_a_text(cls, given: Any) -> Any:
        given = _listed(given, "baselines", f"names ({', '.join(FITTED)})", (str,))
        for name in given:
            if name not in FITTED:
                raise ValueError(unknown("baseline", name, FITTED))
        return tuple(dict.fromkeys(given))

    @field_validator("budget")
    @classmethod
    def _a_time(cls, given: str | None) -> str | None:
        if given is not None:
            seconds_of(given)
        return given

    @model_validator(mode="after")
    def _models_fit(self) -> ComparisonConfig:
        sides = {"baseline": ("llm_models",), "training": ("slm_models",)}.get(
            self.experiment, ("llm_models", "slm_models")
        )
        for side in sides:
            if not getattr(self, side):
                raise ValueError(f"{side} must name at least one model for experiment {self.experiment!r}, got none")
        for side in ("llm_models", "slm_models"):
            names: dict[str, str] = {}
            for model in getattr(self, side):
                if model.short in names:
                    raise ValueError(
                        f"{side} {names[model.short]!r} and {model.name!r} are both called {model.short!r} in results; "
                        "leave one out, or copy it to a folder of another name"
                    )
                names[model.short] = model.name
        tuned = self.slm_models if self.experiment != "baseline" else ()
        tuned += self.llm_models if self.fine_tune_llms and self.experiment != "training" else ()
        if self.micro_batch_size is not None and self.micro_batch_size > self.batch_size:
            raise ValueError(
                f"micro_batch_size must be at most batch_size {self.batch_size}, got {self.micro_batch_size}"
            )
        eight = next((model.name for model in tuned if model.load_in_8bit), None)
        if eight is not None:
            raise ValueError(f"{eight}: 8-bit weights cannot be fine-tuned; use load_in_4bit, or none")
        if self.ensemble and (self.answers == "writing" or self.experiment != "full"):
            raise ValueError(
                "ensemble combines rankings of both sides: it needs experiment 'full' and answers 'both' or 'ranking', "
                f"got {self.experiment!r} and {self.answers!r}"
            )
        return self

    @property
    def sides(self) -> dict[str, tuple[ModelInstanceConfig, ...]]:
        """The models that take part, by side."""
        return {
            "LLM": self.llm_models if self.experiment != "training" else (),
            "SLM": self.slm_models if self.experiment != "baseline" else (),
        }

    @property
    def pairs(self) -> int:
        """Pairs of a large and a small model, over which the verdict corrects its tests; at least 1."""
        return max(1, len(self.sides["LLM"]) * len(self.sides["SLM"]))

    @property
    def headline(self) -> str:
        """The measure of the verdict: of rankings where labels are ranked, which is the kindest to an untuned model."""
        return "exact_match_accuracy" if self.answers == "writing" else "top_1_accuracy"

    @property
    def tunes(self) -> bool:
        """Whether any model is tuned."""
        return self.experiment != "baseline" or self.fine_tune_llms

    def training(self, model: ModelInstanceConfig, rows: int, epochs: int | None = None) -> TrainingConfig:
        """How `model` is tuned on so many rows: validated once an epoch, the best state is kept."""
        steps = -(-rows * (epochs or self.epochs) // self.batch_size)
        return TrainingConfig(
            method="qlora" if model.load_in_4bit else self.method,
            steps=steps,
            learning_rate=self.learning_rate,
            batch_size=self.batch_size,
            micro_batch_size=self.micro_batch_size,
            lora_rank=model.lora_rank or self.lora_rank,
            lora_alpha=model.lora_alpha or self.lora_alpha,
            lora_dropout=self.lora_dropout,
            lora_targets=model.lora_targets,
            eval_every=max(1, min(steps, -(-rows // self.batch_size))),
            gradient_checkpointing=self.gradient_checkpointing,
            checkpoint_every=self.checkpoint_every,
            seed=self.seed,
        )

    def window_of(self, model: ModelInstanceConfig) -> int:
        """Tokens of prompt and answer. ValueError where more are asked for than the model has positions."""
        from nbhelpers import models  # here: the command's help should not wait for transformers

        most = models.max_positions(models.load_config(model.name))
        if self.window is not None and most is not None and self.window > most:
            raise ValueError(f"window must be at most {most} tokens for {model.name}, got {self.window}")
        return self.window or min(most or 2048, 2048)


def _listed(given: Any, field: str, what: str, kinds: tuple[type, ...]) -> Sequence[Any]:
    """A list of a config file, or a text with commas as one."""
    if isinstance(given, str):
        return [name.strip() for name in given.split(",") if name.strip()]
    strange = [given] if not isinstance(given, list | tuple) else [one for one in given if not isinstance(one, kinds)]
    if strange:
        raise ValueError(f"{field} must be a list of {what}, got {strange[0]!r}")
    return given


def seconds_of(text: str) -> float:
    """Seconds of a time such as 45s, 90m, 1.5h or 2d.

    >>> seconds_of("90m")
    5400.0
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", str(text).strip())
    if not found or float(found[1]) <= 0:
        raise ValueError(f"budget must be a time such as 90m or 2h, got {text!r}")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
