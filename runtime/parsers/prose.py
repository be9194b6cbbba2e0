"""Text between calls. What every parser has in common: marks to look for, spaces to hold back.

All parsers keep one promise, on which the joining of streams rests: what was given out after the
first n characters depends on those characters alone, not on how they came.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from understudy.protocol.openai.deltas import ContentDelta, Delta
from understudy.runtime.detokenizer import StopStrings


class Parser(Protocol):
    """Finds the calls in an answer's text."""

    @property
    def num_calls(self) -> int:
        """Calls that have begun."""
        ...

    def push(self, text: str) -> list[Delta]:
        """What more of the text means."""
        ...

    def finish(self) -> list[Delta]:
        """What was held back means, now that nothing follows."""
        ...


class Cut(NamedTuple):
    """A text, cut at the first mark in it."""

    before: str
    mark: str | None
    rest: str
    """Behind the mark; or, without one, what may become a mark."""


class Marks:
    """Looks for marks in a text that comes in pieces."""

    def __init__(self, *marks: str) -> None:
        self._strings = StopStrings(marks)
        self._starts = tuple({mark[0] for mark in marks})

    def cut(self, text: str) -> Cut:
        """Cut at the first mark; without one, before what may become one."""
        for start in self._starts:
            if start in text:
                break
        else:
            return Cut(text, None, "")
        match = self._strings.find(text)
        if match is not None:
            mark = text[match.start : match.end]
            return Cut(text[: match.start], mark, text[match.end :])
        end = len(text) - self._strings.held_length(text)
        return Cut(text[:end], None, text[end:])


class Prose:
    """What is no call, and so is content. Spaces around calls are part of neither."""

    def __init__(self) -> None:
        self._held = ""
        self._is_behind_call = False

    def push(self, text: str) -> list[Delta]:
        """More text outside of calls."""
        if not text:
            return []
        text = self._held + text
        end = len(text.rstrip())
        if not end:
            self._held = text
            return []
        self._held = text[end:]
        self._is_behind_call = False
        return [ContentDelta(text[:end])]

    def call(self) -> None:
        """A call begins: the spaces before it are dropped."""
        self._held = ""
        self._is_behind_call = True

    def finish(self) -> list[Delta]:
        """The end: spaces are content, unless a call was the last."""
        held, self._held = self._held, ""
        return [ContentDelta(held)] if held and not self._is_behind_call else []
