"""Llama 3's format: an answer that is nothing but ``{"name": "f", "parameters": {…}}``.

Several calls are kept apart by semicolons; ``<|python_tag|>`` may stand before them. JSON that
calls no known tool is an answer like any other.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Final

from understudy.protocol.openai.deltas import Delta
from understudy.runtime.parsers.json_call import JsonCall
from understudy.runtime.parsers.prose import Marks, Prose

TAG: Final = "<|python_tag|>"
_BETWEEN: Final = " \t\r\n;,"


class Llama3JsonParser:
    """See ``Parser``.

    Args:
        names: Of the tools that may be called.
    """

    def __init__(self, names: Container[str]) -> None:
        self.num_calls = 0
        self._names = names
        self._tag = Marks(TAG)
        self._prose = Prose()
        self._call: JsonCall | None = None
        self._may_call = True
        self._between = ""
        self._pending = ""

    def push(self, text: str) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        self._pending += text
        while self._pending and self._step(deltas):
            pass
        return deltas

    def finish(self) -> list[Delta]:
        """See ``Parser``."""
        deltas: list[Delta] = []
        if self._call is not None and not self._call.has_begun:
            deltas += self._prose.push(self._between + self._call.raw)
        if not self.num_calls or self._pending:
            deltas += self._prose.push(self._pending)
        self._pending = ""
        return [*deltas, *self._prose.finish()]

    def _step(self, deltas: list[Delta]) -> bool:
        """Take in some of what is pending; whether there may be more to do."""
        if self._call is not None:
            return self._read_call(self._call, deltas)
        if self._may_call:
            return self._look_for_call(deltas)
        before, mark, self._pending = self._tag.cut(self._pending)
        deltas += self._prose.push(before)
        self._may_call = mark is not None
        return mark is not None

    def _look_for_call(self, deltas: list[Delta]) -> bool:
        """Where a call may begin: go on behind spaces, separators and the tag."""
        rest = self._pending.lstrip(_BETWEEN if self.num_calls else None)
        self._between += self._pending[: len(self._pending) - len(rest)]
        self._pending = rest
        if rest.startswith(TAG):
            self._between, self._pending = "", rest[len(TAG) :]
        elif rest.startswith("{"):
            names = self._names
            self._call = JsonCall(self.num_calls, is_known=lambda name: name in names)
        elif TAG.startswith(rest):
            return False
        else:
            self._give_up("", deltas)
        return True

    def _read_call(self, call: JsonCall, deltas: list[Delta]) -> bool:
        had_begun = call.has_begun
        added: list[Delta] = []
        self._pending = call.push(self._pending, added)
        if call.has_begun and not had_begun:
            self._prose.call()
            self._between = ""
            self.num_calls += 1
        deltas += added
        if call.is_broken and not call.has_begun:
            self._give_up(call.raw, deltas)
        elif not (call.is_broken or call.is_complete):
            return False
        self._call = None
        return True

    def _give_up(self, raw: str, deltas: list[Delta]) -> None:
        """What follows is content, up to a tag."""
        deltas += self._prose.push(self._between + raw)
        self._between = ""
        self._may_call = False
