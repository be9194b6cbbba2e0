"""Calls that are under way: a server that stops takes no more of them, and waits for these."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from understudy.protocol.errors import RequestError, Unavailable

STOPPING: Final = "the gateway is stopping"


class OpenCalls:
    """Calls that are under way.

    Args:
        timeout_s: How long they may take when the server stops.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._fails: dict[object, Callable[[RequestError], None]] = {}
        self._all_over = asyncio.Event()
        self._is_stopping = False

    def admit(self) -> None:
        """Whether a call may begin.

        Raises:
            Unavailable: the server stops.
        """
        if self._is_stopping:
            raise Unavailable(STOPPING)

    @contextmanager
    def under_way(self, fail: Callable[[RequestError], None]) -> Iterator[None]:
        """A call is under way for as long as the context lasts; ``fail`` ends it with an error."""
        key = object()
        self._fails[key] = fail
        try:
            yield
        finally:
            del self._fails[key]
            if not self._fails:
                self._all_over.set()

    async def stop(self) -> None:
        """Wait for the calls that are under way, up to a limit; then end them with an error."""
        self._is_stopping = True
        try:
            async with asyncio.timeout(self._timeout_s):
                while self._fails:
                    self._all_over.clear()
                    await self._all_over.wait()
        except TimeoutError:
            for fail in list(self._fails.values()):
                fail(Unavailable(STOPPING))
