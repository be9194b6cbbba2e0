"""Weights that are kept between starts: what comes back, and what is not believed."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.serving import request_of, serve
from tests.unit.model.native.kernels import needs_native
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import SamplingParams
from understudy.runtime.model import loader, packed_cache, packed_path
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.mapped_file import MappedFile
from understudy.runtime.model.native.linear import NativeLinear, Packed
from understudy.runtime.model.packed_cache import PackedCache
from understudy.runtime.model.packed_path import fetch_early
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.transformer import Transformer

pytestmark = needs_native


class Shelf(NamedTuple):
    """A model directory, and the folder in which its packed weights are kept."""

    model: Path
    folder: Path

    def load(self, quantization: Quantization = "none") -> Transformer:
        """Load the model, and wait until its weights are kept."""
        return load_model(
            self.model,
            dtype=torch.float32,
            device=torch.device("cpu"),
            quantization=quantization,
        )

    @property
    def files(self) -> list[Path]:
        return sorted(self.folder.glob("weights-*"))


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shelf:
    """A shelf for the smallest of models, written before ``load`` returns."""
    real = PackedCache.keep

    def keep_at_once(self: PackedCache) -> None:
        writer = real(self)
        if writer is not None:
            writer.join()

    monkeypatch.setattr(packed_cache, "_BYTES_MIN", 1)
    monkeypatch.setattr(packed_path, "cache_directory", lambda: tmp_path)
    monkeypatch.setattr(PackedCache, "keep", keep_at_once)
    return Shelf(write_checkpoint(tmp_path / "model", FAMILIES["llama"]), tmp_path)


def texts(model: Transformer) -> object:
    params = [SamplingParams(seed=seed, max_tokens=12) for seed in range(4)]
    return serve(model, [request_of(i, range(3 + i), each) for i, each in enumerate(params)]).served


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_the_second_start_reads_what_the_first_packed(
    shelf: Shelf, quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = texts(shelf.load(quantization))
    assert len(shelf.files) == 1
    assert shelf.files[0].stat().st_mode & 0o777 == 0o600
    if quantization != "int4":  # whose layers are torch's, and only the output embedding is packed
        monkeypatch.setattr(loader, "make_linear", None)
    assert texts(shelf.load(quantization)) == first
    assert len(shelf.files) == 1


@pytest.mark.parametrize(
    ("quantization", "is_large", "is_mapped"),
    [("int8", True, True), ("int8", False, False), ("none", True, True), ("none", False, True)],
)
def test_what_is_kept_is_mapped_where_that_is_as_fast(
    shelf: Shelf,
    monkeypatch: pytest.MonkeyPatch,
    quantization: Quantization,
    *,
    is_large: bool,
    is_mapped: bool,
) -> None:
    monkeypatch.setattr(MappedFile, "large_page_bytes", (1 << 60) * is_large)
    first = texts(shelf.load(quantization))
    (path,) = shelf.files
    found: list[Packed] = []
    real = PackedCache.linear

    def linear(self: PackedCache, packed: Packed, bias: Tensor | None) -> NativeLinear:
        found.append(packed)
        return real(self, packed, bias)

    monkeypatch.setattr(PackedCache, "linear", linear)
    model = shelf.load(quantization)
    entries = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    areas = [entry[0].split("-") for entry in entries if entry[-1] == str(path)]
    mapped = [range(int(start, 16), int(end, 16)) for start, end in areas]
    assert len(found) == 4 * model.config.num_layers + 1
    for packed in found:
        assert packed.panels.data_ptr() % 64 == 0
        assert any(packed.panels.data_ptr() in area for area in mapped) == is_mapped
    assert texts(model) == first


def test_what_is_kept_is_read_before_anybody_asks(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched: list[tuple[Path, int]] = []
    fetch = MappedFile.fetch

    def noting(file: MappedFile, start: int, num_bytes: int) -> None:
        fetched.append((file.path, num_bytes))
        fetch(file, start, num_bytes)

    monkeypatch.setattr(MappedFile, "fetch", noting)
    fetch_early(shelf.model, "int8").join()
    assert not fetched
    shelf.load("int8")
    (path,) = shelf.files
    fetched.clear()
    fetch_early(shelf.model, "none").join()
    assert not fetched
    fetch_early(shelf.model, "int8").join()
    assert fetched == [(path, path.stat().st_size)]


@pytest.mark.parametrize("trouble", ["writable", "unreadable", "empty", "no model"])
def test_reading_early_leaves_trouble_to_the_start(
    shelf: Shelf, capfd: pytest.CaptureFixture[str], trouble: str
) -> None:
    first = texts(shelf.load())
    (path,) = shelf.files
    model = shelf.model
    if trouble == "writable":
        path.chmod(0o666)
    elif trouble == "unreadable":
        path.unlink()
        path.mkdir()
    elif trouble == "empty":
        path.write_bytes(b"")
    else:
        model = shelf.folder / "nowhere"
    fetch_early(model, "none").join()
    assert "Traceback" not in capfd.readouterr().err
    if trouble == "unreadable":
        path.rmdir()
    assert texts(shelf.load()) == first


def test_panels_that_begin_anywhere_are_made_again(shelf: Shelf) -> None:
    first = texts(shelf.load())
    (path,) = shelf.files
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes(
        (length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :]
    )
    assert texts(shelf.load()) == first
    assert path.read_bytes() == data


def test_progress_is_told_of_kept_weights_too(shelf: Shelf) -> None:
    told: list[list[int]] = []
    for _ in range(2):
        done: list[int] = []
        told.append(done)

        def report(bytes_done: int, bytes_total: int, done: list[int] = done) -> None:
            assert bytes_done <= bytes_total
            done.append(bytes_done)

        load_model(shelf.model, dtype=torch.float32, device=torch.device("cpu"), progress=report)
    assert told[0][-1] == told[1][-1]


def test_each_form_of_each_checkpoint_is_kept_apart(shelf: Shelf) -> None:
    shelf.load()
    shelf.load("int8")
    assert len(shelf.files) == 2
    weights = shelf.model / "model.safetensors"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    shelf.load()
    assert len(shelf.files) == 3


@pytest.mark.parametrize("damage", ["cut off", "header", "shape", "writable"])
def test_what_cannot_be_believed_is_made_again(shelf: Shelf, damage: str) -> None:
    first = texts(shelf.load())
    path = shelf.files[0]
    data = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(data[:-1])
    elif damage == "header":
        path.write_bytes(b"\xff" * 8 + data[8:])
    elif damage == "shape":
        # Panels claim to be another shape of as many bytes.
        path.write_bytes(re.sub(rb"\[(\d+), (\d+), 32\]", rb"[\2, \1, 32]", data))
        assert path.read_bytes() != data
        assert texts(shelf.load()) == first
    else:
        path.chmod(0o666)
    assert texts(shelf.load()) == first
    if damage != "writable":
        assert path.read_bytes() == data


def test_a_process_that_ends_at_once_has_kept_its_weights(shelf: Shelf) -> None:
    program = f"""
import torch
from pathlib import Path
from understudy.runtime.model import loader, packed_cache, packed_path
packed_cache._BYTES_MIN = 1
packed_path.cache_directory = lambda: Path({str(shelf.folder)!r})
write = packed_cache._write
def write_late(*arguments):
    import time
    time.sleep(0.3)
    write(*arguments)
packed_cache._write = write_late
loader.load_model(Path({str(shelf.model)!r}), dtype=torch.float32, device=torch.device("cpu"))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
    assert [path.suffix for path in shelf.files] == [".safetensors"]


def test_a_start_that_was_killed_leaves_nothing_to_the_next(shelf: Shelf) -> None:
    left, held = shelf.folder / "weights-0.new", shelf.folder / "weights-1.new"
    left.write_bytes(b"half")
    with held.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shelf.load()
        assert not left.exists()
        assert held.exists()


def test_what_another_engine_is_writing_is_left_to_it(shelf: Shelf) -> None:
    shelf.load()
    (path,) = shelf.files
    data = path.read_bytes()
    made = path.rename(path.with_suffix(".new"))
    with made.open("rb+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        shelf.load()
        assert shelf.files == [made]
        made.rename(path)
    assert path.read_bytes() == data


def test_a_file_system_without_locks_costs_the_keeping_and_no_start(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert texts(shelf.load()) == texts(shelf.load())


def test_pieces_that_cannot_be_opened_stop_nobody(shelf: Shelf) -> None:
    (shelf.folder / "weights-0.new").symlink_to(shelf.folder / "elsewhere")
    shelf.load()
    assert (shelf.folder / "weights-0.new").is_symlink()


@pytest.mark.parametrize("first_bad_byte", [0, 1])
def test_a_file_that_cannot_be_read_is_made_again(
    shelf: Shelf, monkeypatch: pytest.MonkeyPatch, first_bad_byte: int
) -> None:
    first = texts(shelf.load())
    (path,) = shelf.files
    fetch = MappedFile.fetch

    def fail_late(file: MappedFile, start: int, num_bytes: int) -> None:
        if start >= first_bad_byte:
            raise ConfigurationError(f"{path}: Bad address")
        fetch(file, start, num_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(MappedFile, "fetch", fail_late)
        assert texts(shelf.load()) == first
    assert shelf.files == []
    assert texts(shelf.load()) == first
    assert shelf.files == [path]


def test_a_full_disk_is_left_alone(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(shelf.folder)._replace(free=4096)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    shelf.load()
    assert shelf.files == []


def test_small_models_are_not_kept(shelf: Shelf, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "_BYTES_MIN", 64 << 20)
    shelf.load()
    assert shelf.files == []
