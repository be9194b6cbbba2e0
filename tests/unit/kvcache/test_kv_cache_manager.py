from __future__ import annotations

import pytest

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.sequence import Sequence


def make_sequence(prompt_length: int = 4) -> Sequence:
    prompt = tuple(range(prompt_length))
    return Sequence(Request(1, 1, prompt, SamplingParams(seed=0, max_tokens=100)), attempt=1)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_a_table_has_as_many_blocks_as_its_tokens_fill_or_begin(
    num_tokens: int, num_blocks: int
) -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, num_tokens)
    assert len(sequence.block_table) == num_blocks
    assert manager.num_free_blocks == 10 - num_blocks


def test_a_table_grows_by_a_block_only_when_the_last_one_is_full() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    sequence = make_sequence()
    lengths = []
    for num_computed_tokens in range(9):
        sequence.num_computed_tokens = num_computed_tokens
        assert manager.allocate(sequence, 1)
        lengths.append(len(sequence.block_table))
    assert lengths == [1, 1, 1, 1, 2, 2, 2, 2, 3]


def test_a_growing_table_keeps_its_blocks() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    sequence, other = make_sequence(), make_sequence()
    assert manager.allocate(sequence, 4)
    assert manager.allocate(other, 4)
    assert manager.allocate(sequence, 8)
    assert sequence.block_table == [0, 2]
    assert other.block_table == [1]


def test_an_allocation_that_does_not_fit_leaves_table_and_pool_as_they_were() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, 8)
    assert not manager.allocate(sequence, 13)
    assert sequence.block_table == [0, 1]
    assert manager.num_free_blocks == 1


def test_freeing_a_sequence_gives_back_all_of_its_blocks() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, 12)
    manager.free(sequence)
    assert sequence.block_table == []
    assert manager.num_free_blocks == 4
    manager.check_integrity([])


def test_freeing_a_sequence_without_blocks_does_nothing() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    manager.free(make_sequence())
    assert manager.num_free_blocks == 4


def test_usage_is_the_share_of_blocks_that_are_owned() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    assert manager.usage == 0
    assert manager.allocate(make_sequence(), 12)
    assert manager.usage == 0.75


def test_the_most_tokens_of_one_sequence_are_all_slots() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    assert manager.tokens_max == 12
    assert manager.allocate(make_sequence(), 12)


def test_integrity_fails_for_a_leaked_block() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, 8)
    manager.check_integrity([sequence])
    sequence.block_table.pop()
    with pytest.raises(AssertionError, match="block 1 counts 1 owners"):
        manager.check_integrity([sequence])


def test_integrity_fails_for_a_table_smaller_than_what_is_computed() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, 4)
    sequence.num_computed_tokens = 5
    with pytest.raises(AssertionError, match="more than its 1 blocks hold"):
        manager.check_integrity([sequence])


def test_integrity_fails_for_a_block_twice_in_one_table() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    sequence = make_sequence()
    assert manager.allocate(sequence, 4)
    sequence.block_table.append(sequence.block_table[0])
    with pytest.raises(AssertionError, match="has a block twice"):
        manager.check_integrity([sequence])
