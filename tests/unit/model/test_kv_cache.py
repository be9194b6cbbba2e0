"""The cache's tensors, and its size from budgets."""

from __future__ import annotations

import json
import mmap
from pathlib import Path

import pytest
import torch

from tests.checkpoints import LLAMA
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model import kv_cache
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import (
    KVCache,
    KVCacheSize,
    LayerCache,
    blocks_that_fit,
    kv_block_bytes,
)

CPU = torch.device("cpu")
BLOCK_BYTES = 2 * 2 * 16 * 2 * 16 * 4
"""Keys and values, layers, tokens, heads, dimensions, float32."""


@pytest.fixture
def config(tmp_path: Path) -> ModelConfig:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return ModelConfig.from_directory(tmp_path)


def size(config: ModelConfig, kv_cache_memory: int | None, max_num_seqs: int = 8) -> KVCacheSize:
    return blocks_that_fit(
        config,
        block_size=16,
        dtype=torch.float32,
        device=CPU,
        max_model_len=160,
        max_num_seqs=max_num_seqs,
        kv_cache_memory=kv_cache_memory,
    )


def test_a_block_holds_keys_and_values_of_all_layers(config: ModelConfig) -> None:
    assert kv_block_bytes(config, 16, torch.float32) == BLOCK_BYTES
    assert kv_block_bytes(config, 16, torch.bfloat16) == BLOCK_BYTES // 2
    cache = KVCache(config, num_blocks=3, block_size=16, dtype=torch.float32, device=CPU)
    held = sum(layer.keys[:-1].nbytes + layer.values[:-1].nbytes for layer in cache.layers)
    assert held == 3 * BLOCK_BYTES


def test_what_is_written_is_in_its_slots_and_the_zero_slot_stays_zero(config: ModelConfig) -> None:
    cache = KVCache(config, num_blocks=2, block_size=16, dtype=torch.bfloat16, device=CPU)
    layer: LayerCache = cache.layers[1]
    keys, values = torch.randn(3, 2, 16), torch.randn(3, 2, 16)
    layer.write(torch.tensor([31, 0, 7]), keys, values)
    assert torch.equal(layer.keys[[31, 0, 7]], keys.to(torch.bfloat16))
    assert torch.equal(layer.values[[31, 0, 7]], values.to(torch.bfloat16))
    assert cache.zero_slot == 32
    assert not layer.keys[32].any()
    assert not cache.layers[0].keys.any()


def test_a_budget_gives_whole_blocks(config: ModelConfig) -> None:
    assert size(config, 25 * BLOCK_BYTES - 1).num_blocks == 24
    assert size(config, 25 * BLOCK_BYTES).num_blocks == 25
    assert size(config, 25 * BLOCK_BYTES).warning is None


def test_no_more_blocks_than_all_sequences_can_use(config: ModelConfig) -> None:
    assert size(config, 10**12).num_blocks == 8 * 10
    assert size(config, 10**12, max_num_seqs=1).num_blocks == 10


def test_a_cache_below_one_longest_sequence_is_allowed_with_a_warning(config: ModelConfig) -> None:
    small = size(config, 9 * BLOCK_BYTES)
    assert small.num_blocks == 9
    assert small.warning is not None
    assert "holds 144 tokens, fewer than the 160" in small.warning
    assert "raise --kv-cache-memory or lower --max-model-len" in small.warning


def test_no_block_at_all_is_an_error_that_says_what_to_set(config: ModelConfig) -> None:
    with pytest.raises(ConfigurationError) as caught:
        size(config, BLOCK_BYTES - 1)
    (problem,) = caught.value.problems
    assert f"needs {BLOCK_BYTES} bytes, there are {BLOCK_BYTES - 1}" in problem
    assert "raise --kv-cache-memory" in problem


def test_without_a_budget_a_share_of_what_is_available_is_taken(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_cache, "available_memory", lambda: 40 * BLOCK_BYTES)
    chosen = size(config, None)
    assert chosen.num_blocks == 20
    assert "0.5 of" in chosen.reason


def test_on_a_gpu_a_step_keeps_what_it_takes(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, total = 60 * BLOCK_BYTES, 100 * BLOCK_BYTES
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, total))
    chosen = blocks_that_fit(
        config,
        block_size=16,
        dtype=torch.float32,
        device=torch.device("cuda"),
        max_model_len=160,
        max_num_seqs=8,
        gpu_memory_utilization=0.75,
        step_bytes=5 * BLOCK_BYTES,
    )
    assert chosen.num_blocks == 75 - 40 - 5
    assert "0.75 of" in chosen.reason


def test_a_cache_that_cannot_be_allocated_is_one_line(config: ModelConfig) -> None:
    with pytest.raises(ConfigurationError, match="out of memory: the KV cache needs"):
        KVCache(config, num_blocks=1 << 44, block_size=16, dtype=torch.float32, device=CPU)


def test_a_cache_takes_memory_as_it_is_written(config: ModelConfig) -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    before = resident_bytes()
    num_blocks = (1 << 30) // BLOCK_BYTES
    cache = KVCache(config, num_blocks=num_blocks, block_size=16, dtype=torch.float32, device=CPU)
    assert resident_bytes() - before < 256 << 20
    assert not cache.layers[0].keys[-1].any()
    cache.layers[0].keys[:] = 1.0
    assert resident_bytes() - before >= cache.layers[0].keys.nbytes
