"""Which shapes of a computation give the same bits, found by trying them.

The promise of ``numerics="exact"`` is that a row's result does not depend on the other rows of its
batch. Matrix libraries break it: they pick a kernel by the shape of the whole product, kernels add
up in different orders, and floating-point sums depend on the order. Calling with one fixed shape,
padded, always keeps the promise, because one shape means one kernel. But for a single token a
shape of 32 rows costs several times what a shape of 2 costs.

So we ask the machine. The order in which a kernel adds does not depend on the values, so two shapes
that agree in every bit on a million random sums add in the same order. When a model is loaded, each
of its products is tried in a list of shapes, and those that agree with the *base* shape may be used
in its place. A machine on which none agrees still has the base shape, and is exact and slower.

The choice depends on bits alone, never on time, so equal machines choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal

import torch
from torch import Tensor

Numerics = Literal["exact", "fast"]

ROWS_BASE: Final = 32
"""The shape that is always allowed: as many rows as bring a product near its full speed."""

_ROW_COUNTS: Final = (
    *(1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    *(40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
)
_PROBE_SEED: Final = 0x5EED
_NUM_SUMS_MIN: Final = {torch.float32: 1, torch.bfloat16: 1_000_000}
"""Sums to compare. In float32 one product shows any difference thousands of times over; rounding
to bfloat16 hides all but about one difference in ten thousand."""


class RowTiles:
    """Cuts a batch of rows into tiles whose sizes all give the same bits.

    ``sizes=None`` is fast numerics: one tile of whatever size.
    """

    def __init__(self, sizes: Sequence[int] | None) -> None:
        assert sizes is None or sizes, "there is always the base size"
        self._sizes = None if sizes is None else tuple(sorted(sizes))

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """Allowed sizes, ascending; ``None`` is any."""
        return self._sizes

    def cut(self, num_rows: int) -> tuple[int, ...]:
        """Sizes of tiles that hold ``num_rows`` rows; the last one may be padded."""
        assert num_rows > 0
        if self._sizes is None:
            return (num_rows,)
        largest = self._sizes[-1]
        tiles = [largest] * (num_rows // largest)
        rest = num_rows % largest
        if rest:
            tiles.append(next(size for size in self._sizes if size >= rest))
        return tuple(tiles)


def agreeing_row_counts(
    product: Callable[[Tensor], Tensor], *, num_columns: int, like: Tensor, rows_max: int
) -> tuple[int, ...]:
    """Row counts up to ``rows_max`` whose results equal the base shape's, bit for bit.

    Args:
        product: A matrix product with fixed weights, ``[rows, num_columns]`` to ``[rows, any]``.
        num_columns: Width of the product's input.
        like: A tensor of the input's dtype and device.
        rows_max: Larger counts are not tried.
    """
    counts = [count for count in _ROW_COUNTS if count <= max(rows_max, ROWS_BASE)]
    num_rows = -(-(counts[-1] + 1) // ROWS_BASE) * ROWS_BASE
    generator = torch.Generator().manual_seed(_PROBE_SEED)
    num_sums = 0
    while num_sums < _NUM_SUMS_MIN[like.dtype]:
        probe = torch.randn(num_rows, num_columns, generator=generator).to(like)
        base = torch.cat([product(tile) for tile in torch.split(probe, ROWS_BASE)])
        # Zero or non-finite weights would make every shape agree, and prove nothing.
        if not bool(base.isfinite().all()) or not bool(base.any()):
            return (ROWS_BASE,)
        counts = [count for count in counts if _agrees(product, probe, base, count)]
        if ROWS_BASE not in counts:
            # Even the base shape treats rows by their place. One row at a time has no places.
            return (1,)
        num_sums += base.numel()
    return tuple(counts)


def _agrees(product: Callable[[Tensor], Tensor], probe: Tensor, base: Tensor, count: int) -> bool:
    # The second window puts every row at another place in its tile.
    return all(
        torch.equal(product(probe[at : at + count].clone()), base[at : at + count]) for at in (0, 1)
    )


def common_row_counts(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Row counts that every product allows; one row at a time if there is nothing in common."""
    sets = [set(each) for each in counts]
    common = set.intersection(*sets)
    return tuple(sorted(common)) or (1,)
