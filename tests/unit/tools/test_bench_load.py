"""The client and both loops against a server that behaves, and one that does not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count

import msgspec
import pytest
import pytest_asyncio
from aiohttp import web

from understudy.tools.bench.client import Client, Target
from understudy.tools.bench.events import CompletionStream
from understudy.tools.bench.load import Exchange, Measurements, run_closed_loop, run_open_loop
from understudy.tools.bench.workload import (
    PATHS,
    Endpoint,
    LengthRange,
    RequestBudget,
    Workload,
)

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

HELD_MAX_S = 30.0


class FakeServer:
    """Streams as many tokens as asked for, or does as the model's name in the request says."""

    def __init__(self) -> None:
        self.authorizations: list[str | None] = []
        self.under_way = 0
        self.under_way_max = 0
        self.connections: set[object] = set()
        self.arrived: asyncio.Queue[None] = asyncio.Queue()
        """Gets an item for every request that arrives."""
        self.release = asyncio.Event()

    def application(self) -> web.Application:
        application = web.Application()
        application.router.add_post("/v1/completions", self.complete)
        application.router.add_post("/v1/chat/completions", self.complete)
        application.router.add_post("/behind/v1/completions", self.complete)
        return application

    async def complete(self, request: web.Request) -> web.StreamResponse:
        self.authorizations.append(request.headers.get("Authorization"))
        self.connections.add(request.transport)
        self.under_way += 1
        self.under_way_max = max(self.under_way_max, self.under_way)
        self.arrived.put_nowait(None)
        try:
            return await self._answer(request)
        finally:
            self.under_way -= 1

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        behaviour = body["model"]
        if behaviour == "busy":
            error = {"error": {"message": "full", "type": "overloaded_error"}}
            headers = {"Retry-After": "1", "retry-after-ms": "1"}
            return web.json_response(error, status=503, headers=headers)
        if behaviour == "not a stream":
            return web.json_response({"choices": []})
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        if behaviour == "closes":
            response.force_close()
        await response.prepare(request)
        await response.write(b": keep-alive\n\n")
        if behaviour == "silent":
            await self.release.wait()
        await self._stream(response, body, behaviour, is_chat="messages" in body)
        if behaviour == "cut":
            assert request.transport is not None
            request.transport.abort()
        return response

    async def _stream(
        self, response: web.StreamResponse, body: dict[str, int], behaviour: str, *, is_chat: bool
    ) -> None:
        length = body["max_tokens"] - (behaviour == "short")
        if is_chat:
            await response.write(_chunk({"delta": {"role": "assistant", "content": ""}}))
        for position in range(length):
            text: dict[str, object] = {"delta": {"content": "x"}} if is_chat else {"text": "x"}
            is_last = position == length - 1
            if position == length // 2:
                if behaviour in ("cut", "stops"):
                    return
                if behaviour == "error event":
                    await response.write(b'data: {"error":{"message":"engine lost"}}\n\n')
                    return
            text["finish_reason"] = "length" if is_last and behaviour != "no finish" else None
            await response.write(_chunk(text))
        usage = {"prompt_tokens": 5, "completion_tokens": length}
        await response.write(b"data: %b\n\n" % msgspec.json.encode({"choices": [], "usage": usage}))
        await response.write(b"data: [DONE]\n\n")


def _chunk(choice: dict[str, object]) -> bytes:
    return b"data: %b\n\n" % msgspec.json.encode(
        {"id": "1", "choices": [{"index": 0, "finish_reason": None, **choice}]}
    )


@pytest_asyncio.fixture
async def fake() -> AsyncIterator[tuple[FakeServer, Target]]:
    server = FakeServer()
    runner = web.AppRunner(server.application(), access_log=None, shutdown_timeout=0.0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    yield server, Target.parse(f"http://{host}:{port}")
    server.release.set()
    await runner.cleanup()


def workload(
    behaviour: str = "correct", *, endpoint: Endpoint = "completions", ignore_eos: bool = True
) -> Workload:
    return Workload(
        model=behaviour,
        endpoint=endpoint,
        prompt_length=LengthRange(3, 9),
        output_length=LengthRange(4, 6),
        ignore_eos=ignore_eos,
    )


def client_for(
    target: Target,
    load: Workload,
    *,
    connections_max: int = 100,
    timeout_s: float = HELD_MAX_S,
    api_key: str | None = None,
) -> Client:
    return Client(
        target,
        PATHS[load.endpoint],
        api_key=api_key,
        connections_max=connections_max,
        timeout_s=timeout_s,
    )


async def run_closed(
    target: Target,
    load: Workload,
    *,
    num_requests: int = 6,
    concurrency: int = 3,
    timeout_s: float = HELD_MAX_S,
) -> Measurements:
    measurements = Measurements()
    client = client_for(target, load, timeout_s=timeout_s)
    budget = RequestBudget(num_requests=num_requests, duration_s=HELD_MAX_S)
    await run_closed_loop(client, load, budget, measurements.record, concurrency=concurrency)
    client.close()
    return measurements


@pytest.mark.parametrize("endpoint", ["completions", "chat"])
async def test_a_closed_loop_reads_every_token_of_every_answer(
    fake: tuple[FakeServer, Target], endpoint: Endpoint
) -> None:
    server, target = fake
    load = workload(endpoint=endpoint)
    measured = await run_closed(target, load, num_requests=20, concurrency=4)
    assert measured.errors == {}
    assert (measured.num_sent, measured.num_completed) == (20, 20)
    expected = sum(load.request(number).output_tokens for number in range(20))
    assert measured.output_tokens == expected
    assert measured.prompt_tokens == 20 * 5
    ttft, end_to_end = measured.time_to_first_token.summary(), measured.end_to_end.summary()
    assert ttft is not None
    assert end_to_end is not None
    assert 0.0 < ttft.max <= end_to_end.max <= measured.wall_s
    assert server.under_way_max <= 4
    assert len(server.connections) == 4


async def test_a_client_that_keeps_nothing_alive_asks_on_a_new_connection_each_time(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    path = PATHS["completions"]
    client = Client(target, path, connections_max=1, timeout_s=HELD_MAX_S, keeps_alive=False)
    await client.connect(1)
    for number in range(3):
        body = workload().request(number).body
        ending = await client.complete(body, CompletionStream(), expected_tokens=None)
        assert ending.failure is None
    assert len(server.connections) == 3


async def test_an_open_loop_sends_at_its_arrival_times_without_waiting_for_answers(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    load = workload("silent")
    measured = Measurements()
    budget = RequestBudget(num_requests=8, duration_s=HELD_MAX_S)

    async def release_when_all_are_under_way() -> None:
        for _ in range(8):
            await server.arrived.get()
        server.release.set()

    releasing = asyncio.create_task(release_when_all_are_under_way())
    client = client_for(target, load)
    arrivals = (number * 0.002 for number in count())
    await run_open_loop(client, load, budget, measured.record, arrivals=arrivals)
    client.close()
    await releasing
    assert measured.errors == {}
    assert measured.num_completed == 8
    assert server.under_way_max == 8
    lateness = measured.lateness.summary()
    assert lateness is not None
    assert lateness.count == 8


async def test_an_open_loop_counts_from_the_arrival_time_even_if_it_sends_late(
    fake: tuple[FakeServer, Target],
) -> None:
    _, target = fake
    load = workload()
    seen: list[Exchange] = []
    budget = RequestBudget(num_requests=2, duration_s=HELD_MAX_S)
    client = client_for(target, load)
    # Arrival times that lie before the start stand for a client that was held up for 5 s.
    await run_open_loop(client, load, budget, seen.append, arrivals=iter([-5.0, -5.0]))
    client.close()
    for exchange in seen:
        assert exchange.lateness_s is not None
        assert exchange.lateness_s >= 5.0
        assert exchange.ending.ended_at_s - exchange.started_at_s >= 5.0


@pytest.mark.parametrize(
    ("behaviour", "kind", "words"),
    [
        ("error event", "stream_error", "engine lost"),
        ("cut", "stream_cut", "the connection closed"),
        ("stops", "stream_cut", "no [DONE]"),
        ("no finish", "no_finish_reason", "without a finish reason"),
        ("short", "wrong_length", "tokens made"),
        ("busy", "http_503", "overloaded_error"),
        ("not a stream", "bad_response", "not text/event-stream"),
    ],
)
async def test_what_goes_wrong_is_counted_by_its_kind(
    fake: tuple[FakeServer, Target], behaviour: str, kind: str, words: str
) -> None:
    _, target = fake
    measured = await run_closed(target, workload(behaviour))
    assert measured.errors == {kind: 6}
    assert words in measured.error_examples[kind]
    assert measured.num_sent == 6
    assert measured.num_completed == 0
    assert measured.output_tokens == 0


async def test_a_shorter_answer_is_right_where_the_model_may_end_it(
    fake: tuple[FakeServer, Target],
) -> None:
    _, target = fake
    measured = await run_closed(target, workload("short", ignore_eos=False))
    assert measured.errors == {}


async def test_a_server_that_closes_each_connection_is_served_by_new_ones(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    measured = await run_closed(target, workload("closes"))
    assert measured.errors == {}
    assert len(server.connections) == 6


async def test_a_server_that_says_nothing_times_out(fake: tuple[FakeServer, Target]) -> None:
    _, target = fake
    measured = await run_closed(target, workload("silent"), num_requests=2, timeout_s=0.05)
    assert measured.errors == {"timeout": 2}


async def test_retry_after_is_handed_on(fake: tuple[FakeServer, Target]) -> None:
    _, target = fake
    load = workload("busy")
    client = client_for(target, load)
    ending = await client.complete(load.request(0).body, CompletionStream(), expected_tokens=None)
    client.close()
    assert ending.retry_after_s == 0.001


async def test_a_request_beyond_the_limit_of_connections_fails_at_once(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    load = workload("silent")
    client = client_for(target, load, connections_max=1)
    body = load.request(0).body
    first = asyncio.create_task(client.complete(body, CompletionStream(), expected_tokens=None))
    await asyncio.sleep(0)
    second = await client.complete(body, CompletionStream(), expected_tokens=None)
    assert second.failure is not None
    assert second.failure.kind == "client_limit"
    server.release.set()
    assert (await first).failure is None
    client.close()


async def test_a_cancelled_request_gives_its_connection_up(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    load = workload("silent")
    client = client_for(target, load)
    stream = CompletionStream()
    asking = asyncio.create_task(
        client.complete(load.request(0).body, stream, expected_tokens=None)
    )
    await server.arrived.get()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    server.release.set()
    correct = workload().request(0)
    ending = await client.complete(
        correct.body, CompletionStream(), expected_tokens=correct.output_tokens
    )
    client.close()
    assert ending.failure is None


async def test_a_key_and_a_path_prefix_go_into_the_request(
    fake: tuple[FakeServer, Target],
) -> None:
    server, target = fake
    load = workload()
    client = client_for(target._replace(path_prefix="/behind"), load, api_key="k-1")
    ending = await client.complete(load.request(0).body, CompletionStream(), expected_tokens=None)
    client.close()
    assert ending.failure is None
    assert server.authorizations == ["Bearer k-1"]


async def test_a_server_that_is_not_there_is_told_at_the_start_and_counted_later() -> None:
    server = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    target = Target.parse(f"http://127.0.0.1:{port}")
    with pytest.raises(OSError, match="Connect call failed"):
        await run_closed(target, workload())
    client = client_for(target, workload())
    ending = await client.complete(b"{}", CompletionStream(), expected_tokens=None)
    assert ending.failure is not None
    assert ending.failure.kind == "connect"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000", Target("127.0.0.1", 8000, False, "")),
        ("http://localhost/v1/", Target("localhost", 80, False, "")),
        ("https://example.org/llm/v1", Target("example.org", 443, True, "/llm")),
        ("http://[::1]:9", Target("::1", 9, False, "")),
    ],
)
def test_a_base_url_names_host_port_and_prefix(url: str, expected: Target) -> None:
    assert Target.parse(url) == expected


def test_the_host_header_brackets_an_ipv6_address() -> None:
    assert Target.parse("http://[::1]:9").authority == "[::1]:9"


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://x", "http://", "http://x/?q=1", "http://u:p@x", "http://x/ö"]
)
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"http|path"):
        Target.parse(url)
