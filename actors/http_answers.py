"""From requests to a response: streamed or in one piece, of a new call or one that is joined.

A call is answered by what its requests and their presentations say and nothing else, so that it
makes no difference which gateway answers, and whether it is the one that submitted them.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import msgspec
from aiohttp import web

from understudy.actors.gateway import Sink
from understudy.actors.http_choices import ChoiceOutput, OpenRequests, RequestPort
from understudy.actors.http_collected import CollectedAnswer
from understudy.actors.http_open_calls import OpenCalls
from understudy.actors.http_parsed_streams import ParsedChoice
from understudy.actors.http_streams import EventStream
from understudy.protocol.anthropic.events import MessageEncoder, message_object
from understudy.protocol.errors import Unavailable
from understudy.protocol.openai import chat, completions
from understudy.protocol.openai.answer import (
    DONE,
    Answer,
    ChunkEncoder,
    Heading,
    error_event,
    usage,
    usage_event,
)
from understudy.protocol.openai.chat_deltas import ChatDeltaEncoder
from understudy.protocol.openai.presentation import Presentation
from understudy.protocol.openai.response_events import ResponseEncoder, response_object
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.openai.streamed import DeltaEncoder
from understudy.protocol.request import Request, hastened
from understudy.runtime.kit.clock import Clock
from understudy.runtime.served_model import ServedModel

LOOK_S: Final = 30.0
STREAM_ID_HEADER: Final = "X-Stream-Id"


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpLimits:
    """What one client may take. The defaults are those of production."""

    body_bytes_max: int = 8 << 20
    body_timeout_s: float = 30.0
    keep_alive_s: float = 10.0
    write_timeout_s: float = 30.0
    header_timeout_s: float = 8.0
    """From the first byte to the last of a header. A little more passes until somebody looks, and
    until a busy server has taken the connection; clients shall see no more than ten seconds."""
    idle_timeout_s: float = 75.0
    """Between two requests of one connection."""
    connections_per_address: int = 8192
    shutdown_timeout_s: float = 30.0
    """How long open streams may go on when the gateway is told to stop."""


class Endpoint(NamedTuple):
    """How one endpoint shapes its answers."""

    id_prefix: str
    chunk_kind: str
    respond: Callable[..., dict[str, Any]]
    make_encoder: Callable[..., ChunkEncoder] | None = None
    """Of plain text."""
    make_delta_encoder: Callable[..., DeltaEncoder] | None = None
    """Of text that is taken apart."""
    id_separator: str = "-"
    ends_with_done: bool = True


ENDPOINTS: Final[Mapping[str, Endpoint]] = MappingProxyType(
    {
        "chat": Endpoint(
            "chatcmpl",
            chat.CHUNK_KIND,
            chat.chat_response,
            chat.chat_chunk_encoder,
            ChatDeltaEncoder,
        ),
        "responses": Endpoint(
            "resp",
            "response",
            response_object,
            make_delta_encoder=ResponseEncoder,
            id_separator="_",
            ends_with_done=False,
        ),
        "messages": Endpoint(
            "msg",
            "message",
            message_object,
            make_delta_encoder=MessageEncoder,
            id_separator="_",
            ends_with_done=False,
        ),
        "completions": Endpoint(
            "cmpl",
            completions.CHUNK_KIND,
            completions.completion_response,
            completions.completion_chunk_encoder,
        ),
    }
)
"""By the name that presentations have for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """Requests that are to be answered as one."""

    requests: Sequence[Request]
    """One for each choice, in order."""
    presentations: Sequence[Presentation]
    """One for each request."""
    echoes: Sequence[str]
    """What each choice's text begins with."""
    ignored: tuple[str, ...] = ()
    """Fields of the body that did not matter."""
    positions: Sequence[int] | None = None
    """What the client of a stream that is joined has of each choice; ``None``: a new call."""
    make_delta_encoder: Callable[..., DeltaEncoder] | None = None
    """What shapes this call's stream, if not what shapes all of its endpoint's."""

    @property
    def first(self) -> Presentation:
        """What the presentations of all choices say alike."""
        return self.presentations[0]

    @property
    def endpoint(self) -> Endpoint:
        """How its endpoint shapes answers."""
        return ENDPOINTS[self.first.endpoint]

    @property
    def heading(self) -> Heading:
        """What all objects of the answer begin with."""
        endpoint = self.endpoint
        group_id = self.requests[0].group_id
        answer_id = f"{endpoint.id_prefix}{endpoint.id_separator}{group_id:016x}"
        first = self.first
        return Heading(
            answer_id,
            first.created,
            first.model,
            first.system_fingerprint,
            repeated=first.repeated,
            has_short_ids=first.tool_parser == "mistral",
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Each prompt counted once."""
        return sum(request.num_prompt_tokens for request in self.requests[:: self.first.n])


class _Opened(NamedTuple):
    """A call for as long as it is answered."""

    requests: OpenRequests
    call: Call
    """With what is left until its deadlines after the wait for an engine."""


class Answers:
    """Answers calls, and knows which are open.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon; called after each submission or cancellation.
        served: The model.
        limits: What a client may take.
        clock: Time for the core.
    """

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        served: ServedModel,
        *,
        limits: HttpLimits,
        clock: Clock,
    ) -> None:
        self._port = port
        self._wake = wake
        self._served = served
        self._limits = limits
        self._clock = clock
        self._calls = OpenCalls(limits.shutdown_timeout_s)

    async def stop(self) -> None:
        """Wait for the calls that are open, up to a limit; then end them with an error.

        No further ones are taken. What can be joined elsewhere goes on.
        """
        await self._calls.stop()

    async def answer(self, http_request: web.Request, call: Call) -> web.StreamResponse:
        """Submit or join a call's requests, and answer it.

        Raises:
            RequestError: before anything of the answer was sent.
        """
        if call.first.stream:
            async with self._opened(call) as (open_requests, opened):
                return await self._stream(http_request, opened, open_requests)
        answers = await self.collect(call)
        body = call.endpoint.respond(
            call.heading,
            answers,
            num_prompt_tokens=call.num_prompt_tokens,
            num_cached_tokens=_num_cached_tokens(answers, call),
        )
        return json_response(body, headers=ignored_header(call.ignored))

    async def collect(self, call: Call) -> list[Answer]:
        """Submit or join a call's requests, and wait for their ends.

        Raises:
            RequestError: one of them could not go on.
        """
        async with self._opened(call) as (open_requests, opened):
            collected = CollectedAnswer(open_requests)
            outputs = self._outputs(opened)
            sinks = [
                collected.add(output, echo)
                for output, echo in zip(outputs, opened.echoes, strict=True)
            ]
            self._begin(open_requests, opened, outputs, sinks)
            return await collected.wait()

    @asynccontextmanager
    async def _opened(self, call: Call) -> AsyncIterator[_Opened]:
        """The requests of a call, which do not outlive it here; what has passed is taken off."""
        self._calls.admit()
        if call.positions is None and any(one.params.max_tokens for one in call.requests):
            called_at = self._clock.now()
            await self.until_serving()
            passed_s = self._clock.now() - called_at
            requests = [hastened(request, passed_s) for request in call.requests]
            call = dataclasses.replace(call, requests=requests)
        open_requests = OpenRequests(self._port, self._wake)
        may_go_on = call.first.stream or call.first.is_resumable
        with self._calls.under_way(partial(open_requests.fail_all, go_on=may_go_on)):
            try:
                yield _Opened(open_requests, call)
            finally:
                if call.first.is_resumable:
                    open_requests.leave_all()
                else:
                    open_requests.cancel_all()

    async def submit(self, call: Call, settled: Callable[[], Awaitable[None]]) -> None:
        """Submit a call that nobody waits for.

        Args:
            call: It is resumable.
            settled: Waits until the supervisor has taken or refused it.

        Raises:
            RequestError: it was refused.
        """
        async with self._opened(call) as (open_requests, opened):
            collected = CollectedAnswer(open_requests)
            outputs = self._outputs(opened)
            sinks = [collected.add(output, "") for output in outputs]
            self._begin(open_requests, opened, outputs, sinks)
            try:
                await settled()
                collected.raise_error()
            finally:
                collected.close()

    async def look(self, output: ChoiceOutput, sink: Sink, complete: Awaitable[None]) -> None:
        """Join a request for as long as it takes to learn what is known of it."""
        open_requests = OpenRequests(self._port, self._wake)
        try:
            open_requests.join(output, sink)
            async with asyncio.timeout(LOOK_S):
                await complete
        except TimeoutError:
            raise Unavailable("the supervisor does not answer") from None
        finally:
            open_requests.leave_all()

    async def until_serving(self) -> None:
        """Wait for an engine for as long as one may be back in a moment.

        Raises:
            Unavailable: none is.
        """
        if self._port.cluster.engines_serving:
            return
        is_serving: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

        def tell(answer: bool) -> None:
            if not is_serving.done():
                is_serving.set_result(answer)

        self._port.when_serving(tell, self._clock.now())
        self._wake()
        if not await is_serving:
            raise Unavailable(f"none of {self._port.cluster.engines_known} engines is serving")

    async def _stream(
        self, http_request: web.Request, call: Call, open_requests: OpenRequests
    ) -> web.StreamResponse:
        """Answer as server-sent events."""
        shown, heading, endpoint = call.first, call.heading, call.endpoint
        outputs = self._outputs(call)
        event_ids = EventIds(call.requests[0].group_id, call.positions or [0] * len(call.requests))
        delta_encoders = [_delta_encoder(call, one, event_ids) for one in outputs if one.is_parsed]
        stream = EventStream(
            http_request,
            open_requests,
            headers={STREAM_ID_HEADER: heading.answer_id, **ignored_header(call.ignored)},
            keep_alive_s=self._limits.keep_alive_s,
            write_timeout_s=self._limits.write_timeout_s,
            shape_error=delta_encoders[0].error if delta_encoders else error_event,
        )
        has_usage = shown.include_usage or shown.continuous_usage
        sinks: list[Sink] = [
            stream.add_sink(ParsedChoice(output, encoder, stream))
            for output, encoder in zip(outputs, delta_encoders, strict=bool(delta_encoders))
        ]
        if not delta_encoders:
            assert endpoint.make_encoder is not None
            for output, echo in zip(outputs, call.echoes, strict=True):
                encoder = endpoint.make_encoder(
                    heading, event_ids, output.index, has_usage=has_usage
                )
                sinks.append(
                    stream.add(output, echo, encoder, reports_usage=shown.continuous_usage)
                )

        def last_event() -> bytes:
            if not endpoint.ends_with_done:
                return b""
            if not shown.include_usage:
                return DONE
            counts = usage(
                call.num_prompt_tokens,
                sum(output.num_tokens for output in outputs),
                num_cached_tokens=_num_cached_tokens(outputs, call),
                num_reasoning_tokens=sum(output.num_reasoning_tokens for output in outputs),
            )
            return usage_event(heading, endpoint.chunk_kind, counts) + DONE

        self._begin(open_requests, call, outputs, sinks)
        return await stream.run(last_event)

    def _outputs(self, call: Call) -> list[ChoiceOutput]:
        positions = call.positions or [0] * len(call.requests)
        return [
            ChoiceOutput(request, presentation, self._served.tokenizer, delivered=position)
            for request, presentation, position in zip(
                call.requests, call.presentations, positions, strict=True
            )
        ]

    def _begin(
        self,
        open_requests: OpenRequests,
        call: Call,
        outputs: Sequence[ChoiceOutput],
        sinks: Sequence[Sink],
    ) -> None:
        now = self._clock.now()
        for output, sink in zip(outputs, sinks, strict=True):
            if call.positions is None:
                open_requests.submit(output, sink, now)
            else:
                open_requests.join(output, sink)


def _delta_encoder(call: Call, output: ChoiceOutput, event_ids: EventIds) -> DeltaEncoder:
    """What shapes a choice whose text is taken apart."""
    shown = call.first
    make_delta_encoder = call.make_delta_encoder or call.endpoint.make_delta_encoder
    assert make_delta_encoder is not None
    return make_delta_encoder(
        call.heading,
        event_ids,
        output.index,
        request_id=output.request.request_id,
        has_usage=shown.include_usage or shown.continuous_usage,
        reports_usage=shown.continuous_usage,
        is_joined=output.is_replaying,
    )


def json_response(
    body: dict[str, Any], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    """A response in one piece."""
    return web.Response(
        body=msgspec.json.encode(body),
        status=status,
        headers=headers,
        content_type="application/json",
    )


def ignored_header(ignored: tuple[str, ...]) -> dict[str, str]:
    """The header that names ignored fields, if there are any."""
    return {"X-Ignored-Fields": ", ".join(ignored)} if ignored else {}


def _num_cached_tokens(outputs: Sequence[ChoiceOutput] | Sequence[Answer], call: Call) -> int:
    """Of each prompt what its first choice found: that is what the call would have had to wait."""
    return sum(output.num_cached_tokens for output in outputs[:: call.first.n])
