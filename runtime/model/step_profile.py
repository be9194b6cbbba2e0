"""What a step costs by its number of tokens, measured at start on the loaded model.

Time: steps of one and of several sequences, as speculation makes them, on a context of some length.
The best of a few tries is taken: whatever else the machine did meanwhile is no property of the
model. Memory: of a GPU, what the largest step takes, which cannot be given to keys and values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final, NamedTuple

import torch

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kit.clock import Clock
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.speculation import CostTable

_CONTEXT_TOKENS: Final = 48
_TRIES: Final = 2


class _Shape(NamedTuple):
    num_sequences: int
    tokens_each: int


_FEW: Final = tuple(_Shape(1, tokens) for tokens in (1, 2, 3, 4, 6, 8))
_MANY: Final = tuple(_Shape(8, tokens) for tokens in (1, 2, 4, 8))
"""They begin with as many tokens as the few end with."""
_DRAFT_SHAPES: Final = (_Shape(1, 1), _Shape(4, 1), _Shape(16, 1))
_MORE: Final = 4
"""Tokens behind the first one, to know what one more costs."""


def profile_steps(runner: ModelRunner, clock: Clock) -> CostTable:
    """Measure steps of the model, by tokens. Overwrites the KV cache, which nobody may use yet."""
    few = _profile(runner, clock, _FEW, runner.execute)
    many = _profile(runner, clock, _MANY, runner.execute)
    # Only what more tokens cost is wanted: what more sequences do is taken off.
    (num_tokens, few_s), (_, many_s) = few.points[-1], many.points[0]
    further = [(tokens, few_s + s - many_s) for tokens, s in many.points if tokens > num_tokens]
    return CostTable([*few.points, *further])


def profile_drafts(runner: ModelRunner, clock: Clock) -> tuple[CostTable, CostTable, CostTable]:
    """Measure the draft model: by drafts their first token and one more, and by tokens reading."""
    reading = _profile_reading(runner, clock)
    if not runner.guesses:
        step = _profile(runner, clock, _DRAFT_SHAPES, runner.execute)
        return step, step, reading

    def guess(depth: int) -> CostTable:
        return _profile(
            runner, clock, _DRAFT_SHAPES, lambda plan: runner.guess(plan.scheduled, depth)
        )

    first, deep = guess(1), guess(1 + _MORE)
    counts = [shape.num_sequences for shape in _DRAFT_SHAPES]
    more = [(count, (deep.seconds(count) - first.seconds(count)) / _MORE) for count in counts]
    return first, CostTable(more), reading


def largest_step_bytes(
    model: Transformer, *, block_size: int, max_num_batched_tokens: int, max_num_seqs: int
) -> int:
    """What a step takes of a GPU's memory beside weights and KV cache, at most: by computing it.

    As many sequences as there may be share all tokens that there may be, and each draws.
    """
    count = min(max_num_seqs, max_num_batched_tokens)
    tokens_each = min(max_num_batched_tokens // count, model.config.max_model_len)
    blocks_each = -(-tokens_each // block_size)
    runner = ModelRunner(model, num_blocks=count * blocks_each, block_size=block_size)
    shares = [
        ScheduledSequence(_sequence(number, blocks_each, tokens_each), tokens_each)
        for number in range(count)
    ]
    torch.cuda.synchronize(model.device)
    torch.cuda.reset_peak_memory_stats(model.device)
    before = torch.cuda.memory_allocated(model.device)
    runner.execute(StepPlan(0, tuple(shares)))
    return torch.cuda.max_memory_allocated(model.device) - before


def _profile_reading(runner: ModelRunner, clock: Clock) -> CostTable:
    """What a token costs that is read together with others."""
    num_blocks = -(-_CONTEXT_TOKENS // runner.cache.block_size)
    if num_blocks > runner.cache.num_blocks:
        return CostTable([(1, 1.0)])
    sequence = _sequence(0, num_blocks)
    plan = StepPlan(0, (ScheduledSequence(sequence, _CONTEXT_TOKENS),))
    seconds = _best_of_some(clock, lambda: runner.execute(plan))
    return CostTable([(1, seconds / _CONTEXT_TOKENS)])


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
        points[plan.num_tokens] = _best_of_some(clock, partial(carry_out, plan))
    return CostTable(points.items() or [(1, 1.0)])


def _best_of_some(clock: Clock, carry_out: Callable[[], object]) -> float:
    tries = []
    for _ in range(1 + _TRIES):  # the first one builds what the others find
        begun_at = clock.now()
        carry_out()
        tries.append(clock.now() - begun_at)
    return min(tries)


def _plan(shape: _Shape, blocks_each: int) -> StepPlan:
    """A step of some sequences, each of which has a draft."""
    scheduled = []
    for number in range(shape.num_sequences):
        sequence = _sequence(number, blocks_each)
        sequence.num_computed_tokens = _CONTEXT_TOKENS - 1
        draft = tuple(range(shape.tokens_each - 1))
        scheduled.append(ScheduledSequence(sequence, shape.tokens_each, draft))
    return StepPlan(0, tuple(scheduled))


def _sequence(number: int, num_blocks: int, num_tokens: int = _CONTEXT_TOKENS) -> Sequence:
    """One that has its blocks, of which nobody else has any."""
    params = SamplingParams(seed=number, max_tokens=64, temperature=0.0)
    request = Request(number, number, (1,) * num_tokens, params)
    sequence = Sequence(request, attempt=1)
    sequence.block_table = list(range(number * num_blocks, (number + 1) * num_blocks))
    return sequence
