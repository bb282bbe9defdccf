"""Which kinds of jobs can stand in a plan? Each is registered here; what is heavy is imported when it is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nbhelpers.grid import KINDS, JobKind
from nbhelpers.records import sha256_file

STAGES = ("baseline", "pruned", "fine_tuned", "control")


@KINDS.register("pruning")
def pruning() -> JobKind:
    """Baseline, heads closed, fine-tuned, beside a control: experiments.PruningExperiment."""
    from nbhelpers.experiments import PruningConfig, PruningExperiment

    return JobKind(
        config=PruningConfig,
        run=PruningExperiment.run,
        resolve=_resolved_pruning,
        fingerprint=lambda config: {"model": _model_files(config.model), "text": _text_file(config.text)},
        similar=lambda config: [config[name] for name in ("model", "strategy", "iterative", "steps", "control")],
        estimate=_pruning_seconds,
        columns=pruning_columns,
    )


def _resolved_pruning(config) -> dict[str, Any]:
    """The config without its name, and with one value where several mean the same computation."""
    from nbhelpers.experiments import LEARNING_RATES

    values = config.model_dump(exclude={"name"})
    values["learning_rate"] = config.learning_rate or LEARNING_RATES[config.method]
    if not config.iterative:
        values["heads_per_round"] = None
    if not config.steps:
        values |= dict.fromkeys(("method", "learning_rate", "batch_size", "control"))
    return values


def _pruning_seconds(config) -> float | None:
    from nbhelpers.durations import pruning_phases

    try:
        return sum(pruning_phases(config).values())
    except LookupError:  # a text on the hub: how much there is to do is not known yet
        return None


def pruning_columns(result: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of one pruning run; None where a stage was not run."""
    found = {f"{stage}_perplexity": (result.get(stage) or {}).get("perplexity") for stage in STAGES}
    for name in ("recovery_percent", "improvement_percent", "all_facts_hold"):
        found[name] = result.get(name)
    heads = result.get("pruned_heads")
    return found | {"pruned_heads": None if heads is None else len(heads), "total_heads": result.get("total_heads")}


def _text_file(source: str) -> str | None:
    """sha256 of a text that is a file here; None for what its name alone decides."""
    path = Path(source).expanduser()
    return _sha256(str(path), _mark(path)) if path.is_file() else None


def _model_files(name: str) -> dict[str, str] | None:
    """sha256 of the files of a model that lies here; None for a hub id, whose revision is known once it is loaded."""
    from nbhelpers.models import locate

    try:
        source, location = locate(name)
    except (LookupError, ValueError):  # said by the job itself, so that the other jobs of the plan go on
        return None
    if source == "hub":
        return None
    files = sorted(path for path in Path(location).iterdir() if path.suffix in (".json", ".safetensors", ".bin"))
    return {path.name: _sha256(str(path), _mark(path)) for path in files}


def _mark(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@lru_cache
def _sha256(path: str, mark: tuple[int, int]) -> str:
    return sha256_file(path)
