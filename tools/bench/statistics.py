"""Percentiles of many samples in bounded memory. Pure; randomness comes from a seed."""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random
from typing import Final

SAMPLES_MAX: Final = 1_000_000
"""How many samples are kept exactly; beyond that a uniform sample of this size stands for all."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What a set of samples looks like, in the samples' unit."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


def percentile(ordered: Sequence[float], fraction: float) -> float:
    """The value below which ``fraction`` of the samples lie, by linear interpolation.

    ``ordered`` is sorted and not empty. The definition is number 7 of Hyndman and Fan, "Sample
    Quantiles in Statistical Packages" (1996), as NumPy's default.
    """
    assert ordered, "no percentile of nothing"
    assert 0.0 <= fraction <= 1.0, fraction
    position = (len(ordered) - 1) * fraction
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


class Samples:
    """Collects numbers; count, mean and maximum are exact, percentiles exact up to samples_max.

    Past that it keeps a uniform random sample: algorithm L of Li, "Reservoir-Sampling Algorithms
    of Time Complexity O(n(1+log(N/n)))" (1994), which draws a number only for those it takes.
    """

    __slots__ = (
        "_count",
        "_max",
        "_next_taken",
        "_random",
        "_samples_max",
        "_sum",
        "_values",
        "_w",
    )

    def __init__(self, *, samples_max: int = SAMPLES_MAX, seed: int = 0) -> None:
        assert samples_max > 0, samples_max
        self._values = array("d")
        self._samples_max = samples_max
        self._count = 0
        self._sum = 0.0
        self._max = -math.inf
        self._random = Random(seed)  # noqa: S311 - it chooses samples, it keeps no secret
        self._w = 1.0
        self._next_taken = samples_max - 1

    def add(self, value: float) -> None:
        """Take one sample."""
        self._count += 1
        self._sum += value
        self._max = max(self._max, value)
        if len(self._values) < self._samples_max:
            self._values.append(value)
            if len(self._values) == self._samples_max:
                self._skip()
        elif self._count - 1 == self._next_taken:
            self._values[self._random.randrange(self._samples_max)] = value
            self._skip()

    def extend(self, values: Sequence[float]) -> None:
        """Take many samples; cheaper than one by one while there is room."""
        if values and len(self._values) + len(values) < self._samples_max:
            self._count += len(values)
            self._sum += sum(values)
            self._max = max(self._max, *values)
            self._values.extend(values)
            return
        for value in values:
            self.add(value)

    def _skip(self) -> None:
        """Draw the index of the next sample that enters the full reservoir."""
        # 1 - random() lies in (0, 1], so its logarithm exists.
        self._w *= math.exp(math.log(1.0 - self._random.random()) / self._samples_max)
        # A weight of exactly one (a draw of zero) takes the very next sample.
        skipped = (
            0
            if self._w >= 1.0
            else math.floor(math.log(1.0 - self._random.random()) / math.log1p(-self._w))
        )
        self._next_taken += skipped + 1

    def summary(self) -> Summary | None:
        """The figures, or None where no sample came."""
        if not self._count:
            return None
        ordered = sorted(self._values)
        p50, p90, p95, p99 = (percentile(ordered, f) for f in (0.50, 0.90, 0.95, 0.99))
        return Summary(self._count, self._sum / self._count, p50, p90, p95, p99, self._max)
