from __future__ import annotations

import itertools

import pytest

from understudy.actors.http_return_times import SPREAD_MAX_S, ReturnTimes
from understudy.protocol.errors import Overloaded

FULL = Overloaded("full", retry_after_s=2.0)


def at_rate(per_s: float) -> tuple[ReturnTimes, float]:
    """The line of a server that has long answered so many calls a second, and the time there."""
    times = ReturnTimes()
    num_calls = round(100 * per_s)
    for number in range(num_calls + 1):
        times.call_ended(number / per_s)
    return times, num_calls / per_s


def told(times: ReturnTimes, now: float) -> float:
    retry_after_s = times.in_line(FULL, now).retry_after_s
    assert retry_after_s is not None
    return retry_after_s


def test_who_is_refused_comes_back_at_the_rate_at_which_calls_end() -> None:
    times, now = at_rate(10.0)
    waits = [told(times, now) for _ in range(50)]
    assert waits[0] == pytest.approx(2.1, abs=0.02)
    gaps = [after - before for before, after in itertools.pairwise(waits)]
    assert gaps == pytest.approx([0.1] * 49, rel=0.1)


def test_a_line_that_has_gone_begins_anew() -> None:
    times, now = at_rate(10.0)
    for _ in range(50):
        told(times, now)
    for number in range(600):
        times.call_ended(now + number / 10.0)
    assert told(times, now + 60.0) == pytest.approx(2.1, abs=0.02)


def test_the_line_has_an_end() -> None:
    times, now = at_rate(10.0)
    waits = [told(times, now) for _ in range(2000)]
    assert max(waits) < 2.0 + SPREAD_MAX_S + 1.0
    assert waits.count(min(waits)) < 20


def test_what_the_supervisor_says_stands_while_no_call_has_ended() -> None:
    assert ReturnTimes().in_line(FULL, 5.0) is FULL
    nameless = Overloaded("full")
    assert at_rate(10.0)[0].in_line(nameless, 10.0) is nameless
