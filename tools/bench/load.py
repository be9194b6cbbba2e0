"""Drives a workload at a server, closed or open, and collects what it saw.

*Closed loop*: N clients, each asks again as soon as it has its answer; the load follows the
server's speed. *Open loop*: requests arrive at their own times, whatever the server does; the
load does not let up when the server falls behind.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Final, NamedTuple, TypeAlias

from understudy.tools.bench.client import Client, Ending
from understudy.tools.bench.events import CompletionStream
from understudy.tools.bench.statistics import Samples
from understudy.tools.bench.workload import (
    LoadRequest,
    RequestBudget,
    Workload,
    pause_after_failure_s,
)

ERROR_EXAMPLES_MAX: Final = 16
"""For how many kinds of error the first example's words are kept."""


class Exchange(NamedTuple):
    """One request with its answer."""

    request: LoadRequest
    started_at_s: float
    lateness_s: float | None
    """Open loop: how long after its arrival time it was sent."""
    stream: CompletionStream
    ending: Ending


class Measurements:
    """What a run has shown so far. Latencies in seconds, of completed requests alone."""

    def __init__(self) -> None:
        self.time_to_first_token = Samples()
        self.inter_token_latency = Samples()
        self.time_per_output_token = Samples()
        self.end_to_end = Samples()
        self.lateness = Samples()
        """Open loop: how late requests were sent, against their arrival times."""
        self.num_sent = 0
        self.num_completed = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.arrivals = 0
        self.prompts_without_usage = 0
        self.errors: Counter[str] = Counter()
        self.error_examples: dict[str, str] = {}
        self._first_start_s = math.inf
        self._last_end_s = -math.inf

    @property
    def wall_s(self) -> float:
        """From the first request's start to the last one's end."""
        return max(0.0, self._last_end_s - self._first_start_s)

    def record(self, exchange: Exchange) -> None:
        """Take in one request that has ended."""
        stream, ending = exchange.stream, exchange.ending
        self.num_sent += 1
        self._first_start_s = min(self._first_start_s, exchange.started_at_s)
        self._last_end_s = max(self._last_end_s, ending.ended_at_s)
        if exchange.lateness_s is not None:
            self.lateness.add(exchange.lateness_s)
        if ending.failure is not None:
            kind, detail = ending.failure
            self.errors[kind] += 1
            if len(self.error_examples) < ERROR_EXAMPLES_MAX:
                self.error_examples.setdefault(kind, detail)
            return
        self.num_completed += 1
        self.output_tokens += stream.num_tokens
        self.arrivals += stream.arrivals
        if stream.num_prompt_tokens is None:
            self.prompts_without_usage += 1
        else:
            self.prompt_tokens += stream.num_prompt_tokens
        self.end_to_end.add(ending.ended_at_s - exchange.started_at_s)
        first_s, last_s = stream.first_token_at_s, stream.last_token_at_s
        if first_s is None or last_s is None:
            return
        self.time_to_first_token.add(first_s - exchange.started_at_s)
        self.inter_token_latency.extend(stream.gaps_s)
        if stream.num_tokens > 1:
            self.time_per_output_token.add((last_s - first_s) / (stream.num_tokens - 1))


Record: TypeAlias = Callable[[Exchange], None]
"""Takes in one request that has ended; called on the event loop."""


async def run_closed_loop(
    client: Client, workload: Workload, budget: RequestBudget, record: Record, *, concurrency: int
) -> None:
    """Keep ``concurrency`` requests under way until the budget is used up and all have ended.

    Raises:
        OSError: The server cannot be reached at the start.
    """
    await client.connect(concurrency)
    began_s = time.monotonic()

    async def ask_again_and_again() -> None:
        while True:
            number = budget.take(time.monotonic() - began_s)
            if number is None:
                return
            exchange = await _ask(client, workload, number, scheduled_at_s=None)
            record(exchange)
            if exchange.ending.failure is not None:
                await asyncio.sleep(pause_after_failure_s(exchange.ending.retry_after_s))

    async with asyncio.TaskGroup() as clients:
        for _ in range(concurrency):
            clients.create_task(ask_again_and_again())


async def run_open_loop(
    client: Client,
    workload: Workload,
    budget: RequestBudget,
    record: Record,
    *,
    arrivals: Iterator[float],
) -> None:
    """Send a request at each arrival time until the budget is used up; wait for all to end.

    Latencies count from the arrival time even where the request was sent later, or a stalled
    client would hide the wait of those who arrived meanwhile (coordinated omission; Gil Tene,
    "How NOT to Measure Latency"). ``Exchange.lateness_s`` tells how far that went.

    Raises:
        OSError: The server cannot be reached at the start.
    """
    await client.connect(1)
    began_s = time.monotonic()

    async def ask_once(number: int, scheduled_at_s: float) -> None:
        record(await _ask(client, workload, number, scheduled_at_s=scheduled_at_s))

    async with asyncio.TaskGroup() as clients:
        for arrival_s in arrivals:
            number = budget.take(arrival_s)
            if number is None:
                break
            scheduled_at_s = began_s + arrival_s
            # The loop's timers have a resolution of 1 ms: rounded down, a request leaves up to
            # that much early (and counts from then) rather than late.
            whole_ms = math.floor((scheduled_at_s - time.monotonic()) * 1000)
            await asyncio.sleep(max(0, whole_ms) / 1000)
            clients.create_task(ask_once(number, scheduled_at_s))


async def _ask(
    client: Client, workload: Workload, number: int, *, scheduled_at_s: float | None
) -> Exchange:
    """Send one request; it starts when scheduled, or now if that is earlier."""
    request = workload.request(number)
    stream = CompletionStream()
    now_s = time.monotonic()
    started_at_s = now_s if scheduled_at_s is None else min(scheduled_at_s, now_s)
    lateness_s = None if scheduled_at_s is None else now_s - started_at_s
    expected_tokens = request.output_tokens if workload.ignore_eos else None
    ending = await client.complete(request.body, stream, expected_tokens=expected_tokens)
    return Exchange(request, started_at_s, lateness_s, stream, ending)
