"""Guards connections against clients who send or read slowly, or come too often.

aiohttp waits for ever for the rest of a header, and for ever for a client to read an answer. So a
guard stands before it as each connection's protocol, passes everything on, and keeps three clocks,
of which one runs at a time, and a fourth beside them::

    header ── a request begins ──▶ (none) ── it is answered ──▶ idle ── a byte comes ──▶ header
    writing: while the client has not read what was written

Knows HTTP only by what the middleware tells it: when a request begins and when it is answered.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Final, cast

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from understudy.actors.http_answers import HttpLimits
from understudy.actors.http_refusals import refusing

SWEEP_EVERY_S: Final = 0.5
HANDSHAKE_S: Final = 10.0
_NO_LINGER: Final = struct.pack("ii", 1, 0)
_TOO_MANY: Final = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nRetry-After: 1\r\n"
    b"retry-after-ms: 1000\r\nConnection: close\r\n\r\n"
)


class _Guard(asyncio.Protocol):
    """One connection."""

    __slots__ = ("_address", "_guards", "_inner", "_is_idle", "transport")

    def __init__(self, guards: ConnectionGuards, inner: asyncio.Protocol) -> None:
        self._guards = guards
        self._inner: asyncio.Protocol | None = inner
        self._address = ""
        self._is_idle = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert self._inner is not None
        # Those of uvloop are none of asyncio's by class.
        transport = cast("asyncio.Transport", transport)
        self._address = _address(transport)
        if not self._guards.admit(self._address):
            self._inner = None
            transport.write(_TOO_MANY)
            transport.close()
            return
        self.transport = transport
        self._guards.by_transport[transport] = self
        self._guards.reading[self] = self._guards.now()
        self._inner.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._is_idle:
            self._is_idle = False
            self._guards.idle.pop(self, None)
            self._guards.reading[self] = self._guards.now()
        if self._inner is not None:
            self._inner.data_received(data)

    def eof_received(self) -> bool | None:
        return None if self._inner is None else self._inner.eof_received()

    def pause_writing(self) -> None:
        self._guards.unread[self] = self._guards.now()
        if self._inner is not None:
            self._inner.pause_writing()

    def resume_writing(self) -> None:
        self._guards.unread.pop(self, None)
        if self._inner is not None:
            self._inner.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._inner is None or self.transport is None:
            return
        self._guards.forget(self, self._address)
        inner, self._inner, self.transport = self._inner, None, None
        inner.connection_lost(exc)

    def begin_request(self) -> None:
        """A header has come, whole."""
        self._is_idle = False
        self._guards.reading.pop(self, None)
        self._guards.idle.pop(self, None)

    def end_request(self) -> None:
        """The request is answered, as far as we are concerned."""
        if self.transport is not None and not self.transport.is_closing():
            self._is_idle = True
            self._guards.idle[self] = self._guards.now()

    def abort(self) -> None:
        """End the connection the hard way: the kernel would go on to keep what is not read."""
        if self.transport is None:
            return
        connection = self.transport.get_extra_info("socket")
        if connection is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self.transport.abort()


class ConnectionGuards:
    """All connections of a server, by what they are waited for, the longest first.

    Args:
        limits: How long they are waited for, and how many one address may have.
        now: The time of the event loop.
    """

    def __init__(self, limits: HttpLimits, now: Callable[[], float]) -> None:
        self._limits = limits
        self.now = now
        self.by_transport: dict[asyncio.BaseTransport, _Guard] = {}
        self.reading: dict[_Guard, float] = {}
        self.idle: dict[_Guard, float] = {}
        self.unread: dict[_Guard, float] = {}
        self._by_address: dict[str, int] = {}
        self._sweeper: asyncio.TimerHandle | None = None

    @property
    def num_connections(self) -> int:
        """How many connections there are."""
        return len(self.by_transport)

    def guarded(self, make: Callable[[], asyncio.Protocol]) -> Callable[[], asyncio.Protocol]:
        """A factory of guards, each before one of what ``make`` gives."""
        return lambda: _Guard(self, make())

    def middleware(self) -> Middleware:
        """Tells the guard of a connection when a request begins and when it is answered."""

        @web.middleware
        async def watch(request: web.Request, handler: Handler) -> web.StreamResponse:
            transport = request.transport
            guard = None if transport is None else self.by_transport.get(transport)
            if guard is None:
                return await handler(request)
            guard.begin_request()
            try:
                return await handler(request)
            finally:
                guard.end_request()

        return watch

    def start(self) -> None:
        """Look after the connections from now on."""
        loop = asyncio.get_running_loop()
        self._sweeper = loop.call_later(SWEEP_EVERY_S, self._sweep_again)

    def stop(self) -> None:
        """Look after nobody any more."""
        if self._sweeper is not None:
            self._sweeper.cancel()

    def sweep(self) -> None:
        """End the connections that were waited for long enough."""
        now, limits = self.now(), self._limits
        for waiting, limit_s in (
            (self.reading, limits.header_timeout_s),
            (self.idle, limits.idle_timeout_s),
            (self.unread, limits.write_timeout_s),
        ):
            while waiting:
                guard, since = next(iter(waiting.items()))
                if now < since + limit_s:
                    break
                del waiting[guard]
                guard.abort()

    def admit(self, address: str) -> bool:
        """Whether an address may have one more connection, which is counted then."""
        count = self._by_address.get(address, 0)
        if count >= self._limits.connections_per_address:
            return False
        self._by_address[address] = count + 1
        return True

    def forget(self, guard: _Guard, address: str) -> None:
        """A connection has ended."""
        assert guard.transport is not None
        self.by_transport.pop(guard.transport, None)
        for waiting in (self.reading, self.idle, self.unread):
            waiting.pop(guard, None)
        self._by_address[address] -= 1
        if not self._by_address[address]:
            del self._by_address[address]

    def _sweep_again(self) -> None:
        self.sweep()
        self.start()


class GuardedSite(web.SockSite):
    """A site whose connections are guarded."""

    __slots__ = ("_guards",)

    def __init__(
        self,
        runner: web.AppRunner,
        listener: socket.socket,
        guards: ConnectionGuards,
        *,
        ssl_context: ssl.SSLContext | None,
        backlog: int,
    ) -> None:
        super().__init__(runner, listener, ssl_context=ssl_context, backlog=backlog)
        self._guards = guards

    async def start(self) -> None:
        """Take connections from now on."""
        await web.BaseSite.start(self)
        server = self._runner.server
        assert server is not None
        self._server = await asyncio.get_running_loop().create_server(
            self._guards.guarded(refusing(server)),
            sock=self._sock,
            ssl=self._ssl_context,
            backlog=self._backlog,
            ssl_handshake_timeout=None if self._ssl_context is None else HANDSHAKE_S,
        )


def _address(transport: asyncio.BaseTransport) -> str:
    """Whose a connection is: its IPv4 address, or its network of IPv6, which one host has whole."""
    peer = transport.get_extra_info("peername")
    if not isinstance(peer, tuple):
        return ""
    try:
        address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    except ValueError:
        return str(peer[0])
    if isinstance(address, ipaddress.IPv6Address):
        mapped = address.ipv4_mapped
        return str(mapped) if mapped else str(ipaddress.ip_network((address, 64), strict=False))
    return str(address)
