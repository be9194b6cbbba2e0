"""Tiles of rows, and the search for sizes that agree."""

from __future__ import annotations

from functools import reduce

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from understudy.runtime.model.numerics import (
    ROWS_BASE,
    RowTiles,
    agreeing_row_counts,
    cancelling_probe,
    common_row_counts,
)

CPU = torch.device("cpu")


def summed_in_order(terms: Tensor) -> Tensor:
    """Sum along the last dimension, one term after the other, without a wider accumulator."""
    return reduce(torch.add, terms.unbind(dim=-1))


PROBE = cancelling_probe(in_features=48, out_features=80, dtype=torch.float32, device=CPU)


@given(sizes=st.sets(st.integers(1, 256), min_size=1), num_rows=st.integers(1, 3000))
def test_tiles_are_allowed_sizes_that_hold_all_rows(sizes: set[int], num_rows: int) -> None:
    tiles = RowTiles(tuple(sizes)).cut(num_rows)
    assert set(tiles) <= sizes
    assert sum(tiles) >= num_rows
    assert sum(tiles[:-1]) < num_rows


def test_padding_is_the_least_that_one_tile_allows() -> None:
    tiles = RowTiles((32, 2, 8))
    assert tiles.cut(1) == (2,)
    assert tiles.cut(32) == (32,)
    assert tiles.cut(33) == (32, 2)
    assert tiles.cut(70) == (32, 32, 8)


def test_fast_numerics_take_any_size() -> None:
    assert RowTiles(None).cut(77) == (77,)
    assert RowTiles(None).sizes is None


def test_a_product_that_treats_all_rows_alike_may_have_any_size() -> None:
    counts = agreeing_row_counts(lambda x: x * 2, PROBE.rows, rows_max=256)
    assert counts[0] == 1
    assert counts[-1] == 256


def test_sizes_are_tried_up_to_the_largest_wanted_and_the_base_always() -> None:
    assert agreeing_row_counts(lambda x: x, PROBE.rows, rows_max=64)[-1] == 64
    assert agreeing_row_counts(lambda x: x, PROBE.rows, rows_max=1)[-1] == ROWS_BASE


def test_sizes_that_add_in_another_order_are_left_out() -> None:
    def product(x: Tensor) -> Tensor:
        # Small batches add from the other end.
        return summed_in_order(x if len(x) >= 8 else x.flip(1)).unsqueeze(1)

    counts = agreeing_row_counts(product, PROBE.rows, rows_max=64)
    assert counts[0] == 8
    assert ROWS_BASE in counts


def test_one_row_at_a_time_remains_if_places_matter() -> None:
    def product(x: Tensor) -> Tensor:
        return x + torch.arange(len(x)).unsqueeze(1)

    assert agreeing_row_counts(product, PROBE.rows, rows_max=64) == (1,)


def test_common_counts_are_those_of_all() -> None:
    assert common_row_counts([(1, 2, 32), (2, 32, 64)]) == (2, 32)
    assert common_row_counts([(2, 32), (1,)]) == (1,)


@given(
    in_features=st.integers(2, 65),
    out_features=st.integers(1, 700),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_probe_is_nothing_but_rounding(
    in_features: int, out_features: int, dtype: torch.dtype
) -> None:
    probe = cancelling_probe(
        in_features=in_features, out_features=out_features, dtype=dtype, device=CPU
    )
    assert probe.weight.shape == (out_features, in_features)
    exact = probe.rows.double() @ probe.weight.double().T
    assert exact.abs().max() < 1e-10
    assert probe.weight.any()


def test_a_probe_tells_orders_apart_even_in_bfloat16() -> None:
    probe = cancelling_probe(in_features=64, out_features=128, dtype=torch.bfloat16, device=CPU)
    terms = probe.rows.float().unsqueeze(1) * probe.weight.float()
    forwards = summed_in_order(terms).to(torch.bfloat16)
    backwards = summed_in_order(terms.flip(2)).to(torch.bfloat16)
    assert (forwards != backwards).float().mean() > 0.5
