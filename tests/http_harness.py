"""The HTTP server on loopback with the scripted gateway behind it, and a client in front."""

from __future__ import annotations

import asyncio
import io
import json
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

import aiohttp
import pytest
from aiohttp import web

from understudy.actors.http_access import FindKey
from understudy.actors.http_answers import HttpLimits
from understudy.actors.http_server import serve_http
from understudy.actors.scripted_gateway import ScriptedGateway
from understudy.protocol.request import Request
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.listening import listen
from understudy.runtime.kit.tls import Certificate
from understudy.runtime.served_model import ServedModel
from understudy.runtime.tokenizer import Tokenizer

T = TypeVar("T")

MODEL: Final = "tiny"
NOW: Final = 1_700_000_000.0
CHAT: Final = "/v1/chat/completions"
COMPLETIONS: Final = "/v1/completions"
HELLO: Final = [{"role": "user", "content": "hello"}]

Script = Callable[[Request], Iterable[int]]


class Event(NamedTuple):
    """One server-sent event, or a comment."""

    event_id: str | None
    data: Any
    """Decoded JSON, or the text itself if it is none."""
    comment: str | None = None


@dataclass
class Harness:
    """A running server, and a client for it."""

    gateway: ScriptedGateway
    served: ServedModel
    runner: web.AppRunner
    session: aiohttp.ClientSession
    host: str
    port: int
    clock: VirtualClock
    """The core's; nobody moves it but the test."""
    responses: list[aiohttp.ClientResponse] = field(default_factory=list)
    """What is to be closed in the end."""

    def tokens(self, text: str) -> list[int]:
        """The tokens of a text."""
        return self.served.tokenizer.encode(text, add_special_tokens=False)

    def post(self, path: str, body: Any = None, *, raw: bytes | None = None, **headers: str) -> Any:
        """Post JSON, or ``raw`` bytes."""
        data = json.dumps(body, ensure_ascii=False).encode() if raw is None else raw
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.session.post(
            path, data=io.BytesIO(data), headers={"Content-Type": "application/json", **named}
        )

    async def answer(self, path: str, body: Any, *, status: int = 200) -> Any:
        """The JSON of an answer with this status."""
        async with self.post(path, body) as response:
            answer = await response.json()
            assert response.status == status, answer
            return answer

    async def error(self, path: str, body: Any, *, status: int = 400) -> Any:
        """The error object of an answer with this status."""
        return error_of(await self.answer(path, body, status=status))

    async def leave(self, path: str, body: Any, *, after: int = 1) -> None:
        """Post, and close the connection when so many requests were submitted."""
        call = asyncio.ensure_future(self.answer(path, body))
        await self.submitted(after)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    async def stream(self, path: str, body: Any) -> list[Event]:
        """All events of a stream."""
        async with self.post(path, {**body, "stream": True}) as response:
            assert response.status == 200, await response.text()
            assert response.content_type == "text/event-stream"
            return [event async for event in events(response)]

    async def submitted(self, count: int = 1) -> Request:
        """The last request, once so many were submitted."""
        await self.gateway.wait_until(lambda gateway: len(gateway.submitted) >= count)
        return self.gateway.submitted[count - 1]

    async def cancelled(self, count: int = 1) -> None:
        """Wait until so many requests were cancelled."""
        await self.gateway.wait_until(lambda gateway: len(gateway.cancelled) >= count)


class SlowClient:
    """A connection with hardly any buffer, that reads when it is told to."""

    def __init__(self, harness: Harness) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._socket.setblocking(False)
        self._address = (harness.host, harness.port)

    async def post(self, body: bytes) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_connect(self._socket, self._address)
        head = (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        )
        await loop.sock_sendall(self._socket, head % len(body) + body)

    async def read_all(self) -> bytes:
        """All that the server sent."""
        loop = asyncio.get_running_loop()
        pieces = []
        while piece := await loop.sock_recv(self._socket, 1 << 16):
            pieces.append(piece)
        return b"".join(pieces)

    async def read_some(self) -> bytes:
        """What is there, once something is."""
        return await asyncio.get_running_loop().sock_recv(self._socket, 1 << 12)

    def reset(self) -> None:
        """Close it the hard way."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        self._socket.close()


async def beside(engine: Coroutine[Any, Any, None], client: Coroutine[Any, Any, T]) -> T:
    """What the client gets while the engine does its part."""
    playing = asyncio.ensure_future(engine)
    got = await client
    await playing
    return got


def error_of(answer: Any) -> Any:
    """The error of an answer, which must have OpenAI's form."""
    assert set(answer) == {"error"}
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    return error


async def events(response: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    """The events of a stream, as they come."""
    event_id = None
    data = None
    async for line in response.content:
        text = line.decode().removesuffix("\n")
        if text.startswith(": "):
            yield Event(None, None, text.removeprefix(": "))
        elif text.startswith("id: "):
            event_id = text.removeprefix("id: ")
        elif text.startswith("data: "):
            data = text.removeprefix("data: ")
        else:
            # Each empty line ends an event: behind a comment there is none.
            assert text == ""
            assert data is not None
            yield Event(event_id, data if data == "[DONE]" else json.loads(data))
            event_id = data = None


def chunks(stream: Iterable[Event]) -> list[Any]:
    """The chunks of a stream that ended well."""
    found = [event.data for event in stream if event.comment is None]
    assert found[-1] == "[DONE]"
    return found[:-1]


def text_of(stream: Iterable[Event], index: int = 0) -> str:
    """The text of one choice of a stream that ended well."""
    return "".join(
        choice["delta"]["content"] if "delta" in choice else choice["text"]
        for chunk in chunks(stream)
        for choice in chunk["choices"]
        if choice["index"] == index
    )


def saying(*tokens: int) -> Script:
    """A script that says these tokens to everyone, and then stops."""
    return lambda request: [*tokens, request.params.stop_token_ids[0]]


def saying_text(directory: Path, text: str) -> Script:
    """A script that says a text to everyone, in the tokens of the model there."""
    tokenizer = Tokenizer.from_directory(directory)
    return saying(*tokenizer.encode(text, add_special_tokens=False))


@asynccontextmanager
async def serving(
    directory: Path,
    script: Script | None = None,
    *,
    limits: HttpLimits | None = None,
    name: str = MODEL,
    wall_clock: Callable[[], float] = lambda: NOW,
    tool_parser: str | None = None,
    reasoning_parser: str | None = None,
    find_key: FindKey | None = None,
    certificate: Certificate | None = None,
) -> AsyncIterator[Harness]:
    """A server for the model in ``directory``."""
    served = ServedModel.from_directory(
        directory,
        name=name,
        max_model_len=None,
        tool_parser=tool_parser,
        reasoning_parser=reasoning_parser,
    )
    gateway = ScriptedGateway(script)
    clock = VirtualClock()
    listener = listen("127.0.0.1", 0)
    host, port = listener.getsockname()
    runner = await serve_http(
        gateway,
        gateway.wake,
        served,
        listener=listener,
        clock=clock,
        limits=limits or HttpLimits(shutdown_timeout_s=0.1),
        chance=random.Random(1),
        wall_clock=wall_clock,
        find_key=find_key,
        certificate=certificate,
    )
    try:
        async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
            harness = Harness(gateway, served, runner, session, host, port, clock)
            yield harness
            for response in harness.responses:
                response.close()
    finally:
        await runner.cleanup()
