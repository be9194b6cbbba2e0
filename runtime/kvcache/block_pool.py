"""The blocks of the KV cache, as numbers: which are free, and how many own each of the others.

Knows nothing of sequences, tokens or tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class BlockPool:
    """``num_blocks`` equal blocks, each with a count of its owners.

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
        """Blocks that nobody owns."""
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

    def share(self, blocks: Iterable[int]) -> None:
        """Add an owner to each of these blocks; they have one already."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is free and cannot be shared"
            self._num_owners[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Take an owner from each of these blocks; one without owners is free again."""
        for block in blocks:
            assert self._num_owners[block] > 0, f"block {block} is free already"
            self._num_owners[block] -= 1
            if self._num_owners[block] == 0:
                self._free.append(block)

    def check_integrity(self, num_owners: Mapping[int, int]) -> None:
        """Assert that each block has the owners named here, or else is free, exactly once."""
        for block, count in enumerate(self._num_owners):
            assert count == num_owners.get(block, 0), f"block {block} counts {count} owners"
        ownerless = [block for block, count in enumerate(self._num_owners) if count == 0]
        assert sorted(self._free) == ownerless, "the free list is not the blocks without owners"
