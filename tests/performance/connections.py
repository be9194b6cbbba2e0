"""Raw HTTP connections for crowds of clients: cheap enough that the server is what is measured."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import resource
import socket
import time
from pathlib import Path
from typing import Any, Final, cast
from urllib.parse import urlsplit

from tests.cluster import Cluster

PAGE_BYTES: Final = os.sysconf("SC_PAGE_SIZE")


class Connection(asyncio.Protocol):
    """One request on a connection of its own, and when what came of it."""

    def __init__(self, request: bytes, *, reads: bool = True, keeps_times: bool = False) -> None:
        self._request = request
        self._reads = reads
        self._keeps_times = keeps_times
        self._tail = b""
        self.sent_at = 0.0
        self.status = 0
        """Of HTTP; 0 until a header has come."""
        self.header = b""
        self.answered_at = 0.0
        self.ended_at = 0.0
        self.is_complete = False
        """Whether a stream came to its ``[DONE]``."""
        self.times: list[float] = []
        """When something was read, if that is asked for."""
        self.answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        if not self._reads:
            # Not at once: uvloop begins to read only after this, and would undo it.
            asyncio.get_running_loop().call_soon(self.transport.pause_reading)
            connection = self.transport.get_extra_info("socket")
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.sent_at = time.monotonic()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        if not self.status:
            self.status = int(data[9:12])
            self.header = data.partition(b"\r\n\r\n")[0].lower()
            self.answered_at = now
            self.answered.set_result(None)
            if self.status != 200:
                self.close()
        if self._keeps_times:
            self.times.append(now)
        self._tail = (self._tail + data)[-32:]
        if b"[DONE]" in self._tail and not self.is_complete:
            self.is_complete = True
            self.ended_at = now
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.ended_at = self.ended_at or time.monotonic()
        for future in (self.answered, self.closed):
            if not future.done():
                future.set_result(None)

    def close(self) -> None:
        if self.transport is not None:
            self.transport.close()

    @property
    def retry_after_s(self) -> float | None:
        """What the answer says of when to come back; ``None`` unless in both headers."""
        named = dict(
            line.split(b": ", 1) for line in self.header.split(b"\r\n")[1:] if b": " in line
        )
        if b"retry-after" not in named or b"retry-after-ms" not in named:
            return None
        return float(named[b"retry-after-ms"]) / 1e3


def completion(**fields: Any) -> bytes:
    """A whole request for a streamed completion."""
    body = json.dumps({"model": "understudy-demo", "stream": True, "ignore_eos": True} | fields)
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


async def connect(
    cluster_url: str, request: bytes, *, reads: bool = True, keeps_times: bool = False
) -> Connection:
    """Send a request on a new connection."""
    address = urlsplit(cluster_url)
    assert address.hostname is not None
    assert address.port is not None
    _, connection = await asyncio.get_running_loop().create_connection(
        lambda: Connection(request, reads=reads, keeps_times=keeps_times),
        address.hostname,
        address.port,
    )
    return connection


async def close_all(connections: list[Connection]) -> None:
    """Close them, and wait until they are."""
    for connection in connections:
        connection.close()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await asyncio.gather(*(connection.closed for connection in connections))


def allow_files() -> int:
    """Have as many open files as one may; gives how many."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def resident_bytes(cluster: Cluster) -> int:
    """What the gateway has in memory."""
    statm = Path(f"/proc/{cluster.pids()['gateway-0']}/statm")
    return int(statm.read_text(encoding="ascii").split()[1]) * PAGE_BYTES


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that is as large as so many of a hundred."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


class StolenTime:
    """What the host took of this machine's processors since this was made, as a share of all time.

    Of a virtual machine that shares its host: while its processors are stolen nobody answers, and
    no figure of the last percentile means what it says.
    """

    def __init__(self) -> None:
        self._stolen, self._all = _processor_times()

    def share(self) -> float:
        """Since this was made, or asked the last time."""
        stolen, everything = _processor_times()
        share = (stolen - self._stolen) / max(1, everything - self._all)
        self._stolen, self._all = stolen, everything
        return share


def _processor_times() -> tuple[int, int]:
    """Ticks that were stolen, and all ticks (proc_stat(5): user ... softirq, steal)."""
    with Path("/proc/stat").open(encoding="ascii") as lines:
        ticks = [int(field) for field in lines.readline().split()[1:9]]
    return ticks[7], sum(ticks)


def load_average() -> str:
    return " ".join(f"{load:.1f}" for load in os.getloadavg())
