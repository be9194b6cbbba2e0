"""The fused kernels between attentions against the plain functions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

pytest.importorskip("triton")

from understudy.runtime.model.kernels.activation import (
    silu_and_multiply,
    silu_and_multiply_quantised,
)
from understudy.runtime.model.kernels.normalisation import add_rms_norm
from understudy.runtime.model.kernels.quantisation import NARROW_MAX, QuantisedRows, quantise_rows
from understudy.runtime.model.kernels.rotation import rotate_and_store
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.layers import rms_norm
from understudy.runtime.model.layers import silu_and_multiply as plain_silu_and_multiply
from understudy.runtime.model.rope import Rotation, rotate

EPS = 1e-5
# The interpreter cuts bfloat16 off instead of rounding it; float16 is short, too.
DTYPES = [torch.float32, torch.float16]
NARROW = [torch.int8, torch.float8_e4m3fn]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def close(found: Tensor, expected: Tensor) -> None:
    tolerance = 2.0**-9 if found.dtype == torch.float16 else 1e-5
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def is_quantised(found: QuantisedRows, expected: Tensor) -> None:
    """Within half a step of what was quantised, and using the whole range."""
    scales = found.scales[:, None]
    values = found.values.float()
    error = (values * scales - expected.float()).abs()
    if found.values.dtype == torch.int8:
        steps = scales
    else:
        steps = torch.exp2(torch.frexp(values).exponent.clamp(min=-5) - 4) * scales
    rounding = 2.0**-9 * expected.float().abs().amax(dim=1, keepdim=True)
    assert (error <= 0.51 * steps + rounding).all()
    largest = values.abs().amax(dim=1)
    whole = NARROW_MAX[found.values.dtype]
    assert (largest[expected.abs().amax(dim=1) > 0] == whole).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 100])
def test_add_and_norm(dtype: torch.dtype, width: int) -> None:
    hidden, delta = random(5, width, dtype=dtype), random(5, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    found = add_rms_norm(hidden, delta, weight, EPS)
    assert torch.equal(found.hidden, hidden + delta)
    close(found.normed, rms_norm(hidden + delta, weight, EPS))
    alone = add_rms_norm(hidden, None, weight, EPS)
    assert alone.hidden is hidden
    close(alone.normed, rms_norm(hidden, weight, EPS))


@pytest.mark.parametrize("narrow", NARROW, ids=str)
def test_add_and_norm_and_quantise(narrow: torch.dtype) -> None:
    hidden, delta, weight = random(5, 100), random(5, 100, seed=1), random(100, seed=2)
    hidden[3] = delta[3] = 0.0
    found = add_rms_norm(hidden, delta, weight, EPS, quantised=narrow)
    assert found.scales is not None
    is_quantised(QuantisedRows(found.normed, found.scales), rms_norm(hidden + delta, weight, EPS))
    assert not found.normed[3].float().any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_silu(dtype: torch.dtype) -> None:
    x = random(4, 2 * 1100, dtype=dtype) * 4
    close(silu_and_multiply(x), plain_silu_and_multiply(x))
    for narrow in NARROW:
        is_quantised(silu_and_multiply_quantised(x, narrow), plain_silu_and_multiply(x))


def test_rows_are_quantised_to_the_nearest_and_ties_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, -2.5, 3.4, -126.6], [0.0] * 6])
    found = quantise_rows(x)
    assert found.values[0].tolist() == [127, 0, 2, -2, 3, -127]
    assert found.scales.tolist() == [1.0, 0.0]
    assert not found.values[1].any()


def test_rows_become_the_nearest_numbers_of_8_bits_in_floating_point() -> None:
    x = random(6, 300) * torch.exp2(torch.randint(-12, 1, (6, 300)))
    x[0, :5] = torch.tensor([448.0, 17.0, 19.0, 2.0**-10, 3 * 2.0**-10])
    found = quantise_rows(x, torch.float8_e4m3fn)
    factors = 1.0 / (x.abs().amax(dim=1, keepdim=True) / 448.0)
    expected = (x * factors).to(torch.float8_e4m3fn)
    assert torch.equal(found.values.float(), expected.float())
    assert found.values[0, :5].tolist() == [448.0, 16.0, 20.0, 0.0, 2.0**-8]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_cannot_look_sound(narrow: torch.dtype, wrong: float) -> None:
    x = random(2, 100)
    x[1, 7] = wrong
    scales = [quantise_rows(x, narrow).scales]
    scales.append(silu_and_multiply_quantised(x.repeat(1, 2), narrow).scales)
    normed = add_rms_norm(x, None, random(100), EPS, quantised=narrow)
    for each in (*scales, normed.scales):
        assert each is not None
        assert each.isfinite().tolist() == [True, False]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "has_norm"),
    [(4, 2, 16, False), (5, 1, 12, False), (8, 4, 32, True)],
)
def test_rotation(
    dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int, has_norm: bool
) -> None:
    rows, num_slots = 5, 4
    heads = random(rows, num_heads + 2 * num_kv_heads, head_dim, dtype=dtype)
    num_rotated = num_heads + num_kv_heads
    qk_norm = random(num_rotated, head_dim, dtype=dtype, seed=3) if has_norm else None
    angles = random(rows, 1, head_dim // 2, seed=4) * 9
    rotation = Rotation(
        torch.cat((angles.cos(), angles.cos()), dim=2),
        torch.cat((-angles.sin(), angles.sin()), dim=2),
    )
    slots = torch.tensor([7, 0, -1, 9])
    cache = LayerCache(*torch.full((2, 11, num_kv_heads, head_dim), 5.0, dtype=dtype))
    query = rotate_and_store(heads, qk_norm, EPS, rotation, slots, cache)

    rotated = heads[:, :num_rotated]
    if qk_norm is not None:
        rotated = F.rms_norm(rotated, (head_dim,), eps=EPS) * qk_norm
    rotated = rotate(rotated, rotation).to(dtype)
    close(query, rotated[:, :num_heads])
    for row in (0, 1, 3):
        close(cache.keys[slots[row]], rotated[row, num_heads:])
        assert torch.equal(cache.values[slots[row]], heads[row, num_rotated:])
    others = [slot for slot in range(11) if slot not in slots]
    assert (cache.keys[others] == 5.0).all()
    assert (cache.values[others] == 5.0).all()
    assert num_slots == len(slots) < rows


@pytest.mark.parametrize("narrow", NARROW, ids=str)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(4, 2, 16), (5, 1, 12)])
def test_keys_and_values_are_stored_in_8_bits(
    narrow: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> None:
    heads = random(3, num_heads + 2 * num_kv_heads, head_dim)
    heads[1, num_heads:] = 0.0
    angles = random(3, 1, head_dim // 2, seed=4) * 9
    rotation = Rotation(
        torch.cat((angles.cos(), angles.cos()), dim=2),
        torch.cat((-angles.sin(), angles.sin()), dim=2),
    )
    slots = torch.tensor([3, 0, -1])
    shape = (5, num_kv_heads, head_dim)
    narrow_cache = LayerCache(
        *(torch.full(shape, 5.0).to(narrow) for _ in range(2)),
        *(torch.full(shape[:2], 7.0) for _ in range(2)),
    )
    plain_cache = LayerCache(*torch.full((2, *shape), 5.0))
    query = rotate_and_store(heads, None, EPS, rotation, slots, narrow_cache)
    assert torch.equal(query, rotate_and_store(heads, None, EPS, rotation, slots, plain_cache))
    keys, values, key_scales, value_scales = narrow_cache
    assert key_scales is not None
    assert value_scales is not None
    for kept, scales, plain in (
        (keys, key_scales, plain_cache.keys),
        (values, value_scales, plain_cache.values),
    ):
        for slot in (3, 0):
            is_quantised(QuantisedRows(kept[slot], scales[slot]), plain[slot])
        assert not scales[0].any()
        assert (kept[[1, 2, 4]].float() == 5.0).all()
        assert (scales[[1, 2, 4]] == 7.0).all()
