"""A call that is written as JSON: ``{"name": "f", "arguments": {…}}``, read as it comes.

The arguments are passed on as the model wrote them, character by character, as soon as it is
known whose they are. The JSON is not checked beyond where its parts end: a model without a grammar
may write what is none, and its client is told what it wrote, as by OpenAI.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum, auto
from typing import Final

import msgspec

from understudy.protocol.openai.deltas import ArgumentsDelta, CallDelta, Delta

NAME_LENGTH_MAX: Final = 256
_ARGUMENTS: Final = frozenset({"arguments", "parameters"})
_SPACE: Final = frozenset(" \t\r\n")
_OPENING: Final = frozenset("{[")
_CLOSING: Final = frozenset("}]")


class JsonValue:
    """Finds the end of one JSON value.

    Attributes:
        is_complete: Whether the value has ended.
    """

    def __init__(self, first: str) -> None:
        self._depth = 1 if first in _OPENING else 0
        self._is_string = first == '"'
        self._is_scalar = not (self._depth or self._is_string)
        self._is_escaped = False
        self.is_complete = False

    def take(self, character: str) -> bool:
        """Whether one more character, behind the first, is part of the value."""
        if self._is_scalar:
            self.is_complete = character in _SPACE or character in ",]}"
            return not self.is_complete
        if self._is_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._is_string = False
                self.is_complete = not self._depth
        elif character == '"':
            self._is_string = True
        elif character in _OPENING:
            self._depth += 1
        elif character in _CLOSING:
            self._depth -= 1
            self.is_complete = not self._depth
        return True


class _Expects(Enum):
    OPENING = auto()
    KEY = auto()
    COLON = auto()
    VALUE = auto()
    COMMA = auto()
    NOTHING = auto()


class JsonCall:
    """Reads one call.

    Args:
        index: The call's number in the answer.
        is_known: Whether a tool may be called by this name.

    Attributes:
        raw: What was read, as long as the call has not begun.
        has_begun: Whether a call was told: nothing is taken back any more.
        is_complete: Whether the object has ended.
        is_broken: Whether this is no call.
    """

    def __init__(self, index: int, *, is_known: Callable[[str], bool]) -> None:
        self._index = index
        self._is_known = is_known
        self._expects = _Expects.OPENING
        self._key = ""
        self._value: JsonValue | None = None
        self._characters: list[str] = []
        self._name: str | None = None
        self._arguments = ""
        self._has_arguments = False
        self.raw = ""
        self.has_begun = False
        self.is_complete = False
        self.is_broken = False

    def push(self, text: str, deltas: list[Delta]) -> str:
        """Take in more text; give what is behind the object's end, or behind the breach."""
        had_begun = self.has_begun
        fresh: list[str] = []
        end = len(text)
        for place, character in enumerate(text):
            if self._value is None or not self._take_into_value(character, fresh):
                self._take(character, fresh)
            if not self.has_begun and self._name is not None and (fresh or self._arguments):
                self.has_begun = True
            if self.is_broken or self.is_complete:
                end = place + 1
                break
        if not had_begun:
            self._arguments += "".join(fresh)
        if not self.has_begun:
            self.raw += text[:end]
        elif not had_begun:
            assert self._name is not None
            self.raw = ""
            deltas.append(CallDelta(self._index, self._name))
            deltas.append(ArgumentsDelta(self._index, self._arguments))
        elif fresh:
            deltas.append(ArgumentsDelta(self._index, "".join(fresh)))
        return text[end:]

    def _take_into_value(self, character: str, fresh: list[str]) -> bool:
        """Whether a character is part of the value (or key) that is being read."""
        value = self._value
        assert value is not None
        is_part = value.take(character)
        if is_part:
            (fresh if self._is_passed_on else self._characters).append(character)
        if value.is_complete:
            self._value = None
            self._end_value(fresh)
        return is_part

    @property
    def _is_passed_on(self) -> bool:
        """Whether the value that is being read is the arguments' object."""
        return (
            self._expects is _Expects.VALUE
            and self._key in _ARGUMENTS
            and not self._has_arguments
            and self._characters[0] == "{"
        )

    def _take(self, character: str, fresh: list[str]) -> None:
        """Take in a character between values."""
        if character in _SPACE or self.is_broken:
            return
        match self._expects, character:
            case _Expects.OPENING, "{":
                self._expects = _Expects.KEY
            case (_Expects.KEY, '"') | (_Expects.VALUE, _):
                self._value = JsonValue(character)
                self._characters = [character]
                if self._is_passed_on:
                    fresh.append(character)
            case _Expects.KEY, "}":
                self._end(fresh)
            case _Expects.COLON, ":":
                self._expects = _Expects.VALUE
            case _Expects.COMMA, ",":
                self._expects = _Expects.KEY
            case _Expects.COMMA, "}":
                self._end(fresh)
            case _:
                self.is_broken = True

    def _end_value(self, fresh: list[str]) -> None:
        literal = "".join(self._characters)
        if self._expects is _Expects.KEY:
            self._key = _text(literal) or ""
            self._expects = _Expects.COLON
            return
        if self._key == "name" and self._name is None:
            name = _text(literal)
            if name and len(name) <= NAME_LENGTH_MAX and self._is_known(name):
                self._name = name
            else:
                self.is_broken = True
        elif self._key in _ARGUMENTS and not self._has_arguments:
            if not self._is_passed_on:
                arguments = _object_text(literal)
                if arguments is None:
                    self.is_broken = True
                    return
                fresh.append(arguments)
            self._has_arguments = True
        self._expects = _Expects.COMMA

    def _end(self, fresh: list[str]) -> None:
        self._expects = _Expects.NOTHING
        self.is_broken = self._name is None
        self.is_complete = not self.is_broken
        if self.is_complete and not self._has_arguments:
            self.has_begun = True
            fresh.append("{}")


def _text(literal: str) -> str | None:
    """What a JSON string says; ``None`` if it is none."""
    try:
        return msgspec.json.decode(literal, type=str)
    except (msgspec.MsgspecError, UnicodeError):
        return None


def _object_text(literal: str) -> str | None:
    """Arguments that are no object themselves: absent ones, or an object written as a string."""
    if literal == "null":
        return "{}"
    text = _text(literal)
    try:
        msgspec.json.decode(text or "", type=dict)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return None
    return text
