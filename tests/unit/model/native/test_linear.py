"""Products of rows with packed weights, against float64 and against themselves in other batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.unit.model.native.kernels import compiled, needs_native
from understudy.runtime.model.native.linear import NativeLinear, pack, quantize_int8_natively
from understudy.runtime.model.quantization import (
    Int8Linear,
    Int8Weight,
    portable_product,
    quantize_int8,
)

pytestmark = needs_native

ROW_COUNTS = (1, 2, 3, 4, 5, 8, 13, 14, 15, 28, 29, 64, 224, 225, 451)
SHAPES = [(1, 1), (3, 33), (64, 32), (130, 100), (896, 70), (1025, 31)]
"""Inputs and outputs: whole panels and parts of them, one block of terms and more."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear_of(weight: Tensor, bias: Tensor | None = None) -> NativeLinear:
    library = compiled()
    assert library is not None
    return NativeLinear(library, pack(library, weight), bias)


def int8_linear_of(weight: Int8Weight, bias: Tensor | None = None) -> NativeLinear:
    library = compiled()
    assert library is not None
    return NativeLinear(library, pack(library, weight), bias)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("has_bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_product_is_that_of_the_matrix(
    inputs: int, outputs: int, has_bias: bool, dtype: torch.dtype
) -> None:
    weight = random(outputs, inputs, seed=1).to(dtype)
    bias = random(outputs, seed=2) if has_bias else None
    linear = linear_of(weight, bias)
    for num_rows in ROW_COUNTS:
        x = random(num_rows, inputs, seed=num_rows)
        expected = x.double() @ weight.double().t()
        if bias is not None:
            expected += bias
        torch.testing.assert_close(linear(x, (num_rows,)).double(), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_has_the_same_bits_in_any_batch_and_by_any_number_of_threads(kind: str) -> None:
    weight = random(100, 1030, seed=1)
    x = random(max(ROW_COUNTS), 1030, seed=2)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            linear = (
                int8_linear_of(quantize_int8(weight), random(100))
                if kind == "int8"
                else linear_of(weight.to(getattr(torch, kind)), random(100))
            )
            results += [linear(x[-count:], (count,)) for count in ROW_COUNTS]
    finally:
        torch.set_num_threads(before)
        compiled()
    whole = results[-1]
    assert all(torch.equal(result, whole[-len(result) :]) for result in results)


def test_rows_may_lie_apart() -> None:
    weight, wide = random(40, 50, seed=1), random(6, 80)
    linear = linear_of(weight)
    assert torch.equal(linear(wide[:, 10:60], (6,)), linear(wide[:, 10:60].contiguous(), (6,)))


@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_integers_give_the_bits_of_plain_torch(
    inputs: int, outputs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = quantize_int8(random(outputs, inputs, seed=1))
    bias = random(outputs, seed=2)
    module = "understudy.runtime.model.quantization"
    monkeypatch.setattr(f"{module}._onednn_is_exact", lambda: False)
    plain = Int8Linear(weight, bias, dtype=torch.float32)
    native = int8_linear_of(weight, bias)
    for num_rows in (1, 2, 15, 40):
        x = random(num_rows, inputs, seed=num_rows)
        assert torch.equal(native(x, (num_rows,)), plain(x, (num_rows,)))


def test_sums_of_extreme_integers_do_not_saturate() -> None:
    values = torch.full((64, 1024), 127, dtype=torch.int8)
    values[::2] = -128
    weight = Int8Weight(values, torch.ones(64))
    x = torch.ones(3, 1024)
    x[1] = -1.0
    levels = torch.full((3, 1024), 255, dtype=torch.uint8)
    levels[1] = 1
    sums = portable_product(weight)(levels)
    result = int8_linear_of(weight)(x, (3,))
    torch.testing.assert_close(result, sums / 127.0, atol=0.0, rtol=1e-6)


def test_a_weight_is_refused_where_its_sums_would_not_fit() -> None:
    widest = 132_104
    weight = Int8Weight(torch.full((1, widest), -128, dtype=torch.int8), torch.ones(1))
    for sign in (1.0, -1.0):
        found = int8_linear_of(weight)(torch.full((1, widest), sign), (1,))
        assert found.item() == pytest.approx(-128.0 * sign * widest, rel=1e-6)
    library = compiled()
    assert library is not None
    wider = Int8Weight(torch.zeros(1, widest + 1, dtype=torch.int8), torch.ones(1))
    with pytest.raises(ValueError, match="132105 inputs are too many"):
        pack(library, wider)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", ["float32", "int8"])
def test_what_is_no_number_stays_in_its_row(bad: float, kind: str) -> None:
    weight = random(40, 64, seed=1)
    linear = int8_linear_of(quantize_int8(weight)) if kind == "int8" else linear_of(weight)
    x = random(5, 64)
    good = linear(x, (5,))
    x[2, 17] = bad
    result = linear(x, (5,))
    assert not result[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(result[others], good[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
def test_a_weight_is_quantised_as_by_plain_torch(
    inputs: int, outputs: int, dtype: torch.dtype
) -> None:
    weight = random(outputs, inputs).to(dtype)
    weight[0] = 0.0
    expected = quantize_int8(weight)
    library = compiled()
    assert library is not None
    found = quantize_int8_natively(library, weight)
    assert torch.equal(found.values, expected.values)
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    weight = random(40, 64)
    weight[3, 5] = bad
    library = compiled()
    assert library is not None
    with pytest.raises(ValueError, match="not finite"):
        quantize_int8_natively(library, weight)


def test_a_row_of_zeros_gives_zeros() -> None:
    linear = int8_linear_of(quantize_int8(random(40, 64)))
    assert torch.equal(linear(torch.zeros(2, 64), (2,)), torch.zeros(2, 40))
