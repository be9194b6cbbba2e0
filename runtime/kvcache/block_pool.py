"""The blocks of the KV cache, as numbers: which are free, and how many own each of the others.

Knows nothing of sequences, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping


class BlockPool:
    """``num_blocks`` equal blocks, each with a count of its owners.

    A block that has lost its last owner is not free before ``give_back`` says so: somebody may
    want to keep what it holds.

    The free list is a stack: taking and giving back cost the same whatever the pool's size, the
    block used last is the next to be used again, while it may still be in a processor's cache, and
    the same calls always give the same blocks.
    """

    def __init__(self, *, num_blocks: int) -> None:
        assert num_blocks > 0, num_blocks
        self.num_blocks = num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._num_owners = [0] * num_blocks

    @property
    def num_free_blocks(self) -> int:
        """Blocks that can be taken."""
        return len(self._free)

    def allocate(self, num_blocks: int) -> list[int] | None:
        """Take this many free blocks, one owner each; none at all if there are too few."""
        assert num_blocks > 0, num_blocks
        if num_blocks > len(self._free):
            return None
        blocks = self._free[: -num_blocks - 1 : -1]
        del self._free[-num_blocks:]
        for block in blocks:
            self._num_owners[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """Add an owner to a block that is not free."""
        self._num_owners[block] += 1

    def release(self, block: int) -> bool:
        """Take an owner from a block; whether that was the last one."""
        assert self._num_owners[block] > 0, f"block {block} has no owner"
        self._num_owners[block] -= 1
        return self._num_owners[block] == 0

    def give_back(self, block: int) -> None:
        """Free a block without owners."""
        assert self._num_owners[block] == 0, f"block {block} is owned"
        self._free.append(block)

    def check_integrity(self, num_owners: Mapping[int, int], kept: Collection[int] = ()) -> None:
        """Assert that each block has the owners named here, is ``kept``, or is free, once."""
        for block, count in enumerate(self._num_owners):
            assert count == num_owners.get(block, 0), f"block {block} counts {count} owners"
        self._check_free(
            block for block, count in enumerate(self._num_owners) if not count and block not in kept
        )

    def _check_free(self, expected: Iterable[int]) -> None:
        assert sorted(self._free) == list(expected), "the free list is not the blocks that are free"
