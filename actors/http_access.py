"""Who may come in: every call but three needs a key, whatever its path looks like.

The three are told by the bytes of the request line, before anything is decoded or normalised, so
that no spelling of a path is open which the router would take for another. What follows from the
key, tenant and limits, is noted on the request and taken from there by who makes requests of it.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from typing import Final

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler, Middleware

from understudy.actors.http_rejoin import TENANT, tenant_of
from understudy.protocol.errors import InvalidApiKey, InvalidRequest, ModelNotFound
from understudy.protocol.openai.sampling import DEADLINE_MS_MAX
from understudy.protocol.request import Request
from understudy.runtime.keys import KeyRecord

OPEN_TARGETS: Final = frozenset({"/health", "/live", "/ready"})
"""What a load balancer asks. With a query it is another question, and needs a key."""
DEADLINE_HEADER: Final = "X-Request-Deadline-Ms"
TTFT_HEADER: Final = "x-llm-d-slo-ttft-ms"

KEY: Final = web.RequestKey("key", KeyRecord)
ARRIVED_AT: Final = web.RequestKey("arrived_at", float)
"""On the event loop's clock."""

FindKey = Callable[[bytes], KeyRecord | None]


def access_middleware(find: FindKey | None, model: str) -> Middleware:
    """Lets in who has a key, and notes whose it is. Without ``find`` everybody may come in."""

    @web.middleware
    async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[ARRIVED_AT] = asyncio.get_running_loop().time()
        if find is None or request.raw_path in OPEN_TARGETS:
            return await handler(request)
        presented = presented_key(request)
        key = None if presented is None else find(presented)
        if key is None:
            raise InvalidApiKey("give a key that is valid here: Authorization: Bearer KEY")
        if key.models and model not in key.models and request.method == hdrs.METH_POST:
            raise ModelNotFound(f"this key is not for the model {model!r}", param="model")
        request[KEY] = key
        request[TENANT] = key.tenant
        return await handler(request)

    return check


def presented_key(http_request: web.Request) -> bytes | None:
    """The key that a call comes with: as a bearer token (RFC 6750), or as Anthropic's clients do.

    ``None`` if it comes with none, or with several: two readers could disagree which one counts.
    """
    headers = http_request.headers
    bearers = headers.getall(hdrs.AUTHORIZATION, [])
    plain = headers.getall("x-api-key", [])
    if len(bearers) > 1 or len(plain) > 1 or not (bearers or plain):
        return None
    presented = plain[0] if plain else ""
    if bearers:
        scheme, _, token = bearers[0].partition(" ")
        if scheme.lower() != "bearer" or (plain and plain[0] != token.strip()):
            return None
        presented = token.strip()
    return presented.encode("utf-8", "surrogateescape")


def priority_of(http_request: web.Request, asked: int) -> int:
    """How urgent a call may be that asks for this priority."""
    key = http_request.get(KEY)
    return asked if key is None else max(asked, key.priority)


def with_rights(http_request: web.Request, requests: Sequence[Request]) -> list[Request]:
    """Requests as the caller may make them: its tenant's, and no more urgent than its key allows.

    Deadlines in headers are noted, too; with one in the body, the earlier counts. What has passed
    since the call came is taken off.

    Raises:
        InvalidRequest: a header is no deadline.
    """
    deadline_s = _header_s(http_request, DEADLINE_HEADER)
    first_token_s = _header_s(http_request, TTFT_HEADER)
    passed_s = asyncio.get_running_loop().time() - http_request[ARRIVED_AT]
    return [
        dataclasses.replace(
            request,
            tenant=tenant_of(http_request),
            priority=priority_of(http_request, request.priority),
            deadline_s=_earlier(deadline_s, request.deadline_s, passed_s),
            first_token_s=_earlier(first_token_s, request.first_token_s, passed_s),
        )
        for request in requests
    ]


def _earlier(one_s: float | None, other_s: float | None, passed_s: float) -> float | None:
    given = [seconds for seconds in (one_s, other_s) if seconds is not None]
    return max(0.0, min(given) - passed_s) if given else None


def _header_s(http_request: web.Request, name: str) -> float | None:
    """A header that gives a time in milliseconds."""
    given = http_request.headers.getall(name, [])
    if not given:
        return None
    text = given[0].strip()
    is_number = text.isascii() and text.isdecimal() and len(text) <= 9
    if len(given) > 1 or not is_number or not 1 <= int(text) <= DEADLINE_MS_MAX:
        raise InvalidRequest(f"{name}: give whole milliseconds, 1 to {DEADLINE_MS_MAX}", param=name)
    return int(text) / 1e3
