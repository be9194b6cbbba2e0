"""All that is done to find the meaning of one answer's text: thoughts first, then calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Protocol

from understudy.protocol.openai.deltas import ArgumentsDelta, CallDelta, ContentDelta, Delta
from understudy.runtime.parsers import mistral, pythonic, qwen3_coder, reasoning
from understudy.runtime.parsers.hermes import HermesParser
from understudy.runtime.parsers.llama3_json import TAG, Llama3JsonParser
from understudy.runtime.parsers.prose import Parser
from understudy.runtime.parsers.reasoning import ReasoningParser

_MARKS: Final[Mapping[str, tuple[str, ...]]] = {
    "hermes": ("<tool_call>", "</tool_call>"),
    "llama3_json": (TAG,),
    "mistral": mistral.MARKS,
    "pythonic": (*pythonic.TAGS, pythonic.END_TAG),
    "qwen3_coder": (qwen3_coder.CALL, qwen3_coder.END_OF_CALL),
}


class Parsing(Protocol):
    """How an answer's text is to be read; a ``Presentation`` says it."""

    @property
    def tool_parser(self) -> str:
        """The format of calls; empty if there are none."""
        ...

    @property
    def tools(self) -> Mapping[str, Mapping[str, str]]:
        """The types of each tool's parameters."""
        ...

    @property
    def calls_max(self) -> int:
        """Calls after which the answer ends; 0: as many as there are."""
        ...

    @property
    def reasoning_parser(self) -> str:
        """The format of thoughts; empty if they are not told apart."""
        ...

    @property
    def begins_in_reasoning(self) -> bool:
        """Whether the prompt opened the thoughts."""
        ...


class OutputParser:
    """Reads one answer.

    Attributes:
        num_calls: Calls that have begun.
        is_stopped: Whether a call came that is one too many: the answer ended before it.
    """

    def __init__(self, parsing: Parsing) -> None:
        self._reasoning: ReasoningParser | None = None
        if parsing.reasoning_parser:
            self._reasoning = ReasoningParser(
                parsing.reasoning_parser, is_inside=parsing.begins_in_reasoning
            )
        self._tools: Parser | None = None
        if parsing.tool_parser:
            self._tools = _tool_parser(parsing.tool_parser, parsing.tools)
        self._calls_max = parsing.calls_max
        self.num_calls = 0
        self.is_stopped = False

    @property
    def is_thinking(self) -> bool:
        """Whether the text is inside the thoughts."""
        return self._reasoning is not None and self._reasoning.is_thinking

    def push(self, text: str) -> list[Delta]:
        """What more of the text means."""
        if self._reasoning is None:
            return self._find_calls([ContentDelta(text)] if text else [])
        return self._find_calls(self._reasoning.push(text))

    def finish(self) -> list[Delta]:
        """What was held back means, now that nothing follows."""
        deltas = [] if self._reasoning is None else self._find_calls(self._reasoning.finish())
        if self._tools is not None and not self.is_stopped:
            deltas += self._bound(self._tools.finish())
        return deltas

    def _find_calls(self, deltas: list[Delta]) -> list[Delta]:
        if self._tools is None or not deltas:
            return deltas
        if len(deltas) == 1 and type(deltas[0]) is ContentDelta:
            return self._bound(self._tools.push(deltas[0].text))
        found: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, ContentDelta):
                found += self._tools.push(delta.text)
            else:
                found.append(delta)
        return self._bound(found)

    def _bound(self, deltas: list[Delta]) -> list[Delta]:
        """Up to the call that is one too many."""
        if len(deltas) == 1 and type(deltas[0]) is ContentDelta:
            return [] if self.is_stopped else deltas
        kept: list[Delta] = []
        for delta in deltas:
            if isinstance(delta, CallDelta):
                if self._calls_max and self.num_calls == self._calls_max:
                    self.is_stopped = True
                else:
                    self.num_calls += 1
            if self.is_stopped:
                break
            if isinstance(delta, ArgumentsDelta) and not delta.text:
                continue
            kept.append(delta)
        return kept


def needs_parsing(parsing: Parsing) -> bool:
    """Whether the text is not just content."""
    return bool(parsing.tool_parser or parsing.reasoning_parser)


def marks_of(*, tool_parser: str, reasoning_parser: str) -> frozenset[str]:
    """The marks that a text must show, even where they are special tokens."""
    marks = {*_MARKS.get(tool_parser, ())}
    if reasoning_parser:
        form = reasoning.FORMATS[reasoning_parser]
        marks |= {form.opening, form.closing}
    return frozenset(marks)


def _tool_parser(name: str, tools: Mapping[str, Mapping[str, str]]) -> Parser:
    match name:
        case "hermes":
            return HermesParser()
        case "llama3_json":
            return Llama3JsonParser(tools)
        case "mistral":
            return mistral.MistralParser()
        case "pythonic":
            return pythonic.PythonicParser(tools)
        case _:
            assert name == "qwen3_coder"
            return qwen3_coder.Qwen3CoderParser(tools)
