"""Safetensors headers that lie, shards that are not there, names that want out."""

from __future__ import annotations

import json
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from tests.checkpoints import LLAMA, random_tensors, write_checkpoint
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.checkpoint import Checkpoint, read_header

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_raw(path: Path, header: bytes, data: bytes, *, length: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)
    return path


def problem_of(path: Path) -> str:
    with pytest.raises(ConfigurationError) as caught:
        read_header(path)
    (problem,) = caught.value.problems
    assert problem.startswith(f"{path}: ")
    assert "\n" not in problem
    return problem


def write_header(directory: Path, header: Any, data: bytes = bytes(24)) -> Path:
    return write_raw(directory / "model.safetensors", json.dumps(header).encode(), data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_safetensors_writes_is_read(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(3, 4).to(dtype), "b": torch.randn(5).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == {"a", "b"}
    for name, tensor in tensors.items():
        into = torch.empty(tensor.shape)
        checkpoint.read(name, into)
        assert torch.equal(into, tensor.float())


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    tensors = random_tensors(LLAMA)
    write_checkpoint(tmp_path, LLAMA, tensors=tensors, num_shards=3)
    checkpoint = Checkpoint.open(tmp_path)
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        into = torch.empty_like(tensor)
        checkpoint.read(name, into)
        assert torch.equal(into, tensor)


def test_a_file_that_is_cut_anywhere_is_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "truncated" in problem_of(path)


def test_bytes_beyond_the_header_are_refused(tmp_path: Path) -> None:
    assert "1 bytes beyond" in problem_of(write_header(tmp_path, {"a": ENTRY}, bytes(25)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "C64"}, "dtype (one of F32, F16, BF16, F8_E4M3, I8, I32, I64)"),
        ({"dtype": ["F32"]}, "dtype (one of"),
        ({"shape": [2, 4]}, "24 bytes for shape [2, 4], must be 32"),
        ({"shape": [-2, -3]}, "integers from 0"),
        ({"shape": [True, 6]}, "integers from 0"),
        ({"shape": [2.0, 3]}, "integers from 0"),
        ({"shape": 6}, "needs dtype"),
        ({"shape": [1 << 62, 1 << 62]}, "must be"),
        ({"data_offsets": [24, 0]}, "must be 24"),
        ({"data_offsets": [-24, 0]}, "integers from 0"),
        ({"data_offsets": [8, 32]}, "overlap others or leave a gap"),
        ({"data_offsets": [0]}, "needs dtype"),
    ],
)
def test_an_entry_that_does_not_add_up_is_refused(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    assert words in problem_of(write_header(tmp_path, {"a": {**ENTRY, **change}}))


def test_tensors_may_not_share_bytes(tmp_path: Path) -> None:
    assert "overlap" in problem_of(write_header(tmp_path, {"a": ENTRY, "b": ENTRY}))


@pytest.mark.parametrize("header", [b"[]", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 10_000])
def test_a_header_that_is_no_object_is_refused(tmp_path: Path, header: bytes) -> None:
    path = write_raw(tmp_path / "model.safetensors", header, bytes(24))
    assert "no safetensors file" in problem_of(path)


def test_a_giant_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "model.safetensors", b"{}", b"", length=1 << 62)
    assert "header of 4611686018427387904 bytes" in problem_of(path)


@given(data=st.binary(max_size=64), header=st.binary(max_size=64))
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, header: bytes
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    with suppress(ConfigurationError):
        read_header(write_raw(path, header, data))


def index_problems(directory: Path, weight_map: Any) -> tuple[str, ...]:
    index = {"weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigurationError) as caught:
        Checkpoint.open(directory)
    return caught.value.problems


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\outside.safetensors",
        ".hidden.safetensors",
        "model.bin",
        "a\x00.safetensors",
        "",
        7,
        None,
    ],
)
def test_a_shard_is_a_plain_name_in_the_directory(tmp_path: Path, name: Any) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path.parent / "outside.safetensors")
    (problem,) = index_problems(tmp_path, {"a": name})
    assert "is no shard's file name" in problem


@pytest.mark.parametrize("weight_map", [None, [], {}, "a"])
def test_an_index_needs_its_map(tmp_path: Path, weight_map: Any) -> None:
    (problem,) = index_problems(tmp_path, weight_map)
    assert "weight_map is missing" in problem


def test_every_missing_shard_is_named(tmp_path: Path) -> None:
    found = index_problems(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    assert len(found) == 2
    assert all("No such file" in problem for problem in found)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, tmp_path / "one.safetensors")
    found = index_problems(tmp_path, {"a": "one.safetensors", "c": "one.safetensors"})
    assert any("b: the index does not put it here" in problem for problem in found)
    assert any("c: the index puts it here" in problem for problem in found)


def test_a_directory_without_weights_says_what_is_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"no model\.safetensors and no model"):
        Checkpoint.open(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="only safetensors are read"):
        Checkpoint.open(tmp_path)
