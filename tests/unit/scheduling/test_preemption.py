from __future__ import annotations

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.preemption import preempt_last, urgency
from understudy.runtime.scheduling.sequence import Sequence, SequenceStatus


def make_sequence(*, priority: int, arrival: int) -> Sequence:
    request = Request(arrival, arrival, (1, 2, 3), SamplingParams(seed=0, max_tokens=9), priority)
    sequence = Sequence(request, attempt=1, output=(7, 8))
    sequence.arrival = arrival
    sequence.status = SequenceStatus.RUNNING
    return sequence


def test_urgency_goes_by_priority_and_then_by_arrival() -> None:
    keys = [(1, 0), (0, 2), (-1, 3), (0, 1)]
    sequences = [make_sequence(priority=priority, arrival=arrival) for priority, arrival in keys]
    ordered = sorted(sequences, key=urgency)
    assert [sequence.arrival for sequence in ordered] == [3, 1, 2, 0]


def test_the_last_one_loses_its_blocks_and_keeps_its_tokens() -> None:
    kv_cache_manager = KVCacheManager(num_blocks=4, block_size=2)
    running = [make_sequence(priority=0, arrival=0), make_sequence(priority=0, arrival=1)]
    last = running[1]
    assert kv_cache_manager.allocate(last, 5)
    last.num_computed_tokens = 4
    assert preempt_last(running, kv_cache_manager) is last
    assert last not in running
    assert (last.status, last.num_computed_tokens) == (SequenceStatus.WAITING, 0)
    assert last.token_ids == [1, 2, 3, 7, 8]
    assert last.block_table == []
    assert kv_cache_manager.num_free_blocks == 4
