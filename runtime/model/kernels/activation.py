"""The gated activation, with or without quantisation of its result."""

import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.normalisation import QuantisedRows, quantise_block

_BLOCK = 1024


def silu_and_multiply(gate_and_up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer, arXiv:2002.05202) of ``[rows, 2 * width]``."""
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    output = gate_and_up.new_empty(rows, width)
    _silu_kernel[(rows, triton.cdiv(width, _BLOCK))](
        gate_and_up, output, output, width, block=_BLOCK, quantise=False, num_warps=4
    )
    return output


def silu_and_multiply_quantised(gate_and_up: Tensor) -> QuantisedRows:
    """The same, each row as int8 and a scale."""
    rows, width = len(gate_and_up), gate_and_up.shape[1] // 2
    output = QuantisedRows.empty(rows, width, gate_and_up.device)
    block = triton.next_power_of_2(width)
    _silu_kernel[(rows, 1)](
        gate_and_up, *output, width, block=block, quantise=True, num_warps=warps
    )
    return output


def quantise_rows(x: Tensor) -> QuantisedRows:
    """Rows of ``[rows, width]`` as int8 and a scale each."""
    rows, width = x.shape
    output = QuantisedRows.empty(rows, width, x.device)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](x, *output, width, block=block, num_warps=_num_warps(block))
    return output


def _num_warps(block: int) -> int:
    """So many that a row held as one block stays in registers."""
    return min(max(block // 1024, 1), 32)


@triton.jit
def _silu_kernel(gate_and_up, output, scales, width, block: tl.constexpr, quantise: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    mask = columns < width
    gates = gate_and_up + row * (2 * width) + columns
    gate = tl.load(gates, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gates + width, mask=mask, other=0.0).to(tl.float32)
    x = gate / (1.0 + tl.exp(-gate)) * up
    places = row * width + columns
    if quantise:
        # What the next product sees is the activation in the model's dtype, quantised or not.
        rounded = x.to(gate_and_up.dtype.element_ty).to(tl.float32)
        quantise_block(rounded, output, scales, row, places, mask)
    else:
        tl.store(output + places, x.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _quantise_kernel(x, values, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    places = row * width + columns
    numbers = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    quantise_block(numbers, values, scales, row, places, mask)
