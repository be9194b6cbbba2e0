"""A cheap streaming client: raw HTTP/1.1 over asyncio transports, with kept-alive connections.

It shares its processor with the server under test, so a token costs one ``data_received``, a few
operations on bytes and one reading of the clock; no JSON, no future, no task. It never retries:
what goes wrong is told to the caller as a Failure.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from typing import Final, NamedTuple, cast
from urllib.parse import urlsplit

from understudy.tools.bench.events import CompletionStream, EventParser, Failure
from understudy.tools.bench.response import (
    HEAD_BYTES_MAX,
    BodyDecoder,
    MalformedResponse,
    ResponseHead,
    UntilCloseDecoder,
    body_decoder,
    parse_head,
)

CONNECT_TIMEOUT_S: Final = 10.0
ERROR_BODY_BYTES_MAX: Final = 65_536
_CLOSE: Final = "Connection: close\r\n"


class Target(NamedTuple):
    """Where requests go, from a base URL such as ``http://127.0.0.1:8000``."""

    host: str
    port: int
    is_tls: bool
    path_prefix: str
    """What comes before ``/v1/...``; empty for a server at the root."""

    @classmethod
    def parse(cls, base_url: str) -> Target:
        """Read a base URL; a trailing ``/v1`` may be there or not.

        Raises:
            ValueError: It is no http or https URL with a host.
        """
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{base_url!r} is no http:// or https:// address")
        if parts.query or parts.fragment or parts.username is not None:
            raise ValueError(f"{base_url!r}: only a scheme, a host, a port and a path may be given")
        is_tls = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        if not (prefix.isascii() and prefix.isprintable() and " " not in prefix):
            raise ValueError(f"{base_url!r}: the path holds characters that a URL cannot")
        return cls(parts.hostname, parts.port or (443 if is_tls else 80), is_tls, prefix)

    @property
    def authority(self) -> str:
        """The ``Host`` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


class Ending(NamedTuple):
    """How one exchange ended."""

    ended_at_s: float
    failure: Failure | None = None
    retry_after_s: float | None = None


class Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._waiter: asyncio.Future[Ending] | None = None
        self._stream = CompletionStream()
        self._events = EventParser()
        self._expected_tokens: int | None = None
        self._head_bytes = b""
        self._head: ResponseHead | None = None
        self._decoder: BodyDecoder | None = None
        self._error_body = bytearray()
        self.is_open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the event loop."""
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True

    def exchange(
        self, request: bytes, stream: CompletionStream, *, expected_tokens: int | None
    ) -> asyncio.Future[Ending]:
        """Send one request; the future ends with the response, never with an exception."""
        assert self._waiter is None, "one request at a time"
        assert self._transport is not None
        assert self.is_open
        self._stream = stream
        self._events = EventParser()
        self._expected_tokens = expected_tokens
        self._head_bytes = b""
        self._head = None
        self._decoder = None
        self._error_body.clear()
        waiter: asyncio.Future[Ending] = asyncio.get_running_loop().create_future()
        self._waiter = waiter
        self._transport.write(request)
        return waiter

    def data_received(self, data: bytes) -> None:
        """Called by the event loop with every read."""
        now_s = time.monotonic()
        try:
            if self._decoder is None:
                rest = self._read_head(data)
                if rest is None:
                    return
                data = rest
            self._read_body(data, now_s)
        except (MalformedResponse, ValueError) as error:
            self._end(Failure("bad_response", str(error)), now_s)
            self.abort()

    def _read_head(self, data: bytes) -> bytes | None:
        """Collect the head; give what follows it, or None while it is not whole."""
        if self._waiter is None:
            raise MalformedResponse("bytes that no request asked for")
        while True:
            self._head_bytes += data
            head, end, rest = self._head_bytes.partition(b"\r\n\r\n")
            if not end:
                if len(self._head_bytes) > HEAD_BYTES_MAX:
                    raise MalformedResponse("the response's head is too long")
                return None
            self._head_bytes = b""
            parsed = parse_head(head)
            if parsed.status >= 200:
                break
            data = rest
        self._head = parsed
        self._decoder = body_decoder(parsed)
        return rest

    def _read_body(self, data: bytes, now_s: float) -> None:
        decoder = self._decoder
        head = self._head
        assert decoder is not None
        assert head is not None
        payload = decoder.feed(data)
        if head.status == 200:
            blocks = self._events.feed(payload)
            if blocks:
                self._stream.arrive(blocks, now_s)
        elif len(self._error_body) < ERROR_BODY_BYTES_MAX:
            self._error_body += payload
        if decoder.is_finished:
            self._end(self._verdict(), now_s)
            if not head.is_kept_alive:
                self.abort()

    def _verdict(self) -> Failure | None:
        """Judge the finished response."""
        assert self._head is not None
        if self._head.status != 200:
            detail = bytes(self._error_body[:500]).decode("utf-8", "replace")
            return Failure(f"http_{self._head.status}", detail)
        kind = self._head.headers.get("content-type", "")
        if not kind.startswith("text/event-stream"):
            return Failure("bad_response", f"content-type {kind[:80]!r}, not text/event-stream")
        return self._stream.close(expected_tokens=self._expected_tokens)

    def _end(self, failure: Failure | None, now_s: float) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            retry_after_s = self._head.retry_after_s if failure and self._head else None
            waiter.set_result(Ending(now_s, failure, retry_after_s))

    def connection_lost(self, error: Exception | None) -> None:
        """Called by the event loop: an unfinished response is cut, however far it came."""
        self.is_open = False
        if self._waiter is None:
            return
        # A body without length or chunks ends with the connection: then the stream's own
        # marks, [DONE] and the finish reason, tell whether it is whole.
        if error is None and isinstance(self._decoder, UntilCloseDecoder):
            failure = self._verdict()
        else:
            why = f": {error}" if error else ""
            failure = self._stream.failure or Failure("stream_cut", f"the connection closed{why}")
        self._end(failure, time.monotonic())

    def expire(self, timeout_s: float) -> None:
        """End the running exchange as timed out, and the connection with it."""
        detail = f"no end after {timeout_s:g} s"
        self._end(Failure("timeout", detail), time.monotonic())
        self.abort()

    def abort(self) -> None:
        """Close at once."""
        self.is_open = False
        if self._transport is not None:
            self._transport.abort()


class Client:
    """Sends requests to one path of one server over a pool of kept-alive connections.

    At most ``connections_max`` are open; a request beyond that fails with ``client_limit``, since
    a wait in the client would hide from the figures.
    """

    def __init__(
        self,
        target: Target,
        path: str,
        *,
        api_key: str | None = None,
        connections_max: int,
        timeout_s: float,
        keeps_alive: bool = True,
    ) -> None:
        """Without ``keeps_alive`` each request has a connection of its own."""
        self._keeps_alive = keeps_alive
        self._target = target
        self._timeout_s = timeout_s
        self._connections_max = connections_max
        self._idle: deque[Connection] = deque()
        self._num_busy = 0
        self._tls = ssl.create_default_context() if target.is_tls else None
        authorization = "" if api_key is None else f"Authorization: Bearer {api_key}\r\n"
        self._head = (
            f"POST {target.path_prefix}{path} HTTP/1.1\r\n"
            f"Host: {target.authority}\r\n"
            f"{authorization}"
            f"{'' if keeps_alive else _CLOSE}"
            "User-Agent: understudy-bench\r\n"
            "Accept: text/event-stream\r\n"
            "Content-Type: application/json\r\n"
            "Content-Length: "
        ).encode("latin-1")

    async def connect(self, num_connections: int) -> None:
        """Open connections before the clock starts.

        Raises:
            OSError: The server cannot be reached.
        """
        for _ in range(num_connections):
            self._idle.append(await self._open())

    async def complete(
        self, body: bytes, stream: CompletionStream, *, expected_tokens: int | None
    ) -> Ending:
        """Send one JSON body and read the answer into ``stream``; every fault is in the Ending."""
        if self._num_busy >= self._connections_max:
            detail = f"{self._connections_max} requests are under way"
            return Ending(time.monotonic(), Failure("client_limit", detail))
        self._num_busy += 1
        try:
            try:
                connection = self._pop_idle() or await self._open()
            except OSError as error:
                return Ending(time.monotonic(), Failure("connect", str(error)))
            return await self._exchange(connection, body, stream, expected_tokens)
        finally:
            self._num_busy -= 1

    async def _exchange(
        self,
        connection: Connection,
        body: bytes,
        stream: CompletionStream,
        expected_tokens: int | None,
    ) -> Ending:
        request = b"%b%d\r\n\r\n%b" % (self._head, len(body), body)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, connection.expire, self._timeout_s)
        try:
            ending = await connection.exchange(request, stream, expected_tokens=expected_tokens)
        except asyncio.CancelledError:
            connection.abort()
            raise
        finally:
            timer.cancel()
        if connection.is_open and self._keeps_alive:
            self._idle.append(connection)
        else:
            connection.abort()
        return ending

    def _pop_idle(self) -> Connection | None:
        """The connection that was used last, if it is still open."""
        while self._idle:
            connection = self._idle.pop()
            if connection.is_open:
                return connection
        return None

    async def _open(self) -> Connection:
        loop = asyncio.get_running_loop()
        target = self._target
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    Connection, target.host, target.port, ssl=self._tls
                )
        except TimeoutError:
            raise TimeoutError(f"no connection within {CONNECT_TIMEOUT_S:g} s") from None
        return connection

    def close(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().abort()
