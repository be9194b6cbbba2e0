"""Carries out step plans: tokens in, keys and values into the cache, sampled tokens out.

Lays the sequences of a plan out as one flat batch and knows where each one's rows are. Knows
nothing of queues, priorities or requests' ends: those are the scheduler's.

::

    plan        A: 1 token   B: 5 tokens        C: 1 token
    rows        0            1  2  3  4  5      6           (7 is padding)
    sampled     0                        5      6            the last row of each that caught up
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.runtime.grammar_masks import GrammarMasks, Masks
from understudy.runtime.model.attention import Span
from understudy.runtime.model.kv_cache import KVCache
from understudy.runtime.model.noise import noise_key, signed
from understudy.runtime.model.operations import has_kernels
from understudy.runtime.model.pooling import Pooler
from understudy.runtime.model.sampler import Sampler, SamplingRow
from understudy.runtime.model.transformer import Batch, GuessedDraws, Transformer
from understudy.runtime.scheduling.decision import (
    Draws,
    EngineFault,
    NoDraw,
    OutOfMemory,
    Pooled,
    SampledToken,
    ScheduledSequence,
    StepPlan,
)
from understudy.runtime.token_masks import Allowed, allowed_tokens

if TYPE_CHECKING:
    from understudy.runtime.model.kernels.decode_graphs import Decoded, DecodeGraphs


class _Computed(NamedTuple):
    """What a step has come to."""

    logits: Tensor | None
    pooled: Mapping[int, Pooled]


class ModelRunner:
    """Runs a model on plans, one step after another; owns the KV cache's tensors."""

    def __init__(
        self,
        model: Transformer,
        *,
        num_blocks: int,
        block_size: int,
        grammar_masks: GrammarMasks | None = None,
    ) -> None:
        self._model = model
        self._grammar_masks = grammar_masks
        self._cache = KVCache(
            model.config,
            num_blocks=num_blocks,
            block_size=block_size,
            dtype=model.kv_dtype,
            device=model.device,
        )
        self._pooler = Pooler(model.normalise)
        self._sampler = Sampler(model.vocab_size, model.device)
        self._graphs = _decode_graphs(model, self._cache)

    @property
    def cache(self) -> KVCache:
        """The tensors that hold every computed token's keys and values."""
        return self._cache

    def execute(self, plan: StepPlan) -> Draws:
        """Compute the plan's tokens; the draws of each sequence that ``samples``."""
        if not plan.scheduled:
            return {}
        with telling_out_of_memory(), torch.inference_mode():
            return self._execute(plan)

    def _execute(self, plan: StepPlan) -> Draws:
        if self._grammar_masks is not None:
            self._grammar_masks.begin(plan.scheduled)
        logits, pooled = self._compute(plan)
        return pooled if logits is None else {**pooled, **self._draw(plan, logits)}

    def _draw(self, plan: StepPlan, logits: Tensor) -> Draws:
        """Draw from logits, a row for each sequence that draws and one for each drafted token."""
        is_finite = self._sampler.are_finite(logits)
        if len(is_finite) > 1 and not any(is_finite):
            raise EngineFault(f"no logits of {len(is_finite)} sequences are finite")
        sampled = [scheduled for scheduled in plan.scheduled if scheduled.draws]
        masks: Mapping[int, Masks | NoDraw] = {}
        if self._grammar_masks is not None:
            masks = self._grammar_masks.collect(sampled)
        allowances = [
            allowed_tokens(scheduled, masks.get(scheduled.sequence.request_id))
            for scheduled in sampled
        ]
        rows = [
            row
            for scheduled, allowed in zip(sampled, allowances, strict=True)
            for row in _sampling_rows(scheduled, allowed)
        ]
        tokens = self._sampler.sample(logits, rows)
        draws: dict[int, tuple[SampledToken, ...] | NoDraw] = {}
        first = 0
        for (sequence, _, draft), allowed in zip(sampled, allowances, strict=True):
            # Behind a drafted token that the grammar refuses there is no mask, and nothing counts.
            most = len(allowed) - 1 if isinstance(allowed, tuple) else len(draft)
            last = first
            while last - first < most and tokens[last].token_id == draft[last - first]:
                last += 1
            if all(is_finite[first : last + 1]):
                drawn = tuple(tokens[first : last + 1])
                draws[sequence.request_id] = allowed if isinstance(allowed, NoDraw) else drawn
            first += len(draft) + 1
        return draws

    def hidden_states(self, plan: StepPlan) -> Tensor:
        """Compute the plan's tokens; ``[plan.num_tokens, hidden_size]``, in plan order."""
        self._cache.copy_blocks(plan.copies)
        decoded = self._decode(plan)
        return self._forward(plan) if decoded is None else decoded.hidden.clone()

    def logits(self, plan: StepPlan) -> Tensor | None:
        """Compute the plan's tokens; raw logits, in plan order.

        There is a row for each sequence that ``draws``, and one for each drafted token.
        """
        return self._compute(plan).logits

    def _compute(self, plan: StepPlan) -> _Computed:
        self._cache.copy_blocks(plan.copies)
        decoded = self._decode(plan)
        if decoded is not None and all(scheduled.draws for scheduled in plan.scheduled):
            return _Computed(decoded.logits, {})
        hidden = self._forward(plan) if decoded is None else decoded.hidden
        pooled = self._pooler.pool(plan.scheduled, hidden)
        last_rows: list[int] = []
        num_rows = 0
        for scheduled in plan.scheduled:
            num_rows += scheduled.num_tokens
            if scheduled.draws:
                last_rows += range(num_rows - 1 - len(scheduled.draft), num_rows)
        if not last_rows:
            return _Computed(None, pooled)
        index = torch.tensor(last_rows, device=self._model.device)
        return _Computed(self._model.logits(hidden.index_select(0, index)), pooled)

    @property
    def guesses(self) -> bool:
        """Whether ``guess`` can be called."""
        return self._model.guesses

    def guess(self, scheduled: tuple[ScheduledSequence, ...], depth: int) -> list[list[int]]:
        """Compute sequences to their ends, and guess ``depth`` tokens behind each, one by one.

        Their blocks have room for all of these. Guesses are nearly what ``execute`` would draw,
        token by token: logits are not adjusted and their likeliest not singled out.

        Raises:
            OutOfMemory: of the memory for the work.
        """
        draws = []
        for share in scheduled:
            sequence = share.sequence
            row = SamplingRow(sequence.params, sequence.token_ids, sequence.num_prompt_tokens)
            inverse = 0.0 if row.is_greedy else 1.0 / row.params.temperature
            positions = range(row.position, row.position + depth)
            keys = [signed(noise_key(row.params.seed, position)) for position in positions]
            draws.append(GuessedDraws(inverse, keys))
        with telling_out_of_memory(), torch.inference_mode():
            return self._model.guess(self._batch(scheduled), self._cache, draws)

    def _forward(self, plan: StepPlan) -> Tensor:
        batch = self._batch(plan.scheduled)
        return self._model.forward(batch, self._cache)[: len(batch.slots)]

    def _decode(self, plan: StepPlan) -> Decoded | None:
        """Compute a step of single tokens by a graph, where there are graphs."""
        if self._graphs is None or any(each.num_tokens != 1 for each in plan.scheduled):
            return None
        sequences = [scheduled.sequence for scheduled in plan.scheduled]
        token_ids = [each.token_ids[each.num_computed_tokens] for each in sequences]
        return self._graphs.run(_spans(plan.scheduled), token_ids)

    def _batch(self, scheduled: tuple[ScheduledSequence, ...]) -> Batch:
        spans = _spans(scheduled)
        num_tokens = spans[-1].start + spans[-1].num_tokens
        tiles = self._model.tiles.cut(num_tokens)
        num_rows = sum(tiles)
        token_ids = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        slots = np.empty(num_tokens, dtype=np.int64)
        block_size = self._cache.block_size
        for span, (sequence, _, draft) in zip(spans, scheduled, strict=True):
            rows = slice(span.start, span.start + span.num_tokens)
            stop = span.position + span.num_tokens
            token_ids[rows] = [*sequence.token_ids[span.position : stop - len(draft)], *draft]
            positions[rows] = np.arange(span.position, stop)
            table = np.asarray(span.block_table, dtype=np.int64)
            slots[rows] = table[positions[rows] // block_size] * block_size
        slots += positions[:num_tokens] % block_size
        device = self._model.device
        return Batch(
            token_ids=torch.from_numpy(token_ids).to(device),
            positions=torch.from_numpy(positions).to(device),
            slots=torch.from_numpy(slots).to(device),
            tiles=tiles,
            attention=self._model.attention.plan(
                spans,
                num_rows=num_rows,
                block_size=block_size,
                zero_slot=self._cache.zero_slot,
            ),
        )


@contextmanager
def telling_out_of_memory() -> Iterator[None]:
    """Turn what says on any device that memory is short into ``OutOfMemory``."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemory(str(error)) from error
    except RuntimeError as error:
        # The CPU's allocator has no exception class of its own.
        if "can't allocate memory" in str(error):
            raise OutOfMemory(str(error)) from error
        raise


def _sampling_rows(
    scheduled: ScheduledSequence, allowed: Allowed | NoDraw | None
) -> list[SamplingRow]:
    """What the sampler must know to draw at the end of a sequence, and at the end of its draft."""
    sequence = scheduled.sequence
    params = sequence.params
    # What is echoed is the client's prompt: behind it, draws are those that there would be anyway.
    num_prompt_tokens = sequence.num_prompt_tokens + len(params.echoed)
    known: Allowed = allowed if isinstance(allowed, tuple) else ()
    rows = []
    for length, mask in zip_longest(range(len(scheduled.draft) + 1), known):
        token_ids: list[int] = sequence.token_ids
        if length:
            token_ids = [*token_ids, *scheduled.draft[:length]]
        rows.append(SamplingRow(params, token_ids, num_prompt_tokens, mask))
    return rows


def _decode_graphs(model: Transformer, cache: KVCache) -> DecodeGraphs | None:
    if not has_kernels(model.device):
        return None
    from understudy.runtime.model.kernels.decode_graphs import DecodeGraphs

    return DecodeGraphs(model, cache)


def _spans(scheduled: tuple[ScheduledSequence, ...]) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for sequence, num_tokens, _ in scheduled:
        position = sequence.num_computed_tokens
        spans.append(Span(start, num_tokens, position, sequence.block_table))
        start += num_tokens
    return spans
