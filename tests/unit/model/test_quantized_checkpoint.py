"""Checkpoints that are quantised: the numbers that their tools meant, or one clear line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.checkpoints import QWEN2
from tests.quantized_checkpoints import SHAPE, write_pair
from tests.unit.model.conftest import CPU
from tests.unit.model.test_exactness import Run
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.quantization import (
    Fp8Weight,
    Int4Weight,
    Int8Weight,
    dequantize_int4,
)
from understudy.runtime.model.quantized_checkpoint import read_matrix
from understudy.runtime.model.transformer import Transformer

FOUR_BITS = ["gptq", "awq", "packed", "packed-asymmetric"]
KINDS = [*FOUR_BITS, "int8", "fp8-channel", "fp8-tensor"]
BIASED: dict[str, Any] = {
    **QWEN2,
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 256,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def load(directory: Path, dtype: torch.dtype = torch.float32, **options: Any) -> Transformer:
    return load_model(directory, dtype=dtype, device=CPU, **options)


def problems(directory: Path, **options: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigurationError) as caught:
        load(directory, **options)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def logits(model: Transformer) -> Tensor:
    run = Run(model)
    run.add(0, 60)
    run.step([(0, 60)])
    with torch.inference_mode():
        return model.logits(run.states(0))


def change(directory: Path, **tensors: Tensor | None) -> None:
    """Replace tensors of layer 0, or take them away."""
    path = directory / "model.safetensors"
    stored = load_file(path)
    for name, tensor in tensors.items():
        full = "model.layers.0." + name.replace("__", ".")
        if tensor is None:
            del stored[full]
        else:
            stored[full] = tensor
    save_file(stored, path)


def configure(directory: Path, **values: object) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= values
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("kind", KINDS)
def test_a_matrix_is_read_as_the_numbers_that_were_packed(tmp_path: Path, kind: str) -> None:
    pair = write_pair(tmp_path, kind)
    scheme = ModelConfig.from_directory(pair.quantized).quantization
    assert scheme is not None
    quantized, plain = Checkpoint.open(pair.quantized), Checkpoint.open(pair.dequantized)
    for module in ("self_attn.k_proj", "mlp.down_proj"):
        module = f"model.layers.1.{module}"
        expected = plain.stored(f"{module}.weight")
        shape = plain.tensors[f"{module}.weight"].shape
        weight = read_matrix(quantized, scheme, module, shape)
        match weight:
            case Int8Weight() | Fp8Weight():
                assert torch.equal(weight.values * weight.scales[:, None], expected)
            case Int4Weight():
                torch.testing.assert_close(dequantize_int4(weight), expected, atol=1e-6, rtol=1e-5)
            case Tensor():
                assert torch.equal(weight, expected)
        if kind.startswith("fp8"):
            kept = read_matrix(quantized, scheme, module, shape, keeps_fp8=True)
            assert isinstance(kept, Fp8Weight)
            assert torch.equal(kept.values.float() * kept.scales[:, None], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SHAPE, BIASED], ids=["llama", "biased"])
def test_a_model_answers_like_its_dequantised_twin(
    tmp_path: Path, kind: str, shape: dict[str, Any]
) -> None:
    pair = write_pair(tmp_path, kind, shape=shape)
    expected, found = logits(load(pair.dequantized)), logits(load(pair.quantized))
    error = (found - expected).norm() / expected.norm()
    # Of W8A8 the activations are rounded too; a packing misread is off by a hundred times as much.
    assert error < {"int8": 0.08, "fp8-channel": 1e-5, "fp8-tensor": 1e-5}.get(kind, 0.03)


@pytest.mark.parametrize("kind", FOUR_BITS)
@pytest.mark.parametrize("group_size", [16, 64, 128])
def test_groups_of_any_size_are_read(tmp_path: Path, kind: str, group_size: int) -> None:
    pair = write_pair(tmp_path, kind, group_size=group_size)
    expected, found = logits(load(pair.dequantized)), logits(load(pair.quantized))
    assert (found - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_exact_numerics_hold(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    prove_exactness(load(write_pair(tmp_path, kind).quantized, dtype), block_size=16)


@pytest.mark.parametrize("kind", KINDS)
def test_progress_is_told_up_to_the_last_byte_that_is_read(tmp_path: Path, kind: str) -> None:
    told: list[tuple[int, int]] = []
    load(
        write_pair(tmp_path, kind).quantized,
        progress=lambda done, total: told.append((done, total)),
    )
    assert told[-1][0] == told[-1][1]
    assert told == sorted(told)


def test_fp8_weights_may_become_int8(tmp_path: Path) -> None:
    pair = write_pair(tmp_path, "fp8-channel")
    expected, found = (
        logits(load(pair.dequantized)),
        logits(load(pair.quantized, quantization="int8")),
    )
    assert (found - expected).norm() < 0.1 * expected.norm()


def test_quantising_twice_is_refused(tmp_path: Path) -> None:
    directory = write_pair(tmp_path, "gptq").quantized
    (problem,) = problems(directory, quantization="int8")
    assert problem.endswith("the checkpoint is quantised already (gptq); leave the setting out")


def test_all_or_none_of_matrices_that_become_one_are_quantised(tmp_path: Path) -> None:
    directory = write_pair(tmp_path, "int8").quantized
    configure(directory, ignore=["lm_head", "re:.*layers.0.self_attn.q_proj"])
    assert "all or none of model.layers.0.self_attn.q_proj, " in problems(directory)[0]


@pytest.mark.parametrize(
    ("kind", "part", "words"),
    [
        ("gptq", "scales", "is missing"),
        ("gptq", "qzeros", "is missing"),
        ("awq", "qweight", "is missing"),
        ("packed-asymmetric", "weight_zero_point", "is missing"),
        ("int8", "weight_scale", "is missing"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, kind: str, part: str, words: str) -> None:
    directory = write_pair(tmp_path, kind).quantized
    change(directory, **{f"mlp__up_proj__{part}": None})
    (problem,) = problems(directory)
    assert problem == f"{directory}: tensor model.layers.0.mlp.up_proj.{part} {words}"


@pytest.mark.parametrize(
    ("kind", "part", "value", "words"),
    [
        ("gptq", "qweight", torch.zeros(8, 256, dtype=torch.int32), "has shape [8, 256]"),
        ("gptq", "scales", torch.zeros(2, 256), "config.json asks for [4, 256]"),
        ("gptq", "scales", torch.full((4, 256), torch.nan), "not finite"),
        ("gptq", "bias", torch.ones(256), "unexpected tensor"),
        ("gptq", "g_idx", torch.arange(128).flip(0).to(torch.int32) // 32, "desc_act"),
        ("awq", "scales", torch.full((4, 256), torch.inf), "not finite"),
        ("awq", "qweight", torch.zeros(128, 32, dtype=torch.int64), "is of torch.int64"),
        ("packed", "weight_scale", torch.full((256, 4), -torch.inf), "not finite"),
        ("packed", "weight_shape", torch.tensor([256, 120]), "is not [256, 128]"),
        ("int8", "weight_scale", torch.full((256, 1), torch.nan), "not finite"),
        ("int8", "weight", torch.zeros(256, 128), "is of torch.float32"),
        ("fp8-tensor", "weight_scale", torch.tensor([torch.nan]), "not finite"),
        ("fp8-channel", "weight_scale", torch.ones(256), "has shape [256]"),
    ],
)
def test_a_part_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, kind: str, part: str, value: Tensor, words: str
) -> None:
    directory = write_pair(tmp_path, kind).quantized
    change(directory, **{f"mlp__up_proj__{part}": value})
    (problem,) = problems(directory)
    assert words in problem
    assert "up_proj" in problem


@pytest.mark.parametrize("kind", FOUR_BITS)
def test_groups_that_do_not_divide_the_inputs_are_refused(tmp_path: Path, kind: str) -> None:
    directory = write_pair(tmp_path, kind).quantized
    if kind.startswith("packed"):
        path = directory / "config.json"
        path.write_text(path.read_text().replace('"group_size": 32', '"group_size": 96'))
    else:
        configure(directory, group_size=96)
    assert "[128, 128] does not fit groups of 96 in words of 8" in problems(directory)[0]
