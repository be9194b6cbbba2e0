"""What a streamed token costs in the gateway's process, against a bare aiohttp server.

Both servers get their tokens in steps, one for each of the streams, as an engine gives them, and
both encode one JSON chunk a token. The clients are in a process of their own and throw away what
they read. From the root of the repository:

    PYTHONPATH=deploy/editable:. python -m tests.performance.sse_path --streams 64 --tokens 2000

prints microseconds of CPU for each token. Nothing is asserted: it is for people.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import uvloop
from aiohttp import web

from tests.tiny_models import write_model
from understudy.actors.http_server import serve_http
from understudy.actors.scripted_gateway import ScriptedGateway
from understudy.protocol.request import FinishReason, Request
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.listening import listen
from understudy.runtime.served_model import ServedModel

RESULT = "{name:<12} {cpu_us:6.2f} us of CPU a token ({user_us:.2f} user), {rate:8.0f} tokens/s"


class Cost(NamedTuple):
    """What a measurement took, in seconds."""

    cpu_s: float
    user_s: float
    wall_s: float


class Meter:
    """Measures this process from its construction on."""

    def __init__(self) -> None:
        self._times = os.times()
        self._started = time.perf_counter()

    def read(self) -> Cost:
        user_s = os.times().user - self._times.user
        system_s = os.times().system - self._times.system
        return Cost(user_s + system_s, user_s, time.perf_counter() - self._started)


class Reader(asyncio.Protocol):
    """Posts one request and reads to the end."""

    def __init__(self, done: asyncio.Future[int], body: bytes) -> None:
        self._done = done
        self._body = body
        self._num_bytes = 0
        self._tail = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n" % len(self._body)
        )
        cast("asyncio.Transport", transport).write(head + self._body)

    def data_received(self, data: bytes) -> None:
        self._num_bytes += len(data)
        self._tail = (self._tail + data)[-64:]
        if b"[DONE]" in self._tail and not self._done.done():
            self._done.set_result(self._num_bytes)


def read_streams(port: int, num_streams: int, num_tokens: int) -> None:
    """The clients' process."""
    body = msgspec.json.encode(
        {"prompt": [1], "stream": True, "max_tokens": num_tokens, "ignore_eos": True}
    )

    async def main() -> None:
        loop = asyncio.get_running_loop()
        ends = []
        for _ in range(num_streams):
            end: asyncio.Future[int] = loop.create_future()
            await loop.create_connection(partial(Reader, end, body), "127.0.0.1", port)
            ends.append(end)
        await asyncio.gather(*ends)

    uvloop.run(main())


async def run_steps(gateway: ScriptedGateway, num_streams: int, num_tokens: int) -> None:
    """Answer as engines do: a token for each stream in each step."""
    await gateway.wait_until(lambda gateway: len(gateway.submitted) == num_streams)
    requests: list[Request] = gateway.submitted
    for step in range(num_tokens):
        finish = FinishReason.LENGTH if step == num_tokens - 1 else 0
        for request in requests:
            gateway.deliver(request, 300 + step % 100, finish=finish)
        await asyncio.sleep(0)


async def serve_understudy(num_streams: int, num_tokens: int) -> Cost:
    gateway = ScriptedGateway()
    with tempfile.TemporaryDirectory() as directory:
        write_model(Path(directory), max_position_embeddings=1 << 20)
        served = ServedModel.from_directory(Path(directory), name="tiny", max_model_len=None)
    listener = listen("127.0.0.1", 0)
    runner = await serve_http(
        gateway, gateway.wake, served, listener=listener, clock=MonotonicClock()
    )
    port = listener.getsockname()[1]
    client = multiprocessing.get_context("spawn").Process(
        target=read_streams, args=(port, num_streams, num_tokens)
    )
    client.start()
    await gateway.wait_until(lambda gateway: len(gateway.submitted) == num_streams)
    meter = Meter()
    await run_steps(gateway, num_streams, num_tokens)
    await asyncio.to_thread(client.join)
    cost = meter.read()
    await runner.cleanup()
    return cost


async def serve_bare(num_streams: int, num_tokens: int) -> Cost:
    """The least aiohttp handler that streams JSON chunks."""
    step_ended = asyncio.Event()
    all_ready = asyncio.Event()
    num_ready = 0

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal num_ready
        await request.read()
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        num_ready += 1
        if num_ready == num_streams:
            all_ready.set()
        for index in range(num_tokens):
            await step_ended.wait()
            chunk: dict[str, Any] = {
                "id": "cmpl-0123456789abcdef",
                "object": "text_completion",
                "created": 1700000000,
                "model": "tiny",
                "choices": [
                    {"index": 0, "text": f"t{index}", "logprobs": None, "finish_reason": None}
                ],
            }
            await response.write(b"data: " + msgspec.json.encode(chunk) + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    app = web.Application()
    app.router.add_post("/v1/completions", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    listener = listen("127.0.0.1", 0)
    await web.SockSite(runner, listener).start()
    client = multiprocessing.get_context("spawn").Process(
        target=read_streams, args=(listener.getsockname()[1], num_streams, num_tokens)
    )
    client.start()
    await all_ready.wait()
    meter = Meter()
    for _ in range(num_tokens):
        ended, step_ended = step_ended, asyncio.Event()
        ended.set()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.to_thread(client.join)
    cost = meter.read()
    await runner.cleanup()
    return cost


def main() -> None:
    """Measure both, alternately."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    total = arguments.streams * arguments.tokens
    for _ in range(arguments.rounds):
        for name, serve in (("bare aiohttp", serve_bare), ("understudy", serve_understudy)):
            cost = uvloop.run(serve(arguments.streams, arguments.tokens))
            print(
                RESULT.format(
                    name=name,
                    cpu_us=1e6 * cost.cpu_s / total,
                    user_us=1e6 * cost.user_s / total,
                    rate=total / cost.wall_s,
                )
            )


if __name__ == "__main__":
    main()
