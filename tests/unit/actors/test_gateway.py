"""The gateway's core, message by message: whatever happens, each sink hears one end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.unit.actors.gateway_stage import STATE, Listener, Stage, joined_stage, request, row
from understudy.actors.gateway import ANSWER_WITHIN_S, HOPE_S, NOBODY
from understudy.protocol.codec import PROTOCOL_VERSION
from understudy.protocol.errors import (
    AlreadySubmitted,
    InternalError,
    Overloaded,
    RequestError,
    Unavailable,
)
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Attach,
    Cancel,
    Deliver,
    Duplicate,
    EndGroup,
    Failed,
    Fenced,
    Found,
    HeldRequest,
    Hello,
    Lookup,
    Pulse,
    Reclaim,
    Rejected,
    Role,
    Submit,
    TimelineRequest,
    Timelines,
    Welcome,
)
from understudy.protocol.request import FinishReason
from understudy.runtime.kit.actor import SUPERVISOR, CloseSession, Effect, OpenSession, Send
from understudy.runtime.kit.membership import SUPERVISOR_SILENT_S


@pytest.fixture
def stage() -> Stage:
    return joined_stage()


def test_it_says_who_it_is_and_where_it_listens() -> None:
    assert Stage().said() == [
        Hello(
            Role.GATEWAY,
            "gateway-0",
            41,
            model="demo",
            address="127.0.0.1:80",
            protocol=PROTOCOL_VERSION,
        )
    ]


def test_it_keeps_the_last_that_it_knew_of_the_cluster_while_the_supervisor_is_away(
    stage: Stage,
) -> None:
    assert stage.gateway.is_connected
    assert stage.gateway.cluster == STATE
    stage.turn(Fenced(5))
    assert not stage.gateway.is_connected
    assert stage.gateway.cluster == STATE
    stage.turn(Welcome(6))
    assert stage.gateway.is_connected
    assert stage.gateway.cluster == STATE
    stage.turn(NOBODY)
    stage.turn(STATE)
    assert stage.gateway.cluster == STATE


def test_tokens_reach_their_sink_in_order_and_the_end_comes_once(stage: Stage) -> None:
    one, other = stage.submit_accepted(1), stage.submit_accepted(2)
    stage.turn(Deliver((row(1, 0, 5), row(2, 0, 50)), "engine-0"))
    stage.turn(Deliver((row(1, 1, 6, 7), row(1, 3, 8, finish=FinishReason.STOP)), "engine-1"))
    assert (one.tokens, one.finish) == ([5, 6, 7, 8], FinishReason.STOP)
    assert one.engines == ["engine-0", "engine-1", "engine-1"]
    assert (other.tokens, other.finish) == ([50], 0)
    assert stage.gateway.num_open == 1
    stage.turn(Deliver((row(1, 4, 9, finish=FinishReason.STOP),)), Failed(1, "x", "late"))
    assert one.tokens == [5, 6, 7, 8]


def test_who_falls_behind_passes_more_tokens_on_at_once(stage: Stage) -> None:
    one, other = stage.submit_accepted(1), stage.submit_accepted(2)
    stage.turn(
        Deliver((row(1, 0, 5),), "engine-0"),
        Deliver((row(2, 0, 50),), "engine-1"),
        Deliver((row(1, 1, 6, 7),), "engine-0"),
        Deliver((row(2, 1, 51),), "engine-1"),
        Deliver((row(1, 3, 8, finish=FinishReason.STOP),), "engine-0"),
    )
    assert (one.tokens, one.finish, one.engines) == ([5, 6, 7, 8], FinishReason.STOP, ["engine-0"])
    assert (other.tokens, other.finish, other.engines) == ([50, 51], 0, ["engine-1"])


def test_what_came_from_one_engine_and_then_from_another_stays_in_order(stage: Stage) -> None:
    one, other = stage.submit_accepted(1), stage.submit_accepted(2)
    stage.turn(
        Deliver((row(2, 0, 50),), "engine-1"),
        Deliver((row(1, 0, 5),), "engine-0"),
        Deliver((row(1, 1, 6), row(2, 1, 51)), "engine-1"),
    )
    assert (one.tokens, one.engines) == ([5, 6], ["engine-0", "engine-1"])
    assert (other.tokens, other.engines) == ([50, 51], ["engine-1", "engine-1"])


def test_tokens_come_before_what_was_said_after_them(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, 5),), "engine-0"), Failed(1, "x", "late"))
    assert listener.tokens == [5]
    assert listener.error is not None


def test_an_end_without_a_token_is_an_end(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, finish=FinishReason.ERROR),)))
    assert (listener.tokens, listener.finish) == ([], FinishReason.ERROR)
    assert stage.gateway.num_open == 0


def test_what_was_delivered_is_not_delivered_again_and_no_position_is_left_out(
    stage: Stage,
) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 1, 6),)))
    assert listener.tokens == []
    stage.turn(Deliver((row(1, 0, 5, 6),)), Deliver((row(1, 0, 5, 6, 7), row(1, 1, 6))))
    assert listener.tokens == [5, 6, 7]


def test_without_a_session_a_request_waits_for_one_and_not_for_ever() -> None:
    stage = Stage()
    listener = stage.submit(1)
    assert not any(isinstance(message, Submit) for message in stage.said())
    assert Submit(request(1)) in stage.said(Welcome(5))
    assert listener.error is None
    stage = Stage()
    listener = stage.submit(1)
    stage.turn(after_s=ANSWER_WITHIN_S)
    assert isinstance(listener.error, Unavailable)
    assert listener.error.retry_after_s == 1.0
    assert stage.gateway.num_open == 0


def test_a_rejected_request_fails_with_the_time_to_come_back(stage: Stage) -> None:
    listener = stage.submit(1)
    stage.turn(Rejected(1, "overloaded", "full", 7.5))
    assert isinstance(listener.error, Overloaded)
    assert (listener.error.message, listener.error.retry_after_s) == ("full", 7.5)
    assert stage.gateway.num_open == 0
    stage.turn(Rejected(1, "overloaded", "again"))


def test_a_failed_request_fails_after_its_tokens(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, 5),)), Failed(1, "unavailable", "no engine"))
    assert listener.tokens == [5]
    assert isinstance(listener.error, Unavailable)


def test_an_error_that_nobody_knows_is_internal(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Failed(1, "from the future", "what"))
    assert isinstance(listener.error, InternalError)


def test_a_cancelled_request_hears_nothing_more_and_the_supervisor_hears_of_it(
    stage: Stage,
) -> None:
    listener = stage.submit_accepted(1)
    stage.gateway.cancel(1, listener)
    stage.gateway.cancel(1, listener)
    assert stage.said() == [Cancel(1)]
    stage.turn(Deliver((row(1, 0, 5, finish=FinishReason.STOP),)), Failed(1, "x", "late"))
    assert stage.said(Fenced(5)) != []
    assert not listener.has_ended
    assert listener.tokens == []


def test_a_request_cancelled_before_it_left_is_still_submitted_and_cancelled(stage: Stage) -> None:
    listener = stage.submit(1)
    stage.gateway.cancel(1, listener)
    assert stage.said() == [Submit(request(1)), Cancel(1)]
    assert stage.said(after_s=2.0) == []


def test_cancelling_what_is_unknown_or_has_ended_says_nothing(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, finish=FinishReason.STOP),)))
    for request_id in (1, 99):
        stage.gateway.cancel(request_id, listener)
    assert stage.said() == []


def test_a_sink_may_cancel_while_it_is_told_something(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    listener.on_deliver = lambda: stage.gateway.cancel(1, listener)
    assert stage.said(Deliver((row(1, 0, 5), row(1, 1, 6)))) == [Cancel(1)]
    assert listener.tokens == [5]


def test_a_sink_may_cancel_while_it_is_told_the_end(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    listener.on_deliver = lambda: stage.gateway.cancel(1, listener)
    assert stage.said(Deliver((row(1, 0, 5, finish=FinishReason.STOP),))) == []
    assert listener.finish == FinishReason.STOP


def test_a_sink_that_fails_may_submit_again(stage: Stage) -> None:
    second = Listener()

    class Retrying(Listener):
        def fail(self, error: RequestError) -> None:
            super().fail(error)
            stage.gateway.submit(request(2), second, stage.now)

    stage.gateway.submit(request(1), Retrying(), stage.now)
    assert stage.said(Rejected(1, "overloaded", "full")) == [
        Submit(request(1)),
        Submit(request(2)),
    ]
    assert not second.has_ended


def lost_by_fence(stage: Stage) -> list[Effect]:
    return stage.turn(Fenced(5))


def lost_by_silence(stage: Stage) -> list[Effect]:
    return stage.turn(after_s=SUPERVISOR_SILENT_S)


def lost_by_deafness(stage: Stage) -> list[Effect]:
    stage.gateway.lose(SUPERVISOR, stage.now)
    return stage.turn()


@pytest.mark.parametrize("lose", [lost_by_fence, lost_by_silence, lost_by_deafness])
def test_with_the_next_session_the_open_requests_go_on(
    stage: Stage, lose: Callable[[Stage], list[Effect]]
) -> None:
    running, ended, unanswered = (
        stage.submit_accepted(1),
        stage.submit_accepted(3),
        stage.submit(2),
    )
    stage.turn(Deliver((row(3, 0, 5, finish=FinishReason.STOP), row(1, 0, 7, 8))))
    effects = lose(stage)
    assert CloseSession(SUPERVISOR) in effects
    assert stage.gateway.cluster == STATE
    hellos = [send.message for send in effects if isinstance(send, Send)]
    assert [message.last_epoch for message in hellos if isinstance(message, Hello)] == [5]
    effects = stage.turn(Welcome(6))
    assert effects[0] == OpenSession(SUPERVISOR, 6, PROTOCOL_VERSION)
    said = [send.message for send in effects if isinstance(send, Send)]
    assert said[:2] == [Submit(request(2)), Reclaim((HeldRequest(1, 2), HeldRequest(2, 0)))]
    stage.turn(Deliver((row(1, 2, 9, finish=FinishReason.LENGTH),)), Failed(2, "x", "late"))
    assert (running.tokens, running.finish) == ([7, 8, 9], FinishReason.LENGTH)
    assert ended.tokens == [5]
    assert isinstance(unanswered.error, InternalError)


def test_a_request_may_have_several_listeners_each_from_its_own_position(stage: Stage) -> None:
    first = stage.submit_accepted(1)
    stage.turn(Deliver((row(1, 0, 5, 6),)))
    second = Listener()
    stage.gateway.attach(1, second, 1)
    assert stage.said(Deliver((row(1, 2, 7),))) == [Attach(1, 1)]
    assert (first.tokens, second.tokens) == ([5, 6, 7], [])
    stage.turn(Deliver((row(1, 1, 6, 7),)), Deliver((row(1, 3, 8, finish=FinishReason.STOP),)))
    assert (first.tokens, second.tokens) == ([5, 6, 7, 8], [6, 7, 8])


def test_a_request_ends_with_its_last_listener_unless_that_only_leaves(stage: Stage) -> None:
    first = stage.submit_accepted(1)
    second = Listener()
    stage.gateway.attach(1, second, 0)
    stage.gateway.cancel(1, first)
    assert stage.said() == [Attach(1, 0)]
    stage.gateway.leave(1, second)
    assert stage.said() == []
    assert stage.gateway.num_open == 1
    third = Listener()
    stage.gateway.attach(1, third, 0)
    stage.gateway.cancel(1, third)
    assert stage.said() == [Attach(1, 0), Cancel(1)]


def test_who_asks_for_a_group_is_told_once(stage: Stage) -> None:
    answers: list[Found | None] = []
    stage.gateway.look_up(9, "tenant", answers.append, stage.now)
    stage.gateway.look_up(9, "tenant", answers.append, stage.now)
    assert stage.said() == [Lookup(9, "tenant")]
    found = Found(9, "tenant", (request(1),), (5,))
    stage.turn(found, Found(9, "tenant", ()))
    assert answers == [found, found]


def test_what_became_of_requests_is_told_once_to_each_who_asks(stage: Stage) -> None:
    answers: list[Timelines | None] = []
    asked, other = TimelineRequest("tenant", 9), TimelineRequest("tenant", 0, 5)
    for question in (asked, asked, other):
        stage.gateway.timelines(question, answers.append, stage.now)
    assert stage.said() == [asked, other]
    stage.turn(nothing_of(asked), nothing_of(other))
    assert answers == [nothing_of(asked), nothing_of(asked), nothing_of(other)]


def test_a_client_may_end_its_call_for_all(stage: Stage) -> None:
    stage.gateway.end_group(9, "tenant")
    stage.gateway.end_group(8, "tenant", is_forgotten=True)
    assert stage.said() == [EndGroup(9, "tenant"), EndGroup(8, "tenant", is_forgotten=True)]


def test_a_question_that_nobody_answers_ends(stage: Stage) -> None:
    answers: list[Found | None] = []
    stage.gateway.look_up(9, "tenant", answers.append, stage.now)
    stage.now += HOPE_S
    stage.turn()
    assert answers == [None]


def test_a_call_that_was_made_before_is_told_where_it_lives(stage: Stage) -> None:
    listener = stage.submit(1)
    stage.turn(Duplicate(1, 77))
    assert isinstance(listener.error, AlreadySubmitted)
    assert listener.error.original_group_id == 77


def test_a_request_that_is_never_answered_fails_and_is_cancelled(stage: Stage) -> None:
    unanswered = stage.submit(1)
    answered = stage.submit(2)
    assert len(stage.said(Accepted(2))) == 2
    for _ in range(round(ANSWER_WITHIN_S) - 1):
        assert stage.said(Pulse(), after_s=1.0) == []
    later = stage.submit(3)
    assert stage.said(Pulse(), after_s=1.0) == [Submit(request(3)), Cancel(1)]
    assert isinstance(unanswered.error, Unavailable)
    assert not answered.has_ended
    assert not later.has_ended
    stage.turn(Accepted(1), Deliver((row(1, 0, 5),)))
    assert unanswered.tokens == []


def test_it_wakes_when_an_answer_is_overdue(stage: Stage) -> None:
    stage.submit(1)
    due = stage.now + ANSWER_WITHIN_S
    wake_at = stage.gateway.wake_at
    while wake_at is not None and stage.gateway.num_open:
        assert wake_at <= due
        stage.turn(Pulse(), after_s=max(0.0, wake_at - stage.now))
        wake_at = stage.gateway.wake_at
    assert stage.now == due


def test_what_nobody_should_say_to_a_gateway_changes_nothing(stage: Stage) -> None:
    listener = stage.submit_accepted(1)
    for message in (Assign(request(1), 1), Cancel(1), Submit(request(1)), Fenced(4), Welcome(6)):
        assert stage.said(message) == []
    assert not listener.has_ended
    assert stage.gateway.num_open == 1


def test_a_request_id_is_open_once(stage: Stage) -> None:
    stage.submit(1)
    with pytest.raises(AssertionError):
        stage.submit(1)


def nothing_of(asked: TimelineRequest) -> Timelines:
    """The answer that nothing is known."""
    return Timelines(asked.tenant, asked.group_id, asked.requests_max, ())
