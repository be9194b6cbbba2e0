"""The least server that streams tokens: aiohttp and uvloop, and nothing behind them.

It is the yardstick for what Understudy's own path costs: one process, the same request, the same
chunk for each token, encoded by the same library. It makes up its tokens where it sends them.

    python -m understudy.tools.bench.bare_server --port 0 --tokens-per-s 50

prints its address as ``host:port`` and serves until it is terminated.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
import threading
import time
from typing import Any, Final

import msgspec
import uvloop
from aiohttp import web

MODEL: Final = "bare"
TEXT: Final = " token"


class _Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: None
    finish_reason: str | None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class _Chunk(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[_Choice]
    usage: _Usage | None = None


class _Body(msgspec.Struct):
    prompt: list[int]
    max_tokens: int


class Pacer:
    """Steps as an engine has them: one token for every stream at each, ``step_s`` apart.

    A thread ends the steps at whole multiples of ``step_s`` on the monotonic clock, since the
    loop's own timers are good to 1 ms only.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, step_s: float) -> None:
        self._loop = loop
        self._step_s = step_s
        self._step_ended = asyncio.Event()
        threading.Thread(target=self._run, name="pacer", daemon=True).start()

    async def step(self) -> None:
        """Wait for the end of the running step."""
        await self._step_ended.wait()

    def _run(self) -> None:
        while True:
            now_s = time.monotonic()
            time.sleep((now_s // self._step_s + 1) * self._step_s - now_s)
            self._loop.call_soon_threadsafe(self._end_step)

    def _end_step(self) -> None:
        ended, self._step_ended = self._step_ended, asyncio.Event()
        ended.set()


class FreeRunning:
    """No pace: a stream's next token is made in the loop's next turn.

    Without that turn between them, tokens of one stream would leave in one write, as no engine's
    would.
    """

    async def step(self) -> None:
        """Give way to the other streams."""
        await asyncio.sleep(0)


class BareServer:
    """Answers ``/v1/models`` and ``/v1/completions``, the latter as a stream only."""

    def __init__(self, steps: Pacer | FreeRunning) -> None:
        self._steps = steps
        self._next_id = 0
        self._encoder = msgspec.json.Encoder()
        self._decoder = msgspec.json.Decoder(_Body)

    def application(self) -> web.Application:
        """The aiohttp application."""
        application = web.Application()
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/completions", self._complete)
        return application

    async def _models(self, request: web.Request) -> web.Response:  # noqa: ARG002
        return web.json_response({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    async def _complete(self, request: web.Request) -> web.StreamResponse:
        body = self._decoder.decode(await request.read())
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self._next_id += 1
        # A request waits for the running step to end before a step makes tokens for it, too.
        await self._steps.step()
        chunk = _Chunk(f"cmpl-{self._next_id}", "text_completion", int(time.time()), MODEL, [])
        for position in range(body.max_tokens):
            await self._steps.step()
            finish_reason = "length" if position == body.max_tokens - 1 else None
            chunk.choices = [_Choice(0, TEXT, None, finish_reason)]
            await response.write(b"data: %b\n\n" % self._encoder.encode(chunk))
        chunk.choices = []
        prompt_tokens = len(body.prompt)
        chunk.usage = _Usage(prompt_tokens, body.max_tokens, prompt_tokens + body.max_tokens)
        await response.write(b"data: %b\n\ndata: [DONE]\n\n" % self._encoder.encode(chunk))
        await response.write_eof()
        return response


async def serve(host: str, port: int, tokens_per_s: float) -> None:
    """Serve until SIGTERM or SIGINT; 0 tokens/s is as fast as it can."""
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    steps = Pacer(loop, 1.0 / tokens_per_s) if tokens_per_s else FreeRunning()
    runner = web.AppRunner(BareServer(steps).application(), access_log=None, shutdown_timeout=0.0)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    address: Any = runner.addresses[0]
    sys.stdout.write(f"{address[0]}:{address[1]}\n")
    sys.stdout.flush()
    await stopped.wait()
    await runner.cleanup()


def main() -> None:
    """Read the flags and serve."""
    parser = argparse.ArgumentParser(description="A bare server that streams tokens.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: a free one")
    parser.add_argument("--tokens-per-s", type=float, default=0.0, help="of each stream; 0: all")
    arguments = parser.parse_args()
    uvloop.run(serve(arguments.host, arguments.port, arguments.tokens_per_s))


if __name__ == "__main__":
    main()
