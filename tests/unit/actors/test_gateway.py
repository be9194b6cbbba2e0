"""The gateway's core, message by message: whatever happens, each sink hears one end."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from understudy.actors.gateway import ANSWER_WITHIN_S, HOPE_S, NOBODY, Gateway
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
    ClusterState,
    Deliver,
    Duplicate,
    EndGroup,
    Failed,
    Fenced,
    Found,
    HeldRequest,
    Hello,
    Lookup,
    Message,
    Pulse,
    Reclaim,
    Rejected,
    Role,
    Submit,
    TimelineRequest,
    Timelines,
    Welcome,
)
from understudy.protocol.request import FinishReason, Request, SamplingParams, TokenRow
from understudy.runtime.kit.actor import SUPERVISOR, CloseSession, Effect, OpenSession, Send
from understudy.runtime.kit.membership import SUPERVISOR_SILENT_S

PARAMS = SamplingParams(seed=1, max_tokens=10)
STATE = ClusterState(2, 2, 2048)


def request(request_id: int) -> Request:
    return Request(request_id, request_id, (1, 2, 3), PARAMS)


def row(request_id: int, position: int, *tokens: int, finish: int = 0) -> TokenRow:
    return TokenRow(request_id, 1, position, tokens, 0, finish)


class Listener:
    """A sink that keeps what it hears, and insists on hearing nothing after the end."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.engines: list[str] = []
        self.finish = 0
        self.error: RequestError | None = None
        self.on_deliver: Callable[[], None] = lambda: None

    @property
    def has_ended(self) -> bool:
        return bool(self.finish) or self.error is not None

    def deliver(self, row: TokenRow, engine: str) -> None:
        assert not self.has_ended
        self.tokens += row.tokens
        self.engines.append(engine)
        self.finish = row.finish
        self.on_deliver()

    def fail(self, error: RequestError) -> None:
        assert not self.has_ended
        self.error = error


class Stage:
    """A gateway, and what it sends."""

    def __init__(self) -> None:
        self.now = 100.0
        self.gateway = Gateway("gateway-0", pid=41, model="demo", address="127.0.0.1:80")

    def turn(self, *messages: Message, after_s: float = 0.0) -> list[Effect]:
        self.now += after_s
        for message in messages:
            self.gateway.handle(message, SUPERVISOR, self.now)
        self.gateway.decide(self.now)
        return self.gateway.outbox.take()

    def said(self, *messages: Message, after_s: float = 0.0) -> list[Message]:
        """One turn; gives the messages sent, signs of life left out."""
        effects = self.turn(*messages, after_s=after_s)
        sent = [effect.message for effect in effects if isinstance(effect, Send)]
        return [message for message in sent if not isinstance(message, Pulse)]

    def submit(self, request_id: int) -> Listener:
        listener = Listener()
        self.gateway.submit(request(request_id), listener, self.now)
        return listener

    def submit_accepted(self, request_id: int) -> Listener:
        listener = self.submit(request_id)
        assert self.said(Accepted(request_id)) == [Submit(request(request_id))]
        return listener


@pytest.fixture
def stage() -> Stage:
    """A gateway with a session of epoch 5."""
    stage = Stage()
    stage.turn()
    stage.turn(Welcome(5), STATE)
    return stage


def test_it_says_who_it_is_and_where_it_listens() -> None:
    assert Stage().said() == [
        Hello(Role.GATEWAY, "gateway-0", 41, model="demo", address="127.0.0.1:80", protocol=2)
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
    assert effects[0] == OpenSession(SUPERVISOR, 6, 1)
    said = [send.message for send in effects if isinstance(send, Send)]
    assert said[:2] == [Submit(request(2)), Reclaim((HeldRequest(1, 2), HeldRequest(2, 0)))]
    stage.turn(Deliver((row(1, 2, 9, finish=FinishReason.LENGTH),)), Failed(2, "x", "late"))
    assert (running.tokens, running.finish) == ([7, 8, 9], FinishReason.LENGTH)
    assert ended.tokens == [5]
    assert isinstance(unanswered.error, InternalError)


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
