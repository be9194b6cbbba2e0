"""Drafts in a step: what they bring, and what nobody has to give for them."""

from __future__ import annotations

from tests.unit.scheduling.steps import make_scheduler, make_sequence, run_step, schedule, shares
from understudy.protocol.request import FinishReason
from understudy.runtime.scheduling.decision import SampledToken


def test_a_draft_is_a_longer_row_that_brings_what_comes_true_and_one_more() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    run_step(scheduler)
    plan = scheduler.schedule({1: [5, 6, 7]})
    assert plan is not None
    assert plan.scheduled[0].draft == (5, 6, 7)
    assert plan.num_tokens == 4
    assert plan.scheduled[0].samples
    drawn = tuple(map(SampledToken, (5, 6, 8)))
    (row,) = scheduler.update(plan, {1: drawn})
    assert (row.position, row.tokens) == (1, (5, 6, 8))
    scheduler.check_integrity()
    assert shares(schedule(scheduler)) == {1: 1}


def test_an_end_within_a_draft_is_the_end() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, max_tokens=3))
    run_step(scheduler)
    plan = scheduler.schedule({1: [5, 6, 7]})
    assert plan is not None
    (row,) = scheduler.update(plan, {1: tuple(map(SampledToken, (5, 6, 7, 8)))})
    assert (row.tokens, row.finish) == ((5, 6), FinishReason.LENGTH)
    assert not scheduler.has_work


def test_drafts_get_the_budget_that_the_others_leave() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(make_sequence(1, prompt_length=4))
    scheduler.add(make_sequence(2, prompt_length=4))
    run_step(scheduler)
    plan = scheduler.schedule({1: range(20), 2: range(20)})
    assert plan is not None
    assert plan.num_tokens <= 16
    assert {s.sequence.request_id for s in plan.scheduled} == {1, 2}


def test_nobody_gives_way_for_a_draft() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    first, second = make_sequence(1, prompt_length=3), make_sequence(2, prompt_length=3)
    scheduler.add(first)
    scheduler.add(second)
    run_step(scheduler)
    plan = scheduler.schedule({1: [5, 6], 2: [5, 6]})
    assert plan is not None
    assert plan.preempted == ()
    assert shares(plan) == {1: 1, 2: 1}
