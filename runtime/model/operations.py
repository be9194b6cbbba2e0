"""What a layer does between its attention and its products, and which way a device does it.

On a CPU, kernels in C++ (``native``); on a GPU, Triton kernels (``kernels``). Both do several
things in one pass. Where there is no compiler or no Triton, plain torch does it, slower. Kernels
are imported only when they are wanted.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.runtime.model.attention import PagedAttention, Span
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.layers import Linear, rms_norm, silu_and_multiply
from understudy.runtime.model.native.library import native_library
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.rope import Rotation, rotate


class Summed(NamedTuple):
    """A residual stream and its norm, ``[rows, hidden_size]`` each."""

    hidden: Tensor
    normed: Tensor


class Multiplied(NamedTuple):
    """A residual stream, ``[rows, hidden_size]``, and what a linear made of its norm."""

    hidden: Tensor
    product: Tensor


class Operations(Protocol):
    """The steps of a layer in front of its products, which take rows as these steps make them."""

    def normalise_and_multiply(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        linear: Linear,
        tiles: tuple[int, ...],
    ) -> Multiplied:
        """``hidden + delta``, and its norm multiplied; ``hidden`` may be changed in place."""

    def normalise(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """The norm of each row, for whom it is not to be multiplied."""

    def rotate_and_store(
        self,
        heads: Tensor,
        qk_norm: Tensor | None,
        rotation: Rotation,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """Norm and rotate queries and keys, store keys and values, return what attention takes.

        ``heads`` is ``[rows, heads + 2 · kv_heads, head_dim]``, and may be changed in place. A row
        without a slot is padding.
        """

    def activate_and_multiply(
        self, gate_and_up: Tensor, linear: Linear, tiles: tuple[int, ...]
    ) -> Tensor:
        """The gated activation of ``[rows, 2 * width]``, multiplied."""


class Attention(Protocol):
    """The one interface between the transformer and the KV cache's layout.

    A plan is the implementation's own: what ``plan`` gave, ``attend`` takes.
    """

    def plan(self, spans: Sequence[Span], *, num_rows: int, block_size: int, zero_slot: int) -> Any:
        """Lay out a step: ``num_rows`` rows, padding included, of which ``spans`` are real."""

    def attend(self, heads: Tensor, cache: LayerCache, plan: Any) -> Tensor:
        """Attend to a cache that holds the step's own keys and values already."""


class PlainOperations:
    """In plain torch, for any device; the oracle of the kernels."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config

    def normalise_and_multiply(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        weight: Tensor,
        linear: Linear,
        tiles: tuple[int, ...],
    ) -> Multiplied:
        """See ``Operations``."""
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
        """``hidden + delta``, and its norm."""
        if delta is not None:
            hidden = hidden + delta
        return Summed(hidden, rms_norm(hidden, weight, self._config.rms_norm_eps))

    def rotate_and_store(
        self,
        heads: Tensor,
        qk_norm: Tensor | None,
        rotation: Rotation,
        slots: Tensor,
        cache: LayerCache,
    ) -> Tensor:
        """See ``Operations``; gives queries and keys, float32."""
        config = self._config
        num_rotated = config.num_heads + config.num_kv_heads
        rotated = heads[:, :num_rotated]
        if qk_norm is not None:
            rotated = F.rms_norm(rotated, (config.head_dim,), eps=config.rms_norm_eps)
            rotated = rotated * qk_norm
        rotated = rotate(rotated, rotation)
        num_tokens = len(slots)
        keys, values = rotated[:, config.num_heads :], heads[:, num_rotated:]
        cache.write(slots, keys[:num_tokens], values[:num_tokens])
        return rotated

    def silu_and_multiply(self, gate_and_up: Tensor) -> Tensor:
        """The gated activation of ``[rows, 2 * width]``."""
        return silu_and_multiply(gate_and_up)


class Parts(NamedTuple):
    """A device's way of computing a layer."""

    operations: Operations
    attention: Attention


def parts_for(
    config: ModelConfig, *, numerics: Numerics, dtype: torch.dtype, device: torch.device
) -> Parts:
    """The quickest way of this device."""
    if has_kernels(device):
        from understudy.runtime.model.kernels.attention import TritonAttention
        from understudy.runtime.model.kernels.operations import TritonOperations

        return Parts(
            TritonOperations(config),
            TritonAttention(config, numerics=numerics, dtype=dtype, device=device),
        )
    library = native_library(device, dtype)
    if library is not None:
        from understudy.runtime.model.native.attention import NativeAttention
        from understudy.runtime.model.native.layer import NativeOperations

        if NativeAttention.takes(config):
            return Parts(NativeOperations(library, config), NativeAttention(library, config))
    return Parts(
        PlainOperations(config),
        PagedAttention(config, numerics=numerics, dtype=dtype, device=device),
    )


def has_kernels(device: torch.device) -> bool:
    """Whether a device computes with the Triton kernels."""
    return device.type == "cuda" and _triton_version() is not None


def has_fp8_products(device: torch.device) -> bool:
    """Whether a device multiplies numbers of 8 bits in floating point."""
    return has_kernels(device) and torch.cuda.get_device_capability(device) >= (8, 9)


def kernels_name(device: torch.device, dtype: torch.dtype) -> str:
    """What computes, for the class of its numerics."""
    if has_kernels(device):
        return f"triton-{_triton_version()}"
    library = native_library(device, dtype)
    return "torch" if library is None else f"native-{library.version}"


@cache
def _triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        from understudy.runtime.log import get_logger

        get_logger().warning("triton is missing: the GPU computes with plain torch, slower")
        return None
    return str(triton.__version__)
