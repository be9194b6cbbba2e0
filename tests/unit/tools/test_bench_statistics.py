"""Percentiles against NumPy, and a bounded sample that stays fair."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.tools.bench.statistics import Samples, percentile

numbers = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50)


@settings(deadline=None)
@given(numbers, st.floats(0.0, 1.0))
def test_percentiles_are_those_of_numpy(values: list[float], fraction: float) -> None:
    expected = float(np.quantile(np.array(values), fraction))
    assert percentile(sorted(values), fraction) == pytest.approx(expected, abs=1e-6)


@settings(deadline=None)
@given(numbers)
def test_a_summary_is_exact_while_there_is_room(values: list[float]) -> None:
    one_by_one, at_once = Samples(), Samples()
    for value in values:
        one_by_one.add(value)
    at_once.extend(values)
    for samples in (one_by_one, at_once):
        summary = samples.summary()
        assert summary is not None
        assert summary.count == len(values)
        assert summary.mean == pytest.approx(math.fsum(values) / len(values), abs=1e-6)
        assert summary.max == max(values)
        assert summary.p50 == pytest.approx(float(np.median(values)), abs=1e-6)
        assert summary.p50 <= summary.p90 <= summary.p95 <= summary.p99 <= summary.max


def test_no_samples_have_no_summary() -> None:
    samples = Samples()
    samples.extend([])
    assert samples.summary() is None


def test_past_its_limit_a_sample_stands_for_all_and_the_sums_stay_exact() -> None:
    samples = Samples(samples_max=2_000, seed=1)
    values = [float(number) for number in range(100_000)]
    samples.extend(values[:1_500])
    samples.extend(values[1_500:])
    summary = samples.summary()
    assert summary is not None
    assert (summary.count, summary.max) == (100_000, 99_999.0)
    assert summary.mean == pytest.approx(49_999.5)
    # The p-quantile of n uniform draws has a standard deviation of sqrt(p(1-p)/n), here 1.1 %.
    assert summary.p50 == pytest.approx(50_000, abs=6_000)
    assert summary.p90 == pytest.approx(90_000, abs=4_000)


def test_equal_seeds_choose_equal_samples() -> None:
    first, second = Samples(samples_max=10, seed=3), Samples(samples_max=10, seed=3)
    for value in range(1_000):
        first.add(float(value))
    second.extend([float(value) for value in range(1_000)])
    assert first.summary() == second.summary()
