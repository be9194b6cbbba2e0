"""Rotary position embeddings (Su et al., arXiv:2104.09864) and their three scalings.

A head's dimensions are turned in pairs ``(i, i + head_dim / 2)`` by an angle that grows with the
position: fast for the first pairs, slowly for the last. The dot product of a query and a key then
depends on their distance alone. Scaling slows the turning down, so that a model trained on short
contexts meets no angle in a long one that it has not seen.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.config import (
    LinearRopeScaling,
    Llama3RopeScaling,
    ModelConfig,
    YarnRopeScaling,
)


class Rotation(NamedTuple):
    """Cosines and signed sines for each token of a batch, ``[tokens, 1, head_dim]``, float32."""

    cosines: Tensor
    sines: Tensor
    """Negative in the first half, so that one multiplication turns both halves of a head."""


class RotaryEmbedding:
    """Turns positions into rotations. Holds one frequency for each pair of dimensions."""

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self._frequencies = inverse_frequencies(config).to(device)
        scaling = config.rope_scaling
        self._attention_factor = (
            scaling.attention_factor if isinstance(scaling, YarnRopeScaling) else 1.0
        )

    def __call__(self, positions: Tensor) -> Rotation:
        """Rotations for ``positions`` ``[tokens]``."""
        angles = positions.to(torch.float32).unsqueeze(1) * self._frequencies
        return self._rotation(angles.cos(), angles.sin())

    def table(self, num_positions: int) -> Rotation:
        """Rotations of all positions below ``num_positions``.

        Computed in double, so that a number does not depend on its place in the table: the last few
        of a tensor's, or of a thread's share of it, are computed by another formula.
        """
        positions = torch.arange(num_positions, device=self._frequencies.device)
        angles = (positions.to(torch.float32).unsqueeze(1) * self._frequencies).to(torch.float64)
        return self._rotation(angles.cos().to(torch.float32), angles.sin().to(torch.float32))

    def _rotation(self, cosines: Tensor, sines: Tensor) -> Rotation:
        if self._attention_factor != 1.0:
            cosines *= self._attention_factor
            sines *= self._attention_factor
        return Rotation(
            torch.cat((cosines, cosines), dim=1).unsqueeze(1),
            torch.cat((-sines, sines), dim=1).unsqueeze(1),
        )


def rotate(heads: Tensor, rotation: Rotation) -> Tensor:
    """Rotate ``heads`` ``[tokens, heads, head_dim]``; the result is float32."""
    heads = heads.to(torch.float32)
    turned = heads.roll(heads.shape[-1] // 2, dims=-1).mul_(rotation.sines)
    return turned.add_(heads * rotation.cosines)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Radians per position for each pair, ``[head_dim / 2]``, float32, scaling applied."""
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    wavelengths = config.rope_theta**exponents
    frequencies = 1.0 / wavelengths
    match config.rope_scaling:
        case None:
            return frequencies
        case LinearRopeScaling(factor):
            return frequencies / factor
        case Llama3RopeScaling() as scaling:
            return _llama3_frequencies(frequencies, scaling)
        case YarnRopeScaling() as scaling:
            ramp = _yarn_ramp(config, scaling)
            return (1.0 / (scaling.factor * wavelengths)) * ramp + frequencies * (1.0 - ramp)


def _llama3_frequencies(frequencies: Tensor, scaling: Llama3RopeScaling) -> Tensor:
    """Slow pairs down by the factor, leave fast ones alone, interpolate between.

    Source: Meta's reference code for Llama 3.1 (``apply_scaling``).
    """
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    share_kept = (turns - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    share_kept = share_kept.clamp(0.0, 1.0)
    return (1.0 - share_kept) * frequencies / scaling.factor + share_kept * frequencies


def _yarn_ramp(config: ModelConfig, scaling: YarnRopeScaling) -> Tensor:
    """How much of each pair is interpolated, 0 .. 1 (YaRN, section 3.2).

    A pair that turns more than ``beta_fast`` times within the original context keeps its frequency;
    one that turns less than ``beta_slow`` times is slowed down in full.
    """

    def pair_turning(turns: float) -> float:
        ratio = scaling.original_max_position_embeddings / (turns * 2 * math.pi)
        return config.head_dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = pair_turning(scaling.beta_fast)
    high = pair_turning(scaling.beta_slow)
    if scaling.truncate:
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, config.head_dim - 1)
    if low == high:
        high += 0.001  # a step instead of a ramp, without dividing by zero
    pairs = torch.arange(config.head_dim // 2, dtype=torch.float32)
    return ((pairs - low) / (high - low)).clamp(0.0, 1.0)
