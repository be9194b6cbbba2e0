"""Block tables: where in the KV cache each token of a sequence has its keys and values.

A sequence's cache is cut into blocks of ``block_size`` slots, one slot a token. The blocks lie
anywhere in the pool; the sequence's table names them in order, so position ``p`` is found in slot
``p % block_size`` of block ``table[p // block_size]``. No memory is set aside for tokens that may
never come: the table grows by a block when the last one is full::

    block_size 4        table of A: [2, 0, 5]               table of B: [3, 1]

    pool      block 0     block 1     block 2     block 3     block 4     block 5
             ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐
             │4│5│6│7│   │4│ │ │ │   │0│1│2│3│   │0│1│2│3│   │ │ │ │ │   │8│9│ │ │
             └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘
                 A           B           A           B         free          A

Knows nothing of tensors, nor of which sequence deserves the blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from understudy.runtime.kvcache.block_pool import BlockPool
from understudy.runtime.scheduling.sequence import Sequence


class KVCacheManager:
    """Gives blocks to sequences and takes them back."""

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        assert block_size > 0, block_size
        self.block_size = block_size
        self._pool = BlockPool(num_blocks=num_blocks)

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return self._pool.num_free_blocks

    @property
    def tokens_max(self) -> int:
        """The most tokens that one sequence alone can have in the cache."""
        return self._pool.num_blocks * self.block_size

    @property
    def usage(self) -> float:
        """The share of the blocks that is owned, from 0 to 1."""
        return 1 - self._pool.num_free_blocks / self._pool.num_blocks

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow the table until it holds ``num_tokens`` more than are computed.

        All or nothing: ``False`` leaves the table as it was.
        """
        num_tokens += sequence.num_computed_tokens
        table = sequence.block_table
        if num_tokens <= len(table) * self.block_size:
            return True  # all but one in block_size of the calls in decoding end here
        blocks = self._pool.allocate(self._num_blocks_for(num_tokens) - len(table))
        if blocks is None:
            return False
        table += blocks
        return True

    def free(self, sequence: Sequence) -> None:
        """Take back all of the sequence's blocks; its table is empty afterwards."""
        # Last block first, so that the pool, a stack, hands them out in this order again.
        self._pool.release(reversed(sequence.block_table))
        sequence.block_table.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Assert that these sequences own every owned block, and have room for their tokens."""
        num_owners: Counter[int] = Counter()
        for sequence in sequences:
            table = sequence.block_table
            assert len(table) == len(set(table)), f"{sequence} has a block twice"
            assert len(table) >= self._num_blocks_for(sequence.num_computed_tokens), (
                f"{sequence} has computed more than its {len(table)} blocks hold"
            )
            num_owners.update(table)
        self._pool.check_integrity(num_owners)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
