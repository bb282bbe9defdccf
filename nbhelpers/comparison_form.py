"""Which comparison does a form say? Models by ticks or names, in 4 bits or not; and how is it said elsewhere?"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import Field, ValidationError

from nbhelpers import catalogue, comparison_live, equivalents
from nbhelpers.comparison_config import ComparisonConfig, ModelInstanceConfig
from nbhelpers.runs import Run

SIDES = {"llm_models": "llm_4bit", "slm_models": "slm_4bit"}  # field -> whether its models load in 4 bits
BUNDLED = {"llm_models": ("small-llama",), "slm_models": ("tiny-llama", "tiny-gpt2")}
ROLES = {"llm_models": "llm", "slm_models": "slm"}  # field -> what the catalogue calls that side


class ComparisonForm(ComparisonConfig):
    """A comparison as a form says it: each side's models share what they load in."""

    llm_4bit: bool = Field(False, description="load the large models in 4 bits (nf4): a quarter of the memory")
    slm_4bit: bool = Field(False, description="load the small ones in 4 bits: they are tuned by QLoRA")

    def comparison(self) -> ComparisonConfig:
        """The config that is run."""
        values = {name: getattr(self, name) for name in ComparisonConfig.model_fields}
        for side, switch in SIDES.items():
            values[side] = tuple(
                model.model_copy(update={"load_in_4bit": getattr(self, switch)}) for model in values[side]
            )
        return ComparisonConfig(**values)


def offered(side: str) -> list[str]:
    """Models with a box to tick; any other may be named."""
    return [*BUNDLED[side], *(model.name for model in catalogue.offered(ROLES[side]))]


def open_set() -> dict[str, str]:
    """Both sides without gates, whose licences allow commercial use."""
    return {side: ", ".join(model.name for model in catalogue.open_set(role)) for side, role in ROLES.items()}


def texts(config: ComparisonConfig) -> dict[str, Any]:
    """The values of a config as the form shows them and the notebook's parameters say them."""
    values = {name: getattr(config, name) for name in type(config).model_fields}
    for side, switch in SIDES.items():
        chosen = getattr(config, side)
        values[switch] = getattr(config, switch, bool(chosen) and all(model.load_in_4bit for model in chosen))
        values[side] = ", ".join(model.name for model in chosen)
    return values | {"baselines": ", ".join(config.baselines)}


def from_record(values: Mapping[str, Any]) -> ComparisonConfig | None:
    """The config of a record; None where this version understands it no more."""
    try:
        return ComparisonConfig(
            **{name: value for name, value in values.items() if name in ComparisonConfig.model_fields}
        )
    except (ValidationError, TypeError):
        return None


def form_of(config: ComparisonConfig) -> ComparisonForm | None:
    """What a form says of a config; None where its models have settings of their own, which no form says."""
    made = ComparisonForm(**texts(config))
    return made if made.comparison() == config else None


# the same comparison elsewhere ----------------------------------------------------------------------------------------


def plain_config(config: ComparisonConfig) -> dict[str, Any]:
    """The fields that are not at their default, as a config file says them: a model without settings by its name."""
    found = equivalents.changed(config)
    for side in SIDES.keys() & found.keys():
        found[side] = [_short(model) for model in getattr(config, side)]
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _short(model: ModelInstanceConfig) -> Any:
    found = equivalents.changed(model)
    return model.name if set(found) == {"name"} else found


def command_lines(config: ComparisonConfig, run_dir: str | None = None) -> dict[str, str]:
    """`nbhelpers compare run ...`: gives the same config. Models with settings of their own need a file."""
    words, found = ["nbhelpers", "compare", "run"], plain_config(config)
    lines: dict[str, str] = {}
    if any(not isinstance(model, str) for side in SIDES for model in found.get(side, ())):
        lines["comparison.yaml"] = yaml.safe_dump(found, sort_keys=False, default_flow_style=None, width=110)
        words += ["--config", "comparison.yaml"]
        found = {}
    for name, value in found.items():
        option = {"llm_models": "--model-llm", "slm_models": "--model-slm"}.get(name, f"--{name.replace('_', '-')}")
        if name == "cache":
            words.append("--force-recompute")
        elif name in SIDES:
            words += [word for model in value for word in (option, model)]
        elif isinstance(value, bool):
            words.append(option)  # every switch but cache is off by default
        else:
            words += [option, ",".join(value) if isinstance(value, list) else str(value)]
    words += ["--out", run_dir, "--resume"] if run_dir else []
    return lines | {"command line": shlex.join(words)}


def python_lines(config: ComparisonConfig, run_dir: str | None = None) -> str:
    """Lines that run the same from Python."""
    arguments = ", ".join(f"{name}={value!r}" for name, value in plain_config(config).items())
    going_on = f", run_dir={run_dir!r}, resume=True" if run_dir else ""
    return (
        "from nbhelpers.comparison import Comparison, ComparisonConfig\n"
        f"config = ComparisonConfig({arguments})\nresult = Comparison.run(config{going_on})"
    )


def papermill_line(config: ComparisonConfig, notebook: str, own: Sequence[str], resume: str | None = None) -> str:
    """The notebook with this form in its parameters; fields without a parameter of their own travel in `more`."""
    words = ["papermill", f"{notebook}.ipynb", f"{notebook}-done.ipynb", "-k", "python3"]
    if resume:
        return shlex.join([*words, "-p", "resume", resume])
    values, defaults = texts(config), texts(ComparisonForm())
    words += [word for name in own if values[name] is not None for word in ("-p", name, str(values[name]))]
    none = [f"{name}: null" for name in own if values[name] is None]
    rest = {name: value for name, value in values.items() if name not in own and value != defaults[name]}
    extra = [*none, *([f"more: {json.dumps(rest)}"] if rest else [])]
    return shlex.join([*words, *(["-y", "\n".join(extra)] if extra else [])])


# earlier runs ---------------------------------------------------------------------------------------------------------


def twin(config: ComparisonConfig, runs: Sequence[Run]) -> Run | None:
    """A finished run of this very config: its answers are there already, where nothing else has changed."""
    return next((run for run in runs if run.status == "finished" and from_record(run.config) == config), None)


def seconds_before(config: ComparisonConfig, runs: Sequence[Run]) -> dict[str, float] | None:
    """Seconds of each state by its key, as the newest run of the same models, rows and epochs here measured them."""
    same = ("data", "labels", "max_eval_samples", "max_train_samples", "epochs")
    same += ("answers", "method", "device", "batch_size")
    for run in runs:
        before = from_record(run.config) if run.status == "finished" else None
        if before is None or any(getattr(before, name) != getattr(config, name) for name in same):
            continue
        phases = [phase for phase in run.result["phases"] if phase.get("came") == "measured"]
        if set(comparison_live.planned(config)) <= {phase["model"] for phase in phases}:
            return {phase["model"]: phase["seconds"] for phase in phases}
    return None


def label(run: Run) -> str:
    if run.result is None:
        return f"{run.folder.name} ({run.status}: go on)"
    return f"{run.folder.name} ({(run.result.get('answer') or {}).get('answer', 'finished')})"
