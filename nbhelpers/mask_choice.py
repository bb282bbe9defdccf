"""Which weights shall go, and which mask is that? The fields of configs that mask a model, and the mask they name.

A mask is chosen here by importance, or read from a file that `nbhelpers masks create` wrote.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import nn

from nbhelpers import facts, importance, mask_files, mask_sets, mask_statistics, masks, models
from nbhelpers.facts import Fact
from nbhelpers.mask_patterns import SCOPES
from nbhelpers.projections import projections
from nbhelpers.registry import unknown

Sparsity = Annotated[float, Field(ge=0, le=1, description="share of the projections' weights that go, 0-1")]
Pattern = Annotated[
    Literal["unstructured", "structured", "nm"],
    Field(description="single weights, whole rows, or N kept of M along the inputs"),
]
Importance = Annotated[str, Field(description=f"one of {', '.join(mask_sets.IMPORTANCES)}")]
Scope = Annotated[
    Literal["layer", "row", "global"],
    Field(description="weights are compared within a projection, an output row, or the whole model"),
]
Dimension = Annotated[
    Literal["outputs", "inputs", "channels"],
    Field(description="what goes as a whole (structured): output rows, input columns, MLP channels"),
]
Mode = Annotated[
    Literal["sparse_to_dense", "sparse_to_sparse"],
    Field(description="whether what is learned may fill the zeros again"),
]
CalibrationRows = Annotated[
    int, Field(ge=1, description="training rows that weights are scored on, where it needs data")
]
FIELDS = ("sparsity", "pattern", "importance", "scope", "dimension", "calibration_rows")  # that choose a mask


def check_fields(config: Any) -> None:
    """ValueError, LookupError: the fields that choose a mask contradict each other."""
    importance.needs_data(config.importance)  # LookupError for one that there is not
    if getattr(config, "masks", None) is not None:
        how, fields = ("pattern", "importance", "scope", "dimension"), type(config).model_fields
        given = [name for name in how if getattr(config, name) != fields[name].default]
        if given:
            raise ValueError(f"masks names a mask that is there, so {', '.join(given)} decides nothing: leave one out")
    sparsity, pattern = config.sparsity or 0.0, config.pattern
    if pattern == "nm" and (masks.exact(sparsity) * mask_sets.GROUP).denominator != 1:
        raise ValueError(
            f"pattern 'nm' leaves out a whole number of each {mask_sets.GROUP} weights: sparsity must be a "
            f"multiple of {1 / mask_sets.GROUP:g}, got {sparsity:g}"
        )
    if pattern != "nm" and config.scope not in SCOPES[pattern]:
        raise ValueError(unknown(f"scope of pattern {pattern!r}", config.scope, SCOPES[pattern]))
    if config.dimension != "outputs" and pattern != "structured":
        raise ValueError(f"dimension is of pattern 'structured', got {config.dimension!r} with {pattern!r}")


def check_rows(config: Any, rows: int) -> None:
    """ValueError where weights would be scored on fewer rows than asked for; `rows`: how many there are."""
    if importance.needs_data(config.importance) and rows < config.calibration_rows:
        raise ValueError(
            f"calibration_rows must be at most the {rows} training rows there are, got {config.calibration_rows}"
        )


@dataclass(frozen=True)
class Choice:
    """A mask and how it came about. level: the sparsity that was asked for; facts: of its counts, where somebody asked
    for a number; record: plain values."""

    level: float
    mask: Mapping[str, torch.Tensor]
    sha256: str
    record: Mapping[str, Any]
    facts: tuple[Fact, ...] = ()


def choose(
    model: nn.Module,
    config: Any,
    sparsity: float | None,
    rows: Sequence[dict],
    *,
    folder: Path,
    should_stop: Callable[[], bool] | None = None,
) -> Choice:
    """The mask that `config` asks for (FIELDS, masks, model, seed), for its model just loaded.

    sparsity: None only for a mask file that holds a single one. rows: what an importance that looks at data is scored
    on; folder: where sets of masks are kept for the next run. Errors as of `stored`.
    """
    if config.masks is not None:
        return stored(model, config.model, config.masks, sparsity)
    found = mask_sets.chosen(
        model,
        mask_sets.Wanted.of(config),
        sparsity,
        rows,
        folder=folder,
        model_files=models.revision(config.model),
        should_stop=should_stop,
    )
    record = found.record() | {"importance": config.importance} | coverage(model, found.alone)
    return Choice(sparsity, found.mask, found.sha256, record, (found.fact(model),))


def stored(model: nn.Module, name: str, path: str | Path, sparsity: float | None = None) -> Choice:
    """The mask of a file, or of the folder it lies in, for the model `name` that was just loaded.

    sparsity: which of the file's; None = the only one. LookupError: no such file or sparsity. ValueError: broken, or
    made for other weights.
    """
    file = mask_sets.load_for(file_in(path), name, model)
    mask = file.levels.lazily(sparsity)
    alone = masks.pack(mask)
    gone = sum(count for (count,) in alone.gone().values())
    record = {
        "sha256": mask_files.sha256(alone),
        "sparsity": gone / alone.numbers,
        "masked": gone,
        "numbers": alone.numbers,
        "of": "weights of the covered projections",
        "came": "stored",
        "file": str(path),
        "importance": file.header["importance"],
        **file.levels.how,
    }
    level = file.levels.sparsities[0] if sparsity is None else sparsity
    return Choice(level, mask, record["sha256"], record | coverage(model, alone))


def file_in(path: str | Path) -> Path:
    """The mask file itself, or the one in a folder. LookupError where there is none or more than one."""
    path = Path(path).expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise LookupError(f"mask file '{path}' does not exist; make one with nbhelpers masks create")
    found = [one for suffix in mask_files.SUFFIXES if (one := path / f"masks{suffix}").is_file()]
    if len(found) != 1:
        raise LookupError(f"'{path}' holds {len(found)} mask files (masks.safetensors, .pt, .npz): name one file")
    return found[0]


def level_in(path: str | Path, sparsity: float | None = None, option: str = "--sparsity") -> float:
    """The sparsity that is meant of a mask file, or the folder it lies in: this one, or its only one; no model needed.

    LookupError for one that it does not hold, and where it holds several and none is chosen, naming the `option`.
    """
    place = file_in(path)
    levels = mask_files.load(place).levels
    if sparsity is None and len(levels.sparsities) > 1:
        told = ", ".join(map(str, levels.sparsities))
        raise LookupError(f"mask file '{place}' holds the sparsities {told}: choose one with {option}")
    levels.lazily(sparsity)
    return levels.sparsities[0] if sparsity is None else sparsity


def coverage(model: nn.Module, alone: masks.Levels) -> dict[str, Any]:
    """How much of the model the mask reaches, and how many weights go in each projection."""
    (counted,) = mask_statistics.counts_of_levels(alone)
    layers = counted["per_layer"].items()  # a list: tables of runs make a column of every number in a mapping
    return {
        "coverage": alone.numbers / models.parameters(model),
        "covered": projections(model, accept_low_coverage=True).lines(),
        "per_layer": [{"name": n, "numbers": one["numbers"], "gone": one["gone"]} for n, one in layers],
    }


def holds(model: nn.Module, mask: Mapping[str, torch.Tensor], stage: str) -> Fact:
    """Every weight that the mask leaves out is zero in the model as it is at this stage."""
    says = f"{stage.replace('_', ' ')}: every weight that the mask leaves out is zero"
    return replace(facts.mask_holds(model, mask), name=f"mask_holds_{stage}", says=says)
