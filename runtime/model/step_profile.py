"""What a step costs by its number of tokens, measured at start on the loaded model.

Steps of one and of several sequences, as speculation makes them, on a context of some length. The
best of a few tries is taken: whatever else the machine did meanwhile is no property of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kit.clock import Clock
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.speculation import CostTable

_CONTEXT_TOKENS: Final = 48
_TRIES: Final = 2


class _Shape(NamedTuple):
    num_sequences: int
    tokens_each: int


_SHAPES: Final = (
    *(_Shape(1, tokens) for tokens in (1, 2, 3, 4, 6, 8)),
    *(_Shape(8, tokens) for tokens in (2, 4, 8)),
)
_DRAFT_SHAPES: Final = (_Shape(1, 1), _Shape(4, 1), _Shape(16, 1))
_MORE: Final = 4
"""Tokens behind the first one, to know what one more costs."""


def profile_steps(runner: ModelRunner, clock: Clock) -> CostTable:
    """Measure steps of the model, by tokens. Overwrites the KV cache, which nobody may use yet."""
    return _profile(runner, clock, _SHAPES, runner.execute)


def profile_drafts(runner: ModelRunner, clock: Clock) -> tuple[CostTable, CostTable]:
    """Measure the draft model, by drafts: their first token, and one more."""
    if not runner.guesses:
        step = _profile(runner, clock, _DRAFT_SHAPES, runner.execute)
        return step, step

    def guess(depth: int) -> CostTable:
        return _profile(
            runner, clock, _DRAFT_SHAPES, lambda plan: runner.guess(plan.scheduled, depth)
        )

    first, deep = guess(1), guess(1 + _MORE)
    counts = [shape.num_sequences for shape in _DRAFT_SHAPES]
    more = [(count, (deep.seconds(count) - first.seconds(count)) / _MORE) for count in counts]
    return first, CostTable(more)


def _profile(
    runner: ModelRunner,
    clock: Clock,
    shapes: tuple[_Shape, ...],
    carry_out: Callable[[StepPlan], object],
) -> CostTable:
    blocks_each = -(-(_CONTEXT_TOKENS + 8) // runner.cache.block_size)
    points: dict[int, float] = {}
    for shape in shapes:
        if shape.num_sequences * blocks_each > runner.cache.num_blocks:
            continue
        plan = _plan(shape, blocks_each)
        tries = []
        for _ in range(1 + _TRIES):  # the first one builds what the others find
            begun_at = clock.now()
            carry_out(plan)
            tries.append(clock.now() - begun_at)
        points[plan.num_tokens] = min(tries)
    return CostTable(points.items() or [(1, 1.0)])


def _plan(shape: _Shape, blocks_each: int) -> StepPlan:
    """A step of some sequences, each of which has a draft."""
    scheduled = []
    for number in range(shape.num_sequences):
        params = SamplingParams(seed=number, max_tokens=64, temperature=0.0)
        prompt = tuple(range(_CONTEXT_TOKENS))
        sequence = Sequence(Request(number, number, prompt, params), attempt=1)
        sequence.num_computed_tokens = _CONTEXT_TOKENS - 1
        sequence.block_table = list(range(number * blocks_each, (number + 1) * blocks_each))
        draft = tuple(range(shape.tokens_each - 1))
        scheduled.append(ScheduledSequence(sequence, shape.tokens_each, draft))
    return StepPlan(0, tuple(scheduled))
