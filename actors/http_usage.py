"""``GET /v1/usage``: what the caller's tenant has used, day by day."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final

from aiohttp import web

from understudy.actors.http_answers import json_response
from understudy.actors.http_choices import RequestPort
from understudy.actors.http_rejoin import tenant_of
from understudy.protocol.errors import InvalidRequest, Unavailable
from understudy.protocol.messages import UsageReply
from understudy.protocol.usage import DayUsage

DAYS_MAX: Final = 92
DAY_S: Final = 86_400


class UsageEndpoint:
    """Answers for the tenant whose key the call came with, and for no other.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self, port: RequestPort, wake: Callable[[], None], *, wall_clock: Callable[[], float]
    ) -> None:
        self._port = port
        self._wake = wake
        self._wall_clock = wall_clock

    async def usage(self, http_request: web.Request) -> web.Response:
        """Answer ``GET /v1/usage?days=N``: today and the days before it, the latest last."""
        text = http_request.query.get("days", str(DAYS_MAX))
        is_number = text.isascii() and text.isdecimal() and len(text) <= 3
        if not is_number or not 1 <= int(text) <= DAYS_MAX:
            raise InvalidRequest(f"days must be from 1 to {DAYS_MAX}", param="days")
        answer: asyncio.Future[UsageReply | None] = asyncio.get_running_loop().create_future()

        def told(reply: UsageReply | None) -> None:
            if not answer.done():
                answer.set_result(reply)

        self._port.ask_usage(tenant_of(http_request), told)
        self._wake()
        reply = await answer
        if reply is None:
            raise Unavailable("the supervisor cannot be reached")
        first_day = int(self._wall_clock() // DAY_S) - int(text) + 1
        days = [day for day in reply.days if day.day >= first_day]
        return json_response(
            {
                "object": "usage",
                "tenant": reply.tenant,
                "data": [_shown(day) for day in days],
                "total": _counts(days),
            }
        )


def _shown(day: DayUsage) -> dict[str, Any]:
    date = datetime.fromtimestamp(day.day * DAY_S, UTC).date().isoformat()
    return {"object": "usage.day", "date": date, **_counts([day])}


def _counts(days: list[DayUsage]) -> dict[str, Any]:
    return {
        "requests": sum(day.requests for day in days),
        "prompt_tokens": sum(day.prompt_tokens for day in days),
        "cached_tokens": sum(day.cached_tokens for day in days),
        "output_tokens": sum(day.output_tokens for day in days),
        "kv_token_seconds": round(sum(day.kv_token_s for day in days), 3),
    }
