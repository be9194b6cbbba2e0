"""What is asked and when follows from the seed alone."""

from __future__ import annotations

from itertools import islice, pairwise
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.tools.bench.workload import (
    PAUSE_S_MAX,
    TOKEN_IDS,
    Endpoint,
    LengthRange,
    RequestBudget,
    Workload,
    pause_after_failure_s,
    poisson_arrivals,
)


def workload(
    *,
    endpoint: Endpoint = "completions",
    seed: int = 0,
    shared_prefix: int = 0,
    ignore_eos: bool = True,
) -> Workload:
    return Workload(
        model="m",
        endpoint=endpoint,
        prompt_length=LengthRange(10, 20),
        output_length=LengthRange(1, 8),
        shared_prefix=shared_prefix,
        seed=seed,
        ignore_eos=ignore_eos,
    )


def body(load: Workload, number: int) -> dict[str, Any]:
    return msgspec.json.decode(load.request(number).body, type=dict[str, Any])


@settings(deadline=None)
@given(st.integers(0, 1 << 31), st.permutations(range(6)))
def test_a_request_depends_on_seed_and_number_alone(seed: int, order: list[int]) -> None:
    in_order = [workload(seed=seed).request(number) for number in range(6)]
    load = workload(seed=seed)
    in_any_order = {number: load.request(number) for number in order}
    assert [in_any_order[number] for number in range(6)] == in_order


def test_seeds_and_numbers_give_different_prompts() -> None:
    prompts = {
        tuple(body(workload(seed=seed), number)["prompt"])
        for seed in (0, 1)
        for number in range(50)
    }
    assert len(prompts) == 100


@settings(deadline=None)
@given(st.integers(0, 1_000_000))
def test_lengths_and_token_ids_stay_within_their_ranges(number: int) -> None:
    request = workload().request(number)
    asked = msgspec.json.decode(request.body)
    assert 10 <= len(asked["prompt"]) <= 20
    assert set(asked["prompt"]) <= set(TOKEN_IDS)
    assert 1 <= asked["max_tokens"] == request.output_tokens <= 8


def test_every_length_of_the_range_occurs() -> None:
    load = workload()
    assert {load.request(number).output_tokens for number in range(200)} == set(range(1, 9))


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_a_shared_prefix_is_shared_and_what_follows_is_not(endpoint: Endpoint) -> None:
    load = workload(endpoint=endpoint, shared_prefix=6)
    asked = [body(load, number) for number in range(20)]
    prompts = [
        one["prompt"] if endpoint == "completions" else one["messages"][0]["content"].split()
        for one in asked
    ]
    assert len({tuple(prompt[:6]) for prompt in prompts}) == 1
    assert len({tuple(prompt[6:]) for prompt in prompts}) == 20
    assert all(10 <= len(prompt) <= 20 for prompt in prompts)


def test_requests_ask_for_a_stream_with_usage_and_for_exact_lengths() -> None:
    asked = body(workload(), 0)
    assert asked["stream"] is True
    assert asked["stream_options"] == {"include_usage": True}
    assert asked["ignore_eos"] is True
    assert "ignore_eos" not in body(workload(ignore_eos=False), 0)


@pytest.mark.parametrize(("text", "expected"), [("7", (7, 7)), ("7-9", (7, 9)), ("7-7", (7, 7))])
def test_a_length_is_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert LengthRange.parse(text) == expected


@pytest.mark.parametrize("text", ["", "0", "9-7", "a", "-5", "1-", "1-2-3", "1.5", "9999999999"])
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - int() words some of them
        LengthRange.parse(text)


def test_arrivals_of_a_seed_repeat_and_grow() -> None:
    times = list(islice(poisson_arrivals(rate=20.0, seed=5), 1_000))
    assert times == list(islice(poisson_arrivals(rate=20.0, seed=5), 1_000))
    assert times != list(islice(poisson_arrivals(rate=20.0, seed=6), 1_000))
    assert all(earlier < later for earlier, later in pairwise(times))


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    times = list(islice(poisson_arrivals(rate=20.0, seed=5), 20_000))
    gaps = [later - earlier for earlier, later in pairwise([0.0, *times])]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert mean == pytest.approx(0.05, rel=0.05)
    # Of an exponential distribution the standard deviation equals the mean.
    assert variance**0.5 == pytest.approx(mean, rel=0.05)


def test_a_budget_deals_out_each_number_once_until_the_count_is_used_up() -> None:
    budget = RequestBudget(num_requests=3, duration_s=10.0)
    assert [budget.take(elapsed_s) for elapsed_s in (0.0, 1.0, 1.0, 2.0)] == [0, 1, 2, None]


def test_a_budget_ends_with_its_time() -> None:
    budget = RequestBudget(num_requests=100, duration_s=10.0)
    assert [budget.take(elapsed_s) for elapsed_s in (0.0, 9.99, 10.0)] == [0, 1, None]


def test_a_refused_client_waits_as_told_within_a_limit() -> None:
    assert pause_after_failure_s(2.5) == 2.5
    assert pause_after_failure_s(0.0) == 0.0
    assert pause_after_failure_s(3600.0) == PAUSE_S_MAX
    assert 0.0 < pause_after_failure_s(None) < 1.0
