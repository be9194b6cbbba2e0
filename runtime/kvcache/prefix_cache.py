"""The prefix cache, as numbers: which block holds which tokens behind which prefix.

A full block is named by its *key*, a digest of its tokens and of the key before it, so that one key
stands for everything from the first token on; the first key comes from a root that says who may
share::

    root ─▶ key 0 ───▶ key 1 ───▶ key 2          a sequence that begins with the same 3 blocks
              │  16 tokens │  16 tokens │         finds them by its own keys, one by one
            block 7      block 2      block 9

Equal keys mean equal keys and values, bit for bit, whoever computed them. The digest is 128 bits of
BLAKE2b (RFC 7693): nobody can choose tokens that take another's key.

A block without owners stays here, *idle*, until its memory is wanted. Which one goes first?

* Leaves before roots: without the blocks before it a block is of no use. Who uses a block uses
  those before it, so these have never rested longer, nor come back less often.
* Who never came back before who did. A block is due half a turnover of the pool later for each
  doubling of its hits. Plain least-recently-used order lets long prompts that nobody repeats
  flush the system prompt that everybody shares; ``tools/bench/eviction.py`` measures both.

Knows nothing of sequences, tensors or owners.
"""

from __future__ import annotations

from array import array
from collections.abc import Container, Iterable, Sequence
from hashlib import blake2b
from heapq import heapify, heappop, heappush
from itertools import islice
from math import log2
from typing import Final, NamedTuple

KEY_BYTES: Final = 16
_TAIL_CANDIDATES_MAX: Final = 32
"""How many blocks behind one prefix are compared, the latest first."""
TURNOVERS_PER_DOUBLING: Final = 0.5
"""Measured: more is better still for small pools, but worse than plain order for large ones."""
_STALE_MIN: Final = 64
"""The order of eviction is tidied up when it has so many and twice as many entries as blocks."""


def root_key(*owners: str) -> bytes:
    """The key before the first block: only who names the same owners shares blocks."""
    digest = blake2b(digest_size=KEY_BYTES)
    for owner in owners:
        word = owner.encode()
        digest.update(len(word).to_bytes(8, "little") + word)
    return digest.digest()


def extend_keys(
    keys: list[bytes], root: bytes, tokens: Sequence[int], *, block_size: int, num_blocks: int
) -> None:
    """Add the keys of further full blocks of ``tokens``, until there are ``num_blocks``."""
    for index in range(len(keys), num_blocks):
        block = tokens[index * block_size : (index + 1) * block_size]
        assert len(block) == block_size, "only full blocks have keys"
        parent = keys[index - 1] if index else root
        keys.append(_key_of(parent, block))


def _key_of(parent: bytes, tokens: Sequence[int]) -> bytes:
    return blake2b(array("q", tokens), key=parent, digest_size=KEY_BYTES).digest()


class Tail(NamedTuple):
    """A block whose first tokens are those that come next."""

    block: int
    num_tokens: int


class _Kept(NamedTuple):
    """What is known of a block in the cache."""

    parent: bytes
    tokens: tuple[int, ...]
    """Fewer than a block's slots if it was the last of its sequence."""
    key: bytes


class PrefixCache:
    """The blocks whose content is known, and the order in which idle ones are given up."""

    def __init__(self, *, num_blocks: int) -> None:
        """``num_blocks`` is the size of the pool: the turnover by which hits are weighed."""
        self.turnovers_per_doubling = TURNOVERS_PER_DOUBLING
        self._turnover = num_blocks
        self._blocks: dict[bytes, int] = {}
        self._kept: dict[int, _Kept] = {}
        self._children: dict[bytes, dict[int, None]] = {}
        self._hits: dict[int, int] = {}
        # The heap holds (due, number, block); entries whose number is not the block's are stale.
        self._order: list[tuple[float, int, int]] = []
        self._idle: dict[int, int] = {}
        self._num_rests = 0
        self._num_evicted = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def num_idle_blocks(self) -> int:
        """Blocks that can be given up."""
        return len(self._idle)

    def holds(self, block: int) -> bool:
        """Whether a block's content is known."""
        return block in self._kept

    def is_idle(self, block: int) -> bool:
        """Whether a block is kept for its content alone."""
        return block in self._idle

    def match(self, keys: Iterable[bytes]) -> list[int]:
        """The blocks with these keys, up to the first that is not here."""
        blocks = []
        for key in keys:
            block = self._blocks.get(key)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def match_tail(
        self, parent: bytes, tokens: Sequence[int], *, excluding: Container[int]
    ) -> Tail | None:
        """The block behind ``parent`` that has the most of the next tokens, or none that has any.

        Blocks in ``excluding`` do not count.
        """
        best = None
        for block in islice(reversed(self._children.get(parent, {})), _TAIL_CANDIDATES_MAX):
            if block in excluding:
                continue
            num_tokens = _num_common(self._kept[block].tokens, tokens)
            if num_tokens > (best.num_tokens if best is not None else 0):
                best = Tail(block, num_tokens)
        return best

    def keep(self, block: int, parent: bytes, tokens: Sequence[int], key: bytes = b"") -> bool:
        """Note what an owned block holds; ``False`` if another block holds the same.

        ``key`` is that of a full block; without it the block can only be matched as a tail.
        """
        assert block not in self._kept, f"block {block} is known already"
        key = key or _key_of(parent, tokens)
        if key in self._blocks:
            return False
        self._blocks[key] = block
        self._kept[block] = _Kept(parent, tuple(tokens), key)
        self._children.setdefault(parent, {})[block] = None
        self._hits[block] = 0
        return True

    def drop(self, block: int) -> None:
        """Forget what a block holds."""
        parent, _, key = self._kept.pop(block)
        del self._blocks[key]
        del self._hits[block]
        self._idle.pop(block, None)
        siblings = self._children[parent]
        del siblings[block]
        if not siblings:
            del self._children[parent]

    def hit(self, block: int) -> None:
        """A block is used once more."""
        self._hits[block] += 1

    def wake(self, block: int) -> None:
        """An idle block has an owner again."""
        del self._idle[block]

    def rest(self, block: int) -> None:
        """A block has lost its last owner. Of a sequence's blocks, the last rests first."""
        self._num_rests += 1
        self._idle[block] = self._num_rests
        bonus = self._turnover * self.turnovers_per_doubling * log2(1 + self._hits[block])
        due = self._num_evicted + bonus
        heappush(self._order, (due, self._num_rests, block))
        if len(self._order) > max(2 * len(self._idle), _STALE_MIN):
            self._order = [entry for entry in self._order if self._idle.get(entry[2]) == entry[1]]
            heapify(self._order)

    def evict(self) -> int:
        """Give up the idle block that is due first."""
        while True:
            _, number, block = heappop(self._order)
            if self._idle.get(block) == number:
                self._num_evicted += 1
                self.drop(block)
                return block

    def reset(self) -> list[int]:
        """Forget everything; gives the blocks that were idle."""
        idle = list(self._idle)
        for block in list(self._kept):
            self.drop(block)
        self._order.clear()
        return idle

    def check_integrity(self) -> None:
        """Assert that every index says the same."""
        assert {kept.key: block for block, kept in self._kept.items()} == self._blocks
        assert self._hits.keys() == self._kept.keys() >= self._idle.keys()
        by_parent: dict[bytes, set[int]] = {}
        for block, kept in self._kept.items():
            by_parent.setdefault(kept.parent, set()).add(block)
        assert by_parent == {parent: set(blocks) for parent, blocks in self._children.items()}
        fresh = {(number, block) for _, number, block in self._order}
        assert all((number, block) in fresh for block, number in self._idle.items())


def _num_common(ours: Sequence[int], theirs: Sequence[int]) -> int:
    num_common = 0
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            break
        num_common += 1
    return num_common
