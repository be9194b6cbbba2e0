"""Residual addition, root mean square norm and, if wanted, quantisation, in one pass over a row."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_INT8_MAX = tl.constexpr(127.0)


class QuantisedRows(NamedTuple):
    """Rows as ``values * scales``, symmetric, each row by its own largest number."""

    values: Tensor
    """``[rows, width]``, int8."""
    scales: Tensor
    """``[rows]``, float32; 0 for a row of zeros."""

    @classmethod
    def empty(cls, num_rows: int, width: int, device: torch.device) -> "QuantisedRows":
        """Room for so many rows."""
        return cls(
            torch.empty(num_rows, width, dtype=torch.int8, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
        )


class Normalised(NamedTuple):
    """What came in, added up, and its norm."""

    hidden: Tensor
    """The sum, ``[rows, width]``; what came in if there was nothing to add."""
    normed: Tensor
    """``[rows, width]``, of the same dtype; or int8, quantised, with ``scales``."""
    scales: Tensor | None
    """As in ``QuantisedRows``."""


def add_rms_norm(
    hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float, *, quantise: bool = False
) -> Normalised:
    """``hidden + delta`` and its norm (Zhang and Sennrich, arXiv:1910.07467), times ``weight``.

    The sum is rounded to its dtype before the norm is taken, as if it had been stored.
    """
    rows, width = hidden.shape
    added = hidden if delta is None else torch.empty_like(hidden)
    if quantise:
        normed, scales = QuantisedRows.empty(rows, width, hidden.device)
    else:
        normed, scales = torch.empty_like(hidden), None
    block = triton.next_power_of_2(width)
    _add_rms_norm_kernel[(rows,)](
        hidden,
        hidden if delta is None else delta,
        weight,
        added,
        normed,
        normed if scales is None else scales,
        width,
        eps,
        block=block,
        has_delta=delta is not None,
        quantise=quantise,
        num_warps=min(max(block // 512, 1), 16),
    )
    return Normalised(added, normed, scales)


@triton.jit
def round_half_even(x):
    """Round to the nearest integer, as torch does: adding 1.5 * 2**23 leaves no fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def scale_and_factor(largest):
    """What int8 numbers are multiplied by, and what numbers are multiplied by to become int8."""
    scale = tl.div_rn(largest, _INT8_MAX)
    is_zero = scale == 0.0
    return scale, tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, scale)))


@triton.jit
def quantise_block(x, values, scales, row, places, mask):
    """Store a row, held as one block of float32, as int8 and its scale."""
    scale, factor = scale_and_factor(tl.max(tl.abs(x), 0))
    tl.store(values + places, round_half_even(x * factor).to(tl.int8), mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def _add_rms_norm_kernel(
    hidden,
    delta,
    weight,
    added,
    normed,
    scales,
    width,
    eps,
    block: tl.constexpr,
    has_delta: tl.constexpr,
    quantise: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    places = row * width + columns
    dtype = hidden.dtype.element_ty
    x = tl.load(hidden + places, mask=mask, other=0.0).to(tl.float32)
    if has_delta:
        x += tl.load(delta + places, mask=mask, other=0.0).to(tl.float32)
        tl.store(added + places, x.to(dtype), mask=mask)
        x = x.to(dtype).to(tl.float32)
    mean = tl.sum(x * x, 0) / width
    x = x * tl.rsqrt(mean + eps) * tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    if quantise:
        quantise_block(x, normed, scales, row, places, mask)
    else:
        tl.store(normed + places, x.to(dtype), mask=mask)
