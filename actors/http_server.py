"""The gateway's HTTP server: paths, errors, health. What generates is in ``http_generation``.

Every answer that is not a success is an error object in OpenAI's form, those of aiohttp included.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
import secrets
import socket
import time
from collections.abc import Callable
from typing import Final

from aiohttp import hdrs, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.typedefs import Handler, Middleware

from understudy.actors.grammar_checks import GrammarChecks
from understudy.actors.http_access import FindKey, access_middleware
from understudy.actors.http_answers import Answers, HttpLimits, json_response
from understudy.actors.http_choices import RequestPort
from understudy.actors.http_frames import forget_frames
from understudy.actors.http_generation import GenerationEndpoints
from understudy.actors.http_guard import ConnectionGuards, GuardedSite
from understudy.actors.http_messages import PATH as ANTHROPIC_PATH
from understudy.actors.http_messages import MessageEndpoints
from understudy.actors.http_native import NativeEndpoints
from understudy.actors.http_pooled import PooledCalls
from understudy.actors.http_pooling import PoolingEndpoints
from understudy.actors.http_rejoin import StreamEndpoints
from understudy.actors.http_responses import ResponseEndpoints
from understudy.actors.http_routes import Endpoints, add_routes, routes
from understudy.actors.http_status import StatusEndpoints
from understudy.actors.http_tokenization import TokenizationEndpoints
from understudy.actors.http_usage import UsageEndpoint
from understudy.protocol.anthropic.messages import error_body
from understudy.protocol.errors import (
    InternalError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    RequestError,
)
from understudy.runtime.kit.clock import Clock
from understudy.runtime.kit.listening import BACKLOG
from understudy.runtime.kit.tls import Certificate
from understudy.runtime.log import get_logger, where_it_failed
from understudy.runtime.served_model import ServedModel

WRITE_LAST_S: Final = 1.0
"""For what the last calls have still to write when the server stops."""
LEAVE_S: Final = 0.5
"""For calls that were on their way when the server was told to stop."""
RETRY_AFTER_S: Final = 1.0
RETRY_AFTER_MAX_S: Final = 120.0
"""Above it the OpenAI clients do not wait."""
RETRY_JITTER: Final = 0.2

REQUEST_ID_HEADER: Final = "X-Request-Id"

_IS_LEAVING: Final = web.AppKey("is_leaving", asyncio.Event)
_REQUEST_ID: Final = web.RequestKey("request_id", str)
_REQUEST_ID_FORM: Final = re.compile(r"[\x21-\x7e]{1,128}")


async def serve_http(
    port: RequestPort,
    wake: Callable[[], None],
    served: ServedModel,
    *,
    listener: socket.socket,
    clock: Clock,
    limits: HttpLimits | None = None,
    find_key: FindKey | None = None,
    certificate: Certificate | None = None,
    chance: random.Random | None = None,
    wall_clock: Callable[[], float] = time.time,
) -> web.AppRunner:
    """Serve on a listening socket until ``stop_http`` is called with the returned runner.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon; called after each submission or cancellation.
        served: The model.
        listener: Where clients connect; closed in the end.
        clock: Time for the core.
        limits: What one client may take.
        find_key: Tells whose a key is, if calls need one.
        certificate: For TLS.
        chance: Where ids, seeds and jitter come from; the system's if ``None``.
        wall_clock: Seconds since 1970.
    """
    limits, chance = limits or HttpLimits(), chance or secrets.SystemRandom()
    answers = Answers(port, wake, served, limits=limits, clock=clock)
    streams = StreamEndpoints(port, wake, served, answers, clock=clock)
    generation = GenerationEndpoints(
        served,
        answers,
        streams,
        GrammarChecks(served.directory),
        cluster=lambda: port.cluster,
        limits=limits,
        wall_clock=wall_clock,
        draw=chance.getrandbits,
    )
    pooled = PooledCalls(port, wake, answers, limits=limits, clock=clock)
    pooling = PoolingEndpoints(served, generation, pooled, wall_clock, chance.getrandbits)
    guards = ConnectionGuards(limits, asyncio.get_running_loop().time)
    app = _application(
        limits,
        guards.middleware(),
        _error_middleware(chance),
        access_middleware(find_key, served.name),
    )
    status, usage = StatusEndpoints(port, served), UsageEndpoint(port, wake, wall_clock=wall_clock)
    endpoints = Endpoints(
        generation=generation,
        responses=ResponseEndpoints(port, served, generation, answers, streams),
        messages=MessageEndpoints(generation),
        tokenization=TokenizationEndpoints(served, generation),
        native=NativeEndpoints(port, wake, generation, answers, streams, clock=clock),
        pooling=pooling,
        streams=streams,
        status=status,
        usage=usage,
    )
    version, has_keys = status.server_version, find_key is not None
    add_routes(app.router, routes(endpoints, version=version, has_keys=has_keys))

    _stop_with(app, answers, pooled, generation, guards)
    return await _start(app, listener, guards, certificate)


def _stop_with(
    app: web.Application,
    answers: Answers,
    pooled: PooledCalls,
    generation: GenerationEndpoints,
    guards: ConnectionGuards,
) -> None:
    """Have what an application runs on end with it."""

    async def stop(_: web.Application) -> None:
        await asyncio.gather(answers.stop(), pooled.stop())
        generation.close()
        guards.stop()

    app.on_shutdown.append(stop)


def _application(limits: HttpLimits, *middlewares: Middleware) -> web.Application:
    """An application without paths; what comes first of ``middlewares`` is outermost."""
    app = web.Application(client_max_size=limits.body_bytes_max, middlewares=middlewares)
    app[_IS_LEAVING] = asyncio.Event()
    app.on_response_prepare.extend((_add_request_id, _say_farewell))
    return app


async def _start(
    app: web.Application,
    listener: socket.socket,
    guards: ConnectionGuards,
    certificate: Certificate | None,
) -> web.AppRunner:
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        auto_decompress=False,
        logger=_aiohttp_logger(),
        shutdown_timeout=WRITE_LAST_S,
    )
    await runner.setup()
    context = None if certificate is None else certificate.context
    site = GuardedSite(runner, listener, guards, ssl_context=context, backlog=BACKLOG)
    await site.start()
    guards.start()
    return runner


async def stop_http(runner: web.AppRunner) -> None:
    """Stop serving, and cut no call off.

    Others may go on to listen on the same socket, so no connection is taken any more at once.
    Those that are open have a moment in which calls that are on their way arrive, and learn with
    their next answer that it is the last (RFC 9112, section 9.6). Then streams may end.
    """
    for site in list(runner.sites):
        await site.stop()
    assert runner.app is not None
    runner.app[_IS_LEAVING].set()
    if runner.server is not None and runner.server.connections:
        await asyncio.sleep(LEAVE_S)
    await runner.cleanup()


def _aiohttp_logger() -> logging.Logger:
    """Where aiohttp reports what goes wrong, but for what is not HTTP, and clients who have gone.

    Those are the client's doing; a traceback for each would let anyone fill the log.
    """
    logger = logging.getLogger("aiohttp.server")
    logger.addFilter(_is_our_fault)
    return logger


def _is_our_fault(record: logging.LogRecord) -> bool:
    theirs = (HttpProcessingError, ConnectionError)
    return record.exc_info is None or not isinstance(record.exc_info[1], theirs)


def _error_middleware(chance: random.Random) -> Middleware:
    """Turns what handlers raise into error objects, and names the request on every answer."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        request[_REQUEST_ID] = _request_id(request, chance)
        try:
            return await handler(request)
        except ConnectionError:
            raise  # the client is gone; aiohttp knows what to do
        except Exception as error:  # noqa: BLE001 - the outermost frame of a call
            response = _answer_to(error, request, chance)
            forget_frames(error)
            return response

    return answer


def _answer_to(error: Exception, http_request: web.Request, chance: random.Random) -> web.Response:
    """What a client is told of what a handler raised."""
    if isinstance(error, RequestError):
        return _error_response(http_request, error, chance)
    if isinstance(error, web.HTTPException):
        response = _error_response(http_request, _own_error(error), chance, status=error.status)
        if hdrs.ALLOW in error.headers:
            response.headers[hdrs.ALLOW] = error.headers[hdrs.ALLOW]
        return response
    # Its own path may say more than the log should know.
    resource = http_request.match_info.route.resource
    path = None if resource is None else resource.canonical
    get_logger().error("a request failed", path=path, where=where_it_failed(error))
    return _error_response(http_request, InternalError("the gateway failed"), chance)


def _own_error(error: web.HTTPException) -> RequestError:
    """What aiohttp refuses, in our words."""
    match error.status:
        case 404:
            return NotFound("there is no such path")
        case 405:
            return MethodNotAllowed("this path does not take this method")
        case 413:
            return PayloadTooLarge("the body is too large")
        case status if status < 500:
            return InvalidRequest(error.reason)
        case _:
            return InternalError(error.reason)


def _error_response(
    http_request: web.Request,
    error: RequestError,
    chance: random.Random,
    *,
    status: int | None = None,
) -> web.Response:
    """An error object; with it, where a retry can help, when to come back.

    Times are spread, so that clients refused together do not come back together.
    """
    status = status or error.status
    headers = {}
    if status in {429, 503}:
        # Whose own limit it is would come too early before the time that was computed.
        least = 1 if status == 429 else 1 - RETRY_JITTER
        spread = chance.uniform(least, 1 + RETRY_JITTER)
        retry_after_s = min(spread * (error.retry_after_s or RETRY_AFTER_S), RETRY_AFTER_MAX_S)
        headers["Retry-After"] = str(math.ceil(retry_after_s))
        headers["retry-after-ms"] = str(math.ceil(1e3 * retry_after_s))
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if not error.should_retry:
        headers["x-should-retry"] = "false"
    body = error.body()
    if http_request.path.startswith(ANTHROPIC_PATH):
        body = error_body(error, request_id=http_request[_REQUEST_ID])
    return json_response(body, status=status, headers=headers)


def _request_id(http_request: web.Request, chance: random.Random) -> str:
    """The client's name for its request, or a new one."""
    given = http_request.headers.get(REQUEST_ID_HEADER, "")
    return given if _REQUEST_ID_FORM.fullmatch(given) else f"{chance.getrandbits(64):016x}"


async def _add_request_id(http_request: web.Request, response: web.StreamResponse) -> None:
    response.headers[REQUEST_ID_HEADER] = http_request.get(_REQUEST_ID, "")


async def _say_farewell(http_request: web.Request, response: web.StreamResponse) -> None:
    if http_request.app[_IS_LEAVING].is_set():
        response.force_close()
        response.headers[hdrs.CONNECTION] = "close"
