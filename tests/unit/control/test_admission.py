"""Admission: what is taken, what is refused, and when those who were refused should come back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.control.admission import (
    RATE_HALF_LIFE_S,
    RETRY_AFTER_MAX_S,
    RETRY_AFTER_MIN_S,
    Admission,
    AdmissionLimits,
    FinishRate,
    Refusal,
)

LIMITS = AdmissionLimits(requests_max=10, tokens_max=1000)


def refusal(
    admission: Admission, *, tokens: int = 1, waiting: int, tokens_waiting: int, now: float = 0.0
) -> Refusal | None:
    return admission.refusal(
        num_tokens=tokens, requests_waiting=waiting, tokens_waiting=tokens_waiting, now=now
    )


def finishing(rate_per_s: float, *, until: float) -> Admission:
    """An admission that has seen requests end at a steady rate."""
    admission = Admission(LIMITS)
    for number in range(int(rate_per_s * until)):
        admission.finish_rate.record(number / rate_per_s)
    return admission


@pytest.mark.parametrize(
    ("tokens", "waiting", "tokens_waiting"),
    [(1, 0, 0), (1, 9, 999), (1000, 0, 0), (500, 5, 500)],
)
def test_what_fits_is_taken(tokens: int, waiting: int, tokens_waiting: int) -> None:
    admission = Admission(LIMITS)
    assert refusal(admission, tokens=tokens, waiting=waiting, tokens_waiting=tokens_waiting) is None


def test_one_request_more_than_may_wait_is_refused() -> None:
    refused = refusal(Admission(LIMITS), waiting=10, tokens_waiting=10)
    assert refused is not None
    assert "10 requests" in refused.message


def test_more_tokens_than_may_wait_are_refused() -> None:
    refused = refusal(Admission(LIMITS), tokens=501, waiting=1, tokens_waiting=500)
    assert refused is not None
    assert "500 prompt tokens" in refused.message


def test_a_long_prompt_is_taken_when_nothing_waits() -> None:
    """Else it could never be served, however idle the engines are."""
    assert refusal(Admission(LIMITS), tokens=5000, waiting=0, tokens_waiting=0) is None


def test_without_any_end_so_far_the_longest_time_is_named() -> None:
    refused = refusal(Admission(LIMITS), waiting=10, tokens_waiting=10)
    assert refused is not None
    assert refused.retry_after_s == RETRY_AFTER_MAX_S


def test_the_time_named_is_the_time_for_half_of_the_queue_to_go() -> None:
    refused = refusal(finishing(2.0, until=200.0), waiting=40, tokens_waiting=40, now=200.0)
    assert refused is not None
    assert refused.retry_after_s == pytest.approx(10.0, rel=0.1)


@given(
    st.integers(10, 10**6), st.floats(0.001, 100.0), st.floats(0.0, 10**6), st.integers(0, 10**9)
)
def test_the_time_named_is_always_within_its_limits(
    waiting: int, rate: float, later: float, tokens_waiting: int
) -> None:
    admission = Admission(LIMITS)
    for number in range(20):
        admission.finish_rate.record(number / rate)
    refused = refusal(
        admission, waiting=waiting, tokens_waiting=tokens_waiting, now=20 / rate + later
    )
    assert refused is not None
    assert RETRY_AFTER_MIN_S <= refused.retry_after_s <= RETRY_AFTER_MAX_S


@pytest.mark.parametrize("rate", [0.5, 5.0, 50.0])
def test_a_steady_rate_is_measured_as_it_is(rate: float) -> None:
    admission = finishing(rate, until=100.0)
    assert admission.finish_rate.per_s(100.0) == pytest.approx(rate, rel=0.1)


def test_a_rate_halves_with_its_half_life_when_nothing_ends() -> None:
    rate = FinishRate()
    assert rate.per_s(5.0) == 0.0
    for _ in range(100):
        rate.record(50.0)
    before = rate.per_s(50.0)
    assert rate.per_s(50.0 + RATE_HALF_LIFE_S) == pytest.approx(before / 2)
    assert rate.per_s(50.0 + 10 * RATE_HALF_LIFE_S) == pytest.approx(before / 1024)
    assert rate.per_s(10.0**7) == 0.0


def test_a_busier_past_makes_for_a_shorter_time() -> None:
    times = []
    for rate in (0.5, 1.0, 2.0, 4.0):
        refused = refusal(finishing(rate, until=60.0), waiting=50, tokens_waiting=1, now=60.0)
        assert refused is not None
        times.append(refused.retry_after_s)
    assert times == sorted(times, reverse=True)
    assert len(set(times)) == len(times)
