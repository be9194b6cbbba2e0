"""The checks themselves agree with the product where it is right, and notice what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from tests.simulation.cluster import NUM_BLOCKS, SCHEDULER, make_engine, undisturbed
from tests.simulation.invariants import CheckedRunner, Watch
from tests.simulation.stage import VirtualStage
from tests.simulation.workload import draw_requests, with_vectors
from understudy.protocol.messages import Assign, Deliver, Failed, StepOutput, Welcome
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control.ledger import Entry
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.actor import SUPERVISOR, OpenSession, Send
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.storage.records import Admit, End, Record, Step

REQUEST = Request(7, 7, (1, 2, 3), SamplingParams(seed=5, max_tokens=3))
WHOLE = tuple(undisturbed(REQUEST).tokens)


def row(position: int, end: int, *, finish: int = 0, tokens: tuple[int, ...] = WHOLE) -> TokenRow:
    prefix_hash = extend_prefix_hash(0, tokens[:end])
    return TokenRow(7, 1, position, tokens[position:end], prefix_hash, finish)


def watch_of(*records: Record) -> Watch:
    watch = Watch()
    watch.requests[7] = REQUEST
    watch.write(records)
    return watch


ADMIT = Admit(REQUEST, "gateway-0.1", 0.0)
TWO = Step((row(0, 2),))
LAST = Step((row(2, 3, finish=FinishReason.LENGTH),))


def test_the_golden_outputs_are_those_of_an_engine_that_nothing_happens_to() -> None:
    engine = make_engine("engine-0", 0.0, VirtualStage(), 1, VirtualClock())
    engine.handle(Welcome(1), SUPERVISOR, 0.0)
    requests = with_vectors(1, draw_requests(1, 200))
    rows: dict[int, list[TokenRow]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.handle(Assign(request, 1), SUPERVISOR, 0.0)
    while engine.heartbeat(0.0).running + engine.heartbeat(0.0).waiting:
        engine.decide(0.0)
        for effect in engine.outbox.take():
            if isinstance(effect, Send) and isinstance(effect.message, StepOutput):
                for made in effect.message.rows:
                    rows[made.request_id].append(made)
    for request in requests:
        made_rows = rows[request.request_id]
        tokens, finish, vector = undisturbed(request)
        assert made_rows[-1].vector == vector
        assert [token for made in made_rows for token in made.tokens] == tokens
        assert made_rows[-1].finish == finish


def test_a_life_as_it_should_be_passes() -> None:
    watch = watch_of(ADMIT)
    watch.leave([OpenSession("engine-0.1", 1), Send("engine-0.1", Assign(REQUEST, 1))])
    watch.write([TWO])
    watch.leave([Send("gateway-0.1", Deliver((row(0, 2),)))])
    watch.leave([OpenSession("engine-1.1", 2), Send("engine-1.1", Assign(REQUEST, 2, WHOLE[:2]))])
    watch.write([LAST])
    watch.leave([Send("gateway-0.1", Deliver(LAST.rows))])


@pytest.mark.parametrize(
    ("break_it", "complaint"),
    [
        (lambda watch: watch.write([ADMIT]), "admitted again"),
        (lambda watch: watch.write([Step((row(0, 1),))]), "a gap, or twice"),
        (lambda watch: watch.write([Step((row(3, 3),))]), "a gap, or twice"),
        (lambda watch: watch.write([Step((row(2, 3, tokens=(9, 9, 9)),))]), "hash"),
        (lambda watch: watch.write([LAST, LAST]), "after the end"),
        (lambda watch: watch.write([LAST, End(7, FinishReason.ERROR)]), "ended twice"),
        (lambda watch: watch.leave([Send("g", Deliver((row(0, 3),)))]), "before written"),
        (lambda watch: watch.leave([Send("g", Deliver((row(0, 2, finish=1),)))]), "end not"),
        (lambda watch: watch.leave([Send("g", Failed(7, "", ""))]), "failure not written"),
        (lambda watch: watch.leave([Send("e", Assign(REQUEST, 2, WHOLE[:1]))]), "elsewhere"),
        (lambda watch: watch.leave([Send("e", Assign(REQUEST, 0, WHOLE[:2]))]), "again"),
        (lambda watch: watch.leave(2 * [OpenSession("e", 4)]), "is not new"),
    ],
)
def test_what_must_not_be_is_noticed(break_it: Callable[[Watch], None], complaint: str) -> None:
    watch = watch_of(ADMIT, TWO)
    with pytest.raises(AssertionError, match=complaint):
        break_it(watch)


def test_another_seed_on_the_way_to_an_engine_is_noticed() -> None:
    other = replace(REQUEST, params=replace(REQUEST.params, seed=6))
    with pytest.raises(AssertionError, match="changed"):
        watch_of(ADMIT).leave([Send("engine-0.1", Assign(other, 1))])


def test_a_journal_with_other_tokens_is_noticed() -> None:
    entry = Entry(REQUEST, 0.0, output=[WHOLE[0], WHOLE[0] + 1])
    with pytest.raises(AssertionError, match="other tokens"):
        watch_of().begin([entry])


def test_blocks_that_do_not_hold_what_a_sequence_believes_are_noticed() -> None:
    manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=SCHEDULER.block_size)
    scheduler = Scheduler(SCHEDULER, manager)
    echo = EchoRunner(VirtualClock(), vocab_size=10)
    runner = CheckedRunner(echo, block_size=SCHEDULER.block_size)
    first, other = (
        Sequence(replace(REQUEST, request_id=number, prompt=(number,) * 12), attempt=1)
        for number in (1, 2)
    )
    scheduler.add(first)
    scheduler.add(other)
    plan = scheduler.schedule()
    assert plan is not None
    scheduler.update(plan, runner.launch(plan).collect())
    runner.launch(StepPlan(2, (ScheduledSequence(first, 1),)))
    first.block_table = other.block_table
    with pytest.raises(AssertionError, match="lost KV"):
        runner.launch(StepPlan(2, (ScheduledSequence(first, 1),)))
