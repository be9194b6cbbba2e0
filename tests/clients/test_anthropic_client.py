"""The official Anthropic client; the engine's part is scripted."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, Final

import anthropic
import pytest
from anthropic import AsyncAnthropic
from anthropic.types import MessageParam, ToolParam

from tests.http_harness import MODEL, Harness, saying_text, serving
from tests.tiny_models import CHATML, write_model
from understudy.protocol.errors import InternalError
from understudy.protocol.request import FinishReason

TOOL: Final[ToolParam] = {
    "name": "weather",
    "description": "how it is outside",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}
HELLO: Final[list[MessageParam]] = [{"role": "user", "content": "hello"}]
TEXT: Final = (
    "<think>\nhm\n</think>\n\nOne moment. 🦊\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
)
TEMPLATE: Final = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, chat_template=TEMPLATE, max_position_embeddings=4096)


def client_of(harness: Harness) -> AsyncAnthropic:
    base_url = f"http://{harness.host}:{harness.port}"
    return AsyncAnthropic(base_url=base_url, api_key="none", max_retries=0)


async def test_a_message_holds_thoughts_text_and_calls(directory: Path) -> None:
    script = saying_text(directory, TEXT)
    async with (
        serving(directory, script, tool_parser="hermes", reasoning_parser="qwen3") as harness,
        client_of(harness) as client,
    ):
        message = await client.messages.create(
            model=MODEL, messages=HELLO, max_tokens=500, tools=[TOOL], system="be kind"
        )
        async with client.messages.stream(
            model=MODEL, messages=HELLO, max_tokens=500, tools=[TOOL], system="be kind"
        ) as stream:
            kinds = [event.type async for event in stream]
            streamed = await stream.get_final_message()
        prompt = harness.served.tokenizer.decode(harness.gateway.submitted[0].prompt)
    assert prompt.startswith('[{"type": "function"')
    assert "system\nbe kind" in prompt
    for answer in (message, streamed):
        assert answer.stop_reason == "tool_use"
        thoughts, text, call = answer.content
        assert thoughts.type == "thinking"
        assert thoughts.thinking == "hm"
        assert text.type == "text"
        assert text.text == "One moment. 🦊"
        assert call.type == "tool_use"
        assert (call.name, call.input) == ("weather", {"city": "Ulm"})
    assert message.usage.output_tokens == streamed.usage.output_tokens > 0
    assert message.usage.input_tokens == streamed.usage.input_tokens > 0
    assert kinds[0] == "message_start"
    assert kinds[-1] == "message_stop"


async def test_the_result_of_a_call_goes_back_to_the_model(directory: Path) -> None:
    script = saying_text(directory, TEXT)
    async with (
        serving(directory, script, tool_parser="hermes", reasoning_parser="qwen3") as harness,
        client_of(harness) as client,
    ):
        message = await client.messages.create(
            model=MODEL, messages=HELLO, max_tokens=500, tools=[TOOL]
        )
        call = message.content[2]
        assert call.type == "tool_use"
        more: list[Any] = [
            *HELLO,
            {"role": "assistant", "content": message.content},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": call.id, "content": "rain"},
                    {"type": "text", "text": "and now?"},
                ],
            },
        ]
        await client.messages.create(model=MODEL, messages=more, max_tokens=500, tools=[TOOL])
        prompt = harness.served.tokenizer.decode(harness.gateway.submitted[1].prompt)
    assert prompt.index("One moment.") < prompt.index("tool\nrain") < prompt.index("and now?")


async def test_stop_sequences_and_limits_are_told_as_reasons(directory: Path) -> None:
    async with (
        serving(directory, saying_text(directory, "one two three")) as harness,
        client_of(harness) as client,
    ):
        plain = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=500)
        stopped = await client.messages.create(
            model=MODEL, messages=HELLO, max_tokens=500, stop_sequences=["zzz", " three"]
        )
        short = await client.messages.create(model=MODEL, messages=HELLO, max_tokens=1)
        async with client.messages.stream(
            model=MODEL, messages=HELLO, max_tokens=500, stop_sequences=[" three"]
        ) as stream:
            streamed = await stream.get_final_message()
    assert (plain.stop_reason, plain.stop_sequence) == ("end_turn", None)
    for message in (stopped, streamed):
        assert (message.stop_reason, message.stop_sequence) == ("stop_sequence", " three")
        assert message.content[0].type == "text"
        assert message.content[0].text == "one two"
    assert short.stop_reason == "max_tokens"


async def test_tokens_are_counted_without_an_engine(directory: Path) -> None:
    async with (
        serving(directory, tool_parser="hermes") as harness,
        client_of(harness) as client,
    ):
        count = await client.messages.count_tokens(model=MODEL, messages=HELLO, tools=[TOOL])
        plain = await client.messages.count_tokens(model=MODEL, messages=HELLO)
        assert count.input_tokens > plain.input_tokens > 0
        assert harness.gateway.submitted == []


async def test_thinking_is_told_to_the_template(tmp_path: Path) -> None:
    template = CHATML + "{{ 'thinks' if enable_thinking else 'does not' }}"
    directory = write_model(tmp_path, chat_template=template, max_position_embeddings=4096)
    async with (
        serving(directory, saying_text(directory, "x")) as harness,
        client_of(harness) as client,
    ):
        raw = await client.messages.with_raw_response.create(
            model=MODEL,
            messages=HELLO,
            max_tokens=2000,
            thinking={"type": "enabled", "budget_tokens": 1024},
        )
        await client.messages.create(
            model=MODEL, messages=HELLO, max_tokens=5, thinking={"type": "disabled"}
        )
        prompts = [
            harness.served.tokenizer.decode(request.prompt) for request in harness.gateway.submitted
        ]
    assert prompts[0].endswith("thinks")
    assert prompts[1].endswith("does not")
    assert raw.headers["X-Ignored-Fields"] == "thinking.budget_tokens"


async def test_errors_have_the_form_that_the_client_knows(directory: Path) -> None:
    async with serving(directory) as harness, client_of(harness) as client:
        with pytest.raises(anthropic.NotFoundError) as missing:
            await client.messages.create(model="other", messages=HELLO, max_tokens=5)
        assert isinstance(missing.value.body, dict)
        assert missing.value.body["type"] == "error"
        assert missing.value.body["error"]["type"] == "not_found_error"
        with pytest.raises(anthropic.BadRequestError) as bad:
            await client.messages.create(
                model=MODEL, messages=HELLO, max_tokens=5, stop_sequences=[""]
            )
        assert isinstance(bad.value.body, dict)
        assert bad.value.body["error"]["param"] == "stop_sequences"


async def test_an_answer_whose_deadline_passes_is_cut_off(directory: Path) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 9}
    async with serving(directory) as harness:
        call = asyncio.ensure_future(harness.answer("/v1/messages", body))
        request = await harness.submitted()
        harness.gateway.deliver(request, *harness.tokens("one"), finish=FinishReason.DEADLINE)
        answer = await call
    assert answer["stop_reason"] == "max_tokens"
    assert answer["content"] == [{"type": "text", "text": "one"}]


async def test_a_stream_that_cannot_go_on_ends_with_an_error(directory: Path) -> None:
    body = {"model": MODEL, "messages": HELLO, "max_tokens": 9, "stream": True}
    async with serving(directory) as harness:
        call = asyncio.ensure_future(harness.post("/v1/messages", body).__aenter__())
        request = await harness.submitted()
        harness.gateway.deliver(request, *harness.tokens("one"))
        response = await call
        harness.gateway.fail(request, InternalError("the engine burns"))
        text = await response.text()
        response.close()
    assert text.rstrip().split("\n")[-2] == "event: error"
    assert '"api_error"' in text
    assert "[DONE]" not in text


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "system", "content": "x"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_result"}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "web_search_20250305", "name": "w"}]}, "tools[0].type"),
        ({"tools": [{**TOOL, "name": "a b"}]}, "tools[0].name"),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"temperature": 3}, "temperature"),
    ],
)
async def test_what_is_wrong_with_a_body_is_named(
    directory: Path, body: dict[str, Any], param: str
) -> None:
    async with serving(directory, tool_parser="hermes") as harness:
        whole = {"model": MODEL, "messages": HELLO, "max_tokens": 5, **body}
        answer = await harness.answer("/v1/messages", whole, status=400)
    assert answer["error"]["param"] == param
    assert answer["error"]["type"] == "invalid_request_error"
