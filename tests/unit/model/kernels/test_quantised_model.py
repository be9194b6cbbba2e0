"""Models whose weights, rows, keys and values have 8 bits, by kernels, as if the CPU were a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.quantized_checkpoints import SHAPE, write_pair
from tests.unit.model.conftest import CPU
from tests.unit.model.kernels.test_model import BLOCK_SIZE, sequences_of
from understudy.runtime.kvcache.kv_cache_manager import BlockCopy
from understudy.runtime.model import formats, linears, operations
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kernels import fp8_product, int8_product
from understudy.runtime.model.kernels.linears import TritonQuantisedLinear
from understudy.runtime.model.kv_cache import KVCache
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.tools.demo.paths import demo_model_directory

ONE_LAYER = {"num_hidden_layers": 1}


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has the CPU taken for a GPU that multiplies fp8."""
    for module in (operations, linears, formats):
        monkeypatch.setattr(module, "has_kernels", lambda _: True)
    monkeypatch.setattr(formats, "has_fp8_products", lambda _: True)
    yield
    for product in (int8_product, fp8_product):
        assert not product._shared_sums(CPU)[1].any()


def load(directory: Path, **options: Any) -> Transformer:
    return load_model(directory, dtype=torch.float32, device=CPU, numerics="exact", **options)


def logits_of(model: Transformer) -> Tensor:
    """A prompt's last, and what follows it and another prompt."""
    sequences = sequences_of((18, 5), model.vocab_size)
    runner = ModelRunner(model, num_blocks=8, block_size=BLOCK_SIZE)
    with torch.inference_mode():
        first = runner.logits(StepPlan(0, (ScheduledSequence(sequences[0], 18),)))
        sequences[0].num_computed_tokens = 17
        step = (ScheduledSequence(sequences[0], 1), ScheduledSequence(sequences[1], 5))
        second = runner.logits(StepPlan(1, step))
    assert first is not None
    assert second is not None
    # In exact numerics a row's bits are the same in a prompt and in any batch.
    assert torch.equal(first[0], second[0])
    return torch.cat((first, second))


def share_explained(found: Tensor, expected: Tensor) -> float:
    """Cosine of the angle between two answers."""
    return float(torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0))


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(
    ("family", "kind", "least"), [("qwen2", "int8", 0.998), ("qwen3", "fp8", 0.97)]
)
def test_weights_quantised_at_load_answer_like_those_that_are_not(
    tmp_path: Path, family: str, kind: Any, least: float
) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES[family] | ONE_LAYER)
    model = load(directory, quantization=kind)
    row_dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    for layer in model._weights.layers:
        for linear in layer.linears:
            assert isinstance(linear, TritonQuantisedLinear)
            assert linear.row_dtype == row_dtype
    # The output embedding is int8 in both.
    assert isinstance(model._weights.lm_head, TritonQuantisedLinear)
    assert model._weights.lm_head.row_dtype == torch.int8
    assert model.tiles.sizes is None
    assert share_explained(logits_of(model), logits_of(load(directory))) > least


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("kind", ["int8", "fp8-channel", "fp8-tensor"])
def test_quantised_checkpoints_are_multiplied_as_they_are_stored(tmp_path: Path, kind: str) -> None:
    pair = write_pair(tmp_path, kind, shape=SHAPE | ONE_LAYER)
    model = load(pair.quantized)
    row_dtype = torch.int8 if kind == "int8" else torch.float8_e4m3fn
    layer = model._weights.layers[0]
    assert all(isinstance(linear, TritonQuantisedLinear) for linear in layer.linears)
    assert isinstance(layer.down, TritonQuantisedLinear)
    assert layer.down.row_dtype == row_dtype
    # Nothing covers the output embedding.
    assert not isinstance(model._weights.lm_head, TritonQuantisedLinear)
    least = 0.998 if kind == "int8" else 0.97
    assert share_explained(logits_of(model), logits_of(load(pair.dequantized))) > least


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize(("kind", "least"), [("int8", 0.999), ("fp8", 0.97)])
def test_keys_and_values_of_8_bits_answer_like_those_of_more(
    tmp_path: Path, kind: Any, least: float
) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES["llama"])
    model = load(directory, kv_cache_dtype=kind)
    assert model.kv_dtype.itemsize == 1
    assert share_explained(logits_of(model), logits_of(load(directory))) > least


def test_blocks_of_8_bits_are_copied_with_their_scales() -> None:
    config = ModelConfig.from_directory(demo_model_directory())
    for dtype in (torch.int8, torch.float8_e4m3fn):
        cache = KVCache(config, num_blocks=3, block_size=4, dtype=dtype, device=CPU)
        for layer in cache.layers:
            for tensor in layer.tensors:
                tensor[:4] = 3
        cache.copy_blocks([BlockCopy(0, 2)])
        for layer in cache.layers:
            assert layer.keys.dtype == layer.values.dtype == dtype
            assert len(layer.tensors) == 4
            for tensor in layer.tensors:
                assert (tensor[8:12] == 3).all()
                assert not tensor[4:8].any()
