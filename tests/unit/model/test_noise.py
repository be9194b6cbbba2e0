"""Noise: pure, uniform, and Gumbel-distributed."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from understudy.runtime.model.noise import (
    gumbel_noise,
    noise_key,
    noise_keys,
    seed_hash,
    signed,
)

GOLDEN = [0.9540281564445624, 1.1344904532141464, 1.0887866634826477, -0.6245596320295467]
MASK = (1 << 64) - 1
U64 = st.integers(0, MASK)


def reference_noise(seed: int, position: int, token_id: int) -> float:
    """The same in Python's unbounded integers."""
    bits = (noise_key(seed, position) + token_id * 0x9E3779B97F4A7C15) & MASK
    bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & MASK
    bits ^= bits >> 31
    uniform = ((bits >> 12) + 0.5) / (1 << 52)
    return -math.log(-math.log(uniform))


def noise_of(seed: int, position: int, token_ids: Tensor) -> Tensor:
    return gumbel_noise(torch.tensor(signed(noise_key(seed, position))), token_ids)


@given(seed=U64, position=st.integers(0, 1 << 20), token_id=st.integers(0, 1 << 18))
def test_noise_is_the_hash_that_the_module_describes(
    seed: int, position: int, token_id: int
) -> None:
    noise = noise_of(seed, position, torch.tensor([token_id])).item()
    assert noise == pytest.approx(reference_noise(seed, position, token_id), rel=1e-12)


@given(draws=st.lists(st.tuples(U64, st.integers(0, 1 << 40)), min_size=1))
def test_keys_of_many_draws_are_those_of_each(draws: list[tuple[int, int]]) -> None:
    hashes = np.array([seed_hash(seed) for seed, _ in draws], dtype=np.uint64)
    positions = np.array([position for _, position in draws], dtype=np.uint64)
    expected = [noise_key(seed, position) for seed, position in draws]
    assert noise_keys(hashes, positions).tolist() == expected


@given(seed=U64, position=st.integers(0, 1 << 20), start=st.integers(0, 100))
def test_a_token_has_the_same_noise_alone_and_among_others(
    seed: int, position: int, start: int
) -> None:
    token_ids = torch.arange(151)
    whole = noise_of(seed, position, token_ids)
    assert torch.equal(noise_of(seed, position, token_ids[start:].clone()), whole[start:])


def test_noise_stays_what_it_was() -> None:
    # Golden: a stream that is resumed by a later version must go on with the same draws.
    noise = noise_of(1234, 17, torch.tensor([0, 1, 2, 151_935]))
    assert noise.tolist() == pytest.approx(GOLDEN, rel=1e-12)


def test_extreme_bits_give_finite_noise() -> None:
    # Counter 0 hashes to 0, the smallest uniform there is; the largest is 52 ones and a half.
    smallest = gumbel_noise(torch.tensor(0), torch.tensor([0])).item()
    assert smallest == pytest.approx(-math.log(53 * math.log(2)))
    largest = ((1 << 52) - 1 + 0.5) / (1 << 52)
    assert math.isfinite(-math.log(-math.log(largest)))


def test_signed_keeps_the_bits() -> None:
    assert signed(0) == 0
    assert signed(MASK) == -1
    assert signed(1 << 63) == -(1 << 63)
    assert signed((1 << 63) - 1) == (1 << 63) - 1


@pytest.mark.parametrize("axis", ["token", "position", "seed"])
def test_noise_is_gumbel_distributed_along_every_axis(axis: str) -> None:
    count = 100_000
    if axis == "token":
        noise = noise_of(5, 6, torch.arange(count))
    else:
        keys = [noise_key(i, 3) if axis == "seed" else noise_key(3, i) for i in range(count)]
        noise = gumbel_noise(torch.tensor([signed(key) for key in keys]), torch.tensor(17))
    uniform = torch.exp(-torch.exp(-noise))
    observed = torch.histc(uniform, bins=100, min=0.0, max=1.0)
    statistic = ((observed - count / 100) ** 2 / (count / 100)).sum().item()
    assert statistic < 148.2  # chi-square, 99 degrees of freedom, p = 0.001


def test_neighbours_are_not_correlated() -> None:
    noise = torch.stack([noise_of(seed, 0, torch.arange(1000)) for seed in range(100)])
    centred = noise - noise.mean()
    variance = centred.square().mean().item()
    assert variance == pytest.approx(math.pi**2 / 6, rel=0.02)
    for product in (centred[:, 1:] * centred[:, :-1], centred[1:] * centred[:-1]):
        assert abs(product.mean().item()) / variance < 0.012
