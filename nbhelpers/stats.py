"""How sure are we: intervals over seeds (Student t) and over documents (bootstrap)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Interval:
    """A point estimate with its interval; `low` and `high` are None where one value alone gives none.

    mean: the mean, or the statistic that was asked for, of the values themselves (not of the resamples).
    n: how many values it rests on; over: what they are, "seeds" or "documents".
    """

    mean: float
    low: float | None
    high: float | None
    n: int
    over: str
    confidence: float = 0.95

    def __str__(self) -> str:
        if self.low is None:
            return f"{self.mean:.4g} (no interval: n = {self.n} {self.over})"
        return f"{self.mean:.4g} [{self.low:.4g}, {self.high:.4g}] ({self.confidence:.0%} over {self.n} {self.over})"


def digits(value: float) -> str:
    """Three significant digits for people: 1.90, 12.3, 128."""
    return f"{value:#.3g}".removesuffix(".")


def mean(values: Any) -> float:
    """Arithmetic mean of values: (n,), n >= 1."""
    if getattr(values, "ndim", 1) != 1:
        raise ValueError(f"mean takes one column, got rows of shape {tuple(values.shape)}: pass a statistic for them")
    return float(values.mean()) if hasattr(values, "mean") else math.fsum(values) / len(values)


def mean_interval(values: Sequence[float], confidence: float = 0.95, over: str = "seeds") -> Interval:
    """Mean and Student t interval: mean +- t(n - 1) * s / sqrt(n), with s the sample deviation (n - 1 below).

    values: (n,), one independent result a seed, finite. With n = 1 there is no interval.
    """
    _check(confidence, over)
    numbers = _finite(values)
    centre = mean(numbers)
    count = len(numbers)
    if count == 1:
        return Interval(centre, None, None, 1, over, confidence)
    deviation = math.sqrt(math.fsum((value - centre) ** 2 for value in numbers) / (count - 1))
    half = student_t_quantile((1 + confidence) / 2, count - 1) * deviation / math.sqrt(count)
    return Interval(centre, centre - half, centre + half, count, over, confidence)


def bootstrap(
    values: Any,
    statistic: Callable[[Any], float] = mean,
    seed: int = 0,
    n: int = 2000,
    confidence: float = 0.95,
    over: str = "documents",
) -> Interval:
    """Percentile bootstrap interval (Efron 1979) of `statistic`: `n` resamples of whole rows, with replacement.

    values: (documents,) or (documents, columns), finite; a ratio such as nats per token takes (documents, 2) rows of
    sums and divides inside `statistic`, which gets an array of the same shape. Same seed, same interval.
    """
    return _resampled((_array(values),), lambda rows: float(statistic(rows)), seed, n, confidence, over)


def paired_bootstrap_difference(
    a: Any,
    b: Any,
    statistic: Callable[[Any], float] = mean,
    seed: int = 0,
    n: int = 2000,
    confidence: float = 0.95,
    over: str = "documents",
) -> Interval:
    """Bootstrap interval of statistic(a) - statistic(b), where row i of both is the same document.

    Both are resampled with the same documents, so what they share cancels. An interval without 0 is a difference.
    """
    left, right = _array(a), _array(b)
    if len(left) != len(right):
        raise ValueError(f"paired values must have equal length, got {len(left)} and {len(right)}: pair them by row")
    return _resampled((left, right), lambda x, y: float(statistic(x)) - float(statistic(y)), seed, n, confidence, over)


def standard_error(values: Sequence[float]) -> float | None:
    """Sample standard deviation (n - 1 below) / sqrt(n), as lm-evaluation-harness reports it; None for one value."""
    numbers = _finite(values)
    if len(numbers) == 1:
        return None
    centre = mean(numbers)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in numbers) / (len(numbers) - 1) / len(numbers))


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p-value (McNemar 1947) that neither of two models is better on the documents where they differ.

    only_a: documents that only the first got right; only_b: that only the second did. Twice the smaller tail of a
    binomial with probability 1/2, at most 1; 1 where they never differ.
    """
    for name, count in {"only_a": only_a, "only_b": only_b}.items():
        if count < 0:
            raise ValueError(f"{name} must be at least 0, got {count}")
    total, smaller = only_a + only_b, min(only_a, only_b)
    tail = sum(math.comb(total, k) for k in range(smaller + 1))
    return min(1.0, 2 * tail / 2**total)


def _resampled(
    arrays: tuple, estimate: Callable[..., float], seed: int, n: int, confidence: float, over: str
) -> Interval:
    import numpy

    _check(confidence, over)
    if n < 1:
        raise ValueError(f"n must be at least 1 resample, got {n}: leave it at 2000")
    count = len(arrays[0])
    point = estimate(*arrays)
    if count == 1:
        return Interval(point, None, None, 1, over, confidence)
    generator = numpy.random.default_rng(seed)
    estimates = numpy.empty(n)
    for index in range(n):
        chosen = generator.integers(0, count, count)
        estimates[index] = estimate(*(array[chosen] for array in arrays))
    tail = (1 - confidence) / 2
    low, high = numpy.quantile(estimates, [tail, 1 - tail])
    return Interval(point, float(low), float(high), count, over, confidence)


def student_t_quantile(probability: float, degrees: float) -> float:
    """t with P(T <= t) = probability for Student's distribution; probability in (0, 1), degrees > 0."""
    if not 0 < probability < 1:
        raise ValueError(f"probability must be in (0, 1), got {probability}")
    if not degrees > 0:
        raise ValueError(f"degrees of freedom must be above 0, got {degrees}")
    if probability == 0.5:
        return 0.0
    if probability < 0.5:
        return -student_t_quantile(1 - probability, degrees)
    high = 1.0
    while _student_t_cdf(high, degrees) < probability:
        high *= 2
    low = 0.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _student_t_cdf(middle, degrees) < probability else (low, middle)
    return high


def _student_t_cdf(t: float, degrees: float) -> float:
    """P(T <= t) for t >= 0 by the regularised incomplete beta function (Abramowitz and Stegun 26.7.1)."""
    return 1 - 0.5 * _incomplete_beta(degrees / (degrees + t * t), degrees / 2, 0.5)


def _incomplete_beta(x: float, a: float, b: float) -> float:
    """Regularised I_x(a, b) by its continued fraction (Numerical Recipes 6.4, modified Lentz)."""
    if x in (0.0, 1.0):
        return x
    if x > (a + 1) / (a + b + 2):  # the fraction converges fast on the other side
        return 1 - _incomplete_beta(1 - x, b, a)
    front = math.exp(math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x))
    tiny = 1e-300
    c, d = 1.0, 1 / (1 - (a + b) * x / (a + 1) or tiny)
    fraction = d
    for m in range(1, 10_000):
        for step in (
            m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m)),
            -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1)),
        ):
            d = 1 / (1 + step * d or tiny)
            c = 1 + step / c or tiny
            fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            return front * fraction / a
    raise ArithmeticError(f"the incomplete beta function did not converge at x={x}, a={a}, b={b}")


def _check(confidence: float, over: str) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be in (0, 1), got {confidence}")
    if over not in ("seeds", "documents"):
        raise ValueError(f"over must be 'seeds' or 'documents', got {over!r}")


def _finite(values: Sequence[float]) -> list[float]:
    numbers = [float(value) for value in values]
    if not numbers:
        raise ValueError("an interval needs at least one value, got none")
    for index, number in enumerate(numbers):
        if not math.isfinite(number):
            raise ValueError(f"values must be finite, got {number} at index {index}: leave out failed runs by name")
    return numbers


def _array(values: Any) -> Any:
    import numpy

    rows = numpy.asarray(values, dtype=float)
    if rows.ndim == 0 or len(rows) == 0:
        raise ValueError("an interval needs at least one value, got none")
    if not numpy.isfinite(rows).all():
        index = int(numpy.argwhere(~numpy.isfinite(rows))[0][0])
        raise ValueError(f"values must be finite, got {rows[index]} at index {index}: leave out failed rows by name")
    return rows
