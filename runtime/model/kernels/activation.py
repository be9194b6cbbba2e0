"""The gated activation, with or without quantisation of its result."""

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.quantisation import (
    QuantisedRows,
    magnitudes,
    narrowed,
    num_warps_for,
    scale_and_factor,
)

_BLOCK: Final = 1024
_ROW_BLOCK: Final = 8192


def silu_and_multiply(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv:2002.05202) of ``[rows, 2 * width]``."""
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    output = gate_and_up.new_empty(rows, width)
    _silu_kernel[(rows, triton.cdiv(width, _BLOCK))](
        gate_and_up, output, width, block=_BLOCK, num_warps=4
    )
    return output


def silu_and_multiply_quantised(
    gate_and_up: Tensor, dtype: torch.dtype = torch.int8
) -> QuantisedRows:
    """The same, each row as numbers of 8 bits and a scale."""
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    output = QuantisedRows.empty(rows, width, gate_and_up.device, dtype)
    block = min(triton.next_power_of_2(width), _ROW_BLOCK)
    _silu_quantise_kernel[(rows,)](
        gate_and_up, *output, width, block=block, num_warps=num_warps_for(block)
    )
    return output


@triton.jit
def _activated(gates, columns, width):
    """The activation, in the model's dtype: what the next product sees, quantised or not."""
    mask = columns < width
    gate = tl.load(gates + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + width + columns, mask=mask, other=0.0).to(tl.float32)
    return (gate / (1.0 + tl.exp(-gate)) * up).to(gates.dtype.element_ty)


@triton.jit
def _silu_kernel(gate_and_up, output, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    x = _activated(gate_and_up + row * (2 * width), columns, width)
    tl.store(output + row * width + columns, x, mask=columns < width)


@triton.jit
def _silu_quantise_kernel(gate_and_up, values, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    gates = gate_and_up + row * (2 * width)
    dtype: tl.constexpr = values.dtype.element_ty
    largest = tl.zeros([block], tl.int32)
    for start in range(0, width, block):
        x = _activated(gates, start + tl.arange(0, block), width).to(tl.float32)
        largest = tl.maximum(largest, magnitudes(x))
    scale, factor = scale_and_factor(tl.max(largest, 0), dtype)
    # Computed again: what was read is still in the cache, and a whole row outgrows the registers.
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        x = _activated(gates, columns, width).to(tl.float32)
        tl.store(values + row * width + columns, narrowed(x * factor, dtype), mask=columns < width)
    tl.store(scales + row, scale)
