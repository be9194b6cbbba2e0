"""What tenants are allowed: rates over time, in any order of calls."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.runtime.control.tenancy import (
    IDLE_TENANTS_MAX,
    UNLIMITED,
    TenantLimits,
    TenantPolicy,
)


def limits(**policies: TenantPolicy) -> TenantLimits:
    return TenantLimits(lambda tenant: policies.get(tenant, UNLIMITED))


def test_who_has_no_limits_reaches_none() -> None:
    counted = limits()
    for _ in range(1000):
        assert counted.reached("a", num_requests=1, now=0.0) is None
        counted.begin("a", num_prompt_tokens=10**6, now=0.0)


def test_a_rate_of_requests_allows_a_burst_of_a_second_and_then_the_rate() -> None:
    counted = limits(a=TenantPolicy(requests_per_s=5.0))
    for _ in range(5):
        assert counted.reached("a", num_requests=1, now=10.0) is None
        counted.begin("a", num_prompt_tokens=1, now=10.0)
    reached = counted.reached("a", num_requests=1, now=10.0)
    assert reached is not None
    assert reached.retry_after_s == pytest.approx(0.2)
    assert counted.reached("a", num_requests=1, now=10.0 + reached.retry_after_s) is None
    assert counted.reached("b", num_requests=1, now=10.0) is None


def test_a_slow_rate_lets_one_request_in_at_once() -> None:
    counted = limits(a=TenantPolicy(requests_per_s=0.1))
    assert counted.reached("a", num_requests=1, now=0.0) is None
    counted.begin("a", num_prompt_tokens=1, now=0.0)
    reached = counted.reached("a", num_requests=1, now=0.0)
    assert reached is not None
    assert reached.retry_after_s == pytest.approx(10.0)


def test_tokens_are_counted_when_they_are_known_and_paid_back_over_the_minute() -> None:
    counted = limits(a=TenantPolicy(tokens_per_min=600))
    assert counted.reached("a", num_requests=1, now=0.0) is None
    counted.begin("a", num_prompt_tokens=500, now=0.0)
    assert counted.reached("a", num_requests=1, now=0.0) is None  # 100 are left
    counted.end("a", num_output_tokens=400, life_s=0.0, now=0.0)
    reached = counted.reached("a", num_requests=1, now=0.0)
    assert reached is not None
    assert reached.retry_after_s == pytest.approx(30.1)
    assert counted.reached("a", num_requests=1, now=30.2) is None


def test_so_many_requests_may_live_and_not_more() -> None:
    counted = limits(a=TenantPolicy(concurrency=2))
    counted.begin("a", num_prompt_tokens=1, now=0.0)
    counted.begin("a", num_prompt_tokens=1, now=0.0)
    reached = counted.reached("a", num_requests=1, now=0.0)
    assert reached is not None
    assert reached.retry_after_s > 0
    counted.end("a", num_output_tokens=1, life_s=4.0, now=1.0)
    assert counted.reached("a", num_requests=1, now=1.0) is None
    counted.begin("a", num_prompt_tokens=1, now=1.0)
    reached = counted.reached("a", num_requests=1, now=1.0)
    assert reached is not None
    assert reached.retry_after_s == pytest.approx(2.0)  # one of two, each of which takes 4 s


def test_a_call_of_several_answers_fits_when_nothing_else_is_open() -> None:
    """Else it could never be answered."""
    counted = limits(a=TenantPolicy(concurrency=2))
    assert counted.reached("a", num_requests=5, now=0.0) is None


def test_a_changed_policy_counts_at_once() -> None:
    policies = {"a": TenantPolicy(concurrency=1)}
    counted = TenantLimits(lambda tenant: policies[tenant])
    counted.begin("a", num_prompt_tokens=1, now=0.0)
    assert counted.reached("a", num_requests=1, now=0.0) is not None
    policies["a"] = TenantPolicy(concurrency=2)
    assert counted.reached("a", num_requests=1, now=0.0) is None


def test_tenants_that_are_gone_are_forgotten() -> None:
    counted = limits()
    for number in range(IDLE_TENANTS_MAX + 100):
        counted.begin(f"t{number}", num_prompt_tokens=1, now=0.0)
        counted.end(f"t{number}", num_output_tokens=1, life_s=1.0, now=0.0)
    assert len(counted._tenants) <= IDLE_TENANTS_MAX + 1


@settings(max_examples=50, deadline=None)
@given(
    rate=st.floats(0.5, 50.0),
    steps=st.lists(st.floats(0.0, 2.0), min_size=1, max_size=200),
)
def test_over_any_time_no_more_gets_in_than_burst_and_rate(rate: float, steps: list[float]) -> None:
    counted = limits(a=TenantPolicy(requests_per_s=rate))
    now = taken = 0.0
    for step in steps:
        now += step
        reached = counted.reached("a", num_requests=1, now=now)
        if reached is None:
            counted.begin("a", num_prompt_tokens=1, now=now)
            taken += 1
        else:
            assert 0.0 < reached.retry_after_s <= 1.0 / rate + 1e-6
    assert taken <= max(1.0, rate) + rate * now + 1e-6
