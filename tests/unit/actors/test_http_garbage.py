"""No call leaves circles behind: what it took is given back when it ends, with no collector.

A gateway seldom looks at everything it has, since no token moves while it does. What only such a
look can free would pile up meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import struct
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest
from aiohttp import web

from tests.http_harness import CHAT, COMPLETIONS, HELLO, MODEL, Harness, SlowClient, serving
from tests.tiny_models import CHATML, write_model
from understudy.actors.scripted_gateway import ScriptedGateway
from understudy.protocol.errors import InternalError, Overloaded
from understudy.protocol.request import FinishReason, Request, TokenLogprobs

Call = Callable[[Harness], Awaitable[Any]]

EMBEDDINGS: Final = "/v1/embeddings"
PLAIN: Final[dict[str, Any]] = {"model": MODEL, "prompt": "hello", "max_tokens": 3}
TALK: Final[dict[str, Any]] = {"model": MODEL, "messages": HELLO, "max_tokens": 3}
TOOL: Final = {"type": "function", "function": {"name": "weather"}}
SCHEMA: Final = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"type": "object"}}}


async def left_early(harness: Harness) -> None:
    """A stream whose client goes after the first event."""
    count = len(harness.gateway.cancelled)
    body = {**PLAIN, "prompt": "wait for me", "stream": True}
    async with harness.post(COMPLETIONS, body) as response:
        await response.content.readany()
        response.close()
    await harness.cancelled(count + 1)


async def hung_up(harness: Harness) -> None:
    """A call in one piece whose client goes before the answer."""
    count = len(harness.gateway.cancelled)
    await harness.leave(
        COMPLETIONS, {**PLAIN, "prompt": "wait"}, after=len(harness.gateway.submitted) + 1
    )
    await harness.cancelled(count + 1)


async def refused(harness: Harness) -> None:
    """A call that the supervisor does not take."""
    await harness.answer(COMPLETIONS, {**PLAIN, "prompt": "refuse this"}, status=503)


async def failed_midway(harness: Harness) -> None:
    """A stream that ends with an error."""
    async with harness.post(
        COMPLETIONS, {**PLAIN, "prompt": "wait for me", "stream": True}
    ) as response:
        await response.content.readany()
        harness.gateway.fail(harness.gateway.submitted[-1], InternalError("broken"))
        assert b"broken" in await response.content.read()


async def not_http(harness: Harness) -> None:
    """Bytes that are no call."""
    reader, writer = await asyncio.open_connection(harness.host, harness.port)
    writer.write(b"\x00\x01 nonsense\r\n\r\n")
    assert b"400" in await reader.readline()
    writer.close()
    await writer.wait_closed()


async def rejoined(harness: Harness) -> None:
    """A stream that was complete, asked for again."""
    events = await harness.stream(CHAT, TALK)
    stream_id = next(event.data["id"] for event in events if event.comment is None)
    async with harness.session.get(f"/v1/streams/{stream_id}") as response:
        assert response.status == 200
        assert (await response.read()).endswith(b"[DONE]\n\n")


async def repeated(harness: Harness) -> None:
    """A call that came before, with its key, in one piece and streamed."""
    for is_streamed in (False, True):
        body = {**PLAIN, "stream": is_streamed}
        key = f"key-{len(harness.gateway.submitted)}"
        for _ in range(2):
            async with harness.post(COMPLETIONS, body, Idempotency_Key=key) as answer:
                assert answer.status == 200
                await answer.read()


async def failed_in_background(harness: Harness) -> None:
    """A response that could not go on, asked for by its name."""
    body = {"model": MODEL, "input": "wait for me", "background": True}
    name = (await harness.answer("/v1/responses", body))["id"]
    harness.gateway.deliver(harness.gateway.submitted[-1], finish=FinishReason.REFUSED)
    async with harness.session.get(f"/v1/responses/{name}") as response:
        assert (await response.json())["status"] == "failed"


async def reset_unread(harness: Harness) -> None:
    """A stream whose client does not read, and whose connection breaks."""
    client = SlowClient(harness)
    body = {**PLAIN, "prompt": "flood", "stream": True, "max_tokens": 3000}
    count = len(harness.gateway.cancelled)
    await client.post(json.dumps(body).encode())
    await harness.gateway.wait_until(lambda gateway: len(gateway.parked) > 0)
    client.reset()
    await harness.cancelled(count + 1)


CALLS: Final[dict[str, Call]] = {
    "a completion": lambda harness: harness.answer(COMPLETIONS, PLAIN),
    "a stream": lambda harness: harness.stream(COMPLETIONS, PLAIN),
    "two choices with log probabilities": lambda harness: harness.stream(
        COMPLETIONS, {**PLAIN, "n": 2, "logprobs": 1}
    ),
    "a chat": lambda harness: harness.stream(CHAT, TALK),
    "a stop string": lambda harness: harness.stream(CHAT, {**TALK, "stop": ["b"]}),
    "tools": lambda harness: harness.stream(CHAT, {**TALK, "tools": [TOOL]}),
    "a schema": lambda harness: harness.answer(CHAT, {**TALK, "response_format": SCHEMA}),
    "a response": lambda harness: harness.answer(
        "/v1/responses", {"model": MODEL, "input": "hello", "max_output_tokens": 3}
    ),
    "a message": lambda harness: harness.answer("/v1/messages", TALK),
    "embeddings": lambda harness: harness.answer(EMBEDDINGS, {"input": [[1], [2]]}),
    "no JSON": lambda harness: harness.answer(COMPLETIONS, "text", status=400),
    "no such response": lambda harness: harness.answer(
        "/v1/responses/resp_0/cancel", {}, status=404
    ),
    "refused": refused,
    "failed midway": failed_midway,
    "left early": left_early,
    "hung up": hung_up,
    "rejoined": rejoined,
    "repeated": repeated,
    "failed in background": failed_in_background,
    "reset unread": reset_unread,
    "not HTTP": not_http,
}


@pytest.fixture
async def harness(tmp_path: Path) -> AsyncIterator[Harness]:
    template = "{% if tools %}{{ tools | tojson }}\n{% endif %}" + CHATML
    directory = write_model(tmp_path, chat_template=template, max_position_embeddings=4096)
    async with serving(directory, tool_parser="hermes", reasoning_parser="qwen3") as harness:
        engine = asyncio.ensure_future(answer_all(harness))
        yield harness
        engine.cancel()


async def answer_all(harness: Harness) -> None:
    """What engines would do, as the prompts want it."""
    gateway = harness.gateway
    for done in itertools.count():
        await gateway.wait_until(partial(has_submitted, done + 1))
        request = gateway.submitted[done]
        prompt = harness.served.tokenizer.decode(request.prompt)
        if not gateway.is_open(request):
            continue
        if request.pooling is not None:
            vector = struct.pack("<2f", 1.0, 2.0)
            gateway.deliver(request, finish=FinishReason.STOP, vector=vector)
        elif "refuse" in prompt:
            gateway.fail(request, Overloaded("later", retry_after_s=1.0))
        elif "flood" in prompt:
            for _ in range(2_900):
                say(harness, request)
                await asyncio.sleep(0)  # else all of it is one event
        else:
            say(harness, request)
            if "wait" not in prompt:
                say(harness, request, finish=FinishReason.LENGTH)


def has_submitted(count: int, gateway: ScriptedGateway) -> bool:
    return len(gateway.submitted) >= count


def say(harness: Harness, request: Request, *, finish: int = 0) -> None:
    tokens = harness.tokens("ab")[:1]
    told = () if request.params.logprobs is None else (TokenLogprobs(-1.0, ((5, -1.0),)),)
    harness.gateway.deliver(request, *tokens, finish=finish, logprobs=told)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_a_call_leaves_no_circles(harness: Harness, call: Call) -> None:
    await call(harness)  # what is made once may stay
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for _ in range(3):
            await call(harness)
        async with harness.session.get("/health") as response:
            assert response.status == 200  # so that the calls before are behind the server
        harness.gateway.forget()  # it keeps who listened, as no real one does
        gc.collect()
        left = Counter(type(one).__qualname__ for one in gc.garbage if is_servers(one))
    finally:
        gc.set_debug(0)
        gc.enable()
        gc.garbage.clear()
    assert not left


def is_servers(one: object) -> bool:
    """Whether something is the server's, not the client's in the same process."""
    module = type(one).__module__
    return isinstance(one, web.BaseRequest | web.StreamResponse | web.RequestHandler) or (
        module.startswith("understudy.") and "scripted" not in module
    )
