"""The circuit of an engine: opens on failures in a row, tries again, closes on success."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.runtime.control.circuit_breaker import (
    FAILURES_MAX,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    Circuit,
    CircuitBreaker,
    Circuits,
)


def opened(at: float = 0.0) -> CircuitBreaker:
    breaker = CircuitBreaker()
    for number in range(FAILURES_MAX):
        breaker.failed(number, at)
    return breaker


def test_failures_among_successes_open_nothing() -> None:
    breaker = CircuitBreaker()
    for number in range(10 * FAILURES_MAX):
        breaker.failed(number, 0.0)
        if number % (FAILURES_MAX - 1) == FAILURES_MAX - 2:
            breaker.succeeded(number)
    assert breaker.state(0.0) is Circuit.CLOSED


def test_failures_in_a_row_open_the_circuit_for_a_while() -> None:
    breaker = opened()
    assert breaker.state(0.0) is Circuit.OPEN
    assert not breaker.allows(PAUSE_MIN_S - 0.01)
    assert breaker.state(PAUSE_MIN_S) is Circuit.HALF_OPEN


def test_half_open_takes_one_request_at_a_time() -> None:
    breaker = opened()
    assert breaker.allows(PAUSE_MIN_S)
    breaker.assigned(77, PAUSE_MIN_S)
    assert not breaker.allows(PAUSE_MIN_S + 1.0)
    breaker.succeeded(3)  # an old one, which proves nothing
    assert breaker.state(PAUSE_MIN_S + 1.0) is Circuit.HALF_OPEN
    breaker.succeeded(77)
    assert breaker.state(PAUSE_MIN_S + 1.0) is Circuit.CLOSED


def test_a_try_that_fails_doubles_the_pause_up_to_a_limit() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for number in range(100, 110):
        before = now
        while not breaker.allows(now):
            now += 0.25
        pauses.append(now - before)
        breaker.assigned(number, now)
        breaker.failed(number, now)
    assert pauses == sorted(pauses)
    assert pauses[:3] == [PAUSE_MIN_S, 2 * PAUSE_MIN_S, 4 * PAUSE_MIN_S]
    assert pauses[-1] == PAUSE_MAX_S


def test_a_try_that_comes_to_nothing_leaves_room_for_another() -> None:
    breaker = opened()
    breaker.assigned(77, PAUSE_MIN_S)
    breaker.withdrawn(77)
    assert breaker.allows(PAUSE_MIN_S)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from("fswa"), st.integers(0, 3), st.floats(0.0, 5.0))))
def test_whatever_happens_it_opens_again_to_a_try(
    events: list[tuple[str, int, float]],
) -> None:
    circuits, now = Circuits(), 0.0
    for what, request_id, wait_s in events:
        now += wait_s
        match what:
            case "f":
                circuits.failed("e", request_id, now)
            case "s":
                circuits.succeeded("e", request_id)
            case "w":
                circuits.withdrawn("e", request_id)
            case _ if circuits.allows("e", now):
                circuits.assigned("e", request_id, now)
            case _:
                pass
    for request_id in range(4):
        circuits.withdrawn("e", request_id)
    assert circuits.allows("e", now + PAUSE_MAX_S)
    circuits.forget("e")
    assert circuits.allows("e", now)
    assert not circuits
