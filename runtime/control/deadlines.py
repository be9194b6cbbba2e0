"""Deadlines: when to look after which request. Pure.

Who waits past its time is ended here, so that nothing expired ever reaches a prefill. What runs is
ended by its engine, with the step in which its time is over; only if that does not happen, because
the engine hangs, it is done here a little later.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Final

from understudy.protocol.errors import InternalError, RequestError, Unavailable
from understudy.runtime.control.ledger import Entry

LATE_AFTER_S: Final = 0.5
"""What an engine has to end what it runs."""


STALL_MAX_S: Final = 600.0
"""A request that waits, or is with an engine, for so long without a token ends with an error."""


class Deadlines:
    """The deadlines of all living requests that have one."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int]] = []

    @property
    def next_at(self) -> float | None:
        """When there is something to look after."""
        return self._due[0][0] if self._due else None

    def watch(self, entry: Entry) -> None:
        """Look after a request from now on, if it has a deadline."""
        if entry.due_at < float("inf"):
            heapq.heappush(self._due, (entry.due_at, entry.request_id))

    def passed(self, get: Callable[[int], Entry | None], now: float) -> Iterator[Entry]:
        """The requests that are to be ended; ``get`` gives those that live."""
        while self._due and self._due[0][0] <= now:
            _, request_id = heapq.heappop(self._due)
            entry = get(request_id)
            if entry is None:
                continue
            limit = entry.due_at if entry.engine is None else entry.deadline_at + LATE_AFTER_S
            if now >= limit:
                yield entry
            elif limit < float("inf"):
                heapq.heappush(self._due, (limit, request_id))


def stall_error(entry: Entry) -> RequestError:
    """What a request is told that has stood still for too long."""
    if entry.engine is None:
        return Unavailable(f"no engine took the request within {STALL_MAX_S:.0f} s")
    return InternalError(f"the engine made no token within {STALL_MAX_S:.0f} s")
