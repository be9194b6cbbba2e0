"""When those who are refused shall come back: one after the other, as places become free.

The supervisor says when half of its queue will have gone. If all who are refused came back then,
most would be refused again. So each is given a place in time of its own, as far apart as calls end
here, from that moment on. The line is no longer than ``SPREAD_MAX_S``: some of those who are told
to come back never do, and a burst must not send everyone away for minutes. Pure: times are given.
"""

from __future__ import annotations

from typing import Final

from understudy.protocol.errors import Overloaded
from understudy.runtime.control.admission import FinishRate

SPREAD_MAX_S: Final = 30.0


class ReturnTimes:
    """The line of those who were told to come back."""

    def __init__(self) -> None:
        self._rate = FinishRate()
        self._last_at = 0.0

    def call_ended(self, now: float) -> None:
        """A call was answered: so many a second find a place."""
        self._rate.record(now)

    def in_line(self, refusal: Overloaded, now: float) -> Overloaded:
        """The refusal with a time to come back that is nobody else's."""
        first_s, rate = refusal.retry_after_s, self._rate.per_s(now)
        if first_s is None or rate <= 0:
            return refusal
        earliest = now + first_s
        if not earliest <= self._last_at <= earliest + SPREAD_MAX_S:
            self._last_at = earliest
        self._last_at += min(1 / rate, SPREAD_MAX_S)
        return Overloaded(refusal.message, retry_after_s=self._last_at - now)
