"""What a layer does between its matrix products, by the CPU's own kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.native.attention import cache_of, heads_of
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.structures import Rows, address
from understudy.runtime.model.operations import Multiplied, Summed
from understudy.runtime.model.rope import Rotation


class NativeOperations:
    """See ``Operations``: float32, one call each."""

    def __init__(self, library: Library, config: ModelConfig) -> None:
        self._functions = library.functions
        self._epsilon = config.rms_norm_eps
        self._heads = heads_of(config)

    def normalise_and_multiply(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        linear: Linear,
        tiles: tuple[int, ...],
    ) -> Multiplied:
        """See ``Operations``; ``hidden`` is changed in place."""
        summed = self.add_and_normalise(hidden, delta, weight)
        return Multiplied(summed.hidden, linear(summed.normed, tiles))

    def activate_and_multiply(
        self, gate_and_up: Tensor, linear: Linear, tiles: tuple[int, ...]
    ) -> Tensor:
        """See ``Operations``."""
        return linear(self.silu_and_multiply(gate_and_up), tiles)

    def normalise(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See ``Operations``."""
        return self.add_and_normalise(hidden, None, weight).normed

    def add_and_normalise(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Summed:
        """``hidden + delta``, in place, and its norm."""
        num_rows, width = hidden.shape
        normed = torch.empty(num_rows, width)
        self._functions.add_and_normalise(
            *(hidden.data_ptr(), address(delta), weight.data_ptr(), normed.data_ptr()),
            *(num_rows, width, self._epsilon),
        )
        return Summed(hidden, normed)

    def rotate_and_store(
        self,
        heads: Tensor,
        qk_norm: Tensor | None,
        rotation: Rotation,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """See ``Operations``; gives ``heads``, changed in place."""
        self._heads.is_narrow = cache.keys.dtype == torch.int8
        rows = Rows(
            count=len(heads),
            stored=len(slots),
            slots=slots.data_ptr(),
            cosines=rotation.cosines.data_ptr(),
            sines=rotation.sines.data_ptr(),
        )
        self._functions.rotate_and_store(
            *(heads.data_ptr(), address(qk_norm), ctypes.byref(self._heads)),
            *(ctypes.byref(rows), ctypes.byref(cache_of(cache))),
        )
        return heads

    def silu_and_multiply(self, gate_and_up: Tensor) -> Tensor:
        """The gated activation of ``[rows, 2 * width]``."""
        num_rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
        result = torch.empty(num_rows, width)
        self._functions.silu_and_multiply(
            gate_and_up.data_ptr(), result.data_ptr(), num_rows, width
        )
        return result
