"""Which mask does a run want, and was it made before? One ranking of the weights serves all sparsities of a sweep.

Masks of the usual sparsities and of all others of a plan are made together, nested, from one scoring, and kept beside
the run directories under everything that decides them: the model's files, importance, pattern, scope, seed, and where
the importance looks at data the fingerprint of the calibration rows: the scores of one task never serve another.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nbhelpers import calibration, channels, facts, importance, mask_files, mask_statistics, masks, models, records
from nbhelpers.facts import Fact
from nbhelpers.mask_patterns import SCOPES
from nbhelpers.mask_selection import MOST_LEVELS
from nbhelpers.projections import projections

FORMAT = 1  # of the code that scores and selects: a new number makes every kept set an old one
FOLDER = ".masks"  # beside the run directories
IMPORTANCES = tuple(importance.IMPORTANCE)
USUAL = tuple(tenth / 10 for tenth in range(1, 10))
GROUP = 4  # M of N:M
log = logging.getLogger(__name__)
HELD_BYTES = 2**30  # of the sets that a process keeps in memory, the last one whatever its size
_held: dict[str, masks.Levels] = {}  # the sets that were used last


@dataclass(frozen=True)
class Wanted:
    """What decides which weights go first."""

    pattern: str
    importance: str
    scope: str
    dimension: str
    seed: int

    @classmethod
    def of(cls, config: Any) -> Wanted:
        """scope, where the pattern knows it; N:M compares within its groups. seed: 0 where it decides nothing."""
        scope = SCOPES["nm"][0] if config.pattern == "nm" else config.scope
        seeded = config.importance == "random" or importance.needs_data(config.importance)
        return cls(config.pattern, config.importance, scope, config.dimension, config.seed if seeded else 0)


@dataclass(frozen=True)
class Chosen:
    """The mask of one sparsity out of a set. came: "measured", or "cached" where the set was made before."""

    levels: masks.Levels
    sparsity: float
    wanted: Wanted
    scored_on: str | None  # fingerprint of the calibration rows
    came: str

    @property
    def mask(self) -> Mapping[str, Any]:
        return self.levels.lazily(self.sparsity)

    @cached_property
    def alone(self) -> masks.Levels:
        """This mask alone, one bit a weight."""
        return masks.pack(self.mask)

    @cached_property
    def sha256(self) -> str:
        """That of a file that holds this mask and nothing else."""
        return mask_files.sha256(self.alone)

    def apply(self, model: nn.Module) -> None:
        masks.apply(model, self.mask)

    def fact(self, model: nn.Module) -> Fact:
        """Exactly as many weights (rows, channels) go as were asked for, counted on the mask itself."""
        counted = _groups(self, model)
        if self.wanted.scope == "global":  # what counts is exact in all of them together
            gone, whole, of, _ = map(sum, zip(*counted.values(), strict=True))
            counted = {"all": (gone, whole, of, 1)}
        wanted = {name: masks.count(self.sparsity, of) for name, (_, _, of, _) in counted.items()}
        wrong = [name for name, (gone, whole, *_) in counted.items() if gone != wanted[name] or gone != whole]
        wrong += _torn_channels(self, model)
        gone = sum(gone * times for gone, _, _, times in counted.values())
        asked = sum(wanted[name] * times for name, (*_, times) in counted.items())
        total = sum(of * times for _, _, of, times in counted.values())
        return Fact(
            "mask_leaves_out_as_many_as_asked",
            not wrong and bool(counted),
            "the mask leaves out exactly as many as the sparsity says",
            f"{gone:,} of {total:,} {self._unit}, asked {asked:,}" + (f", wrong in {wrong[0]}" if wrong else ""),
            {"gone": gone, "asked": asked, "unit": self._unit, "wrong": wrong[:3]},
        )

    @property
    def _unit(self) -> str:
        return {"structured": self.wanted.dimension}.get(self.wanted.pattern, "weights")

    def holds_in(self, model: nn.Module) -> Fact:
        return facts.mask_holds(model, self.mask)

    def record(self) -> dict[str, Any]:
        (counted,) = mask_statistics.counts_of_levels(self.alone)
        layers = counted["per_layer"].items()  # a list: tables of runs make a column of every number in a mapping
        return {
            "sha256": self.sha256,
            "sparsity": counted["sparsity"],
            "masked": counted["gone"],
            "numbers": counted["numbers"],
            "of": "weights of the covered projections",
            "estimator": importance.estimator(self.wanted.importance),
            "scored_on": self.scored_on,
            "came": self.came,
            **{name: value for name, value in vars(self.wanted).items() if name != "importance"},
            "per_layer": [{"name": n, "numbers": one["numbers"], "gone": one["gone"]} for n, one in layers],
        }


def chosen(
    model: nn.Module,
    wanted: Wanted,
    sparsity: float,
    rows: Sequence[dict],
    *,
    folder: Path,
    model_files: Any = None,
    others: Iterable[float] = (),
    should_stop: Callable[[], bool] | None = None,
) -> Chosen:
    """The mask of this sparsity, from the set that was made before or a new one.

    rows: what an importance that looks at data is scored on. model_files: what identifies the model's weights where
    that is cheaper than to read them all: sha256 of its files. folder: where sets are kept. others: the sparsities that
    a plan asks of the same ranking: one scoring serves them all where each of its jobs names the same ones.
    """
    looks = importance.needs_data(wanted.importance)
    scored_on = calibration.fingerprint(rows) if looks else None
    weight = next(model.parameters())
    content = {"format": FORMAT, "model": model_files or models.fingerprint(model), **vars(wanted)}
    content |= {
        "dtype": str(weight.dtype),
        "device": weight.device.type,
        "sparsities": _together(wanted, sparsity, others),
    }
    key = records.sha256_json(content | {"scored_on": scored_on})
    path = folder / f"{key}.safetensors"
    if key in _held:
        _held[key] = _held.pop(key)  # the last one to go
        return Chosen(_held[key], sparsity, wanted, scored_on, "cached")
    came = "measured"
    if path.is_file():
        levels, came = mask_files.load(path, model).levels, "cached"
    else:
        levels = _made(model, wanted, content["sparsities"], rows if looks else None, should_stop)
        folder.mkdir(parents=True, exist_ok=True)
        mask_files.save(path, levels, importance=wanted.importance, seed=wanted.seed)
    _held[key] = levels
    while len(_held) > 1 and sum(map(_bytes, _held.values())) > HELD_BYTES:
        _held.pop(next(iter(_held)))
    return Chosen(levels, sparsity, wanted, scored_on, came)


def _made(model, wanted: Wanted, sparsities, rows, should_stop) -> masks.Levels:
    log.info("scoring weights by %s", wanted.importance)
    options = {"pattern": wanted.pattern, "scope": wanted.scope}
    options |= {"dimension": wanted.dimension} if wanted.pattern == "structured" else {}
    options |= {"group": GROUP} if wanted.pattern == "nm" else {}
    if wanted.importance == "magnitude":
        return masks.create(model, masks.weights(model), sparsities, absolute=True, **options)

    def scores():
        return importance.scores(model, wanted.importance, rows, seed=wanted.seed, should_stop=should_stop)

    again = wanted.pattern == "unstructured" and wanted.scope == "global"
    held = dict(scores()) if again and rows is not None else scores
    return masks.create(model, held, sparsities, **options)


def _bytes(levels: masks.Levels) -> int:
    return sum(packed.numel() for packed in levels.packed.values())


def in_sets(pattern: str, sparsities: Iterable[float]) -> list[list[float]]:
    """The sparsities asked of one ranking, in the sets that they are made in, each from a scoring of its own: a single
    one with the usual sparsities where it can hold them all, else as few as hold what is asked. 0 is in none."""
    asked = sorted({float(sparsity) for sparsity in sparsities} - {0.0})
    whole = sorted({*_usual(pattern), *asked})
    if len(whole) <= MOST_LEVELS:
        return [whole]
    return [asked[first : first + MOST_LEVELS] for first in range(0, len(asked), MOST_LEVELS)]


def _usual(pattern: str) -> list[float]:
    return [n / GROUP for n in range(1, GROUP)] if pattern == "nm" else list(USUAL)


def _together(wanted: Wanted, sparsity: float, others: Iterable[float]) -> list[float]:
    """The sparsities of the set that this one belongs to."""
    if sparsity == 0:
        return [0.0, *_usual(wanted.pattern)]
    return next(found for found in in_sets(wanted.pattern, [sparsity, *others]) if float(sparsity) in found)


def _groups(found: Chosen, model: nn.Module) -> dict[str, tuple[int, int, int, int]]:
    """By what counts are exact in: (groups of which something goes, that go as a whole, of so many, how often that is
    there). A group is a weight, or of pattern structured a row, column or channel."""
    counted: dict[str, tuple[int, int, int, int]] = {}
    structured = found.wanted.pattern == "structured"
    reads = _columns(found.wanted, model)
    for one in projections(model, accept_low_coverage=True).covered:
        if structured and one.name not in reads:
            continue
        gone = one.as_matrix(~found.mask[one.name])
        for number, matrix in enumerate(gone if gone.ndim == 3 and structured else [gone]):
            name = f"{one.name}[{number}]" if gone.ndim == 3 and structured else one.name
            if structured:
                matrix = matrix.t() if reads[one.name] else matrix
                counted[name] = (int(matrix.any(1).sum()), int(matrix.all(1).sum()), len(matrix), 1)
            elif found.wanted.scope in ("row", SCOPES["nm"][0]):  # each row, or each group of M along the inputs
                together = GROUP if found.wanted.pattern == "nm" else matrix.shape[-1]
                counts, of = matrix.reshape(-1, together).sum(1).unique(return_counts=True)
                for count, times in zip(counts.tolist(), of.tolist(), strict=True):
                    counted[f"{name}, {times} of {together} losing {count}"] = (count, count, together, times)
            else:
                total = int(matrix.sum())
                counted[name] = (total, total, matrix.numel(), 1)
    return counted


def _torn_channels(found: Chosen, model: nn.Module) -> list[str]:
    """Projections that write MLP channels of which other ones go than are read no more."""
    if found.wanted.pattern != "structured" or found.wanted.dimension != "channels":
        return []
    by_name = {one.name: one for one in projections(model, accept_low_coverage=True).covered}
    torn = []
    for block in channels.coupled(model):
        *ups, down = block
        read = _experts(by_name[down].as_matrix(~found.mask[down])).all(1)
        for name in ups:
            rows = _experts(by_name[name].as_matrix(~found.mask[name]))
            asked = read.repeat(1, block[name])
            if not torch.equal(rows.any(2), asked) or not torch.equal(rows.all(2), asked):
                torn.append(name)
    return torn


def _experts(matrix: torch.Tensor) -> torch.Tensor:
    return matrix if matrix.ndim == 3 else matrix[None]


def load_for(path: Path, name: str, model: nn.Module, *, any_weights: bool = False) -> mask_files.MaskFile:
    """Masks out of a file for the model of this name, just loaded. ValueError where they were made for other weights:
    by the model's files where both are known, so that its number format does not matter, or by its weights."""
    found = mask_files.load(path, model, same_weights=False)
    wanted, here = found.header.get("model_files"), models.revision(name)
    if any_weights or (None not in (wanted, here) and records.sha256_json(here) == wanted):
        return found
    weights = found.header["model_fingerprint"]
    if models.fingerprint(model) == weights or (weights is None and None in (wanted, here)):
        return found
    other = "weights" if None in (wanted, here) else "files"
    raise ValueError(
        f"mask file '{path}' is for a model with other {other} than {name!r}: name the model that it was made of "
        f"({found.header.get('model')!r}), or mask this one all the same with nbhelpers masks apply --any-weights"
    )


def _columns(wanted: Wanted, model: nn.Module) -> dict[str, bool]:
    """Name of each projection that has groups -> whether its groups are columns. Of channels those that read them."""
    if wanted.dimension == "channels":
        return {list(block)[-1]: True for block in channels.coupled(model)}
    return {one.name: wanted.dimension == "inputs" for one in projections(model, accept_low_coverage=True).covered}


def release() -> None:
    """Forget the set that is held in memory."""
    _held.clear()
