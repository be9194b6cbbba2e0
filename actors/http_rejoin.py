"""Joining a call that was submitted before, by this gateway or one that is no more.

By a client whose connection broke, through ``GET /v1/streams/{id}``, and by a call that repeats
an idempotency key. What is not there, not of the caller's tenant, or was never at the position
that the client names, is all the same to the outside: not found.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import msgspec
from aiohttp import web

from understudy.actors.http_answers import Answers, Call
from understudy.actors.http_choices import RequestPort
from understudy.protocol.errors import InternalError, InvalidRequest, NotFound, Unavailable
from understudy.protocol.messages import Found
from understudy.protocol.openai.presentation import Presentation, decode_presentation
from understudy.protocol.openai.stream_ids import parse_position, parse_stream_id
from understudy.protocol.request import Request
from understudy.runtime.kit.clock import Clock
from understudy.runtime.served_model import ServedModel
from understudy.runtime.tokenizer import Tokenizer

TENANT: Final = web.RequestKey("tenant", str)
"""Who calls; set by whoever checks keys. Without keys all are one tenant."""
IDEMPOTENCY_KEY_HEADER: Final = "Idempotency-Key"
IDEMPOTENCY_KEY_LENGTH_MAX: Final = 256
RESUMABLE_HEADER: Final = "X-Resumable"

JOINABLE: Final = frozenset({"chat", "completions"})
"""Endpoints whose events say with their ids how far a stream is."""

_NO_STREAM: Final = "there is no such stream (any more), or no such position in it"


class FoundCall(NamedTuple):
    """A call, and how long the output of each choice was when it was found."""

    call: Call
    lengths: Sequence[int]
    finishes: Sequence[int]
    """How each ended, or 0."""


class StreamEndpoints:
    """``GET /v1/streams/{id}``, and the joining of calls.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon.
        served: The model.
        answers: Where calls are answered.
        clock: Time for the core.
    """

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        served: ServedModel,
        answers: Answers,
        *,
        clock: Clock,
    ) -> None:
        self._port = port
        self._wake = wake
        self._served = served
        self._answers = answers
        self._clock = clock

    async def stream(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/streams/{id}``: go on with a stream where its client left it.

        That is behind the event that ``Last-Event-ID`` names, or else ``starting_after`` in the
        query, or else from the beginning.
        """
        stream_id = parse_stream_id(http_request.match_info["id"])
        if stream_id is None:
            raise NotFound(_NO_STREAM)
        tenant = tenant_of(http_request)
        positions = _positions_asked(http_request, stream_id.group_id)
        found = await self.find(stream_id.group_id, tenant)
        if positions is not None and _is_beyond(positions, found):
            # The answer may be older than this question, if another client asked just before.
            found = await self.find(stream_id.group_id, tenant)
        if found is None or (positions is not None and _is_beyond(positions, found)):
            raise NotFound(_NO_STREAM)
        call = found.call
        if call.first.endpoint not in JOINABLE:
            raise NotFound(_NO_STREAM)
        if stream_id.prefix not in {None, call.endpoint.id_prefix}:
            raise NotFound(_NO_STREAM)
        is_resumable = call.first.is_resumable or is_resumable_call(http_request)
        first = msgspec.structs.replace(call.first, stream=True, is_resumable=is_resumable)
        call = dataclasses.replace(
            call,
            presentations=[first, *call.presentations[1:]],
            positions=positions or [0] * len(call.requests),
        )
        return await self._answers.answer(http_request, call)

    async def join(
        self, http_request: web.Request, group_id: int, ignored: tuple[str, ...]
    ) -> web.StreamResponse:
        """Answer a call that came before under the same idempotency key, with the same body.

        Raises:
            Unavailable: the call that came before cannot be joined.
        """
        found = await self.find(group_id, tenant_of(http_request))
        if found is None:
            raise Unavailable("the answer to this idempotency key is not there (any more)")
        return await self._answers.answer(
            http_request, dataclasses.replace(found.call, ignored=ignored)
        )

    async def settled(self, http_request: web.Request, group_id: int) -> None:
        """Wait until what was submitted before is known to the supervisor, or refused."""
        await self.find(group_id, tenant_of(http_request))

    async def find(self, group_id: int, tenant: str) -> FoundCall | None:
        """The call that a group is, if it is there, complete, and this tenant's."""
        answer: asyncio.Future[Found | None] = asyncio.get_running_loop().create_future()

        def tell(found: Found | None) -> None:
            if not answer.done():
                answer.set_result(found)

        self._port.look_up(group_id, tenant, tell, self._clock.now())
        self._wake()
        found = await answer
        if found is None:
            raise Unavailable("the supervisor cannot be reached")
        if not found.requests:
            return None
        found_call = _found_call(found, self._served.tokenizer)
        is_ours = found_call is not None and found_call.call.first.model == self._served.name
        return found_call if is_ours else None


def tenant_of(http_request: web.Request) -> str:
    """Who calls."""
    tenant: str = http_request.get(TENANT, "")
    return tenant


def is_resumable_call(http_request: web.Request) -> bool:
    """Whether a call asks to go on when its client goes away."""
    return http_request.headers.get(RESUMABLE_HEADER, "").lower() == "true"


def idempotency_key(http_request: web.Request) -> bytes:
    """A digest of the tenant's idempotency key; empty without one.

    Raises:
        InvalidRequest: it is no key.
    """
    given = http_request.headers.getall(IDEMPOTENCY_KEY_HEADER, [])
    if not given:
        return b""
    key = given[0]
    is_short = 1 <= len(key) <= IDEMPOTENCY_KEY_LENGTH_MAX
    if len(given) > 1 or not (is_short and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"{IDEMPOTENCY_KEY_HEADER}: give one key of 1 to {IDEMPOTENCY_KEY_LENGTH_MAX}"
            " printable ASCII characters",
            param=IDEMPOTENCY_KEY_HEADER,
        )
    # No key has a NUL, so that no two pairs of tenant and key are the same text.
    return hashlib.sha256(f"{tenant_of(http_request)}\0{key}".encode()).digest()


def body_digest(http_request: web.Request, body: bytes) -> bytes:
    """What tells whether two calls ask for the same: their path and their bodies."""
    return hashlib.sha256(http_request.path.encode() + b"\0" + body).digest()


def _positions_asked(http_request: web.Request, group_id: int) -> tuple[int, ...] | None:
    """What the client says that it has, for each choice; ``None`` if it says nothing."""
    last_event_id = http_request.headers.get("Last-Event-ID", "")
    text = last_event_id or http_request.query.get("starting_after")
    if text is None:
        return None
    asked = parse_position(text)
    if asked is None or asked.group_id not in {None, group_id}:
        raise NotFound(_NO_STREAM)
    if last_event_id and asked.group_id is None:
        raise NotFound(_NO_STREAM)
    return asked.positions


def _is_beyond(positions: Sequence[int], found: FoundCall | None) -> bool:
    """Whether nobody can have been told so much."""
    return (
        found is None
        or len(positions) != len(found.lengths)
        or any(asked > length for asked, length in zip(positions, found.lengths, strict=True))
    )


def _found_call(found: Found, tokenizer: Tokenizer) -> FoundCall | None:
    """What was found, as a call; ``None`` if it is none, or parts of it are forgotten already.

    Raises:
        InternalError: its presentations do not fit together.
    """
    if not all(request.presentation for request in found.requests):
        return None  # it makes vectors, which are answered in one piece
    finishes = found.finishes or (0,) * len(found.requests)
    if not len(found.lengths) == len(finishes) == len(found.requests):
        raise InternalError("the supervisor is of another version")
    parts = sorted(
        (
            (decode_presentation(request.presentation), request, length, finish)
            for request, length, finish in zip(found.requests, found.lengths, finishes, strict=True)
        ),
        key=lambda part: part[0].index,
    )
    presentations = [part[0] for part in parts]
    first = presentations[0]
    if len(parts) < first.num_choices:
        return None
    if [one.index for one in presentations] != list(range(first.num_choices)):
        raise InternalError("the stream's presentations contradict each other")
    requests = [part[1] for part in parts]
    echoes = [
        _echo(presentations[index - index % first.n], request, tokenizer)
        for index, request in enumerate(requests)
    ]
    call = Call(
        requests=requests,
        presentations=presentations,
        echoes=echoes,
        positions=[0] * len(requests),
    )
    return FoundCall(call, [part[2] for part in parts], [part[3] for part in parts])


def _echo(presentation: Presentation, request: Request, tokenizer: Tokenizer) -> str:
    """What a choice's text begins with; said with the first choice of its prompt."""
    if not presentation.echoes_prompt:
        return ""
    return tokenizer.decode(request.prompt) if presentation.echo is None else presentation.echo
