"""The supervisor, message by message: members die, err, vanish, and come back."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest

from tests.unit.actors.supervisor_stage import (
    CREDIT,
    ENGINES,
    GATEWAY,
    START_S,
    Stage,
    comes_back_with_nothing,
    dies_by_a_new_incarnation,
    dies_by_deafness,
    dies_by_exit,
    dies_by_silence,
    dies_by_will,
    ends_of,
    request,
    row,
    stage_with,
)
from understudy.protocol.messages import (
    Assign,
    Cancel,
    Deliver,
    Dying,
    Failed,
    Fenced,
    ProcessExited,
    Pulse,
    Refused,
    Role,
    StepOutput,
    Submit,
)
from understudy.protocol.request import (
    FinishReason,
    TokenRow,
)
from understudy.runtime.control.deadlines import STALL_MAX_S
from understudy.runtime.kit.actor import CloseSession, Send

Die: TypeAlias = Callable[[Stage, str], None]

# Engines that die


DEATHS: tuple[Die, ...] = (
    dies_by_will,
    dies_by_exit,
    dies_by_silence,
    dies_by_deafness,
    dies_by_a_new_incarnation,
)


@pytest.mark.parametrize("die", [*DEATHS, comes_back_with_nothing])
def test_a_dead_engines_requests_are_resumed_with_their_output(die: Die) -> None:
    stage = stage_with(1)
    stage.hear(GATEWAY, Submit(request(1)), Submit(request(2)))
    stage.decide()
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6),)))
    stage.join(ENGINES[1], Role.ENGINE)
    stage.effects.clear()
    die(stage, ENGINES[0])
    again = [
        message
        for effect in stage.effects
        if isinstance(effect, Send) and isinstance(message := effect.message, Assign)
    ]
    resumed = sorted(again, key=lambda assign: assign.request.request_id)
    assert resumed == [Assign(request(1), 2, (5, 6)), Assign(request(2), 2, ())]
    assert stage.status().resumed == 2
    assert ends_of(stage, 1) == ends_of(stage, 2) == 0


@pytest.mark.parametrize("die", DEATHS)
def test_a_dead_engine_is_fenced_and_its_late_rows_are_stale(die: Die) -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.join(ENGINES[1], Role.ENGINE)
    epoch = stage.status().engines[0].epoch
    stage.effects.clear()
    die(stage, ENGINES[0])
    fence = stage.effects.index(Send(ENGINES[0], Fenced(epoch)))
    close = stage.effects.index(CloseSession(ENGINES[0]))
    assert fence < close
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, finish=FinishReason.STOP),)))
    assert stage.delivered() == []
    assert stage.status().running == 1


def test_what_a_dead_engine_said_in_its_last_turn_counts() -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.hear(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.hear(ENGINES[0], Dying("out of memory"))
    stage.hear(ENGINES[0], StepOutput(2, (row(1, 6, before=(5,)),)))
    stage.decide()
    assert stage.delivered() == [row(1, 5)]
    assert stage.sent(ENGINES[1], Assign) == [Assign(request(1), 2, (5,))]


def test_resumed_requests_come_before_those_that_wait() -> None:
    stage = stage_with(1)
    for number in range(CREDIT + 3):
        stage.hear(GATEWAY, Submit(request(number, priority=-number)))
    stage.decide()
    first = stage.assigned(ENGINES[0])
    assert len(first) == CREDIT
    stage.turn(ENGINES[0], Dying("out of memory"))
    stage.join(ENGINES[1], Role.ENGINE)
    assert stage.assigned(ENGINES[1]) == first


def test_when_all_engines_are_dead_requests_wait_for_the_first_that_comes_back() -> None:
    stage = stage_with(2)
    stage.hear(GATEWAY, Submit(request(1)), Submit(request(2)))
    stage.decide()
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    for engine in ENGINES[:2]:
        stage.turn(engine, Dying("out of memory"))
    assert stage.status().queued == 2
    stage.keep_alive([GATEWAY], seconds=60.0)
    assert ends_of(stage, 1) == ends_of(stage, 2) == 0
    stage.join("engine-1.2", Role.ENGINE)
    again = [(a.request.request_id, a.output) for a in stage.sent("engine-1.2", Assign)]
    assert sorted(again) == [(1, (5,)), (2, ())]


def test_the_end_of_an_old_process_is_old_news() -> None:
    stage = stage_with(1)
    old_pid = stage.status().engines[0].pid
    stage.join("engine-0.2", Role.ENGINE)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn("launcher.1", ProcessExited("engine-0", old_pid, -9, 0))
    stage.turn("launcher.1", ProcessExited("nobody", old_pid, -9, 0))
    (engine,) = stage.status().engines
    assert (engine.state, engine.outstanding, engine.restarts) == ("serving", 1, 1)


def test_restarts_are_counted_whoever_tells_of_them_first() -> None:
    stage = stage_with(1)
    for restarts in range(3):
        pid = stage.status().engines[0].pid
        stage.turn("launcher.1", ProcessExited("engine-0", pid, -9, restarts))
        stage.join(f"engine-0.{restarts + 2}", Role.ENGINE)
        assert stage.status().engines[0].restarts == restarts + 1


def test_a_death_that_is_told_twice_happens_once() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    dies_by_exit(stage, ENGINES[0])
    dies_by_will(stage, ENGINES[0])
    stage.supervisor.lose(ENGINES[0], stage.now)
    stage.decide()
    status = stage.status()
    assert (status.queued, status.resumed, status.engines[0].state) == (1, 1, "dead")


# Engines that are wrong


@pytest.mark.parametrize(
    "broken",
    [row(1, 6, before=(5, 5)), row(1, 6), row(1, 6, before=(4,)), row(1, 5)],
    ids=["gap", "behind", "another output", "again"],
)
def test_a_request_whose_rows_do_not_fit_is_taken_back_and_resumed(broken: TokenRow) -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.effects.clear()
    stage.turn(ENGINES[0], StepOutput(2, (broken,)))
    assert stage.delivered() == []
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    resumed = [*stage.sent(ENGINES[0], Assign), *stage.sent(ENGINES[1], Assign)]
    assert resumed == [Assign(request(1), 2, (5,))]
    assert stage.supervisor.dispatcher.totals.broken == 1
    stage.turn(ENGINES[0], StepOutput(3, (row(1, finish=FinishReason.CANCELLED),)))
    assert stage.status().running == 1


def test_a_cancel_comes_before_the_next_attempt_at_the_same_engine() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.effects.clear()
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, before=(9,)),)))
    kinds = [type(effect.message) for effect in stage.effects if isinstance(effect, Send)]
    assert kinds.index(Cancel) < kinds.index(Assign)


def test_a_request_that_is_never_served_right_ends_with_an_error() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    attempt = 0
    while stage.now < START_S + 3 * STALL_MAX_S and not ends_of(stage, 1):
        for assign in stage.sent(ENGINES[0], Assign):
            attempt = assign.attempt
            stage.hear(ENGINES[0], StepOutput(1, (row(1, 5, before=(9,), attempt=attempt),)))
        stage.hear(GATEWAY, Pulse())
        stage.hear(ENGINES[0], Pulse())
        stage.decide(after_s=1.0)
    assert len(stage.sent(GATEWAY, Failed)) == 1


def test_a_request_that_ends_every_engine_ends_with_an_error() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    incarnation = 1
    while stage.now < START_S + 3 * STALL_MAX_S and not ends_of(stage, 1):
        stage.turn(f"engine-0.{incarnation}", Dying("poisoned"))
        incarnation += 1
        stage.keep_alive([GATEWAY], seconds=5.0)
        stage.join(f"engine-0.{incarnation}", Role.ENGINE)
    assert len(stage.sent(GATEWAY, Failed)) == 1


def test_what_an_engine_refuses_fails_with_its_words() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    for engine, attempt in (("engine-1.1", 1), (ENGINES[0], 2), (ENGINES[0], 0)):
        stage.turn(engine, Refused(1, attempt, "internal_error", "no"))
    assert ends_of(stage, 1) == 0
    stage.turn(ENGINES[0], Refused(1, 1, "context_length_exceeded", "too long"))
    stage.turn(ENGINES[0], Refused(1, 1, "context_length_exceeded", "too long"))
    assert stage.sent(GATEWAY, Failed) == [Failed(1, "context_length_exceeded", "too long")]
    assert stage.status().running == 0


def test_tokens_of_a_turn_come_before_the_failure_of_the_same_turn() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.hear(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.hear(ENGINES[0], Refused(1, 1, "internal_error", "no further"))
    stage.decide()
    kinds = [
        type(effect.message)
        for effect in stage.effects
        if isinstance(effect, Send) and isinstance(effect.message, Deliver | Failed)
    ]
    assert kinds == [Deliver, Failed]
