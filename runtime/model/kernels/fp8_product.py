"""Products of fp8 rows and fp8 weights, summed in float32, always in the same order.

The inputs are cut into *segments*, by the weight's shape alone. Each segment's sum is made step by
step, and segments are added first to last::

    inputs    ├ segment 0 ┤├ segment 1 ┤├ segment 2 ┤├ segment 3 ┤
    joined    ((segment 0 + segment 1) + segment 2) + segment 3

A few rows fill a GPU only if segments are summed by programs of their own, whose sums the last one
to arrive joins; with many rows each program sums and joins all of its tile's. Tiles have 64 rows
or a multiple: fewer would be other instructions of a Hopper GPU. So a row's bits are the same in
every batch.

Matrix instructions keep few bits of a sum of fp8: after each step it is added up in float32.
"""

from functools import cache
from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.int8_product import (
    GROUP_TILES,
    Shape,
    store_scaled,
    tile_of,
)
from understudy.runtime.model.kernels.quantisation import QuantisedRows

_PROGRAMS_MIN: Final = 256
_SEGMENTS_MAX: Final = 8
_SEGMENT_STEPS_MIN: Final = 2
_FEW: Final = Shape(rows=64, columns=64, depth=128, num_warps=4, num_stages=5)
_MANY: Final = Shape(rows=128, columns=128, depth=128, num_warps=8, num_stages=3)
_MANY_ROWS: Final = 256


class _Cut(NamedTuple):
    """How a product is shared out."""

    shape: Shape
    tiles: int
    is_shared: bool
    """Each segment has a program of its own."""


def fp8_linear(
    x: QuantisedRows, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``x @ weight.T + bias`` as ``[rows, out]``.

    Args:
        x: ``[rows, in]``.
        weight: ``[out, in]``, float8_e4m3fn, contiguous.
        scales: One for each row of ``weight``, float32.
        bias: ``[out]``.
        dtype: Of the result.
    """
    rows, depth = x.values.shape
    columns = len(weight)
    num_segments = _num_segments(columns, depth)
    shape, tiles, is_shared = _cut(rows, columns, num_segments)
    segment = triton.cdiv(triton.cdiv(depth, num_segments), shape.depth) * shape.depth
    output = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    sums, arrivals = _shared_sums(weight.device)
    _fp8_kernel[(tiles, num_segments if is_shared else 1)](
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
        segment,
        num_segments=num_segments,
        is_shared=is_shared,
        has_bias=bias is not None,
        is_whole=depth % shape.depth == 0,
        tile_rows=shape.rows,
        tile_columns=shape.columns,
        tile_depth=shape.depth,
        group_tiles=GROUP_TILES,
        num_stages=shape.num_stages,
        num_warps=shape.num_warps,
    )
    return output


def _num_segments(columns: int, depth: int) -> int:
    """Segments of the inputs, so that one tile of rows fills a GPU. Changing it changes bits."""
    tiles = triton.cdiv(columns, _FEW.columns)
    segments = 1
    while (
        segments < _SEGMENTS_MAX
        and tiles * segments < _PROGRAMS_MIN
        and depth >= 2 * segments * _SEGMENT_STEPS_MIN * _FEW.depth
    ):
        segments *= 2
    return segments


def _cut(rows: int, columns: int, num_segments: int) -> _Cut:
    shape = _FEW if rows <= _MANY_ROWS else _MANY
    tiles = triton.cdiv(rows, shape.rows) * triton.cdiv(columns, shape.columns)
    is_shared = num_segments > 1 and shape == _FEW and tiles < _PROGRAMS_MIN
    return _Cut(shape, tiles, is_shared)


@cache
def _shared_sums(device: torch.device) -> tuple[Tensor, Tensor]:
    """Sums that programs leave for the one that joins; arrivals are zero between any products."""
    size = _PROGRAMS_MIN * _SEGMENTS_MAX * _FEW.rows * _FEW.columns
    return (
        torch.empty(size, dtype=torch.float32, device=device),
        torch.zeros(_PROGRAMS_MIN, dtype=torch.int32, device=device),
    )


@triton.jit
def _sum_of_segment(
    x, weight, row_starts, column_starts, start, stop,
    is_whole: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    tile_depth: tl.constexpr, num_stages: tl.constexpr,
):  # fmt: skip
    total = tl.zeros([tile_rows, tile_columns], tl.float32)
    for offset in tl.range(start, stop, tile_depth, num_stages=num_stages):
        places = (offset + tl.arange(0, tile_depth))[None, :]
        if is_whole:
            a = tl.load(x + row_starts + places)
            b = tl.load(weight + column_starts + places)
        else:
            a = tl.load(x + row_starts + places, mask=places < stop, other=0.0)
            b = tl.load(weight + column_starts + places, mask=places < stop, other=0.0)
        total = tl.dot(a, tl.trans(b), total, max_num_imprecise_acc=tile_depth)
    return total


@triton.jit(do_not_specialize=["num_rows"])
def _fp8_kernel(
    x, x_scales, weight, weight_scales, bias, output, sums, arrivals,
    num_rows, num_columns, depth, segment,
    num_segments: tl.constexpr, is_shared: tl.constexpr, has_bias: tl.constexpr,
    is_whole: tl.constexpr, tile_rows: tl.constexpr, tile_columns: tl.constexpr,
    tile_depth: tl.constexpr, group_tiles: tl.constexpr, num_stages: tl.constexpr,
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
    first = tl.program_id(1) * segment
    total = _sum_of_segment(
        x, weight, row_starts, column_starts, first, tl.minimum(first + segment, depth),
        is_whole, tile_rows, tile_columns, tile_depth, num_stages,
    )  # fmt: skip
    is_last = True
    if is_shared:
        cells = tl.arange(0, tile_rows)[:, None] * tile_columns
        cells += tl.arange(0, tile_columns)[None, :]
        shared = sums + tile * (num_segments * tile_rows * tile_columns) + cells
        tl.store(shared + tl.program_id(1) * (tile_rows * tile_columns), total)
        # Everyone's sums are there before the arrival is told; the last one to arrive reads them.
        tl.debug_barrier()
        is_last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == num_segments - 1
        if is_last:
            total = tl.load(shared, cache_modifier=".cg")
            for part in range(1, num_segments):
                place = shared + part * (tile_rows * tile_columns)
                total += tl.load(place, cache_modifier=".cg")
            tl.store(arrivals + tile, 0)
    else:
        for part in range(1, num_segments):
            start = part * segment
            total += _sum_of_segment(
                x, weight, row_starts, column_starts, start, tl.minimum(start + segment, depth),
                is_whole, tile_rows, tile_columns, tile_depth, num_stages,
            )  # fmt: skip
    if is_last:
        store_scaled(
            total, x_scales, weight_scales, bias, output, rows, columns, num_rows, num_columns,
            has_bias,
        )  # fmt: skip
