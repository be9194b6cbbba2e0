"""Attention over the paged KV cache by the CPU's own kernel: see attention.cpp for its order."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import chain
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.runtime.model.attention import Span
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.structures import Cache, Heads, Spans, address

_GROUP_MAX: Final = 64
_WIDTH_MAX: Final = 256
_WIDTH_MULTIPLE: Final = 16

_Numbers = npt.NDArray[np.int64]


class NativePlan(NamedTuple):
    """Everything about a step that all layers share."""

    spans: Spans
    numbers: tuple[_Numbers, _Numbers]
    """What ``spans`` points to: ``[spans, 4]`` and the blocks of all of them."""
    num_rows: int
    num_positions: int
    """More than any token's position."""


class NativeAttention:
    """See ``Attention``."""

    def __init__(self, library: Library, config: ModelConfig) -> None:
        self._functions = library.functions
        self._heads = heads_of(config)
        self._width = config.num_heads * config.head_dim

    @staticmethod
    def takes(config: ModelConfig) -> bool:
        """Whether the kernel is made for a model's heads."""
        width = config.head_dim
        is_narrow = width % _WIDTH_MULTIPLE == 0 and width <= _WIDTH_MAX
        return is_narrow and config.group_size <= _GROUP_MAX

    def plan(
        self, spans: Sequence[Span], *, num_rows: int, block_size: int, zero_slot: int
    ) -> NativePlan:
        """Lay out a step: ``num_rows`` rows, padding included, of which ``spans`` are real.

        Tables are taken whole: blocks that the step does not need may be for guesses behind it.
        """
        del zero_slot  # nothing is read that no token has written
        rows: list[tuple[int, int, int, int]] = []
        tables: list[list[int]] = []
        place = num_positions = 0
        for start, num_tokens, position, table in spans:
            end = position + num_tokens
            rows.append((start, num_tokens, position, place))
            tables.append(table)
            place += len(table)
            num_positions = max(num_positions, end)
        described = np.array(rows, dtype=np.int64)
        blocks = np.array(list(chain.from_iterable(tables)), dtype=np.int64)
        told = Spans(
            spans=described.ctypes.data,
            count=len(rows),
            tables=blocks.ctypes.data,
            block_size=block_size,
        )
        return NativePlan(told, (described, blocks), num_rows, num_positions)

    def attend(self, heads: Tensor, cache: LayerCache, plan: NativePlan) -> Tensor:
        """Attend to a cache that holds the step's own keys and values already.

        Args:
            heads: ``[rows, heads + 2 · kv_heads, head_dim]``, of which queries are read.
            cache: The layer's.
            plan: The step's.

        Returns:
            ``[rows, heads · head_dim]``.
        """
        self._heads.is_narrow = cache.keys.dtype == torch.int8
        output = torch.zeros(plan.num_rows, self._width)
        self._functions.attend(
            *(heads.data_ptr(), output.data_ptr(), ctypes.byref(self._heads)),
            *(ctypes.byref(plan.spans), ctypes.byref(cache_of(cache))),
        )
        return output


def heads_of(config: ModelConfig) -> Heads:
    """How a model's heads lie, for the kernels."""
    return Heads(
        queries=config.num_heads,
        keys=config.num_kv_heads,
        width=config.head_dim,
        epsilon=config.rms_norm_eps,
        scale=config.head_dim**-0.5,
    )


def cache_of(cache: LayerCache) -> Cache:
    """A layer's cache, for the kernels."""
    return Cache(*map(address, cache))
