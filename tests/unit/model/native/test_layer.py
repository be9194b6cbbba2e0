"""What a layer does between its products, against plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from tests.unit.model.native.kernels import CPU, compiled, needs_native
from tests.unit.model.test_attention import config_of
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.native.layer import NativeOperations
from understudy.runtime.model.operations import PlainOperations
from understudy.runtime.model.rope import RotaryEmbedding

pytestmark = needs_native

WIDTHS = (1, 15, 16, 17, 896, 2050)
NUM_SLOTS = 50


def operations_of(config: ModelConfig) -> tuple[PlainOperations, NativeOperations]:
    library = compiled()
    assert library is not None
    return PlainOperations(config), NativeOperations(library, config)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("has_delta", [False, True])
def test_a_norm_is_that_of_torch(width: int, has_delta: bool) -> None:
    plain, native = operations_of(config_of(4, 2, 16))
    hidden, weight = random(70, width), random(width, seed=1)
    delta = random(70, width, seed=2) if has_delta else None
    expected = plain.add_and_normalise(hidden.clone(), delta, weight)
    found = native.add_and_normalise(hidden.clone(), delta, weight)
    assert torch.equal(found.hidden, expected.hidden)
    torch.testing.assert_close(found.normed, expected.normed)


@pytest.mark.parametrize("width", WIDTHS)
def test_an_activation_is_that_of_torch(width: int) -> None:
    plain, native = operations_of(config_of(4, 2, 16))
    rows = 5 * random(40, 2 * width)
    rows[0, 0], rows[1, 0], rows[2, 0] = 1e4, -1e4, 0.0
    torch.testing.assert_close(
        native.silu_and_multiply(rows), plain.silu_and_multiply(rows), atol=1e-5, rtol=2e-6
    )


def test_what_is_no_number_is_seen_in_its_row_alone() -> None:
    _, native = operations_of(config_of(4, 2, 16))
    rows = random(3, 64)
    rows[1, 5] = torch.nan
    activated = native.silu_and_multiply(rows).isfinite()
    assert activated[[0, 2]].all()
    assert not activated[1].all()
    normed = native.add_and_normalise(rows, None, torch.ones(64)).normed.isfinite()
    assert normed[[0, 2]].all()
    assert not normed[1].any()


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("head_dim", [16, 48, 64, 256])
def test_heads_are_rotated_and_kept_as_by_torch(head_dim: int, qk_norm: bool) -> None:
    config = dataclasses.replace(config_of(6, 2, head_dim), qk_norm=qk_norm)
    plain, native = operations_of(config)
    heads = random(30, 10, head_dim)
    weight = random(8, head_dim, seed=1) if qk_norm else None
    rotation = RotaryEmbedding(config, CPU)(torch.arange(30) * 7)
    slots = torch.randperm(NUM_SLOTS, generator=torch.Generator().manual_seed(2))[:27]
    caches = [
        LayerCache(*(torch.full((NUM_SLOTS, 2, head_dim), torch.nan) for _ in range(2)))
        for _ in range(2)
    ]
    expected = plain.rotate_and_store(heads.clone(), weight, rotation, slots, caches[0])
    found = native.rotate_and_store(heads.clone(), weight, rotation, slots, caches[1])
    # Rotation alone is the same arithmetic; a norm's sum is made in another order.
    close = 1e-5 if qk_norm else 0.0
    torch.testing.assert_close(found[:, :8], expected, atol=close, rtol=close)
    for mine, theirs in zip(caches[1], caches[0], strict=True):
        torch.testing.assert_close(mine, theirs, atol=close, rtol=close, equal_nan=True)


def test_keys_and_values_of_8_bits_are_kept_with_a_scale_for_each_head() -> None:
    config = config_of(6, 2, 64)
    _, native = operations_of(config)
    heads = random(9, 10, 64)
    heads[0, 6] = 0.0
    rotation = RotaryEmbedding(config, CPU)(torch.arange(9))
    slots = torch.arange(9) * 2
    codes = [torch.zeros(NUM_SLOTS, 2, 64, dtype=torch.int8) for _ in range(2)]
    scales = [torch.zeros(NUM_SLOTS, 2) for _ in range(2)]
    found = native.rotate_and_store(heads, None, rotation, slots, LayerCache(*codes, *scales))
    for code, scale, expected in zip(codes, scales, (found[:, 6:8], found[:, 8:]), strict=True):
        restored = code[slots] * scale[slots].unsqueeze(2)
        half_a_step = scale[slots].unsqueeze(2) * 0.5001
        assert ((restored - expected).abs() <= half_a_step).all()
        assert code[slots].abs().amax(dim=2).flatten()[1:].eq(127).all()
        assert not code[1::2].any()
