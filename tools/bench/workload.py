"""What is asked and when: request bodies, arrival times, limits. Pure; a seed decides everything.

Request number ``i`` of a seed is the same whoever sends it and in whatever order: each draws from
a generator of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import msgspec

Endpoint: TypeAlias = Literal["completions", "chat"]

REQUESTS_MAX: Final = 1_000_000
DURATION_S_MAX: Final = 86_400.0
LENGTH_MAX: Final = 1_000_000
CONCURRENCY_MAX: Final = 4_096
RATE_MAX: Final = 100_000.0
PAUSE_S_MAX: Final = 10.0
"""The longest that a refused client of the closed loop waits, whatever Retry-After says."""

TOKEN_IDS: Final = range(100, 1_000)
"""Prompts are drawn from these: past the special tokens, within every vocabulary."""

PATHS: Final[dict[Endpoint, str]] = {
    "completions": "/v1/completions",
    "chat": "/v1/chat/completions",
}

_WORD_LIST: Final = (
    "time year people way day man thing woman life child world school state family student group "
    "country problem hand part place case week company system program question work number night "
    "point home water room mother area money story fact month lot right study book eye job word "
    "business issue side kind head house service friend father power hour game line end member law "
    "car city name team minute idea body back parent face level office door health person art "
    "history party result change morning reason research girl guy moment air teacher force"
)
_WORDS: Final = _WORD_LIST.split()


class LengthRange(NamedTuple):
    """A length, drawn uniformly from ``low`` to ``high``, both included."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> LengthRange:
        """Read ``128`` or ``64-256``.

        Raises:
            ValueError: It is neither, or out of 1 to LENGTH_MAX.
        """
        low_text, dash, high_text = text.partition("-")
        low = int(low_text)
        high = int(high_text) if dash else low
        if not 1 <= low <= high <= LENGTH_MAX:
            raise ValueError(f"{text!r} is not a length or a range within 1 to {LENGTH_MAX}")
        return cls(low, high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


class LoadRequest(NamedTuple):
    """One request to send."""

    number: int
    body: bytes
    """JSON."""
    output_tokens: int
    """How many tokens are asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The requests of one run.

    ``completions`` prompts are lists of token ids, so their lengths are exact in tokens; ``chat``
    prompts are made of words, so theirs count words and the server's usage tells the tokens. The
    first ``shared_prefix`` tokens (or words) are the same in all prompts.
    """

    model: str
    endpoint: Endpoint
    prompt_length: LengthRange
    output_length: LengthRange
    shared_prefix: int = 0
    seed: int = 0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        assert 0 <= self.shared_prefix <= self.prompt_length.low, "the prefix is part of the prompt"

    def request(self, number: int) -> LoadRequest:
        """The request with this number."""
        draw = _generator(self.seed, f"request {number}")
        prompt_length = draw.randint(*self.prompt_length)
        output_tokens = draw.randint(*self.output_length)
        prefix_draw = _generator(self.seed, "shared prefix")
        body: dict[str, Any] = {"model": self.model}
        if self.endpoint == "chat":
            words = prefix_draw.choices(_WORDS, k=self.shared_prefix)
            words += draw.choices(_WORDS, k=prompt_length - self.shared_prefix)
            body["messages"] = [{"role": "user", "content": " ".join(words)}]
        else:
            ids = prefix_draw.choices(TOKEN_IDS, k=self.shared_prefix)
            body["prompt"] = ids + draw.choices(TOKEN_IDS, k=prompt_length - self.shared_prefix)
        body |= {
            "max_tokens": output_tokens,
            "seed": draw.getrandbits(31),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.ignore_eos:
            body["ignore_eos"] = True
        return LoadRequest(number, msgspec.json.encode(body), output_tokens)


def _generator(seed: int, purpose: str) -> Random:
    """A generator of its own for each purpose; text seeds go through SHA-512, so all differ."""
    return Random(f"{seed} {purpose}")  # noqa: S311 - a load must repeat, it keeps no secret


def poisson_arrivals(*, rate: float, seed: int) -> Iterator[float]:
    """Times in s from the start at which requests arrive, ``rate`` a second on average.

    Gaps are exponential, so arrivals are a Poisson process: independent users, as in an open
    system, who do not wait for one another's answers.
    """
    assert rate > 0.0, rate
    draw = _generator(seed, "arrivals")
    time_s = 0.0
    while True:
        time_s += draw.expovariate(rate)
        yield time_s


class RequestBudget:
    """Deals out request numbers until the count or the time is used up."""

    __slots__ = ("_duration_s", "_next", "_num_requests")

    def __init__(self, *, num_requests: int, duration_s: float) -> None:
        assert 0 < num_requests <= REQUESTS_MAX, num_requests
        assert 0.0 < duration_s <= DURATION_S_MAX, duration_s
        self._num_requests = num_requests
        self._duration_s = duration_s
        self._next = 0

    def take(self, elapsed_s: float) -> int | None:
        """The number of the request to send at this time, or None: the run is over."""
        if self._next >= self._num_requests or elapsed_s >= self._duration_s:
            return None
        self._next += 1
        return self._next - 1


def pause_after_failure_s(retry_after_s: float | None) -> float:
    """How long a closed-loop client waits after a failure before it asks again.

    It obeys the server up to PAUSE_S_MAX; told nothing, it waits a moment, since a client that
    is refused at once and asks at once would measure how fast refusals are made.
    """
    if retry_after_s is None:
        return 0.1
    assert math.isfinite(retry_after_s), retry_after_s
    return min(retry_after_s, PAUSE_S_MAX)
