"""The circuit breaker: an engine that fails request after request gets none for a while. Pure.

Deaths are for ``company``; this is for an engine that lives, beats, and answers with errors. After
Nygard, "Release It!" (2007)::

    closed ── FAILURES_MAX failures in a row ──▶ open ── after a pause ──▶ half open
       ▲                                          ▲                            │
       │                                          └──── it fails: twice ───────┤
       └────────────────────────────── it succeeds ────────────────────────────┘

Half open it gets one request at a time. Failures count in a row, so that a request which fails for
its own sake, among others that do well, opens nothing.
"""

from __future__ import annotations

from enum import Enum
from typing import Final

FAILURES_MAX: Final = 5
PAUSE_MIN_S: Final = 1.0
PAUSE_MAX_S: Final = 60.0


class Circuit(Enum):
    """What an engine gets."""

    CLOSED = "closed"
    """Everything."""
    OPEN = "open"
    """Nothing."""
    HALF_OPEN = "half_open"
    """One request, to see how it does."""


class CircuitBreaker:
    """The circuit of one engine."""

    __slots__ = ("_failures", "_open_until", "_pause_s", "_probe")

    def __init__(self) -> None:
        self._failures = 0
        self._open_until: float | None = None
        self._pause_s = PAUSE_MIN_S
        self._probe: int | None = None

    def state(self, now: float) -> Circuit:
        """What the engine gets now."""
        if self._open_until is None:
            return Circuit.CLOSED
        return Circuit.OPEN if now < self._open_until else Circuit.HALF_OPEN

    def allows(self, now: float) -> bool:
        """Whether the engine may get one more request."""
        state = self.state(now)
        return state is Circuit.CLOSED or (state is Circuit.HALF_OPEN and self._probe is None)

    def assigned(self, request_id: int, now: float) -> None:
        """The engine got a request."""
        if self.state(now) is Circuit.HALF_OPEN:
            self._probe = request_id

    def succeeded(self, request_id: int) -> None:
        """A request has made a token, or ended well."""
        self._failures = 0
        if self._open_until is not None and request_id == self._probe:
            self._open_until = None
            self._pause_s = PAUSE_MIN_S
            self._probe = None

    def withdrawn(self, request_id: int) -> None:
        """A request left the engine without having shown anything."""
        if request_id == self._probe:
            self._probe = None

    def failed(self, request_id: int, now: float) -> None:
        """A request has failed, and not for its own sake as far as one can tell."""
        self._failures += 1
        if request_id == self._probe:
            self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
        elif self._open_until is not None or self._failures < FAILURES_MAX:
            return
        self._probe = None
        self._open_until = now + self._pause_s


class Circuits:
    """The circuits of all engines. While none has failed, asking costs nothing."""

    def __init__(self) -> None:
        self._breakers: dict[str, CircuitBreaker] = {}

    def __bool__(self) -> bool:
        return bool(self._breakers)

    def allows(self, engine: str, now: float) -> bool:
        """Whether an engine may get one more request."""
        return engine not in self._breakers or self._breakers[engine].allows(now)

    def assigned(self, engine: str, request_id: int, now: float) -> None:
        """An engine got a request."""
        if engine in self._breakers:
            self._breakers[engine].assigned(request_id, now)

    def succeeded(self, engine: str, request_id: int) -> None:
        """An engine has done something for a request."""
        if engine in self._breakers:
            self._breakers[engine].succeeded(request_id)

    def withdrawn(self, engine: str, request_id: int) -> None:
        """A request has left an engine."""
        if engine in self._breakers:
            self._breakers[engine].withdrawn(request_id)

    def failed(self, engine: str, request_id: int, now: float) -> None:
        """An engine has failed a request."""
        self._breakers.setdefault(engine, CircuitBreaker()).failed(request_id, now)

    def forget(self, engine: str) -> None:
        """An engine is gone."""
        self._breakers.pop(engine, None)
