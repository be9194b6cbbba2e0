"""Linear layers in each layout, normalisation, activation."""

from __future__ import annotations

import pytest
import torch

from understudy.runtime.model.layers import DenseLinear, rms_norm, silu_and_multiply
from understudy.runtime.model.numerics import ROWS_BASE

SMALL = (48, 80)
LARGE = (1500, 1500)
"""Above the size from which float32 weights are packed."""


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SMALL, torch.float32), (LARGE, torch.float32), (SMALL, torch.bfloat16)],
)
def test_a_linear_multiplies_and_adds(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    weight = torch.randn(*shape).to(dtype)
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    x = torch.randn(7, shape[1]).to(dtype)
    expected = x.double() @ weight.double().T
    if bias is not None:
        expected += bias.double()
    linear = DenseLinear(weight, bias)
    tolerance = 1e-3 if dtype == torch.float32 else 0.2
    for tiles in ((7,), (4, 2, 1)):
        result = linear(x, tiles)
        assert result.dtype == dtype
        torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0.02)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(SMALL, torch.float32), (LARGE, torch.float32), (SMALL, torch.bfloat16)],
)
def test_tile_sizes_that_are_called_exact_give_equal_bits(
    shape: tuple[int, int], dtype: torch.dtype, has_bias: bool
) -> None:
    bias = torch.randn(shape[0]).to(dtype) if has_bias else None
    linear = DenseLinear(torch.randn(*shape).to(dtype), bias)
    counts = linear.exact_row_counts(rows_max=64)
    assert ROWS_BASE in counts
    x = torch.randn(192, shape[1]).to(dtype)
    expected = linear(x, (ROWS_BASE,) * 6)
    for count in counts:
        num_rows = 192 // count * count
        tiles = (count,) * (num_rows // count)
        assert torch.equal(linear(x[:num_rows], tiles), expected[:num_rows]), count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_divides_by_the_root_mean_square(dtype: torch.dtype) -> None:
    x, weight = torch.randn(5, 60).to(dtype), torch.randn(60).to(dtype)
    wide = x.double()
    expected = wide / (wide.square().mean(dim=1, keepdim=True) + 1e-6).sqrt() * weight.double()
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    result = rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(result.double(), expected, atol=tolerance, rtol=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 31, 33, 100])
def test_activation_bits_do_not_depend_on_a_rows_place(dtype: torch.dtype, width: int) -> None:
    x = (torch.randn(300, 2 * width) * 4).to(dtype)
    gate, up = x.double().chunk(2, dim=1)
    expected = gate * torch.sigmoid(gate) * up
    result = silu_and_multiply(x)
    torch.testing.assert_close(result.double(), expected, atol=1e-4, rtol=0.01)
    for start, stop in ((0, 1), (299, 300), (7, 9), (100, 297)):
        assert torch.equal(silu_and_multiply(x[start:stop].clone()), result[start:stop])


def test_activation_survives_extreme_values() -> None:
    x = torch.tensor([[-1000.0, 1000.0, 0.0, 2.0, 3.0, 5.0]])
    assert silu_and_multiply(x).tolist() == [[0.0, 3000.0, 0.0]]
