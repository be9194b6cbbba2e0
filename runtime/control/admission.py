"""Admission: whether the queue takes one more request, and if not, when to come back.

A queue that grows without bound helps nobody: everyone in it waits longer, and in the end for
nothing. So it is bounded in requests, tokens and bytes, a refusal is immediate, and the time it
names is computed: what has to leave the queue first, at the rate at which requests have ended.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

RETRY_AFTER_MIN_S: Final = 1.0
RETRY_AFTER_MAX_S: Final = 120.0
"""OpenAI's clients ignore a longer time."""
RATE_HALF_LIFE_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class AdmissionLimits:
    """How much may wait."""

    requests_max: int = 1024
    tokens_max: int = 4 * 1024 * 1024
    bytes_max: int = 256 * 1024 * 1024


class Refusal(NamedTuple):
    """Why a request is not taken, and when to come back."""

    message: str
    retry_after_s: float


class FinishRate:
    """How many requests end in a second, with older ends counting less and less."""

    def __init__(self) -> None:
        self._weight = 0.0
        self._at = 0.0

    def record(self, now: float) -> None:
        """One request has ended."""
        self._weight = self._decayed(now) + 1.0
        self._at = now

    def per_s(self, now: float) -> float:
        """Ends a second."""
        return self._decayed(now) * math.log(2) / RATE_HALF_LIFE_S

    def _decayed(self, now: float) -> float:
        return self._weight * math.exp2((self._at - now) / RATE_HALF_LIFE_S)


class Admission:
    """Decides about each request at the door."""

    def __init__(self, limits: AdmissionLimits) -> None:
        self._limits = limits
        self.finish_rate = FinishRate()

    def refusal(
        self,
        *,
        num_tokens: int,
        requests_waiting: int,
        tokens_waiting: int,
        now: float,
        num_bytes: int = 0,
        bytes_waiting: int = 0,
    ) -> Refusal | None:
        """Why a request with so many prompt tokens is refused; ``None`` if it is taken."""
        if requests_waiting >= self._limits.requests_max:
            message = f"{requests_waiting} requests are waiting, the most that may"
        elif requests_waiting and tokens_waiting + num_tokens > self._limits.tokens_max:
            message = f"{tokens_waiting} prompt tokens are waiting; {num_tokens} more are too many"
        elif requests_waiting and bytes_waiting + num_bytes > self._limits.bytes_max:
            message = f"{bytes_waiting} bytes of requests are waiting; {num_bytes} more do not fit"
        else:
            return None
        return Refusal(message, self.retry_after_s(requests_waiting, now))

    def retry_after_s(self, requests_waiting: int, now: float) -> float:
        """Until half of the queue should have gone: then there is room for those sent away."""
        rate = self.finish_rate.per_s(now)
        if rate <= 0:
            return RETRY_AFTER_MAX_S
        return min(max(requests_waiting / 2 / rate, RETRY_AFTER_MIN_S), RETRY_AFTER_MAX_S)
