"""Carries out step plans: tokens in, keys and values into the cache, sampled tokens out.

Lays the sequences of a plan out as one flat batch and knows where each one's rows are. Knows
nothing of queues, priorities or requests' ends: those are the scheduler's.

::

    plan        A: 1 token   B: 5 tokens        C: 1 token
    rows        0            1  2  3  4  5      6           (7 is padding)
    sampled     0                        5      6            the last row of each that caught up
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.protocol.request import SamplingParams
from understudy.runtime.grammar_masks import GrammarMasks, Masks
from understudy.runtime.model.attention import Indices, Span
from understudy.runtime.model.kv_cache import KVCache
from understudy.runtime.model.noise import noise_key, signed
from understudy.runtime.model.operations import has_kernels
from understudy.runtime.model.out_of_memory import telling_out_of_memory
from understudy.runtime.model.pooling import Pooler
from understudy.runtime.model.sampler import Drawing, Drawn, Sampler, SamplingRow
from understudy.runtime.model.transfer import to_device
from understudy.runtime.model.transformer import Batch, GuessedDraws, Transformer
from understudy.runtime.scheduling.decision import (
    Draw,
    Draws,
    EngineFault,
    Flight,
    NoDraw,
    Pooled,
    SampledToken,
    ScheduledSequence,
    StepPlan,
)
from understudy.runtime.scheduling.sequence import SequenceStatus
from understudy.runtime.token_masks import Allowed, allowed_tokens

if TYPE_CHECKING:
    from understudy.runtime.model.kernels.decode_graphs import Decoded, DecodeGraphs


class _Computed(NamedTuple):
    """What a step has come to."""

    logits: Tensor | None
    pooled: Mapping[int, Pooled]
    drawing: list[ScheduledSequence]
    """The shares at whose ends tokens are drawn."""
    is_by_graph: bool = False
    """Whether each sequence had one token, and draws, and a graph computed that."""


class _Drawer(NamedTuple):
    """A sequence that draws."""

    share: ScheduledSequence
    allowed: Allowed | NoDraw | None

    def rows(self, *, is_ahead: bool) -> list[SamplingRow]:
        """What the sampler must know to draw at its end, and at the end of its draft."""
        sequence, _, draft = self.share
        params = sequence.params
        # What is echoed is the client's prompt: behind it, draws are those that there would be
        # anyway.
        num_prompt_tokens = sequence.num_prompt_tokens + len(params.echoed)
        known: Allowed = self.allowed if isinstance(self.allowed, tuple) else ()
        rows = []
        for length, mask in zip_longest(range(len(draft) + 1), known):
            token_ids: list[int] = sequence.token_ids
            if length:
                token_ids = [*token_ids, *draft[:length]]
            rows.append(SamplingRow(params, token_ids, num_prompt_tokens, mask, int(is_ahead)))
        return rows

    def draws(self, drawn: Drawn) -> tuple[SampledToken, ...] | NoDraw | None:
        """What counts of its rows; ``None`` if one of these is not finite."""
        draft, allowed = self.share.draft, self.allowed
        # Behind a drafted token that the grammar refuses there is no mask, and nothing counts.
        most = len(allowed) - 1 if isinstance(allowed, tuple) else len(draft)
        last = 0
        while last < most and drawn.tokens[last].token_id == draft[last]:
            last += 1
        if not all(drawn.is_finite[: last + 1]):
            return None
        return allowed if isinstance(allowed, NoDraw) else tuple(drawn.tokens[: last + 1])


class _Latest(NamedTuple):
    """What the step that was launched last draws."""

    shares: Sequence[ScheduledSequence]
    drawing: Drawing
    is_by_graph: bool
    """Whether it was a step of single tokens, each of which draws, computed by a graph."""

    def kept(self, plan: StepPlan) -> Indices | None:
        """Which of them, in order, a plan's sequences are; ``None`` if they are all of them."""
        wanted = [share.sequence.request_id for share in plan.scheduled]
        drawn = [share.sequence.request_id for share in self.shares]
        if wanted == drawn:
            return None
        places = {request_id: place for place, request_id in enumerate(drawn)}
        return np.array([places[request_id] for request_id in wanted])

    def tokens(self, kept: Indices | None, device: torch.device) -> Tensor:
        """Those of their tokens, on the device; nobody may know them yet."""
        tokens = self.drawing.token_ids
        if not isinstance(tokens, Tensor):
            tokens = torch.tensor(tokens, device=device)
        return tokens if kept is None else tokens.index_select(0, to_device(kept, device))


class _Flight:
    """A step that was launched: what it draws, or has drawn."""

    def __init__(
        self, pooled: Mapping[int, Pooled], drawers: Sequence[_Drawer], drawing: Drawing | None
    ) -> None:
        self._pooled = pooled
        self._drawers = drawers
        self._drawing = drawing

    def collect(self) -> Draws:
        """See ``Flight``."""
        if self._drawing is None:
            return self._pooled
        with telling_out_of_memory(), torch.inference_mode():
            tokens, is_finite = self._drawing.collect()
        draws: dict[int, Draw] = {**self._pooled}
        counting: list[bool] = []
        first = 0
        for drawer in self._drawers:
            end = first + len(drawer.share.draft) + 1
            drawn = drawer.draws(Drawn(tokens[first:end], is_finite[first:end]))
            if drawn is not None:
                draws[drawer.share.sequence.request_id] = drawn
            if drawer.share.sequence.status is not SequenceStatus.FINISHED:
                counting += is_finite[first:end]
            first = end
        _check_any_finite(counting)
        return draws


class _PlainFlight:
    """The same, of a step in which every sequence draws one token and nobody asks for more."""

    def __init__(self, shares: Sequence[ScheduledSequence], drawing: Drawing) -> None:
        self._shares = shares
        self._drawing = drawing

    def collect(self) -> Draws:
        """See ``Flight``."""
        with telling_out_of_memory():
            token_ids, is_finite = self._drawing.wait()
        drawn = zip(self._shares, token_ids, is_finite, strict=True)
        draws = {
            share.sequence.request_id: (SampledToken(token_id),)
            for share, token_id, counts in drawn
            if counts
        }
        if len(draws) < len(self._shares):
            counting = [
                counts
                for share, counts in zip(self._shares, is_finite, strict=True)
                if share.sequence.status is not SequenceStatus.FINISHED
            ]
            _check_any_finite(counting)
        return draws


def _check_any_finite(counting: Sequence[bool]) -> None:
    # Whoever took part in vain may have ended for that very reason.
    if len(counting) > 1 and not any(counting):
        raise EngineFault(f"no logits of {len(counting)} sequences are finite")


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
        self._latest: _Latest | None = None

    @property
    def cache(self) -> KVCache:
        """The tensors that hold every computed token's keys and values."""
        return self._cache

    @property
    def overlaps(self) -> bool:
        """Whether the device goes on by itself once a step is launched."""
        return self._graphs is not None

    def warm_up(self, max_num_seqs: int) -> None:
        """Have a device make ready what decoding needs, while nobody waits for it yet.

        Kernels are compiled and graphs recorded, which takes seconds, and a step that takes so long
        looks as if it hung.
        """
        if self._graphs is None:
            return
        with telling_out_of_memory(), torch.inference_mode():
            self._graphs.record(max_num_seqs)
            params = (SamplingParams(0, 1), SamplingParams(0, 1, top_p=0.5))
            logits = torch.zeros(len(params), self._model.vocab_size, device=self._model.device)
            self._sampler.sample(logits, [SamplingRow(each, (0,), 1) for each in params])

    def execute(self, plan: StepPlan) -> Draws:
        """Compute the plan's tokens; the draws of each sequence that ``samples``."""
        return self.launch(plan).collect()

    def launch(self, plan: StepPlan) -> Flight:
        """Have the plan's tokens computed; two steps may be under way at once."""
        if not plan.scheduled:
            return _Flight({}, (), None)
        with telling_out_of_memory(), torch.inference_mode():
            return self._launch_behind(plan) or self._launch(plan)

    def _launch_behind(self, plan: StepPlan) -> Flight | None:
        """Launch what most steps are, without a look at each sequence; ``None`` if it is not."""
        latest = self._latest
        if not plan.is_ahead or self._graphs is None or latest is None or not latest.is_by_graph:
            return None
        draws = latest.drawing.draws
        if draws is None:
            return None
        kept = latest.kept(plan)
        tokens = latest.tokens(kept, self._model.device)
        tables = [share.sequence.block_table for share in plan.scheduled]
        decoded = self._graphs.run_behind(tables, kept, tokens)
        if decoded is None:
            return None
        drawing = self._sampler.draw_behind(decoded.logits, draws, kept)
        self._latest = _Latest(plan.scheduled, drawing, is_by_graph=True)
        return _PlainFlight(plan.scheduled, drawing)

    def _launch(self, plan: StepPlan) -> Flight:
        if self._grammar_masks is not None:
            self._grammar_masks.begin(plan.scheduled)
        logits, pooled, sampled, is_by_graph = self._compute(plan)
        if logits is None:
            self._latest = None
            return _Flight(pooled, (), None)
        masks: Mapping[int, Masks | NoDraw] = {}
        if self._grammar_masks is not None:
            masks = self._grammar_masks.collect(sampled)
        drawers = [
            _Drawer(share, allowed_tokens(share, masks.get(share.sequence.request_id)))
            for share in sampled
        ]
        rows = [row for drawer in drawers for row in drawer.rows(is_ahead=plan.is_ahead)]
        drawing = self._sampler.draw(logits, rows)
        self._latest = _Latest(sampled, drawing, is_by_graph)
        return _Flight(pooled, drawers, drawing)

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
        drawing = _drawing(plan)
        if decoded is not None and len(drawing) == len(plan.scheduled):
            return _Computed(decoded.logits, {}, drawing, is_by_graph=True)
        hidden = self._forward(plan) if decoded is None else decoded.hidden
        if len(drawing) == plan.num_tokens:  # every row draws
            return _Computed(self._model.logits(hidden), {}, drawing)
        pooled = self._pooler.pool(plan.scheduled, hidden)
        last_rows: list[int] = []
        num_rows = 0
        for scheduled in plan.scheduled:
            num_rows += scheduled.num_tokens
            if plan.is_ahead or scheduled.draws:
                last_rows += range(num_rows - 1 - len(scheduled.draft), num_rows)
        if not last_rows:
            return _Computed(None, pooled, drawing)
        index = to_device(np.array(last_rows), self._model.device)
        return _Computed(self._model.logits(hidden.index_select(0, index)), pooled, drawing)

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
        batch = self._batch(plan.scheduled, is_ahead=plan.is_ahead)
        if plan.is_ahead:
            batch.token_ids[: len(plan.scheduled)] = self._undecided(plan)
        return self._model.forward(batch, self._cache)[: len(batch.slots)]

    def _undecided(self, plan: StepPlan) -> Tensor:
        assert self._latest is not None, "nothing is under way"
        return self._latest.tokens(self._latest.kept(plan), self._model.device)

    def _decode(self, plan: StepPlan) -> Decoded | None:
        """Compute a step of single tokens by a graph, where there are graphs."""
        if self._graphs is None or any(each.num_tokens != 1 for each in plan.scheduled):
            return None
        spans = _spans(plan.scheduled, is_ahead=plan.is_ahead)
        if plan.is_ahead:
            return self._graphs.run(spans, self._undecided(plan))
        sequences = [scheduled.sequence for scheduled in plan.scheduled]
        token_ids = [each.token_ids[each.num_computed_tokens] for each in sequences]
        return self._graphs.run(spans, token_ids)

    def _batch(self, scheduled: tuple[ScheduledSequence, ...], *, is_ahead: bool = False) -> Batch:
        spans = _spans(scheduled, is_ahead=is_ahead)
        num_tokens = spans[-1].start + spans[-1].num_tokens
        tiles = self._model.tiles.cut(num_tokens)
        num_rows = sum(tiles)
        token_ids = np.zeros(num_rows, dtype=np.int64)
        positions = np.zeros(num_rows, dtype=np.int64)
        block_size = self._cache.block_size
        if num_tokens == len(spans):  # as most steps are: no array for each sequence
            positions[:num_tokens] = [span.position for span in spans]
            blocks = [span.block_table[span.position // block_size] for span in spans]
            if not is_ahead:
                sequences = [share.sequence for share in scheduled]
                token_ids[:num_tokens] = [
                    sequence.token_ids[span.position]
                    for span, sequence in zip(spans, sequences, strict=True)
                ]
            slots = np.array(blocks, dtype=np.int64) * block_size
        else:
            slots = np.empty(num_tokens, dtype=np.int64)
            for span, (sequence, _, draft) in zip(spans, scheduled, strict=True):
                rows = slice(span.start, span.start + span.num_tokens)
                stop = span.position + span.num_tokens
                if not is_ahead:
                    known = sequence.token_ids[span.position : stop - len(draft)]
                    token_ids[rows] = [*known, *draft]
                positions[rows] = np.arange(span.position, stop)
                table = np.asarray(span.block_table, dtype=np.int64)
                slots[rows] = table[positions[rows] // block_size] * block_size
        slots += positions[:num_tokens] % block_size
        device = self._model.device
        return Batch(
            token_ids=to_device(token_ids, device),
            positions=to_device(positions, device),
            slots=to_device(slots, device),
            tiles=tiles,
            attention=self._model.attention.plan(
                spans,
                num_rows=num_rows,
                block_size=block_size,
                zero_slot=self._cache.zero_slot,
            ),
        )


def _decode_graphs(model: Transformer, cache: KVCache) -> DecodeGraphs | None:
    if not has_kernels(model.device):
        return None
    from understudy.runtime.model.kernels.decode_graphs import DecodeGraphs

    return DecodeGraphs(model, cache)


def _drawing(plan: StepPlan) -> list[ScheduledSequence]:
    """The shares at whose ends tokens are drawn."""
    return [share for share in plan.scheduled if plan.is_ahead or share.draws]


def _spans(scheduled: tuple[ScheduledSequence, ...], *, is_ahead: bool = False) -> list[Span]:
    spans: list[Span] = []
    start = 0
    for sequence, num_tokens, _ in scheduled:
        # All that it knows is computed by the step that still draws the token behind it.
        position = sequence.num_tokens if is_ahead else sequence.num_computed_tokens
        spans.append(Span(start, num_tokens, position, sequence.block_table))
        start += num_tokens
    return spans
