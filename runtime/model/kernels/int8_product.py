"""Products of int8 rows and int8 weights, summed in int32.

Integer sums are exact in any order, so tile sizes and the number of programs that share a sum are
chosen for speed alone: a row's bits are the same in every batch.
"""

from functools import cache
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.quantisation import QuantisedRows

_PROGRAMS_MIN: Final = 256
"""About two for each multiprocessor of a large GPU; with fewer, memory idles: sums are shared."""
_SHARED_TILE_MAX: Final = 64 * 128
GROUP_TILES: Final = 8


class Shape(NamedTuple):
    """Sizes of one program's tile."""

    rows: int
    columns: int
    depth: int
    num_warps: int
    num_stages: int


def int8_linear(
    x: QuantisedRows, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` as ``[rows, out]``.

    Args:
        x: ``[rows, in]``.
        weight: ``[out, in]``, int8, contiguous.
        scales: One for each row of ``weight``, float32.
        bias: ``[out]``.
        dtype: Of the result.
    """
    rows, depth = x.values.shape
    columns = len(weight)
    shape = _shape(rows)
    tiles = triton.cdiv(rows, shape.rows) * triton.cdiv(columns, shape.columns)
    num_shares = _num_shares(tiles, depth, shape)
    output = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    sums, arrivals = _shared_sums(weight.device)
    _int8_kernel[(tiles, num_shares)](
        *x,
        weight,
        scales,
        weight if bias is None else bias,
        output,
        sums,
        arrivals,
        rows,
        columns,
        depth,
        num_shares=num_shares,
        has_bias=bias is not None,
        is_whole=depth % (shape.depth * num_shares) == 0,
        tile_rows=shape.rows,
        tile_columns=shape.columns,
        tile_depth=shape.depth,
        group_tiles=GROUP_TILES,
        num_stages=shape.num_stages,
        num_warps=shape.num_warps,
    )
    return output


def _shape(rows: int) -> Shape:
    if rows <= 64:
        return Shape(max(16, triton.next_power_of_2(rows)), 64, 256, 4, 4)
    if rows <= 256:
        return Shape(64, 128, 128, 4, 4)
    return Shape(128, 128, 128, 8, 4)


def _num_shares(tiles: int, depth: int, shape: Shape) -> int:
    """How many programs share a tile's sum: a power of two, each with two steps at least."""
    if shape.rows * shape.columns > _SHARED_TILE_MAX:
        return 1
    shares = 1
    while tiles * shares < _PROGRAMS_MIN and depth >= shares * 4 * shape.depth:
        shares *= 2
    return shares


@cache
def _shared_sums(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums that programs share and how many have added to each: zero between any two products."""
    return (
        torch.zeros(_PROGRAMS_MIN * _SHARED_TILE_MAX, dtype=torch.int32, device=device),
        torch.zeros(_PROGRAMS_MIN, dtype=torch.int32, device=device),
    )


@triton.jit
def tile_of(program, num_rows, num_columns, tile_rows, tile_columns, group_tiles: tl.constexpr):
    """Row and column of a program's tile.

    Programs that run at the same time form squares: what they read is still in the cache.
    """
    row_tiles = tl.cdiv(num_rows, tile_rows)
    column_tiles = tl.cdiv(num_columns, tile_columns)
    group_size = group_tiles * column_tiles
    first_row_tile = (program // group_size) * group_tiles
    rows_here = tl.minimum(row_tiles - first_row_tile, group_tiles)
    place = program % group_size
    return first_row_tile + place % rows_here, place // rows_here


@triton.jit
def store_scaled(
    total, x_scales, weight_scales, bias, output, rows, columns, num_rows, num_columns,
    has_bias: tl.constexpr,
):  # fmt: skip
    """Store a tile of sums, times both scales, plus the bias."""
    is_column = columns < num_columns
    row_scales = tl.load(x_scales + rows, mask=rows < num_rows, other=0.0)
    column_scales = tl.load(weight_scales + columns, mask=is_column, other=0.0)
    result = total.to(tl.float32) * row_scales[:, None]
    if has_bias:
        addend = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32)
        factors = tl.broadcast_to(column_scales[None, :], result.shape)
        result = tl.fma(result, factors, tl.broadcast_to(addend[None, :], result.shape))
    else:
        result = result * column_scales[None, :]
    tl.store(
        output + rows.to(tl.int64)[:, None] * num_columns + columns[None, :],
        result.to(output.dtype.element_ty),
        mask=(rows < num_rows)[:, None] & is_column[None, :],
    )


# One program serves any number of rows: a server would compile it anew in the middle of its work.
@triton.jit(do_not_specialize=["num_rows"])
def _int8_kernel(
    x, x_scales, weight, weight_scales, bias, output, sums, arrivals,
    num_rows, num_columns, depth,
    num_shares: tl.constexpr, has_bias: tl.constexpr, is_whole: tl.constexpr,
    tile_rows: tl.constexpr, tile_columns: tl.constexpr, tile_depth: tl.constexpr,
    group_tiles: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    row_tile, column_tile = tile_of(
        tile, num_rows, num_columns, tile_rows, tile_columns, group_tiles
    )
    rows = row_tile * tile_rows + tl.arange(0, tile_rows)
    columns = column_tile * tile_columns + tl.arange(0, tile_columns)
    # Beyond the edge the first row and column are read again: loads without masks are quicker.
    row_starts = (tl.where(rows < num_rows, rows, 0).to(tl.int64) * depth)[:, None]
    column_starts = (tl.where(columns < num_columns, columns, 0).to(tl.int64) * depth)[:, None]
    steps = tl.cdiv(tl.cdiv(depth, tile_depth), num_shares)
    first = tl.program_id(1) * steps * tile_depth
    stop = tl.minimum(first + steps * tile_depth, depth)
    total = tl.zeros([tile_rows, tile_columns], tl.int32)
    for offset in tl.range(first, stop, tile_depth, num_stages=num_stages):
        places = (offset + tl.arange(0, tile_depth))[None, :]
        if is_whole:
            a = tl.load(x + row_starts + places)
            b = tl.load(weight + column_starts + places)
        else:
            a = tl.load(x + row_starts + places, mask=places < depth, other=0)
            b = tl.load(weight + column_starts + places, mask=places < depth, other=0)
        total = tl.dot(a, tl.trans(b), total, out_dtype=tl.int32)
    is_last = True
    if num_shares > 1:
        cells = tl.arange(0, tile_rows)[:, None] * tile_columns
        cells += tl.arange(0, tile_columns)[None, :]
        shared = sums + tile * (tile_rows * tile_columns) + cells
        tl.atomic_add(shared, total, sem="relaxed")
        # Everyone's sums are there before the arrival is told; the last one to arrive reads them.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == num_shares - 1
        if is_last:
            total = tl.load(shared, cache_modifier=".cg")
            tl.store(shared, tl.zeros([tile_rows, tile_columns], tl.int32))
            tl.store(arrivals + tile, 0)
    if is_last:
        store_scaled(
            total, x_scales, weight_scales, bias, output, rows, columns, num_rows, num_columns,
            has_bias,
        )  # fmt: skip
