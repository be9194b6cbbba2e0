"""The supervisor, message by message: requests come, are served, and end."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

from tests.unit.actors.supervisor_stage import (
    CREDIT,
    ENGINES,
    GATEWAY,
    ends_of,
    request,
    row,
    stage_with,
)
from understudy.protocol.codec import FRAME_BYTES_MAX, Envelope, encode
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Deliver,
    Dying,
    Failed,
    Fenced,
    Heartbeat,
    Hello,
    Rejected,
    Role,
    StepOutput,
    Submit,
    Welcome,
)
from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import (
    FinishReason,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.audience import DELIVER_ROWS_MAX
from understudy.runtime.control.deadlines import STALL_MAX_S
from understudy.runtime.kit.actor import Send

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


def test_steps_of_one_turn_make_one_message_for_each_gateway_and_engine() -> None:
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
        Deliver((row(1, 5, 6), row(3, 5)), "engine-0"),
        Deliver((row(2, 5),), "engine-1"),
    ]
    assert stage.sent("gateway-1.1", Deliver) == [Deliver((row(4, 5),), "engine-1")]


def test_rows_that_pile_up_in_one_turn_still_fit_into_frames() -> None:
    """A supervisor that was held up for seconds finds hundreds of steps at once."""
    stage = stage_with()
    asked = request(1)
    stage.turn(GATEWAY, Submit(replace(asked, params=replace(asked.params, logprobs=20))))
    logprobs = (pack_logprobs(TokenLogprobs(-1.0, tuple((2**20, -1.0) for _ in range(20)))),)
    rows: list[TokenRow] = []
    prefix_hash = 0
    for position in range(3 * DELIVER_ROWS_MAX + 1):
        prefix_hash = extend_prefix_hash(prefix_hash, (position,))
        rows.append(TokenRow(1, 1, position, (position,), prefix_hash, 0, logprobs))
    for first in range(0, len(rows), 256):
        stage.hear(ENGINES[0], StepOutput(first, tuple(rows[first : first + 256])))
    stage.decide()
    delivers = stage.sent(GATEWAY, Deliver)
    assert [len(deliver.rows) for deliver in delivers] == [1] * 4
    parts = [deliver.rows[0] for deliver in delivers]
    assert [len(part.tokens) for part in parts] == [DELIVER_ROWS_MAX] * 3 + [1]
    assert list(chain.from_iterable(part.tokens for part in parts)) == list(range(len(rows)))
    assert list(chain.from_iterable(part.logprobs for part in parts)) == list(logprobs * len(rows))
    assert parts[-1] == rows[-1]
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
    stage.answer_canary(ENGINES[0])
    assert stage.status().engines[0].state == "serving"
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


def test_a_request_that_is_known_is_joined_by_whoever_submits_it_again() -> None:
    stage = stage_with(1, gateways=2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.turn("gateway-1.1", Submit(request(1)))
    assert stage.assigned(ENGINES[0]) == [1]
    assert stage.sent("gateway-1.1", Accepted) == [Accepted(1)]
    assert stage.sent("gateway-1.1", Deliver) == [Deliver((row(1, 5),))]
    stage.turn("gateway-1.1", Cancel(1))
    last = row(1, 6, before=(5,), finish=FinishReason.STOP)
    stage.turn(ENGINES[0], StepOutput(2, (last,)))
    assert stage.delivered() == [row(1, 5), last]
    assert stage.sent("gateway-1.1", Deliver) == []
    assert stage.status().admitted == 1


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
