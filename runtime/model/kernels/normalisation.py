"""Residual addition, root mean square norm and, if wanted, quantisation, in one pass over a row."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.quantisation import QuantisedRows, quantise_block


class Normalised(NamedTuple):
    """What came in, added up, and its norm."""

    hidden: Tensor
    """The sum, ``[rows, width]``; what came in if there was nothing to add."""
    normed: Tensor
    """``[rows, width]``, of the same dtype; or quantised, with ``scales``."""
    scales: Tensor | None
    """As in ``QuantisedRows``."""


def add_rms_norm(
    hidden: Tensor,
    delta: Tensor | None,
    weight: Tensor,
    eps: float,
    *,
    quantised: torch.dtype | None = None,
) -> Normalised:
    """``hidden + delta`` and its norm (Zhang and Sennrich, arXiv:1910.07467), times ``weight``.

    The sum is rounded to its dtype before the norm is taken, as if it had been stored. The norm
    is of ``quantised``, an 8-bit dtype, if that is given.
    """
    rows, width = hidden.shape
    added = hidden if delta is None else torch.empty_like(hidden)
    if quantised is None:
        normed, scales = torch.empty_like(hidden), None
    else:
        normed, scales = QuantisedRows.empty(rows, width, hidden.device, quantised)
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
        quantise=quantised is not None,
        num_warps=min(max(block // 512, 1), 16),
    )
    return Normalised(added, normed, scales)


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
