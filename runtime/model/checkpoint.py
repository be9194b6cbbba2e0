"""Safetensors files, checked before a byte of them is used.

Reads the headers of one file or of the shards of an index, and answers what tensors there are and
where. Trusts neither names, nor sizes, nor offsets: a header that does not describe exactly the
bytes of its file is refused with one line. Nothing but safetensors is ever read: the other formats
run code.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Final, NamedTuple

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.mapped_file import MappedFile

_HEADER_BYTES_MAX: Final = 100_000_000
_INDEX_BYTES_MAX: Final = 64 << 20
_SINGLE_FILE: Final = "model.safetensors"
_INDEX_FILE: Final = "model.safetensors.index.json"
_DTYPES: Final[Mapping[str, torch.dtype]] = MappingProxyType(
    {
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F8_E4M3": torch.float8_e4m3fn,
        "I8": torch.int8,
        "I32": torch.int32,
        "I64": torch.int64,
    }
)


class StoredTensor(NamedTuple):
    """Where a tensor lies."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Offset of its first byte in the file."""
    num_bytes: int


class Checkpoint:
    """The tensors of a model directory, by name."""

    def __init__(self, tensors: Mapping[str, StoredTensor]) -> None:
        self.tensors = tensors
        self._maps: dict[Path, MappedFile] = {}

    @classmethod
    def open(cls, directory: Path) -> Checkpoint:
        """Read all headers of a model directory; raise ConfigurationError with all problems."""
        if (directory / _INDEX_FILE).is_file():
            return cls(_sharded_tensors(directory))
        path = directory / _SINGLE_FILE
        if path.is_file():
            return cls(read_header(path))
        others = any(directory.glob("*.bin")) or any(directory.glob("*.pt*"))
        hint = " (only safetensors are read; convert the checkpoint)" if others else ""
        raise ConfigurationError(f"{directory}: no {_SINGLE_FILE} and no {_INDEX_FILE}{hint}")

    def read(self, name: str, into: Tensor) -> None:
        """Copy a tensor's values, converted to the dtype of ``into``; the shapes are equal."""
        assert tuple(into.shape) == self.tensors[name].shape, name
        into.copy_(self.stored(name))

    def stored(self, name: str) -> Tensor:
        """A tensor as the file has it: mapped, so that engines of one machine share the memory.

        Writing to it changes neither the file nor what others see.
        """
        stored = self.tensors[name]
        count = math.prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        return (
            self._mapped(stored.path).tensor(stored.dtype, count, stored.start).view(stored.shape)
        )

    def _mapped(self, path: Path) -> MappedFile:
        if path not in self._maps:
            self._maps[path] = MappedFile(path)
        return self._maps[path]


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Read and check one file's header; raise ConfigurationError if anything is off."""
    try:
        with path.open("rb") as file:
            return _read_header(path, file, path.stat().st_size)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error


def _read_header(path: Path, file: BinaryIO, file_bytes: int) -> dict[str, StoredTensor]:
    header_bytes = int.from_bytes(file.read(8), "little")
    data_start = 8 + header_bytes
    if header_bytes > _HEADER_BYTES_MAX:
        raise ConfigurationError(f"{path}: no safetensors file: header of {header_bytes} bytes")
    if file_bytes < max(data_start, 10):
        raise ConfigurationError(f"{path}: truncated: {file_bytes} bytes, the header ends later")
    try:
        header = json.loads(file.read(header_bytes), object_pairs_hook=_object_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: no safetensors file: header: {error}") from error
    if not isinstance(header, dict):
        raise ConfigurationError(f"{path}: no safetensors file: header is no object")
    header.pop("__metadata__", None)
    tensors = {
        name: _stored_tensor(path, name, entry, data_start) for name, entry in header.items()
    }
    end = data_start
    for name, stored in sorted(tensors.items(), key=lambda item: item[1].start):
        if stored.start != end:
            raise ConfigurationError(f"{path}: {name}: its bytes overlap others or leave a gap")
        end = stored.start + stored.num_bytes
    if end > file_bytes:
        raise ConfigurationError(f"{path}: truncated: {file_bytes} bytes, the header says {end}")
    if end < file_bytes:
        raise ConfigurationError(f"{path}: {file_bytes - end} bytes beyond what the header says")
    return tensors


def _stored_tensor(path: Path, name: str, entry: Any, data_start: int) -> StoredTensor:
    try:
        dtype = _DTYPES[entry["dtype"]]
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
    except (KeyError, TypeError, ValueError) as error:
        kinds = ", ".join(_DTYPES)
        raise ConfigurationError(
            f"{path}: {name}: needs dtype (one of {kinds}), shape and data_offsets"
        ) from error
    # bool is an int to isinstance, hence type().
    if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
        raise ConfigurationError(f"{path}: {name}: shape and offsets must be integers from 0")
    num_bytes = math.prod(shape) * dtype.itemsize
    if stop - start != num_bytes:
        raise ConfigurationError(
            f"{path}: {name}: {stop - start} bytes for shape {list(shape)}, must be {num_bytes}"
        )
    return StoredTensor(path, dtype, shape, data_start + start, num_bytes)


def _object_without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice")
    return value


def _sharded_tensors(directory: Path) -> dict[str, StoredTensor]:
    path = directory / _INDEX_FILE
    weight_map = _weight_map(path)
    problems: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for shard in sorted(set(weight_map.values())):
        try:
            stored = read_header(directory / shard)
        except ConfigurationError as error:
            problems += error.problems
            continue
        for name, tensor in stored.items():
            if weight_map.get(name) != shard:
                problems.append(f"{directory / shard}: {name}: the index does not put it here")
            tensors[name] = tensor
        absent = [n for n, where in weight_map.items() if where == shard and n not in stored]
        problems += [f"{directory / shard}: {name}: the index puts it here" for name in absent]
    if problems:
        raise ConfigurationError(*problems)
    return tensors


def _weight_map(path: Path) -> dict[str, str]:
    try:
        if path.stat().st_size > _INDEX_BYTES_MAX:
            raise ConfigurationError(f"{path}: larger than {_INDEX_BYTES_MAX} bytes")
        index = json.loads(path.read_bytes(), object_pairs_hook=_object_without_duplicates)
    except OSError as error:
        raise ConfigurationError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{path}: no valid JSON: {error}") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigurationError(f"{path}: weight_map is missing")
    for shard in weight_map.values():
        # A plain name only. Where a link in the directory leads is the operator's business:
        # the Hugging Face cache is made of links.
        if (
            not isinstance(shard, str)
            or not shard.endswith(".safetensors")
            or any(character in shard for character in "/\\\0")
            or shard.startswith(".")
        ):
            raise ConfigurationError(f"{path}: weight_map: {shard!r:.60} is no shard's file name")
    return weight_map
