"""Models that are quantised at load: exact in any batch, proved at start, named in their class."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.unit.model.conftest import CPU
from tests.unit.model.test_exactness import NUM_SEQUENCES, Run, assert_equals_oracle
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model import formats, loader, operations
from understudy.runtime.model.exactness import numerics_class, prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.transformer import Transformer
from understudy.tools.demo.paths import demo_model_directory

FORMS: list[Quantization] = ["int8", "int4"]
DTYPES = [torch.float32, torch.bfloat16]


@cache
def bundled(quantization: Quantization, dtype: torch.dtype) -> Transformer:
    return load_model(demo_model_directory(), dtype=dtype, device=CPU, quantization=quantization)


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_token_by_token_gives_the_bits_of_the_whole(
    quantization: Quantization, dtype: torch.dtype
) -> None:
    run = Run(bundled(quantization, dtype))
    run.add(0, 40)
    for _ in range(40):
        run.step([(0, 1)])
    assert_equals_oracle(run)


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(data=st.data())
@settings(max_examples=8, deadline=None)
def test_any_chunks_in_any_batch_give_the_bits_of_the_whole(
    quantization: Quantization, dtype: torch.dtype, data: st.DataObject
) -> None:
    run = Run(bundled(quantization, dtype))
    for index in range(data.draw(st.integers(1, NUM_SEQUENCES), label="sequences")):
        length = data.draw(st.integers(1, 130) | st.integers(500, 600), label="length")
        run.add(index, length, seed=index)
    share = st.integers(1, 5) | st.integers(1, 64) | st.integers(200, 600)
    while run.unfinished:
        order = data.draw(st.permutations(run.unfinished), label="order")
        run.step([(index, data.draw(share, label="share")) for index in order])
    assert_equals_oracle(run)


@pytest.mark.parametrize("quantization", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_engine_proves_it_at_start(quantization: Quantization, dtype: torch.dtype) -> None:
    model = bundled(quantization, dtype)
    assert model.tiles.sizes is None
    prove_exactness(model, block_size=16)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_int8(tmp_path: Path, family: str) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES[family])
    model = load_model(directory, dtype=torch.float32, device=CPU, quantization="int8")
    prove_exactness(model, block_size=16)


def test_widths_that_no_group_divides_are_refused_in_one_line(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES["qwen2"])
    with pytest.raises(ConfigurationError) as caught:
        load_model(directory, dtype=torch.float32, device=CPU, quantization="int4")
    (problem,) = caught.value.problems
    module = "model.layers.0.self_attn.q_proj"
    assert problem == f"{directory}: {module}: int4 needs inputs in multiples of 32, got 60"


def test_the_class_of_numerics_names_the_quantisation() -> None:
    def named(quantization: Quantization) -> str:
        return numerics_class(
            demo_model_directory(),
            dtype=torch.float32,
            device=CPU,
            numerics="exact",
            quantization=quantization,
        )

    assert "/exact/float32+int8/cpu/" in named("int8")
    assert len({named("none"), named("int8"), named("int4")}) == 3


def test_quantised_weights_need_less_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    # Of 3.8 million parameters, with the tied output embedding: 19 MB in float32, 10 MB where
    # kernels read them as they are stored, in bfloat16; and 8 or 6 MB in int8.
    monkeypatch.setattr(loader, "available_memory", lambda: 8_800_000)
    with pytest.raises(ConfigurationError, match="out of memory"):
        load_model(demo_model_directory(), dtype=torch.float32, device=CPU)
    load_model(demo_model_directory(), dtype=torch.float32, device=CPU, quantization="int8")


@pytest.mark.parametrize(
    ("device", "has_kernels", "option", "kind", "words"),
    [
        ("cuda", True, "quantization", "int4", "weights of 4 bits .int4. run on the CPU only"),
        ("cuda", False, "quantization", "int8", "need Triton on a GPU"),
        ("cuda", False, "quantization", "fp8", "--quantization fp8 needs a GPU"),
        ("cpu", False, "quantization", "fp8", "--quantization fp8 needs a GPU"),
        ("cpu", False, "kv_cache_dtype", "fp8", "--kv-cache-dtype fp8 needs a GPU"),
        ("cuda", False, "kv_cache_dtype", "int8", "--kv-cache-dtype int8 needs a GPU with Triton"),
    ],
)
def test_what_a_device_has_no_kernels_for_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    has_kernels: bool,
    option: str,
    kind: str,
    words: str,
) -> None:
    for module in (operations, formats):
        monkeypatch.setattr(module, "has_kernels", lambda _: has_kernels)
    options: dict[str, Any] = {option: kind}
    with pytest.raises(ConfigurationError, match=words) as caught:
        load_model(
            demo_model_directory(), dtype=torch.float32, device=torch.device(device), **options
        )
    assert len(caught.value.problems) == 1


def test_a_card_that_is_too_old_has_no_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operations, "has_kernels", lambda _: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    with pytest.raises(ConfigurationError, match=r"compute capability 8\.9"):
        load_model(
            demo_model_directory(),
            dtype=torch.bfloat16,
            device=torch.device("cuda"),
            quantization="fp8",
        )
