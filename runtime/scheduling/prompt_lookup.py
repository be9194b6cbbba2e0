"""Guesses that cost nothing: what followed the last few tokens before follows them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from understudy.runtime.scheduling.sequence import Sequence as EngineSequence


class NgramDrafter:
    """Guesses that what followed the last few tokens before follows them again (prompt lookup).

    Costs next to nothing, and comes true where an answer repeats its prompt or itself: code that
    is edited, documents that are quoted, loops.
    """

    _SIZES: Final = (4, 3, 2)
    """Longer contexts are tried first; a single token says too little."""

    def __init__(self) -> None:
        self._indices: dict[int, _NgramIndex] = {}

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        """See ``Drafter``."""
        kept = {sequence.request_id for sequence, _ in wanted}
        for request_id in self._indices.keys() - kept:
            del self._indices[request_id]
        drafts: dict[int, list[int]] = {}
        for sequence, depth in wanted:
            index = self._indices.setdefault(sequence.request_id, _NgramIndex(self._SIZES))
            draft = index.look_up(sequence.token_ids, depth)
            if draft:
                drafts[sequence.request_id] = draft
        return drafts


class _NgramIndex:
    """Where in one sequence each few tokens were followed by something, the last time."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in sizes}
        self._num_indexed = 0

    def look_up(self, tokens: list[int], depth: int) -> list[int]:
        """What followed the last tokens when they were there before; nothing if they were not."""
        # The last token is followed by nothing yet.
        for end in range(self._num_indexed + 1, len(tokens)):
            for size, places in self._places.items():
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        for size, places in self._places.items():
            end_before = places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end_before is not None:
                # Behind the end of what is known, the guess goes on with itself.
                period = len(tokens) - end_before
                return [tokens[end_before + place % period] for place in range(depth)]
        return []
