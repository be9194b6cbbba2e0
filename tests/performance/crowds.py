"""Crowds that behave badly or do nothing: what they cost the others, and what they leave behind.

    PYTHONPATH=deploy/editable:. python -m tests.performance.crowds [unread half-sent …]

| crowd | what is done | what is wanted |
|---|---|---|
| unread | 500 clients that do not read, beside 50 that do (O4) | p99 ITL + 10 %, 64 MiB |
| half-sent | 5,000 connections with half a header (O5) | all are closed within 10 s |
| disconnects | 10,000 streams left at random times (O6) | all blocks are back within 1 s |
| idle | 5,000 streams on which next to nothing comes | 50 KB of the gateway each |

Each has a cluster of echo engines of its own, on the loopback. The clients share the machine with
it, and the machine its host, so the load average and the processor time that the host took belong
to the figures. Exit status 1 if a figure is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from typing import Final, NamedTuple

import uvloop

from tests.cluster import Cluster, running_cluster
from tests.performance.connections import (
    Connection,
    StolenTime,
    allow_files,
    close_all,
    completion,
    connect,
    load_average,
    percentile,
    resident_bytes,
)

READERS: Final = 50
MIB: Final = 1 << 20
FILL_S: Final = 14.0
"""In so long what the kernel keeps for a client is full, and in twice that nobody is given up."""
TURNS: Final = 3
"""Alone and beside in turns: one pause of the host is a gap for every reader, 1 % of a turn's."""
AT_ONCE: Final = 200
"""Connections that are opened or left at the same time."""


class Figure(NamedTuple):
    """What was found of a crowd."""

    what: str
    measured: str
    is_met: bool


def unread(size: int) -> Iterator[Figure]:
    """Clients that do not read, beside others that do."""
    environment = {"UNDERSTUDY_ECHO_TOKENS_PER_S": "10", "UNDERSTUDY_QUEUE_MAX": str(2 * size)}
    seats = f"--max-num-seqs={size + 2 * READERS}"
    with running_cluster(seats, engines=2, environment=environment) as cluster:
        alone, beside, grown = uvloop.run(_read_beside(cluster, size))
    growth = beside / alone - 1
    yield Figure(
        f"p99 ITL of {READERS} readers beside {size} who do not read",
        f"{1e3 * alone:.1f} ms alone, {1e3 * beside:.1f} ms beside them: {growth:+.1%}",
        growth < 0.1,
    )
    yield Figure("growth of the gateway's memory", f"{grown / MIB:.1f} MiB", grown < 64 * MIB)


async def _read_beside(cluster: Cluster, size: int) -> tuple[float, float, int]:
    """The readers' p99 ITL alone and beside the others, and the most the gateway has grown by."""
    url = cluster.base_url
    # With log probabilities, so that what is not read soon fills all buffers.
    long = completion(prompt="hello", max_tokens=900, logprobs=3)
    alone: list[float] = []
    beside: list[float] = []
    grown = 0
    before = 0
    for _ in range(TURNS):
        await asyncio.to_thread(_wait_until_empty, cluster)
        alone += await _gaps_s(url)
        # What the first readers load stays, however many come.
        before = before or await asyncio.to_thread(resident_bytes, cluster)
        silent = [await connect(url, long, reads=False) for _ in range(size)]
        await asyncio.sleep(FILL_S)
        assert not any(one.closed.done() for one in silent), "somebody was given up too soon"
        beside += await _gaps_s(url)
        grown = max(grown, await asyncio.to_thread(resident_bytes, cluster) - before)
        assert not any(one.status for one in silent), "somebody has read"
        await close_all(silent)
    return percentile(alone, 0.99), percentile(beside, 0.99), grown


async def _gaps_s(url: str) -> list[float]:
    """The times between two reads of those who read."""
    # With log probabilities every token is an event; without, half a character waits for the other.
    request = completion(prompt="hello", max_tokens=120, logprobs=0)
    readers = [await connect(url, request, keeps_times=True) for _ in range(READERS)]
    async with asyncio.timeout(120):
        await asyncio.gather(*(reader.closed for reader in readers))
    assert all(reader.is_complete for reader in readers), "a reader did not get all of its stream"
    return [after - one for reader in readers for one, after in pairwise(reader.times[1:-1])]


def half_sent(size: int) -> Iterator[Figure]:
    """Connections on which a header never ends."""
    with running_cluster(engines=1) as cluster:
        num_open, longest_s = uvloop.run(_send_halves(cluster.base_url, size))
    yield Figure(
        f"{size} half-sent headers",
        f"{num_open} are open after 15 s; the last to be closed was so after {longest_s:.2f} s",
        not num_open and longest_s <= 10,
    )


async def _send_halves(url: str, size: int) -> tuple[int, float]:
    half = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Ty"
    connections = await _many(lambda: connect(url, half), size)
    await asyncio.wait([connection.closed for connection in connections], timeout=15)
    closed = [one.ended_at - one.sent_at for one in connections if one.closed.done()]
    num_open = len(connections) - len(closed)
    await close_all(connections)
    return num_open, max(closed, default=float("nan"))


async def _many(open_one: Callable[[], Awaitable[Connection]], size: int) -> list[Connection]:
    """So many connections, some at a time."""
    opened: list[Connection] = []
    while len(opened) < size:
        count = min(AT_ONCE, size - len(opened))
        opened += await asyncio.gather(*(open_one() for _ in range(count)))
    return opened


def disconnects(size: int) -> Iterator[Figure]:
    """Streams that are left at random times."""
    environment = {"UNDERSTUDY_ECHO_TOKENS_PER_S": "200"}
    with running_cluster(engines=2, environment=environment) as cluster:
        pids = cluster.pids()
        num_taken = uvloop.run(_leave(cluster.base_url, size))
        back_s = _wait_until_empty(cluster)
        is_well = cluster.pids() == pids
    yield Figure(
        f"{size} disconnects at random times, {num_taken} after the first byte",
        f"all blocks are back after {back_s:.2f} s" + ("" if is_well else "; a process ended"),
        back_s < 1 and is_well,
    )


def _wait_until_empty(cluster: Cluster) -> float:
    """Wait until nobody has anything any more, for half a minute at most; gives how long."""
    began_at = time.monotonic()
    while not _is_empty(cluster) and time.monotonic() < began_at + 30:
        time.sleep(0.02)
    return time.monotonic() - began_at


def _is_empty(cluster: Cluster) -> bool:
    reply = cluster.reply()
    is_free = all(one.blocks_free == one.blocks_total for one in reply.engines)
    return is_free and not reply.running and not reply.queued


async def _leave(url: str, size: int) -> int:
    """Open streams and leave them; gives how many had begun to be answered."""
    chance = random.Random(23)
    room = asyncio.Semaphore(AT_ONCE)
    request = completion(prompt="hello", max_tokens=400)
    num_taken = 0

    async def one() -> None:
        nonlocal num_taken
        async with room:
            connection = await connect(url, request)
            if chance.random() < 0.7:
                await connection.answered
            await asyncio.sleep(chance.expovariate(8))
            num_taken += connection.status == 200
            assert connection.transport is not None
            if chance.random() < 0.5:
                connection.transport.abort()
            else:
                connection.close()
            await connection.closed

    await asyncio.gather(*(one() for _ in range(size)))
    return num_taken


def idle(size: int) -> Iterator[Figure]:
    """Streams on which a token comes every two seconds."""
    environment = {"UNDERSTUDY_ECHO_TOKENS_PER_S": "0.5", "UNDERSTUDY_QUEUE_MAX": str(2 * size)}
    seats = f"--max-num-seqs={min(4096, size)}"
    with running_cluster(seats, engines=2, environment=environment) as cluster:
        num_held, grown = uvloop.run(_hold(cluster, size))
    each = grown / max(num_held, 1)
    yield Figure(
        f"{num_held} of {size} idle streams",
        f"{grown / MIB:.0f} MiB of the gateway, {each / 1e3:.1f} KB for each",
        num_held == size and each < 50e3,
    )


async def _hold(cluster: Cluster, size: int) -> tuple[int, int]:
    """Hold streams; gives how many there are, and what the gateway has grown by."""
    url = cluster.base_url
    request = completion(prompt="hello", max_tokens=900)
    # What the first streams load stays, however many come.
    await close_all(await _many(lambda: connect(url, request), AT_ONCE))
    before = await asyncio.to_thread(resident_bytes, cluster)
    held = await _many(lambda: connect(url, request), size)
    await asyncio.wait([connection.answered for connection in held], timeout=60)
    grown = await asyncio.to_thread(resident_bytes, cluster) - before
    num_held = sum(one.status == 200 and not one.closed.done() for one in held)
    await close_all(held)
    return num_held, grown


CROWDS: Final = {
    "unread": (unread, 500),
    "half-sent": (half_sent, 5000),
    "disconnects": (disconnects, 10_000),
    "idle": (idle, 5000),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.performance.crowds")
    parser.add_argument("names", nargs="*", metavar="CROWD", help=f"of {', '.join(CROWDS)}")
    parser.add_argument("--size", type=int, help="of each crowd, if not that of the table")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - CROWDS.keys()
    if unknown:
        parser.error(f"there is no {', '.join(sorted(unknown))}")
    print(f"open files: {allow_files()}")
    is_met = True
    for name in arguments.names or CROWDS:
        measure, size = CROWDS[name]
        began_at = time.monotonic()
        host = StolenTime()
        for figure in measure(arguments.size or size):
            is_met = is_met and figure.is_met
            print(f"{'met   ' if figure.is_met else 'MISSED'} {figure.what}: {figure.measured}")
        took_s = time.monotonic() - began_at
        taken = f"stolen {host.share():.1%}"
        print(
            f"       ({name}: {took_s:.0f} s, load average {load_average()}, {taken})", flush=True
        )
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
