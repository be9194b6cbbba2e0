"""The project's own API: generation with its measures, what became of requests, health."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from typing import Any, Final

from aiohttp import web

from understudy.actors.http_answers import Answers, json_response
from understudy.actors.http_choices import RequestPort
from understudy.actors.http_frames import forget_frames
from understudy.actors.http_generation import GenerationEndpoints, Prepared
from understudy.actors.http_rejoin import IDEMPOTENCY_KEY_HEADER, StreamEndpoints, tenant_of
from understudy.protocol.errors import (
    AlreadySubmitted,
    InvalidRequest,
    NotFound,
    RequestError,
    Unavailable,
)
from understudy.protocol.messages import TimelineRequest, Timelines
from understudy.protocol.openai.completions import Completion
from understudy.protocol.openai.generate import (
    measures,
    output_object,
    parse_batch,
    parse_generate,
    request_object,
    summary,
)
from understudy.protocol.timeline import RequestTimeline
from understudy.runtime.kit.clock import Clock

LATEST_MAX: Final = 128
"""Requests that are told of without being named."""
_ID: Final = re.compile(r"(?:chatcmpl-|cmpl-|resp_|msg_|embd-|score-|rerank-)?([0-9a-f]{16})")


class NativeEndpoints:
    """``/v1/generate``, ``/v1/batch``, ``/v1/health``, ``/v1/metrics`` and ``/v1/requests``.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon.
        generation: Makes calls of bodies.
        answers: Where calls are answered.
        streams: Where calls are found that came before.
        clock: Time for the core.
    """

    def __init__(
        self,
        port: RequestPort,
        wake: Callable[[], None],
        generation: GenerationEndpoints,
        answers: Answers,
        streams: StreamEndpoints,
        *,
        clock: Clock,
    ) -> None:
        self._port = port
        self._wake = wake
        self._generation = generation
        self._answers = answers
        self._streams = streams
        self._clock = clock

    async def generate(self, http_request: web.Request) -> web.StreamResponse:
        """Answer ``POST /v1/generate``; a stream has the events of ``/v1/completions``."""
        raw = await self._generation.read(http_request)
        body = parse_generate(raw, self._generation.model())
        self._generation.refuse_early(http_request, body.generation, size=len(raw))
        prepared = await self._generation.prepare_completion(body, size=len(raw))
        if body.generation.stream:
            return await self._generation.answer(http_request, raw, prepared)
        return json_response(await self._generate(http_request, raw, prepared))

    async def batch(self, http_request: web.Request) -> web.Response:
        """Answer ``POST /v1/batch``: many requests at once, each with its own end."""
        if IDEMPOTENCY_KEY_HEADER in http_request.headers:
            raise InvalidRequest(
                f"{IDEMPOTENCY_KEY_HEADER} is not for batches", param=IDEMPOTENCY_KEY_HEADER
            )
        raw = await self._generation.read(http_request)
        bodies = parse_batch(raw, self._generation.model())
        started_at = self._clock.now()
        results = await asyncio.gather(
            *[self._one_of_batch(http_request, raw, body) for body in bodies]
        )
        elapsed_s = self._clock.now() - started_at
        tokens = sum(
            len(output["token_ids"]) for result in results for output in result.get("outputs", [])
        )
        return json_response(
            {
                "results": results,
                "metrics": {
                    "latency_s": elapsed_s,
                    "output_tokens": tokens,
                    "tokens_per_s": tokens / elapsed_s if elapsed_s else None,
                },
            }
        )

    async def request(self, http_request: web.Request) -> web.Response:
        """Answer ``GET /v1/requests/{id}``: what became of a call, by the id of its answer."""
        name = http_request.match_info["id"]
        match = _ID.fullmatch(name)
        found: list[RequestTimeline] = []
        if match is not None and int(match[1], 16):
            found = await self._timelines(http_request, group_id=int(match[1], 16))
        if not found:
            raise NotFound("there is no such request (any more)")
        return json_response({"id": name, "requests": list(map(request_object, found))})

    async def metrics(self, http_request: web.Request) -> web.Response:
        """Answer ``GET /v1/metrics``: how the caller's latest requests fared."""
        found = await self._timelines(http_request, group_id=0)
        return json_response(
            {"summary": summary(found), "requests": list(map(request_object, found))}
        )

    async def health(self, _: web.Request) -> web.Response:
        """Answer ``GET /v1/health``: whether requests are served, and by how many engines."""
        cluster = self._port.cluster
        serves = self._port.is_connected and not cluster.is_draining
        is_healthy = serves and cluster.engines_serving > 0
        body = {
            "status": "healthy" if is_healthy else "unavailable",
            "is_connected": self._port.is_connected,
            "is_draining": cluster.is_draining,
            "engines_serving": cluster.engines_serving,
            "engines_known": cluster.engines_known,
        }
        return json_response(body, status=200 if is_healthy else 503)

    async def _one_of_batch(
        self, http_request: web.Request, raw: bytes, body: Completion
    ) -> dict[str, Any]:
        try:
            prepared = await self._generation.prepare_completion(body, size=len(raw))
            return await self._generate(http_request, raw, prepared)
        except RequestError as error:
            forget_frames(error)
            return error.body()

    async def _generate(
        self, http_request: web.Request, raw: bytes, prepared: Prepared
    ) -> dict[str, Any]:
        """Have a call answered, and tell how it fared."""
        call = self._generation.call(http_request, raw, prepared)
        try:
            answers = await self._answers.collect(call)
        except AlreadySubmitted as submitted:
            forget_frames(submitted)
            tenant = tenant_of(http_request)
            found = await self._streams.find(submitted.original_group_id, tenant)
            if found is None:
                raise Unavailable("the answer to this idempotency key is gone") from None
            call = found.call
            answers = await self._answers.collect(call)
        group_id = call.requests[0].group_id
        timelines = {
            timeline.request_id: timeline
            for timeline in await self._timelines(http_request, group_id=group_id)
        }
        outputs = [
            {
                **output_object(answer),
                "metrics": measures(timelines[answer.request_id])
                if answer.request_id in timelines
                else None,
            }
            for answer in answers
        ]
        heading = call.heading
        return {
            "id": heading.answer_id,
            "created": heading.created,
            "model": heading.model,
            "outputs": outputs,
        }

    async def _timelines(
        self, http_request: web.Request, *, group_id: int
    ) -> list[RequestTimeline]:
        told: asyncio.Future[Timelines | None] = asyncio.get_running_loop().create_future()

        def tell(answer: Timelines | None) -> None:
            if not told.done():
                told.set_result(answer)

        asked = TimelineRequest(tenant_of(http_request), group_id, LATEST_MAX)
        self._port.timelines(asked, tell, self._clock.now())
        self._wake()
        answer = await told
        if answer is None:
            raise Unavailable("the supervisor cannot be reached")
        return list(answer.timelines)
