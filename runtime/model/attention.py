"""Attention over the paged KV cache, in plain torch.

A step's flat batch mixes sequences that add one token with sequences that add many. Each is a
*span* of rows, and all that a span needs is where its context lies. Two ways lead through it:

* short spans (decoding, and checking drafts) are put side by side, by number of tokens and padded
  length of their contexts, so that a whole group costs as few calls as one sequence;
* a longer span (a chunk of a prompt) gathers its context once and cuts its rows into blocks, each
  of which sees the context up to its own last token.

Query heads that share a key-value head are rows of one product: with ``group`` query heads a token
is ``group`` rows, and grouped-query attention needs no copies of keys and values::

    query [tokens, kv_heads · group, head_dim]  →  [kv_heads, tokens · group, head_dim]

How the products themselves are computed is told in ``canonical_attention``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.runtime.model.canonical_attention import (
    ALL_SHAPES,
    KeyMask,
    agreeing_shapes,
    canonical_attention,
)
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.numerics import Numerics

Indices = npt.NDArray[np.int64]


class Span(NamedTuple):
    """The rows of one sequence in a step's flat batch."""

    start: int
    """Its first row."""
    num_tokens: int
    position: int
    """Position of its first token; everything before it is in the cache."""
    block_table: list[int]


class _HeadRows(NamedTuple):
    """Where a product's rows come from and go to, as rows of ``[rows · heads, head_dim]``."""

    gather: Tensor
    """In the query; a row of padding reads another's."""
    scatter: Tensor
    """In the output; a row of padding goes to the output's last row, which nobody reads."""


class _ShortGroup(NamedTuple):
    """Spans of as many tokens each, and few, whose contexts are padded to one length."""

    rows: _HeadRows
    """``[spans · kv_heads · group, padded]``."""
    head_slots: Tensor
    """Where the contexts are, in the cache as ``[slots · kv_heads, head_dim]``."""
    mask: KeyMask
    """``[spans · kv_heads, padded, keys]``: what a row may see. Of single tokens all rows see the
    same, and the mask has one for all."""


class _RowBlock(NamedTuple):
    """Some rows of a longer span, and what they may see."""

    start: int
    """In the span's ``tokens · group`` rows, padded."""
    num_rows: int
    num_keys: int
    mask: KeyMask
    """``[1, num_rows, num_keys]``."""


class _LongSpan(NamedTuple):
    """A span of several tokens."""

    rows: _HeadRows
    """``[kv_heads · tokens · group, padded]``."""
    head_slots: Tensor
    blocks: tuple[_RowBlock, ...]


class AttentionPlan(NamedTuple):
    """Everything about a step that all layers share."""

    groups: tuple[_ShortGroup, ...]
    long_spans: tuple[_LongSpan, ...]
    output: Tensor
    """``[rows · heads + 1, head_dim]``; each layer fills it anew, the batch's padding stays 0."""


class PagedAttention:
    """The one interface between the transformer and the KV cache's layout."""

    def __init__(
        self, config: ModelConfig, *, numerics: Numerics, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._group_size = config.group_size
        self._head_dim = config.head_dim
        self._scale = config.head_dim**-0.5
        self._dtype = dtype
        self._device = device
        self._exact = numerics == "exact"
        self.shapes = agreeing_shapes(config.head_dim, device) if self._exact else ALL_SHAPES

    def plan(
        self, spans: Sequence[Span], *, num_rows: int, block_size: int, zero_slot: int
    ) -> AttentionPlan:
        """Lay out a step: ``num_rows`` rows, padding included, of which ``spans`` are real."""
        short: dict[tuple[int, int], list[Span]] = {}
        long_spans: list[_LongSpan] = []
        trash = num_rows * self._num_heads
        for span in spans:
            num_keys = self.shapes.padded_keys(span.position + span.num_tokens)
            if span.num_tokens * self._group_size <= self.shapes.rows[-1]:
                short.setdefault((span.num_tokens, num_keys), []).append(span)
            else:
                slots = _slots([span], num_keys, block_size, zero_slot)
                long_spans.append(self._long_span(span, self._head_slots(slots), trash))
        groups: list[_ShortGroup] = []
        for (_, num_keys), members in short.items():
            slots = _slots(members, num_keys, block_size, zero_slot)
            groups.append(self._short_group(members, num_keys, self._head_slots(slots), trash))
        output = torch.zeros(trash + 1, self._head_dim, dtype=self._dtype, device=self._device)
        return AttentionPlan(tuple(groups), tuple(long_spans), output)

    def attend(self, heads: Tensor, cache: LayerCache, plan: AttentionPlan) -> Tensor:
        """Attend to the cache, which holds the step's own keys and values already.

        Args:
            heads: ``[rows, heads + kv_heads, head_dim]``, contiguous: queries, then what is no
                concern of this function.
            cache: The layer's.
            plan: The step's.

        Returns:
            ``[rows, heads · head_dim]``, valid until the next call with this plan.
        """
        query = heads.view(-1, self._head_dim)
        for group in plan.groups:
            batch = len(group.mask.bias)
            keys, values = self._context(cache, group.head_slots, batch)
            rows = query.index_select(0, group.rows.gather).view(batch, -1, self._head_dim)
            attended = self._kernel(rows, keys, values, group.mask)
            self._scatter(attended, group.rows, plan.output)
        for span in plan.long_spans:
            keys, values = self._context(cache, span.head_slots, self._num_kv_heads)
            rows = query.index_select(0, span.rows.gather)
            rows = rows.view(self._num_kv_heads, -1, self._head_dim)
            blocks = [
                self._kernel(
                    rows[:, block.start : block.start + block.num_rows],
                    keys[:, : block.num_keys],
                    values[:, : block.num_keys],
                    block.mask,
                )
                for block in span.blocks
            ]
            self._scatter(torch.cat(blocks, dim=1), span.rows, plan.output)
        return plan.output[:-1].view(len(heads), -1)

    def _kernel(self, query: Tensor, keys: Tensor, values: Tensor, mask: KeyMask) -> Tensor:
        if self._exact:
            return canonical_attention(
                query, keys, values, mask, scale=self._scale, batch_min=self.shapes.batch_min
            )
        attended = F.scaled_dot_product_attention(
            query.to(keys.dtype).unsqueeze(0),
            keys.unsqueeze(0),
            values.unsqueeze(0),
            attn_mask=mask.bias.to(keys.dtype).unsqueeze(0),
            scale=self._scale,
        )
        return attended.squeeze(0)

    def _context(self, cache: LayerCache, head_slots: Tensor, batch: int) -> tuple[Tensor, Tensor]:
        """Keys and values as ``[batch, keys, head_dim]``, contiguous."""
        shape = (batch, -1, self._head_dim)
        keys = cache.keys.view(-1, self._head_dim).index_select(0, head_slots).view(shape)
        values = cache.values.view(-1, self._head_dim).index_select(0, head_slots).view(shape)
        if self._exact:
            return keys.to(torch.float32), values.to(torch.float32)
        return keys, values

    def _scatter(self, attended: Tensor, rows: _HeadRows, output: Tensor) -> None:
        attended = attended.reshape(-1, self._head_dim).to(output.dtype)
        output.index_copy_(0, rows.scatter, attended)

    def _head_slots(self, slots: Indices) -> Tensor:
        """Slots ``[spans, keys]``, head by head, as rows of ``[slots · kv_heads, head_dim]``."""
        heads = np.arange(self._num_kv_heads)[:, None]
        return torch.from_numpy(slots[:, None] * self._num_kv_heads + heads).flatten()

    def _head_rows(self, starts: Indices, num_tokens: int, num_rows: int, trash: int) -> _HeadRows:
        """Rows ``[spans, kv_heads, num_rows]`` of spans of equal length, from their first rows."""
        rows = np.arange(num_rows)
        is_real = rows < num_tokens * self._group_size
        tokens, members = np.divmod(np.where(is_real, rows, 0), self._group_size)
        heads = np.arange(self._num_kv_heads)[:, None] * self._group_size + members
        tokens = starts[:, None, None] + tokens
        all_heads = self._num_heads + self._num_kv_heads
        gather = torch.from_numpy(tokens * all_heads + heads)
        scatter = torch.from_numpy(np.where(is_real, tokens * self._num_heads + heads, trash))
        return _HeadRows(gather.flatten().to(self._device), scatter.flatten().to(self._device))

    def _short_group(
        self, spans: Sequence[Span], num_keys: int, head_slots: Tensor, trash: int
    ) -> _ShortGroup:
        num_tokens = spans[0].num_tokens
        num_rows = num_tokens * self._group_size
        if self._exact:
            num_rows = self.shapes.padded_rows(num_rows)[0]
        starts = np.array([span.start for span in spans])
        positions = np.array([span.position for span in spans]).repeat(self._num_kv_heads)
        # Rows of padding see what the last row sees, so that none sees nothing.
        tokens = np.minimum(np.arange(num_rows) // self._group_size, num_tokens - 1)
        last_seen = positions[:, None, None] + (tokens[:, None] if num_tokens > 1 else 0)
        allowed = np.arange(num_keys) <= last_seen
        return _ShortGroup(
            self._head_rows(starts, num_tokens, num_rows, trash),
            head_slots.to(self._device),
            KeyMask.of(torch.from_numpy(allowed)).to(self._device),
        )

    def _long_span(self, span: Span, head_slots: Tensor, trash: int) -> _LongSpan:
        num_rows = span.num_tokens * self._group_size
        sizes = self.shapes.padded_rows(num_rows) if self._exact else (num_rows,)
        blocks: list[_RowBlock] = []
        start = 0
        for size in sizes:
            # Rows of padding see what the last row sees, so that none sees nothing.
            rows = torch.arange(start, start + size).clamp_(max=num_rows - 1)
            positions = span.position + rows // self._group_size
            num_keys = self.shapes.padded_keys(int(positions[-1]) + 1)
            allowed = torch.arange(num_keys) <= positions[:, None]
            blocks.append(
                _RowBlock(start, size, num_keys, KeyMask.of(allowed[None]).to(self._device))
            )
            start += size
        head_rows = self._head_rows(np.array([span.start]), span.num_tokens, start, trash)
        return _LongSpan(head_rows, head_slots.to(self._device), tuple(blocks))


def _slots(spans: Sequence[Span], num_keys: int, block_size: int, zero_slot: int) -> Indices:
    """The slot of every position of every span's context, ``[spans, num_keys]``."""
    positions = np.arange(num_keys)
    tables = np.zeros((len(spans), -(-num_keys // block_size)), dtype=np.int64)
    lengths = np.array([[span.position + span.num_tokens] for span in spans])
    for table, span in zip(tables, spans, strict=True):
        num_blocks = -(-(span.position + span.num_tokens) // block_size)
        table[:num_blocks] = span.block_table[:num_blocks]
    slots = tables[:, positions // block_size] * block_size + positions % block_size
    return np.where(positions < lengths, slots, zero_slot)
