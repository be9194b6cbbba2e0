"""Where an output stands between its thoughts and its answer, and what it must say next.

A budget for thoughts is kept by forcing: when it is spent, the next tokens are those that close the
thoughts, and then the model goes on by itself. All of it is a function of the request and the
output alone, token by token, so that a draft, another chunk, a preemption or another engine, which
replays the output, comes to the same::

    START ──opening──▶ THOUGHTS ──closing──▶ ANSWER
      ╰──anything else────┼──────────────────▶ │
                          ╰─budget─▶ CLOSING ──╯   its tokens are forced, one by one
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum, auto
from typing import NamedTuple

from understudy.protocol.request import Thinking


class Phase(Enum):
    """Where an output stands."""

    START = auto()
    """It may open its thoughts yet."""
    THOUGHTS = auto()
    CLOSING = auto()
    """Its thoughts are being closed for it."""
    ANSWER = auto()


class Progress(NamedTuple):
    """Where an output stands behind so many of its tokens."""

    phase: Phase
    num_tokens: int = 0
    num_in_phase: int = 0
    """Of them, those that belong to the phase. The marks belong to no thought but a closing one
    that is being written."""
    last: tuple[int, ...] = ()
    """The phase's last tokens, as far as a mark may have to be found in them."""

    @property
    def answer_start(self) -> int:
        """The place in the output at which the answer begins, if it has or may begin there."""
        return self.num_tokens - self.num_in_phase


def begin(thinking: Thinking) -> Progress:
    """Where an output stands that has no tokens yet."""
    if thinking.is_open:
        return _in_thoughts(thinking, 0, 0, ())
    return Progress(Phase.START if thinking.openings else Phase.ANSWER)


def advance(thinking: Thinking, progress: Progress, token: int) -> Progress:
    """Where it stands behind one more token."""
    phase, num_tokens, num_in_phase, last = progress
    num_tokens, num_in_phase = num_tokens + 1, num_in_phase + 1
    match phase:
        case Phase.START:
            last = (*last, token)
            if last in thinking.openings:
                return _in_thoughts(thinking, num_tokens, 0, ())
            if any(opening[:num_tokens] == last for opening in thinking.openings):
                return Progress(phase, num_tokens, num_in_phase, last)
            return Progress(Phase.ANSWER, num_tokens, num_in_phase)
        case Phase.THOUGHTS:
            last = (*last, token)
            if any(last[-len(closing) :] == closing for closing in thinking.closings):
                return Progress(Phase.ANSWER, num_tokens)
            longest = max(map(len, thinking.closings), default=1)
            return _in_thoughts(thinking, num_tokens, num_in_phase, last[-longest:])
        case Phase.CLOSING:
            if num_in_phase == len(thinking.forced):
                return Progress(Phase.ANSWER, num_tokens)
            return Progress(phase, num_tokens, num_in_phase)
        case _:
            return Progress(phase, num_tokens, num_in_phase)


def forced_token(thinking: Thinking, progress: Progress) -> int | None:
    """The one token that may come next, if it is not the model's to choose."""
    if progress.phase is not Phase.CLOSING:
        return None
    return thinking.forced[progress.num_in_phase]


def progress_of(thinking: Thinking, output: Iterable[int]) -> Progress:
    """Where an output stands, from its beginning."""
    progress = begin(thinking)
    for token in output:
        progress = advance(thinking, progress, token)
    return progress


class ThoughtReader:
    """Keeps up with one output that grows.

    It may be replaced by another list, as a guesser's is: then it is read again.
    """

    __slots__ = ("_progress", "_thinking", "_token_ids")

    def __init__(self, thinking: Thinking) -> None:
        self._thinking = thinking
        self._token_ids: Sequence[int] | None = None
        self._progress = begin(thinking)

    def read(self, token_ids: Sequence[int], num_prompt_tokens: int) -> Progress:
        """Where the output behind a prompt stands."""
        num_output = len(token_ids) - num_prompt_tokens
        if token_ids is not self._token_ids or num_output < self._progress.num_tokens:
            self._token_ids = token_ids
            self._progress = begin(self._thinking)
        for place in range(num_prompt_tokens + self._progress.num_tokens, len(token_ids)):
            self._progress = advance(self._thinking, self._progress, token_ids[place])
        return self._progress


def _in_thoughts(
    thinking: Thinking, num_tokens: int, num_thought: int, last: tuple[int, ...]
) -> Progress:
    """Inside the thoughts, unless the budget for them is spent."""
    if thinking.budget is not None and num_thought >= thinking.budget:
        return Progress(Phase.CLOSING if thinking.forced else Phase.ANSWER, num_tokens)
    return Progress(Phase.THOUGHTS, num_tokens, num_thought, last)
