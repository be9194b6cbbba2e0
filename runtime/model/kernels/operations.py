"""A layer's steps between its matrix products, by kernels."""

from __future__ import annotations

from torch import Tensor

from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kernels.activation import (
    silu_and_multiply,
    silu_and_multiply_quantised,
)
from understudy.runtime.model.kernels.linears import TritonQuantisedLinear
from understudy.runtime.model.kernels.normalisation import add_rms_norm
from understudy.runtime.model.kernels.quantisation import QuantisedRows
from understudy.runtime.model.kernels.rotation import rotate_and_store
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.operations import Multiplied
from understudy.runtime.model.rope import Rotation


class TritonOperations:
    """See ``operations.Operations``."""

    def __init__(self, config: ModelConfig) -> None:
        self._eps = config.rms_norm_eps

    def normalise_and_multiply(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        linear: Linear,
        tiles: tuple[int, ...],
    ) -> Multiplied:
        """One pass over each row, which quantises what is to be multiplied so."""
        if not isinstance(linear, TritonQuantisedLinear):
            summed = add_rms_norm(hidden, delta, weight, self._eps)
            return Multiplied(summed.hidden, linear(summed.normed, tiles))
        summed = add_rms_norm(hidden, delta, weight, self._eps, quantised=linear.row_dtype)
        assert summed.scales is not None
        rows = QuantisedRows(summed.normed, summed.scales)
        return Multiplied(summed.hidden, linear.multiply(rows))

    def normalise(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """See ``operations.Operations``."""
        return add_rms_norm(hidden, None, weight, self._eps).normed

    def rotate_and_store(
        self,
        heads: Tensor,
        qk_norm: Tensor | None,
        rotation: Rotation,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """One pass over all heads; gives queries alone."""
        return rotate_and_store(heads, qk_norm, self._eps, rotation, slots, cache)

    def activate_and_multiply(
        self, gate_and_up: Tensor, linear: Linear, tiles: tuple[int, ...]
    ) -> Tensor:
        """The same."""
        if not isinstance(linear, TritonQuantisedLinear):
            return linear(silu_and_multiply(gate_and_up), tiles)
        return linear.multiply(silu_and_multiply_quantised(gate_and_up, linear.row_dtype))
