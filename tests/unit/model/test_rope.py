"""Rotary embeddings: what they preserve, and what scaling does to them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.checkpoints import LLAMA
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.rope import RotaryEmbedding, inverse_frequencies, rotate

CPU = torch.device("cpu")


def config_with(directory: Path, **rope: Any) -> ModelConfig:
    config = {**LLAMA, "head_dim": 64, "rope_scaling": rope, "max_position_embeddings": 4096}
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_directory(directory)


def rotated(config: ModelConfig, heads: Tensor, positions: list[int]) -> Tensor:
    rotation = RotaryEmbedding(config, CPU)(torch.tensor(positions))
    return rotate(heads.expand(len(positions), -1, -1), rotation)


def test_position_0_changes_nothing(tmp_path: Path) -> None:
    heads = torch.randn(1, 3, 64)
    assert torch.equal(rotated(config_with(tmp_path), heads, [0]), heads)


def test_lengths_are_preserved(tmp_path: Path) -> None:
    heads = torch.randn(1, 3, 64)
    turned = rotated(config_with(tmp_path), heads, [1, 17, 4000])
    torch.testing.assert_close(turned.norm(dim=2), heads.norm(dim=2).expand(3, 3))


def test_products_depend_on_distance_alone(tmp_path: Path) -> None:
    config = config_with(tmp_path)
    query, key = torch.randn(1, 1, 64), torch.randn(1, 1, 64)
    near = rotated(config, query, [105, 5]) * rotated(config, key, [100, 0])
    first, second = near.sum(dim=(1, 2))
    assert first.item() == pytest.approx(second.item(), abs=1e-3)


def test_linear_scaling_divides_positions(tmp_path: Path) -> None:
    heads = torch.randn(1, 2, 64)
    scaled = rotated(config_with(tmp_path, rope_type="linear", factor=4.0), heads, [40, 400])
    torch.testing.assert_close(scaled, rotated(config_with(tmp_path), heads, [10, 100]))


def test_llama3_scaling_leaves_fast_pairs_and_slows_the_slowest(tmp_path: Path) -> None:
    plain = inverse_frequencies(config_with(tmp_path))
    scaled = inverse_frequencies(
        config_with(
            tmp_path,
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=1024,
        )
    )
    turns = 1024 * plain / (2 * math.pi)
    assert torch.equal(scaled[turns > 4], plain[turns > 4])
    torch.testing.assert_close(scaled[turns < 1], plain[turns < 1] / 8)
    between = (turns > 1) & (turns < 4)
    assert between.any()
    assert ((scaled < plain) & (scaled > plain / 8))[between].all()
    assert (scaled.diff() < 0).all()


def test_yarn_scaling_ramps_from_none_to_all_and_raises_the_norm(tmp_path: Path) -> None:
    config = config_with(
        tmp_path, rope_type="yarn", factor=4.0, original_max_position_embeddings=1024
    )
    plain, scaled = inverse_frequencies(config_with(tmp_path)), inverse_frequencies(config)
    slowing = plain / scaled
    assert slowing[0].item() == pytest.approx(1.0)
    assert slowing[-1].item() == pytest.approx(4.0)
    assert (slowing.diff() >= -1e-4).all()
    heads = torch.randn(1, 1, 64)
    growth = rotated(config, heads, [9]).norm() / heads.norm()
    assert growth.item() == pytest.approx(0.1 * math.log(4.0) + 1.0)


def test_any_dtype_is_rotated_in_float32(tmp_path: Path) -> None:
    heads = torch.randn(1, 2, 64)
    turned = rotated(config_with(tmp_path), heads.to(torch.bfloat16), [3])
    assert turned.dtype == torch.float32
    torch.testing.assert_close(
        turned, rotated(config_with(tmp_path), heads, [3]), atol=0.05, rtol=0
    )
