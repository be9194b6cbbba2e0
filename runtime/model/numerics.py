"""Which shapes of a computation give the same bits, found by trying them.

The promise of ``numerics="exact"`` is that a row's result does not depend on the other rows of its
batch. Matrix libraries break it: they pick a kernel by the shape of the whole product, kernels add
up in different orders, and floating-point sums depend on the order. Calling with one fixed shape,
padded, always keeps the promise, because one shape means one kernel. But for a single token a
shape of 32 rows costs several times what a shape of 2 costs.

So we ask the machine. The order in which a kernel adds does not depend on the values, so two shapes
that agree in every bit on thousands of sums of nothing but rounding errors add in the same order.
When a model is loaded, each of its products is tried in a list of shapes, and those that agree with
the *base* shape may be used in its place. A machine on which none agrees still has the base shape,
and is exact and slower.

The choice depends on bits alone, never on time, so equal machines choose alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.torch_import import seeded

Numerics = Literal["exact", "fast"]

ROWS_BASE: Final = 32
"""The shape that is always allowed: as many rows as bring a product near its full speed."""

_ROW_COUNTS: Final = (
    *(1, 2, 3, 4, 6, 8, 12, 16, 20, 24, 28, 32),
    *(40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256),
)
_LARGE_ROW_COUNTS: Final = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Of a large matrix, where each size that is tried costs a start some tenths of a second."""
_LARGE_ELEMENTS: Final = 32 << 20
_PROBE_SEED: Final = 0x5EED
_PROBE_OUTPUTS: Final = 128
"""Columns at either end of a product's output that a probe looks at."""


class Probe(NamedTuple):
    """A product whose result is nothing but the rounding errors of its sums."""

    rows: Tensor
    """``[rows, in]``."""
    weight: Tensor
    """``[out, in]``."""


class RowTiles:
    """Cuts a batch of rows into tiles whose sizes all give the same bits.

    ``sizes=None`` is one tile of whatever size: fast numerics, or products that are exact so.
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


def cancelling_probe(
    *, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device
) -> Probe:
    """Rows and weights of which every sum is zero, but for rounding.

    Each term has an opposite somewhere else in its sum. What is left tells the order of additions,
    and is small, so that even rounding the result to bfloat16 does not hide it.
    """
    generator = seeded(_PROBE_SEED)

    def random(*shape: int) -> Tensor:
        # Of many magnitudes: sums of products of bfloat16 are often exact otherwise.
        exponents = torch.randint(-6, 7, shape, generator=generator)
        return torch.randn(*shape, generator=generator) * torch.exp2(exponents)

    num_rows = _ROW_COUNTS[-1] + ROWS_BASE
    half = in_features // 2
    order = torch.randperm(2 * half, generator=generator)
    rows = torch.zeros(num_rows, in_features)
    rows[:, order] = random(num_rows, half).repeat(1, 2)
    # All other outputs stay zero, which makes a probe of a large matrix cheap.
    num_outputs = min(2 * _PROBE_OUTPUTS, out_features)
    outputs = torch.arange(num_outputs)
    outputs[num_outputs // 2 :] += out_features - num_outputs
    values = random(num_outputs, half)
    columns = torch.zeros(num_outputs, in_features)
    columns[:, order] = torch.cat((values, -values), dim=1)
    weight = torch.zeros(out_features, in_features, dtype=dtype, device=device)
    weight[outputs.to(device)] = columns.to(device, dtype)
    return Probe(rows.to(device, dtype), weight)


def agreeing_row_counts(
    product: Callable[[Tensor], Tensor], rows: Tensor, *, rows_max: int
) -> tuple[int, ...]:
    """Row counts up to ``rows_max`` whose results equal the base shape's, bit for bit.

    Args:
        product: A matrix product, ``[rows, in]`` to ``[rows, out]``.
        rows: Input that shows the order of additions, of a ``Probe``.
        rows_max: Larger counts are not tried.
    """
    most = max(rows_max, ROWS_BASE)
    base = torch.cat([product(tile) for tile in torch.split(rows[: most + ROWS_BASE], ROWS_BASE)])
    is_large = rows.shape[1] * base.shape[1] >= _LARGE_ELEMENTS
    tried = _LARGE_ROW_COUNTS if is_large else _ROW_COUNTS

    def agrees(count: int) -> bool:
        # From the second row on, so that no row is at its place of the base result.
        return torch.equal(product(rows[1 : 1 + count].clone()), base[1 : 1 + count])

    counts = [count for count in tried if count <= most and agrees(count)]
    # If even the base shape treats rows by their place: one row at a time has no places.
    return tuple(counts) if ROWS_BASE in counts else (1,)


def common_row_counts(counts: Iterable[tuple[int, ...]]) -> tuple[int, ...]:
    """Row counts that every product allows; one row at a time if there is nothing in common."""
    sets = [set(each) for each in counts]
    common = set.intersection(*sets)
    return tuple(sorted(common)) or (1,)
