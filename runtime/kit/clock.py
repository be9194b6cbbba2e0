"""Time, as an argument. The only place of the kit that reads a clock or sleeps."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol


class Clock(Protocol):
    """Where an actor's work takes its time from."""

    def now(self) -> float:
        """Seconds since an arbitrary start; never goes back."""
        ...

    def sleep(self, seconds: float) -> None:
        """Let time pass, as work does. The actor does nothing else meanwhile."""
        ...


class MonotonicClock:
    """The machine's clock: monotonic, so that a step of the wall clock means nothing."""

    def now(self) -> float:
        """Seconds since the machine started."""
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Block the calling thread."""
        time.sleep(seconds)


class VirtualClock:
    """The fake beside the clock: a loop sets it, and work that takes time moves it on.

    Every actor under a virtual loop has its own, so that one engine's long step delays nobody
    else.
    """

    def __init__(self, start: float = 0.0) -> None:
        self._now = start
        self.on_sleep: Callable[[float, float], None] = lambda _start, _end: None
        """Told from when until when, before time moves on: the actor is as it is meanwhile."""

    def now(self) -> float:
        """The actor's own time, in virtual seconds."""
        return self._now

    def sleep(self, seconds: float) -> None:
        """Move the actor's own time on, at once."""
        assert seconds >= 0
        end = self._now + seconds
        self.on_sleep(self._now, end)
        self._now = end

    def advance_to(self, now: float) -> None:
        """Catch up with the loop; an actor that is busy is already ahead."""
        self._now = max(self._now, now)
