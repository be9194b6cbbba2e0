"""The supervisor, message by message: gateways come and go, and sessions begin anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import pytest

from tests.unit.actors.supervisor_stage import (
    BATCH,
    ENGINES,
    GATEWAY,
    Stage,
    dies_by_a_new_incarnation,
    dies_by_deafness,
    dies_by_will,
    request,
    row,
    stage_with,
)
from understudy.actors.supervisor import PULSE_EVERY_S, RECOVERY_GRACE_S
from understudy.protocol.codec import PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from understudy.protocol.messages import (
    Assign,
    Attach,
    Cancel,
    Capacity,
    ClusterState,
    Deliver,
    Dying,
    EndGroup,
    Failed,
    Found,
    HeldRequest,
    Hello,
    Inventory,
    Lookup,
    Pulse,
    Reclaim,
    Refused,
    ResetPrefixCache,
    Role,
    StepOutput,
    Submit,
    TimelineRequest,
    Timelines,
    Welcome,
)
from understudy.protocol.request import (
    FinishReason,
)
from understudy.runtime.control.audience import UNCLAIMED_MAX_S
from understudy.runtime.control.canary import CANARY_WITHIN_S
from understudy.runtime.control.company import GATEWAY_SILENT_S
from understudy.runtime.control.health import SUSPECT_AFTER_S
from understudy.runtime.kit.actor import OpenSession, Send

Die: TypeAlias = Callable[[Stage, str], None]

# Gateways


@pytest.mark.parametrize("die", [dies_by_will, dies_by_deafness, dies_by_a_new_incarnation])
def test_what_a_gateway_leaves_behind_goes_on_for_a_while(die: Die) -> None:
    stage = stage_with(1, gateways=2)
    everyone = ["gateway-1.1", ENGINES[0]]
    for number in range(3):
        stage.hear(GATEWAY, Submit(request(number)))
    stage.turn("gateway-1.1", Submit(request(100)))
    if die is dies_by_a_new_incarnation:
        stage.join("gateway-0.2", Role.GATEWAY)
    else:
        die(stage, GATEWAY)
    stage.turn(ENGINES[0], StepOutput(1, (row(0, 5),)))
    stage.keep_alive(everyone, seconds=UNCLAIMED_MAX_S - 1.0)
    assert stage.sent(ENGINES[0], Cancel) == []
    stage.keep_alive(everyone, seconds=2.0)
    assert sorted(c.request_id for c in stage.sent(ENGINES[0], Cancel)) == [0, 1, 2]
    assert stage.status().running == 1


def test_another_gateway_goes_on_with_what_one_left_behind() -> None:
    stage = stage_with(1, gateways=2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6),)))
    stage.turn(GATEWAY, Dying("killed"))
    stage.turn("gateway-1.1", Lookup(1, ""))
    (found,) = stage.sent("gateway-1.1", Found)
    assert (found.requests, found.lengths) == ((request(1),), (2,))
    stage.turn("gateway-1.1", Attach(1, 1))
    assert stage.sent("gateway-1.1", Deliver) == [Deliver((row(1, 6, before=(5,)),))]
    stage.turn(ENGINES[0], StepOutput(2, (row(1, 7, before=(5, 6), finish=FinishReason.STOP),)))
    (deliver,) = stage.sent("gateway-1.1", Deliver)
    assert deliver.rows == (row(1, 7, before=(5, 6), finish=FinishReason.STOP),)
    stage.turn("gateway-1.1", Attach(1, 2))
    assert stage.sent("gateway-1.1", Deliver) == [Deliver(deliver.rows)], "ended, and still known"


def test_who_joins_what_has_failed_is_told_what_was_made_before_it_did() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6),)))
    stage.turn(ENGINES[0], Refused(1, 1, "internal_error", "no"))
    failed = stage.sent(GATEWAY, Failed)
    assert [one.message for one in failed] == ["no"]
    stage.sent(GATEWAY, Deliver)
    for position, told in ((0, [row(1, 5, 6)]), (1, [row(1, 6, before=(5,))]), (2, [])):
        stage.turn(GATEWAY, Attach(1, position))
        assert [one.rows for one in stage.sent(GATEWAY, Deliver)] == [(one,) for one in told]
        assert stage.sent(GATEWAY, Failed) == failed


@pytest.mark.parametrize("asked", [Attach(2, 0), Attach(1, 2)], ids=["unknown", "beyond the end"])
def test_what_is_not_there_cannot_be_attached_to(asked: Attach) -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.turn(GATEWAY, asked)
    (failed,) = stage.sent(GATEWAY, Failed)
    assert (failed.request_id, failed.code) == (asked.request_id, "not_found")


def test_a_tenant_finds_its_own_groups_only() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(replace(request(1), tenant="key-1")))
    for tenant, count in (("key-1", 1), ("key-2", 0), ("", 0)):
        stage.turn(GATEWAY, Lookup(1, tenant))
        (found,) = stage.sent(GATEWAY, Found)
        assert len(found.requests) == count


def test_a_client_ends_its_call_for_all_who_listen() -> None:
    stage = stage_with(1, gateways=2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn("gateway-1.1", Attach(1, 0))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5),)))
    stage.sent(GATEWAY, Deliver)
    stage.turn("gateway-1.1", EndGroup(1, "another"), Lookup(1, ""))
    assert stage.sent("gateway-1.1", Found)[0].finishes == (0,)
    stage.sent("gateway-1.1", Deliver)
    stage.turn("gateway-1.1", EndGroup(1, ""), Lookup(1, ""))
    assert stage.sent("gateway-1.1", Found)[0].finishes == (FinishReason.CANCELLED,)
    for gateway in (GATEWAY, "gateway-1.1"):
        [told] = [one for deliver in stage.sent(gateway, Deliver) for one in deliver.rows]
        assert (told.position, told.tokens, told.finish) == (1, (), FinishReason.CANCELLED)
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]


def test_what_a_client_wants_forgotten_is_not_known_to_the_next_supervisor_either() -> None:
    stage = stage_with(1)
    for number in (1, 2, 3):
        stage.turn(GATEWAY, Submit(request(number)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, finish=FinishReason.STOP), row(2, 6))))
    stage.turn(GATEWAY, EndGroup(1, "", is_forgotten=True), EndGroup(2, "", is_forgotten=True))
    for number in (1, 2):
        stage.turn(GATEWAY, Lookup(number, ""))
        assert stage.sent(GATEWAY, Found)[0].requests == ()
    stage.disk.crash_process()
    after = Stage(disk=stage.disk)
    assert [entry.request_id for entry in after.restored] == [3]


def test_what_became_of_a_request_is_told_to_its_tenant() -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.now += 1.0
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5)._replace(num_cached_tokens=2),)))
    stage.turn(ENGINES[0], Dying("killed"))
    stage.now += 1.0
    last = row(1, 6, 7, before=(5,), attempt=2, finish=FinishReason.STOP)
    stage.turn(ENGINES[1], StepOutput(1, (last._replace(num_draft_tokens=4),)))
    stage.turn(GATEWAY, TimelineRequest("another", 1), TimelineRequest("", 0))
    other, mine = stage.sent(GATEWAY, Timelines)
    assert other.timelines == ()
    [told] = mine.timelines
    assert [(round(event.at_s, 3), event.what, event.engine) for event in told.events] == [
        (0.0, "queued", ""),
        (0.0, "assigned", ENGINES[0]),
        (1.0, "begun", ENGINES[0]),
        (1.0, "resumed", ENGINES[1]),
        (2.0, "ended", ENGINES[1]),
    ]
    assert (told.num_output_tokens, told.num_cached_tokens, told.finish) == (3, 2, 1)
    assert (told.num_draft_tokens, told.num_accepted_tokens) == (4, 1)


def test_a_silent_gateway_counts_as_gone_later_than_an_engine() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.keep_alive([ENGINES[0]], seconds=GATEWAY_SILENT_S - 2 * PULSE_EVERY_S)
    assert len(stage.status().gateways) == 1
    stage.keep_alive([ENGINES[0]], seconds=3 * PULSE_EVERY_S)
    assert stage.status().gateways == ()
    assert stage.status().running == 1


def test_gateways_are_told_who_serves_whenever_that_changes() -> None:
    stage = Stage()
    stage.join(GATEWAY, Role.GATEWAY)
    assert set(stage.sent(GATEWAY, ClusterState)) == {ClusterState(0, 0, 0)}
    stage.join(ENGINES[0], Role.ENGINE, model_len=300)
    assert set(stage.sent(GATEWAY, ClusterState)) == {ClusterState(1, 1, 300, numerics=("echo",))}
    stage.join(ENGINES[1], Role.ENGINE, model_len=200)
    assert set(stage.sent(GATEWAY, ClusterState)) == {ClusterState(2, 2, 200, numerics=("echo",))}
    stage.turn(ENGINES[1], Dying("told to stop"))
    assert set(stage.sent(GATEWAY, ClusterState)) == {ClusterState(1, 2, 300, numerics=("echo",))}
    stage.keep_alive([GATEWAY, ENGINES[0]], seconds=5.0)
    assert stage.sent(GATEWAY, ClusterState) == []


# Sessions


def test_a_welcome_is_sent_before_the_session_it_announces_is_used() -> None:
    stage = Stage()
    stage.join(GATEWAY, Role.GATEWAY)
    welcome = stage.effects.index(Send(GATEWAY, Welcome(100, PROTOCOL_VERSION)))
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


def test_an_engine_that_comes_back_goes_on_with_what_it_made_meanwhile() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, *(Submit(request(number)) for number in (1, 2, 3)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5), row(2, 5), row(3, 5))))
    before = stage.status().engines[0].epoch
    stage.effects.clear()
    stage.join(ENGINES[0], Role.ENGINE, last_epoch=before)
    after = stage.status().engines[0].epoch
    assert after > before
    assert stage.sent(ENGINES[0], Welcome) == [Welcome(after, PROTOCOL_VERSION)]
    assert OpenSession(ENGINES[0], after) in stage.effects
    ended = row(2, 5, 6, finish=FinishReason.STOP)
    stage.hear(ENGINES[0], Inventory((row(1, 5, 6, 7), ended), is_last=False))
    stage.turn(ENGINES[0], Inventory((), is_last=True))
    assert stage.delivered() == [
        row(1, 6, 7, before=(5,)),
        row(2, 6, before=(5,), finish=FinishReason.STOP),
    ]
    assert stage.sent(ENGINES[0], Assign) == [Assign(request(3), 2, (5,))], "it has lost that one"
    stage.turn(ENGINES[0], StepOutput(9, (row(1, 8, before=(5, 6, 7)),)))
    assert stage.delivered() == [row(1, 8, before=(5, 6, 7))]
    assert stage.status().running == 2


def test_an_engine_that_comes_back_is_told_what_to_drop() -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(request(1)))
    epoch = stage.status().engines[0].epoch
    stage.turn(GATEWAY, Cancel(1))
    stage.effects.clear()
    stage.join(ENGINES[0], Role.ENGINE, last_epoch=epoch)
    unknown = row(77, 5)
    stage.turn(ENGINES[0], Inventory((row(1, 5), unknown), is_last=True))
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1), Cancel(77)]
    assert stage.delivered() == []


def test_who_speaks_no_version_that_is_understood_is_not_welcomed() -> None:
    stage = stage_with(1)
    stage.effects.clear()
    stage.turn(
        "engine-9.1", Hello(Role.ENGINE, "engine-9", 9, protocol=PROTOCOL_VERSION_OLDEST - 1)
    )
    assert stage.sent("engine-9.1", Welcome) == []
    assert [engine.name for engine in stage.status().engines] == ["engine-0"]


def test_a_gateway_with_a_new_session_says_what_it_still_wants() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)), Submit(request(2)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6), row(2, 5, 6))))
    stage.effects.clear()
    stage.join(GATEWAY, Role.GATEWAY, last_epoch=100)
    assert stage.sent(ENGINES[0], Cancel) == []
    stage.turn(GATEWAY, Reclaim((HeldRequest(2, 1),)))
    assert stage.sent(ENGINES[0], Cancel) == [Cancel(1)]
    assert stage.delivered() == [row(2, 6, before=(5,))]
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


def test_it_wakes_for_its_chores_and_when_an_engine_could_be_found_dead() -> None:
    stage = stage_with(0)
    for _ in range(3):
        wake_at = stage.supervisor.wake_at
        assert wake_at is not None
        stage.now = wake_at
        stage.hear(GATEWAY, Pulse())
        stage.decide()
        assert stage.supervisor.wake_at == wake_at + PULSE_EVERY_S
    stage.join(ENGINES[0], Role.ENGINE)
    assert stage.supervisor.wake_at == stage.now + SUSPECT_AFTER_S


def test_what_a_gateway_submits_again_with_a_new_session_is_not_taken_for_given_up() -> None:
    """Its first Submit was heard after all, and only the answer to it was lost."""
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.join(GATEWAY, Role.GATEWAY, last_epoch=100)
    stage.turn(GATEWAY, Submit(request(1)), Reclaim((HeldRequest(1, 0),)))
    assert stage.sent(ENGINES[0], Cancel) == []
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, finish=FinishReason.STOP),)))
    assert stage.delivered() == [row(1, 5, finish=FinishReason.STOP)]


def test_an_inventory_says_nothing_of_what_was_given_after_the_session_had_opened() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    epoch = stage.status().engines[0].epoch
    stage.join(ENGINES[0], Role.ENGINE, last_epoch=epoch)
    stage.turn(GATEWAY, Submit(request(2)))
    assert stage.assigned(ENGINES[0]) == [1, 2]
    stage.turn(ENGINES[0], Inventory((), is_last=True))
    assert stage.assigned(ENGINES[0]) == [1], "request 2 is on its way to it"
    assert stage.status().resumed == 1


def test_what_an_engine_tells_of_an_old_attempt_does_not_cancel_its_new_one() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    epoch = stage.status().engines[0].epoch
    stage.keep_alive([GATEWAY], seconds=3.0)
    assert stage.status().queued == 1, "it was silent for too long"
    stage.join(ENGINES[0], Role.ENGINE, last_epoch=epoch)
    assert [assign.attempt for assign in stage.sent(ENGINES[0], Assign)][-1] == 2
    stage.turn(ENGINES[0], Inventory((row(1, 5, 6),), is_last=True))
    assert stage.sent(ENGINES[0], Cancel) == []
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, attempt=2),)))
    assert stage.delivered() == [row(1, 5, attempt=2)]


# The next supervisor


def successor_of(stage: Stage) -> Stage:
    """A supervisor that starts from what another one has written down."""
    stage.disk.crash_process()
    return Stage(disk=stage.disk)


def test_what_was_cancelled_is_not_taken_up_by_the_next_supervisor() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)), Submit(request(2)))
    stage.turn(GATEWAY, Cancel(1))
    following = successor_of(stage)
    assert [entry.request_id for entry in following.restored if not entry.finish] == [2]
    assert [entry.finish for entry in following.restored if entry.finish] == [
        FinishReason.CANCELLED
    ]


def test_the_next_supervisor_knows_what_was_delivered_and_to_whom_it_was_given() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    stage.turn(ENGINES[0], StepOutput(1, (row(1, 5, 6),)))
    following = successor_of(stage)
    (entry,) = following.restored
    assert (entry.output, entry.engine, entry.attempt) == ([5, 6], ENGINES[0], 1)
    following.join(GATEWAY, Role.GATEWAY, last_epoch=100)
    following.turn(GATEWAY, Reclaim((HeldRequest(1, 2),)))
    following.join(ENGINES[0], Role.ENGINE, last_epoch=101)
    following.turn(ENGINES[0], Inventory((row(1, 5, 6, 7),), is_last=True))
    assert following.delivered() == [row(1, 7, before=(5, 6))]


def test_an_engine_that_does_not_come_back_to_the_next_supervisor_is_replaced() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(request(1)))
    following = successor_of(stage)
    following.join(ENGINES[1], Role.ENGINE)
    following.assigned(ENGINES[1])
    following.keep_alive([ENGINES[1]], seconds=RECOVERY_GRACE_S + 1.0)
    assert following.assigned(ENGINES[1]) == [1]


# Canaries


def test_a_canary_of_a_lost_session_is_not_waited_for() -> None:
    stage = stage_with(0)
    capacity = Capacity(BATCH, 2048, 64, 16)
    hello = Hello(Role.ENGINE, "engine-0", 41, capacity=capacity, protocol=PROTOCOL_VERSION)
    stage.turn(ENGINES[0], hello)
    (lost,) = stage.sent(ENGINES[0], Assign)
    (welcome,) = stage.sent(ENGINES[0], Welcome)
    stage.turn(ENGINES[0], replace(hello, last_epoch=welcome.epoch), Inventory((), is_last=True))
    assert Cancel(lost.request.request_id) in stage.sent(ENGINES[0], Cancel)
    stage.answer_canary(ENGINES[0])
    stage.keep_alive([ENGINES[0]], seconds=CANARY_WITHIN_S + 1.0)
    (engine,) = stage.status().engines
    assert engine.state == "serving"
    assert stage.machine.killed == []


def test_every_engine_is_told_to_forget_its_prefixes() -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, ResetPrefixCache())
    assert all(stage.sent(engine, ResetPrefixCache) for engine in ENGINES[:2])
