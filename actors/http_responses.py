"""The Responses API: answers that are kept, gone on from, and made while nobody waits.

Nothing is stored here. A response is a call like any other, whose requests the supervisor keeps
for a while after their end; what the response repeats of its request, and the conversation that a
later one goes on from, travel with it. So any gateway can tell of it, before and after a fault.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import re
from typing import Any, Final

import msgspec
from aiohttp import web

from understudy.actors.http_answers import Answers, Call, json_response
from understudy.actors.http_choices import ChoiceOutput, RequestPort
from understudy.actors.http_frames import forget_frames
from understudy.actors.http_generation import GenerationEndpoints
from understudy.actors.http_rejoin import FoundCall, StreamEndpoints, tenant_of
from understudy.protocol.errors import (
    AlreadySubmitted,
    InvalidRequest,
    NotFound,
    RequestError,
    Unavailable,
)
from understudy.protocol.openai.answer import Answer
from understudy.protocol.openai.chat import Message
from understudy.protocol.openai.deltas import Delta
from understudy.protocol.openai.response_events import (
    ResponseEncoder,
    failed_response,
    response_object,
)
from understudy.protocol.openai.response_items import message_of_output
from understudy.protocol.openai.responses import (
    check_response,
    keep,
    kept_response,
    parse_response,
)
from understudy.protocol.openai.streamed import Told
from understudy.protocol.request import FinishReason, TokenRow
from understudy.runtime.served_model import ServedModel

_ID: Final = re.compile(r"resp_([0-9a-f]{16})")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_FAILURES: Final = frozenset({FinishReason.ERROR, FinishReason.DEADLINE, FinishReason.REFUSED})
"""Ends that may be told as an error."""
_NO_RESPONSE: Final = "there is no such response (any more)"


class ResponseEndpoints:
    """``/v1/responses`` and what is below it.

    Args:
        port: The gateway's core.
        served: The model.
        generation: Makes calls of conversations.
        answers: Where calls are answered.
        streams: Where calls are found that came before.
    """

    def __init__(
        self,
        port: RequestPort,
        served: ServedModel,
        generation: GenerationEndpoints,
        answers: Answers,
        streams: StreamEndpoints,
    ) -> None:
        self._port = port
        self._served = served
        self._generation = generation
        self._answers = answers
        self._streams = streams

    async def create(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/responses``."""
        raw = await self._generation.read(http_request)
        fields, ignored = parse_response(raw)
        earlier: list[Message] = []
        if fields.previous_response_id is not None:
            earlier = await self._earlier(http_request, fields.previous_response_id)
        parsed = check_response(fields, self._generation.model(), ignored=ignored, earlier=earlier)
        self._generation.refuse_early(http_request, parsed.chat.generation, size=len(raw))
        prepared = await self._generation.prepare_chat(
            parsed.chat, size=len(raw), endpoint="responses", repeated=keep(parsed.kept)
        )
        if not parsed.kept.is_background:
            return await self._generation.answer(http_request, raw, prepared)
        prepared = prepared._replace(is_resumable=True)
        call = _unattended(self._generation.call(http_request, raw, prepared))
        if call.first.stream:
            return await self._answers.answer(http_request, call)
        return await self._begin(http_request, call)

    async def retrieve(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``GET /v1/responses/{id}``: as it is now, or as a stream from an event on."""
        found = await self._find(http_request, http_request.match_info["id"])
        query = http_request.query
        if query.get("stream", "").lower() != "true":
            if "starting_after" in query:
                raise InvalidRequest("starting_after needs stream=true", param="starting_after")
            return json_response(await self._as_it_is(found))
        starting_after = query.get("starting_after")
        if starting_after is not None and not _NUMBER.fullmatch(starting_after):
            raise InvalidRequest("starting_after is no event's number", param="starting_after")
        after = -1 if starting_after is None else int(starting_after)
        if after >= 0 and after >= await self._num_events(found):
            raise NotFound("the response has no such event")
        first = msgspec.structs.replace(found.call.first, stream=True)
        call = dataclasses.replace(
            found.call,
            presentations=[first],
            positions=[0],
            make_delta_encoder=functools.partial(ResponseEncoder, starting_after=after),
        )
        return await self._answers.answer(http_request, call)

    async def cancel(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/responses/{id}/cancel``: end a response that is made in background."""
        name = http_request.match_info["id"]
        found = await self._find(http_request, name)
        if not kept_response(found.call.first.repeated).is_background:
            raise InvalidRequest("only responses in background can be cancelled", param="id")
        if not found.finishes[0]:
            self._end(http_request, found, is_forgotten=False)
            found = await self._find(http_request, name)
            if not found.finishes[0]:
                raise Unavailable("the response could not be cancelled; try again")
        return json_response(await self._as_it_is(found))

    async def delete(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``DELETE /v1/responses/{id}``: nobody hears of it again."""
        name = http_request.match_info["id"]
        found = await self._find(http_request, name)
        self._end(http_request, found, is_forgotten=True)
        try:
            await self._find(http_request, name)
        except NotFound:
            return json_response({"id": name, "object": "response", "deleted": True})
        raise Unavailable("the response could not be deleted; try again")

    async def _begin(self, http_request: web.Request, call: Call) -> web.Response:
        """Submit a call that nobody waits for, and tell how it is then."""
        group_id = call.requests[0].group_id
        try:
            settled = functools.partial(self._streams.settled, http_request, group_id)
            await self._answers.submit(call, settled)
        except AlreadySubmitted as submitted:
            group_id = submitted.original_group_id
            forget_frames(submitted)
        name = f"resp_{group_id:016x}"
        return json_response(await self._as_it_is(await self._find(http_request, name)))

    def _end(self, http_request: web.Request, found: FoundCall, *, is_forgotten: bool) -> None:
        group_id = found.call.requests[0].group_id
        self._port.end_group(group_id, tenant_of(http_request), is_forgotten=is_forgotten)

    async def _find(self, http_request: web.Request, name: str) -> FoundCall:
        """A response that is kept.

        Raises:
            NotFound: it is not, or not any more, or it is another tenant's.
        """
        match = _ID.fullmatch(name)
        found = None
        if match is not None:
            found = await self._streams.find(int(match[1], 16), tenant_of(http_request))
        if found is None or found.call.first.endpoint != "responses":
            raise NotFound(_NO_RESPONSE)
        if not kept_response(found.call.first.repeated).is_stored:
            raise NotFound(_NO_RESPONSE)
        return found

    async def _as_it_is(self, found: FoundCall) -> dict[str, Any]:
        """The object of a response, as far as it was when it was found."""
        call = found.call
        try:
            answer = await self._output(found)
        except RequestError as error:
            if found.finishes[0] not in _FAILURES:
                raise
            forget_frames(error)
            return failed_response(call.heading, error)
        if answer.finish_reason:
            return response_object(
                call.heading,
                [answer],
                num_prompt_tokens=call.num_prompt_tokens,
                num_cached_tokens=answer.num_cached_tokens,
            )
        encoder = ResponseEncoder(call.heading, request_id=answer.request_id)
        if answer.num_tokens:
            encoder.opening(Told(0, 0, 0))
            encoder.encode(answer.deltas, Told(0, 0, 0), logprobs=None)
        return encoder.response()

    async def _num_events(self, found: FoundCall) -> int:
        """How many events a response has at least."""
        answer = await self._output(found)
        encoder = ResponseEncoder(found.call.heading, request_id=answer.request_id)
        encoder.opening(Told(0, 0, 0))
        told = Told(0, 0, 0, finish_reason=answer.finish_reason or None)
        encoder.encode(answer.deltas, told, logprobs=None)
        return encoder.num_events

    async def _output(self, found: FoundCall) -> Answer:
        """What the supervisor knew of a response when it was found."""
        [request], [presentation] = found.call.requests, found.call.presentations
        output = ChoiceOutput(request, presentation, self._served.tokenizer)
        snapshot = _Snapshot(output, length=found.lengths[0], has_ended=bool(found.finishes[0]))
        if not snapshot.is_complete:
            await self._answers.look(output, snapshot, snapshot.complete)
        return snapshot.answer()

    async def _earlier(self, http_request: web.Request, name: str) -> list[Message]:
        """The conversation that a response was about, with its answer."""
        param = "previous_response_id"
        try:
            found = await self._find(http_request, name)
        except NotFound as error:
            raise NotFound(error.message, param=param) from None
        response = await self._as_it_is(found)
        if response["status"] not in {"completed", "incomplete"}:
            raise InvalidRequest("the response before this one is not complete", param=param)
        kept = kept_response(found.call.first.repeated)
        return [*kept.conversation, message_of_output(response["output"])]


class _Snapshot:
    """The sink of a look at a response: it is complete when all that was known has come."""

    def __init__(self, output: ChoiceOutput, *, length: int, has_ended: bool) -> None:
        self._output = output
        self._length = length
        self._has_ended = has_ended
        self._deltas: list[Delta] = []
        self.complete: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        if self._output.is_over:
            return True
        return not self._has_ended and self._output.num_tokens >= self._length

    def deliver(self, row: TokenRow, engine: str) -> None:  # noqa: ARG002
        """See ``Sink``."""
        if self.is_complete:
            return
        self._output.advance(row)
        self._deltas += self._output.take_deltas()
        if self.is_complete and not self.complete.done():
            if self._output.error is not None:
                self.complete.set_exception(self._output.error)
            else:
                self.complete.set_result(None)

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        if not self.complete.done():
            self.complete.set_exception(error)

    def answer(self) -> Answer:
        """What has come; without a reason to finish if there may be more."""
        output = self._output
        return Answer(
            index=0,
            text="",
            num_tokens=output.num_tokens,
            finish_reason=output.finish_reason or "",
            logprobs=None,
            deltas=self._deltas,
            num_reasoning_tokens=output.num_reasoning_tokens,
            num_cached_tokens=output.num_cached_tokens,
            request_id=output.request.request_id,
        )


def _unattended(call: Call) -> Call:
    """A call that goes on whatever becomes of this gateway: requests with a key do."""
    requests = [
        request
        if request.idempotency_key
        else dataclasses.replace(
            request,
            idempotency_key=hashlib.sha256(b"background %d" % request.group_id).digest(),
        )
        for request in call.requests
    ]
    return dataclasses.replace(call, requests=requests)
