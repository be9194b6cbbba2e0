"""Tenants, deadlines and overload, as the supervisor handles them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.unit.actors.supervisor_stage import (
    BATCH,
    CREDIT,
    ENGINES,
    GATEWAY,
    Stage,
    request,
    row,
    stage_with,
)
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Failed,
    Refused,
    Rejected,
    Role,
    StepOutput,
    Submit,
    UsageReply,
    UsageRequest,
)
from understudy.protocol.request import FinishReason, Request
from understudy.protocol.usage import DayUsage
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.circuit_breaker import FAILURES_MAX, PAUSE_MIN_S
from understudy.runtime.control.deadlines import LATE_AFTER_S
from understudy.runtime.control.tenancy import TenantPolicy

(ENGINE, *_) = ENGINES
TODAY = 20_000


def of(tenant: str, request_id: int, **fields: object) -> Request:
    return replace(request(request_id), tenant=tenant, **fields)  # type: ignore[arg-type]


def submit(stage: Stage, *requests: Request) -> list[Rejected]:
    stage.turn(GATEWAY, *map(Submit, requests))
    return stage.sent(GATEWAY, Rejected)


def tenants(**policies: TenantPolicy) -> Stage:
    return stage_with(policy_of=policies.__getitem__, today=lambda: TODAY)


def finish(stage: Stage, request_id: int, *tokens: int, attempt: int = 1) -> None:
    end = row(request_id, *(tokens or (5,)), attempt=attempt, finish=FinishReason.STOP)
    stage.turn(ENGINE, StepOutput(1, (end,)))


# Limits of a tenant's own


def test_who_has_too_much_open_is_told_when_to_come_back_and_others_are_not() -> None:
    stage = tenants(a=TenantPolicy(concurrency=2), b=TenantPolicy())
    [rejected] = submit(stage, of("a", 1), of("a", 2), of("a", 3), of("b", 4))
    assert (rejected.request_id, rejected.code) == (3, "rate_limit_exceeded")
    assert rejected.retry_after_s is not None
    assert rejected.retry_after_s > 0
    finish(stage, 1)
    assert submit(stage, of("a", 5)) == []


def test_a_rate_is_kept_however_fast_answers_are() -> None:
    stage = tenants(a=TenantPolicy(requests_per_s=2.0))
    told = []
    for request_id in range(1, 5):
        told += submit(stage, of("a", request_id))
        if request_id in stage.assigned(ENGINE):
            finish(stage, request_id)
    assert [one.request_id for one in told] == [3, 4]
    stage.now += told[0].retry_after_s or 0.0
    assert submit(stage, of("a", 10)) == []


def test_the_requests_of_one_call_are_let_in_together() -> None:
    stage = tenants(a=TenantPolicy(requests_per_s=1.0), b=TenantPolicy(concurrency=2))
    for tenant, first in (("a", 1), ("b", 11)):
        call = [of(tenant, number, group_id=first) for number in range(first, first + 4)]
        assert submit(stage, *call) == []
        assert [one.request_id for one in submit(stage, of(tenant, first + 8))] == [first + 8]
    stage.now += 1.0
    assert submit(stage, of("a", 100)) == []  # four answers were one call


# Usage


def used(stage: Stage, tenant: str) -> tuple[DayUsage, ...]:
    stage.turn(GATEWAY, UsageRequest(tenant))
    [reply] = stage.sent(GATEWAY, UsageReply)
    assert reply.tenant == tenant
    return reply.days


def test_what_is_used_is_counted_for_each_tenant_and_day() -> None:
    stage = tenants(a=TenantPolicy(), b=TenantPolicy())
    submit(stage, of("a", 1), of("a", 2), of("b", 3))
    stage.now += 2.0
    stage.turn(ENGINE, StepOutput(1, (row(1, 5), row(2, 5))))
    stage.now += 10.0
    end = row(1, 6, 7, before=(5,), finish=FinishReason.STOP)
    stage.turn(ENGINE, StepOutput(2, (end,)))
    [day] = used(stage, "a")
    assert day[:5] == (TODAY, 1, 3, 0, 3)
    assert 40.0 <= day.kv_token_s <= 70.0
    assert used(stage, "b") == ()
    stage.turn(GATEWAY, Cancel(2))
    assert used(stage, "a")[0][:5] == (TODAY, 2, 6, 0, 4)


def test_a_prompt_that_is_said_again_is_a_prompt_and_no_output() -> None:
    stage = tenants(a=TenantPolicy())
    plain = of("a", 1)
    params = replace(plain.params, echoed=(4, 5, 6), max_tokens=plain.params.max_tokens + 3)
    submit(stage, of("a", 1, params=params))
    finish(stage, 1, 4, 5, 6, 7)
    [day] = used(stage, "a")
    assert day[:5] == (TODAY, 1, len(plain.prompt) + 3, 0, 1)


def test_usage_outlives_the_supervisor_and_nothing_counts_twice() -> None:
    stage = tenants(a=TenantPolicy())
    submit(stage, of("a", 1), of("a", 2))
    finish(stage, 1, 5, 6)
    before = used(stage, "a")
    stage.disk.crash_process()
    later = Stage(disk=stage.disk, policy_of=lambda _: TenantPolicy(), today=lambda: TODAY)
    later.join(GATEWAY, Role.GATEWAY)
    assert used(later, "a") == before
    later.keep_alive([GATEWAY], seconds=3.0)
    later.join(ENGINES[1], Role.ENGINE)
    later.decide()
    [assign] = [one for one in later.sent(ENGINES[1], Assign) if one.request.request_id == 2]
    end = row(2, 8, attempt=assign.attempt, finish=FinishReason.STOP)
    later.turn(ENGINES[1], StepOutput(1, (end,)))
    [day] = used(later, "a")
    assert day[:5] == (TODAY, 2, 6, 0, 3)


# Deadlines


def test_who_waits_past_its_deadline_never_gets_to_an_engine() -> None:
    stage = stage_with(engines=0)
    submit(stage, of("", 1, deadline_s=1.0), of("", 2, first_token_s=1.0), of("", 3))
    stage.now += 1.0
    stage.join(ENGINE, Role.ENGINE)
    stage.decide()
    assert stage.assigned(ENGINE) == [3]
    failed = stage.sent(GATEWAY, Failed)
    assert sorted(one.request_id for one in failed) == [1, 2]
    assert {one.code for one in failed} == {"deadline_exceeded"}


def test_who_waits_is_ended_at_its_deadline_and_not_when_somebody_looks() -> None:
    stage = stage_with(engines=0)
    submit(stage, of("", 1, deadline_s=0.1))
    assert stage.supervisor.wake_at is not None
    assert stage.supervisor.wake_at <= stage.now + 0.1
    stage.decide(after_s=0.1)
    assert len(stage.sent(GATEWAY, Failed)) == 1


def test_an_engine_is_told_what_is_left() -> None:
    stage = stage_with(engines=0)
    submit(stage, of("", 1, deadline_s=5.0), of("", 2))
    stage.now += 2.0
    stage.join(ENGINE, Role.ENGINE)
    stage.decide()
    left = {one.request.request_id: one.deadline_s for one in stage.sent(ENGINE, Assign)}
    assert left == {1: pytest.approx(3.0), 2: None}


def test_a_resumed_request_has_what_is_left_of_its_time() -> None:
    stage = stage_with(2)
    submit(stage, of("", 1, deadline_s=5.0))
    first = next(engine for engine in ENGINES[:2] if stage.assigned(engine))
    other = ENGINES[1 - ENGINES.index(first)]
    stage.now += 0.05
    stage.turn(first, StepOutput(1, (row(1, 5),)))
    stage.supervisor.lose(first, stage.now)
    stage.decide(after_s=0.05)
    [assign] = stage.sent(other, Assign)
    assert assign.output == (5,)
    assert assign.deadline_s == pytest.approx(4.9)


def test_what_its_engine_does_not_end_is_ended_with_what_there_is() -> None:
    stage = stage_with()
    submit(stage, of("", 1, deadline_s=1.0), of("", 2, deadline_s=1.0))
    stage.turn(ENGINE, StepOutput(1, (row(1, 5, 6),)))
    stage.delivered()
    stage.keep_alive([ENGINE, GATEWAY], seconds=1.0 + LATE_AFTER_S + 0.3)
    assert {one.request_id for one in stage.sent(ENGINE, Cancel)} == {1, 2}
    [end] = stage.delivered()
    assert (end.request_id, end.position, end.tokens) == (1, 2, ())
    assert end.finish == FinishReason.DEADLINE
    [failed] = stage.sent(GATEWAY, Failed)
    assert (failed.request_id, failed.code) == (2, "deadline_exceeded")


def test_a_deadline_outlives_the_supervisor() -> None:
    stage = stage_with(engines=0)
    submit(stage, of("", 1, deadline_s=5.0))
    stage.disk.crash_process()
    later = Stage(disk=stage.disk)
    later.now += 4.9
    later.decide()
    assert later.supervisor.dispatcher.num_living == 1
    later.decide(after_s=0.2)
    assert later.supervisor.dispatcher.num_living == 0


def test_who_would_be_too_late_is_turned_away_at_the_door() -> None:
    stage = stage_with()
    for request_id in range(1, 90):
        submit(stage, of("", request_id))
        stage.decide(after_s=0.05)
        stage.turn(ENGINE, StepOutput(1, (row(request_id, 5),)))
        stage.decide(after_s=1.0)
        end = row(request_id, *range(10), before=(5,), finish=FinishReason.STOP)
        stage.turn(ENGINE, StepOutput(2, (end,)))
    stage.effects.clear()
    assert submit(stage, of("", 100, deadline_s=0.5)) == []  # nothing else is there: it is tried
    [late] = submit(stage, of("", 101, deadline_s=0.5), of("", 102, deadline_s=60.0))
    assert (late.request_id, late.code) == (101, "deadline_exceeded")
    [slow] = submit(stage, of("", 103, first_token_s=0.01))
    assert "first token" in slow.message
    [passed] = submit(stage, of("", 104, deadline_s=0.0))
    assert passed.code == "deadline_exceeded"


# Overload


def test_urgent_work_takes_the_place_of_what_can_wait() -> None:
    stage = stage_with(limits=AdmissionLimits(requests_max=2))
    filled = [of("", number) for number in range(1, CREDIT + 1)]
    submit(stage, *filled)
    patient = [of("", 100, priority=5), of("", 101, priority=5)]
    assert submit(stage, *patient) == []
    stage.sent(GATEWAY, Accepted)
    [refused] = submit(stage, of("", 102, priority=5))
    assert refused.code == "overloaded"
    assert submit(stage, of("", 103, priority=1)) == []
    [shed] = stage.sent(GATEWAY, Failed)
    assert (shed.request_id, shed.code) == (101, "overloaded")
    assert shed.retry_after_s is not None
    assert stage.status().shed == 1


def test_a_flood_does_not_shut_the_door_on_others() -> None:
    stage = stage_with(engines=0, limits=AdmissionLimits(requests_max=10))
    submit(stage, *(of("flood", number) for number in range(1, 30)))
    taken = [of(tenant, 100 + number) for number, tenant in enumerate("bcbcb")]
    assert submit(stage, *taken) == []
    assert len(stage.sent(GATEWAY, Failed)) == 5


def test_bytes_that_wait_are_bounded_too() -> None:
    stage = stage_with(engines=0, limits=AdmissionLimits(bytes_max=10_000))
    big = of("", 1, presentation=b"x" * 8000)
    assert submit(stage, big) == []
    [refused] = submit(stage, replace(big, request_id=2, group_id=2))
    assert "bytes" in refused.message


def test_an_engine_that_fails_request_after_request_gets_none_for_a_while() -> None:
    stage = stage_with(2)
    bad = ENGINES[0]
    others = ENGINES[1]
    number = 0
    for _ in range(FAILURES_MAX):
        number += 1
        submit(stage, of("", number))
        for assign in stage.sent(bad, Assign):
            told = Refused(assign.request.request_id, assign.attempt, "internal_error", "no")
            stage.turn(bad, told)
        if others_work := stage.assigned(others):
            finish_at(stage, others, *others_work)
            stage.keep_alive([bad, others, GATEWAY], seconds=0.0)
    while stage.supervisor.dispatcher._circuits.allows(bad, stage.now):
        number += 1
        submit(stage, of("", number))
        for assign in stage.sent(bad, Assign):
            told = Refused(assign.request.request_id, assign.attempt, "internal_error", "no")
            stage.turn(bad, told)
    stage.effects.clear()
    submit(stage, *(of("", 1000 + extra) for extra in range(BATCH)))
    assert stage.assigned(bad) == []
    stage.keep_alive([bad, others, GATEWAY], seconds=PAUSE_MIN_S)
    submit(stage, *(of("", 2000 + extra) for extra in range(BATCH)))
    assert len(stage.assigned(bad)) == 1


def finish_at(stage: Stage, engine: str, *request_ids: int) -> None:
    rows = tuple(row(number, 5, finish=FinishReason.STOP) for number in request_ids)
    stage.turn(engine, StepOutput(1, rows))


def test_a_stranger_learns_nothing_of_usage() -> None:
    stage = stage_with()
    stage.hear("stranger.1", Submit(of("a", 1)), UsageRequest("a"))
    stage.decide()
    assert not stage.sent("stranger.1", UsageReply)
