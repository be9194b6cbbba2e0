"""Requests that end in vectors, through supervisor and engine: each has its vector, once."""

from __future__ import annotations

import struct

import pytest

from tests.unit.actors.engine_stage import Stage as EngineStage
from tests.unit.actors.supervisor_stage import (
    ENGINES,
    GATEWAY,
    PARAMS,
    Stage,
    dies_by_will,
    stage_with,
)
from understudy.protocol.codec import PROTOCOL_VERSION
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Attach,
    Capacity,
    Deliver,
    Dying,
    HeldRequest,
    Hello,
    Inventory,
    Reclaim,
    Role,
    StepOutput,
    Submit,
    TimelineRequest,
    Timelines,
    UsageReply,
    UsageRequest,
)
from understudy.protocol.request import (
    VECTOR_BYTES_MAX,
    FinishReason,
    Pooling,
    PoolingKind,
    Request,
    SamplingParams,
    TokenRow,
    fingerprint,
    portions,
)

MEAN = Pooling(PoolingKind.MEAN)
VECTOR = struct.pack("<3f", 0.6, 0.0, 0.8)


def pooled(request_id: int, *, prompt: int = 3, pooling: Pooling = MEAN) -> Request:
    params = SamplingParams(seed=0, max_tokens=1)
    return Request(request_id, request_id, (1,) * prompt, params, pooling=pooling)


def vector_row(request_id: int, *, attempt: int = 1, vector: bytes = VECTOR) -> TokenRow:
    return TokenRow(request_id, attempt, 0, (), 0, FinishReason.STOP, vector=vector)


def delivered(stage: Stage, gateway: str = GATEWAY) -> list[TokenRow]:
    return [row for deliver in stage.sent(gateway, Deliver) for row in deliver.rows]


# The supervisor


def test_a_vector_ends_its_request_and_is_told_and_billed_once() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(pooled(1)))
    assert stage.sent(ENGINES[0], Assign) == [Assign(pooled(1), 1)]
    stage.turn(ENGINES[0], StepOutput(1, (vector_row(1),)))
    stage.turn(ENGINES[0], StepOutput(2, (vector_row(1, vector=b"other"),)))
    assert delivered(stage) == [vector_row(1)]
    stage.turn(GATEWAY, TimelineRequest("", 1), UsageRequest(""))
    [told] = stage.sent(GATEWAY, Timelines)
    assert [event.what for event in told.timelines[0].events] == [
        "queued",
        "assigned",
        "begun",
        "ended",
    ]
    [used] = stage.sent(GATEWAY, UsageReply)
    assert [(day.requests, day.prompt_tokens, day.output_tokens) for day in used.days] == [
        (1, 3, 0)
    ]


def test_a_vector_that_was_being_computed_is_computed_again_elsewhere() -> None:
    stage = stage_with(2)
    stage.turn(GATEWAY, Submit(pooled(1)))
    dies_by_will(stage, ENGINES[0])
    assert Assign(pooled(1), 2) in stage.sent(ENGINES[1], Assign)
    stage.turn(ENGINES[0], StepOutput(1, (vector_row(1, vector=b"late"),)))
    stage.turn(ENGINES[1], StepOutput(1, (vector_row(1, attempt=2),)))
    assert delivered(stage) == [vector_row(1, attempt=2)]
    assert stage.status().running == 0


def test_a_vector_outlives_the_supervisor_that_took_it_in() -> None:
    """The next one tells it to who asks again, and gives the request to nobody."""
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(pooled(1)), Submit(pooled(2)))
    stage.turn(ENGINES[0], StepOutput(1, (vector_row(1),)))
    stage.disk.crash_process()
    after = Stage(disk=stage.disk)
    after.join(GATEWAY, Role.GATEWAY)
    after.turn(GATEWAY, Submit(pooled(1)), Reclaim((HeldRequest(1, 0), HeldRequest(2, 0))))
    assert Accepted(1) in after.sent(GATEWAY, Accepted)
    told = delivered(after)
    assert {(row.request_id, row.vector) for row in told} == {(1, VECTOR)}
    after.join(ENGINES[1], Role.ENGINE)
    after.turn(ENGINES[0], Dying("gone"))
    assert 1 not in {assign.request.request_id for assign in after.sent(ENGINES[1], Assign)}


def test_a_vector_that_no_supervisor_had_heard_of_comes_with_the_inventory() -> None:
    stage = stage_with(1)
    stage.turn(GATEWAY, Submit(pooled(1)))
    stage.disk.crash_process()
    after = Stage(disk=stage.disk)
    after.join(GATEWAY, Role.GATEWAY)
    after.turn(GATEWAY, Reclaim((HeldRequest(1, 0),)))
    after.join(ENGINES[0], Role.ENGINE, last_epoch=50)
    after.turn(ENGINES[0], Inventory((vector_row(1),), is_last=True))
    assert delivered(after) == [vector_row(1)]
    after.disk.crash_process()
    third = Stage(disk=stage.disk)
    third.join(GATEWAY, Role.GATEWAY)
    third.turn(GATEWAY, Attach(1, 0))
    assert [row.vector for row in delivered(third)] == [VECTOR]


def test_an_engine_that_makes_vectors_only_is_asked_for_one() -> None:
    stage = stage_with(1)
    stage.turn(ENGINES[0], Dying("killed"))
    capacity = Capacity(4, 128, 64, 16, pools_only=True)
    hello = Hello(
        Role.ENGINE,
        "engine-0",
        99,
        model="demo",
        capacity=capacity,
        numerics="bert",
        protocol=PROTOCOL_VERSION,
    )
    stage.turn("engine-0.2", hello)
    [assign] = stage.sent("engine-0.2", Assign)
    assert assign.request.pooling == MEAN
    answer = TokenRow(assign.request.request_id, 1, 0, (), 0, FinishReason.STOP, vector=VECTOR)
    stage.turn("engine-0.2", StepOutput(1, (answer,)))
    states = {engine.name: engine.state for engine in stage.status().engines}
    assert states["engine-0"] == "serving"


def test_large_vectors_are_told_in_as_many_messages_as_they_need() -> None:
    stage = stage_with(1)
    large = b"\0" * (VECTOR_BYTES_MAX // 2)
    for number in (1, 2, 3):
        stage.turn(GATEWAY, Submit(pooled(number)))
    stage.effects.clear()
    stage.turn(ENGINES[0], StepOutput(1, tuple(vector_row(n, vector=large) for n in (1, 2, 3))))
    assert [len(deliver.rows) for deliver in stage.sent(GATEWAY, Deliver)] == [2, 1]


@pytest.mark.parametrize(
    ("sizes", "rows_max", "expected"),
    [
        ([], 2, []),
        ([0, 0, 0], 2, [2, 1]),
        ([0, VECTOR_BYTES_MAX, 0], 9, [3]),
        ([1, VECTOR_BYTES_MAX, 1], 9, [1, 1, 1]),
        ([VECTOR_BYTES_MAX + 1, 1], 9, [1, 1]),
    ],
)
def test_portions_are_bounded_and_keep_the_order(
    sizes: list[int], rows_max: int, expected: list[int]
) -> None:
    rows = [vector_row(index, vector=b"\0" * size) for index, size in enumerate(sizes)]
    cut = list(portions(rows, rows_max=rows_max))
    assert [len(some) for some in cut] == expected
    assert [row for some in cut for row in some] == rows


def test_what_is_asked_of_a_prompt_is_part_of_its_fingerprint() -> None:
    plain = Request(1, 1, (1,), PARAMS)
    mean = Request(2, 2, (1,), PARAMS, pooling=MEAN)
    short = Request(3, 3, (1,), PARAMS, pooling=Pooling(PoolingKind.MEAN, 4))
    assert len({fingerprint(one) for one in (plain, mean, short)}) == 3
    assert fingerprint(mean) == fingerprint(Request(4, 4, (1,), PARAMS, pooling=MEAN))


# The engine


def test_an_engine_says_a_vector_once_and_again_with_its_inventory() -> None:
    stage = EngineStage()
    stage.join(1)
    rows = stage.rows(Assign(pooled(1, prompt=5), 1), Assign(pooled(2, prompt=7), 1))
    while len(rows) < 2:
        rows += stage.rows()
    assert [row.finish for row in rows] == [FinishReason.STOP] * 2
    assert all(len(row.vector) == 4 * 8 and not row.tokens for row in rows)
    assert stage.rows() == []
    told = [getattr(effect, "message", None) for effect in stage.turn()]
    assert not [one for one in told if isinstance(one, StepOutput)]


def test_a_prompt_that_fills_the_context_is_pooled_and_a_longer_one_is_not() -> None:
    stage = EngineStage()
    stage.join(1)
    rows = stage.rows(Assign(pooled(1, prompt=64), 1), Assign(pooled(2, prompt=65), 1))
    for _ in range(4):
        rows += stage.rows()
    by_id = {row.request_id: row for row in rows}
    assert by_id[1].vector
    assert (by_id[2].finish, by_id[2].vector) == (FinishReason.ERROR, b"")
