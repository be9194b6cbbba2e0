"""What an operator may tell a node over HTTP: on a unix socket in the run directory, nowhere else.

Whoever may open the socket may say it; the directory is its owner's alone.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from aiohttp import web

from understudy.protocol.errors import Unavailable


class AdminPort(Protocol):
    """What a gateway's core does for an operator."""

    def reset_prefix_cache(self) -> bool:
        """Have every engine forget what it has computed; whether anybody hears it."""
        ...


async def serve_admin(port: AdminPort, wake: Callable[[], None], path: Path) -> web.AppRunner:
    """Serve on a unix socket until the returned runner is cleaned up.

    Args:
        port: The gateway's core.
        wake: Has the core's messages sent soon.
        path: The socket; one that an earlier process has left is replaced.
    """

    async def reset_prefix_cache(_: web.Request) -> web.Response:
        if not port.reset_prefix_cache():
            error = Unavailable("the supervisor is away; try again")
            return web.json_response(error.body(), status=error.status)
        wake()
        return web.json_response({})

    app = web.Application(client_max_size=1024)
    app.router.add_post("/reset_prefix_cache", reset_prefix_cache)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)  # noqa: PTH108 - one call of the kernel, which does not block
    await web.UnixSite(runner, str(path)).start()
    return runner


def admin_socket(run_dir: Path, name: str) -> Path:
    """Where a gateway takes orders."""
    return run_dir / f"{name}.admin"
