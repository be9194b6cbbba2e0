"""Listeners that cannot keep up are told nothing for a while, and then all that they missed."""

from __future__ import annotations

import pytest

from tests.unit.actors.gateway_stage import Listener, Stage, joined_stage, row
from understudy.protocol.messages import (
    Attach,
    Deliver,
    Failed,
    Fenced,
    HeldRequest,
    Reclaim,
    Welcome,
)
from understudy.protocol.request import FinishReason


@pytest.fixture
def stage() -> Stage:
    return joined_stage()


def test_a_parked_listener_is_told_nothing_until_it_asks_for_what_it_missed(stage: Stage) -> None:
    slow, quick = stage.submit_accepted(1), Listener()
    stage.gateway.attach(1, quick, 0)
    stage.turn(Deliver((row(1, 0, 5),)))
    stage.gateway.park(1, slow)
    stage.turn(Deliver((row(1, 1, 6),)), Deliver((row(1, 2, 7),)))
    assert (slow.tokens, quick.tokens) == ([5], [5, 6, 7])
    stage.gateway.unpark(1, slow)
    assert stage.said() == [Attach(1, 1)]
    stage.turn(Deliver((row(1, 1, 6, 7, 8, finish=FinishReason.STOP),)))
    assert (slow.tokens, slow.finish) == ([5, 6, 7, 8], FinishReason.STOP)
    assert (quick.tokens, quick.finish) == ([5, 6, 7, 8], FinishReason.STOP)
    assert stage.gateway.num_open == 0


def test_a_parked_listener_asks_for_what_it_missed_when_its_request_has_ended(stage: Stage) -> None:
    slow, quick = stage.submit_accepted(1), Listener()
    stage.gateway.attach(1, quick, 0)
    stage.gateway.park(1, slow)
    assert Attach(1, 0) in stage.said(Deliver((row(1, 0, 5, 6, finish=FinishReason.STOP),)))
    assert (quick.tokens, quick.finish) == ([5, 6], FinishReason.STOP)
    assert (slow.tokens, slow.finish) == ([], 0)
    stage.turn(Deliver((row(1, 0, 5, 6, finish=FinishReason.STOP),)))
    assert (slow.tokens, slow.finish) == ([5, 6], FinishReason.STOP)
    stage.gateway.unpark(1, slow)
    assert stage.said() == []
    assert stage.gateway.num_open == 0


@pytest.mark.parametrize("end", ["cancel", "leave"])
def test_nothing_is_kept_of_a_parked_listener_who_goes(stage: Stage, end: str) -> None:
    listeners = [stage.submit_accepted(1), stage.submit_accepted(2)]
    for number, listener in enumerate(listeners, 1):
        stage.gateway.park(number, listener)
    stage.turn(Deliver((row(1, 0, 5, finish=FinishReason.STOP),)))
    for number, listener in enumerate(listeners, 1):
        getattr(stage.gateway, end)(number, listener)
    # Who only leaves has the other request go on.
    assert stage.gateway.num_open == (1 if end == "leave" else 0)


def test_what_a_parked_listener_missed_is_not_lost_with_the_session(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, 5),)))
    stage.gateway.park(1, listener)
    stage.turn(Deliver((row(1, 1, 6),)))
    stage.turn(Fenced(5))
    assert Reclaim((HeldRequest(1, 1),)) in stage.said(Welcome(6))
    stage.turn(Deliver((row(1, 1, 6, 7),)))
    assert listener.tokens == [5]
    stage.gateway.unpark(1, listener)
    stage.turn(Deliver((row(1, 1, 6, 7, 8),)))
    assert listener.tokens == [5, 6, 7, 8]


def test_a_parked_listener_hears_of_a_failure_after_what_came_before_it(stage: Stage) -> None:
    parked, other = stage.submit_accepted(1), Listener()
    stage.gateway.attach(1, other, 0)
    stage.turn(Deliver((row(1, 0, 5),)))
    stage.gateway.park(1, parked)
    stage.turn(Deliver((row(1, 1, 6),)))
    assert stage.said(Failed(1, "x", "late")) == [Attach(1, 1)]
    assert (other.tokens, other.error is None) == ([5, 6], False)
    assert (parked.tokens, parked.error) == ([5], None)
    stage.turn(Deliver((row(1, 1, 6),)), Failed(1, "x", "late"))
    assert (parked.tokens, parked.error is None) == ([5, 6], False)
    assert stage.gateway.num_open == 0
