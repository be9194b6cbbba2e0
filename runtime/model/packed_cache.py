"""Keeps weights between starts as the CPU's kernels read them: packed, quantised and joined.

Laying a checkpoint out for the kernels takes longer than reading the result. The file is in the
safetensors form, beside the other things that make a start faster, and is written behind the
engine's back once it serves. Its name says what it was made of, so nothing in it is ever out of
date; what nobody has used for a month is removed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.cache import cache_directory, is_ours, note_use
from understudy.runtime.log import get_logger
from understudy.runtime.model.checkpoint import StoredTensor, read_header
from understudy.runtime.model.model_digest import model_digest
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.linear import NativeLinear, Packed, on_large_pages

_BYTES_MIN: Final = 64 << 20
"""Less is laid out again in no time."""
_DISK_SHARE: Final = 0.25
"""Of what is free on the disk, the most that a file takes."""
_READ_BYTES: Final = 4 << 20
"""Read by one thread at a time."""
_WRITING_S_MAX: Final = 600.0
"""A file that has not grown for so long was left by a process that is no more."""
_DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}
)
_PARTS: Final = ("panels", "start", "scales")


class PackedCache:
    """The packed weights of one model in one form, those of an earlier start or new ones."""

    def __init__(self, library: Library, path: Path | None) -> None:
        """Read the header of ``path`` if it is there; with ``None``, nothing is kept."""
        self._library = library
        self._path = path
        self._stored: Mapping[str, StoredTensor] = _stored(path)
        self._new: dict[str, Packed] = {}
        self._readers = ThreadPoolExecutor(torch.get_num_threads(), "packed-weights")

    @classmethod
    def of(cls, directory: Path, form: str, library: Library) -> PackedCache:
        """What is kept of a model directory; ``form`` names what its weights become."""
        try:
            folder = cache_directory()
        except OSError as error:
            get_logger().warning(f"packed weights cannot be kept: {error}")
            return cls(library, None)
        name = "\0".join((*_fingerprints(directory), form, library.version))
        digest = hashlib.sha256(name.encode()).hexdigest()[:32]
        return cls(library, folder / f"weights-{digest}.safetensors")

    def get(self, name: str, outputs: int, inputs: int) -> Packed | None:
        """A weight that an earlier start kept; None if it did not.

        Raises:
            ConfigurationError: the file was cut off while it was read.
        """
        if f"{name}.panels" not in self._stored:
            return None
        panels, start, scales = (self._read(f"{name}.{part}") for part in _PARTS)
        assert panels is not None
        packed = Packed(outputs, inputs, panels, start, scales)
        return packed if packed.is_sound else None

    def linear(self, packed: Packed, bias: Tensor | None) -> NativeLinear:
        """What multiplies with a kept weight."""
        return NativeLinear(self._library, packed, bias)

    def add(self, name: str, packed: Packed) -> None:
        """Remember a weight that was just packed, for the next start."""
        self._new[name] = packed

    def keep(self) -> threading.Thread | None:
        """All is read: write what is new, in a thread; None if that is nothing, or not enough."""
        self._readers.shutdown()
        path, new = self._path, self._new
        self._new = {}
        num_bytes = sum(tensor.nbytes for _, tensor in _named(new))
        if path is None or num_bytes < _BYTES_MIN:
            return None
        if self._stored:
            # It lacks something, or held what cannot be: the next start makes it anew.
            path.unlink(missing_ok=True)
            return None
        # A process that ends in the middle of it leaves a piece, which a later one removes.
        writer = threading.Thread(
            target=_write, args=(path, new, num_bytes), name="packed-weights", daemon=True
        )
        writer.start()
        return writer

    def _read(self, name: str) -> Tensor | None:
        stored = self._stored.get(name)
        if stored is None:
            return None
        tensor = on_large_pages(self._library, stored.shape, stored.dtype)
        into = _bytes_of(tensor)
        with stored.path.open("rb", buffering=0) as file:
            starts = range(0, len(into), _READ_BYTES)
            if len(starts) > 1:
                # Reading is copying, and getting memory from the system: a core each is not idle.
                list(self._readers.map(partial(_read_piece, file, stored.start, into), starts))
            elif starts:
                _read_piece(file, stored.start, into, 0)
        return tensor


def _read_piece(file: FileIO, offset: int, into: memoryview, start: int) -> None:
    """Read one piece of a tensor that begins at ``offset``."""
    end = min(start + _READ_BYTES, len(into))
    while start < end:
        count = os.preadv(file.fileno(), [into[start:end]], offset + start)
        if not count:
            raise ConfigurationError(f"{file.name}: truncated while it was read")
        start += count


def _stored(path: Path | None) -> Mapping[str, StoredTensor]:
    """What a file holds; nothing if it is not there, or not to be trusted."""
    try:
        if path is None or not is_ours(path):
            return {}
        note_use(path)
        return read_header(path)
    except (OSError, ConfigurationError) as error:
        get_logger().warning(f"packed weights are made again: {error}")
        return {}


def _fingerprints(directory: Path) -> Iterator[str]:
    """What tells one checkpoint from another, and from itself after an edit in place."""
    yield model_digest(directory)
    for path in sorted(directory.glob("*.safetensors")):
        status = path.stat()
        yield f"{path.name} {status.st_size} {status.st_mtime_ns}"


def _named(weights: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
    for name, packed in weights.items():
        for part, tensor in zip(_PARTS, (packed.panels, packed.start, packed.scales), strict=True):
            if tensor is not None:
                yield f"{name}.{part}", tensor


def _write(path: Path, weights: Mapping[str, Packed], num_bytes: int) -> None:
    """Write a file that appears whole or not at all."""
    made = path.with_suffix(f".{os.getpid()}.new")
    try:
        _remove_pieces(path.parent)
        if num_bytes > _DISK_SHARE * shutil.disk_usage(path.parent).free:
            get_logger().info("packed weights are not kept: the disk is nearly full")
            return
        made.touch(mode=0o600)
        with made.open("wb") as file:
            file.write(_header(weights))
            for _, tensor in _named(weights):
                file.write(_bytes_of(tensor.contiguous()))
            file.flush()
            os.fsync(file.fileno())
        made.replace(path)
    except OSError as error:
        get_logger().warning(f"packed weights cannot be kept: {error}")
        made.unlink(missing_ok=True)


def _remove_pieces(folder: Path) -> None:
    """Remove what was never finished, but for what somebody is still writing."""
    for piece in folder.glob("weights-*.new"):
        with suppress(FileNotFoundError):
            if piece.stat().st_mtime < time.time() - _WRITING_S_MAX:
                piece.unlink()


def _bytes_of(tensor: Tensor) -> memoryview:
    return tensor.view(-1).view(torch.uint8).numpy().data


def _header(weights: Mapping[str, Packed]) -> bytes:
    entries = {}
    end = 0
    for name, tensor in _named(weights):
        start, end = end, end + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text
