"""The official OpenAI client, with tools and with thoughts; the engine's part is scripted."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam, ChatCompletionToolParam

from tests.http_harness import MODEL, saying_text, serving
from tests.tiny_models import CHATML, write_model

TEMPLATE: Final = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML.replace(
    "message['content'] +",
    "message['content'] + (message.tool_calls | tojson if message.tool_calls else '') +",
)
TOOL: Final[ChatCompletionToolParam] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
HELLO: Final[list[ChatCompletionMessageParam]] = [{"role": "user", "content": "the weather?"}]
FORMATS: Final = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>',
    "llama3_json": '{"name": "weather", "parameters": {"city": "Ulm"}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Ulm"}}]',
    "pythonic": '[weather(city="Ulm")]',
    "qwen3_coder": (
        "<tool_call>\n<function=weather>\n<parameter=city>\nUlm\n</parameter>\n</function>\n"
        "</tool_call>"
    ),
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, chat_template=TEMPLATE, max_position_embeddings=4096)


@asynccontextmanager
async def client_of(
    directory: Path,
    text: str,
    *,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
) -> AsyncIterator[AsyncOpenAI]:
    """A client of a server whose model always says this text."""
    script = saying_text(directory, text)
    async with serving(
        directory, script, tool_parser=tool_parser, reasoning_parser=reasoning_parser
    ) as harness:
        base_url = f"http://{harness.host}:{harness.port}/v1"
        async with AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
            yield client


@pytest.mark.parametrize("name", FORMATS)
async def test_a_tool_is_called_in_each_format(directory: Path, name: str) -> None:
    async with client_of(directory, FORMATS[name], tool_parser=name) as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
        [choice] = answer.choices
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls is not None
        [call] = choice.message.tool_calls
        assert call.type == "function"
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Ulm"}
        async with client.chat.completions.stream(
            model=MODEL, messages=HELLO, tools=[TOOL]
        ) as stream:
            async for _ in stream:
                pass
            whole = await stream.get_final_completion()
        [streamed] = whole.choices
        assert streamed.finish_reason == "tool_calls"
        assert streamed.message.tool_calls is not None
        assert streamed.message.tool_calls[0].function.name == "weather"
        assert streamed.message.tool_calls[0].function.arguments == call.function.arguments


async def test_the_result_of_a_call_goes_back_to_the_model(directory: Path) -> None:
    async with client_of(directory, FORMATS["hermes"], tool_parser="hermes") as client:
        answer = await client.chat.completions.create(model=MODEL, messages=HELLO, tools=[TOOL])
        message = answer.choices[0].message
        assert message.tool_calls is not None
        more: list[Any] = [
            *HELLO,
            message,
            {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "rain"},
        ]
        again = await client.chat.completions.create(model=MODEL, messages=more, tools=[TOOL])
    assert again.usage is not None
    assert answer.usage is not None
    assert again.usage.prompt_tokens > answer.usage.prompt_tokens


async def test_thoughts_come_by_both_names(directory: Path) -> None:
    text = "<think>\nhm\n</think>\n\nYes."
    async with client_of(directory, text, reasoning_parser="qwen3") as client:
        answer = await client.chat.completions.create(
            model=MODEL, messages=HELLO, reasoning_effort="low"
        )
        chunks = [
            chunk
            async for chunk in await client.chat.completions.create(
                model=MODEL, messages=HELLO, stream=True
            )
        ]
    message: Any = answer.choices[0].message
    assert (message.reasoning, message.reasoning_content, message.content) == ("hm", "hm", "Yes.")
    deltas: list[Any] = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "hm"
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
