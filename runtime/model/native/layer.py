"""What a layer does between its matrix products, by the CPU's own kernels."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.native.library import Library, pointer
from understudy.runtime.model.operations import Summed
from understudy.runtime.model.rope import Rotation


class _Heads(ctypes.Structure):
    """As ``Heads`` in layer.cpp has it."""

    _fields_ = (
        ("rows", ctypes.c_long),
        ("stored_rows", ctypes.c_long),
        ("heads", ctypes.c_long),
        ("kv_heads", ctypes.c_long),
        ("width", ctypes.c_long),
        ("epsilon", ctypes.c_float),
    )


class NativeOperations:
    """See ``Operations``: float32, one call each."""

    def __init__(self, library: Library, config: ModelConfig) -> None:
        self._functions = library.functions
        self._epsilon = config.rms_norm_eps
        self._heads = _Heads(
            heads=config.num_heads,
            kv_heads=config.num_kv_heads,
            width=config.head_dim,
            epsilon=config.rms_norm_eps,
        )

    def add_and_normalise(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Summed:
        """See ``Operations``; ``hidden`` is changed in place."""
        num_rows, width = hidden.shape
        normed = torch.empty(num_rows, width)
        self._functions.add_and_normalise(
            *(hidden.data_ptr(), pointer(delta), weight.data_ptr(), normed.data_ptr()),
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
        self._heads.rows, self._heads.stored_rows = len(heads), len(slots)
        self._functions.rotate_and_store_float(
            *(heads.data_ptr(), pointer(qk_norm)),
            *(rotation.cosines.data_ptr(), rotation.sines.data_ptr(), slots.data_ptr()),
            *(cache.keys.data_ptr(), cache.values.data_ptr(), ctypes.byref(self._heads)),
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
