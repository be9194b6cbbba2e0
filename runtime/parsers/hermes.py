"""Hermes' format, Qwen's too: ``<tool_call>{"name": "f", "arguments": {…}}</tool_call>``."""

from __future__ import annotations

from typing import Final

from understudy.protocol.openai.deltas import Delta
from understudy.runtime.parsers.json_call import JsonCall
from understudy.runtime.parsers.prose import Marks, Prose

OPENING: Final = "<tool_call>"
CLOSING: Final = "</tool_call>"


class HermesParser:
    """See ``Parser``. What is between the marks and no call is content, marks included."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._opening = Marks(OPENING)
        self._closing = Marks(CLOSING, OPENING)
        self._prose = Prose()
        self._call: JsonCall | None = None
        self._is_behind_call = False
        self._pending = ""

    def push(self, text: str) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        self._pending += text
        while self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        rest, self._pending = self._pending, ""
        if self._call is not None and not self._call.has_begun:
            deltas += self._prose.push(OPENING + self._call.raw)
        if self._call is None and not self._is_behind_call:
            deltas += self._prose.push(rest)
        return [*deltas, *self._prose.finish()]

    def _step(self, deltas: list[Delta]) -> bool:
        """Take in some of what is pending; whether there may be more to do."""
        if self._call is not None:
            return self._read_call(self._call, deltas)
        marks = self._closing if self._is_behind_call else self._opening
        before, mark, self._pending = marks.cut(self._pending)
        if not self._is_behind_call:
            deltas += self._prose.push(before)
        if mark == OPENING:
            self._is_behind_call = False
            self._call = JsonCall(self.num_calls, is_known=bool)
        elif mark == CLOSING:
            self._is_behind_call = False
        return mark is not None

    def _read_call(self, call: JsonCall, deltas: list[Delta]) -> bool:
        had_begun = call.has_begun
        added: list[Delta] = []
        self._pending = call.push(self._pending, added)
        if call.has_begun and not had_begun:
            self._prose.call()
            self.num_calls += 1
        deltas += added
        if call.is_broken and not call.has_begun:
            deltas += self._prose.push(OPENING + call.raw)
        elif call.is_broken or call.is_complete:
            self._is_behind_call = True
        else:
            return False
        self._call = None
        return True
