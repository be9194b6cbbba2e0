"""A trace of requests that share prefixes, as traffic does: skewed, in sessions, among one-offs.

Every request is a list of token ids. Some system prompts are wanted far more often than others (by
Zipf's law), some conversations come back with all that was said before, and some long prompts are
never seen again. A pure function of its seed.
"""

from __future__ import annotations

import random
from bisect import bisect
from itertools import accumulate
from typing import NamedTuple

_SYSTEM_PROMPTS = 60
_SYSTEM_TOKENS = (128, 960)
_QUESTION_TOKENS = (32, 400)
_ANSWER_TOKENS = (16, 128)
_ONE_OFF_TOKENS = (320, 1920)
_TURNS_MAX = 8


class Mix(NamedTuple):
    """What the traffic is made of."""

    name: str
    skew: float
    """The exponent of Zipf's law over system prompts."""
    next_turn: float
    """The probability that a conversation goes on."""
    one_off: float
    """The share of prompts that nobody repeats."""


MIXES = (
    Mix("assistant", 1.0, 0.45, 0.2),
    Mix("half one-off", 1.0, 0.45, 0.4),
    Mix("many tenants", 0.6, 0.3, 0.3),
    Mix("one favourite", 1.2, 0.6, 0.1),
    Mix("single turns", 1.0, 0.0, 0.2),
    Mix("long talks", 1.0, 0.8, 0.1),
)


class Call(NamedTuple):
    """One request of the trace."""

    at: float
    """In units of the mean time between conversations."""
    prompt: tuple[int, ...]
    num_output_tokens: int


def reuse_trace(mix: Mix, *, conversations: int, seed: int) -> list[Call]:
    """The calls of so many conversations, in the order of their times."""
    draw = random.Random(seed)  # noqa: S311 - a trace, not a secret
    bounds = list(accumulate(1 / (rank + 1) ** mix.skew for rank in range(_SYSTEM_PROMPTS)))
    systems = [_text(draw, _SYSTEM_TOKENS) for _ in range(_SYSTEM_PROMPTS)]
    calls: list[Call] = []
    for number in range(conversations):
        at = number + draw.random()
        if draw.random() < mix.one_off:
            calls.append(Call(at, _text(draw, _ONE_OFF_TOKENS), draw.randint(*_ANSWER_TOKENS)))
            continue
        said = systems[bisect(bounds, draw.random() * bounds[-1])]
        for turn in range(_TURNS_MAX):
            if turn and draw.random() >= mix.next_turn:
                break
            said += _text(draw, _QUESTION_TOKENS)
            num_output_tokens = draw.randint(*_ANSWER_TOKENS)
            calls.append(Call(at, said, num_output_tokens))
            said += _text(draw, (num_output_tokens, num_output_tokens))
            at += draw.expovariate(1 / 60)
    return sorted(calls)


def _text(draw: random.Random, length: tuple[int, int]) -> tuple[int, ...]:
    return tuple(draw.randrange(100_000) for _ in range(draw.randint(*length)))
