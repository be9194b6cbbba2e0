"""Numbers of 8 bits: how kernels make them from rows, integers and floating point alike."""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

NARROW_MAX: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
"""What the largest number of a row becomes, by the dtype it becomes."""

_INT8_MAX = tl.constexpr(127.0)
_E4M3_MAX = tl.constexpr(448.0)
_E4M3_NORMAL_MIN = tl.constexpr(2.0**-6)


class QuantisedRows(NamedTuple):
    """Rows as ``values * scales``, symmetric, each row by its own largest number."""

    values: Tensor
    """``[rows, width]``, int8 or float8_e4m3fn."""
    scales: Tensor
    """``[rows]``, float32; 0 for a row of zeros, not finite for a row that is not."""

    @classmethod
    def empty(
        cls, num_rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.int8
    ) -> "QuantisedRows":
        """Room for so many rows."""
        return cls(
            torch.empty(num_rows, width, dtype=dtype, device=device),
            torch.empty(num_rows, dtype=torch.float32, device=device),
        )


def quantise_rows(x: Tensor, dtype: torch.dtype = torch.int8) -> QuantisedRows:
    """Rows of ``[rows, width]`` as numbers of 8 bits and a scale each."""
    rows, width = x.shape
    output = QuantisedRows.empty(rows, width, x.device, dtype)
    block = triton.next_power_of_2(width)
    _quantise_kernel[(rows,)](x, *output, width, block=block, num_warps=num_warps_for(block))
    return output


def num_warps_for(block: int) -> int:
    """So many that a row held as one block stays in registers."""
    return min(max(block // 1024, 1), 32)


@triton.jit
def magnitudes(x):
    """Magnitudes as integers in the same order, in which what is no number is the greatest.

    A maximum of floating-point numbers would pass over it, and the row would look sound.
    """
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def scale_and_factor(largest, dtype: tl.constexpr):
    """What narrow numbers are multiplied by, and what numbers are multiplied by to become narrow.

    ``largest`` is a maximum of ``magnitudes``.
    """
    limit: tl.constexpr = _INT8_MAX if dtype == tl.int8 else _E4M3_MAX
    scale = tl.div_rn(largest.to(tl.float32, bitcast=True), limit)
    is_zero = scale == 0.0
    return scale, tl.where(is_zero, 0.0, tl.div_rn(1.0, tl.where(is_zero, 1.0, scale)))


@triton.jit
def round_half_even(x, unit: tl.constexpr = 1.0):
    """Round to the nearest multiple, as torch does: adding 1.5 * 2**23 leaves no fraction."""
    return (x + 12582912.0 * unit) - 12582912.0 * unit


@triton.jit
def narrowed(x, dtype: tl.constexpr):
    """Numbers within the range of ``dtype``, rounded to the nearest, ties to even."""
    if dtype == tl.int8:
        result = round_half_even(x).to(tl.int8)
    else:
        # Spelled out, so that the conversion has nothing left to round, whoever does it.
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000
        few = round_half_even(x, unit=_E4M3_NORMAL_MIN / 8)
        rounded = tl.where(tl.abs(x) < _E4M3_NORMAL_MIN, few, bits.to(tl.float32, bitcast=True))
        result = rounded.to(tl.float8e4nv)
    return result


@triton.jit
def quantise_block(x, values, scales, row, places, mask):
    """Store a row, held as one block of float32, as narrow numbers and its scale."""
    dtype: tl.constexpr = values.dtype.element_ty
    scale, factor = scale_and_factor(tl.max(magnitudes(x), 0), dtype)
    tl.store(values + places, narrowed(x * factor, dtype), mask=mask)
    tl.store(scales + row, scale)


@triton.jit
def _quantise_kernel(x, values, scales, width, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    mask = columns < width
    places = row * width + columns
    numbers = tl.load(x + places, mask=mask, other=0.0).to(tl.float32)
    quantise_block(numbers, values, scales, row, places, mask)
