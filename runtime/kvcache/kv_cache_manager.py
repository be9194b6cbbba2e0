"""Block tables: where in the KV cache each token of a sequence has its keys and values.

A sequence's cache is cut into blocks of ``block_size`` slots, one slot a token. The blocks lie
anywhere in the pool; the sequence's table names them in order, so position ``p`` is found in slot
``p % block_size`` of block ``table[p // block_size]``. No memory is set aside for tokens that may
never come: the table grows by a block when the last one is full. What is full may be shared::

    block_size 4        table of A: [2, 0, 5]               table of B: [2, 1]

    pool      block 0     block 1     block 2     block 3     block 4     block 5
             ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐   ┌─┬─┬─┬─┐
             │4│5│6│7│   │4│5│ │ │   │0│1│2│3│   │0│1│2│3│   │ │ │ │ │   │8│9│ │ │
             └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘   └─┴─┴─┴─┘
                 A           B         A and B      idle        free          A

A block is *owned* by the sequences whose tables name it, *idle* if only the prefix cache remembers
it, or *free*. Owned blocks that are full never change. A sequence that begins in the middle of
another's block gets a copy of it.

A block enters the cache when a step is planned that fills it, so that others can share it in the
very same step: every layer writes all keys and values of a step before it reads any. If that step
is not carried out, ``withdraw`` takes it out again.

Knows nothing of tensors, nor of which sequence deserves the blocks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from understudy.runtime.kvcache.block_pool import BlockPool
from understudy.runtime.kvcache.prefix_cache import PrefixCache, Tail, extend_keys
from understudy.runtime.scheduling.sequence import Sequence


class BlockCopy(NamedTuple):
    """Before a step, a block is to get the content of another."""

    source: int
    target: int


class _Prefix(NamedTuple):
    """What the cache has of a sequence."""

    blocks: list[int]
    tail: Tail | None


class _Offered(NamedTuple):
    """A sequence of which the planned step offers more blocks to others than before."""

    sequence: Sequence
    num_blocks: int


class KVCacheManager:
    """Gives blocks to sequences and takes them back."""

    def __init__(
        self, *, num_blocks: int, block_size: int, enable_prefix_caching: bool = True
    ) -> None:
        assert block_size > 0, block_size
        self.block_size = block_size
        self._pool = BlockPool(num_blocks=num_blocks)
        self.cache = PrefixCache(num_blocks=num_blocks)
        self._enable_prefix_caching = enable_prefix_caching
        self._pending: dict[int, None] = {}
        """Blocks that may not hold before the step under way has ended what they should."""
        self._copies: list[BlockCopy] = []
        self._offered: list[_Offered] = []

    @property
    def num_blocks(self) -> int:
        """All blocks, free or not."""
        return self._pool.num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that nobody owns."""
        return self._pool.num_free_blocks + self.cache.num_idle_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Blocks whose content others can use, owned or not."""
        return len(self.cache)

    @property
    def tokens_max(self) -> int:
        """The most tokens that one sequence alone can have in the cache."""
        return self._pool.num_blocks * self.block_size

    @property
    def usage(self) -> float:
        """The share of the blocks that is owned, from 0 to 1."""
        return 1 - self.num_free_blocks / self._pool.num_blocks

    def start(self, sequence: Sequence) -> bool:
        """Give a sequence room for all of its tokens, the computed ones of them from the cache.

        Its mark moves to where it has to go on computing, which is before its last token.
        All or nothing: ``False`` leaves everything as it was.
        """
        assert not sequence.block_table, f"{sequence} has started"
        blocks, tail = self._find_prefix(sequence)
        num_new = self._num_blocks_for(sequence.num_tokens) - len(blocks)
        num_woken = sum(map(self.cache.is_idle, blocks))
        if num_new > self.num_free_blocks - num_woken:
            return False
        for block in blocks:
            if self.cache.is_idle(block):
                self.cache.wake(block)
            self._pool.share(block)
            self.cache.hit(block)
        num_computed = len(blocks) * self.block_size
        if tail is not None:
            self.cache.hit(tail.block)
            num_computed += tail.num_tokens
        new = self._take(num_new)
        if tail is not None:
            self._copies.append(BlockCopy(tail.block, new[0]))
        sequence.block_table = blocks + new
        sequence.num_computed_tokens = num_computed
        sequence.num_offered_blocks = len(blocks)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = min(num_computed, sequence.num_prompt_tokens)
        return True

    def allocate(self, sequence: Sequence, num_tokens: int) -> bool:
        """Grow the table until it holds ``num_tokens`` more than are computed.

        All or nothing: ``False`` leaves the table as it was.
        """
        num_tokens += sequence.num_computed_tokens
        table = sequence.block_table
        if num_tokens <= len(table) * self.block_size:
            return True  # all but one in block_size of the calls in decoding end here
        num_new = self._num_blocks_for(num_tokens) - len(table)
        if num_new > self.num_free_blocks:
            return False
        table += self._take(num_new)
        return True

    def plan(self, sequence: Sequence, num_tokens: int) -> None:
        """A step will compute this many more tokens: others may share the blocks that it fills."""
        if not self._enable_prefix_caching:
            return
        num_full_before = sequence.num_offered_blocks
        num_full = (sequence.num_computed_tokens + num_tokens) // self.block_size
        if num_full == num_full_before:
            return
        self._offered.append(_Offered(sequence, num_full_before))
        sequence.num_offered_blocks = num_full
        self._extend_keys(sequence, num_full)
        keys, size = sequence.block_keys, self.block_size
        for index in range(num_full_before, num_full):
            block = sequence.block_table[index]
            parent = keys[index - 1] if index else sequence.cache_root
            tokens = sequence.token_ids[index * size : (index + 1) * size]
            if self.cache.keep(block, parent, tokens, keys[index]):
                self._pending[block] = None

    def take_copies(self) -> tuple[BlockCopy, ...]:
        """What is to be copied before the planned step, all at once."""
        copies, self._copies = tuple(self._copies), []
        return copies

    def settle(self) -> None:
        """The planned step was carried out."""
        self._pending.clear()
        self._offered.clear()

    def withdraw(self) -> None:
        """The planned step is not carried out: the blocks that it should have filled are not full.

        Sequences that were started for it, and may share such blocks, have to be freed as well.
        """
        for block in self._pending:
            if self.cache.holds(block):
                self._forget(block)
        self._pending.clear()
        self._copies.clear()
        for sequence, num_blocks in self._offered:
            sequence.num_offered_blocks = num_blocks
        self._offered.clear()

    def free(self, sequence: Sequence) -> None:
        """Take back all of the sequence's blocks; its table is empty afterwards."""
        if sequence.num_computed_tokens // self.block_size > sequence.num_offered_blocks:
            self.plan(sequence, 0)  # the last was filled by a step whose token nobody knew then
        self._keep_tail(sequence)
        # Last block first: a leaf goes before its root, and the pool, a stack, hands free blocks
        # out in this order again.
        for block in reversed(sequence.block_table):
            if self._pool.release(block):
                if self.cache.holds(block):
                    self.cache.rest(block)
                else:
                    self._pool.give_back(block)
        sequence.block_table.clear()

    def discard(self, sequence: Sequence) -> None:
        """Take back the blocks of a sequence whose numbers are not to be trusted by anyone."""
        for block in sequence.block_table:
            if self.cache.holds(block):
                self.cache.drop(block)
        for block in reversed(sequence.block_table):
            if self._pool.release(block):
                self._pool.give_back(block)
        sequence.block_table.clear()
        sequence.num_computed_tokens = 0

    def reset_prefix_cache(self) -> None:
        """Forget every prefix; running sequences keep their blocks."""
        self._pending.clear()
        for block in self.cache.reset():
            self._pool.give_back(block)

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
        idle = {block for block in range(self.num_blocks) if self.cache.is_idle(block)}
        self._pool.check_integrity(num_owners, idle)
        self.cache.check_integrity()

    def _find_prefix(self, sequence: Sequence) -> _Prefix:
        """What the cache has of a sequence, short of its last token, which has to be computed."""
        if not len(self.cache) or sequence.needs_every_state:
            return _Prefix([], None)
        size = self.block_size
        num_tokens_max = sequence.num_tokens - 1
        self._extend_keys(sequence, num_tokens_max // size)
        keys = sequence.block_keys[: num_tokens_max // size]
        blocks = self.cache.match(keys)
        parent = keys[len(blocks) - 1] if blocks else sequence.cache_root
        start = len(blocks) * size
        tokens = sequence.token_ids[start : min(start + size, num_tokens_max)]
        return _Prefix(blocks, self.cache.match_tail(parent, tokens, excluding=self._pending))

    def _keep_tail(self, sequence: Sequence) -> None:
        """Let others copy from the last block, which is not full."""
        size = self.block_size
        num_full, num_rest = divmod(sequence.num_computed_tokens, size)
        if not self._enable_prefix_caching or num_rest == 0:
            return
        block = sequence.block_table[num_full]
        if self.cache.holds(block):
            return  # the step under way fills it
        self._extend_keys(sequence, num_full)
        parent = sequence.block_keys[num_full - 1] if num_full else sequence.cache_root
        tokens = sequence.token_ids[num_full * size : sequence.num_computed_tokens]
        if self.cache.keep(block, parent, tokens):
            self._pending[block] = None  # if a step is under way, it may have to fill this first

    def _extend_keys(self, sequence: Sequence, num_blocks: int) -> None:
        extend_keys(
            sequence.block_keys,
            sequence.cache_root,
            sequence.token_ids,
            block_size=self.block_size,
            num_blocks=num_blocks,
        )

    def _take(self, num_blocks: int) -> list[int]:
        """Take blocks that nobody owns, idle ones if there are too few free ones."""
        if num_blocks == 0:
            return []
        while self._pool.num_free_blocks < num_blocks:
            self._pool.give_back(self.cache.evict())
        blocks = self._pool.allocate(num_blocks)
        assert blocks is not None
        return blocks

    def _forget(self, block: int) -> None:
        was_idle = self.cache.is_idle(block)
        self.cache.drop(block)
        if was_idle:
            self._pool.give_back(block)

    def _num_blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
