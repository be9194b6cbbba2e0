"""Mistral's formats: ``[TOOL_CALLS]`` and a list of calls, or a name and its arguments.

Older models write ``[TOOL_CALLS][{"name": "f", "arguments": {…}}, …]``, newer ones
``[TOOL_CALLS]f[ARGS]{…}[TOOL_CALLS]g[ARGS]{…}``, some of them without the second mark.
"""

from __future__ import annotations

import re
from typing import Final

from understudy.protocol.openai.deltas import ArgumentsDelta, CallDelta, Delta
from understudy.runtime.parsers.json_call import NAME_LENGTH_MAX, JsonCall, JsonValue
from understudy.runtime.parsers.prose import Marks, Prose

CALLS: Final = "[TOOL_CALLS]"
ARGUMENTS: Final = "[ARGS]"
CALL_ID: Final = "[CALL_ID]"
MARKS: Final = (CALLS, ARGUMENTS, CALL_ID)

_HEAD_LENGTH_MAX: Final = 2 * NAME_LENGTH_MAX
_HEAD: Final = re.compile(
    r"\s*([A-Za-z0-9_.-]+)\s*(?:\[CALL_ID\]\s*[A-Za-z0-9]*\s*)?(?:\[ARGS\])?\s*(?=\{)"
)


class MistralParser:
    """See ``Parser``."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._marks = Marks(CALLS)
        self._prose = Prose()
        self._reads = self._read_prose
        self._call: JsonCall | None = None
        self._value: JsonValue | None = None
        self._pending = ""

    def push(self, text: str) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        self._pending += text
        while self._pending and self._reads(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        rest, self._pending = self._pending, ""
        if self._call is not None and not self._call.has_begun:
            deltas += self._prose.push(self._call.raw)
        elif self._reads == self._read_head:
            deltas += self._prose.push(CALLS + rest)
        elif self._reads == self._read_prose:
            deltas += self._prose.push(rest)
        return [*deltas, *self._prose.finish()]

    def _read_prose(self, deltas: list[Delta]) -> bool:
        before, mark, self._pending = self._marks.cut(self._pending)
        deltas += self._prose.push(before)
        if mark is None:
            return False
        self._reads = self._read_head
        return True

    def _read_head(self, deltas: list[Delta]) -> bool:
        """Behind the mark: a list, or a name."""
        text = self._pending.lstrip()
        if text.startswith("["):
            self._pending = text[1:]
            self._reads = self._read_list
            return True
        head = _HEAD.match(self._pending[:_HEAD_LENGTH_MAX])
        if head is not None and len(head[1]) <= NAME_LENGTH_MAX:
            self._begin(head[1], deltas)
            self._pending = self._pending[head.end() :]
            self._reads = self._read_arguments
            return True
        if "{" not in self._pending[:_HEAD_LENGTH_MAX] and len(self._pending) < _HEAD_LENGTH_MAX:
            return False
        deltas += self._prose.push(CALLS)
        self._reads = self._read_prose
        return True

    def _begin(self, name: str, deltas: list[Delta]) -> None:
        self._prose.call()
        deltas.append(CallDelta(self.num_calls, name))
        self.num_calls += 1

    def _read_arguments(self, deltas: list[Delta]) -> bool:
        """An object; pass it on up to its end."""
        index = self.num_calls - 1
        for place, character in enumerate(self._pending):
            if self._value is None:
                self._value = JsonValue(character)
                continue
            self._value.take(character)
            if self._value.is_complete:
                deltas.append(ArgumentsDelta(index, self._pending[: place + 1]))
                self._pending = self._pending[place + 1 :]
                self._value = None
                self._reads = self._read_prose
                return True
        deltas.append(ArgumentsDelta(index, self._pending))
        self._pending = ""
        return False

    def _read_list(self, deltas: list[Delta]) -> bool:
        """Between the calls of a list, or in one."""
        if self._call is None:
            self._pending = self._pending.lstrip(" \t\r\n,")
            if not self._pending:
                return False
            if self._pending.startswith("]"):
                self._pending = self._pending[1:]
                self._reads = self._read_prose
                return True
            self._call = JsonCall(self.num_calls, is_known=bool)
        call = self._call
        had_begun = call.has_begun
        added: list[Delta] = []
        self._pending = call.push(self._pending, added)
        if call.has_begun and not had_begun:
            self._prose.call()
            self.num_calls += 1
        deltas += added
        if call.is_broken:
            deltas += self._prose.push(call.raw)
            self._reads = self._read_prose
        elif not call.is_complete:
            return False
        self._call = None
        return True
