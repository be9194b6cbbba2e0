"""Quantised linears: close to the weights that they stand for, and exact in any batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.runtime.model import quantization
from understudy.runtime.model.layers import Linear
from understudy.runtime.model.quantization import (
    GROUP_SIZES,
    Int4Linear,
    Int8Linear,
    Int8Weight,
    dequantize_int4,
    portable_product,
    quantize_int4,
    quantize_int8,
)

DTYPES = [torch.float32, torch.bfloat16]
SHAPES = [(704, 256), (96, 1056), (131, 128)]
"""Outputs and inputs; the last one's outputs fill no block of the 4-bit kernel."""


def linear_of(kind: str, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Linear:
    if kind == "int8":
        return Int8Linear(quantize_int8(weight), bias, dtype=dtype)
    return Int4Linear(quantize_int4(weight), bias, dtype=dtype)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_rows_bits_do_not_depend_on_the_other_rows(
    kind: str, dtype: torch.dtype, shape: tuple[int, int], has_bias: bool
) -> None:
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    linear = linear_of(kind, torch.randn(shape), bias, dtype)
    assert linear.exact_row_counts(rows_max=256) is None
    rows = (torch.randn(128, shape[1]) * torch.exp2(torch.randint(-6, 7, (128, 1)))).to(dtype)
    alone = torch.cat([linear(row[None], (1,)) for row in rows])
    assert alone.dtype == dtype
    for count in range(1, 129):
        first = 128 - count
        assert torch.equal(linear(rows[:count], (count,)), alone[:count]), count
        assert torch.equal(linear(rows[first:].clone(), (count,)), alone[first:]), count


@pytest.mark.parametrize(("kind", "error"), [("int8", 0.02), ("int4", 0.13)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_quantised_product_is_close_to_the_weights_product(
    kind: str, error: float, dtype: torch.dtype
) -> None:
    weight, bias = torch.randn(96, 384), torch.randn(96)
    rows = torch.randn(33, 384).to(dtype)
    expected = rows.float() @ weight.t() + bias
    found = linear_of(kind, weight, bias.to(dtype), dtype)(rows, (33,)).float()
    assert (found - expected).norm() < error * expected.norm()


@pytest.mark.parametrize("in_features", [256, 192, 160])
def test_four_bit_products_are_those_of_the_dequantised_weight(in_features: int) -> None:
    weight = quantize_int4(torch.randn(64, in_features))
    assert weight.group_size == {256: 128, 192: 64, 160: 32}[in_features]
    rows = torch.randn(9, in_features).bfloat16()
    expected = rows.float() @ dequantize_int4(weight).t()
    found = Int4Linear(weight, None, dtype=torch.float32)(rows, (9,))
    assert (found - expected).norm() < 0.01 * expected.norm()


@given(
    rows=st.integers(1, 40),
    columns=st.sampled_from([1, 60, 1024, 1500, 4864]),
    seed=st.integers(0, 1 << 30),
)
@settings(max_examples=15, deadline=None)
def test_sums_of_extreme_integers_are_exact(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (40, columns), generator=generator).to(torch.int8)
    values[0], values[1] = 127, -127
    levels = torch.randint(1, 256, (rows, columns), generator=generator).to(torch.uint8)
    levels[0] = 255
    scales = torch.rand(40, generator=generator)
    sums = (levels.double() - 128) @ values.double().t()
    expected = sums.float() * scales
    weight = Int8Weight(values, scales)
    assert torch.equal(portable_product(weight)(levels), expected)
    if quantization._onednn_is_exact():
        assert torch.equal(quantization._onednn_product(weight)(levels), expected)


def test_without_integer_kernels_the_bits_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, rows = quantize_int8(torch.randn(48, 1100)), torch.randn(21, 1100)
    expected = Int8Linear(weight, None, dtype=torch.float32)(rows, (21,))
    monkeypatch.setattr(quantization, "_onednn_is_exact", lambda: False)
    assert torch.equal(Int8Linear(weight, None, dtype=torch.float32)(rows, (21,)), expected)


def test_a_kernel_that_saturates_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def saturating(weight: Int8Weight) -> object:
        exact = portable_product(weight)
        return lambda levels: exact(levels).clamp(-32768, 32767)

    monkeypatch.setattr(quantization, "_onednn_product", saturating)
    quantization._onednn_is_exact.cache_clear()
    try:
        assert not quantization._onednn_is_exact()
    finally:
        quantization._onednn_is_exact.cache_clear()


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_rows_of_zeros_stay_zero_and_nan_stays_in_its_row(kind: str) -> None:
    linear = linear_of(kind, torch.randn(32, 64), None, torch.float32)
    rows = torch.randn(4, 64)
    rows[1] = 0
    rows[2, 5] = torch.nan
    found = linear(rows, (4,))
    assert not found[1].any()
    assert found[2].isnan().all()
    assert torch.equal(found[[0, 3]], linear(rows[[0, 3]], (2,)))


@given(scale=st.floats(1e-6, 1e6), seed=st.integers(0, 1 << 30))
@settings(max_examples=30, deadline=None)
def test_quantising_errs_by_half_a_step_at_most(scale: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 64, generator=generator) * scale
    weight[3] = 0
    weight[4] = scale
    eight = quantize_int8(weight)
    steps = eight.scales[:, None]
    assert (eight.values * steps - weight).abs().le(steps * 0.5001 + 1e-30).all()
    four = quantize_int4(weight)
    steps = four.scales.repeat_interleave(four.group_size, dim=1)
    assert (dequantize_int4(four) - weight).abs().le(steps * 0.501 + scale * 1e-6).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = torch.randn(8, 64)
    weight[3, 3] = bad
    for quantize in (quantize_int8, quantize_int4):
        with pytest.raises(ValueError, match="not finite"):
            quantize(weight)


def test_inputs_that_no_group_divides_are_refused() -> None:
    with pytest.raises(ValueError, match=f"multiples of {GROUP_SIZES[-1]}, got 60"):
        quantize_int4(torch.randn(8, 60))
