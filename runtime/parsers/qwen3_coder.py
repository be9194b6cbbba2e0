"""Qwen3-Coder's format: ``<function=f><parameter=city>Paris</parameter></function>``.

Calls stand in ``<tool_call>`` marks, which the model sometimes leaves out. Values are bare text;
what they mean is said by the types in the tool's schema. A string is passed on as it comes, any
other value when it is complete.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import msgspec

from understudy.protocol.openai.deltas import ArgumentsDelta, CallDelta, Delta
from understudy.runtime.parsers.json_call import NAME_LENGTH_MAX
from understudy.runtime.parsers.prose import Marks, Prose

FUNCTION: Final = "<function="
PARAMETER: Final = "<parameter="
END_OF_FUNCTION: Final = "</function>"
END_OF_PARAMETER: Final = "</parameter>"
CALL: Final = "<tool_call>"
END_OF_CALL: Final = "</tool_call>"

_INTEGER: Final = re.compile(r"-?(0|[1-9][0-9]{0,30})")

ParameterTypes = Mapping[str, Mapping[str, str]]
"""The JSON type of each parameter of each tool; several types are joined by ``|``."""


class Qwen3CoderParser:
    """See ``Parser``.

    Args:
        types: What parameters are. One that is not named is a string.
    """

    def __init__(self, types: ParameterTypes) -> None:
        self.num_calls = 0
        self._types = types
        self._prose = Prose()
        self._outside = Marks(CALL, END_OF_CALL, FUNCTION)
        self._name_end = Marks(">")
        self._inside = Marks(PARAMETER, END_OF_FUNCTION, END_OF_CALL)
        self._value_end = Marks("\n" + END_OF_PARAMETER, END_OF_PARAMETER)
        self._reads = self._read_prose
        self._function = ""
        self._num_parameters = 0
        self._type = ""
        self._value = ""
        self._is_at_start = False
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
        if self._reads == self._read_prose:
            deltas += self._prose.push(self._pending)
        elif self._reads == self._read_name:
            deltas += self._prose.push(FUNCTION + self._pending)
        return [*deltas, *self._prose.finish()]

    def _tell(self, text: str, deltas: list[Delta]) -> None:
        deltas.append(ArgumentsDelta(self.num_calls - 1, text))

    def _read_prose(self, deltas: list[Delta]) -> bool:
        before, mark, self._pending = self._outside.cut(self._pending)
        deltas += self._prose.push(before)
        if mark == FUNCTION:
            self._reads = self._read_name
        return mark is not None

    def _read_name(self, deltas: list[Delta]) -> bool:
        name, mark, _ = self._name_end.cut(self._pending)
        if len(name) > NAME_LENGTH_MAX:
            deltas += self._prose.push(FUNCTION)
            self._reads = self._read_prose
            return True
        if mark is None:
            return False
        self._pending = self._pending[len(name) + 1 :]
        self._function = name.strip()
        self._num_parameters = 0
        self._prose.call()
        deltas.append(CallDelta(self.num_calls, self._function))
        self.num_calls += 1
        self._tell("{", deltas)
        self._reads = self._read_inside
        return True

    def _read_inside(self, deltas: list[Delta]) -> bool:
        """Between parameters, where nothing else is said."""
        _, mark, self._pending = self._inside.cut(self._pending)
        if mark == PARAMETER:
            self._reads = self._read_parameter
        elif mark is not None:
            self._tell("}", deltas)
            self._reads = self._read_prose
        return mark is not None

    def _read_parameter(self, deltas: list[Delta]) -> bool:
        name, mark, rest = self._name_end.cut(self._pending)
        if mark is None:
            return False
        self._pending = rest
        comma = ", " if self._num_parameters else ""
        self._num_parameters += 1
        self._type = self._types.get(self._function, {}).get(name.strip(), "string")
        self._tell(f"{comma}{_json(name.strip())}: ", deltas)
        if self._type == "string":
            self._tell('"', deltas)
        self._value = ""
        self._is_at_start = True
        self._reads = self._read_value
        return True

    def _read_value(self, deltas: list[Delta]) -> bool:
        if self._is_at_start:
            self._is_at_start = False
            self._pending = self._pending.removeprefix("\n")
        text, mark, self._pending = self._value_end.cut(self._pending)
        if self._type == "string":
            if text:
                self._tell(_json(text)[1:-1], deltas)
        else:
            self._value += text
        if mark is None:
            return False
        self._tell('"' if self._type == "string" else _typed(self._value, self._type), deltas)
        self._reads = self._read_inside
        return True


def parameter_types(schema: Mapping[str, object]) -> dict[str, str]:
    """What a tool's schema says of its parameters: the short form of ``ParameterTypes``."""
    properties = schema.get("properties")
    if not isinstance(properties, dict):
        return {}
    return {name: _type_of(property_) for name, property_ in properties.items()}


def _type_of(schema: object) -> str:
    """The types that a schema allows; any, if it does not say."""
    if not isinstance(schema, dict):
        return "any"
    named = schema.get("type")
    kinds = [named] if isinstance(named, str) else named
    if isinstance(kinds, list) and kinds and all(isinstance(kind, str) for kind in kinds):
        return "|".join(kinds)
    alternatives = schema.get("enum")
    if isinstance(alternatives, list) and all(isinstance(one, str) for one in alternatives):
        return "string"
    return "any"


def _typed(text: str, kind: str) -> str:
    """The JSON of a value that may be something else than a string."""
    kinds = set(kind.split("|"))
    bare = text.strip()
    if _INTEGER.fullmatch(bare) and kinds & {"integer", "number", "any"}:
        return bare
    if bare.lower() in {"true", "false"} and kinds & {"boolean", "any"}:
        return bare.lower()
    if bare.lower() in {"null", "none"}:
        return "null"
    if kinds - {"string", "integer", "boolean", "null"}:
        try:
            return _json(msgspec.json.decode(bare))
        except (msgspec.MsgspecError, UnicodeError, RecursionError, ValueError):
            pass
    return _json(text)


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
