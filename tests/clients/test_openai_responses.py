"""The official OpenAI client and the Responses API; the engine's part is scripted."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import FunctionToolParam

from tests.http_harness import MODEL, Harness, saying_text, serving
from tests.tiny_models import write_model
from understudy.protocol.request import FinishReason

TOOL: Final[FunctionToolParam] = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    "strict": False,
}
TEXT: Final = (
    "<think>\nhm\n</think>\n\nOne moment.\n"
    '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'
)


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path, max_position_embeddings=4096)


def client_of(harness: Harness) -> AsyncOpenAI:
    base_url = f"http://{harness.host}:{harness.port}/v1"
    return AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0)


async def test_a_response_is_made_streamed_fetched_and_deleted(directory: Path) -> None:
    script = saying_text(directory, TEXT)
    async with (
        serving(directory, script, tool_parser="hermes", reasoning_parser="qwen3") as harness,
        client_of(harness) as client,
    ):
        response = await client.responses.create(model=MODEL, input="hello", tools=[TOOL])
        assert response.output_text == "One moment."
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call"]
        async with client.responses.stream(model=MODEL, input="hello", tools=[TOOL]) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[0] == "response.created"
        assert final.output_text == "One moment."
        assert final.usage is not None
        fetched = await client.responses.retrieve(final.id)
        assert fetched.output_text == final.output_text
        further = await client.responses.create(
            model=MODEL, input="and?", previous_response_id=final.id
        )
        assert further.status == "completed"
        await client.responses.delete(final.id)
        with pytest.raises(openai.NotFoundError):
            await client.responses.retrieve(final.id)


async def test_a_response_in_background_is_followed_and_left_and_joined(directory: Path) -> None:
    async with serving(directory) as harness, client_of(harness) as client:
        queued = await client.responses.create(model=MODEL, input="hello", background=True)
        assert queued.status == "queued"
        request = harness.gateway.submitted[0]
        harness.gateway.deliver(request, *harness.tokens("one two"))
        harness.gateway.deliver(request, *harness.tokens(" three"), 0, finish=FinishReason.STOP)
        events = [event async for event in await client.responses.retrieve(queued.id, stream=True)]
        cut = events[5].sequence_number
        rest = [
            event
            async for event in await client.responses.retrieve(
                queued.id, stream=True, starting_after=cut
            )
        ]
        assert [event.sequence_number for event in rest] == [
            event.sequence_number for event in events[6:]
        ]
        assert (await client.responses.retrieve(queued.id)).output_text == "one two three"
        again = await client.responses.create(model=MODEL, input="hello", background=True)
        cancelled = await client.responses.cancel(again.id)
        assert cancelled.status == "cancelled"
