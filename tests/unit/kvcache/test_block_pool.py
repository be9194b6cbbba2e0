from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from understudy.runtime.kvcache.block_pool import BlockPool


def test_a_new_pool_hands_out_its_blocks_in_order_from_0() -> None:
    pool = BlockPool(num_blocks=4)
    assert pool.allocate(3) == [0, 1, 2]
    assert pool.allocate(1) == [3]
    assert pool.num_free_blocks == 0


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(num_blocks=4)
    assert pool.allocate(5) is None
    assert pool.num_free_blocks == 4


def test_the_block_released_last_is_the_next_to_be_used() -> None:
    pool = BlockPool(num_blocks=4)
    pool.allocate(4)
    for block in (1, 3):
        assert pool.release(block)
        pool.give_back(block)
    assert pool.allocate(2) == [3, 1]


def test_a_shared_block_can_be_given_back_when_its_last_owner_has_released_it() -> None:
    pool = BlockPool(num_blocks=1)
    pool.allocate(1)
    pool.share(0)
    assert not pool.release(0)
    with pytest.raises(AssertionError, match="block 0 is owned"):
        pool.give_back(0)
    assert pool.release(0)
    assert pool.num_free_blocks == 0
    pool.give_back(0)
    assert pool.num_free_blocks == 1


def test_a_block_without_owners_cannot_be_released() -> None:
    pool = BlockPool(num_blocks=2)
    with pytest.raises(AssertionError, match="block 1 has no owner"):
        pool.release(1)


def test_integrity_fails_for_an_owner_that_nobody_knows() -> None:
    pool = BlockPool(num_blocks=2)
    pool.allocate(1)
    pool.check_integrity({0: 1})
    with pytest.raises(AssertionError, match="block 0 counts 1 owners"):
        pool.check_integrity({})


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of calls, against a plain count of what each owner holds."""

    @initialize(num_blocks=st.integers(1, 12))
    def start(self, num_blocks: int) -> None:
        self.pool = BlockPool(num_blocks=num_blocks)
        self.holdings: list[list[int]] = []

    @rule(num_blocks=st.integers(1, 6))
    def allocate(self, num_blocks: int) -> None:
        num_free_blocks = self.pool.num_free_blocks
        blocks = self.pool.allocate(num_blocks)
        assert (blocks is None) is (num_blocks > num_free_blocks)
        if blocks is not None:
            assert len(set(blocks)) == num_blocks
            assert not set(blocks) & {block for holding in self.holdings for block in holding}
            self.holdings.append(blocks)

    @rule(data=st.data())
    def share(self, data: st.DataObject) -> None:
        if self.holdings:
            blocks = data.draw(st.sampled_from(self.holdings))
            for block in blocks:
                self.pool.share(block)
            self.holdings.append(list(blocks))

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.holdings:
            index = data.draw(st.integers(0, len(self.holdings) - 1))
            for block in self.holdings.pop(index):
                if self.pool.release(block):
                    self.pool.give_back(block)

    @invariant()
    def every_owner_is_counted(self) -> None:
        if hasattr(self, "pool"):
            num_owners = Counter(block for holding in self.holdings for block in holding)
            self.pool.check_integrity(num_owners)
            assert self.pool.num_free_blocks == self.pool.num_blocks - len(num_owners)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=50, stateful_step_count=30, deadline=None)
