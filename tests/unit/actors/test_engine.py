"""The engine, message by message, with the echo runner and time as it is told."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.actors.engine_stage import NUM_BLOCKS, Stage, make_engine, request
from understudy.actors.engine import ABANDONED_AFTER_S, ENDED_KEPT_S, Engine
from understudy.protocol.codec import PROTOCOL_VERSION
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Capacity,
    ClusterState,
    Fenced,
    Hello,
    Inventory,
    Pulse,
    Role,
    StepOutput,
    Submit,
    Welcome,
)
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    extend_prefix_hash,
)
from understudy.runtime.kit.actor import SUPERVISOR, BeatingActor, CloseSession, Effect, OpenSession
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.membership import SUPERVISOR_SILENT_S
from understudy.runtime.scheduling.decision import (
    Draws,
    SampledToken,
    StepPlan,
)


@pytest.fixture
def stage() -> Stage:
    """An engine with a session of epoch 5."""
    stage = Stage()
    stage.join(5)
    return stage


def test_it_says_hello_with_its_capacity() -> None:
    stage = Stage()
    (send,) = stage.turn()
    capacity = Capacity(4, 64, NUM_BLOCKS, 4)
    hello = Hello(
        Role.ENGINE,
        "engine-0",
        41,
        model="demo",
        capacity=capacity,
        start_time=7,
        numerics="echo",
        protocol=PROTOCOL_VERSION,
    )
    assert (getattr(send, "to", None), getattr(send, "message", None)) == (SUPERVISOR, hello)


def test_it_is_an_actor_that_beats() -> None:
    assert isinstance(Stage().engine, BeatingActor)


def test_a_request_is_run_to_its_end_and_every_step_reported(stage: Stage) -> None:
    rows = stage.rows(Assign(request(1), 1))
    while not rows[-1].finish:
        rows += stage.rows()
    assert [len(row.tokens) for row in rows] == [1] * 5
    assert [row.position for row in rows] == list(range(5))
    assert [row.finish for row in rows] == [0, 0, 0, 0, FinishReason.LENGTH]
    assert stage.steps == [1, 2, 3, 4, 5]
    output: tuple[int, ...] = ()
    for row in rows:
        output += row.tokens
        assert row.prefix_hash == extend_prefix_hash(0, output)
        assert (row.request_id, row.attempt) == (1, 1)
    assert stage.blocks_free == NUM_BLOCKS
    assert stage.rows() == []


def test_tokens_do_not_depend_on_company_or_on_where_a_request_goes_on(stage: Stage) -> None:
    alone = stage.run(Assign(request(1), 1))[1]
    crowd = [Assign(request(number, seed=number), 1) for number in range(10, 20)]
    assert stage.run(*crowd, Assign(request(1), 2))[1] == alone
    for cut in range(len(alone)):
        resumed = stage.run(Assign(request(1), 3 + cut, tuple(alone[:cut])))[1]
        assert resumed == alone[cut:]


def test_a_resumed_request_goes_on_at_its_position_with_its_hash(stage: Stage) -> None:
    (row,) = stage.rows(Assign(request(1), 4, (8, 9)))
    assert (row.attempt, row.position) == (4, 2)
    assert row.prefix_hash == extend_prefix_hash(0, (8, 9, *row.tokens))


def test_a_prompt_longer_than_a_step_says_nothing_until_it_is_read(stage: Stage) -> None:
    assert stage.rows(Assign(request(1, prompt=40), 1)) == []
    assert len(stage.rows()) == 1


def test_a_cancelled_request_gives_its_blocks_back_within_a_step(stage: Stage) -> None:
    stage.rows(Assign(request(1, max_tokens=50), 1))
    assert stage.blocks_free < NUM_BLOCKS
    assert stage.rows(Cancel(1)) == []  # who cancelled knows that it is over
    assert stage.blocks_free == NUM_BLOCKS
    assert stage.rows(Cancel(1), Cancel(99)) == []


def test_a_request_that_cannot_be_served_ends_at_once(stage: Stage) -> None:
    rows = stage.rows(
        Assign(request(1, prompt=64), 1),
        Assign(request(2, prompt=65), 1),
        Assign(Request(3, 3, (), SamplingParams(seed=1, max_tokens=5)), 1),
        Assign(request(4, max_tokens=0), 1),
        Assign(request(5, max_tokens=2), 2, (8, 9)),
    )
    ends = {row.request_id: row.finish for row in rows if row.finish}
    assert ends == {
        1: FinishReason.LENGTH,
        2: FinishReason.ERROR,
        3: FinishReason.ERROR,
        4: FinishReason.LENGTH,
        5: FinishReason.LENGTH,
    }
    assert stage.num_sequences == 0


def test_a_later_attempt_replaces_an_earlier_one_and_not_the_other_way_round(stage: Stage) -> None:
    stage.rows(Assign(request(1), 1))
    assert stage.rows(Assign(request(1), 3, (8, 9))) == [], "a step of the earlier is under way"
    (row,) = stage.rows()
    assert (row.attempt, row.position) == (3, 2)
    (row,) = stage.rows(Assign(request(1), 2))
    assert (row.attempt, row.position) == (3, 3)
    assert stage.num_sequences == 1


def lost_by_fence(stage: Stage) -> list[Effect]:
    return stage.turn(Fenced(5))


def lost_by_silence(stage: Stage) -> list[Effect]:
    stage.clock.sleep(SUPERVISOR_SILENT_S)
    return stage.turn()


def lost_by_deafness(stage: Stage) -> list[Effect]:
    stage.engine.lose(SUPERVISOR, stage.clock.now())
    return stage.turn()


@pytest.mark.parametrize("lose", [lost_by_fence, lost_by_silence, lost_by_deafness])
def test_without_its_session_an_engine_plays_on_and_tells_with_the_next_one(lose: Any) -> None:
    stage = Stage()
    stage.join(5)
    alone = Stage()
    alone.join(5)
    expected = alone.run(Assign(request(1, max_tokens=9), 1), Assign(request(2, max_tokens=3), 1))
    told = stage.rows(Assign(request(1, max_tokens=9), 1), Assign(request(2, max_tokens=3), 1))
    effects = lose(stage)
    assert CloseSession(SUPERVISOR) in effects
    hellos = [
        message
        for effect in effects
        if isinstance(message := getattr(effect, "message", None), Hello)
    ]
    assert [hello.last_epoch for hello in hellos] == [5]
    assert not any(isinstance(getattr(effect, "message", None), StepOutput) for effect in effects)
    for _ in range(3):
        assert stage.rows() == []
    effects = stage.turn(Welcome(6))
    assert effects[0] == OpenSession(SUPERVISOR, 6, PROTOCOL_VERSION)
    (inventory,) = [m for e in effects if isinstance(m := getattr(e, "message", None), Inventory)]
    assert inventory.is_last
    held = {row.request_id: row for row in inventory.rows}
    assert held[2].finish == FinishReason.LENGTH
    assert list(held[2].tokens) == expected[2]
    assert list(held[1].tokens) == expected[1][: len(held[1].tokens)]
    assert held[1].tokens[:1] == told[0].tokens
    assert held[1].position == held[2].position == 0


def test_an_inventory_holds_what_this_engine_added(stage: Stage) -> None:
    stage.rows(Assign(request(1, max_tokens=20), 3, (7, 8)))
    stage.turn(Fenced(5))
    effects = stage.turn(Welcome(6))
    (inventory,) = [m for e in effects if isinstance(m := getattr(e, "message", None), Inventory)]
    (row,) = inventory.rows
    assert (row.attempt, row.position) == (3, 2)
    assert row.prefix_hash == extend_prefix_hash(0, (7, 8, *row.tokens))


@pytest.mark.parametrize(("after_s", "is_told"), [(ENDED_KEPT_S - 1.0, True), (11.0, False)])
def test_an_end_is_told_again_for_a_while_for_it_may_have_been_told_to_the_dead(
    stage: Stage,
    after_s: float,
    is_told: bool,
) -> None:
    expected = stage.run(Assign(request(1), 1))
    stage.clock.sleep(after_s)
    stage.turn(Pulse())
    stage.turn(Fenced(5))
    effects = stage.turn(Welcome(6))
    (inventory,) = [m for e in effects if isinstance(m := getattr(e, "message", None), Inventory)]
    told = [(row.request_id, list(row.tokens), row.finish) for row in inventory.rows]
    assert told == ([(1, expected[1], FinishReason.LENGTH)] if is_told else [])


def test_an_engine_whose_supervisor_stays_away_drops_its_work(stage: Stage) -> None:
    stage.rows(Assign(request(1, max_tokens=60), 1))
    stage.turn(Fenced(5))
    stage.clock.sleep(ABANDONED_AFTER_S)
    stage.turn()
    assert stage.num_sequences == 0
    assert stage.blocks_free == NUM_BLOCKS


def test_a_later_attempt_takes_the_place_of_an_earlier_one(stage: Stage) -> None:
    stage.rows(Assign(request(1, max_tokens=20), 1))
    assert stage.rows(Assign(request(1, max_tokens=20), 2, (5,))) == []
    (row,) = stage.rows()
    assert (row.attempt, row.position) == (2, 1)
    (row,) = stage.rows(Assign(request(1, max_tokens=20), 1))
    assert (row.attempt, row.position) == (2, 2)


def test_an_attempt_that_was_taken_back_says_nothing_beside_the_one_that_replaces_it(
    stage: Stage,
) -> None:
    stage.rows(Assign(request(1, max_tokens=20), 1))
    assert stage.rows(Cancel(1), Assign(request(1, max_tokens=20), 2, (5,))) == []
    (row,) = stage.rows()
    assert (row.attempt, row.position, row.finish) == (2, 1, 0)
    assert stage.num_sequences == 1


def test_it_wants_its_next_turn_at_once_while_there_is_work(stage: Stage) -> None:
    idle_until = stage.engine.wake_at
    assert idle_until is not None
    assert idle_until > stage.clock.now()
    stage.rows(Assign(request(1), 1))
    assert stage.engine.wake_at == stage.clock.now()
    stage.run()
    idle_until = stage.engine.wake_at
    assert idle_until is not None
    assert idle_until > stage.clock.now()


def test_a_step_takes_its_time() -> None:
    stage = Stage(step_s=0.25)
    stage.join(5)
    before = stage.clock.now()
    stage.run(Assign(request(1), 1), Assign(request(2), 1))
    assert stage.clock.now() == pytest.approx(before + 5 * 0.25)


def test_a_long_step_does_not_make_the_supervisor_seem_silent() -> None:
    stage = Stage(step_s=2 * SUPERVISOR_SILENT_S)
    stage.join(5)
    stage.turn(Assign(request(1), 1))
    stage.rows(Pulse())
    assert stage.num_sequences == 1
    assert len(stage.rows(Pulse())) == 1


class Watching:
    """A runner that looks at its engine's heartbeat while it runs."""

    def __init__(self) -> None:
        self.engine: Engine | None = None
        self.beats: list[tuple[str, int, float]] = []

    def execute(self, plan: StepPlan) -> Draws:
        assert self.engine is not None
        beat = self.engine.heartbeat(107.0)
        self.beats.append((beat.phase, beat.step, beat.phase_for_s))
        return {scheduled.sequence.request_id: (SampledToken(5),) for scheduled in plan.scheduled}


def test_a_heartbeat_tells_what_the_engine_is_doing() -> None:
    runner = Watching()
    clock = VirtualClock(100.0)
    engine = make_engine(runner, clock)
    runner.engine = engine
    idle = engine.heartbeat(103.0)
    assert (idle.phase, idle.phase_for_s, idle.step, idle.blocks_free) == ("idle", 3.0, 0, 16)
    clock.sleep(5.0)
    for number in range(6):
        engine.handle(Assign(request(number), 1), SUPERVISOR, 105.0)
    engine.decide(105.0)
    engine.decide(105.0)
    assert runner.beats == [("step", 0, 2.0), ("step", 1, 2.0)]
    beat = engine.heartbeat(105.5)
    assert (beat.phase, beat.step, beat.phase_for_s) == ("idle", 2, 0.5)
    assert (beat.running, beat.waiting, beat.blocks_free) == (4, 2, 12)


def test_what_nobody_should_say_to_an_engine_changes_nothing(stage: Stage) -> None:
    stage.rows(Assign(request(1, max_tokens=50), 1))
    for message in (Accepted(1), ClusterState(1, 1, 1), Submit(request(9)), Fenced(4), Welcome(6)):
        assert len(stage.rows(message)) == 1
    assert stage.num_sequences == 1


# Deadlines


def test_what_is_past_its_deadline_ends_with_what_it_has_and_takes_part_in_no_step() -> None:
    stage = Stage(step_s=0.1)
    stage.join(1)
    wanted = request(1, max_tokens=50)
    outputs = stage.run(Assign(wanted, 1, deadline_s=0.35), Assign(request(2, max_tokens=2), 1))
    assert len(outputs[1]) == 4  # the fourth step was under way
    assert len(outputs[2]) == 2
    assert stage.engine.heartbeat(0.0).blocks_free == NUM_BLOCKS


def test_an_expired_request_is_never_computed() -> None:
    stage = Stage()
    stage.join(1)
    [end] = stage.rows(Assign(request(1), 1, deadline_s=0.0))
    assert (end.tokens, end.finish) == ((), FinishReason.DEADLINE)
    assert stage.engine.heartbeat(0.0).running == 0


def test_the_deadline_of_an_older_attempt_ends_nothing() -> None:
    stage = Stage(step_s=0.1)
    stage.join(1)
    stage.rows(Assign(request(1, max_tokens=6), 1, deadline_s=0.15))
    assert stage.rows(Assign(request(1, max_tokens=6), 2, deadline_s=100.0)) == []
    outputs = stage.run()
    assert len(outputs[1]) == 6
