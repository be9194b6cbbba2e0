from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.protocol.openai.deltas import Delta, ParsedText, ToolCallText, put_together
from understudy.runtime.parsers.names import REASONING_PARSERS, TOOL_PARSERS
from understudy.runtime.parsers.output_parser import OutputParser

TOOLS: Final = {"f": {"city": "string", "n": "integer", "o": "object", "x": "any"}, "g": {}}

CALLS: Final[dict[str, Sequence[tuple[str, str, list[tuple[str, str]]]]]] = {
    "hermes": [
        (
            (
                'hi <tool_call>\n{"name": "f", "arguments": {"city": "a\\"{}", "n": 3}}\n'
                "</tool_call>\n"
                '<tool_call>{"arguments": {}, "name": "g"}</tool_call>'
            ),
            "hi",
            [("f", '{"city": "a\\"{}", "n": 3}'), ("g", "{}")],
        ),
        ('<tool_call>{"name": "g"}<tool_call>{"name": "g"}', "", [("g", "{}"), ("g", "{}")]),
        ('<tool_call>{"name": "f", "arguments": "{\\"n\\":1}"}', "", [("f", '{"n":1}')]),
        ('<tool_call>{"name": "f", "arguments": null}</tool_call> so', " so", [("f", "{}")]),
        ('<tool_call>{"nam": 1}</tool_call> x', '<tool_call>{"nam": 1}</tool_call> x', []),
        ('<tool_call>{"name": "f", "argum', '<tool_call>{"name": "f", "argum', []),
        ('<tool_call>{"name": "f", "arguments": {"n": 1', "", [("f", '{"n": 1')]),
        ("a < b <tool_", "a < b <tool_", []),
    ],
    "llama3_json": [
        (
            '{"name": "f", "parameters": {"n": 1}}; {"name": "g", "parameters": {}}',
            "",
            [("f", '{"n": 1}'), ("g", "{}")],
        ),
        ('<|python_tag|>{"type": "function", "name": "g", "parameters": {}}', "", [("g", "{}")]),
        ('{"name": "unknown", "parameters": {}}', '{"name": "unknown", "parameters": {}}', []),
        ('  {"a": 1}\n', '  {"a": 1}\n', []),
        ('I say {"name": "f"}', 'I say {"name": "f"}', []),
    ],
    "mistral": [
        (
            'x [TOOL_CALLS][{"name": "f", "arguments": {"n": 1}}, {"name": "g"}]',
            "x",
            [("f", '{"n": 1}'), ("g", "{}")],
        ),
        (
            '[TOOL_CALLS]f[ARGS]{"o": {"a": "}"}}[TOOL_CALLS]g{}',
            "",
            [("f", '{"o": {"a": "}"}}'), ("g", "{}")],
        ),
        ('[TOOL_CALLS]f[CALL_ID]abc123456[ARGS]{"n": 2}', "", [("f", '{"n": 2}')]),
        ("[TOOL_CALLS] what?", "[TOOL_CALLS] what?", []),
    ],
    "qwen3_coder": [
        (
            (
                'ok\n<tool_call>\n<function=f>\n<parameter=city>\nPar"is\n2\n</parameter>\n'
                '<parameter=n>\n3\n</parameter>\n<parameter=o>{"a": [1]}</parameter>\n'
                "<parameter=x>True</parameter>\n</function>\n</tool_call>\n"
                "<function=g>\n</function>"
            ),
            "ok",
            [("f", '{"city": "Par\\"is\\n2", "n": 3, "o": {"a":[1]}, "x": true}'), ("g", "{}")],
        ),
        ("<function=f><parameter=n>no</parameter></function>", "", [("f", '{"n": "no"}')]),
        ("<function=f><parameter=n>null</parameter></function>", "", [("f", '{"n": null}')]),
        ("<functio", "<functio", []),
    ],
    "pythonic": [
        (
            '[f(city="P)a]r", n=-1, o={"a": [1, None, true]}), g()]',
            "",
            [("f", '{"city":"P)a]r","n":-1,"o":{"a":[1,null,true]}}'), ("g", "{}")],
        ),
        ("<|python_start|>[f(n=1)]<|python_end|>", "", [("f", '{"n":1}')]),
        ("[1, 2]", "[1, 2]", []),
        ('[f(city=open("x"))]', '[f(city=open("x"))]', []),
        ("[unknown()]", "[unknown()]", []),
        ("[f(n=1e999)]", "[f(n=1e999)]", []),
        ("[f(city='\\d')]", "", [("f", '{"city":"\\\\d"}')]),
    ],
}
CASES: Final = [(name, *case) for name, cases in CALLS.items() for case in cases]

FRAGMENTS: Final = [
    *'{}[]()",: \n<>=/\\;1xfg',
    "<tool_call>",
    "</tool_call>",
    '"name"',
    '"f"',
    '"arguments"',
    "[TOOL_CALLS]",
    "[ARGS]",
    "f(",
    "city=",
    "<function=",
    "<parameter=",
    "</parameter>",
    "</function>",
    "<think>",
    "</think>",
    "<|python_tag|>",
]


@dataclass
class Asked:
    """See ``Parsing``."""

    tool_parser: str = ""
    reasoning_parser: str = ""
    begins_in_reasoning: bool = False
    calls_max: int = 0
    tools: dict[str, dict[str, str]] = field(default_factory=lambda: TOOLS)


def parse(asked: Asked, pieces: Sequence[str], *, ends: bool = True) -> ParsedText:
    """What a text comes to that arrives in these pieces."""
    parser = OutputParser(asked)
    deltas: list[Delta] = []
    for piece in pieces:
        if not parser.is_stopped:
            deltas += parser.push(piece)
    if ends:
        deltas += parser.finish()
    assert parser.num_calls == len(put_together(deltas).calls)
    return put_together(deltas)


def same_in_any_pieces(asked: Asked, text: str) -> None:
    """What is known behind each character does not depend on how the characters came."""
    for end in range(len(text) + 1):
        for ends in (False, True):
            whole = parse(asked, [text[:end]], ends=ends)
            assert whole == parse(asked, text[:end], ends=ends), text[:end]


@pytest.mark.parametrize(("name", "text", "content", "calls"), CASES)
def test_calls_and_content_are_told_apart(
    name: str, text: str, content: str, calls: list[tuple[str, str]]
) -> None:
    parsed = parse(Asked(name), [text])
    assert parsed == ParsedText(content, "", tuple(ToolCallText(*call) for call in calls))
    same_in_any_pieces(Asked(name), text)


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_whole_calls_have_arguments_that_are_json_objects(name: str) -> None:
    _, text, _, calls = next(case for case in CASES if case[0] == name)
    parsed = parse(Asked(name), text)
    assert len(parsed.calls) == len(calls)
    for call in parsed.calls:
        assert isinstance(json.loads(call.arguments), dict)


@pytest.mark.parametrize("name", TOOL_PARSERS)
def test_an_answer_of_one_call_ends_before_the_second(name: str) -> None:
    _, text, content, calls = next(case for case in CASES if case[0] == name)
    asked = Asked(name, calls_max=1)
    parsed = parse(asked, text)
    assert parsed == ParsedText(content, "", (ToolCallText(*calls[0]),))
    same_in_any_pieces(asked, text)


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from(TOOL_PARSERS),
    st.sampled_from(["", *REASONING_PARSERS]),
    st.booleans(),
    st.sampled_from([0, 1]),
    st.lists(st.sampled_from(FRAGMENTS), max_size=20).map("".join),
)
def test_the_meaning_does_not_depend_on_how_the_text_comes(
    tools: str, reasoning: str, begins_inside: bool, calls_max: int, text: str
) -> None:
    same_in_any_pieces(Asked(tools, reasoning, begins_inside, calls_max), text)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(CASES), st.data())
def test_a_damaged_call_is_read_alike_in_any_pieces(
    case: tuple[str, str, str, list[tuple[str, str]]], data: st.DataObject
) -> None:
    name, text = case[:2]
    place = data.draw(st.integers(0, len(text)))
    patch = data.draw(st.sampled_from(FRAGMENTS))
    dropped = data.draw(st.integers(0, 3))
    same_in_any_pieces(Asked(name), text[:place] + patch + text[place + dropped :])


def test_a_call_in_the_thoughts_is_none() -> None:
    text = '<think>\n<tool_call>{"name": "f"}</tool_call>\n</think>\n\n<tool_call>{"name": "g"}'
    parsed = parse(Asked("hermes", "qwen3"), text)
    thoughts = '<tool_call>{"name": "f"}</tool_call>'
    assert parsed == ParsedText("", thoughts, (ToolCallText("g", "{}"),))


def test_without_parsers_all_is_content() -> None:
    assert parse(Asked(), ["<think> ", "x"]) == ParsedText("<think> x", "", ())


def test_very_long_arguments_take_no_more_than_linear_time() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"city": "' + "x" * 200_000 + '"}}</tool_call>'
    [call] = parse(Asked("hermes"), text).calls
    assert len(call.arguments) > 200_000
