"""Compaction: which requests still have to move to the latest segment, portion by portion. Pure.

Everything that is held moves, so that everything before can go: a journal is compacted when at
least half of it is of no use, which bounds the work by what was written since the last time.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from understudy.runtime.storage.image import Image
from understudy.runtime.storage.records import CheckpointPayload

_LOOK_BYTES: Final = 256
"""What it costs to find that a request need not move, in bytes that could be written."""


class Compaction:
    """One move of everything that is held."""

    def __init__(self, image: Image, below: int) -> None:
        self.below = below
        """Segments with lower numbers can go when the move is over."""
        self.retire_lsn: int | None = None
        """The record that says so; they go when it is on the medium."""
        self._image = image
        self._waiting = deque([*image.ended.values(), *image.live.values()])

    @property
    def is_moving(self) -> bool:
        """Whether there is more to move."""
        return bool(self._waiting)

    def is_over(self, durable_lsn: int) -> bool:
        """Whether nothing before the move is needed any more."""
        return self.retire_lsn is not None and durable_lsn >= self.retire_lsn

    def portion(self, base: int, budget_bytes: int) -> list[CheckpointPayload]:
        """The next requests to write into segment ``base``: as many as fit, and one at least."""
        moved = []
        while self._waiting and budget_bytes > 0:
            held = self._waiting.popleft()
            budget_bytes -= _LOOK_BYTES
            if held.base < self.below and self._image.get(held.request_id) is held:
                budget_bytes -= held.num_bytes
                moved.append(held.checkpoint())
                held.base = base
        return moved
