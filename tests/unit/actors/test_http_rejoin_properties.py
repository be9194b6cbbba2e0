"""Whatever was streamed, and wherever it is cut: what was had and what comes is the whole."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.http_harness import CHAT, COMPLETIONS, HELLO, Event, Harness, events, serving
from tests.tiny_models import END_OF_TEXT_ID, write_model
from understudy.protocol.openai.stream_ids import parse_position
from understudy.protocol.request import FinishReason, Request, TokenLogprobs

HEADING = ("id", "object", "created", "model")
TEXTS = ["a", "b", "c", "abcab", "ß", "🦊", "いろ", "one two", " ", "the quick"]
STOPS = ["ab", "bca", "c", "ß", "🦊", "o t", "abcabcabc", "zzz"]


@dataclass(frozen=True)
class Row:
    """What an engine says in one step of one choice."""

    index: int
    tokens: tuple[int, ...]
    finish: int = 0


@dataclass(frozen=True)
class Play:
    """A call, and what engines say to it."""

    path: str
    body: dict[str, Any]
    rows: list[Row]


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def harness(runner: asyncio.Runner, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    directory: Path = write_model(tmp_path_factory.mktemp("model"))
    stack = AsyncExitStack()
    yield runner.run(stack.enter_async_context(serving(directory)))
    runner.run(stack.aclose())


@st.composite
def plays(draw: st.DrawFn, harness: Harness) -> Play:
    n = draw(st.integers(1, 3))
    encode = harness.tokens
    one_by_one = [byte for text in "ß🦊い" for byte in encode(text)]
    pieces = st.sampled_from([tuple(encode(text)) for text in TEXTS]) | st.sampled_from(
        [(token,) for token in one_by_one]
    )
    lists = st.lists(pieces, min_size=1, max_size=8)
    texts = [[token for piece in draw(lists) for token in piece] for _ in range(n)]
    # A text ends with the token that ends it, or else where the shortest of them must.
    stops = [draw(st.booleans()) for _ in range(n)]
    lengths = [len(text) for text, is_stopped in zip(texts, stops, strict=True) if not is_stopped]
    max_tokens = min(lengths, default=1 + max(map(len, texts)))
    waiting: list[list[Row]] = []
    for index, (tokens, is_stopped) in enumerate(zip(texts, stops, strict=True)):
        finish = FinishReason.LENGTH
        if is_stopped and len(tokens) < max_tokens:
            tokens.append(END_OF_TEXT_ID)
            finish = FinishReason.STOP
        del tokens[max_tokens:]
        rows = []
        while tokens:
            size = draw(st.integers(1, 4))
            taken, tokens = tokens[:size], tokens[size:]
            rows.append(Row(index, tuple(taken), 0 if tokens else finish))
        waiting.append(rows)
    rows = []
    while any(waiting):
        turn = draw(st.sampled_from([index for index, rest in enumerate(waiting) if rest]))
        rows.append(waiting[turn].pop(0))
    path = draw(st.sampled_from([CHAT, COMPLETIONS]))
    has_logprobs = draw(st.booleans())
    body: dict[str, Any] = {
        "n": n,
        "max_tokens": max_tokens,
        "min_tokens": draw(st.integers(0, min(3, max_tokens))),
        "stop": draw(st.lists(st.sampled_from(STOPS), max_size=3)),
        "include_stop_str_in_output": draw(st.booleans()),
        "stream": True,
        "stream_options": {
            "include_usage": draw(st.booleans()),
            "continuous_usage_stats": draw(st.booleans()),
        },
    }
    if path == CHAT:
        body |= {"messages": HELLO, "logprobs": has_logprobs}
    else:
        body |= {"prompt": "ab c", "logprobs": 0 if has_logprobs else None}
        body["echo"] = draw(st.booleans()) and not has_logprobs
    return Play(path, body, rows)


def say(harness: Harness, requests: Sequence[Request], row: Row) -> None:
    request = requests[row.index]
    if not harness.gateway.is_open(request):
        return  # a stop string has ended it
    logprobs: tuple[TokenLogprobs, ...] = ()
    if request.params.logprobs is not None:
        logprobs = tuple(TokenLogprobs(-1.0 - token, ()) for token in row.tokens)
    harness.gateway.deliver(request, *row.tokens, finish=row.finish, logprobs=logprobs)


async def stream(harness: Harness, play: Play) -> tuple[list[Request], list[Event]]:
    """The undisturbed stream, with the requests behind it."""
    before = len(harness.gateway.submitted)
    call = asyncio.ensure_future(harness.post(play.path, play.body).__aenter__())
    await harness.submitted(before + play.body["n"])
    requests = harness.gateway.submitted[before:]
    reading: asyncio.Future[list[Event]] | None = None
    for row in play.rows:
        say(harness, requests, row)
        if reading is None:
            reading = asyncio.ensure_future(read(await call))
        await asyncio.sleep(0)
    assert reading is not None
    return requests, await reading


async def read(response: Any) -> list[Event]:
    async with response:
        assert response.status == 200, await response.text()
        return [event async for event in events(response) if event.comment is None]


async def rejoin(harness: Harness, group_id: int, event_id: str | None) -> list[Event]:
    headers = {} if event_id is None else {"Last-Event-ID": event_id}
    return await read(await harness.session.get(f"/v1/streams/{group_id:016x}", headers=headers))


def story(stream: Sequence[Event]) -> dict[int, dict[str, Any]]:
    """What a client knows of each choice in the end."""
    told: dict[int, dict[str, Any]] = {}
    for event in stream:
        if event.data == "[DONE]":
            continue
        for choice in event.data["choices"]:
            known = told.setdefault(
                choice["index"],
                {"text": "", "ends": [], "logprobs": [], "roles": [], "headings": set()},
            )
            known["headings"].add(tuple(event.data[name] for name in HEADING))
            delta = choice.get("delta", {"content": choice.get("text")})
            known["text"] += delta["content"]
            known["roles"] += [delta["role"]] if "role" in delta else []
            known["ends"] += [choice["finish_reason"]] if choice["finish_reason"] else []
            known["logprobs"] += logprobs_of(choice["logprobs"])
    return told


def logprobs_of(logprobs: Any) -> list[Any]:
    if logprobs is None:
        return []
    if "content" in logprobs:
        return [(one["token"], one["logprob"]) for one in logprobs["content"]]
    names = ("tokens", "token_logprobs", "text_offset")
    return list(zip(*(logprobs[name] for name in names), strict=True))


def final_usage(stream: Sequence[Event]) -> Any:
    return [event.data.get("usage") for event in stream if event.data != "[DONE]"][-1:]


COPY_IDS = itertools.count(1)


def copies_of(harness: Harness, requests: Sequence[Request]) -> list[Request]:
    """The same requests once more, as another gateway would have submitted them."""
    copies: list[Request] = []
    for request in requests:
        request_id = next(COPY_IDS)
        group_id = copies[0].group_id if copies else request_id
        copy = dataclasses.replace(request, request_id=request_id, group_id=group_id)
        harness.gateway.keep(copy)
        copies.append(copy)
    return copies


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_stream_cut_behind_any_event_and_joined_again_is_the_whole(
    runner: asyncio.Runner, harness: Harness, data: st.DataObject
) -> None:
    play = data.draw(plays(harness))

    async def perform() -> None:
        requests, whole = await stream(harness, play)
        assert whole[-1].data == "[DONE]"
        told = story(whole)
        for cut in range(len(whole)):
            event_id = whole[cut - 1].event_id if cut else None
            if cut and event_id is None:
                continue  # the usage has no id: its reader has the id of the event before
            rest = await rejoin(harness, requests[0].group_id, event_id)
            assert story([*whole[:cut], *rest]) == told
            assert rest[-1].data == "[DONE]"
            if play.body["stream_options"]["include_usage"]:
                assert final_usage(rest) == final_usage(whole)

    runner.run(perform())


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_a_stream_that_is_joined_while_it_runs_is_the_whole(
    runner: asyncio.Runner, harness: Harness, data: st.DataObject
) -> None:
    play = data.draw(plays(harness))
    num_before = data.draw(st.integers(0, len(play.rows)))
    choice_of_cut = data.draw(st.integers(0, 1000))

    async def perform() -> None:
        requests, whole = await stream(harness, play)
        copies = copies_of(harness, requests)
        lengths = [0] * len(copies)
        for row in play.rows[:num_before]:
            say(harness, copies, row)
            lengths[row.index] += len(row.tokens)
        cuts = [0]
        for number, event in enumerate(whole, 1):
            positions = None if event.event_id is None else parse_position(event.event_id)
            if positions is not None and all(
                position <= length
                for position, length in zip(positions.positions, lengths, strict=True)
            ):
                cuts.append(number)
        cut = cuts[choice_of_cut % len(cuts)]
        event_id = None
        if cut:
            _, _, positions_text = str(whole[cut - 1].event_id).partition(".")
            event_id = f"{copies[0].group_id:016x}.{positions_text}"
        joining = asyncio.ensure_future(rejoin(harness, copies[0].group_id, event_id))
        for row in play.rows[num_before:]:
            await asyncio.sleep(0)
            say(harness, copies, row)
        joined = story([*whole[:cut], *await joining])
        expected = story(whole)
        for known in (*joined.values(), *expected.values()):
            known.pop("headings")  # the copies are another call, and so have another id
        assert joined == expected

    runner.run(perform())
