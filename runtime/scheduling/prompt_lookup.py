"""Guesses that cost nothing: what followed the last few tokens before follows them again.

First in the sequence itself, its prompt included; then in what was answered lately to the same
tenant, with the same salt of its prefixes: nobody's speed tells anything of another's texts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Final

from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

_SIZES: Final = (4, 3, 2)
"""Longer contexts are tried first; a single token says too little."""
_SHARED_SIZE: Final = 4
"""In other answers, only a longer context says anything."""
_SHARED_TOKENS_MAX: Final = 32_768
_TENANTS_MAX: Final = 64


class NgramDrafter:
    """Guesses that what followed the last few tokens before follows them again (prompt lookup).

    Costs next to nothing, and comes true where an answer repeats its prompt, itself or an earlier
    answer: code that is edited, documents that are quoted, loops, questions asked again.
    """

    def __init__(self) -> None:
        self._indices: dict[int, _NgramIndex] = {}
        self._answers: OrderedDict[bytes, _Answers] = OrderedDict()
        """By tenant and salt, the least recently used first."""

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        """See ``Drafter``."""
        kept = {sequence.request_id for sequence, _ in wanted}
        for request_id in self._indices.keys() - kept:
            self._remember(self._indices.pop(request_id).sequence)
        drafts: dict[int, list[int]] = {}
        for sequence, depth in wanted:
            index = self._indices.get(sequence.request_id)
            if index is None or index.sequence is not sequence:
                index = self._indices[sequence.request_id] = _NgramIndex(sequence)
            draft = index.look_up(depth)
            if not draft and sequence.cache_root in self._answers:
                draft = self._answers[sequence.cache_root].look_up(sequence.token_ids, depth)
            if draft:
                drafts[sequence.request_id] = draft
        return drafts

    def _remember(self, sequence: EngineSequence) -> None:
        """A sequence has ended, or will begin anew: its answer so far may come again."""
        answers = self._answers.setdefault(sequence.cache_root, _Answers())
        answers.add(sequence.token_ids[sequence.num_prompt_tokens :])
        self._answers.move_to_end(sequence.cache_root)
        if len(self._answers) > _TENANTS_MAX:
            self._answers.popitem(last=False)


class _NgramIndex:
    """Where in one sequence each few tokens were followed by something, the last time."""

    def __init__(self, sequence: EngineSequence) -> None:
        self.sequence = sequence
        self._places: dict[int, dict[tuple[int, ...], int]] = {size: {} for size in _SIZES}
        self._num_indexed = 0

    def look_up(self, depth: int) -> list[int]:
        """What followed the last tokens when they were there before; nothing if they were not."""
        tokens = self.sequence.token_ids
        # The last token is followed by nothing yet.
        for size, places in self._places.items():
            for end in range(max(self._num_indexed + 1, size), len(tokens)):
                places[tuple(tokens[end - size : end])] = end
        self._num_indexed = max(self._num_indexed, len(tokens) - 1)
        for size, places in self._places.items():
            end_before = places.get(tuple(tokens[-size:])) if len(tokens) > size else None
            if end_before is not None:
                # Behind the end of what is known, the guess goes on with itself.
                period = len(tokens) - end_before
                return [tokens[end_before + place % period] for place in range(depth)]
        return []


class _Answers:
    """What was answered lately, and where in it each few tokens were, the last time."""

    def __init__(self) -> None:
        self._answers: dict[int, list[int]] = {}
        """By number, the oldest first."""
        self._places: dict[tuple[int, ...], tuple[int, int]] = {}
        """In which answer each few tokens were, and where they ended."""
        self._num_tokens = 0
        self._next = 0

    def add(self, answer: list[int]) -> None:
        """Remember an answer, and forget the oldest of too many."""
        if not _SHARED_SIZE < len(answer) <= _SHARED_TOKENS_MAX:
            return
        number, self._next = self._next, self._next + 1
        self._answers[number] = answer
        self._num_tokens += len(answer)
        self._places |= {few: (number, end) for few, end in _few_tokens(answer)}
        while self._num_tokens > _SHARED_TOKENS_MAX:
            oldest = next(iter(self._answers))
            forgotten = self._answers.pop(oldest)
            self._num_tokens -= len(forgotten)
            for few, _ in _few_tokens(forgotten):
                if self._places.get(few, (-1, 0))[0] == oldest:
                    del self._places[few]

    def look_up(self, tokens: list[int], depth: int) -> list[int]:
        """What followed the last tokens in an answer; nothing if none had them."""
        number, end = self._places.get(tuple(tokens[-_SHARED_SIZE:]), (-1, 0))
        return self._answers[number][end : end + depth] if number >= 0 else []


def _few_tokens(answer: list[int]) -> Iterable[tuple[tuple[int, ...], int]]:
    """Every few tokens that something follows, and where they end."""
    for end in range(_SHARED_SIZE, len(answer)):
        yield tuple(answer[end - _SHARED_SIZE : end]), end
