"""All layers of a model in one call of the CPU's own kernels.

A step of a small model is mostly what Python needs to call things: a call for each of a layer's
operations is some microseconds, times nine, times the number of layers.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import KVCache
from understudy.runtime.model.native.attention import NativePlan, cache_of, heads_of
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.linear import NativeLinear
from understudy.runtime.model.native.structures import Guessing, Layer, Rows, address
from understudy.runtime.model.rope import RotaryEmbedding, Rotation

if TYPE_CHECKING:
    from understudy.runtime.model.transformer import LayerWeights

_POSITIONS_MIN: Final = 1024
_KEPT_BYTES_MAX: Final = 64 << 20
_ALIGNED: Final = 16
"""Numbers of 64 bytes."""


class NativeLayers:
    """The layers of a model all of whose linears are ``NativeLinear``."""

    def __init__(
        self,
        library: Library,
        config: ModelConfig,
        layers: Sequence[LayerWeights],
        rope: RotaryEmbedding,
    ) -> None:
        self._functions = library.functions
        self._heads = heads_of(config)
        self._weights = tuple(layers)
        self._layers = (Layer * len(layers))(*map(_told, layers))
        self._rope = rope
        self._rotation = rope.table(_POSITIONS_MIN)
        self._memory = torch.empty(0)
        self._cache: weakref.ref[KVCache] | None = None
        inner = self._layers[0].down.inputs
        hidden, attended = config.hidden_size, config.num_heads * config.head_dim
        self._widths = (
            *(hidden, hidden, self._layers[0].qkv.outputs, attended),
            *(2 * inner, inner),
        )

    @staticmethod
    def takes(layers: Sequence[LayerWeights]) -> bool:
        """Whether all of the layers' linears are the kernels' own."""
        linears = [linear for layer in layers for linear in layer.linears]
        return all(isinstance(linear, NativeLinear) for linear in linears)

    def run(
        self, hidden: Tensor, positions: Tensor, slots: Tensor, plan: NativePlan, cache: KVCache
    ) -> Tensor:
        """Compute ``hidden`` ``[rows, hidden_size]`` in place; fills the cache on the way."""
        self._bind(cache)
        rows = self._rows(positions, slots, plan.num_positions, num_rows=len(hidden))
        memory = self._memory_for(len(hidden))
        self._functions.run_layers(
            *(hidden.data_ptr(), self._layers, len(self._layers), ctypes.byref(self._heads)),
            *(ctypes.byref(rows), ctypes.byref(plan.spans), memory.data_ptr()),
        )
        return hidden

    def guess(
        self,
        token_ids: Tensor,
        positions: Tensor,
        slots: Tensor,
        plan: NativePlan,
        cache: KVCache,
        guessing: Guessing,
    ) -> None:
        """Compute tokens, and guess some more behind each span, one after another.

        The blocks of the guessed tokens are in the plan; ``guessing`` says where they go.
        """
        self._bind(cache)
        num_rows = len(token_ids)
        num_positions = plan.num_positions + guessing.depth
        rows = self._rows(positions, slots, num_positions, num_rows=num_rows)
        memory, hidden = self._memory_for(num_rows), torch.empty(num_rows, self._widths[0])
        logits = torch.empty(plan.spans.count, guessing.head.outputs)
        self._functions.guess(
            *(token_ids.data_ptr(), self._layers, len(self._layers), ctypes.byref(self._heads)),
            *(ctypes.byref(rows), ctypes.byref(plan.spans), ctypes.byref(guessing)),
            *(hidden.data_ptr(), logits.data_ptr(), memory.data_ptr()),
        )

    def _rows(self, positions: Tensor, slots: Tensor, num_positions: int, *, num_rows: int) -> Rows:
        rotation = self._rotation_for(num_positions)
        return Rows(
            count=num_rows,
            stored=len(slots),
            slots=slots.data_ptr(),
            positions=positions.data_ptr(),
            cosines=rotation.cosines.data_ptr(),
            sines=rotation.sines.data_ptr(),
        )

    def _memory_for(self, num_rows: int) -> Tensor:
        """Room for what a step makes on its way; what is not large is kept for the next one."""
        size = sum(-(-num_rows * width // _ALIGNED) * _ALIGNED for width in self._widths)
        if size <= len(self._memory):
            return self._memory
        memory = torch.empty(size)
        if memory.nbytes <= _KEPT_BYTES_MAX:
            self._memory = memory
        return memory

    def _bind(self, cache: KVCache) -> None:
        """Tell the kernels where the cache is, once for each cache."""
        if self._cache is not None and self._cache() is cache:
            return
        for layer, layer_cache in zip(self._layers, cache.layers, strict=True):
            layer.cache = cache_of(layer_cache)
        self._heads.is_narrow = cache.layers[0].keys.dtype == torch.int8
        self._cache = weakref.ref(cache)

    def _rotation_for(self, num_positions: int) -> Rotation:
        have = len(self._rotation.cosines)
        if num_positions > have:
            self._rotation = self._rope.table(max(2 * have, num_positions))
        return self._rotation


def _told(weights: LayerWeights) -> Layer:
    matrices = []
    for linear in weights.linears:
        assert isinstance(linear, NativeLinear)
        matrices.append(linear.matrix)
    qkv, output, gate_up, down = matrices
    return Layer(
        attention_norm=address(weights.attention_norm),
        mlp_norm=address(weights.mlp_norm),
        qk_norm=address(weights.qk_norm),
        qkv=qkv,
        output=output,
        gate_up=gate_up,
        down=down,
    )
