"""What goes into a run and what comes out of a step: its config, and one line of measures.

Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from nbhelpers.records import NOT_FINITE, plain, restore, sha256_json
from nbhelpers.registry import unknown


@dataclass(frozen=True, init=False, repr=False)
class ExperimentConfig:
    """Name, kind and any hyperparameters of a run, frozen all the way down; values must have a JSON form.

    >>> config = ExperimentConfig(name="x", learning_rate=1e-3)
    >>> config.learning_rate
    0.001
    """

    name: str
    kind: str
    hyperparameters: Mapping[str, Any]

    def __init__(self, name: str, kind: str = "experiment", **hyperparameters: Any) -> None:
        for label, value in (("name", name), ("kind", kind)):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{label} must be a text that is not empty, got {value!r}")
        for key in hyperparameters:
            if key.startswith("_") or key == NOT_FINITE or hasattr(type(self), key) or key == "hyperparameters":
                raise ValueError(f"hyperparameter {key!r} has a name that a config needs for itself: rename it")
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "kind", kind)
        object.__setattr__(self, "hyperparameters", _freeze(restore(plain(hyperparameters))))

    @classmethod
    def from_dict(cls, values: Any) -> ExperimentConfig:
        """The config of a mapping, a dataclass or a pydantic model with a `name`; the inverse of `to_dict`."""
        values = restore(plain(values))
        if not isinstance(values, dict) or "name" not in values:
            raise ValueError(f"a config needs a name, got {values!r}: pass ExperimentConfig(name=...)")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Name, kind and hyperparameters side by side, in strict JSON values."""
        return plain({"name": self.name, "kind": self.kind, **self.hyperparameters})

    @property
    def sha256(self) -> str:
        return sha256_json(self.to_dict())

    def __getattr__(self, key: str) -> Any:
        values = self.__dict__.get("hyperparameters", {})
        if key in values:
            return values[key]
        if key.startswith("__"):
            raise AttributeError(key)
        raise AttributeError(unknown("config field", key, ["name", "kind", *values]))

    def __repr__(self) -> str:
        inside = {"name": self.name, "kind": self.kind, **self.hyperparameters}
        return f"ExperimentConfig({', '.join(f'{key}={value!r}' for key, value in inside.items())})"

    def __hash__(self) -> int:
        return hash(self.sha256)

    def __reduce__(self) -> tuple:
        return ExperimentConfig.from_dict, (self.to_dict(),)


def _freeze(value: Any) -> Any:
    if isinstance(value, dict):
        return MappingProxyType({key: _freeze(inner) for key, inner in value.items()})
    return tuple(_freeze(inner) for inner in value) if isinstance(value, list) else value


@dataclass
class MetricsSnapshot:
    """One line of metrics.jsonl: the known measures, and anything else under its own name in `metrics`.

    wallclock_time: seconds since the start of the first attempt, time between attempts left out. A measure that was
    not taken is None and not written; 0.0 is a measure. `stage` keeps apart steps of several trainings in one run.
    """

    iteration: int
    gradient_step: int
    wallclock_time: float
    train_loss: float | None = None
    val_loss: float | None = None
    learning_rate: float | None = None
    tokens_per_sec: float | None = None
    iter_time_ms: float | None = None
    attempt: int = 1
    stage: str | None = None
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        known = {key: value for key, value in vars(self).items() if key != "metrics" and value is not None}
        return plain({**known, **self.metrics})

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> MetricsSnapshot:
        if NOT_FINITE in row:
            values = restore(dict(row))
        else:
            values = {key: restore(value) if type(value) in (dict, list) else value for key, value in row.items()}
        known = {key: values.pop(key) for key in list(values) if key in _SNAPSHOT_FIELDS}
        return cls(**known, metrics=values)


_SNAPSHOT_FIELDS = tuple(key for key in MetricsSnapshot.__dataclass_fields__ if key != "metrics")
MEASURES = ("train_loss", "val_loss", "learning_rate", "tokens_per_sec", "iter_time_ms")


def whole(name: str, value: Any) -> int:
    """`value` as an int; ValueError unless it is a whole number from 0 on, of any library."""
    number = plain(value)
    if not isinstance(number, int) or isinstance(number, bool) or number < 0:
        raise ValueError(f"{name} must be a whole number from 0 on, got {value!r}")
    return number
