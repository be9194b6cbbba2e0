"""Streamed answers: rows of tokens to server-sent events on a client's connection.

As long as the client reads, a row becomes bytes on the transport within ``deliver``: no task is
woken for it. When the client falls behind, its text is kept instead, as text, and goes out in
one larger chunk once there is room. A client that has not read for ``PARK_AFTER_S`` costs nothing
more, unless a stop string has to be looked for: its stream is parked, and what it missed is asked
for when it reads again, or when its request has ended. It is given up when there was no room for
``write_timeout_s``::

    deliver ──▶ is_flowing? ── yes ──▶ transport.write          the path of nearly every token
                    │ no
                    ▼
                 held text ──▶ the handler's task: open, flush, wait for room, keep alive, end
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from typing import Final, Protocol

from aiohttp import HttpVersion11, web

from understudy.actors.gateway import Sink
from understudy.actors.http_choices import ChoiceOutput, OpenRequests
from understudy.actors.http_frames import forget_frames
from understudy.protocol.errors import InternalError, RequestError
from understudy.protocol.openai.answer import (
    KEEP_ALIVE,
    ChunkEncoder,
    engine_comment,
    error_event,
    usage,
)
from understudy.protocol.request import TokenRow
from understudy.runtime.log import get_logger, where_it_failed

HIGH_WATER_BYTES: Final = 16 << 10
"""What waits here for a client to read, beside what the kernel has, before text is held."""
LOW_WATER_BYTES: Final = 4 << 10
PARK_AFTER_S: Final = 0.5
"""For so long text is held for a client that does not read. Then it has to be asked for again."""

_NO_LINGER: Final = struct.pack("ii", 1, 0)
_HEADERS: Final = {
    "Content-Type": "text/event-stream",
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class _StreamedChoice:
    """The sink of a choice that is streamed."""

    __slots__ = (
        "_comment",
        "_encoder",
        "_engine",
        "_held",
        "_is_complete",
        "_is_plain",
        "_is_started",
        "_output",
        "_reports_usage",
        "_stream",
    )

    def __init__(
        self,
        output: ChoiceOutput,
        text: str,
        encoder: ChunkEncoder,
        stream: EventStream,
        *,
        reports_usage: bool,
    ) -> None:
        self._output = output
        self._held = "" if output.is_replaying else text
        self._engine = ""
        self._comment = b""
        self._encoder = encoder
        self._stream = stream
        self._reports_usage = reports_usage
        self._is_started = output.is_replaying
        self._is_complete = False
        # Whether the next chunk is nothing but text, as long as it is not the last.
        self._is_plain = False

    @property
    def is_replaying(self) -> bool:
        """Whether the client knows what comes next."""
        return self._output.is_replaying

    def deliver(self, row: TokenRow, engine: str) -> None:
        """See ``Sink``."""
        output = self._output
        stream = self._stream
        if output.is_replaying:
            row = output.replay(row)
            if output.is_over:
                self._is_complete = True  # the client had its end, too
                stream.choice_over(output, has_ended=bool(row.finish))
            if output.is_over or not (row.tokens or row.finish):
                stream.wake()
                return
        text = output.advance(row)
        if engine != self._engine:
            self._change_engine(engine)
        if self._is_plain and stream.is_flowing and not output.is_over:
            if text:
                stream.write(self._encoder.encode(output.num_tokens, text))
            return
        self._held += text
        if stream.is_flowing:
            self.flush()
        if output.is_over:
            stream.choice_over(output, has_ended=bool(row.finish))
        if not stream.is_flowing:
            stream.wake()

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        self._output.error = error
        self._stream.choice_over(self._output, has_ended=True)

    def flush(self) -> None:
        """Write what is held, as one chunk."""
        output = self._output
        logprobs = output.take_logprobs()
        if self._is_complete or not (self._held or logprobs or output.finish_reason):
            return
        if not output.num_tokens and output.finish_reason is None:
            return  # an echo waits for a token: at position 0 the client has nothing of the choice
        chunk = self._encoder.encode_any(
            output.num_tokens,
            self._held,
            is_first=not self._is_started,
            finish_reason=output.finish_reason,
            logprobs=logprobs or None,
            usage=usage(
                len(output.request.prompt),
                output.num_tokens,
                num_cached_tokens=output.num_cached_tokens,
            )
            if self._reports_usage
            else None,
        )
        chunk = self._comment + chunk
        self._held = ""
        self._comment = b""
        self._is_started = True
        self._is_complete = output.finish_reason is not None
        self._is_plain = logprobs is None and not self._reports_usage
        self._stream.write(chunk)

    def _change_engine(self, engine: str) -> None:
        """Have the next chunk say, for people who watch the stream, who makes it."""
        self._engine = engine
        if engine:
            self._comment = engine_comment(engine, self._output.index)
            self._is_plain = False


class SinkOfStream(Sink, Protocol):
    """What a stream asks of its choices."""

    @property
    def is_replaying(self) -> bool:
        """Whether the client knows what comes next."""
        ...

    def flush(self) -> None:
        """Write what is held."""
        ...


class EventStream:
    """One call's stream of events, for all its choices.

    Args:
        http_request: What is answered.
        requests: The call's open requests.
        headers: Further headers of the response.
        keep_alive_s: How often a comment is sent, whatever else is.
        write_timeout_s: How long a client may leave no room before it is given up.
        shape_error: Gives the event that ends a stream which cannot go on.

    Attributes:
        is_flowing: Whether chunks may be written as they come. Else they are held.
    """

    def __init__(
        self,
        http_request: web.Request,
        requests: OpenRequests,
        *,
        headers: dict[str, str],
        keep_alive_s: float,
        write_timeout_s: float,
        shape_error: Callable[[RequestError], bytes] = error_event,
    ) -> None:
        self._http_request = http_request
        self._requests = requests
        self._response = web.StreamResponse(headers={**_HEADERS, **headers})
        self._keep_alive_s = keep_alive_s
        self._write_timeout_s = write_timeout_s
        self._shape_error = shape_error
        self._choices: list[SinkOfStream] = []
        self._num_open = 0
        self._error: RequestError | None = None
        self._news = asyncio.Event()
        self._is_chunked = http_request.version >= HttpVersion11
        transport = http_request.transport
        if transport is None:
            raise ConnectionResetError("the client is gone")
        self._transport = transport
        self._protocol = http_request.protocol
        self.is_flowing = False

    def add_sink(self, choice: SinkOfStream) -> Sink:
        """Add a choice that writes by itself."""
        self._choices.append(choice)
        self._num_open += 1
        return choice

    def add(
        self, output: ChoiceOutput, text: str, encoder: ChunkEncoder, *, reports_usage: bool
    ) -> Sink:
        """Add a choice whose text begins with ``text``; give its sink."""
        return self.add_sink(
            _StreamedChoice(output, text, encoder, self, reports_usage=reports_usage)
        )

    async def run(self, last_event: Callable[[], bytes]) -> web.StreamResponse:
        """Stream until all choices are over, and then what ``last_event`` gives.

        Nothing is sent until the requests are taken, and what the client has of them is found in
        their output: until then a refusal can still be the status.

        Raises:
            RequestError: before the first event.
        """
        try:
            is_early = await self._wait_until_taken()
            await self._open()
            if not is_early:
                self.write(KEEP_ALIVE)
            await self._stream_to_end(last_event)
        finally:
            self.is_flowing = False
            self._choices.clear()  # each knows its stream: only a collector would free that circle
        return self._response

    def write(self, data: bytes) -> None:
        """Write to the connection, and stop the flow if the client has not read enough.

        Of a client that has gone, the handler's task hears only in the next turn of the loop.
        """
        if self._transport.is_closing():
            self.is_flowing = False
            return
        if self._is_chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._transport.write(data)
        if self._protocol.writing_paused:
            self.is_flowing = False
            self.wake()

    def wake(self) -> None:
        """Have the handler's task look at what is held."""
        self._news.set()

    def choice_over(self, output: ChoiceOutput, *, has_ended: bool) -> None:
        """A choice has reached its end, or met a stop string before its request did."""
        self._requests.close(output.request.request_id, has_ended=has_ended)
        self._num_open -= 1
        if self._error is None and output.error is not None:
            self._error = output.error
            self._requests.cancel_all()
        if self._num_open == 0 or self._error is not None:
            self.is_flowing = False
            self.wake()

    @property
    def _is_replaying(self) -> bool:
        return any(choice.is_replaying for choice in self._choices)

    async def _wait_until_taken(self) -> bool:
        """Wait for the requests to be taken; whether that took less than a sign of life may.

        Raises:
            RequestError: one of them was refused.
        """
        is_early = await self._wait_for_news()
        while self._error is None and (
            self._is_replaying if is_early else not self._requests.are_answered
        ):
            self._news.clear()
            is_early = await self._wait_for_news()
        if self._error is not None:
            raise self._error
        return is_early

    async def _stream_to_end(self, last_event: Callable[[], bytes]) -> None:
        try:
            if await self._stream() and (last := last_event()):
                self.write(last)
        except ConnectionError:
            pass  # the client is gone: aiohttp finds out when it ends the response
        except Exception as error:  # noqa: BLE001 - the outermost frame of a call
            get_logger().error("a stream failed", where=where_it_failed(error))
            if not self._transport.is_closing():
                self.write(self._shape_error(InternalError("the gateway failed")))

    async def _open(self) -> None:
        if self._is_chunked:
            self._response.enable_chunked_encoding()
        else:
            self._response.force_close()
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES, low=LOW_WATER_BYTES)
        await self._response.prepare(self._http_request)
        self._http_request.writer.send_headers()

    async def _stream(self) -> bool:
        """Flush, let flow, and keep alive, until the end; false if it ended with an error."""
        while True:
            self._news.clear()
            for choice in self._choices:
                choice.flush()
            if self._error is not None:
                self.write(self._shape_error(self._error))
                return False
            if self._num_open == 0:
                return True
            if self._protocol.writing_paused:
                await self._wait_for_room()
                continue
            self.is_flowing = True
            if not await self._wait_for_news():
                self.write(KEEP_ALIVE)

    async def _wait_for_news(self) -> bool:
        """Wait until something is held or over; false if it is time for a sign of life."""
        try:
            async with asyncio.timeout(self._keep_alive_s):
                await self._news.wait()
        except TimeoutError:
            return False
        return True

    async def _wait_for_room(self) -> None:
        """Wait for the client to read. If that takes a while, nothing is prepared meanwhile."""
        # One task for both waits: a drain of aiohttp's that was cancelled cannot be repeated.
        draining = asyncio.ensure_future(self._http_request.writer.drain())
        try:
            if await _is_done_within(draining, min(PARK_AFTER_S, self._write_timeout_s)):
                return
            parked = self._requests.park_all()
            if await _is_done_within(draining, self._write_timeout_s - PARK_AFTER_S):
                self._requests.unpark(parked)
                return
        finally:
            if draining.done() and not draining.cancelled():
                # Of a client who has gone meanwhile; the handler itself is cancelled then.
                if (error := draining.exception()) is not None:
                    forget_frames(error)
            else:
                draining.cancel()
        # Closed the hard way: the kernel would go on to keep what the client does not read.
        connection = self._transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        self._transport.abort()
        raise ConnectionResetError("the client does not read")


async def _is_done_within(task: asyncio.Task[None], timeout_s: float) -> bool:
    """Wait for a task, which goes on if that takes too long; raises what it raises."""
    done, _ = await asyncio.wait([task], timeout=max(0.0, timeout_s))
    for one in done:
        one.result()
    return bool(done)
