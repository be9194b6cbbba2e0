"""A layer's steps between its matrix products, by kernels."""

from __future__ import annotations

from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kernels.activation import silu_and_multiply
from understudy.runtime.model.kernels.normalisation import add_rms_norm
from understudy.runtime.model.kernels.rotation import rotate_and_store
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.operations import Summed
from understudy.runtime.model.rope import Rotation


class TritonOperations:
    """See ``operations.Operations``."""

    def __init__(self, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps

    def add_and_normalise(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Summed:
        """One pass over each row."""
        result = add_rms_norm(hidden, delta, weight, self._eps)
        return Summed(result.hidden, result.normed)

    def rotate_and_store(
        self,
        heads: Tensor,
        qk_norm: Tensor | None,
        rotation: Rotation,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """One pass over all heads; gives queries alone, in the cache's dtype."""
        return rotate_and_store(heads, qk_norm, self._eps, rotation, slots, cache)

    def silu_and_multiply(self, gate_and_up: Tensor) -> Tensor:
        """One pass."""
        return silu_and_multiply(gate_and_up)
