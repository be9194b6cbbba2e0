"""What becomes of goodput and of refusals when more is asked than can be served (O1, O2).

Two echo engines have a fixed pace, so that their capacity is known: 2 x 16 streams of 50 tokens/s.
Requests of 32 tokens arrive as a Poisson process at 1x ... 10x of it. From the repository's root:

    PYTHONPATH=deploy/editable:. python -m tests.performance.overload

*Goodput* is tokens of complete streams that ended in the measured time; *refused* is from sending
the request to the refusal's header. Then a burst of three times what the queue and the engines hold
comes at once, and whoever is refused comes back when told (O2). Nothing is asserted: the figures
are for people. The clients share the machine with the server, and the machine its host: the load
average, and how much the host took (*stolen*), are part of them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from pathlib import Path
from typing import Final, NamedTuple

import uvloop

from tests.cluster import running_cluster
from tests.performance.connections import (
    Connection,
    StolenTime,
    allow_files,
    close_all,
    completion,
    connect,
    load_average,
    percentile,
)

ENGINES: Final = 2
SEQUENCES: Final = 16
TOKENS_PER_S: Final = 50
TOKENS: Final = 32
CAPACITY: Final = ENGINES * SEQUENCES * TOKENS_PER_S / TOKENS
"""Requests a second."""
QUEUE_MAX: Final = 64
MULTIPLES: Final = (1.0, 2.0, 3.0, 5.0, 10.0)
WARM_UP_S: Final = 3.0
ROW: Final = "{:>7} {:>9} {:>9} {:>9} {:>12} {:>12} {:>14} {:>8}"


class Level(NamedTuple):
    """One load, and what became of it."""

    multiple: float
    offered: int
    goodput: float
    """Tokens a second."""
    refused: int
    refused_ms_p50: float
    refused_ms_p99: float
    without_retry_after: int
    other: int
    """Neither complete nor refused."""
    stolen: float
    """The share of the processors' time that the host took."""


async def offer(url: str, multiple: float, duration_s: float, prompt: str) -> Level:
    """Have requests arrive for so long after a warm-up."""
    chance = random.Random(17)
    connections: list[Connection] = []
    calls: set[asyncio.Task[None]] = set()

    async def call() -> None:
        request = completion(prompt=prompt, max_tokens=TOKENS)
        connections.append(await connect(url, request))

    host = StolenTime()
    began_at = time.monotonic()
    measured_at, end_at = began_at + WARM_UP_S, began_at + WARM_UP_S + duration_s
    due_at = began_at
    while (due_at := due_at + chance.expovariate(multiple * CAPACITY)) < end_at:
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        task = asyncio.ensure_future(call())
        calls.add(task)
        task.add_done_callback(calls.discard)
    stolen = host.share()
    if calls:
        await asyncio.wait(calls)
    async with asyncio.timeout(60):
        await asyncio.gather(*(connection.closed for connection in connections))
    measured = [one for one in connections if measured_at <= one.sent_at < end_at]
    refused = [one for one in measured if one.status in {429, 503}]
    waited_ms = [1e3 * (one.answered_at - one.sent_at) for one in refused]
    complete = [
        one for one in connections if one.is_complete and measured_at <= one.ended_at < end_at
    ]
    return Level(
        multiple,
        len(measured),
        TOKENS * len(complete) / duration_s,
        len(refused),
        percentile(waited_ms, 0.5),
        percentile(waited_ms, 0.99),
        sum(one.retry_after_s is None for one in refused),
        sum(not one.is_complete for one in measured) - len(refused),
        stolen,
    )


async def come_back(url: str, num_clients: int) -> tuple[int, int, list[float]]:
    """A burst; gives how many were refused, how many of them were then taken, and their waits."""
    waits: list[float] = []
    connections: list[Connection] = []

    async def client() -> bool | None:
        request = completion(prompt="hello", max_tokens=TOKENS)
        first = await connect(url, request)
        connections.append(first)
        await first.answered
        if first.status == 200:
            return None
        assert first.retry_after_s is not None
        waits.append(first.retry_after_s)
        await asyncio.sleep(first.retry_after_s)
        second = await connect(url, request)
        connections.append(second)
        await second.answered
        return second.status == 200

    answers = await asyncio.gather(*(client() for _ in range(num_clients)))
    await asyncio.gather(*(connection.closed for connection in connections))
    await close_all(connections)
    again = [answer for answer in answers if answer is not None]
    return len(again), sum(again), waits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--duration", type=float, default=8.0, help="seconds of each load (8)")
    parser.add_argument("--multiples", type=float, nargs="*", default=MULTIPLES)
    parser.add_argument("--words", type=int, default=200, help="of each prompt (200)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    allow_files()
    flags = (f"--max-num-seqs={SEQUENCES}",)
    environment = {
        "UNDERSTUDY_ECHO_TOKENS_PER_S": str(TOKENS_PER_S),
        "UNDERSTUDY_QUEUE_MAX": str(QUEUE_MAX),
    }
    levels = []
    with running_cluster(*flags, engines=ENGINES, environment=environment) as cluster:
        url = cluster.base_url
        print(f"capacity {CAPACITY:g} requests/s; load average {load_average()}")
        uvloop.run(offer(url, 1.0, 1.0, "hello"))
        heads = ("offered", "requests", "tokens/s", "refused", "p50 ms", "p99 ms")
        print(ROW.format(*heads, "no Retry-After", "stolen"))
        for multiple in arguments.multiples:
            level = uvloop.run(offer(url, multiple, arguments.duration, "word " * arguments.words))
            levels.append(level)
            print(
                ROW.format(
                    f"{multiple:g}x",
                    level.offered,
                    f"{level.goodput:.0f}",
                    level.refused,
                    f"{level.refused_ms_p50:.1f}",
                    f"{level.refused_ms_p99:.1f}",
                    level.without_retry_after,
                    f"{level.stolen:.1%}",
                )
                + (f"  {level.other} neither" if level.other else ""),
                flush=True,
            )
        peak = max(level.goodput for level in levels)
        for level in levels:
            print(f"goodput at {level.multiple:g}x: {level.goodput / peak:.1%} of the peak")
        num_clients = 3 * (ENGINES * SEQUENCES + QUEUE_MAX)
        refused, taken, waits = uvloop.run(come_back(url, num_clients))
        share = taken / refused if refused else 1.0
        print(
            f"burst of {num_clients}: {refused} were refused, {taken} ({share:.1%}) were taken at "
            f"their first retry, after {min(waits, default=0):.1f} to {max(waits, default=0):.1f} s"
        )
        print(f"load average {load_average()}")
    if arguments.json:
        figures = [level._asdict() for level in levels]
        arguments.json.write_text(
            json.dumps({"levels": figures, "refused": refused, "taken": taken}, indent=2)
        )


if __name__ == "__main__":
    main()
