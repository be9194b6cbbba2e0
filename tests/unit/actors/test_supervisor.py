"""The supervisor, message by message: no loop, no network, and time as it is told."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

import pytest

from understudy.actors.supervisor import (
    DELIVER_ROWS_MAX,
    PULSE_EVERY_S,
    STALL_MAX_S,
    Supervisor,
)
from understudy.protocol.codec import FRAME_BYTES_MAX, Envelope, encode
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Capacity,
    ClusterState,
    Deliver,
    Dying,
    Failed,
    Fenced,
    Heartbeat,
    Hello,
    Message,
    ProcessExited,
    Pulse,
    Refused,
    Rejected,
    Role,
    StatusReply,
    StatusRequest,
    StepOutput,
    Submit,
    Welcome,
)
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.registry import ENGINE_SILENT_S, GATEWAY_SILENT_S
from understudy.runtime.control.router import CREDIT_WINDOW_BATCHES
from understudy.runtime.kit.actor import CloseSession, Effect, OpenSession, Send

T = TypeVar("T")

START_S = 1000.0
GATEWAY = "gateway-0.1"
ENGINES = ("engine-0.1", "engine-1.1", "engine-2.1")
BATCH = 4
CREDIT = CREDIT_WINDOW_BATCHES * BATCH
PARAMS = SamplingParams(seed=1, max_tokens=100)


def request(request_id: int, *, prompt: int = 3, priority: int = 0) -> Request:
    return Request(request_id, request_id, (1,) * prompt, PARAMS, priority)


def row(
    request_id: int,
    *tokens: int,
    before: tuple[int, ...] = (),
    attempt: int = 1,
    finish: int = 0,
    logprobs: tuple[TokenLogprobs, ...] = (),
) -> TokenRow:
    prefix_hash = extend_prefix_hash(0, (*before, *tokens))
    return TokenRow(request_id, attempt, len(before), tokens, prefix_hash, finish, logprobs)


class Stage:
    """A supervisor, and everything it wanted done so far."""

    def __init__(self, *, limits: AdmissionLimits | None = None) -> None:
        self.now = START_S
        self.supervisor = Supervisor(
            model="demo", first_epoch=100, limits=limits, started_at=START_S
        )
        self.effects: list[Effect] = []
        self._pids = 40

    def hear(self, sender: str, *messages: Message) -> None:
        for message in messages:
            self.supervisor.handle(message, sender, self.now)

    def decide(self, *, after_s: float = 0.0) -> None:
        """End a turn, and check that the supervisor agrees with itself."""
        self.now += after_s
        self.supervisor.decide(self.now)
        self.supervisor.check_integrity()
        self.effects += self.supervisor.outbox.take()

    def turn(self, sender: str, *messages: Message) -> None:
        self.hear(sender, *messages)
        self.decide()

    def join(
        self, identity: str, role: Role, *, last_epoch: int = 0, model_len: int = 2048
    ) -> None:
        self._pids += 1
        capacity = Capacity(BATCH, model_len, 64, 16) if role is Role.ENGINE else None
        name = identity.rpartition(".")[0]
        hello = Hello(role, name, self._pids, last_epoch, "demo", "h:1", capacity)
        self.turn(identity, hello)

    def sent(self, to: str, kind: type[T]) -> list[T]:
        """What was sent to someone, of one kind, since it was last asked for; and forget it."""
        found: list[T] = []
        others: list[Effect] = []
        for effect in self.effects:
            match effect:
                case Send(to=receiver, message=kind() as message) if receiver == to:
                    found.append(message)
                case _:
                    others.append(effect)
        self.effects = others
        return found

    def assigned(self, engine: str) -> list[int]:
        return [assign.request.request_id for assign in self.sent(engine, Assign)]

    def delivered(self) -> list[TokenRow]:
        return [row for deliver in self.sent(GATEWAY, Deliver) for row in deliver.rows]

    def keep_alive(self, identities: Iterable[str], *, seconds: float) -> None:
        """Let time pass in which these are heard of."""
        end = self.now + seconds
        while self.now < end:
            for identity in identities:
                self.hear(identity, Pulse())
            self.decide(after_s=PULSE_EVERY_S)

    def status(self) -> StatusReply:
        self.turn("client-1.1", StatusRequest())
        (reply,) = self.sent("client-1.1", StatusReply)
        return reply


def stage_with(
    engines: int = 1, *, limits: AdmissionLimits | None = None, gateways: int = 1
) -> Stage:
    stage = Stage(limits=limits)
    for number in range(gateways):
        stage.join(f"gateway-{number}.1", Role.GATEWAY)
    for engine in ENGINES[:engines]:
        stage.join(engine, Role.ENGINE)
    stage.effects.clear()
    return stage


def ends_of(stage: Stage, request_id: int) -> int:
    """How many ends the gateway has been told for a request."""
    effects = [effect.message for effect in stage.effects if isinstance(effect, Send)]
    rows = [row for message in effects if isinstance(message, Deliver) for row in message.rows]
    return sum(row.finish != 0 for row in rows if row.request_id == request_id) + sum(
        message.request_id == request_id
        for message in effects
        if isinstance(message, Failed | Rejected)
    )


# The life of a request


def test_a_request_is_accepted_assigned_delivered_and_ends_once() -> None:
    stage = stage_with()
    stage.turn(GATEWAY, Submit(request(1)))
    assert stage.sent(GATEWAY, Accepted) == [Accepted(1)]
    assert stage.sent(ENGINES[0], Assign) == [Assign(request(1), 1, ())]
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.turn(ENGINES[0], StepOutput(2, (row(1, 6, before=(5,), finish=FinishReason.STOP),)))
    assert ends_of(stage, 1) == 1
    assert stage.sent(GATEWAY, Deliver) == [
        Deliver((row(1, 5),), "engine-0"),
        Deliver((row(1, 6, before=(5,), finish=FinishReason.STOP),), "engine-0"),
    ]
    assert stage.status().running == 0
    stage.turn(ENGINES[0], StepOutput(3, (row(1, 7, before=(5, 6), finish=FinishReason.STOP),)))
    stage.turn(GATEWAY, Cancel(1))
    assert [effect for effect in stage.effects if isinstance(effect, Send)] == []


def test_rows_of_one_turn_make_one_message_for_each_gateway_and_engine() -> None:
    stage = stage_with(2, gateways=2)
    for number in (1, 2, 3):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.turn("gateway-1.1", Submit(request(4)))
    assert stage.assigned(ENGINES[0]) == [1, 3]
    assert stage.assigned(ENGINES[1]) == [2, 4]
    stage.hear(ENGINES[0], StepOutput(1, (row(1, 5), row(3, 5))))
    stage.hear(ENGINES[1], StepOutput(1, (row(2, 5), row(4, 5))))
    stage.turn(ENGINES[0], StepOutput(2, (row(1, 6, before=(5,)),)))
    assert stage.sent(GATEWAY, Deliver) == [
        Deliver((row(1, 5), row(3, 5), row(1, 6, before=(5,))), "engine-0"),
        Deliver((row(2, 5),), "engine-1"),
    ]
    assert stage.sent("gateway-1.1", Deliver) == [Deliver((row(4, 5),), "engine-1")]


def test_rows_that_pile_up_in_one_turn_still_fit_into_frames() -> None:
    """A supervisor that was held up for seconds finds hundreds of steps at once."""
    stage = stage_with()
    stage.turn(GATEWAY, Submit(request(1)))
    logprobs = (TokenLogprobs(-1.0, tuple((2**20, -1.0) for _ in range(20))),)
    rows: list[TokenRow] = []
    prefix_hash = 0
    for position in range(3 * DELIVER_ROWS_MAX + 1):
        prefix_hash = extend_prefix_hash(prefix_hash, (position,))
        rows.append(TokenRow(1, 1, position, (position,), prefix_hash, 0, logprobs))
    for first in range(0, len(rows), 256):
        stage.hear(ENGINES[0], StepOutput(first, tuple(rows[first : first + 256])))
    stage.decide()
    delivers = stage.sent(GATEWAY, Deliver)
    assert [len(deliver.rows) for deliver in delivers] == [DELIVER_ROWS_MAX] * 3 + [1]
    assert [row for deliver in delivers for row in deliver.rows] == rows
    assert 4 * len(encode(Envelope("supervisor", 1, 1, 1), delivers[0])) < FRAME_BYTES_MAX


def test_requests_are_spread_and_the_rest_waits_for_credit() -> None:
    stage = stage_with(2)
    for number in range(2 * CREDIT + 3):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.decide()
    assert len(stage.assigned(ENGINES[0])) == len(stage.assigned(ENGINES[1])) == CREDIT
    status = stage.status()
    assert (status.queued, status.running) == (3, 2 * CREDIT)
    stage.turn(ENGINES[0], StepOutput(1, (row(0, 5, finish=FinishReason.STOP),)))
    assert stage.assigned(ENGINES[0]) == [2 * CREDIT]
    assert stage.status().queued == 2


def test_requests_wait_for_the_first_engine() -> None:
    stage = stage_with(0)
    for number in (1, 2, 3):
        stage.hear(GATEWAY, Submit(request(number, priority=-number)))
    stage.decide()
    assert len(stage.sent(GATEWAY, Accepted)) == 3
    stage.join(ENGINES[0], Role.ENGINE)
    assert stage.assigned(ENGINES[0]) == [3, 2, 1]


def test_an_engine_without_a_capacity_gets_nothing() -> None:
    stage = stage_with(0)
    stage.turn(ENGINES[0], Hello(Role.ENGINE, "engine-0", 41))
    stage.turn(GATEWAY, Submit(request(1)))
    assert stage.assigned(ENGINES[0]) == []
    assert stage.status().queued == 1


# Admission


def test_a_full_queue_rejects_with_a_time_to_come_back() -> None:
    stage = stage_with(0, limits=AdmissionLimits(requests_max=2))
    for number in (1, 2, 3):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.decide()
    assert stage.sent(GATEWAY, Accepted) == [Accepted(1), Accepted(2)]
    (rejected,) = stage.sent(GATEWAY, Rejected)
    assert (rejected.request_id, rejected.code) == (3, "overloaded")
    assert rejected.retry_after_s is not None
    assert rejected.retry_after_s >= 1.0
    status = stage.status()
    assert (status.admitted, status.rejected, status.queued) == (2, 1, 2)


def test_prompts_that_are_too_many_tokens_together_are_rejected() -> None:
    stage = stage_with(0, limits=AdmissionLimits(tokens_max=100))
    stage.hear(GATEWAY, Submit(request(1, prompt=60)), Submit(request(2, prompt=41)))
    stage.turn(GATEWAY, Submit(request(3, prompt=40)))
    assert stage.sent(GATEWAY, Accepted) == [Accepted(1), Accepted(3)]
    assert [rejected.request_id for rejected in stage.sent(GATEWAY, Rejected)] == [2]


def test_a_burst_in_one_turn_is_not_rejected_while_engines_have_credit() -> None:
    stage = stage_with(3, limits=AdmissionLimits(requests_max=2))
    for number in range(3 * CREDIT + 2):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.hear(GATEWAY, Submit(request(999)))
    stage.decide()
    assert [rejected.request_id for rejected in stage.sent(GATEWAY, Rejected)] == [999]
    assert stage.status().running == 3 * CREDIT
    assert stage.status().queued == 2


def test_only_a_serving_gateway_may_submit() -> None:
    stage = stage_with(1)
    stage.hear("nobody.1", Submit(request(1)))
    stage.hear(ENGINES[0], Submit(request(2)))
    stage.hear(GATEWAY, Dying("told to stop"), Submit(request(3)))
    stage.decide()
    assert stage.status().admitted == 0
    assert stage.assigned(ENGINES[0]) == []


def test_a_request_id_that_is_taken_is_rejected_and_the_first_goes_on() -> None:
    stage = stage_with(1, gateways=2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn("gateway-1.1", Submit(request(1)))
    assert stage.assigned(ENGINES[0]) == [1]
    (rejected,) = stage.sent("gateway-1.1", Rejected)
    assert (rejected.request_id, rejected.code) == (1, "internal_error")
    stage.turn("gateway-1.1", Cancel(1))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, finish=FinishReason.STOP),)))
    assert stage.delivered() == [row(1, 5, finish=FinishReason.STOP)]


# Cancelling


def test_a_cancelled_request_leaves_its_engine_and_says_nothing_more() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(GATEWAY, Cancel(1))
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.turn(ENGINES[0], StepOutput(2, (row(1, finish=FinishReason.CANCELLED),)))
    assert stage.delivered() == []
    assert ends_of(stage, 1) == 0
    assert stage.status().running == 0


def test_a_cancelled_request_leaves_the_queue() -> None:
    stage = stage_with(0)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(GATEWAY, Cancel(1))
    stage.join(ENGINES[0], Role.ENGINE)
    assert stage.assigned(ENGINES[0]) == []
    assert stage.status().queued == 0


def test_nobody_cancels_anothers_request() -> None:
    stage = stage_with(1, gateways=2)
    stage.turn(GATEWAY, Submit(request(1)))
    for stranger in ("gateway-1.1", ENGINES[0], "nobody.1"):
        stage.turn(stranger, Cancel(1))
    assert stage.sent(ENGINES[0], Cancel) == []
    assert stage.status().running == 1


def test_cancelling_what_is_unknown_does_nothing() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Cancel(77))
    assert stage.effects == []


# Engines that die


def dies_by_will(stage: Stage, engine: str) -> None:
    stage.turn(engine, Dying("out of memory"))


def dies_by_exit(stage: Stage, engine: str) -> None:
    status = next(s for s in stage.status().engines if engine.startswith(s.name))
    stage.turn("launcher.1", ProcessExited(status.name, status.pid, -9, 0))


def dies_by_silence(stage: Stage, engine: str) -> None:
    others = [identity for identity in (GATEWAY, *ENGINES) if identity != engine]
    stage.keep_alive(others, seconds=ENGINE_SILENT_S + PULSE_EVERY_S)


def dies_by_deafness(stage: Stage, engine: str) -> None:
    stage.supervisor.lose(engine, stage.now)
    stage.decide()


def dies_by_a_new_incarnation(stage: Stage, engine: str) -> None:
    stage.join(engine.replace(".1", ".2"), Role.ENGINE)


def dies_by_losing_its_session(stage: Stage, engine: str) -> None:
    epoch = next(s.epoch for s in stage.status().engines if engine.startswith(s.name))
    stage.join(engine, Role.ENGINE, last_epoch=epoch)


DEATHS = pytest.mark.parametrize(
    "die",
    [
        dies_by_will,
        dies_by_exit,
        dies_by_silence,
        dies_by_deafness,
        dies_by_a_new_incarnation,
        dies_by_losing_its_session,
    ],
)


@DEATHS
def test_a_dead_engines_requests_are_resumed_with_their_output(die: object) -> None:
    assert callable(die)
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


@DEATHS
def test_a_dead_engine_is_fenced_and_its_late_rows_are_stale(die: object) -> None:
    assert callable(die)
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
    assert stage.supervisor.totals.stale == (1 if die is not dies_by_a_new_incarnation else 0)
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
    assert stage.supervisor.totals.broken == 1
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


# Stalls


def test_a_request_that_no_engine_takes_ends_after_its_time() -> None:
    stage = stage_with(0)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.keep_alive([GATEWAY], seconds=STALL_MAX_S - 1.0)
    assert ends_of(stage, 1) == 0
    stage.keep_alive([GATEWAY], seconds=2.0)
    (failed,) = stage.sent(GATEWAY, Failed)
    assert (failed.request_id, failed.code) == (1, "unavailable")
    assert stage.status().queued == 0


def test_a_request_that_gets_no_token_ends_after_its_time_and_leaves_the_engine() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    everyone = [GATEWAY, ENGINES[0]]
    stage.keep_alive(everyone, seconds=STALL_MAX_S - 1.0)
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.keep_alive(everyone, seconds=STALL_MAX_S - 1.0)
    assert ends_of(stage, 1) == 0
    stage.keep_alive(everyone, seconds=2.0)
    (failed,) = stage.sent(GATEWAY, Failed)
    assert (failed.request_id, failed.code) == (1, "internal_error")
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    assert stage.status().running == 0


# Gateways


@pytest.mark.parametrize("die", [dies_by_will, dies_by_deafness, dies_by_a_new_incarnation])
def test_a_gateway_that_vanishes_has_its_requests_cancelled(die: object) -> None:
    assert callable(die)
    stage = stage_with(1, gateways=2)
    for number in range(CREDIT):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.hear("gateway-1.1", Submit(request(100)))
    stage.turn(GATEWAY, Submit(request(101)))
    stage.assigned(ENGINES[0])
    if die is dies_by_a_new_incarnation:
        stage.join("gateway-0.2", Role.GATEWAY)
    else:
        die(stage, GATEWAY)
    assert sorted(c.request_id for c in stage.sent(ENGINES[0], Cancel)) == list(range(CREDIT))
    assert stage.assigned(ENGINES[0]) == [100]
    status = stage.status()
    assert (status.queued, status.running) == (0, 1)


def test_a_silent_gateway_counts_as_gone_later_than_an_engine() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.keep_alive([ENGINES[0]], seconds=GATEWAY_SILENT_S - 2 * PULSE_EVERY_S)
    assert stage.sent(ENGINES[0], Cancel) == []
    stage.keep_alive([ENGINES[0]], seconds=3 * PULSE_EVERY_S)
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    assert stage.status().gateways == ()


def test_gateways_are_told_who_serves_whenever_that_changes() -> None:
    stage = Stage()
    stage.join(GATEWAY, Role.GATEWAY)
    assert stage.sent(GATEWAY, ClusterState) == [ClusterState(0, 0, 0)]
    stage.join(ENGINES[0], Role.ENGINE, model_len=300)
    assert stage.sent(GATEWAY, ClusterState) == [ClusterState(1, 1, 300)]
    stage.join(ENGINES[1], Role.ENGINE, model_len=200)
    assert stage.sent(GATEWAY, ClusterState) == [ClusterState(2, 2, 200)]
    stage.turn(ENGINES[1], Dying("told to stop"))
    assert stage.sent(GATEWAY, ClusterState) == [ClusterState(1, 2, 300)]
    stage.keep_alive([GATEWAY, ENGINES[0]], seconds=5.0)
    assert stage.sent(GATEWAY, ClusterState) == []


# Sessions


def test_a_welcome_is_sent_before_the_session_it_announces_is_used() -> None:
    stage = Stage()
    stage.join(GATEWAY, Role.GATEWAY)
    welcome = stage.effects.index(Send(GATEWAY, Welcome(100)))
    opened = stage.effects.index(OpenSession(GATEWAY, 100))
    used = stage.effects.index(Send(GATEWAY, ClusterState(0, 0, 0)))
    assert welcome < opened < used


def test_a_duplicate_hello_does_not_reset_a_session() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    (engine,) = stage.status().engines
    stage.effects.clear()
    hello = Hello(Role.ENGINE, "engine-0", engine.pid, 0, "demo", "", Capacity(BATCH, 9, 64, 16))
    for _ in range(3):
        stage.turn(ENGINES[0], hello)
    assert stage.effects == [Send(ENGINES[0], Welcome(engine.epoch))] * 3
    assert stage.status().engines[0].outstanding == 1


def test_a_hello_after_a_loss_opens_a_new_epoch_and_resumes_what_was_lost() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    before = stage.status().engines[0].epoch
    stage.effects.clear()
    stage.join(ENGINES[0], Role.ENGINE, last_epoch=before)
    after = stage.status().engines[0].epoch
    assert after > before
    sent = [effect for effect in stage.effects if getattr(effect, "to", None) != GATEWAY]
    assert sent[:5] == [
        Send(ENGINES[0], Fenced(before)),
        CloseSession(ENGINES[0]),
        Send(ENGINES[0], Welcome(after)),
        OpenSession(ENGINES[0], after),
        Send(ENGINES[0], Assign(request(1), 2, (5,))),
    ]
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 6, before=(5,)),)))
    assert stage.supervisor.totals.stale == 1
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 6, before=(5,), attempt=2),)))
    assert stage.delivered() == [row(1, 6, before=(5,), attempt=2)]


def test_a_gateway_that_lost_its_session_has_its_requests_cancelled() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    epoch = 100
    stage.join(GATEWAY, Role.GATEWAY, last_epoch=epoch)
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    stage.turn(GATEWAY, Submit(request(2)))
    assert stage.assigned(ENGINES[0]) == [1, 2]
    assert stage.status().running == 1


def test_nobody_is_held_to_be_silent_by_a_supervisor_that_was_itself_held_up() -> None:
    """Stopped for a while, it wakes to a socket that the I/O thread has not filled yet."""
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.keep_alive([GATEWAY, *ENGINES], seconds=2.0)
    stage.decide(after_s=GATEWAY_SILENT_S + 1.0)
    stage.keep_alive([GATEWAY, *ENGINES[:2]], seconds=1.0)
    status = stage.status()
    assert [engine.state for engine in status.engines] == ["serving", "serving"]
    assert len(status.gateways) == 1
    assert status.resumed == 0


def test_members_are_pulsed_and_the_dead_are_not() -> None:
    stage = stage_with(2)
    stage.turn(ENGINES[1], Dying("told to stop"))
    stage.effects.clear()
    stage.keep_alive([GATEWAY, ENGINES[0]], seconds=2.0)
    for identity in (GATEWAY, ENGINES[0]):
        assert len(stage.sent(identity, Pulse)) == 2.0 / PULSE_EVERY_S
    assert stage.effects == []


def test_it_wakes_for_its_chores() -> None:
    stage = stage_with(1)
    for _ in range(10):
        wake_at = stage.supervisor.wake_at
        assert wake_at is not None
        stage.now = wake_at
        stage.decide()
        assert stage.supervisor.wake_at == wake_at + PULSE_EVERY_S


# Status


def test_status_tells_what_every_member_last_said() -> None:
    stage = stage_with(2)
    stage.hear(GATEWAY, Submit(request(1)))
    stage.hear(ENGINES[0], Heartbeat(7, "step", 0.1, 60, 1, 2))
    stage.hear("nobody.1", Heartbeat(9, "step", 0.1, 60, 1, 2))
    stage.turn(ENGINES[0], Cancel(1))
    stage.now += 0.5
    status = stage.status()
    assert (status.model, status.uptime_s) == ("demo", 0.5)
    assert (status.admitted, status.queued, status.running) == (1, 0, 1)
    engine = status.engines[0]
    assert (engine.name, engine.state, engine.step) == ("engine-0", "serving", 7)
    assert (engine.running, engine.waiting, engine.outstanding) == (1, 2, 1)
    assert (engine.blocks_free, engine.blocks_total) == (60, 64)
    assert engine.beat_age_s == 0.5
    assert status.engines[1].step == 0
    (gateway,) = status.gateways
    assert (gateway.name, gateway.address, gateway.streams) == ("gateway-0", "h:1", 1)


def test_status_counts_tokens_and_ends() -> None:
    stage = stage_with(1)
    stage.hear(GATEWAY, Submit(request(1)), Submit(request(2)))
    stage.decide()
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6, 7), row(2, 5))))
    stage.turn(ENGINES[0], StepOutput(2, (row(1, before=(5, 6, 7), finish=FinishReason.STOP),)))
    stage.turn(GATEWAY, Cancel(2))
    status = stage.status()
    assert (status.tokens, status.finished, status.running) == (4, 2, 0)


def test_what_nobody_should_say_to_a_supervisor_changes_nothing() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    before = stage.status()
    for message in (Welcome(1), Fenced(100), Accepted(1), Failed(1, "x", "y"), Deliver((), "e")):
        for sender in ("nobody.1", GATEWAY, ENGINES[0]):
            stage.turn(sender, message)
    stage.turn("nobody.1", StepOutput(1, (row(1, 5),)))
    stage.turn("nobody.1", Dying("never lived"))
    assert stage.status() == before
