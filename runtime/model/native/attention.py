"""Attention over the paged KV cache by the CPU's own kernel: see attention.cpp for its order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.runtime.model.attention import Span
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.native.library import Library

_ROWS_MAX: Final = 64
_ROWS: Final = 28
"""Of a unit: twice what is multiplied at once, so that laying out keys is a small part."""
_WIDTH_MAX: Final = 256
_WIDTH_MULTIPLE: Final = 16

Numbers = npt.NDArray[np.int64]


class _Shape(ctypes.Structure):
    """As ``Shape`` in attention.cpp has it."""

    _fields_ = (
        ("heads", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("width", ctypes.c_long),
        ("block_size", ctypes.c_long),
        ("scale", ctypes.c_float),
    )


class NativePlan(NamedTuple):
    """Everything about a step that all layers share."""

    tables: Numbers
    """Blocks of all spans, one span after the other."""
    spans: Numbers
    """``[spans, 4]``: first row, tokens, position of the first token, place of its table."""
    units: Numbers
    """``[units, 4]``: span, its first token, how many, and the head of keys."""
    shape: _Shape
    output: Tensor
    """``[rows, heads · head_dim]``; each layer fills it anew, the batch's padding stays 0."""


class NativeAttention:
    """See ``Attention``."""

    def __init__(self, library: Library, config: ModelConfig) -> None:
        self._functions = library.functions
        self._num_heads = config.num_heads
        self._num_kv_heads = config.num_kv_heads
        self._head_dim = config.head_dim
        self._tokens = max(1, _ROWS // config.group_size)

    @staticmethod
    def takes(config: ModelConfig) -> bool:
        """Whether the kernel is made for a model's heads."""
        width = config.head_dim
        is_narrow = width % _WIDTH_MULTIPLE == 0 and width <= _WIDTH_MAX
        return is_narrow and config.group_size <= _ROWS_MAX

    def plan(
        self, spans: Sequence[Span], *, num_rows: int, block_size: int, zero_slot: int
    ) -> NativePlan:
        """Lay out a step: ``num_rows`` rows, padding included, of which ``spans`` are real."""
        del zero_slot  # nothing is read that no token has written
        table_sizes = [-(-(span.position + span.num_tokens) // block_size) for span in spans]
        tables = np.fromiter(
            (
                block
                for span, size in zip(spans, table_sizes, strict=True)
                for block in span.block_table[:size]
            ),
            dtype=np.int64,
            count=sum(table_sizes),
        )
        starts = np.cumsum([0, *table_sizes[:-1]])
        columns = np.array([(span.start, span.num_tokens, span.position) for span in spans])
        shape = _Shape(
            heads=self._num_heads,
            kv_heads=self._num_kv_heads,
            width=self._head_dim,
            block_size=block_size,
            scale=self._head_dim**-0.5,
        )
        return NativePlan(
            tables,
            np.column_stack((columns, starts)).astype(np.int64),
            self._units(columns[:, 1]),
            shape,
            torch.zeros(num_rows, self._num_heads * self._head_dim),
        )

    def attend(self, heads: Tensor, cache: LayerCache, plan: NativePlan) -> Tensor:
        """Attend to a cache that holds the step's own keys and values already.

        Args:
            heads: ``[rows, heads + 2 · kv_heads, head_dim]``, of which queries are read.
            cache: The layer's.
            plan: The step's.

        Returns:
            ``[rows, heads · head_dim]``, valid until the next call with this plan.
        """
        self._functions.attend_float(
            *(heads.data_ptr(), plan.output.data_ptr()),
            *(cache.keys.data_ptr(), cache.values.data_ptr()),
            *(plan.tables.ctypes.data, plan.spans.ctypes.data, plan.units.ctypes.data),
            *(len(plan.units), ctypes.byref(plan.shape)),
        )
        return plan.output

    def _units(self, num_tokens: Numbers) -> Numbers:
        """Cut spans into pieces of a few tokens, each of them for each head of keys."""
        num_pieces = -(-num_tokens // self._tokens)
        spans = np.repeat(np.arange(len(num_tokens)), num_pieces)
        pieces = np.arange(len(spans)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        firsts = pieces * self._tokens
        counts = np.minimum(self._tokens, num_tokens[spans] - firsts)
        units = np.column_stack((spans, firsts, counts)).repeat(self._num_kv_heads, axis=0)
        heads = np.tile(np.arange(self._num_kv_heads), len(spans))
        return np.column_stack((units, heads)).astype(np.int64)
