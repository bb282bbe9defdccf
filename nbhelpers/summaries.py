"""What was every metric like over a run: count, min, max, mean, std, last? Counted as it is logged, never read again.

Standard library only.
"""

from __future__ import annotations

from math import isfinite, sqrt
from typing import Any

from nbhelpers.records import restore
from nbhelpers.run_config import MEASURES, MetricsSnapshot


class _Running:
    """Count, mean and spread of numbers, one at a time (Welford 1962)."""

    __slots__ = ("count", "high", "low", "mean", "not_finite", "square")

    def __init__(self) -> None:
        self.count, self.not_finite = 0, 0
        self.mean = self.square = 0.0
        self.low, self.high = float("inf"), float("-inf")

    def add(self, value: float) -> None:
        if not isfinite(value):
            self.not_finite += 1
            return
        self.count += 1
        step = value - self.mean
        self.mean += step / self.count
        self.square += step * (value - self.mean)
        if value < self.low:
            self.low = value
        if value > self.high:
            self.high = value

    def join(self, other: _Running) -> None:
        """Add all that `other` saw (Chan, Golub and LeVeque 1979)."""
        self.not_finite += other.not_finite
        if not other.count:
            return
        total, step = self.count + other.count, other.mean - self.mean
        self.square += other.square + step * step * self.count * other.count / total
        self.mean += step * other.count / total
        self.count = total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)

    def to_dict(self, last: Any) -> dict[str, Any]:
        some = self.count > 0
        return {
            "count": self.count,
            "min": self.low if some else None,
            "max": self.high if some else None,
            "mean": self.mean if some else None,
            "std": sqrt(self.square / (self.count - 1)) if self.count > 1 else None,
            "last": last,
            **({"not_finite_count": self.not_finite} if self.not_finite else {}),
        }


class Summaries:
    """Of every metric, under `stage/name` where it has a stage.

    min, max, mean, std: over the finite values; std: sample standard deviation (n - 1), None for one value.
    `not_finite_count`: values that were NaN or infinite, where there were any. Steps of earlier attempts that are done
    again count once, as the later attempt logged them.
    """

    def __init__(self) -> None:
        self._running: dict[str, _Running] = {}
        self._last: dict[str, Any] = {}
        self._best: dict[str, dict[str, Any]] = {}
        self._earlier: dict[tuple[str | None, int], dict[str, Any]] = {}

    def add_earlier(self, snapshot: MetricsSnapshot) -> None:
        """A step of an attempt before this one, each once."""
        named = _named(snapshot)
        self._earlier[snapshot.stage, snapshot.iteration] = named
        self._last.update(named)

    def add(self, snapshot: MetricsSnapshot) -> None:
        if self._earlier:
            self._earlier.pop((snapshot.stage, snapshot.iteration), None)
        named = _named(snapshot)
        self._last.update(named)
        _count(self._running, named)
        _keep_best(self._best, named, snapshot.stage, snapshot.iteration)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """{"last": {name: value}, "best": {val_loss: {"value", "iteration"}}, "metrics": {name: {...}}}."""
        together: dict[str, _Running] = {}
        best: dict[str, dict[str, Any]] = {}
        for (stage, iteration), named in self._earlier.items():
            _count(together, named)
            _keep_best(best, named, stage, iteration)
        for name, running in self._running.items():
            together.setdefault(name, _Running()).join(running)
        for name, found in self._best.items():
            if name not in best or found["value"] < best[name]["value"]:
                best[name] = dict(found)
        metrics = {name: together[name].to_dict(value) for name, value in self._last.items() if name in together}
        return {"last": dict(self._last), "best": best, "metrics": metrics}


def _named(snapshot: MetricsSnapshot) -> dict[str, Any]:
    prefix = f"{snapshot.stage}/" if snapshot.stage else ""
    named = {}
    for key in MEASURES:
        value = getattr(snapshot, key)
        if value is not None:
            named[prefix + key] = value
    for key, value in snapshot.metrics.items():
        named[prefix + key] = value
    return named


def _count(running: dict[str, _Running], named: dict[str, Any]) -> None:
    for name, value in named.items():
        if type(value) in (int, float):
            found = running.get(name)
            if found is None:
                found = running[name] = _Running()
            found.add(value)


def _keep_best(best: dict[str, dict[str, Any]], named: dict[str, Any], stage: str | None, iteration: int) -> None:
    name = f"{stage}/val_loss" if stage else "val_loss"
    loss = named.get(name)
    if loss is not None and loss == loss and (name not in best or loss < best[name]["value"]):
        best[name] = {"value": float(loss), "iteration": iteration}


def summary_text(summary: dict[str, Any]) -> str:
    """A tracker's summary for people, one fact a line."""
    summary = restore(summary)
    facts = {key: value for key, value in summary.items() if key not in ("last", "best", "metrics")}
    facts |= {f"last {key}": value for key, value in summary["last"].items()}
    for key, found in summary["metrics"].items():
        if found["count"] > 1:
            spread = f"{found['mean']:.6g} ± {found['std']:.3g}, {found['min']:.6g} to {found['max']:.6g}"
            facts[f"mean {key}"] = f"{spread} ({found['count']} values)"
    for key, found in summary["best"].items():
        facts[f"best {key}"] = f"{found['value']} at iteration {found['iteration']}"
    width = max(map(len, facts))
    return "\n".join(f"{key:<{width}}  {value}" for key, value in facts.items())
