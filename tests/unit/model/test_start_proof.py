"""What an engine proves of its numerics before it joins, and what it says of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.unit.model.conftest import CPU, LoadModel
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model import exactness
from understudy.runtime.model.exactness import (
    numerics_class,
    prove_exactness,
    prove_exactness_once,
)
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.model_digest import SAMPLE_BYTES, SAMPLE_EVERY_BYTES, model_digest
from understudy.runtime.model.operations import kernels_name
from understudy.runtime.model.transformer import Batch, Transformer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_numerics_hold_on_this_machine(
    model_of: LoadModel, family: str, dtype: torch.dtype
) -> None:
    for block_size in (8, 16):
        prove_exactness(model_of(family, dtype, "exact"), block_size=block_size)


@pytest.mark.parametrize("what", ["hidden states", "keys and values", "logits"])
def test_a_machine_whose_bits_depend_on_the_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES["llama"])
    model = load_model(directory, dtype=torch.float32, device=CPU, numerics="exact")
    forward, logits = model.forward, model.logits

    def next_above(tensor: Tensor) -> Tensor:
        return torch.nextafter(tensor, torch.tensor(torch.inf))

    def forward_with_an_error(batch: Batch, cache: object) -> Tensor:
        hidden = forward(batch, cache)  # type: ignore[arg-type]
        if len(batch.slots) != 1:
            return hidden
        if what == "keys and values":
            layer = cache.layers[-1]  # type: ignore[attr-defined]
            layer.values[batch.slots] = next_above(layer.values[batch.slots])
        return next_above(hidden) if what == "hidden states" else hidden

    def logits_with_an_error(hidden: Tensor) -> Tensor:
        found = logits(hidden)
        return next_above(found) if what == "logits" and len(hidden) == 1 else found

    monkeypatch.setattr(model, "forward", forward_with_an_error)
    monkeypatch.setattr(model, "logits", logits_with_an_error)
    with pytest.raises(ConfigurationError, match=rf"{what} depend on .* set numerics fast"):
        prove_exactness(model, block_size=16)


def test_the_proof_leaves_nothing_behind(model_of: LoadModel) -> None:
    model: Transformer = model_of("llama", torch.float32, "exact")
    before = set(vars(model))
    prove_exactness(model, block_size=16)
    assert set(vars(model)) == before


def test_a_proof_holds_for_the_next_start_and_for_nothing_else(
    model_of: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exactness, "cache_directory", lambda: tmp_path)
    proved = []
    monkeypatch.setattr(
        exactness, "prove_exactness", lambda _, *, block_size: proved.append(block_size)
    )
    model = model_of("llama", torch.float32, "exact")
    for name, block_size in (("a", 16), ("a", 16), ("b", 16), ("a", 8)):
        prove_exactness_once(model, block_size=block_size, name=name)
    assert proved == [16, 16, 8]


def test_what_was_not_proved_is_tried_again(
    model_of: LoadModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Transformer, *, block_size: int) -> None:
        raise ConfigurationError(f"not exact in blocks of {block_size}")

    monkeypatch.setattr(exactness, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(exactness, "prove_exactness", fail)
    model = model_of("llama", torch.float32, "exact")
    for _ in range(2):
        with pytest.raises(ConfigurationError, match="not exact"):
            prove_exactness_once(model, block_size=16, name="a")


def test_models_have_one_digest_as_long_as_their_bytes_are_the_same(tmp_path: Path) -> None:
    one = write_checkpoint(tmp_path / "one", FAMILIES["llama"])
    same = write_checkpoint(tmp_path / "same", FAMILIES["llama"])
    assert model_digest(one) == model_digest(same)
    weights = same / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert model_digest(one) != model_digest(same)
    config = one / "config.json"
    before = model_digest(one)
    config.write_text(config.read_text() + "\n")
    assert model_digest(one) != before


def test_of_a_large_file_the_digest_takes_samples_up_to_the_end(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    size = 2 * SAMPLE_EVERY_BYTES + SAMPLE_BYTES
    with weights.open("wb") as file:
        file.truncate(size)
    digests = {model_digest(tmp_path)}
    for offset in (0, SAMPLE_EVERY_BYTES, size - 1):
        with weights.open("r+b") as file:
            file.seek(offset)
            file.write(b"\1")
        digests.add(model_digest(tmp_path))
    assert len(digests) == 4


def test_the_class_of_numerics_names_what_decides_about_bits(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "one", FAMILIES["llama"])
    other = write_checkpoint(tmp_path / "other", FAMILIES["qwen2"])
    named = numerics_class(directory, dtype=torch.float32, device=CPU, numerics="exact")
    assert named.startswith(f"{model_digest(directory)}/exact/float32/cpu/")
    assert named.endswith(f"x1/{kernels_name(CPU, torch.float32)}/{torch.__version__}")
    others = {
        numerics_class(other, dtype=torch.float32, device=CPU, numerics="exact"),
        numerics_class(directory, dtype=torch.bfloat16, device=CPU, numerics="exact"),
        numerics_class(directory, dtype=torch.float32, device=CPU, numerics="fast"),
    }
    assert len(others | {named}) == 4
