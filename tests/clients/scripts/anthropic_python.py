"""Anthropic's client for Python."""

from __future__ import annotations

import os
from typing import Any, Final

import anthropic
from anthropic import Anthropic
from anthropic.types import MessageParam, ToolParam, Usage

MODEL: Final = os.environ["MODEL"]
CLIENT: Final = Anthropic(
    base_url=os.environ["SERVER_URL"], api_key="none", max_retries=0, timeout=60
)
HELLO: Final[list[MessageParam]] = [{"role": "user", "content": "Add numbers."}]
WEATHER: Final[ToolParam] = {
    "name": "weather",
    "description": "how it is outside",
    "input_schema": {
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 12},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}


def check_plain() -> None:
    message = CLIENT.messages.create(model=MODEL, messages=HELLO, max_tokens=8, system="Be brief.")
    assert message.content[0].type == "text"
    assert message.content[0].text
    assert message.stop_reason in {"end_turn", "max_tokens"}
    assert 1 <= message.usage.output_tokens <= 8
    count = CLIENT.messages.count_tokens(model=MODEL, messages=HELLO, system="Be brief.")
    assert count.input_tokens == sum_of_input(message.usage)


def check_streaming_with_usage() -> None:
    # Its newest version knows no temperature any more; the API does.
    greedy = {"temperature": 0}
    whole = CLIENT.messages.create(model=MODEL, messages=HELLO, max_tokens=24, extra_body=greedy)
    with CLIENT.messages.stream(
        model=MODEL, messages=HELLO, max_tokens=24, extra_body=greedy
    ) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert whole.content[0].type == "text"
    assert text == whole.content[0].text
    assert final.usage.output_tokens == whole.usage.output_tokens
    assert sum_of_input(final.usage) == sum_of_input(whole.usage)
    assert final.stop_reason == whole.stop_reason


def sum_of_input(usage: Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def check_tools() -> None:
    message = CLIENT.messages.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=200,
        tools=[WEATHER],
        tool_choice={"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
    )
    call = message.content[-1]
    assert call.type == "tool_use"
    assert message.stop_reason == "tool_use"
    assert is_weather(call.input)


def check_streamed_tools() -> None:
    with CLIENT.messages.stream(
        model=MODEL,
        messages=HELLO,
        max_tokens=200,
        tools=[WEATHER],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert len(pieces) > 2, "the input did not come in pieces"
    call: Any = final.content[-1]
    assert call.type == "tool_use"
    assert is_weather(call.input)  # the client has put the pieces together and read them


def is_weather(given: Any) -> bool:
    assert isinstance(given["city"], str)
    assert 1 <= given["days"] <= 14
    return set(given) == {"city", "days"}


def check_errors() -> None:
    try:
        CLIENT.messages.create(model="other", messages=HELLO, max_tokens=8)
    except anthropic.NotFoundError as error:
        assert isinstance(error.body, dict)
        assert error.body["error"]["type"] == "not_found_error"
    else:
        raise AssertionError("a model that is not there was found")
    try:
        CLIENT.messages.create(
            model=MODEL, messages=HELLO, max_tokens=8, extra_body={"temperature": 5}
        )
    except anthropic.BadRequestError as error:
        assert "temperature" in str(error)
    else:
        raise AssertionError("a temperature of 5 was taken")
