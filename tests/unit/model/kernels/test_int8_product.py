"""Integer products are exact, whoever shares in a sum."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from understudy.runtime.model.kernels import int8_product
from understudy.runtime.model.kernels.int8_product import int8_linear
from understudy.runtime.model.kernels.quantisation import QuantisedRows


@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(1, 2048, 70), (3, 100, 40), (33, 1030, 64), (70, 256, 130)]
)
@pytest.mark.parametrize("has_bias", [True, False])
def test_sums_are_exact(rows: int, depth: int, columns: int, has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(rows)

    def integers(*shape: int) -> torch.Tensor:
        return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)

    x = QuantisedRows(integers(rows, depth), torch.rand(rows, generator=generator))
    weight, scales = integers(columns, depth), torch.rand(columns, generator=generator)
    bias = torch.randn(columns, generator=generator) if has_bias else None
    found = int8_linear(x, weight, scales, bias, torch.float32)
    sums = (x.values.long() @ weight.long().t()).float()
    expected = sums * x.scales[:, None] * scales
    if bias is not None:
        expected = expected + bias
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-2)
    # What was shared is zero again.
    shared = int8_product._shared_sums(weight.device)
    assert not any(each.any() for each in shared)
    # Another number of rows is other tiles and other shares, and the same bits.
    first = QuantisedRows(x.values[:1], x.scales[:1])
    assert torch.equal(int8_linear(first, weight, scales, bias, torch.float32), found[:1])


def test_few_tiles_share_their_sums_and_many_do_not() -> None:
    shape = int8_product._shape(1)
    assert int8_product._num_shares(64, 4096, shape) == 4
    assert int8_product._num_shares(512, 4096, shape) == 1
    assert int8_product._num_shares(1, 300, shape) == 1
