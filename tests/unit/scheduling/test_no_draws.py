"""Sequences for which a step draws nothing: they wait, or end, and nobody else notices."""

from __future__ import annotations

import pytest

from tests.unit.scheduling.steps import (
    draw,
    make_scheduler,
    make_sequence,
    run_step,
    run_to_end,
    schedule,
    shares,
)
from understudy.protocol.request import FinishReason
from understudy.runtime.scheduling.decision import NoDraw


@pytest.mark.parametrize("prompt_length", [1, 3, 4, 5, 8])
def test_a_sequence_that_waits_computes_its_last_token_again(prompt_length: int) -> None:
    scheduler = make_scheduler(block_size=4)
    scheduler.add(make_sequence(1, prompt_length=prompt_length))
    scheduler.add(make_sequence(2))
    for _ in range(3):
        plan = schedule(scheduler)
        rows = scheduler.update(plan, {**draw(plan), 1: NoDraw.WAITING})
        scheduler.check_integrity()
        assert [row.request_id for row in rows] == [2]
    assert shares(schedule(scheduler)) == {1: 1, 2: 1}
    (row, _) = run_step(scheduler)
    assert (row.request_id, row.position, row.tokens) == (1, 0, (9,))
    run_to_end(scheduler)


def test_a_draft_is_forgotten_while_a_sequence_waits() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    run_step(scheduler)
    plan = scheduler.schedule({1: [5, 6, 7]})
    assert plan is not None
    assert scheduler.update(plan, {1: NoDraw.WAITING}) == []
    assert shares(schedule(scheduler)) == {1: 1}
    (row,) = run_step(scheduler)
    assert (row.position, row.tokens) == (1, (9,))


def test_a_sequence_may_be_preempted_while_it_waits() -> None:
    scheduler = make_scheduler(num_blocks=3, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=4, max_tokens=4))
    scheduler.add(make_sequence(2, prompt_length=4, max_tokens=4))
    for _ in range(4):
        plan = schedule(scheduler)
        waiting = {2: NoDraw.WAITING} if 2 in shares(plan) else {}
        scheduler.update(plan, {**draw(plan), **waiting})
        scheduler.check_integrity()
    finished = [row.request_id for row in run_to_end(scheduler) if row.finish]
    assert 2 in finished


def test_a_sequence_whose_grammar_fails_ends_alone() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, max_tokens=3))
    scheduler.add(make_sequence(2, max_tokens=3))
    run_step(scheduler)
    plan = schedule(scheduler)
    rows = scheduler.update(plan, {**draw(plan), 1: NoDraw.REFUSED})
    scheduler.check_integrity()
    assert [(row.request_id, row.tokens, row.finish) for row in rows] == [
        (1, (), FinishReason.REFUSED),
        (2, (9,), 0),
    ]
    assert [row.finish for row in run_to_end(scheduler)] == [FinishReason.LENGTH]
