"""What the grammars take, by the library that enforces them."""

from __future__ import annotations

from typing import Any, Final

import msgspec
import pytest

from understudy.protocol.openai.tool_grammar import Thoughts, strict_grammar, tool_grammar
from understudy.protocol.openai.tools import FunctionTool, ToolUse

llguidance = pytest.importorskip("llguidance")

F: Final = FunctionTool(
    "f",
    parameters={
        "type": "object",
        "properties": {"city": {"type": "string"}, "n": {"$ref": "#/$defs/count"}},
        "required": ["city"],
        "additionalProperties": False,
        "$defs": {"count": {"type": "integer"}},
    },
)
G: Final = FunctionTool(
    "g",
    parameters={
        "properties": {"a": {"type": "integer"}, "b": {"type": "boolean"}},
        "additionalProperties": False,
    },
)

TAKEN: Final = {
    "hermes": [
        '<tool_call>\n{"name": "f", "arguments": {"city": "x", "n": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    ],
    "llama3_json": [
        '{"name": "f", "parameters": {"city": "x"}}',
        '{"name": "g", "parameters": {"a": 1}}',
    ],
    "mistral": [
        '[TOOL_CALLS][{"name": "f", "arguments": {"city": "x"}}]',
        '[TOOL_CALLS][{"name": "g", "arguments": {"b": true}}]',
    ],
    "pythonic": ['[f(city="a", n=3)]', "[g(b=false)]"],
    "qwen3_coder": [
        (
            "<tool_call>\n<function=f>\n<parameter=city>\nany </par> text\n</parameter>\n"
            "<parameter=n>\n3\n</parameter>\n</function>\n</tool_call>"
        ),
        "<tool_call>\n<function=g>\n</function>\n</tool_call>",
    ],
}
SEVERAL: Final = {
    "hermes": "\n".join(TAKEN["hermes"]),
    "llama3_json": "; ".join(TAKEN["llama3_json"]),
    "mistral": '[TOOL_CALLS][{"name": "g", "arguments": {}}, {"name": "g", "arguments": {}}]',
    "pythonic": "[g(), g(a=1, b=true)]",
    "qwen3_coder": "\n".join(TAKEN["qwen3_coder"]),
}
FORMATS: Final = sorted(TAKEN)


def use(**fields: Any) -> ToolUse:
    defaults = {"tools": (F, G), "is_forced": True, "forced_name": None, "is_parallel": True}
    return ToolUse(**{**defaults, **fields})


def takes(lark: str, text: str) -> bool:
    """Whether a text is complete by the grammar."""
    tokenizer = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(tokenizer, llguidance.LLMatcher.grammar_from_lark(lark))
    assert not matcher.is_error(), matcher.get_error()
    tokens = tokenizer.tokenize_bytes(text.encode())
    taken = matcher.try_consume_tokens(tokens) == len(tokens)
    return taken and bool(matcher.is_accepting())


@pytest.mark.parametrize("name", FORMATS)
def test_calls_are_taken_and_nothing_else(name: str) -> None:
    lark = tool_grammar(use(), name, mark_ids={})
    for text in (*TAKEN[name], SEVERAL[name]):
        assert takes(lark, text)
        assert not takes(lark, text[:-1])
    assert not takes(lark, "hello")
    assert not takes(lark, TAKEN[name][0].replace("f", "h", 1))


@pytest.mark.parametrize("name", FORMATS)
def test_a_named_tool_is_called_once(name: str) -> None:
    lark = tool_grammar(use(forced_name="f"), name, mark_ids={})
    assert takes(lark, TAKEN[name][0])
    assert not takes(lark, TAKEN[name][1])
    assert not takes(lark, SEVERAL[name])


@pytest.mark.parametrize("name", FORMATS)
def test_one_call_is_all_where_none_is_to_be_beside_it(name: str) -> None:
    lark = tool_grammar(use(is_parallel=False), name, mark_ids={})
    assert takes(lark, TAKEN[name][1])
    assert not takes(lark, SEVERAL[name])


@pytest.mark.parametrize("name", FORMATS)
def test_thoughts_may_come_first(name: str) -> None:
    closed = tool_grammar(
        use(), name, mark_ids={}, thoughts=Thoughts("<think>", "</think>", is_open=False)
    )
    call = TAKEN[name][0]
    assert takes(closed, f"<think>hm < </thin</think>\n\n{call}")
    assert takes(closed, call)
    assert not takes(closed, f"hm</think>{call}")
    opened = tool_grammar(
        use(), name, mark_ids={}, thoughts=Thoughts("<think>", "</think>", is_open=True)
    )
    assert takes(opened, f"hm</think>{call}")
    assert not takes(opened, call)


def test_marks_that_are_special_tokens_are_named_by_their_ids() -> None:
    lark = tool_grammar(use(), "mistral", mark_ids={"[TOOL_CALLS]": 5, "[ARGS]": 6})
    assert '<[5]> "f" <[6]> %json' in lark
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    assert not llguidance.LLMatcher.validate_grammar(grammar, llguidance.LLTokenizer("byte"))


@pytest.mark.parametrize("name", FORMATS)
def test_a_tool_that_says_nothing_of_its_arguments_takes_any_or_none(name: str) -> None:
    lark = tool_grammar(use(tools=(FunctionTool("g"),)), name, mark_ids={})
    text = TAKEN[name][1]
    for arguments in ('{"a": 1}', '{"b": true}', "b=false"):
        text = text.replace(arguments, "{}" if "{" in arguments else "")
    assert takes(lark, text)


STRICT: Final = (msgspec.structs.replace(F, strict=True), G)
MARKED: Final = ["hermes", "mistral", "qwen3_coder"]


@pytest.mark.parametrize("name", MARKED)
def test_free_text_may_hold_calls_that_fit_their_tools(name: str) -> None:
    lark = strict_grammar(use(tools=STRICT, is_forced=False), name, mark_ids={})
    call, other = TAKEN[name]
    for text in ("", "no call at all < [ {", call, f"so:\n{call}", f"{call}\n{other} and so on"):
        assert takes(lark, text), text
    assert not takes(lark, call.replace("city", "town"))
    assert not takes(lark, "so: " + call.replace("city", "town"))


@pytest.mark.parametrize("name", MARKED)
def test_of_single_calls_free_text_holds_one(name: str) -> None:
    asked = use(tools=STRICT, is_forced=False, is_parallel=False)
    lark = strict_grammar(asked, name, mark_ids={})
    call, _ = TAKEN[name]
    assert takes(lark, f"so: {call}")
    assert takes(lark, "so")


def test_free_text_may_come_behind_thoughts() -> None:
    thoughts = Thoughts("<think>", "</think>", is_open=True)
    asked = use(tools=STRICT, is_forced=False)
    lark = strict_grammar(asked, "hermes", mark_ids={}, thoughts=thoughts)
    assert takes(lark, f"hm <tool_call> hm</think>{TAKEN['hermes'][0]}")
    assert not takes(lark, "hm")


@pytest.mark.parametrize(
    ("name", "tools"),
    [("hermes", (F, G)), ("pythonic", STRICT), ("llama3_json", STRICT)],
)
def test_without_strict_tools_or_marks_there_is_no_grammar(
    name: str, tools: tuple[FunctionTool, ...]
) -> None:
    assert strict_grammar(use(tools=tools, is_forced=False), name, mark_ids={}) == ""


def test_a_mark_that_is_a_special_token_ends_free_text() -> None:
    lark = strict_grammar(
        use(tools=STRICT, is_forced=False), "mistral", mark_ids={"[TOOL_CALLS]": 5, "[ARGS]": 6}
    )
    assert "head: TEXT <[5]>" in lark
    assert 'call_0: "f" <[6]> %json' in lark
    grammar = llguidance.LLMatcher.grammar_from_lark(lark)
    assert not llguidance.LLMatcher.validate_grammar(grammar, llguidance.LLTokenizer("byte"))
