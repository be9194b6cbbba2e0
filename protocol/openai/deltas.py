"""What a model's text means, piece by piece: reasoning, content, and calls of tools.

Parsers say it (``runtime.parsers``), each endpoint shapes it in its own words. The pieces of an
answer that streams, put together, are the answer that does not: both are made of the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias


class ReasoningDelta(NamedTuple):
    """More of what the model thinks before it answers."""

    text: str


class ContentDelta(NamedTuple):
    """More of the answer."""

    text: str


class CallDelta(NamedTuple):
    """A call of a tool begins, the ``number``-th of the answer, counted from 0."""

    number: int
    name: str


class ArgumentsDelta(NamedTuple):
    """More of the JSON of a call's arguments."""

    number: int
    text: str


Delta: TypeAlias = ReasoningDelta | ContentDelta | CallDelta | ArgumentsDelta


class ToolCallText(NamedTuple):
    """One call of a tool, as far as it has come."""

    name: str
    arguments: str


class ParsedText(NamedTuple):
    """All that an answer's pieces come to."""

    content: str
    reasoning: str
    calls: tuple[ToolCallText, ...]


def put_together(deltas: Iterable[Delta]) -> ParsedText:
    """An answer from its pieces."""
    content: list[str] = []
    reasoning: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for delta in deltas:
        match delta:
            case ContentDelta(text):
                content.append(text)
            case ReasoningDelta(text):
                reasoning.append(text)
            case CallDelta(index, name):
                assert index == len(names), "calls are numbered as they come"
                names.append(name)
                arguments.append([])
            case ArgumentsDelta(index, text):
                arguments[index].append(text)
    calls = zip(names, map("".join, arguments), strict=True)
    return ParsedText(
        "".join(content), "".join(reasoning), tuple(ToolCallText(*call) for call in calls)
    )


def call_id(request_id: int, index: int, *, is_short: bool = False) -> str:
    """The name of a call: the same from whichever gateway, so that a stream can be joined.

    Templates of Mistral's models take no name but one of nine letters and digits.
    """
    digest = hashlib.sha256(b"%d.%d" % (request_id, index)).hexdigest()
    return digest[:9] if is_short else f"call_{digest[:24]}"
