"""Keeps weights between starts as the CPU's kernels read them: packed, quantised and joined.

Laying a checkpoint out for the kernels takes longer than mapping the result, and what is mapped is
in memory once for all engines of a machine and for those that come after them. The file is in the
safetensors form, beside the other things that make a start faster, and is written behind the
engine's back once it serves. Its name says what it was made of, so nothing in it is ever out of
date; what nobody has used for a month is removed. A file is replaced and removed whole, never
changed: who has mapped it keeps it.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import math
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO, Final

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.cache import is_ours, note_use
from understudy.runtime.log import get_logger
from understudy.runtime.model.checkpoint import StoredTensor, read_header
from understudy.runtime.model.mapped_file import MappedFile
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.linear import NativeLinear, Packed, on_large_pages
from understudy.runtime.model.packed_path import packed_path
from understudy.runtime.model.quantization_config import Quantization

_BYTES_MIN: Final = 64 << 20
"""Less is laid out again in no time."""
_END_WAIT_S: Final = 2.0
"""Of each of two models at most; what has not ended 5 s after it was told to is killed."""
_DISK_SHARE: Final = 0.25
"""Of what is free on the disk, the most that a file takes."""
_DTYPE_NAMES: Final[Mapping[torch.dtype, str]] = MappingProxyType(
    {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int32: "I32"}
)
_PARTS: Final = ("panels", "start", "scales")
"""In this order, all weights' panels first: each is some cache lines long, and so begins one."""
_LINE_BYTES: Final = 64
_LARGE_PAGE_BYTES: Final = 2 << 20
_LOOKED_AT_BYTES: Final = 256 << 20
"""Of a file, to see whether it is mapped in large pages; a part of it may have been read again."""


class PackedCache:
    """The packed weights of one model in one form, those of an earlier start or new ones."""

    def __init__(self, library: Library, path: Path | None) -> None:
        """Read the header of ``path`` if it is there; with ``None``, nothing is kept."""
        self._library = library
        self._path = path
        self._stored: Mapping[str, StoredTensor] = _stored(path)
        self._file = MappedFile(path) if path is not None and self._stored else None
        self._new: dict[str, Packed] = {}

    @classmethod
    def of(cls, directory: Path, quantization: Quantization, library: Library) -> PackedCache:
        """What is kept of a model directory whose weights become so."""
        try:
            path = packed_path(directory, quantization)
        except OSError as error:
            get_logger().warning(f"packed weights cannot be kept: {error}")
            return cls(library, None)
        _remove_pieces(path.parent)
        return cls(library, path)

    def get(self, name: str, outputs: int, inputs: int) -> Packed | None:
        """A weight that an earlier start kept; None if it did not, or it cannot be read."""
        try:
            panels, start, scales = (self._tensor(f"{name}.{part}") for part in _PARTS)
        except ConfigurationError as error:
            get_logger().warning(f"packed weights are made again: {error}")
            if self._path is not None:
                _remove(self._path)
            return None
        if panels is None:
            return None
        if panels.dtype == torch.int8 and not self._is_on_large_pages:
            panels = on_large_pages(self._library, panels.shape, panels.dtype).copy_(panels)
            start, scales = (None if each is None else each.clone() for each in (start, scales))
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
        path, new = self._path, self._new
        self._new = {}
        num_bytes = sum(tensor.nbytes for _, tensor in _named(new))
        if path is None or num_bytes < _BYTES_MIN:
            return None
        if self._stored:
            # It lacks something, or held what cannot be: the next start makes it anew.
            _remove(path)
            return None
        # A process that ends in the middle of it leaves a piece, which a later one removes.
        # One that is told to end soon after its start waits, so that the next start is fast.
        writer = threading.Thread(
            target=_write, args=(path, new, num_bytes), name="packed-weights", daemon=True
        )
        writer.start()
        atexit.register(writer.join, _END_WAIT_S)
        return writer

    def _tensor(self, name: str) -> Tensor | None:
        stored = self._stored.get(name)
        if stored is None or self._file is None:
            return None
        self._file.fetch(stored.start, stored.num_bytes)
        count = math.prod(stored.shape)
        return self._file.tensor(stored.dtype, count, stored.start).view(stored.shape)

    @cached_property
    def _is_on_large_pages(self) -> bool:
        """Whether the system keeps the file so that integer products need no copy, else 7 % slower.

        Products in floating point are no slower either way.
        """
        assert self._file is not None
        num_bytes = min(self._file.num_bytes, _LOOKED_AT_BYTES)
        with suppress(ConfigurationError):  # whose weight it is that cannot be read hears of it
            self._file.fetch(0, num_bytes)
        return self._file.large_page_bytes > num_bytes // 2


def _stored(path: Path | None) -> Mapping[str, StoredTensor]:
    """What a file holds; nothing if it is not there, or not to be trusted, and then it goes."""
    if path is None:
        return {}
    try:
        if is_ours(path):
            note_use(path)
            stored = read_header(path)
            panels = (stored[name] for name in stored if name.endswith(f".{_PARTS[0]}"))
            # Earlier releases let panels begin anywhere, where the kernels would be slow.
            if not any(tensor.start % _LINE_BYTES for tensor in panels):
                return stored
    except (OSError, ConfigurationError) as error:
        get_logger().warning(f"packed weights are made again: {error}")
    _remove(path)
    return {}


def _remove(path: Path) -> None:
    """Have the next start make it anew, where that may be written."""
    with suppress(OSError):
        path.unlink(missing_ok=True)


def _named(weights: Mapping[str, Packed]) -> Iterator[tuple[str, Tensor]]:
    for part in _PARTS:
        for name, packed in weights.items():
            tensor: Tensor | None = getattr(packed, part)
            if tensor is not None:
                yield f"{name}.{part}", tensor


def _write(path: Path, weights: Mapping[str, Packed], num_bytes: int) -> None:
    """Write a file that appears whole or not at all, unless another engine is about it."""
    made = path.with_suffix(".new")
    try:
        if num_bytes > _DISK_SHARE * shutil.disk_usage(path.parent).free:
            get_logger().info("packed weights are not kept: the disk is nearly full")
            return
        with _held(made, os.O_RDWR | os.O_CREAT) as file:
            if file is None or path.exists():
                return
            try:
                file.truncate()
                for piece in _pieces(weights):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
                made.replace(path)
            except OSError:
                made.unlink()
                raise
    except OSError as error:
        get_logger().warning(f"packed weights cannot be kept: {error}")


def _remove_pieces(folder: Path) -> None:
    """Remove what was never finished, but for what somebody is still writing."""
    for piece in folder.glob("weights-*.new"):
        # A file system may have no locks, or nothing on it may be written.
        with suppress(OSError), _held(piece, os.O_RDWR) as file:
            if file is not None:
                piece.unlink()


@contextmanager
def _held(path: Path, flags: int) -> Iterator[BinaryIO | None]:
    """A file that nobody else has hold of meanwhile (flock(2)); None if somebody has.

    A lock belongs to the file and not to its name: who got it when the file had been renamed or
    removed has nothing.

    Raises:
        OSError: it cannot be opened.
    """
    with os.fdopen(os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600), "r+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = os.path.samestat(os.fstat(file.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            is_ours = False
        yield file if is_ours else None


def _pieces(weights: Mapping[str, Packed]) -> Iterator[memoryview]:
    """A file's bytes, a large page at a time, which is how the system then keeps and maps them.

    Each is valid until the next one is asked for.
    """
    parts = (_bytes_of(tensor.contiguous()) for _, tensor in _named(weights))
    piece, filled = memoryview(bytearray(_LARGE_PAGE_BYTES)), 0
    for part in chain((memoryview(_header(weights)),), parts):
        done = 0
        while done < len(part):
            count = min(len(part) - done, len(piece) - filled)
            piece[filled : filled + count] = part[done : done + count]
            done, filled = done + count, filled + count
            if filled == len(piece):
                yield piece
                filled = 0
    yield piece[:filled]


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
    text += b" " * (-(8 + len(text)) % _LINE_BYTES)
    return len(text).to_bytes(8, "little") + text
