"""Streams that are joined again: what a client had and what it gets now is the undisturbed text."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final

import msgspec
import pytest

from tests.http_harness import (
    CHAT,
    COMPLETIONS,
    HELLO,
    MODEL,
    Event,
    Harness,
    chunks,
    error_of,
    events,
    serving,
    text_of,
)
from tests.tiny_models import write_model
from understudy.actors.gateway import NOBODY
from understudy.actors.http_answers import HttpLimits
from understudy.actors.scripted_gateway import SERVING
from understudy.protocol.openai.presentation import decode_presentation, encode_presentation
from understudy.protocol.request import FinishReason, Request

CHAT_BODY: Final = {"model": MODEL, "messages": HELLO, "stream": True}
LENGTH: Final = FinishReason.LENGTH
USAGE: Final[dict[str, Any]] = {"stream_options": {"include_usage": True}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return write_model(tmp_path)


@pytest.fixture
async def harness(directory: Path) -> AsyncIterator[Harness]:
    async with serving(directory) as harness:
        yield harness


async def join(harness: Harness, stream_id: str, **headers: str) -> list[Event]:
    """All events of a stream that is joined."""
    path = f"/v1/streams/{stream_id}"
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with harness.session.get(path, headers=named) as response:
        assert response.status == 200, await response.text()
        return [event async for event in events(response)]


async def not_found(harness: Harness, path: str, **headers: str) -> None:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    async with harness.session.get(path, headers=named) as response:
        assert response.status == 404, await response.text()
        error = error_of(await response.json())
        assert (error["type"], error["code"]) == ("invalid_request_error", "not_found")


class Open:
    """A stream that is under way."""

    def __init__(self, harness: Harness, response: Any) -> None:
        harness.responses.append(response)
        self.response = response
        self.stream_id = response.headers["X-Stream-Id"]
        self.request = harness.gateway.submitted[-1]
        self._harness = harness
        self._events = events(response)

    async def next(self) -> Event:
        """The next event that is no comment."""
        while (event := await anext(self._events)).comment is not None:
            pass
        return event

    async def next_comment(self) -> str:
        """The next thing, which is a comment."""
        comment = (await anext(self._events)).comment
        assert comment is not None
        return comment

    async def rest(self) -> list[Event]:
        return [event async for event in self._events]

    def say(self, text: str, finish: int = 0) -> None:
        tokens = self._harness.tokens(text)
        self._harness.gateway.deliver(self.request, *tokens, finish=finish)

    def close(self) -> None:
        self.response.close()


async def begin(
    harness: Harness, text: str, path: str = CHAT, *, is_resumable: bool = False, **body: Any
) -> Open:
    """A stream whose engine has said ``text``."""
    fields = {**(CHAT_BODY if path == CHAT else {"prompt": "x", "stream": True}), **body}
    headers = {"X_Resumable": "true"} if is_resumable else {}
    post = harness.post(path, fields, raw=None, **headers)
    call = asyncio.ensure_future(post.__aenter__())
    request = await harness.submitted(len(harness.gateway.submitted) + 1)
    harness.gateway.deliver(request, *harness.tokens(text))
    return Open(harness, await call)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_a_stream_goes_on_behind_the_last_event(harness: Harness, path: str) -> None:
    first = await begin(harness, "one", path, is_resumable=True, **USAGE)
    had = await first.next()
    first.close()
    await harness.gateway.wait_until(lambda gateway: bool(gateway.left))
    harness.gateway.deliver(first.request, *harness.tokens(" two"))
    harness.gateway.deliver(first.request, *harness.tokens(" three"), finish=LENGTH)
    assert had.event_id is not None
    rest = await join(harness, first.stream_id, Last_Event_ID=had.event_id)
    assert text_of([had, *rest]) == "one two three"
    assert {chunk["id"] for chunk in chunks(rest)} == {first.stream_id}
    assert {chunk["object"] for chunk in chunks(rest)} == {had.data["object"]}
    assert {chunk["created"] for chunk in chunks(rest)} == {had.data["created"]}
    num_tokens = len(harness.tokens("one")) + len(harness.tokens(" two"))
    num_tokens += len(harness.tokens(" three"))
    assert chunks(rest)[-1]["usage"]["completion_tokens"] == num_tokens
    assert chunks(rest)[-1]["usage"]["prompt_tokens"] == len(first.request.prompt)


async def test_without_a_position_a_stream_comes_from_its_beginning(harness: Harness) -> None:
    first = await begin(harness, "one", COMPLETIONS, echo=True, prompt="zero ")
    first.say(" two", LENGTH)
    whole = [await first.next(), *await first.rest()]
    for stream_id in (first.stream_id, first.stream_id.removeprefix("cmpl-")):
        again = await join(harness, stream_id)
        assert text_of(again) == text_of(whole) == "zero one two"
    assert text_of(await join(harness, f"{first.stream_id}?starting_after=0")) == "zero one two"


async def test_a_running_stream_can_be_joined_beside_its_first_reader(harness: Harness) -> None:
    first = await begin(harness, "one")
    second = asyncio.ensure_future(join(harness, first.stream_id))
    await asyncio.sleep(0)
    had = [await first.next()]
    first.say(" two")
    first.say(" three", LENGTH)
    assert text_of([*had, *await first.rest()]) == "one two three"
    assert text_of(await second) == "one two three"


async def test_a_stream_can_be_joined_before_anything_was_said(harness: Harness) -> None:
    post = harness.post(CHAT, CHAT_BODY)
    call = asyncio.ensure_future(post.__aenter__())
    request = await harness.submitted()
    joining = asyncio.ensure_future(join(harness, f"{request.group_id:016x}", Last_Event_ID=""))
    await harness.gateway.wait_until(lambda gateway: gateway.num_listeners(request) == 2)
    harness.gateway.deliver(request, *harness.tokens("one"), finish=LENGTH)
    assert text_of(await joining) == text_of(await Open(harness, await call).rest()) == "one"


async def test_who_has_all_that_was_said_is_answered_at_once(harness: Harness) -> None:
    first = await begin(harness, "one")
    had = await first.next()
    assert had.event_id is not None
    path = f"/v1/streams/{first.stream_id}"
    async with harness.session.get(path, headers={"Last-Event-ID": had.event_id}) as response:
        first.say(" two", LENGTH)
        rest = [event async for event in events(response)]
    assert text_of([had, *rest]) == "one two"
    # A stream that waits for a sign of life to be opened begins with it.
    assert "keep-alive" not in {event.comment for event in rest}


async def test_a_stream_is_found_until_it_is_forgotten(harness: Harness) -> None:
    first = await begin(harness, "one")
    first.say(" two", LENGTH)
    for _ in range(3):
        assert text_of(await join(harness, first.stream_id)) == "one two"
    harness.gateway.forget()
    await not_found(harness, f"/v1/streams/{first.stream_id}")


async def test_a_reader_who_goes_takes_nothing_from_the_other(harness: Harness) -> None:
    first = await begin(harness, "one")
    async with harness.session.get(f"/v1/streams/{first.stream_id}") as response:
        second = Open(harness, response)
        await second.next()
    await first.next()
    first.say(" two", LENGTH)
    assert text_of(await first.rest()) == " two"
    assert harness.gateway.cancelled == []


async def test_the_last_reader_of_a_stream_that_is_not_resumable_ends_it(harness: Harness) -> None:
    first = await begin(harness, "one")
    async with harness.session.get(f"/v1/streams/{first.stream_id}") as response:
        await Open(harness, response).next()
        first.close()
    await harness.cancelled()


async def test_a_client_without_the_header_ends_its_request(harness: Harness) -> None:
    first = await begin(harness, "one")
    first.close()
    await harness.cancelled()
    assert harness.gateway.left == []


async def test_each_choice_has_a_position_of_its_own(harness: Harness) -> None:
    call = asyncio.ensure_future(harness.post(CHAT, {**CHAT_BODY, "n": 2}).__aenter__())
    await harness.submitted(2)
    left, right = harness.gateway.submitted
    [a, b, c] = harness.tokens("abc")
    harness.gateway.deliver(right, a)
    stream = Open(harness, await call)
    had = [await stream.next()]
    assert had[0].event_id == f"{left.group_id:016x}.0-1"
    harness.gateway.deliver(left, b)
    had.append(await stream.next())
    assert had[1].event_id == f"{left.group_id:016x}.1-1"
    harness.gateway.deliver(left, c, finish=LENGTH)
    harness.gateway.deliver(right, c, finish=LENGTH)
    rest = [await stream.next(), *await stream.rest()]
    for num_had in (1, 2):
        event_id = had[num_had - 1].event_id
        assert event_id is not None
        again = await join(harness, stream.stream_id, Last_Event_ID=event_id)
        joined = [*had[:num_had], *again]
        assert [text_of(joined, index) for index in (0, 1)] == ["bc", "ac"]
        roles = [c["choices"][0]["delta"].get("role") for c in chunks(joined) if c["choices"]]
        assert roles.count("assistant") == 2
    assert [text_of([*had, *rest], index) for index in (0, 1)] == ["bc", "ac"]
    await not_found(harness, f"/v1/streams/{stream.stream_id}?starting_after=1")
    await not_found(harness, f"/v1/streams/{stream.stream_id}?starting_after=1-1-1")


async def test_who_had_the_end_gets_what_comes_behind_it(harness: Harness) -> None:
    num_tokens = len([*harness.tokens("one"), *harness.tokens(" two")])
    first = await begin(harness, "one", max_tokens=num_tokens, **USAGE)
    first.say(" two", LENGTH)
    *_, last, _, _ = [await first.next(), *await first.rest()]
    assert last.event_id is not None
    counts, done = await join(harness, first.stream_id, Last_Event_ID=last.event_id)
    assert counts.data["choices"] == []
    assert done.data == "[DONE]"


async def test_an_end_without_a_token_is_told_again(harness: Harness) -> None:
    first = await begin(harness, "one", max_tokens=100)
    had = await first.next()
    harness.gateway.deliver(first.request, finish=LENGTH)
    assert had.event_id is not None
    rest = await join(harness, first.stream_id, Last_Event_ID=had.event_id)
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks(rest)] == ["length"]


async def test_a_stream_that_failed_says_so_again(harness: Harness) -> None:
    first = await begin(harness, "one")
    had = await first.next()
    harness.gateway.deliver(first.request, finish=FinishReason.ERROR)
    assert had.event_id is not None
    headers = {"Last-Event-ID": had.event_id}
    async with harness.session.get(f"/v1/streams/{first.stream_id}", headers=headers) as response:
        assert response.status == 500
        assert error_of(await response.json())["code"] == "internal_error"


async def test_a_position_behind_a_stop_string_is_not_found(harness: Harness) -> None:
    first = await begin(harness, "a", stop=["bc"])
    first.say("bcdef")
    *_, last, done = [await first.next(), *await first.rest()]
    assert done.data == "[DONE]"
    assert last.event_id is not None
    assert last.event_id.endswith(".3")
    assert len(await join(harness, first.stream_id, Last_Event_ID=last.event_id)) == 1
    await not_found(harness, f"/v1/streams/{first.stream_id}?starting_after=4")


async def test_a_position_behind_one_choices_stop_string_is_not_found(harness: Harness) -> None:
    call = asyncio.ensure_future(
        harness.post(CHAT, {**CHAT_BODY, "n": 2, "stop": "b"}).__aenter__()
    )
    await harness.submitted(2)
    for request, text in zip(harness.gateway.submitted, ("aaaa", "abcd"), strict=True):
        harness.gateway.deliver(request, *harness.tokens(text))
    stream = Open(harness, await call)
    await not_found(harness, f"/v1/streams/{stream.stream_id}?starting_after=4-4")
    assert harness.gateway.num_open == 1


async def test_an_echo_is_told_with_the_first_token_and_once(directory: Path) -> None:
    """A client at position 0 of a choice has nothing of it."""
    body = {"prompt": "zero ", "stream": True, "echo": True, "n": 2}
    async with serving(directory, limits=HttpLimits(keep_alive_s=0.02)) as harness:
        call = asyncio.ensure_future(harness.post(COMPLETIONS, body).__aenter__())
        await harness.submitted(2)
        stream = Open(harness, await call)
        comments = [await stream.next_comment() for _ in range(2)]
        assert comments == ["keep-alive", "keep-alive"]
        left, right = harness.gateway.submitted
        harness.gateway.deliver(right, *harness.tokens("a"))
        had = await stream.next()
        assert had.event_id == f"{left.group_id:016x}.0-1"
        assert had.data["choices"][0]["text"] == "zero a"
        harness.gateway.deliver(left, *harness.tokens("b"), finish=LENGTH)
        harness.gateway.deliver(right, *harness.tokens("c"), finish=LENGTH)
        rest = await join(harness, stream.stream_id, Last_Event_ID=had.event_id)
    assert [text_of([had, *rest], index) for index in (0, 1)] == ["zero b", "zero ac"]


@pytest.mark.parametrize(
    "position", ["-1", "99", "x", "", "1.5", "4294967296999", "1-1", "0000000000000001.1", "%00"]
)
async def test_a_position_that_nobody_was_told_is_not_found(
    harness: Harness, position: str
) -> None:
    first = await begin(harness, "one")
    await not_found(harness, f"/v1/streams/{first.stream_id}?starting_after={position}")
    assert harness.gateway.num_open == 1


async def test_the_header_counts_for_more_than_the_query(harness: Harness) -> None:
    first = await begin(harness, "abc")
    group = first.stream_id.removeprefix("chatcmpl-")
    path = f"/v1/streams/{group}?starting_after=1"
    await not_found(harness, path, Last_Event_ID=f"{group}.99")
    await not_found(harness, path, Last_Event_ID="1")
    await not_found(harness, path, Last_Event_ID=f"{1:016x}.1")


@pytest.mark.parametrize(
    "stream_id",
    ["x", "chatcmpl-", "chatcmpl-123", "0" * 16, "f" * 16, "chatcmpl-" + "0" * 16, "..%2f", "%00"],
)
async def test_a_stream_that_is_none_is_not_found(harness: Harness, stream_id: str) -> None:
    await not_found(harness, f"/v1/streams/{stream_id}")


async def test_the_wrong_prefix_is_not_found(harness: Harness) -> None:
    first = await begin(harness, "one")
    await not_found(harness, f"/v1/streams/{first.stream_id.removeprefix('chat')}")


def kept(request: Request, **change: Any) -> Request:
    """A request as another gateway would have submitted it."""
    return dataclasses.replace(request, request_id=77, group_id=77, **change)


async def test_another_tenants_stream_is_not_found(harness: Harness) -> None:
    first = await begin(harness, "one")
    harness.gateway.keep(kept(first.request, tenant="somebody"))
    await not_found(harness, f"/v1/streams/{77:016x}")


async def test_another_gateways_stream_can_be_joined(harness: Harness) -> None:
    first = await begin(harness, "one")
    request = kept(first.request)
    harness.gateway.keep(request)
    harness.gateway.deliver(request, *harness.tokens("two"), finish=LENGTH)
    assert text_of(await join(harness, f"{77:016x}")) == "two"


async def test_a_stream_that_lost_choices_is_not_found(harness: Harness) -> None:
    first = await begin(harness, "one")
    presentation = decode_presentation(first.request.presentation)
    changes: list[dict[str, Any]] = [{"num_choices": 2}, {"model": "another"}]
    for group_id, change in enumerate(changes, 78):
        changed = msgspec.structs.replace(presentation, **change)
        request = kept(first.request, presentation=encode_presentation(changed))
        harness.gateway.keep(dataclasses.replace(request, group_id=group_id))
        await not_found(harness, f"/v1/streams/{group_id:016x}")


async def test_a_presentation_that_cannot_be_read_is_our_fault(harness: Harness) -> None:
    first = await begin(harness, "one")
    harness.gateway.keep(kept(first.request, presentation=b"\xc1"))
    async with harness.session.get(f"/v1/streams/{77:016x}") as response:
        assert response.status == 500
        assert error_of(await response.json())["code"] == "internal_error"


async def test_without_the_supervisor_nobody_knows_a_stream(harness: Harness) -> None:
    harness.gateway.is_connected = False
    async with harness.session.get(f"/v1/streams/{77:016x}") as response:
        assert response.status == 503
        assert "Retry-After" in response.headers


async def test_a_joined_stream_is_kept_alive(directory: Path) -> None:
    async with serving(directory, limits=HttpLimits(keep_alive_s=0.02)) as harness:
        first = await begin(harness, "one")
        had = await first.next()
        assert had.event_id is not None
        path = f"/v1/streams/{first.stream_id}"
        async with harness.session.get(path, headers={"Last-Event-ID": had.event_id}) as response:
            comments = []
            async for event in events(response):
                comments.append(event.comment)
                if len(comments) == 2:
                    break
        assert comments == ["keep-alive", "keep-alive"]


async def test_a_resumable_answer_in_one_piece_goes_on_and_can_be_read_as_a_stream(
    harness: Harness,
) -> None:
    body = {"prompt": "x", "max_tokens": 3}
    call = asyncio.ensure_future(harness.post(COMPLETIONS, body, X_Resumable="true").__aenter__())
    request = await harness.submitted()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await harness.gateway.wait_until(lambda gateway: bool(gateway.left))
    harness.gateway.deliver(request, *harness.tokens("abc"), finish=LENGTH)
    assert text_of(await join(harness, f"cmpl-{request.group_id:016x}")) == "abc"


async def test_a_stop_string_ends_a_request_whose_client_has_left(harness: Harness) -> None:
    first = await begin(harness, "a", is_resumable=True, stop=["cd"])
    had = await first.next()
    first.close()
    await harness.gateway.wait_until(lambda gateway: bool(gateway.left))
    await asyncio.sleep(0)
    first.say("bc")
    first.say("de")
    assert harness.gateway.cancelled == [first.request.request_id]
    assert had.event_id is not None
    rest = await join(harness, first.stream_id, Last_Event_ID=had.event_id)
    assert text_of([had, *rest]) == "ab"


async def test_calls_wait_while_an_engine_may_be_back_in_a_moment(harness: Harness) -> None:
    harness.gateway.cluster = NOBODY
    harness.gateway.is_hopeful = True
    call = asyncio.ensure_future(harness.answer(COMPLETIONS, {"prompt": "x", "max_tokens": 1}))
    await harness.gateway.wait_until(lambda gateway: gateway.num_waiting == 1)
    harness.gateway.settle(SERVING)
    request = await harness.submitted()
    harness.gateway.deliver(request, *harness.tokens("a"), finish=LENGTH)
    assert (await call)["choices"][0]["text"] == "a"
    harness.gateway.cluster = NOBODY
    refused = asyncio.ensure_future(
        harness.error(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, status=503)
    )
    await harness.gateway.wait_until(lambda gateway: gateway.num_waiting == 1)
    harness.gateway.settle(NOBODY)
    assert (await refused)["code"] == "unavailable"
