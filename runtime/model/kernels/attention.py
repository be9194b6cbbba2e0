"""Attention on a GPU: lays a step out for the kernel of ``paged_attention``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from understudy.runtime.model.attention import Span
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kernels.paged_attention import (
    SPLIT_KEYS,
    SplitBuffers,
    Tiles,
    paged_attention,
)
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.transfer import to_device

_PROGRAMS_MIN: Final = 256
"""About two for each multiprocessor: with fewer, splits get programs of their own."""
_EXACT_ROWS: Final = 64
_FAST_ROWS: Final = (16, 64, 128)


class TritonPlan(NamedTuple):
    """Everything about a step that all layers share."""

    tiles: Tiles
    output: Tensor
    """``[rows, heads, head_dim]``; each layer fills it anew, padding stays as it was."""
    splits: SplitBuffers | None
    block_size: int


class TritonAttention:
    """``attention.PagedAttention`` for a GPU: the same interface, one kernel for every step.

    Under exact numerics all tiles have the same number of rows, since matrix instructions of other
    sizes may add in another order.
    """

    def __init__(
        self, config: ModelConfig, *, numerics: Numerics, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._group_size = config.group_size
        self._head_dim = config.head_dim
        self._dtype = dtype
        self._device = device
        self._row_sizes = (_EXACT_ROWS,) if numerics == "exact" else _FAST_ROWS

    def plan(
        self,
        spans: Sequence[Span],
        *,
        num_rows: int,
        block_size: int,
        zero_slot: int,  # noqa: ARG002 - the cache's last one, as the kernel knows
    ) -> TritonPlan:
        """Lay out a step: ``num_rows`` rows, padding included, of which ``spans`` are real."""
        tile_rows = self._tile_rows(max(span.num_tokens for span in spans))
        num_tiles = [-(-span.num_tokens * self._group_size // tile_rows) for span in spans]
        longest = max(span.position + span.num_tokens for span in spans)
        width = -(-longest // block_size)
        tables = np.zeros((len(spans), width), dtype=np.int32)
        for table, span in zip(tables, spans, strict=True):
            num_blocks = -(-(span.position + span.num_tokens) // block_size)
            table[:num_blocks] = span.block_table[:num_blocks]
        parts = (
            np.arange(len(spans)).repeat(num_tiles),
            np.concatenate([np.arange(count) * tile_rows for count in num_tiles]),
            np.array([span.start for span in spans]),
            np.array([span.num_tokens for span in spans]),
            np.array([span.position for span in spans]),
            tables.ravel(),
        )
        # One copy to the device for all of it.
        joined = to_device(np.concatenate(parts, dtype=np.int32), self._device)
        sequences, first_rows, starts, num_tokens, positions, flat_tables = torch.split(
            joined, [len(part) for part in parts]
        )
        tiles = Tiles(
            sequences=sequences,
            first_rows=first_rows,
            starts=starts,
            num_tokens=num_tokens,
            positions=positions,
            block_tables=flat_tables.view(len(spans), width),
            rows=tile_rows,
            num_splits=0,
        )
        return self._plan(tiles, num_rows=num_rows, longest=longest, block_size=block_size)

    def decode_plan(
        self,
        num_tokens: Tensor,
        positions: Tensor,
        block_tables: Tensor,
        *,
        longest: int,
        block_size: int,
    ) -> TritonPlan:
        """Lay out any step in which each row is a sequence of its own.

        Args:
            num_tokens: 1, or 0 for a row of padding; ``[rows]``, int32.
            positions: ``[rows]``, int32.
            block_tables: ``[rows, blocks]``, int32.
            longest: No context is longer.
            block_size: Slots of a block.
        """
        tile_rows = self._tile_rows(1)
        tiles_each = -(-self._group_size // tile_rows)
        rows = torch.arange(len(num_tokens), dtype=torch.int32, device=self._device)
        first_rows = torch.arange(tiles_each, dtype=torch.int32, device=self._device) * tile_rows
        tiles = Tiles(
            sequences=rows.repeat_interleave(tiles_each),
            first_rows=first_rows.repeat(len(rows)),
            starts=rows,
            num_tokens=num_tokens,
            positions=positions,
            block_tables=block_tables,
            rows=tile_rows,
            num_splits=0,
        )
        return self._plan(tiles, num_rows=len(rows), longest=longest, block_size=block_size)

    def _plan(self, tiles: Tiles, *, num_rows: int, longest: int, block_size: int) -> TritonPlan:
        shape = (num_rows, self._num_heads, self._head_dim)
        output = torch.zeros(shape, dtype=self._dtype, device=self._device)
        num_splits = -(-longest // SPLIT_KEYS)
        if num_splits == 1 or len(tiles.sequences) * self._num_kv_heads >= _PROGRAMS_MIN:
            return TritonPlan(tiles, output, None, block_size)
        splits = SplitBuffers.empty(
            num_rows=num_rows,
            num_heads=self._num_heads,
            num_splits=num_splits,
            head_dim=self._head_dim,
            device=self._device,
        )
        return TritonPlan(tiles._replace(num_splits=num_splits), output, splits, block_size)

    def _tile_rows(self, num_tokens_max: int) -> int:
        """Rows of a tile in a step whose longest span has so many tokens."""
        wanted = num_tokens_max * self._group_size
        return next((size for size in self._row_sizes if size >= wanted), self._row_sizes[-1])

    def attend(self, heads: Tensor, cache: LayerCache, plan: TritonPlan) -> Tensor:
        """Attend to the cache, which holds the step's own keys and values already.

        Args:
            heads: ``[rows, heads, head_dim]``, of the cache's dtype unless that has 8 bits.
            cache: The layer's.
            plan: The step's.

        Returns:
            ``[rows, heads · head_dim]``, valid until the next call with this plan.
        """
        paged_attention(
            heads,
            cache.keys,
            cache.values,
            plan.tiles,
            plan.output,
            plan.splits,
            block_size=plan.block_size,
            scale=self._head_dim**-0.5,
            key_scales=cache.key_scales,
            value_scales=cache.value_scales,
        )
        return plan.output.view(len(plan.output), -1)
