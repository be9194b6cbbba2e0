"""The echo runner: stands beside the model runner and draws tokens without a model.

It loads and tests everything around a model at rates that no model reaches on the machine at
hand. Its tokens are a pure function of seed and position, as the model's sampler's are, so that
everything that is promised about a request's text can be checked with it. Prompts that are to be
pooled become bags of their tokens. Knows no torch.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Collection
from typing import Final, NamedTuple

from understudy.protocol.request import SEED_MASK, Pooling, SamplingParams, TokenLogprobs
from understudy.runtime.kit.clock import Clock
from understudy.runtime.scheduling.decision import (
    Draw,
    Draws,
    Flight,
    Pooled,
    SampledToken,
    StepPlan,
)
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.thinking import advance, forced_token

_GOLDEN: Final = 0x9E3779B97F4A7C15


class _EchoFlight(NamedTuple):
    """A step whose time has yet to pass."""

    runner: EchoRunner
    plan: StepPlan

    def collect(self) -> Draws:
        """See ``Flight``."""
        return self.runner.execute(self.plan)


class EchoRunner:
    """Draws uniformly from the vocabulary less its reserved ids, a step every ``step_s``.

    It lets an engine overlap its steps, as a GPU does.
    """

    overlaps: Final = True

    def __init__(
        self,
        clock: Clock,
        *,
        vocab_size: int,
        reserved: Collection[int] = (),
        hidden_size: int = 8,
        step_s: float = 0.0,
    ) -> None:
        self._clock = clock
        self._hidden_size = hidden_size
        self._tokens = [token for token in range(vocab_size) if token not in set(reserved)]
        self._logprob = -math.log(len(self._tokens))
        self._step_s = step_s

    def launch(self, plan: StepPlan) -> Flight:
        """Begin a step: it draws what ``execute`` draws when those before it are over."""
        return _EchoFlight(self, plan)

    def execute(self, plan: StepPlan) -> Draws:
        """Draw a token for each sequence that samples, and let the step's time pass."""
        drawn: dict[int, Draw] = {}
        for sequence, num_tokens, draft in plan.scheduled:
            if sequence.num_computed_tokens + num_tokens - len(draft) == sequence.num_tokens:
                drawn[sequence.request_id] = (
                    self._draw_along(sequence, draft)
                    if sequence.pooling is None
                    else self._pool(sequence, sequence.pooling)
                )
        if self._step_s:
            # Steps end at whole multiples of step_s on the clock: the rate holds whatever the work
            # between two steps costs, and a client on the same machine can tell how long a token
            # was under way. A step that begins on a multiple, up to rounding, is a whole one.
            now = self._clock.now()
            steps = math.floor(now / self._step_s + 1e-3) + 1
            self._clock.sleep(steps * self._step_s - now)
        return drawn

    def _pool(self, sequence: Sequence, pooling: Pooling) -> Pooled:
        """A bag of tokens: how often each comes, token ids taken modulo the vector's size."""
        counts = [0.0] * self._hidden_size
        for token in sequence.token_ids:
            counts[token % self._hidden_size] += 1.0
        kept = counts[: pooling.dimensions or None]
        length = math.hypot(*kept) or 1.0
        return Pooled(struct.pack(f"<{len(kept)}f", *[count / length for count in kept]))

    def _draw_along(self, sequence: Sequence, draft: tuple[int, ...]) -> tuple[SampledToken, ...]:
        params = sequence.params
        position = sequence.num_output_tokens - len(params.echoed)
        if not draft and position >= 0 and params.thinking is None:
            return (self._draw(params, position, None),)
        echoed = params.echoed[sequence.num_output_tokens :]
        thinking, thoughts = params.thinking, sequence.thoughts
        drawn: list[SampledToken] = []
        for guess in (*draft, None):
            forced = echoed[len(drawn)] if len(drawn) < len(echoed) else None
            if thinking is not None and thoughts is not None:
                forced = forced_token(thinking, thoughts)
            drawn.append(self._draw(params, position + len(drawn), forced))
            token = drawn[-1].token_id
            if guess != token:
                break
            if thinking is not None and thoughts is not None:
                thoughts = advance(thinking, thoughts, token)
        return tuple(drawn)

    def _draw(self, params: SamplingParams, position: int, forced: int | None) -> SampledToken:
        index = splitmix64(params.seed + position * _GOLDEN) % len(self._tokens)
        token = self._tokens[index] if forced is None else forced
        if params.logprobs is None:
            return SampledToken(token)
        top = tuple((likely, self._logprob) for likely in self._tokens[: params.logprobs])
        return SampledToken(token, TokenLogprobs(self._logprob, top))


def splitmix64(value: int) -> int:
    """Mix 64 bits (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014)."""
    value = (value + _GOLDEN) & SEED_MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & SEED_MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & SEED_MASK
    return value ^ (value >> 31)
