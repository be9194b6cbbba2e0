"""Calls whose requests end in vectors: many side by side, answered when all are there.

Knows the gateway's core, not HTTP. A call has a window of requests open, so that a large one does
not fill the queue of everybody; with each that ends the next is submitted.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from understudy.actors.http_answers import Answers, HttpLimits
from understudy.actors.http_choices import RequestPort
from understudy.actors.http_open_calls import OpenCalls
from understudy.protocol.errors import DeadlineExceeded, RequestError, Unavailable
from understudy.protocol.openai.answer import finish_reason_or_error
from understudy.protocol.request import FinishReason, Request, TokenRow, hastened
from understudy.runtime.kit.clock import Clock

OPEN_MAX: Final = 128
"""Requests of one call that are open at a time."""


class PooledCalls:
    """Answers calls for vectors, and knows which are open.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon.
        answers: Knows when an engine serves.
        limits: How long open calls may go on when the gateway is told to stop.
        clock: Time for the core.
    """

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        answers: Answers,
        *,
        limits: HttpLimits,
        clock: Clock,
    ) -> None:
        self._port = port
        self._wake = wake
        self._answers = answers
        self._clock = clock
        self._calls = OpenCalls(limits.shutdown_timeout_s)

    async def collect(self, requests: Sequence[Request]) -> list[bytes]:
        """Submit requests, and wait for all of their vectors.

        Raises:
            RequestError: one of them could not go on; the others are cancelled.
        """
        called_at = self._clock.now()
        self._calls.admit()
        await self._answers.until_serving()
        call = _PooledCall(self._port, self._wake, requests, self._clock, called_at)
        with self._calls.under_way(call.fail):
            try:
                call.submit_next()
                return await call.over
            finally:
                call.cancel_all()

    async def stop(self) -> None:
        """Wait for the calls that are open, up to a limit; then end them with an error."""
        await self._calls.stop()


class _PooledCall:
    """The requests of one call."""

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        requests: Sequence[Request],
        clock: Clock,
        called_at: float,
    ) -> None:
        self.over: asyncio.Future[list[bytes]] = asyncio.get_running_loop().create_future()
        """The vectors, in the order of the requests."""
        self._port = port
        self._wake = wake
        self._clock = clock
        self._called_at = called_at
        self._waiting = deque(enumerate(requests))
        self._open: dict[int, _PooledSink] = {}
        self._vectors = [b""] * len(requests)
        self._is_called = False

    def submit_next(self) -> None:
        """Submit as many requests as may be open."""
        self._is_called = False
        now = self._clock.now()
        while self._waiting and len(self._open) < OPEN_MAX:
            index, request = self._waiting.popleft()
            sink = self._open[request.request_id] = _PooledSink(self, index, request.request_id)
            self._port.submit(hastened(request, now - self._called_at), sink, now)
        self._wake()

    def take(self, index: int, request_id: int, vector: bytes) -> None:
        """A request has ended with a vector."""
        del self._open[request_id]
        self._vectors[index] = vector
        if self.over.done():
            return
        if not self._open and not self._waiting:
            self.over.set_result(self._vectors)
        elif self._waiting and not self._is_called:
            # Not at once: who brings this is not done with what it brings.
            self._is_called = True
            asyncio.get_running_loop().call_soon(self.submit_next)

    def end(self, request_id: int, error: RequestError) -> None:
        """A request has ended with an error."""
        self._open.pop(request_id, None)
        self.fail(error)

    def fail(self, error: RequestError) -> None:
        """End all with an error."""
        if not self.over.done():
            self.over.set_exception(error)
        self.cancel_all()

    def cancel_all(self) -> None:
        """End what has not ended."""
        self._waiting.clear()
        left, self._open = self._open, {}
        for request_id, sink in left.items():
            self._port.cancel(request_id, sink)
        if left:
            self._wake()


class _PooledSink:
    """The sink of one request."""

    def __init__(self, call: _PooledCall, index: int, request_id: int) -> None:
        self._call = call
        self._index = index
        self._request_id = request_id

    def deliver(self, row: TokenRow, engine: str) -> None:  # noqa: ARG002
        """See ``Sink``."""
        if row.vector:
            self._call.take(self._index, self._request_id, row.vector)
        elif row.finish:
            self._call.end(self._request_id, _error(FinishReason(row.finish)))

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        self._call.end(self._request_id, error)


def _error(finish: FinishReason) -> RequestError:
    """What a request is told that ended without its vector."""
    if finish is FinishReason.DEADLINE:
        return DeadlineExceeded("the deadline passed before the vector was there")
    outcome = finish_reason_or_error(finish)
    if isinstance(outcome, RequestError):
        return outcome
    # An engine of an earlier release had it, or a journal is damaged: the next try is another.
    return Unavailable("the vector is lost; send the request again", retry_after_s=1.0)
