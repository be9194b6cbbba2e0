"""The pythonic format: an answer that is a list of calls, ``[f(city="Paris"), g(n=2)]``.

Llama 3.2's and 4's, the latter between ``<|python_start|>`` and ``<|python_end|>``. A call is told
when its closing parenthesis is there: until then it is not known to be one. Nothing is evaluated:
arguments are literals, found in the syntax tree.
"""

from __future__ import annotations

import ast
import math
import warnings
from collections.abc import Container
from typing import Final

import msgspec

from understudy.protocol.openai.deltas import ArgumentsDelta, CallDelta, Delta
from understudy.runtime.parsers.prose import Prose

TAGS: Final = ("<|python_start|>", "<|python_tag|>")
END_TAG: Final = "<|python_end|>"
CALL_LENGTH_MAX: Final = 1 << 16

_SPACE: Final = " \t\r\n"
_SPACES: Final = frozenset(_SPACE)
_NAMES: Final = {"true": True, "false": False, "null": None}
"""Of constants that JSON has, and models mix up with Python's."""


class PythonicParser:
    """See ``Parser``.

    Args:
        names: Of the tools that may be called.
    """

    def __init__(self, names: Container[str]) -> None:
        self.num_calls = 0
        self._names = names
        self._prose = Prose()
        self._reads = self._read_start
        self._scan = _Scan()
        self._raw = ""
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
        if self._reads != self._read_end:
            deltas += self._prose.push(self._raw + self._pending)
        return [*deltas, *self._prose.finish()]

    def _read_start(self, deltas: list[Delta]) -> bool:
        """Where a list may begin."""
        rest = self._pending.lstrip(_SPACE)
        for tag in TAGS:
            if rest.startswith(tag):
                self._pending = rest[len(tag) :]
                return True
        if rest.startswith("["):
            self._raw = self._pending[: len(self._pending) - len(rest) + 1]
            self._pending = rest[1:]
            self._reads = self._read_call
            return True
        if any(tag.startswith(rest) for tag in TAGS):
            return False
        return self._give_up(deltas)

    def _read_call(self, deltas: list[Delta]) -> bool:
        """In the list: up to the end of the next call."""
        for place, character in enumerate(self._pending):
            is_between = _SPACES.issuperset(self._scan.characters)
            if is_between and character == "]" and self.num_calls:
                self._pending = self._pending[place + 1 :]
                self._raw = ""
                self._reads = self._read_end
                return True
            if is_between and character == ",":
                continue
            if not self._scan.take(character):
                self._raw += self._pending[: place + 1]
                self._pending = self._pending[place + 1 :]
                return self._give_up(deltas)
            if self._scan.is_complete:
                self._raw += self._pending[: place + 1]
                self._pending = self._pending[place + 1 :]
                return self._tell(deltas)
        self._raw += self._pending
        self._pending = ""
        return False

    def _read_end(self, deltas: list[Delta]) -> bool:  # noqa: ARG002 - one of the readers
        """Behind the list, where nothing is said."""
        self._pending = ""
        return False

    def _tell(self, deltas: list[Delta]) -> bool:
        call = _read("".join(self._scan.characters))
        self._scan = _Scan()
        if call is None or call[0] not in self._names:
            return self._give_up(deltas)
        self._raw = ""
        self._prose.call()
        deltas.append(CallDelta(self.num_calls, call[0]))
        deltas.append(ArgumentsDelta(self.num_calls, call[1]))
        self.num_calls += 1
        return True

    def _read_prose(self, deltas: list[Delta]) -> bool:
        deltas += self._prose.push(self._pending)
        self._pending = ""
        return False

    def _give_up(self, deltas: list[Delta]) -> bool:
        """All of it is content."""
        deltas += self._prose.push(self._raw)
        self._raw = ""
        self._reads = self._read_prose
        return True


class _Scan:
    """Finds the end of one call: a name, and parentheses with brackets and strings inside."""

    def __init__(self) -> None:
        self.characters: list[str] = []
        self.is_complete = False
        self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def take(self, character: str) -> bool:
        """Take in one more character; whether this may still be a call."""
        self.characters.append(character)
        if len(self.characters) > CALL_LENGTH_MAX:
            return False
        if self._quote:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == self._quote:
                self._quote = ""
        elif character in "([{":
            self._depth += 1
        elif character in ")]}":
            self._depth -= 1
            self.is_complete = not self._depth
        elif self._depth and character in "'\"":
            self._quote = character
        elif not self._depth:
            return character.isalnum() or character in "_.-" or character in _SPACE
        return self._depth >= 0


def _read(text: str) -> tuple[str, str] | None:
    """A call's name and the JSON of its arguments; ``None`` if it is none that can be told."""
    name, _, arguments = text.partition("(")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about escapes, which are the model's
            call = ast.parse(f"f({arguments}", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        values = {
            keyword.arg: _literal(keyword.value)
            for keyword in call.keywords
            if keyword.arg is not None
        }
        if len(values) != len(call.keywords):
            return None
        return name.strip(_SPACE), msgspec.json.encode(values).decode()
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
        return None


def _literal(node: ast.expr) -> object:
    """The value of a literal.

    Raises:
        ValueError: it is none, or one that JSON cannot say.
    """
    match node:
        case ast.Constant(value) if value is None or type(value) in {str, bool, int}:
            return value
        case ast.Constant(float(value)) if math.isfinite(value):
            return value
        case ast.UnaryOp(ast.USub(), ast.Constant(int(value) | float(value))):
            return -value
        case ast.List(items) | ast.Tuple(items):
            return [_literal(item) for item in items]
        case ast.Dict(keys, items):
            return {_key(key): _literal(item) for key, item in zip(keys, items, strict=True)}
        case ast.Name(name) if name in _NAMES:
            return _NAMES[name]
    raise ValueError("no literal")


def _key(node: ast.expr | None) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    raise ValueError("a key is no string")
