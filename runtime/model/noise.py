"""Noise for sampling: a pure function of (seed, position, token id).

A token is drawn by the Gumbel-max trick: add Gumbel noise to each token's logit, take the largest;
that is a draw from the softmax. There is no generator and so no state: whoever computes position 17
of a request with seed 3, on whichever engine, after whatever preemption, gets the same noise and
the same token. And noise can be computed for a few tokens without computing it for all.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014) in Stafford's variant 13, over a counter: token ids, spaced by the golden ratio,
from a start that is itself the hash of seed and position.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Keys: TypeAlias = npt.NDArray[np.uint64]
"""Numbers of 64 bits that wrap around."""

_GOLDEN: Final = 0x9E3779B97F4A7C15
_MIX_1: Final = 0xBF58476D1CE4E5B9
_MIX_2: Final = 0x94D049BB133111EB
_MASK: Final = (1 << 64) - 1
_MANTISSA_BITS: Final = 52


def noise_key(seed: int, position: int) -> int:
    """The 64-bit start of one draw's counter; ``position`` is the index in the output."""
    return _mix(seed_hash(seed) + position * _GOLDEN)


def seed_hash(seed: int) -> int:
    """The part of ``noise_key`` that is the same for all positions."""
    return _mix(seed + _GOLDEN)


def noise_keys(seed_hashes: Keys, positions: Keys) -> Keys:
    """``noise_key`` of many draws at once, of seeds that ``seed_hash`` was taken of."""
    keys = seed_hashes + positions * np.uint64(_GOLDEN)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(_MIX_1)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(_MIX_2)
    mixed: Keys = keys ^ (keys >> np.uint64(31))
    return mixed


def gumbel_noise(keys: Tensor, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise, float64.

    Args:
        keys: ``signed(noise_key(...))``, int64, broadcasts against ``token_ids``.
        token_ids: int64.
    """
    # int64 wraps around, which is all that unsigned arithmetic needs but for its shifts.
    bits = token_ids * signed(_GOLDEN) + keys
    bits = (bits ^ _shifted_right(bits, 30)).mul_(signed(_MIX_1))
    bits = (bits ^ _shifted_right(bits, 27)).mul_(signed(_MIX_2))
    bits ^= _shifted_right(bits, 31)
    # 52 bits and a half: strictly between 0 and 1, and exactly representable at both ends.
    uniform = _shifted_right(bits, 64 - _MANTISSA_BITS).to(torch.float64)
    uniform = uniform.add_(0.5).mul_(2.0**-_MANTISSA_BITS)
    return uniform.log_().neg_().log_().neg_()


def signed(value: int) -> int:
    """The int64 with the same bits as this uint64."""
    return value - (1 << 64) if value >> 63 else value


def _shifted_right(bits: Tensor, count: int) -> Tensor:
    """Shift as uint64: int64's own shift would draw copies of the sign in."""
    return (bits >> count).bitwise_and_((1 << (64 - count)) - 1)


def _mix(value: int) -> int:
    value &= _MASK
    value = ((value ^ (value >> 30)) * _MIX_1) & _MASK
    value = ((value ^ (value >> 27)) * _MIX_2) & _MASK
    return value ^ (value >> 31)
