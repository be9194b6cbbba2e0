"""The forecast: when a request that comes now would have its first token, and its last. Pure.

Three times add up: until a place is free, until the prompt is computed, until the answer is made.
What a prompt token and an output token take is measured on the requests that have ended, apart for
each level of load, because steps of larger batches take longer; how long an answer gets is known up
to ``max_tokens``, and below that from the answers of late.

All that is rough, and a promise must not be. So each forecast is compared with what came of it, and
what is promised is the forecast times a margin: the ratio that all but a few of the latest requests
stayed below (a conformal bound; Vovk, Gammerman and Shafer, "Algorithmic learning in a random
world", 2005). Whatever is wrong with the forecast, the margin makes up for it, as long as the next
requests are like the latest.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final, NamedTuple

KEPT: Final = 256
"""Requests that the present is judged by."""
ENOUGH: Final = 16
"""With fewer than so many nothing is forecast: who comes is taken."""
COVERAGE: Final = 0.975
"""The share of requests that the margin has to cover. Of those that are promised their time, 95 %
have to make it; the rest is for what changes between two requests."""
LENGTH_COVERAGE: Final = 0.95
MEMORY: Final = 1 / 16
"""The weight of the latest request in a mean."""


class Load(NamedTuple):
    """What a newcomer finds."""

    num_places: int
    """Sequences that all engines together run at once."""
    num_running: int
    """Requests that are with engines."""
    num_ahead: int
    """Requests that wait, and would be served before it."""


class Promise(NamedTuple):
    """When a request has its first and its last token, in seconds from now."""

    first_token_s: float
    finish_s: float


@dataclass(frozen=True, slots=True)
class Course:
    """How a request went."""

    num_prompt_tokens: int
    """Those that had to be computed."""
    num_output_tokens: int
    prefill_s: float
    """From its engine to its first token."""
    decode_s: float
    """From its first token to its last."""
    num_beside: int
    """Requests that were with engines when it came to its own."""
    had_to_wait: bool
    """Whether its engine was full then, so that ``prefill_s`` has more in it than the prompt."""


class _Mean:
    """A mean that forgets."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, value: float) -> None:
        self.value = value if self.value is None else self.value + MEMORY * (value - self.value)


class _Rates:
    """Seconds for a token, by how many requests run beside it: a mean for each power of two."""

    def __init__(self) -> None:
        self._means: dict[int, _Mean] = {}

    def add(self, num_beside: int, seconds: float) -> None:
        self._means.setdefault(num_beside.bit_length(), _Mean()).add(seconds)

    def at(self, num_beside: int) -> float | None:
        """The mean of the nearest load that was measured, the heavier if there are two."""
        if not self._means:
            return None
        wanted = num_beside.bit_length()
        nearest = min(self._means, key=lambda bucket: (abs(bucket - wanted), -bucket))
        return self._means[nearest].value


class _Margin:
    """By how much to lengthen a forecast so that nearly everyone makes it."""

    def __init__(self) -> None:
        self._ratios: deque[float] = deque(maxlen=KEPT)

    def add(self, actual_s: float, forecast_s: float) -> None:
        self._ratios.append(actual_s / max(forecast_s, 1e-6))

    def value(self) -> float | None:
        """``None`` while too little is known."""
        if len(self._ratios) < ENOUGH:
            return None
        return _quantile(self._ratios, COVERAGE)


class Forecast:
    """Learns from what happens, and says what to expect."""

    def __init__(self) -> None:
        self._prompt_token_s = _Rates()
        self._output_token_s = _Rates()
        self._place_s = _Mean()
        """For how long a request has its place."""
        self._lengths: deque[int] = deque(maxlen=KEPT)
        self._first_margin = _Margin()
        self._finish_margin = _Margin()
        self._length: int | None = None
        self._num_learnt = 0

    def forecast(self, *, num_prompt_tokens: int, max_tokens: int, load: Load) -> Promise | None:
        """What is to be expected; ``None`` while too little is known."""
        num_beside = min(load.num_running + 1, load.num_places)
        prompt_token_s = self._prompt_token_s.at(num_beside)
        output_token_s = self._output_token_s.at(num_beside)
        if prompt_token_s is None or output_token_s is None or self._place_s.value is None:
            return None
        wait_s = 0.0
        num_before = load.num_running + load.num_ahead + 1 - load.num_places
        if num_before > 0:
            wait_s = num_before * self._place_s.value / max(load.num_places, 1)
        first_token_s = wait_s + num_prompt_tokens * prompt_token_s
        num_output_tokens = min(max_tokens, self._usual_length(max_tokens))
        return Promise(first_token_s, first_token_s + num_output_tokens * output_token_s)

    def promise(self, forecast: Promise) -> Promise | None:
        """What can be promised; ``None`` while too little is known."""
        first, finish = self._first_margin.value(), self._finish_margin.value()
        if first is None or finish is None:
            return None
        return Promise(first * forecast.first_token_s, finish * forecast.finish_s)

    def learn(self, course: Course) -> None:
        """A request has ended by itself: take in how it went."""
        decode_s = 0.0
        if course.num_output_tokens > 1:
            decode_s = course.decode_s
            self._output_token_s.add(course.num_beside, decode_s / (course.num_output_tokens - 1))
        if not course.had_to_wait:
            prefill_s = course.prefill_s
            self._prompt_token_s.add(
                course.num_beside, prefill_s / max(course.num_prompt_tokens, 1)
            )
            self._place_s.add(prefill_s + decode_s)
        elif self._prompt_token_s.at(course.num_beside) is not None:
            token_s = self._prompt_token_s.at(course.num_beside) or 0.0
            self._place_s.add(token_s * course.num_prompt_tokens + decode_s)
        self._lengths.append(course.num_output_tokens)
        self._num_learnt += 1
        if self._num_learnt % ENOUGH == 0:
            self._length = None  # it changes slowly, and takes time to find

    def judge(self, forecast: Promise, *, first_token_s: float, finish_s: float) -> None:
        """What became of a forecast."""
        self._first_margin.add(first_token_s, forecast.first_token_s)
        self._finish_margin.add(finish_s, forecast.finish_s)

    def _usual_length(self, max_tokens: int) -> int:
        """What nearly no answer of late was longer than."""
        if len(self._lengths) < ENOUGH:
            return max_tokens
        if self._length is None:
            self._length = math.ceil(_quantile(self._lengths, LENGTH_COVERAGE))
        return self._length


def _quantile(values: deque[float] | deque[int], share: float) -> float:
    """The smallest value that so large a share of values, and one more, stays below."""
    ordered = sorted(values)
    return ordered[min(math.ceil(share * (len(ordered) + 1)), len(ordered)) - 1]
