"""The official OpenAI client where things go wrong, or slowly: against the scripted gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionMessageParam

from tests.http_harness import MODEL, Harness, beside, serving
from tests.tiny_models import write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.errors import InternalError, Overloaded
from understudy.protocol.request import FinishReason

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hello"}]


@asynccontextmanager
async def connected(
    directory: Path, *, limits: HttpLimits | None = None, max_retries: int = 0
) -> AsyncIterator[tuple[Harness, AsyncOpenAI]]:
    async with (
        serving(write_model(directory), limits=limits) as harness,
        AsyncOpenAI(
            base_url=f"http://{harness.host}:{harness.port}/v1",
            api_key="none",
            max_retries=max_retries,
            timeout=60,
        ) as client,
    ):
        yield harness, client


async def read_text(client: AsyncOpenAI) -> str:
    text = ""
    async for chunk in await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        stream=True,
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
    return text


async def test_comments_before_between_and_behind_chunks_do_no_harm(tmp_path: Path) -> None:
    async with connected(tmp_path, limits=HttpLimits(keep_alive_s=0.02)) as (harness, client):

        async def engine() -> None:
            request = await harness.submitted()
            for place, letter in enumerate(harness.tokens("abc")):
                await asyncio.sleep(0.07)
                harness.gateway.deliver(request, letter, engine=f"engine-{place}")
            await asyncio.sleep(0.07)
            harness.gateway.deliver(request, finish=FinishReason.LENGTH, engine="engine-9")

        assert await beside(engine(), read_text(client)) == "abc"


async def test_a_stream_that_fails_midway_is_an_exception(tmp_path: Path) -> None:
    async with connected(tmp_path) as (harness, client):

        async def engine() -> None:
            request = await harness.submitted()
            harness.gateway.deliver(request, *harness.tokens("a"))
            await asyncio.sleep(0)
            harness.gateway.fail(request, InternalError("broken"))

        with pytest.raises(openai.APIError, match="broken"):
            await beside(engine(), read_text(client))


async def test_a_refusal_is_tried_again_after_the_time_given(tmp_path: Path) -> None:
    async with connected(tmp_path, max_retries=2) as (harness, client):

        async def engine() -> None:
            for count in (1, 2):
                request = await harness.submitted(count)
                harness.gateway.fail(request, Overloaded("full", retry_after_s=0.01))
            request = await harness.submitted(3)
            harness.gateway.deliver(request, *harness.tokens("abc"), finish=FinishReason.LENGTH)

        assert await beside(engine(), read_text(client)) == "abc"


async def test_a_refusal_is_an_exception_without_retries(tmp_path: Path) -> None:
    async with connected(tmp_path) as (harness, client):

        async def engine() -> None:
            harness.gateway.fail(await harness.submitted(), Overloaded("full"))

        with pytest.raises(openai.InternalServerError) as caught:
            await beside(engine(), read_text(client))
        assert caught.value.status_code == 503
        assert caught.value.code == "overloaded"
