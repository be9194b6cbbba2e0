"""The engine on a device that computes by itself: two steps may be under way."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.simulation.stage import VirtualCard
from tests.unit.actors.engine_stage import NUM_BLOCKS, Stage, make_engine, request
from understudy.protocol.messages import Assign, Cancel
from understudy.protocol.request import FinishReason
from understudy.runtime.scheduling.decision import (
    Draws,
    Flight,
    OutOfMemory,
    SampledToken,
    StepPlan,
)


class Device:
    """A runner that notes what is launched and what is waited for; it draws the step's number."""

    overlaps = True

    def __init__(self) -> None:
        self.noted: list[str] = []
        self.too_large: set[int] = set()
        self.too_large_at_end: set[int] = set()

    def launch(self, plan: StepPlan) -> Flight:
        if plan.step in self.too_large:
            raise OutOfMemory
        self.noted.append(f"launch {plan.step}")
        return DeviceFlight(self, plan)


class DeviceFlight(NamedTuple):
    device: Device
    plan: StepPlan

    def collect(self) -> Draws:
        self.device.noted.append(f"collect {self.plan.step}")
        if self.plan.step in self.device.too_large_at_end:
            raise OutOfMemory
        return {
            share.sequence.request_id: (SampledToken(self.plan.step),)
            for share in self.plan.scheduled
        }


class DeviceStage(Stage):
    """An engine with a device of its own, and one request that decodes."""

    def __init__(self, **params: Any) -> None:
        super().__init__()
        self.device = Device()
        self.card = VirtualCard()
        self.engine = make_engine(self.device, self.clock)
        self.engine._card = self.card
        self.join(5)
        self.rows(Assign(request(1, **params), 1))


def test_the_next_step_is_launched_before_the_last_one_is_waited_for_and_reported() -> None:
    stage = DeviceStage()
    assert stage.device.noted == ["launch 1", "launch 2", "collect 1"], "behind a prompt, too"
    assert [row.tokens for row in stage.rows()] == [(2,)]
    assert stage.device.noted[3:] == ["launch 3", "collect 2"]
    assert stage.card.request_ids == [1], "a step is under way"
    assert stage.engine.heartbeat(stage.clock.now()).phase == "step"
    assert stage.engine.wake_at == stage.clock.now()
    assert [row.tokens for row in stage.rows()] == [(3,)]
    assert stage.device.noted[5:] == ["launch 4", "collect 3"]
    # The fifth token is the last, and it is known that nothing comes behind it.
    [row] = [row for _ in range(2) for row in stage.rows() if row.finish]
    assert stage.device.noted[7:] == ["launch 5", "collect 4", "collect 5"]
    assert (row.tokens, row.finish) == ((5,), FinishReason.LENGTH)
    assert stage.card.request_ids == []
    assert stage.engine.heartbeat(stage.clock.now()).phase == "idle"
    assert stage.blocks_free == NUM_BLOCKS


def test_an_end_that_nobody_could_know_costs_a_step_and_no_token() -> None:
    stage = DeviceStage(stop_token_ids=(3,), max_tokens=9)
    assert [row.tokens for row in stage.rows()] == [(2,)]
    [row] = stage.rows()
    assert (row.tokens, row.finish) == ((3,), FinishReason.STOP)
    assert stage.blocks_free == NUM_BLOCKS
    assert stage.device.noted[-2:] == ["launch 4", "collect 3"]
    assert stage.engine.wake_at == stage.clock.now(), "for what it has launched"
    assert stage.rows() == []
    assert stage.device.noted[-1] == "collect 4"
    wake_at = stage.engine.wake_at
    assert wake_at is not None
    assert wake_at > stage.clock.now()


def test_a_newcomer_starts_when_the_step_under_way_is_over() -> None:
    stage = DeviceStage(max_tokens=9)
    stage.rows()
    stage.device.noted.clear()
    assert [row.tokens for row in stage.rows(Assign(request(2, prompt=9), 1))] == [(3,)]
    assert {row.request_id: row.tokens for row in stage.rows()} == {1: (4,), 2: (4,)}
    assert stage.device.noted == ["collect 3", "launch 4", "launch 5", "collect 4"]


def test_what_is_cancelled_under_way_says_nothing_more() -> None:
    stage = DeviceStage(max_tokens=9)
    stage.rows()
    assert stage.rows(Cancel(1)) == []
    assert stage.device.noted[-1] == "collect 3"
    assert stage.card.request_ids == []
    assert stage.blocks_free == NUM_BLOCKS


def test_an_engine_that_is_told_to_stop_blames_nobody_for_the_step_under_way() -> None:
    stage = DeviceStage(max_tokens=9)
    stage.rows()
    assert stage.card.request_ids == [1]
    stage.engine.land()
    assert stage.device.noted[-1] == "collect 3"
    assert stage.card.request_ids == []
    stage.engine.land()


def test_a_step_that_does_not_fit_at_its_end_is_shed() -> None:
    stage = DeviceStage(max_tokens=9, logprobs=1)
    stage.device.too_large_at_end = {2}
    assert stage.rows() == []
    assert stage.engine.heartbeat(0.0).num_shed == 1
    stage.clock.sleep(1.0)
    assert [row.tokens for row in stage.rows()] == [(3,)]


def test_a_second_step_that_does_not_fit_waits_for_the_first() -> None:
    stage = DeviceStage(max_tokens=9)
    stage.device.too_large = {3}
    assert [row.tokens for row in stage.rows()] == [(2,)]
    assert stage.device.noted[-1] == "collect 2"
    assert [row.tokens for row in stage.rows()] == [(4,)]
    assert stage.engine.heartbeat(0.0).num_shed == 0
