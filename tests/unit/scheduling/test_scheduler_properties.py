"""The scheduler under anything: random arrivals, ends, budgets and pools, against an oracle.

The runner here computes nothing, but it has a cache, slot by slot: a token is drawn only if every
earlier token of its sequence is found where the block table says. The oracle is the obvious
engine, which runs one request at a time and has no cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.unit.scheduling.caching_runner import (
    UNLIMITED,
    VOCABULARY,
    CachingRunner,
    next_token,
    oracle,
)
from understudy.protocol.packed_logprobs import unpack_logprobs
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence, SequenceStatus


def urgency(sequence: Sequence) -> tuple[int, int]:
    return sequence.priority, sequence.arrival


class End(Enum):
    NOT_YET = auto()
    CANCELLED = auto()
    """And the row that says so is still to come."""
    REPORTED = auto()
    REPLACED = auto()
    """By a newer attempt, which takes over its duty to end."""


@dataclass
class Attempt:
    """What the outside world knows of one attempt at a request."""

    request: Request
    sequence: Sequence
    output: list[int]
    expected: list[int]
    expected_reason: FinishReason
    end: End = End.NOT_YET


@dataclass(frozen=True)
class Arrival:
    """A request before it has an id."""

    prompt_length: int
    params: SamplingParams
    priority: int
    num_resumed: int
    tenant: str = ""


arrivals = st.builds(
    Arrival,
    prompt_length=st.sampled_from([4, 1, 2, 3, 5, 6, 7, 8, 12, 20, 0]),
    params=st.builds(
        SamplingParams,
        seed=st.just(0),
        max_tokens=st.sampled_from([16, 12, 20, 24, 5, 1, 0]),
        min_tokens=st.integers(0, 4),
        stop_token_ids=st.sampled_from([(), (3,), (5, 11)]),
        logprobs=st.sampled_from([None, 0]),
    ),
    priority=st.sampled_from([0, -1, 1]),
    num_resumed=st.sampled_from([0, 0, 0, 1, 3, 12]),
    tenant=st.sampled_from(["", "", "other"]),
)


class SchedulerMachine(RuleBasedStateMachine):
    """Every rule leaves the scheduler between two steps, or in the middle of one."""

    has_started = False

    @initialize(
        max_num_seqs=st.sampled_from([4, 6, 3, 2, 1]),
        budget=st.sampled_from([16, 8, 32, 3, 1]),
        block_size=st.sampled_from([3, 2, 4, 1]),
        num_blocks=st.sampled_from([8, 6, 10, 4, 1]),
        max_model_len=st.sampled_from([32, 40, 24, 8]),
        crowd=st.lists(arrivals, min_size=5, max_size=10),
    )
    def start(
        self,
        max_num_seqs: int,
        budget: int,
        block_size: int,
        num_blocks: int,
        max_model_len: int,
        crowd: list[Arrival],
    ) -> None:
        self.config = SchedulerConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=budget,
            max_model_len=max_model_len,
            block_size=block_size,
        )
        self.kv_cache_manager = KVCacheManager(num_blocks=num_blocks, block_size=block_size)
        self.scheduler = Scheduler(self.config, self.kv_cache_manager)
        self.runner = CachingRunner(block_size)
        self.attempts: dict[tuple[int, int], Attempt] = {}
        self.newest: dict[int, Attempt] = {}
        self.request_ids = count(1)
        self.plan: StepPlan | None = None
        self.ahead: StepPlan | None = None
        self.num_steps_without_row = 0
        self.num_preempted = 0
        self.num_ahead = 0
        self.has_shed = False
        """And goes on with smaller steps for a while."""
        self.has_started = True
        for arrival in crowd:
            self.add(arrival)

    @rule(arrival=arrivals)
    def add(self, arrival: Arrival) -> None:
        request_id = next(self.request_ids)
        prompt = tuple(range(100, 100 + arrival.prompt_length))
        request = Request(
            request_id,
            request_id,
            prompt,
            arrival.params,
            arrival.priority,
            tenant=arrival.tenant,
        )
        self.runner.requests[request_id] = request
        # What it brings along was made by an engine with a larger cache.
        whole, _ = oracle(request, [], max_model_len=UNLIMITED, num_slots=UNLIMITED)
        self.start_attempt(request, attempt=1, output=whole[: arrival.num_resumed])

    @rule(data=st.data(), newer_by=st.integers(-1, 2))
    def add_again(self, data: st.DataObject, newer_by: int) -> None:
        old = self.newest[data.draw(st.sampled_from(sorted(self.newest)))]
        attempt = old.sequence.attempt + newer_by
        is_here = old.sequence.status is not SequenceStatus.FINISHED
        if newer_by <= 0:
            if is_here:
                self.scheduler.add(Sequence(old.request, attempt=attempt))
            return
        if is_here:
            old.end = End.REPLACED
        self.start_attempt(old.request, attempt=attempt, output=old.output)

    def start_attempt(self, request: Request, *, attempt: int, output: list[int]) -> None:
        sequence = Sequence(request, attempt=attempt, output=tuple(output))
        expected, reason = oracle(
            request,
            output,
            max_model_len=self.config.max_model_len,
            num_slots=self.kv_cache_manager.tokens_max,
        )
        new = Attempt(request, sequence, list(output), expected, reason)
        self.attempts[request.request_id, attempt] = self.newest[request.request_id] = new
        self.scheduler.add(sequence)
        self.num_steps_without_row = 0

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        target = self.newest[data.draw(st.sampled_from(sorted(self.newest)))]
        is_here = target.sequence.status is not SequenceStatus.FINISHED
        assert self.scheduler.cancel(target.request.request_id) is is_here
        if is_here:
            target.end = End.CANCELLED
        assert not target.sequence.block_table
        assert not self.scheduler.cancel(target.request.request_id)

    @rule()
    def schedule(self) -> None:
        """Plan a step; if one is planned already, the new plan takes its place."""
        self.plan_step(self.guess())

    def plan_step(self, drafts: dict[int, list[int]]) -> None:
        while self.ahead is not None:
            self.update()
        self.plan = self.scheduler.schedule(drafts)
        assert (self.plan is not None) is self.scheduler.has_work
        if self.plan is not None:
            self.check_plan(self.plan)
            self.sampled = self.runner.execute(self.plan)

    @rule()
    def schedule_ahead(self) -> None:
        """Plan another step behind the one that is planned, and let a device begin both."""
        if self.plan is None or self.ahead is not None:
            return
        self.ahead = self.scheduler.schedule_ahead()
        if self.ahead is None:
            return
        taking_part = {share.sequence.request_id for share in self.plan.scheduled}
        for sequence, num_tokens, draft in self.ahead.scheduled:
            assert (num_tokens, draft) == (1, ())
            assert sequence.request_id in taking_part
            num_slots = len(sequence.block_table) * self.config.block_size
            assert num_slots >= sequence.num_tokens + 1
        self.num_ahead += 1
        self.sampled_ahead = self.runner.execute_ahead(self.ahead, self.sampled)

    def guess(self) -> dict[int, list[int]]:
        """Drafts of all lengths, some right, some wrong somewhere."""
        drafts = {}
        for sequence in self.scheduler.running:
            luck = sequence.request_id * 31 + sequence.num_tokens * 7
            length = min(luck % 5, sequence.num_tokens_max - sequence.num_tokens - 1)
            if sequence.num_computed_tokens + 1 == sequence.num_tokens and length > 0:
                request, start = (
                    self.newest[sequence.request_id].request,
                    sequence.num_output_tokens,
                )
                draft = [next_token(request, start + place) for place in range(length)]
                if luck % 3:
                    draft[luck % length] = VOCABULARY + 1
                drafts[sequence.request_id] = draft
        return drafts

    @rule()
    def update(self) -> None:
        if self.plan is None:
            return
        plan, self.plan, self.ahead = self.plan, self.ahead, None
        marks = [
            (sequence, sequence.num_computed_tokens + num_tokens - len(draft))
            for sequence, num_tokens, draft in plan.scheduled
            if sequence.status is SequenceStatus.RUNNING
        ]
        rows = self.scheduler.update(plan, self.sampled)
        if self.plan is not None:
            self.sampled = self.sampled_ahead
        for row in rows:
            self.check_row(row)
        assert all(sequence.num_computed_tokens >= mark for sequence, mark in marks)
        assert all(a.end is not End.CANCELLED for a in self.attempts.values())
        if rows:
            self.num_steps_without_row = 0
        elif not plan.is_ahead:  # those may be in vain
            self.num_steps_without_row += 1
        self.check_progress()

    @rule()
    def shed(self) -> None:
        """A step that does not fit, and computes nothing."""
        while self.ahead is not None:
            self.update()
        plan = self.scheduler.schedule()
        self.plan = None
        if plan is not None and plan.scheduled and self.scheduler.num_sheds_in_a_row < 4:
            self.scheduler.shed(plan)
            self.has_shed = True

    @rule()
    def forget_prefixes(self) -> None:
        if self.plan is None or self.plan.is_ahead:
            self.kv_cache_manager.reset_prefix_cache()

    @rule(data=st.data())
    def cancel_in_mid_step(self, data: st.DataObject) -> None:
        self.schedule()
        self.cancel(data)
        self.update()

    @rule(data=st.data(), newer_by=st.integers(-1, 2))
    def add_again_in_mid_step(self, data: st.DataObject, newer_by: int) -> None:
        self.schedule()
        self.add_again(data, newer_by)
        self.update()

    @rule(num_steps=st.integers(1, 12))
    def run(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.schedule()
            self.update()
            self.integrity_holds()

    @rule(num_steps=st.integers(1, 12))
    def run_ahead(self, num_steps: int) -> None:
        """Steps that overlap where they can."""
        for _ in range(num_steps):
            if self.plan is None:
                self.plan_step({})
            self.schedule_ahead()
            self.update()
            self.integrity_holds()

    @rule()
    def ahead_does_not_fit(self) -> None:
        """The device has no room for a second step, and computes the first alone."""
        if self.ahead is not None:
            self.scheduler.withdraw_ahead()
            self.ahead = None

    def check_plan(self, plan: StepPlan) -> None:
        budget = self.config.max_num_batched_tokens
        assert plan.num_tokens <= budget
        assert len(plan.scheduled) <= self.scheduler.num_running <= self.config.max_num_seqs
        granted = {
            sequence.request_id: num_tokens - len(draft)
            for sequence, num_tokens, draft in plan.scheduled
        }
        assert len(granted) == len(plan.scheduled), "nobody has two shares of a step"
        for sequence, num_tokens, draft in plan.scheduled:
            num_known = num_tokens - len(draft)
            assert 1 <= num_known <= sequence.num_tokens - sequence.num_computed_tokens
            num_slots = len(sequence.block_table) * self.config.block_size
            assert num_slots >= sequence.num_computed_tokens + num_tokens
        running = [
            a.sequence
            for a in self.attempts.values()
            if a.sequence.status is SequenceStatus.RUNNING
        ]
        if plan.num_tokens < budget and not self.has_shed:
            for sequence in running:
                uncomputed = sequence.num_tokens - sequence.num_computed_tokens
                assert granted[sequence.request_id] == uncomputed, "budget is left for it"
        for request_id in plan.preempted:
            self.num_preempted += 1
            victim = self.newest[request_id].sequence
            assert not victim.block_table
            assert all(urgency(sequence) < urgency(victim) for sequence in running)

    def check_row(self, row: TokenRow) -> None:
        attempt = self.attempts[row.request_id, row.attempt]
        assert attempt.end in {End.NOT_YET, End.CANCELLED}, "one end, and nothing after it"
        assert row.position == len(attempt.output)
        attempt.output += row.tokens
        assert row.prefix_hash == extend_prefix_hash(0, attempt.output)
        reported = row.tokens if attempt.request.params.logprobs is not None else ()
        told = [unpack_logprobs(packed).chosen for packed in row.logprobs]
        assert told == [-float(token) for token in reported]
        assert attempt.output == attempt.expected[: len(attempt.output)]
        if attempt.end is End.CANCELLED:
            assert (row.tokens, row.finish) == ((), FinishReason.CANCELLED)
            attempt.end = End.REPORTED
        elif row.finish:
            assert (attempt.output, row.finish) == (attempt.expected, attempt.expected_reason)
            attempt.end = End.REPORTED
        else:
            assert row.tokens
            assert len(attempt.output) < len(attempt.expected)

    def check_progress(self) -> None:
        """Whoever is most urgent gets all it needs of each step, so its row cannot be far."""
        num_live = sum(a.end is End.NOT_YET for a in self.attempts.values())
        steps_to_catch_up = -(-self.config.max_model_len // self.config.max_num_batched_tokens)
        assert self.has_shed or self.num_steps_without_row <= num_live * steps_to_catch_up

    @invariant()
    def integrity_holds(self) -> None:
        if not self.has_started:
            return
        self.scheduler.check_integrity()
        num_here = self.scheduler.num_running + self.scheduler.num_waiting
        sequences = [attempt.sequence for attempt in self.attempts.values()]
        assert num_here == sum(s.status is not SequenceStatus.FINISHED for s in sequences)

    def teardown(self) -> None:
        if not self.has_started:
            return
        while self.scheduler.has_work:
            self.run(1)
        ends = {attempt.end for attempt in self.attempts.values()}
        assert ends <= {End.REPORTED, End.REPLACED}, "every request ends"
        assert all(attempt.end is End.REPORTED for attempt in self.newest.values())
        assert self.kv_cache_manager.num_free_blocks == self.kv_cache_manager.num_blocks


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)


@pytest.mark.parametrize("budget", [3, 8, 32])
@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_a_crowd_in_a_tight_pool_gets_its_output_through_many_preemptions(
    budget: int, block_size: int
) -> None:
    machine = SchedulerMachine()
    machine.start(
        max_num_seqs=8,
        budget=budget,
        block_size=block_size,
        num_blocks=30 // block_size,
        max_model_len=28,
        crowd=[
            Arrival(
                prompt_length=1 + index % 5,
                params=SamplingParams(seed=0, max_tokens=10 + index % 15),
                priority=index % 3,
                num_resumed=index % 4,
            )
            for index in range(40)
        ],
    )
    machine.teardown()
    assert machine.num_preempted >= 20


@pytest.mark.parametrize("block_size", [1, 2, 3, 5])
def test_overlapping_steps_bring_everyone_what_single_steps_would(block_size: int) -> None:
    machine = SchedulerMachine()
    machine.start(
        max_num_seqs=8,
        budget=64,
        block_size=block_size,
        num_blocks=400 // block_size,
        max_model_len=40,
        crowd=[
            Arrival(
                prompt_length=1 + index % 5,
                params=SamplingParams(
                    seed=0, max_tokens=10 + index % 15, stop_token_ids=(3, 5) if index % 3 else ()
                ),
                priority=0,
                num_resumed=0,
            )
            for index in range(8)
        ],
    )
    while machine.scheduler.has_work:
        machine.run_ahead(1)
    machine.teardown()
    assert machine.num_ahead >= 10
