"""Loading: progress on the way, one clear line for each thing that is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoints import FAMILIES, LLAMA, QWEN2, random_tensors, write_checkpoint
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model import loader
from understudy.runtime.model.loader import default_dtype, load_model
from understudy.runtime.model.transformer import Transformer

CPU = torch.device("cpu")


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    return load_model(directory, dtype=dtype, device=CPU, **options)


def problems(directory: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(directory, **options)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("num_shards", [1, 4])
def test_progress_is_told_up_to_the_last_byte(tmp_path: Path, family: str, num_shards: int) -> None:
    write_checkpoint(tmp_path, FAMILIES[family], num_shards=num_shards)
    told: list[tuple[int, int]] = []
    load(tmp_path, progress=lambda done, total: told.append((done, total)))
    total = sum(tensor.nbytes for tensor in random_tensors(FAMILIES[family]).values())
    assert told[-1] == (total, total)
    assert told == sorted(told)
    assert len(told) > 10


def test_a_tied_models_own_output_embedding_is_ignored(tmp_path: Path) -> None:
    tensors = random_tensors(QWEN2)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(6)
    write_checkpoint(tmp_path, QWEN2, tensors=tensors)
    assert load(tmp_path).vocab_size == 131


def test_the_checkpoints_dtype_is_converted(tmp_path: Path) -> None:
    tensors = {name: tensor.half() for name, tensor in random_tensors(LLAMA).items()}
    write_checkpoint(tmp_path, LLAMA, tensors=tensors)
    assert load(tmp_path, torch.bfloat16).dtype == torch.bfloat16


def test_missing_wrong_and_unexpected_tensors_are_all_named(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    del tensors["model.norm.weight"]
    tensors["lm_head.weight"] = torch.zeros(128, 63)
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    found = problems(write_checkpoint(tmp_path, LLAMA, tensors=tensors))
    weights = tmp_path / "model.safetensors"
    assert found == (
        f"{tmp_path}: tensor model.norm.weight is missing",
        f"{weights}: lm_head.weight has shape [128, 63], config.json asks for [128, 64]",
        f"{weights}: unexpected tensor model.layers.0.self_attn.q_proj.bias",
    )


def test_hundreds_of_missing_tensors_are_a_few_lines(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA)
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "num_hidden_layers": 90}))
    found = problems(tmp_path)
    assert len(found) == 9
    assert "more like the last one" in found[-1]


def test_a_truncated_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, LLAMA, num_shards=3)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (problem,) = problems(tmp_path)
    assert problem.startswith(f"{shard}: truncated")


def test_too_little_memory_says_what_is_needed_there_and_to_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, LLAMA)
    monkeypatch.setattr(loader, "available_memory", lambda: 100_000)
    (problem,) = problems(tmp_path)
    assert "out of memory on cpu: the weights need" in problem
    assert "available; set --dtype bfloat16 or --quantization int8, or choose a smaller" in problem


def test_an_allocation_that_fails_says_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path, LLAMA)

    def fail(*_: object, **__: object) -> None:
        # What torch's allocator says, of 2**62 bytes.
        torch.empty(1 << 60)

    monkeypatch.setattr(loader, "Transformer", fail)
    (problem,) = problems(tmp_path)
    assert "out of memory on cpu" in problem


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8])
def test_other_dtypes_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigurationError, match="supported: float32, bfloat16"):
        load(write_checkpoint(tmp_path, LLAMA), dtype)


def test_the_default_dtype_is_one_that_can_be_loaded() -> None:
    assert default_dtype(CPU) in {torch.float32, torch.bfloat16}
