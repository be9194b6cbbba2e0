"""Products of fp8 against the same numbers in float64, and the order of their sums."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from understudy.runtime.model.kernels import fp8_product
from understudy.runtime.model.kernels.fp8_product import fp8_linear
from understudy.runtime.model.kernels.quantisation import QuantisedRows, quantise_rows


def rows_of(rows: int, depth: int, *, seed: int) -> QuantisedRows:
    generator = torch.Generator().manual_seed(seed)
    return quantise_rows(torch.randn(rows, depth, generator=generator), torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 1024, 70), (3, 100, 40), (70, 600, 130), (300, 256, 64)]
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_products_are_those_of_the_numbers(
    rows: int, depth: int, columns: int, has_bias: bool
) -> None:
    x, weight = rows_of(rows, depth, seed=0), rows_of(columns, depth, seed=1)
    bias = torch.randn(columns) if has_bias else None
    found = fp8_linear(x, *weight, bias, torch.float32)
    factors = x.scales[:, None].double() * weight.scales.double()
    expected = (x.values.double() @ weight.values.double().t()) * factors
    if bias is not None:
        expected = expected + bias.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-3)
    assert not fp8_product._shared_sums(weight.values.device)[1].any()


def test_a_rows_bits_do_not_depend_on_who_sums_the_segments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, weight = rows_of(70, 2048, seed=0), rows_of(64, 2048, seed=1)
    assert fp8_product._num_segments(64, 2048) == 8
    assert fp8_product._cut(70, 64, 8).is_shared
    shared = fp8_linear(x, *weight, None, torch.float32)
    few = QuantisedRows(x.values[:1], x.scales[:1])
    assert torch.equal(fp8_linear(few, *weight, None, torch.float32), shared[:1])
    monkeypatch.setattr(fp8_product, "_PROGRAMS_MIN", 1)
    monkeypatch.setattr(fp8_product, "_num_segments", lambda *_: 8)
    assert not fp8_product._cut(70, 64, 8).is_shared
    assert torch.equal(fp8_linear(x, *weight, None, torch.float32), shared)


def test_segments_follow_the_weight_alone() -> None:
    assert fp8_product._num_segments(28672, 4096) == 1
    assert fp8_product._num_segments(6144, 4096) == 4
    assert fp8_product._num_segments(4096, 14336) == 4
    assert fp8_product._num_segments(896, 896) == 2
    assert not fp8_product._cut(2048, 4096, 4).is_shared
