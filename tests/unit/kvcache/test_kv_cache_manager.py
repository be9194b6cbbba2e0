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


# Sharing


def shared_sequence(tokens: list[int], *, tenant: str = "") -> Sequence:
    params = SamplingParams(seed=0, max_tokens=100)
    return Sequence(Request(1, 1, tuple(tokens), params, tenant=tenant), attempt=1)


def compute(manager: KVCacheManager, sequence: Sequence) -> None:
    """Start a sequence and compute all of its tokens in one step."""
    assert manager.start(sequence)
    num_tokens = sequence.num_tokens - sequence.num_computed_tokens
    manager.plan(sequence, num_tokens)
    sequence.num_computed_tokens += num_tokens
    manager.settle()


def test_a_sequence_begins_behind_what_another_has_computed() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first, second = shared_sequence([*range(8), 50]), shared_sequence([*range(8), 60, 61])
    compute(manager, first)
    assert manager.start(second)
    assert second.block_table[:2] == first.block_table[:2]
    assert second.num_computed_tokens == second.num_cached_tokens == 8
    manager.check_integrity([first, second])


def test_a_step_shares_what_it_fills_itself() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first, second = shared_sequence(list(range(9))), shared_sequence(list(range(9)))
    assert manager.start(first)
    manager.plan(first, 9)
    assert manager.start(second)
    assert second.num_computed_tokens == 8
    assert second.block_table[:2] == first.block_table[:2]


def test_what_a_withdrawn_step_should_have_filled_is_not_shared() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first = shared_sequence(list(range(9)))
    assert manager.start(first)
    manager.plan(first, 9)
    manager.withdraw()
    manager.free(first)
    assert manager.num_cached_blocks == 0
    second = shared_sequence(list(range(9)))
    assert manager.start(second)
    assert second.num_computed_tokens == 0
    manager.check_integrity([second])


def test_the_last_token_is_always_computed() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    compute(manager, shared_sequence(list(range(8))))
    second = shared_sequence(list(range(8)))
    assert manager.start(second)
    assert second.num_computed_tokens == 7


def test_a_sequence_that_begins_within_a_block_gets_a_copy_of_it() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first, second = shared_sequence(list(range(8))), shared_sequence([*range(6), 60, 61])
    compute(manager, first)
    assert manager.start(second)
    assert second.num_computed_tokens == 6
    assert second.block_table[0] == first.block_table[0]
    assert manager.take_copies() == ((first.block_table[1], second.block_table[1]),)
    assert manager.take_copies() == ()
    manager.check_integrity([first, second])


def test_a_block_that_is_not_full_can_be_copied_once_its_sequence_is_gone() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first, second = shared_sequence(list(range(6))), shared_sequence(list(range(8)))
    compute(manager, first)
    manager.free(first)
    manager.settle()
    assert manager.start(second)
    assert second.num_computed_tokens == 6
    manager.check_integrity([second])


def test_a_block_that_was_filled_by_an_unknown_token_is_kept_once_its_sequence_is_gone() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first = shared_sequence(list(range(8)))
    assert manager.start(first)
    manager.plan(first, 7)
    manager.settle()
    first.num_computed_tokens = 8  # by a step that was planned before its token was known
    manager.free(first)
    manager.settle()
    second = shared_sequence(list(range(9)))
    assert manager.start(second)
    assert second.num_computed_tokens == 8
    manager.check_integrity([second])


def test_idle_blocks_count_as_free_and_are_taken_when_the_free_ones_are_out() -> None:
    manager = KVCacheManager(num_blocks=4, block_size=4)
    first = shared_sequence(list(range(12)))
    compute(manager, first)
    manager.free(first)
    assert manager.num_free_blocks == 4
    assert manager.num_cached_blocks == 3
    other = shared_sequence(list(range(100, 116)))
    assert manager.start(other)
    assert manager.num_free_blocks == 0
    manager.check_integrity([other])


def test_what_a_sequence_shares_is_not_taken_to_make_room_for_it() -> None:
    manager = KVCacheManager(num_blocks=3, block_size=4)
    first = shared_sequence(list(range(8)))
    compute(manager, first)
    manager.free(first)
    long = shared_sequence([*range(8), *range(50, 60)])
    assert not manager.start(long)
    assert manager.num_free_blocks == 3
    manager.check_integrity([])
    fits = shared_sequence([*range(8), 50])
    assert manager.start(fits)
    assert fits.num_computed_tokens == 8
    manager.check_integrity([fits])


def test_tenants_do_not_share() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    compute(manager, shared_sequence(list(range(9)), tenant="a"))
    other = shared_sequence(list(range(9)), tenant="b")
    assert manager.start(other)
    assert other.num_computed_tokens == 0


def test_nobody_shares_what_is_not_to_be_trusted() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first = shared_sequence(list(range(9)))
    compute(manager, first)
    manager.discard(first)
    assert manager.num_cached_blocks == 0
    assert manager.num_free_blocks == 10
    manager.check_integrity([])


def test_without_prefix_caching_nothing_is_kept() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4, enable_prefix_caching=False)
    first = shared_sequence(list(range(9)))
    compute(manager, first)
    manager.free(first)
    assert manager.num_cached_blocks == 0


def test_a_reset_leaves_running_sequences_their_blocks() -> None:
    manager = KVCacheManager(num_blocks=10, block_size=4)
    first, second = shared_sequence(list(range(9))), shared_sequence(list(range(20, 29)))
    compute(manager, first)
    compute(manager, second)
    manager.free(second)
    manager.reset_prefix_cache()
    assert manager.num_cached_blocks == 0
    manager.check_integrity([first])
    manager.free(first)
    manager.check_integrity([])
