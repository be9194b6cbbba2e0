"""Decoding by CUDA graphs: a step of single tokens is one launch.

A graph is recorded for a number of rows and a length of contexts; a step takes the smallest that
holds it and pads its batch. All that differs between two steps of a graph is one tensor of
integers, which is copied to the device before the graph is replayed::

    ├ token ids ┼ positions ┼ slots ┼ tokens of each ┼ block tables ┤
      rows        rows        rows    rows             rows · blocks

Padding rows belong to no sequence: they have no slot, and attention leaves them out.

Most steps come behind another one of the same sequences. Such a step is made of that one: positions
move on by one, and a block is added where one begins; nothing is done sequence by sequence, which
at 256 of them would take longer than a small model's step.

Graphs of short contexts are recorded before the first step, the others when they are first needed;
each takes a fraction of a second then.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.runtime.model.attention import Indices, Span
from understudy.runtime.model.kernels.attention import TritonAttention
from understudy.runtime.model.kernels.paged_attention import SPLIT_KEYS
from understudy.runtime.model.kv_cache import KVCache
from understudy.runtime.model.transformer import Batch, Transformer

_BATCH_SIZES: Final = (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256)
_WARM_UPS: Final = 2
"""Steps before the recording, in which kernels are compiled and libraries settle."""


class Decoded(NamedTuple):
    """A step's results, valid until the next step."""

    hidden: Tensor
    """``[sequences, hidden_size]``."""
    logits: Tensor
    """``[sequences, vocab_size]``, float32."""


class DecodeGraphs:
    """The graphs of one model and one KV cache."""

    def __init__(self, model: Transformer, cache: KVCache) -> None:
        assert isinstance(model.attention, TritonAttention)
        self._model = model
        self._cache = cache
        self._graphs: dict[tuple[int, int], _DecodeGraph] = {}
        self._latest: _DecodeGraph | None = None
        self._pool: Any = torch.cuda.graph_pool_handle()

    def record(self, num_sequences: int) -> None:
        """Record the graphs of short contexts, up to so many sequences."""
        most = next((size for size in _BATCH_SIZES if size >= num_sequences), _BATCH_SIZES[-1])
        for size in reversed(_BATCH_SIZES):  # the smaller ones find memory that the largest took
            if size <= most:
                self._graph(size, 1)

    def run(self, spans: Sequence[Span], token_ids: Sequence[int] | Tensor) -> Decoded | None:
        """Compute a step in which each sequence has one token; None if it is too large.

        The tokens may be on the device, and need not be computed yet.
        """
        graph = self._graph(len(spans), max(span.position for span in spans) + 1)
        if graph is None:
            return None
        graph.fill(spans, token_ids)
        return self._run(graph, len(spans))

    def run_behind(
        self, block_tables: Sequence[list[int]], kept: Indices | None, token_ids: Tensor
    ) -> Decoded | None:
        """Compute the step behind the latest: all of its sequences, or ``kept`` ones, go on.

        Each has one token more, which is on the device, and need not be computed yet. Only what
        is new is looked at: a block for the few that begin one.
        """
        latest = self._latest
        assert latest is not None, "there is no step to go on from"
        positions = latest.positions_behind(kept)
        graph = self._graph(len(positions), int(positions.max()) + 1)
        if graph is None:
            return None
        graph.follow(latest, kept, positions, block_tables, token_ids)
        return self._run(graph, len(positions))

    def _graph(self, num_sequences: int, longest: int) -> _DecodeGraph | None:
        size = next((size for size in _BATCH_SIZES if size >= num_sequences), None)
        if size is None:
            return None
        # Powers of two, so that a long context meets few recordings on its way.
        num_keys = SPLIT_KEYS << max(-(-longest // SPLIT_KEYS) - 1, 0).bit_length()
        graph = self._graphs.get((size, num_keys))
        if graph is None:
            graph = _DecodeGraph(self._model, self._cache, size, num_keys, self._pool)
            self._graphs[size, num_keys] = graph
        return graph

    def _run(self, graph: _DecodeGraph, count: int) -> Decoded:
        graph.replay()
        self._latest = graph
        return Decoded(graph.hidden[:count], graph.logits[:count])


class _DecodeGraph:
    """One recording."""

    def __init__(
        self, model: Transformer, cache: KVCache, size: int, num_keys: int, pool: Any
    ) -> None:
        self._model = model
        self._cache = cache
        tiles = model.tiles.cut(size)
        rows = sum(tiles)
        width = -(-num_keys // cache.block_size)
        self._host = _pinned(rows * (4 + width))
        self._inputs = torch.zeros_like(self._host, device=model.device)
        self._copied = torch.cuda.Event()
        parts = [rows, rows, rows, rows, rows * width]
        views = [part.numpy() for part in torch.split(self._host, parts)]
        self._token_ids, self._positions, self._slots, self._num_tokens = views[:4]
        self._tables: npt.NDArray[np.int32] = views[4].reshape(rows, width)
        self._slots.fill(-1)
        self._count = 0
        self._batch = self._batch_of(tiles, num_keys, torch.split(self._inputs, parts))
        self._send()
        self.hidden, self.logits = self._record(pool)

    def fill(self, spans: Sequence[Span], token_ids: Sequence[int] | Tensor) -> None:
        """Say what the next replay computes."""
        self._copied.synchronize()
        block_size = self._cache.block_size
        if not isinstance(token_ids, Tensor):
            self._token_ids[: len(spans)] = token_ids
        for row, span in enumerate(spans):
            num_blocks = span.position // block_size + 1
            self._tables[row, :num_blocks] = span.block_table[:num_blocks]
        self._place(np.array([span.position for span in spans], dtype=np.int32), token_ids)

    def positions_behind(self, kept: Indices | None) -> npt.NDArray[np.int32]:
        """Where the sequences of the latest step, or ``kept`` ones of them, go on."""
        rows = slice(self._count) if kept is None else kept
        return self._positions[rows] + np.int32(1)

    def follow(
        self,
        latest: _DecodeGraph,
        kept: Indices | None,
        positions: npt.NDArray[np.int32],
        block_tables: Sequence[list[int]],
        token_ids: Tensor,
    ) -> None:
        """As ``fill``, where each sequence has its next token behind those of ``latest``."""
        self._copied.synchronize()
        if latest is not self or kept is not None:
            rows = slice(latest._count) if kept is None else kept
            width = min(self._tables.shape[1], latest._tables.shape[1])
            self._tables[: len(positions), :width] = latest._tables[rows, :width]
        block_size = self._cache.block_size
        for row in np.flatnonzero(positions % block_size == 0).tolist():
            index = int(positions[row]) // block_size
            self._tables[row, index] = block_tables[row][index]
        self._place(positions, token_ids)

    def _place(self, positions: npt.NDArray[np.int32], token_ids: Sequence[int] | Tensor) -> None:
        """Say where each sequence stands, whose blocks are known, and send it all."""
        self._count = count = len(positions)
        block_size = self._cache.block_size
        self._num_tokens[:count] = 1
        self._num_tokens[count:] = 0
        self._positions[:count] = positions
        blocks = self._tables[np.arange(count), positions // block_size]
        self._slots[:count] = blocks * block_size + positions % block_size
        self._slots[count:] = -1
        self._send()
        if isinstance(token_ids, Tensor):
            self._inputs[:count].copy_(token_ids)

    def replay(self) -> None:
        """Compute."""
        self._graph.replay()

    def _send(self) -> None:
        self._inputs.copy_(self._host, non_blocking=True)
        self._copied.record()

    def _batch_of(self, tiles: tuple[int, ...], num_keys: int, parts: Sequence[Tensor]) -> Batch:
        attention = self._model.attention
        assert isinstance(attention, TritonAttention)
        token_ids, positions, slots, num_tokens, tables = parts
        plan = attention.decode_plan(
            num_tokens,
            positions,
            tables.view(len(token_ids), -1),
            longest=num_keys,
            block_size=self._cache.block_size,
        )
        return Batch(token_ids, positions, slots, tiles, plan)

    def _compute(self) -> Decoded:
        hidden = self._model.forward(self._batch, self._cache)
        return Decoded(hidden, self._model.logits(hidden))

    def _record(self, pool: Any) -> Decoded:
        side = torch.cuda.Stream(self._model.device)
        side.wait_stream(torch.cuda.current_stream(self._model.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UPS):
                self._compute()
        torch.cuda.current_stream(self._model.device).wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            return self._compute()


def _pinned(length: int) -> Tensor:
    return torch.zeros(length, dtype=torch.int32, pin_memory=True)
