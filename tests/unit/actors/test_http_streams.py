from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.http_harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    NOW,
    Event,
    Harness,
    beside,
    chunks,
    error_of,
    events,
    serving,
    text_of,
)
from tests.tiny_models import END_OF_TEXT_ID, VOCAB_SIZE, write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.errors import InternalError, Overloaded
from understudy.protocol.request import FinishReason, Request, TokenLogprobs

CHAT_BODY = {"model": MODEL, "messages": HELLO}
LENGTH = FinishReason.LENGTH
STOP = FinishReason.STOP


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    async with serving(directory) as harness:
        yield harness


@pytest.fixture
async def echo(directory: Path) -> AsyncIterator[Harness]:
    """A server that answers each request with its own prompt, and ends for length or stop."""

    def say_prompt(request: Request) -> list[int]:
        return [*request.prompt, END_OF_TEXT_ID]

    async with serving(directory, say_prompt) as harness:
        yield harness


async def test_a_chat_streams_in_openais_shape(harness: Harness) -> None:
    a, b = harness.tokens("ab")

    async def engine() -> None:
        request = await harness.submitted()
        harness.gateway.deliver(request, a)
        await asyncio.sleep(0)
        harness.gateway.deliver(request, b)
        harness.gateway.deliver(request, END_OF_TEXT_ID, finish=STOP)

    stream = await beside(engine(), harness.stream(CHAT, CHAT_BODY))
    [request] = harness.gateway.submitted
    assert stream[0] == Event(None, None, "engine engine-0 choice 0")
    first = stream[1].data
    assert first == {
        "id": f"chatcmpl-{request.group_id:016x}",
        "object": "chat.completion.chunk",
        "created": int(NOW),
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": first["choices"][0]["delta"]["content"]},
                "logprobs": None,
                "finish_reason": None,
            }
        ],
    }
    assert text_of(stream) == "ab"
    assert [c["choices"][0]["finish_reason"] for c in chunks(stream)][-2:] == [None, "stop"]
    assert stream[-1].data == "[DONE]"


async def test_event_ids_count_the_tokens_that_the_client_has(echo: Harness) -> None:
    stream = await echo.stream(COMPLETIONS, {"prompt": "abcdef"})
    [request] = echo.gateway.submitted
    ids = [event.event_id for event in stream if event.event_id is not None]
    positions = []
    for event_id in ids:
        name, _, position = event_id.partition(".")
        assert name == f"{request.request_id:016x}"
        positions.append(int(position))
    assert positions == sorted(set(positions))
    assert positions[-1] == len(request.prompt) + 1


class Live:
    """A stream of one choice that is under way."""

    def __init__(self, harness: Harness, request: Request, response: Any) -> None:
        self.request = request
        self.response = response
        self._harness = harness
        self._events = events(response)

    async def next(self) -> Event:
        """The next event or comment."""
        return await anext(self._events)

    async def rest(self) -> list[Event]:
        """What comes until the end."""
        return [event async for event in self._events]

    def say(self, text: str, finish: int = 0, **options: Any) -> None:
        """Have the engine say a text, in one row."""
        tokens = self._harness.tokens(text)
        self._harness.gateway.deliver(self.request, *tokens, finish=finish, **options)


@asynccontextmanager
async def live(harness: Harness, text: str, **body: Any) -> AsyncIterator[Live]:
    """A stream whose engine has said ``text``, which is to be read."""
    call = asyncio.ensure_future(
        harness.post(CHAT, {**CHAT_BODY, "stream": True, **body}).__aenter__()
    )
    request = await harness.submitted(len(harness.gateway.submitted) + 1)
    harness.gateway.deliver(request, *harness.tokens(text))
    async with await call as response:
        assert response.status == 200
        yield Live(harness, request, response)


async def test_a_choice_that_ends_at_once_is_told_before_the_others_begin(
    harness: Harness,
) -> None:
    body = {**CHAT_BODY, "stream": True, "n": 2}
    call = asyncio.ensure_future(harness.post(CHAT, body).__aenter__())
    await harness.submitted(2)
    left, right = harness.gateway.submitted
    harness.gateway.deliver(left, *harness.tokens("a"), finish=LENGTH)
    async with await call as response:
        stream = events(response)
        # A stream that waits for a sign of life to be opened begins with it.
        told = [await anext(stream), await anext(stream)]
        assert [event.comment for event in told] == ["engine engine-0 choice 0", None]
        harness.gateway.deliver(right, *harness.tokens("b"), finish=LENGTH)
        told += [event async for event in stream]
    assert [text_of(told, index) for index in (0, 1)] == ["a", "b"]


def said(event: Event) -> str:
    """The text of a chunk of a chat."""
    return str(event.data["choices"][0]["delta"]["content"])


async def test_tokens_are_chunks_as_they_come(harness: Harness) -> None:
    async with live(harness, "a") as stream:
        assert (await stream.next()).comment == "engine engine-0 choice 0"
        assert said(await stream.next()) == "a"
        for letter in "bcd":
            stream.say(letter)
            assert said(await stream.next()) == letter
        stream.say("", LENGTH)
        assert (await stream.next()).data["choices"][0]["finish_reason"] == "length"
        assert [event.data for event in await stream.rest()] == ["[DONE]"]


async def test_the_tokens_of_one_row_are_one_chunk(harness: Harness) -> None:
    async with live(harness, "one two") as stream:
        await stream.next()
        assert said(await stream.next()) == "one two"


async def test_a_character_is_sent_when_it_is_whole(harness: Harness) -> None:
    spell = harness.served.tokenizer.spell
    [lead] = [token for token in range(VOCAB_SIZE) if spell(token) == b"\xc3"]
    [tail] = [token for token in range(VOCAB_SIZE) if spell(token) == b"\x9f"]
    async with live(harness, "a") as stream:
        await stream.next()
        await stream.next()
        harness.gateway.deliver(stream.request, lead)
        harness.gateway.deliver(stream.request, tail)
        assert said(await stream.next()) == "ß"


async def test_text_that_may_become_a_stop_string_is_held_back(harness: Harness) -> None:
    async with live(harness, "a", stop=["bcd"]) as stream:
        await stream.next()
        assert said(await stream.next()) == "a"
        stream.say("b")
        stream.say("c")
        stream.say("x")
        assert said(await stream.next()) == "bcx"
        stream.say("bc")
        stream.say("d")
        last = await stream.next()
        assert (said(last), last.data["choices"][0]["finish_reason"]) == ("", "stop")
        assert harness.gateway.cancelled == [stream.request.request_id]
        assert [event.data for event in await stream.rest()] == ["[DONE]"]


async def test_choices_are_interleaved_by_their_index(harness: Harness) -> None:
    async def engine() -> None:
        await harness.submitted(3)
        requests = harness.gateway.submitted
        for text in ("a", "b", "c"):
            for request in requests:
                harness.gateway.deliver(request, *harness.tokens(text))
            await asyncio.sleep(0)
        for request in reversed(requests):
            harness.gateway.deliver(request, finish=LENGTH)

    body = {**CHAT_BODY, "n": 3, "stream_options": {"include_usage": True}}
    stream = await beside(engine(), harness.stream(CHAT, body))
    assert [text_of(stream, index) for index in range(3)] == ["abc"] * 3
    roles = [c["choices"][0]["delta"].get("role") for c in chunks(stream) if c["choices"]]
    assert roles.count("assistant") == 3
    ends = [
        chunk["choices"][0]["index"]
        for chunk in chunks(stream)
        if chunk["choices"] and chunk["choices"][0]["finish_reason"]
    ]
    assert sorted(ends) == [0, 1, 2]
    assert chunks(stream)[-1]["usage"]["completion_tokens"] == 9


async def test_the_usage_comes_last_and_without_choices(echo: Harness) -> None:
    body = {"prompt": "abc", "stream_options": {"include_usage": True}}
    *others, last = chunks(await echo.stream(COMPLETIONS, body))
    assert all(chunk["usage"] is None for chunk in others)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": 4,
        "total_tokens": 7,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_each_chunk_can_say_the_usage_so_far(echo: Harness) -> None:
    options = {"continuous_usage_stats": True, "include_usage": True}
    found = chunks(await echo.stream(COMPLETIONS, {"prompt": "abc", "stream_options": options}))
    counts = [chunk["usage"]["completion_tokens"] for chunk in found]
    assert counts == sorted(counts)
    assert counts[-1] == 4
    assert all(chunk["usage"]["prompt_tokens"] == 3 for chunk in found)


async def test_chunks_without_usage_do_not_mention_it(echo: Harness) -> None:
    found = chunks(await echo.stream(COMPLETIONS, {"prompt": "abc"}))
    assert all("usage" not in chunk for chunk in found)


async def test_log_probabilities_go_with_their_tokens(harness: Harness) -> None:
    async def engine() -> None:
        request = await harness.submitted()
        for token in harness.tokens("ab"):
            logprobs = (TokenLogprobs(-0.5, ((token, -0.5),)),)
            harness.gateway.deliver(request, token, logprobs=logprobs)
            await asyncio.sleep(0)
        end = (TokenLogprobs(-2.0, ()),)
        harness.gateway.deliver(request, END_OF_TEXT_ID, finish=STOP, logprobs=end)

    body = {**CHAT_BODY, "logprobs": True, "top_logprobs": 1}
    stream = await beside(engine(), harness.stream(CHAT, body))
    entries = [
        entry
        for chunk in chunks(stream)
        for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert [entry["token"] for entry in entries] == ["a", "b", "<|endoftext|>"]
    assert text_of(stream) == "ab"


async def test_an_echo_begins_the_stream(echo: Harness) -> None:
    stream = await echo.stream(COMPLETIONS, {"prompt": "one", "echo": True})
    assert text_of(stream) == "oneone"


async def test_an_echo_without_tokens_is_a_stream_too(harness: Harness) -> None:
    body = {"prompt": ["one", "two"], "echo": True, "max_tokens": 0}
    stream = await harness.stream(COMPLETIONS, body)
    assert [text_of(stream, index) for index in (0, 1)] == ["one", "two"]


async def test_the_headers_are_those_of_an_event_stream(echo: Harness) -> None:
    body = {"prompt": "x", "stream": True, "zebra": 1}
    async with echo.post(COMPLETIONS, body, X_Request_Id="mine-1") as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-cache"
        assert response.headers["X-Request-Id"] == "mine-1"
        assert response.headers["X-Ignored-Fields"] == "zebra"


async def test_one_connection_serves_stream_after_stream(echo: Harness) -> None:
    for _ in range(3):
        assert text_of(await echo.stream(COMPLETIONS, {"prompt": "abc"})) == "abc"
    answer = await echo.answer(COMPLETIONS, {"prompt": "abc"})
    assert answer["choices"][0]["text"] == "abc"
    connector = echo.session.connector
    assert connector is not None
    assert len(connector._conns) == 1


async def test_who_makes_the_tokens_is_said_in_comments(harness: Harness) -> None:
    async with live(harness, "a") as stream:
        stream.say("b", engine="engine-0")
        stream.say("c", engine="engine-1")
        stream.say("d", LENGTH, engine="engine-1")
        comments = [event.comment for event in await stream.rest() if event.comment]
    assert comments == ["engine engine-0 choice 0", "engine engine-1 choice 0"]


async def test_a_refusal_before_the_first_token_is_a_status(harness: Harness) -> None:
    async def engine() -> None:
        harness.gateway.fail(await harness.submitted(), Overloaded("full"))

    async def client() -> None:
        async with harness.post(CHAT, {**CHAT_BODY, "stream": True}) as response:
            assert response.status == 503
            assert "retry-after-ms" in response.headers
            assert error_of(await response.json())["code"] == "overloaded"

    await beside(engine(), client())


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_that_fails_midway_ends_with_the_error(harness: Harness, n: int) -> None:
    async def engine() -> None:
        await harness.submitted(n)
        first, *others = harness.gateway.submitted
        for request in (first, *others):
            harness.gateway.deliver(request, *harness.tokens("a"))
        await asyncio.sleep(0)
        harness.gateway.fail(first, InternalError("broken"))

    stream = await beside(engine(), harness.stream(CHAT, {**CHAT_BODY, "n": n}))
    assert error_of(stream[-1].data)["message"] == "broken"
    assert "[DONE]" not in [event.data for event in stream]
    assert len(harness.gateway.cancelled) == n - 1


async def test_an_end_without_a_word_for_it_is_an_error_event(harness: Harness) -> None:
    async with live(harness, "a") as stream:
        stream.say("b", FinishReason.ERROR)
        *_, text, error = await stream.rest()
    assert said(text) == "b"
    assert error_of(error.data)["code"] == "internal_error"


async def test_comments_keep_a_queued_stream_alive(directory: Path) -> None:
    async with serving(directory, limits=HttpLimits(keep_alive_s=0.02)) as harness:
        call = asyncio.ensure_future(harness.post(CHAT, {**CHAT_BODY, "stream": True}).__aenter__())
        async with await call as response:
            assert response.status == 200
            stream = Live(harness, await harness.submitted(), response)
            for _ in range(3):
                assert (await stream.next()).comment == "keep-alive"
            stream.say("abc", LENGTH)
            assert text_of(await stream.rest()) == "abc"


async def test_a_failure_after_comments_is_an_error_event(directory: Path) -> None:
    async with (
        serving(directory, limits=HttpLimits(keep_alive_s=0.02)) as harness,
        harness.post(CHAT, {**CHAT_BODY, "stream": True}) as response,
    ):
        stream = Live(harness, await harness.submitted(), response)
        assert (await stream.next()).comment == "keep-alive"
        harness.gateway.fail(stream.request, Overloaded("full"))
        *_, error = await stream.rest()
    assert error_of(error.data)["code"] == "overloaded"


async def test_a_client_that_goes_away_ends_its_requests(harness: Harness) -> None:
    async with live(harness, "a") as stream:
        stream.response.close()
        await harness.cancelled()
        assert harness.gateway.num_open == 0


async def test_a_stream_says_so_when_the_server_stops(directory: Path) -> None:
    async with serving(directory) as harness:
        async with live(harness, "a") as stream:
            await stream.next()
            await stream.next()
            await harness.runner.cleanup()
            [error] = await stream.rest()
            assert stream.response.content.at_eof()
        assert error_of(error.data)["code"] == "unavailable"
        assert harness.gateway.left == [stream.request.request_id]


async def test_an_old_client_gets_the_stream_without_chunked_encoding(echo: Harness) -> None:
    reader, writer = await asyncio.open_connection(echo.host, echo.port)
    body = b'{"prompt": "abc", "stream": true}'
    writer.write(
        b"POST /v1/completions HTTP/1.0\r\nContent-Type: application/json\r\n"
        b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    )
    head, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    assert b"chunked" not in head
    assert answer.endswith(b"data: [DONE]\n\n")
    assert all(
        line == b"" or line.startswith((b"id: ", b"data: ", b": ")) for line in answer.split(b"\n")
    )
    writer.close()
    await writer.wait_closed()
