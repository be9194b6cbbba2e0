"""The same call again under one idempotency key: one generation, one answer."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import pytest

from tests.http_harness import COMPLETIONS, Harness, error_of, events, serving, text_of
from tests.tiny_models import END_OF_TEXT_ID, write_model
from understudy.actors.http_answers import HttpLimits
from understudy.protocol.request import FinishReason, Request

BODY: Final = {"prompt": "abc", "n": 2}
KEY: Final = "order-66"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    async with serving(directory) as harness:
        yield harness


@pytest.fixture
async def echo(directory: Path) -> AsyncIterator[Harness]:
    def say_prompt(request: Request) -> list[int]:
        return [*request.prompt, END_OF_TEXT_ID]

    async with serving(directory, say_prompt) as harness:
        yield harness


async def answer(harness: Harness, body: Any, key: str = KEY, status: int = 200) -> Any:
    async with harness.post(COMPLETIONS, body, Idempotency_Key=key) as response:
        assert response.status == status, await response.text()
        return await response.json()


async def test_a_hundred_calls_at_once_are_one_generation(echo: Harness) -> None:
    answers = await asyncio.gather(*(answer(echo, BODY) for _ in range(100)))
    assert len(echo.gateway.submitted) == 2
    assert all(one == answers[0] for one in answers)
    assert answers[0]["choices"][1]["text"] == "abc"


async def test_a_call_that_is_repeated_while_it_runs_waits_for_the_same_answer(
    directory: Path,
) -> None:
    seconds = itertools.count(1_700_000_000)
    async with serving(directory, wall_clock=lambda: next(seconds)) as harness:
        first = asyncio.ensure_future(answer(harness, BODY))
        await harness.submitted(2)
        second = asyncio.ensure_future(answer(harness, BODY))
        await harness.gateway.wait_until(
            lambda gateway: all(gateway.num_listeners(one) == 2 for one in gateway.submitted)
        )
        for request, text in zip(harness.gateway.submitted, ("x", "y"), strict=True):
            harness.gateway.deliver(request, *harness.tokens(text), finish=FinishReason.LENGTH)
        assert await first == await second
        assert await answer(harness, BODY) == await first
        assert [choice["text"] for choice in (await first)["choices"]] == ["x", "y"]
        assert (await first)["created"] == 1_700_000_000
        assert len(harness.gateway.submitted) == 2


async def test_a_later_call_gets_the_finished_answer_as_a_stream_if_it_was_one(
    echo: Harness,
) -> None:
    body = {**BODY, "stream": True, "stream_options": {"include_usage": True}}
    streams = []
    for _ in range(2):
        async with echo.post(COMPLETIONS, body, Idempotency_Key=KEY) as response:
            streams.append([event async for event in events(response)])
    first, second = ([event for event in one if event.comment is None] for one in streams)
    assert [text_of(second, index) for index in (0, 1)] == ["abc", "abc"]
    assert second[-2].data == first[-2].data
    assert len(echo.gateway.submitted) == 2


async def test_another_body_is_a_mismatch(echo: Harness) -> None:
    await answer(echo, BODY)
    for status_of_stream in (False, True):
        other = {**BODY, "prompt": "xyz", "stream": status_of_stream}
        error = error_of(await answer(echo, other, status=422))
        assert error["code"] == "idempotency_mismatch"
    assert len(echo.gateway.submitted) == 2


async def test_another_key_is_another_call(echo: Harness) -> None:
    one, other = await answer(echo, BODY, "a"), await answer(echo, BODY, "b")
    assert one["id"] != other["id"]
    assert len(echo.gateway.submitted) == 4


async def test_requests_carry_digests_and_not_the_key(echo: Harness) -> None:
    await answer(echo, BODY)
    for request in echo.gateway.submitted:
        assert request.idempotency_key == hashlib.sha256(b"\0" + KEY.encode()).digest()
        assert len(request.body_digest) == 32


async def test_without_a_key_there_are_no_digests(echo: Harness) -> None:
    await echo.answer(COMPLETIONS, BODY)
    assert {(r.idempotency_key, r.body_digest) for r in echo.gateway.submitted} == {(b"", b"")}


@pytest.mark.parametrize("key", ["", "x" * 257, "a\tb", "schlüssel"])
async def test_what_is_no_key_is_refused(harness: Harness, key: str) -> None:
    error = error_of(await answer(harness, BODY, key, status=400))
    assert error["param"] == "Idempotency-Key"
    assert harness.gateway.submitted == []


async def test_two_keys_are_refused(harness: Harness) -> None:
    headers = [("Idempotency-Key", "a"), ("Idempotency-Key", "b")]
    async with harness.session.post(COMPLETIONS, json=BODY, headers=headers) as response:
        assert response.status == 400


async def test_a_client_that_goes_away_finds_its_answer_later(harness: Harness) -> None:
    body = {"prompt": "abc", "max_tokens": 3}
    call = asyncio.ensure_future(answer(harness, body))
    request = await harness.submitted()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await harness.gateway.wait_until(lambda gateway: bool(gateway.left))
    assert harness.gateway.cancelled == []
    harness.gateway.deliver(request, *harness.tokens("xyz"), finish=FinishReason.LENGTH)
    assert (await answer(harness, body))["choices"][0]["text"] == "xyz"
    assert len(harness.gateway.submitted) == 1


async def test_a_call_whose_first_answer_was_forgotten_may_come_back(echo: Harness) -> None:
    await answer(echo, BODY)
    echo.gateway.forget()
    error = error_of(await answer(echo, BODY, status=503))
    assert error["code"] == "unavailable"


async def test_a_stream_does_not_begin_before_its_call_is_taken(directory: Path) -> None:
    """While the supervisor is away, no status is sent that its answer may belie."""
    async with serving(directory, limits=HttpLimits(keep_alive_s=0.02)) as harness:
        body = {"prompt": "abc", "max_tokens": 3, "stream": True}
        first = asyncio.ensure_future(answer(harness, {**body, "stream": False}))
        request = await harness.submitted()
        harness.gateway.deliver(request, *harness.tokens("xyz"), finish=FinishReason.LENGTH)
        await first
        harness.gateway.is_connected = False
        repeated = asyncio.ensure_future(
            harness.post(COMPLETIONS, body, Idempotency_Key=KEY).__aenter__()
        )
        await harness.gateway.wait_until(lambda gateway: gateway.num_open == 1)
        await asyncio.sleep(0.1)
        assert not repeated.done()
        harness.gateway.connect()
        async with await repeated as response:
            assert response.status == 422


async def test_a_call_waits_while_the_supervisor_is_away(harness: Harness) -> None:
    harness.gateway.is_connected = False
    body = {"prompt": "abc", "max_tokens": 3}
    waiting = [
        asyncio.ensure_future(harness.answer(COMPLETIONS, body)),
        asyncio.ensure_future(answer(harness, body)),
    ]
    await harness.gateway.wait_until(lambda gateway: gateway.num_open == 2)
    harness.gateway.connect()
    for request in harness.gateway.submitted:
        harness.gateway.deliver(request, *harness.tokens("xyz"), finish=FinishReason.LENGTH)
    for call in waiting:
        assert (await call)["choices"][0]["text"] == "xyz"
