"""The scheduler's rules, one by one. What they add up to is in test_scheduler_properties."""

from __future__ import annotations

import pytest

from tests.unit.scheduling.steps import (
    STOP_TOKEN,
    draw,
    make_scheduler,
    make_sequence,
    run_step,
    run_to_end,
    schedule,
    shares,
)
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import (
    FinishReason,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.scheduling.decision import SampledToken
from understudy.runtime.scheduling.scheduler import SchedulerConfig
from understudy.runtime.scheduling.sequence import SequenceStatus

# One rule for all tokens


def test_a_scheduler_without_sequences_has_no_work_and_no_plan() -> None:
    scheduler = make_scheduler()
    assert not scheduler.has_work
    assert scheduler.schedule() is None


def test_a_prompt_that_fits_the_budget_is_computed_in_one_step_and_draws_a_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(7, prompt_length=10))
    plan = schedule(scheduler)
    assert shares(plan) == {7: 10}
    assert plan.scheduled[0].samples
    (row,) = scheduler.update(plan, draw(plan, 42))
    assert row == TokenRow(7, 1, 0, (42,), extend_prefix_hash(0, (42,)), 0, ())


def test_a_long_prompt_catches_up_in_chunks_of_the_budget_and_draws_at_its_end_alone() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(make_sequence(1, prompt_length=40))
    for num_tokens in (16, 16):
        plan = schedule(scheduler)
        assert shares(plan) == {1: num_tokens}
        assert not plan.scheduled[0].samples
        assert scheduler.update(plan, {}) == []
    assert shares(schedule(scheduler)) == {1: 8}
    (row,) = run_step(scheduler)
    assert row.position == 0
    assert shares(schedule(scheduler)) == {1: 1}


def test_a_step_mixes_sequences_that_decode_with_prompts_that_catch_up() -> None:
    scheduler = make_scheduler(budget=16)
    scheduler.add(make_sequence(1, prompt_length=4))
    scheduler.add(make_sequence(2, prompt_length=5))
    run_step(scheduler)
    scheduler.add(make_sequence(3, prompt_length=6))
    scheduler.add(make_sequence(4, prompt_length=30))
    plan = schedule(scheduler)
    assert shares(plan) == {1: 1, 2: 1, 3: 6, 4: 8}
    assert [scheduled.samples for scheduled in plan.scheduled] == [True, True, True, False]
    assert plan.num_tokens == 16


def test_the_budget_is_never_exceeded_when_more_sequences_run_than_it_has_tokens() -> None:
    scheduler = make_scheduler(budget=3)
    for request_id in (1, 2, 3):
        scheduler.add(make_sequence(request_id, prompt_length=1, max_tokens=3))
    run_step(scheduler)
    scheduler.add(make_sequence(4, prompt_length=2, max_tokens=3))
    assert shares(schedule(scheduler)) == {1: 1, 2: 1, 3: 1}
    assert [row.request_id for row in run_to_end(scheduler) if row.finish] == [1, 2, 3, 4]


def test_sequences_for_which_no_budget_is_left_keep_their_blocks_and_come_later() -> None:
    scheduler = make_scheduler(budget=4, num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=3, max_tokens=3, priority=1))
    run_step(scheduler)
    scheduler.add(make_sequence(2, prompt_length=8, max_tokens=1))
    assert shares(schedule(scheduler)) == {1: 1, 2: 3}
    run_step(scheduler)
    plan = schedule(scheduler)
    assert shares(plan) == {2: 4}
    assert (plan.preempted, scheduler.num_running) == ((), 2)
    assert [row.request_id for row in run_to_end(scheduler) if row.finish] == [2, 1]


def test_no_more_sequences_run_than_there_are_places() -> None:
    scheduler = make_scheduler(max_num_seqs=2)
    for request_id in (1, 2, 3):
        scheduler.add(make_sequence(request_id))
    assert shares(schedule(scheduler)).keys() == {1, 2}
    assert (scheduler.num_running, scheduler.num_waiting) == (2, 1)


def test_logprobs_go_into_the_row_of_their_token() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    logprobs = TokenLogprobs(-0.5, ((9, -0.5),))
    (row,) = scheduler.update(schedule(scheduler), {1: (SampledToken(9, logprobs),)})
    assert row.logprobs == (pack_logprobs(logprobs),)


# The end of a sequence


def test_a_stop_token_ends_the_sequence_and_frees_its_blocks_in_the_same_step() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1)
    scheduler.add(sequence)
    (row,) = run_step(scheduler, STOP_TOKEN)
    assert (row.tokens, row.finish) == ((STOP_TOKEN,), FinishReason.STOP)
    assert sequence.block_table == []
    assert not scheduler.has_work


def test_max_tokens_ends_the_sequence_for_length() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, max_tokens=2))
    assert [row.finish for row in run_to_end(scheduler)] == [0, FinishReason.LENGTH]


def test_the_model_length_ends_the_sequence_for_length() -> None:
    scheduler = make_scheduler(max_model_len=6)
    scheduler.add(make_sequence(1, prompt_length=4))
    assert [row.finish for row in run_to_end(scheduler)] == [0, FinishReason.LENGTH]


def test_a_prompt_too_big_for_all_blocks_ends_with_an_error_rather_than_waits() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=9))
    scheduler.add(make_sequence(2, prompt_length=8))
    first, second = run_step(scheduler)
    assert first == TokenRow(1, 1, 0, (), 0, FinishReason.ERROR, ())
    assert (second.request_id, second.finish) == (2, FinishReason.LENGTH)
    assert not scheduler.has_work


def test_a_sequence_that_fills_all_blocks_ends_for_length_with_its_last_token_uncomputed() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=6))
    rows = run_to_end(scheduler)
    assert [row.position for row in rows] == [0, 1, 2]
    assert rows[-1].finish == FinishReason.LENGTH


def test_a_resumed_sequence_too_big_for_all_blocks_ends_for_length() -> None:
    scheduler = make_scheduler(num_blocks=2, block_size=4)
    output = (5, 6, 7)
    scheduler.add(make_sequence(1, prompt_length=9, output=output))
    (row,) = run_step(scheduler)
    assert row == TokenRow(1, 1, 3, (), extend_prefix_hash(0, output), FinishReason.LENGTH, ())


def test_an_end_before_the_start_is_reported_by_a_step_that_computes_nothing() -> None:
    scheduler = make_scheduler(max_model_len=8)
    scheduler.add(make_sequence(1, prompt_length=9))
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 0)
    assert scheduler.has_work
    assert schedule(scheduler).scheduled == ()
    assert [row.finish for row in run_step(scheduler)] == [FinishReason.ERROR]
    assert scheduler.schedule() is None


def test_an_empty_prompt_ends_with_an_error() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, prompt_length=0))
    assert [row.finish for row in run_step(scheduler)] == [FinishReason.ERROR]


# Cancellation


def test_cancelling_a_waiting_sequence_takes_it_out_of_the_queue() -> None:
    scheduler = make_scheduler(max_num_seqs=1)
    for request_id in (1, 2, 3):
        scheduler.add(make_sequence(request_id, max_tokens=1))
    assert scheduler.cancel(2)
    scheduler.check_integrity()
    rows = run_to_end(scheduler)
    assert [row.request_id for row in rows] == [2, 1, 3]
    assert rows[0] == TokenRow(2, 1, 0, (), 0, FinishReason.CANCELLED, ())


def test_cancelling_a_running_sequence_frees_its_blocks_at_once() -> None:
    scheduler = make_scheduler()
    sequence = make_sequence(1)
    scheduler.add(sequence)
    run_step(scheduler)
    assert scheduler.cancel(1)
    assert sequence.block_table == []
    scheduler.check_integrity()
    (row,) = run_step(scheduler)
    assert (row.position, row.tokens, row.finish) == (1, (), FinishReason.CANCELLED)


def test_what_a_step_draws_for_a_sequence_cancelled_in_its_middle_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    scheduler.add(make_sequence(2))
    plan = schedule(scheduler)
    drawn = draw(plan)
    assert scheduler.cancel(1)
    rows = scheduler.update(plan, drawn)
    scheduler.check_integrity()
    assert [(row.request_id, row.tokens, row.finish) for row in rows] == [
        (1, (), FinishReason.CANCELLED),
        (2, (9,), 0),
    ]


def test_cancelling_what_is_not_here_says_so() -> None:
    scheduler = make_scheduler()
    assert not scheduler.cancel(1)
    scheduler.add(make_sequence(1, max_tokens=1))
    run_step(scheduler)
    assert not scheduler.cancel(1)


# Preemption


def test_the_latest_arrival_gives_its_blocks_back_and_waits_before_everyone_else() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, max_num_seqs=2)
    first, second = make_sequence(1, prompt_length=7), make_sequence(2, prompt_length=8)
    for sequence in (first, second, make_sequence(3)):
        scheduler.add(sequence)
    run_step(scheduler)  # 7 and 8 tokens fill two blocks each
    plan = schedule(scheduler)
    assert plan.preempted == (2,)
    assert shares(plan) == {1: 1}
    assert (second.status, second.num_computed_tokens) == (SequenceStatus.WAITING, 0)
    assert second.block_table == []
    assert second.num_output_tokens == 1
    scheduler.update(plan, draw(plan))
    assert scheduler.cancel(1)
    # Nobody has overwritten what it had computed.
    assert shares(schedule(scheduler)) == {2: 1, 3: 4}


def test_several_victims_of_one_step_wait_in_their_order_of_arrival() -> None:
    scheduler = make_scheduler(num_blocks=5, block_size=2)
    scheduler.add(make_sequence(1, prompt_length=6))
    for request_id in (2, 3):
        scheduler.add(make_sequence(request_id, prompt_length=2))
    run_step(scheduler)
    plan = schedule(scheduler)
    assert plan.preempted == (3, 2)
    assert scheduler.cancel(1)
    assert list(shares(schedule(scheduler))) == [2, 3]


def test_lower_priority_gives_way_before_later_arrival() -> None:
    scheduler = make_scheduler(num_blocks=6, block_size=4)
    for request_id, priority in ((1, 1), (2, 0), (3, 1)):
        scheduler.add(make_sequence(request_id, prompt_length=8, priority=priority))
    run_step(scheduler)
    plan = schedule(scheduler)
    assert plan.preempted == (3,)
    assert list(shares(plan)) == [2, 1]


def test_the_earliest_arrival_gives_way_if_it_has_the_lowest_priority() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=8, priority=5))
    scheduler.add(make_sequence(2, prompt_length=8, priority=0))
    run_step(scheduler)
    plan = schedule(scheduler)
    assert plan.preempted == (1,)
    assert shares(plan) == {2: 1}


def test_a_sequence_that_cannot_grow_and_is_the_least_urgent_gives_way_itself() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=6))
    scheduler.add(make_sequence(2, prompt_length=8))
    run_step(scheduler)
    plan = schedule(scheduler)
    assert plan.preempted == (2,)
    assert shares(plan) == {1: 1}


def test_nobody_starts_in_a_step_that_preempts() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=8))
    scheduler.add(make_sequence(2, prompt_length=8))
    run_step(scheduler)
    scheduler.add(make_sequence(3, prompt_length=1))
    plan = schedule(scheduler)
    assert plan.preempted == (2,)
    assert shares(plan) == {1: 1}


def test_a_preempted_sequence_computes_all_its_tokens_again_and_goes_on_where_it_was() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4, budget=16)
    scheduler.add(make_sequence(1, prompt_length=7, max_tokens=3))
    scheduler.add(make_sequence(2, prompt_length=8, max_tokens=4))
    rows = run_to_end(scheduler)
    positions = [row.position for row in rows if row.request_id == 2]
    assert positions == [0, 1, 2, 3]
    expected = extend_prefix_hash(0, (9, 9, 9, 9))
    assert [row.prefix_hash for row in rows if row.request_id == 2][-1] == expected


def test_a_big_sequence_at_the_head_of_the_queue_is_not_passed_over() -> None:
    scheduler = make_scheduler(num_blocks=4, block_size=4)
    scheduler.add(make_sequence(1, prompt_length=4, max_tokens=2))
    run_step(scheduler)
    scheduler.add(make_sequence(2, prompt_length=16))
    scheduler.add(make_sequence(3, prompt_length=1))
    assert shares(schedule(scheduler)) == {1: 1}
    run_step(scheduler)
    assert shares(schedule(scheduler)) == {2: 16}


# Resume and replacement


def test_a_resumed_sequence_computes_prompt_and_output_and_draws_the_next_position() -> None:
    scheduler = make_scheduler(budget=16)
    output = tuple(range(20, 30))
    scheduler.add(make_sequence(1, prompt_length=10, output=output, attempt=2))
    assert shares(schedule(scheduler)) == {1: 16}
    assert run_step(scheduler) == []
    assert shares(schedule(scheduler)) == {1: 4}
    (row,) = run_step(scheduler)
    assert (row.attempt, row.position, row.tokens) == (2, 10, (9,))
    assert row.prefix_hash == extend_prefix_hash(0, (*output, 9))


def test_max_tokens_counts_the_output_that_a_resumed_sequence_brings_along() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, output=(5, 6, 7), max_tokens=5))
    rows = run_to_end(scheduler)
    assert [(row.position, row.finish) for row in rows] == [(3, 0), (4, FinishReason.LENGTH)]


def test_min_tokens_counts_the_output_that_a_resumed_sequence_brings_along() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, output=(5, 6, 7), min_tokens=3))
    scheduler.add(make_sequence(2, output=(5, 6), min_tokens=3))
    first, second = run_step(scheduler, STOP_TOKEN)
    assert first.finish == FinishReason.STOP
    assert not second.finish


@pytest.mark.parametrize(
    ("output", "reason"),
    [((5, 6), FinishReason.LENGTH), ((5, STOP_TOKEN), FinishReason.STOP)],
)
def test_a_resumed_sequence_whose_output_is_complete_ends_without_another_token(
    output: tuple[int, ...], reason: FinishReason
) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, output=output, max_tokens=2))
    (row,) = run_step(scheduler)
    assert row == TokenRow(1, 1, 2, (), extend_prefix_hash(0, output), reason, ())


def test_a_newer_attempt_replaces_the_one_that_is_here() -> None:
    scheduler = make_scheduler()
    old, new = make_sequence(1, attempt=1), make_sequence(1, attempt=3, output=(9,))
    scheduler.add(old)
    run_step(scheduler)
    scheduler.add(new)
    assert old.block_table == []
    assert (scheduler.num_running, scheduler.num_waiting) == (0, 1)
    (row,) = run_step(scheduler)
    assert (row.attempt, row.position) == (3, 1)


def test_what_a_step_draws_for_an_attempt_replaced_in_its_middle_is_dropped() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, attempt=1))
    plan = schedule(scheduler)
    drawn = draw(plan)
    scheduler.add(make_sequence(1, attempt=2))
    assert scheduler.update(plan, drawn) == []
    (row,) = run_step(scheduler)
    assert (row.attempt, row.position) == (2, 0)


@pytest.mark.parametrize("attempt", [1, 2])
def test_the_same_attempt_once_more_or_an_older_one_changes_nothing(attempt: int) -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1, attempt=2))
    run_step(scheduler)
    scheduler.add(make_sequence(1, attempt=attempt))
    (row,) = run_step(scheduler)
    assert (row.attempt, row.position) == (2, 1)


# The caller's mistakes


def test_a_plan_that_was_not_carried_out_may_be_replaced() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    abandoned = schedule(scheduler)
    plan = schedule(scheduler)
    assert shares(plan) == shares(abandoned)
    assert plan.step == abandoned.step + 1
    with pytest.raises(AssertionError, match="in its turn"):
        scheduler.update(abandoned, draw(abandoned))
    assert len(scheduler.update(plan, draw(plan))) == 1


def test_a_step_is_taken_in_once() -> None:
    scheduler = make_scheduler()
    scheduler.add(make_sequence(1))
    plan = schedule(scheduler)
    drawn = draw(plan)
    scheduler.update(plan, drawn)
    with pytest.raises(AssertionError, match="taken in once"):
        scheduler.update(plan, drawn)


def test_every_bad_limit_is_named() -> None:
    with pytest.raises(ConfigurationError) as caught:
        SchedulerConfig(max_num_seqs=0, max_num_batched_tokens=-1, max_model_len=1, block_size=16)
    assert caught.value.problems == (
        "max_num_seqs must be at least 1, not 0",
        "max_num_batched_tokens must be at least 1, not -1",
    )
