from __future__ import annotations

import json
from typing import Any, Final

import pytest

from understudy.protocol.errors import InvalidRequest
from understudy.protocol.openai.chat import ChatCompletion, parse_chat
from understudy.protocol.openai.sampling import ModelTraits
from understudy.protocol.openai.tools import SCHEMA_DEPTH_MAX, TOOLS_MAX

MODEL: Final = ModelTraits("m", 1000, 512, tool_parser="hermes")
SCHEMA: Final = {"type": "object", "properties": {"city": {"type": "string"}}}
F: Final = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
G: Final = {"type": "function", "function": {"name": "g", "description": "does g"}}
NAMED: Final = {"type": "function", "function": {"name": "f"}}


def parse(model: ModelTraits = MODEL, **body: Any) -> ChatCompletion:
    messages = [{"role": "user", "content": "x"}]
    return parse_chat(json.dumps({"messages": messages, **body}).encode(), model)


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"a": schema}
    return schema


def test_tools_are_shown_to_the_template_as_they_came() -> None:
    use = parse(tools=[F, G]).tool_use
    assert use is not None
    assert use.shown() == [F, G]
    assert (use.is_forced, use.forced_name, use.calls_max) == (False, None, 0)


@pytest.mark.parametrize(
    ("body", "is_forced", "calls_max"),
    [
        ({"tool_choice": "auto"}, False, 0),
        ({"tool_choice": "required"}, True, 0),
        ({"tool_choice": NAMED}, True, 1),
        ({"parallel_tool_calls": False}, False, 1),
        ({"parallel_tool_calls": True}, False, 0),
    ],
)
def test_the_choice_says_whether_and_how_often_to_call(
    body: dict[str, Any], is_forced: bool, calls_max: int
) -> None:
    use = parse(tools=[F, G], **body).tool_use
    assert use is not None
    assert (use.is_forced, use.calls_max) == (is_forced, calls_max)


def test_a_named_tool_is_the_only_one_that_may_be_called() -> None:
    use = parse(tools=[F, G], tool_choice=NAMED).tool_use
    assert use is not None
    assert [tool.name for tool in use.callable_tools] == ["f"]
    assert len(use.shown()) == 2


@pytest.mark.parametrize(
    "body", [{}, {"tools": []}, {"tools": [F], "tool_choice": "none"}, {"tool_choice": "auto"}]
)
def test_without_tools_or_choice_nothing_is_called(body: dict[str, Any]) -> None:
    assert parse(**body).tool_use is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [F], "tool_choice": "maybe"}, "tool_choice"),
        (
            {"tools": [G], "tool_choice": NAMED},
            "tool_choice",
        ),
        ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0]"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [F, F]}, "tools[1].function.name"),
        ({"tools": [{"function": {"name": f"f{i}"}} for i in range(TOOLS_MAX + 1)]}, "tools"),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"type": "array"}}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": nested(SCHEMA_DEPTH_MAX + 1)}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "f", "parameters": {"a": "x" * (64 << 10)}}}]},
            "tools[0].function.parameters",
        ),
        (
            {"tools": [{"function": {"name": "f", "description": "x" * (65 << 10)}}]},
            "tools[0].function.description",
        ),
        (
            {
                "tools": [
                    {"function": {"name": f"f{i}", "description": "x" * (60 << 10)}}
                    for i in range(5)
                ]
            },
            "tools",
        ),
        ({"tools": [F], "parallel_tool_calls": "yes"}, "parallel_tool_calls"),
    ],
)
def test_what_is_wrong_with_tools_is_named(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(**body)
    assert caught.value.param == param


def test_tools_need_a_server_that_knows_the_models_format() -> None:
    with pytest.raises(InvalidRequest, match="--tool-call-parser"):
        parse(ModelTraits("m", 1000, 512), tools=[F])


@pytest.mark.parametrize(
    ("body", "kwargs"),
    [
        ({}, {}),
        ({"reasoning_effort": "high"}, {"reasoning_effort": "high"}),
        (
            {"reasoning_effort": "none"},
            {"reasoning_effort": "none", "enable_thinking": False, "thinking": False},
        ),
        (
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "x"}},
            {"reasoning_effort": "x"},
        ),
    ],
)
def test_the_effort_is_told_to_the_template(body: dict[str, Any], kwargs: dict[str, Any]) -> None:
    assert parse(**body).template_kwargs == kwargs


def test_an_unknown_effort_is_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(reasoning_effort="heroic")
    assert caught.value.param == "reasoning_effort"
