"""What aiohttp refuses before there is a request: answered in our form, and without an echo.

It tells the client what was wrong with a request line or a header by repeating it, which is a
kilobyte of whatever came for each, keys included.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from aiohttp import web

from understudy.actors.http_answers import json_response
from understudy.actors.http_frames import forget_frames
from understudy.protocol.errors import InternalError, InvalidRequest, RequestError

NO_HTTP: Final = "this is no HTTP request that could be understood"


class RefusingHandler(web.RequestHandler):
    """Speaks HTTP on one connection."""

    __slots__ = ()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what has not become a request, or failed on its way to the application."""
        try:
            super().handle_error(request, status, exc, message)
        finally:
            if exc is not None:
                forget_frames(exc)
        error: RequestError = InvalidRequest(NO_HTTP)
        if status >= 500:
            error = InternalError("the gateway failed")
        response = json_response(error.body(), status=status)
        response.force_close()
        return response


def refusing(server: web.Server) -> Callable[[], asyncio.Protocol]:
    """A factory of such handlers for a server, which else makes its own."""
    loop = asyncio.get_running_loop()
    return lambda: RefusingHandler(server, loop=loop, **server._kwargs)
