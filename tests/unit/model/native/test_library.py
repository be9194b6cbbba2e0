"""How the kernels come to be compiled, and when they are not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.model.native.kernels import CPU, compiled, needs_native
from understudy.runtime.cache import cache_directory
from understudy.runtime.model.native import library
from understudy.runtime.model.native.library import native_library


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    library._library.cache_clear()
    yield
    library._library.cache_clear()
    compiled()


@pytest.fixture
def compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling is copying what the machine has compiled already."""
    found = sorted(cache_directory().glob("kernels-*.so"), key=lambda path: path.stat().st_mtime)
    code = found[-1].read_bytes()
    monkeypatch.setattr(library, "_compile", lambda _, path: path.write_bytes(code))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("CACHE_DIRECTORY", str(tmp_path))
    return tmp_path


def test_kernels_are_for_float32_on_the_cpu() -> None:
    assert native_library(CPU, torch.bfloat16) is None
    assert native_library(torch.device("cuda"), torch.float32) is None


@needs_native
def test_kernels_are_compiled_once_and_kept(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native_library(CPU, torch.float32) is not None
    (made,) = cache.glob("*.so")
    assert made.stat().st_mode & 0o777 == 0o500
    library._library.cache_clear()
    monkeypatch.setattr(library, "_compile", None)
    assert native_library(CPU, torch.float32) is not None
    assert [path.stat().st_mtime_ns for path in cache.glob("*.so")] == [made.stat().st_mtime_ns]


@needs_native
@pytest.mark.usefixtures("compiled_before")
def test_a_file_that_others_may_write_is_compiled_anew(cache: Path) -> None:
    native_library(CPU, torch.float32)
    (made,) = cache.glob("*.so")
    made.unlink()
    made.write_bytes(b"not a library")
    made.chmod(0o666)
    library._library.cache_clear()
    assert native_library(CPU, torch.float32) is not None


@needs_native
@pytest.mark.usefixtures("compiled_before")
def test_a_link_in_the_cache_is_not_followed(
    cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    native_library(CPU, torch.float32)
    (made,) = cache.glob("*.so")
    made.rename(cache / "elsewhere")
    made.symlink_to(cache / "elsewhere")
    library._library.cache_clear()
    assert native_library(CPU, torch.float32) is None
    assert "remove it" in capsys.readouterr().out


@pytest.mark.usefixtures("cache")
def test_without_a_compiler_torch_computes_and_the_log_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_FEATURES", frozenset())
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert [native_library(CPU, torch.float32) for _ in range(2)] == [None, None]
    assert capsys.readouterr().out.count("install g++") == 1


@pytest.mark.usefixtures("cache")
def test_a_compiler_that_fails_is_quoted_and_torch_computes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(library, "_FEATURES", frozenset())
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\n[ $1 = --version ] || { echo cannot do that >&2; exit 1; }\n")
    broken.chmod(0o700)
    monkeypatch.setenv("CXX", str(broken))
    assert native_library(CPU, torch.float32) is None
    assert "cannot do that" in capsys.readouterr().out


@needs_native
def test_a_library_that_cannot_be_loaded_is_none(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "_compile", lambda _, path: path.write_bytes(b"no library"))
    assert native_library(CPU, torch.float32) is None
    assert str(cache) in capsys.readouterr().out


def test_an_older_processor_computes_with_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "processor_features", lambda: frozenset({"fma"}))
    assert native_library(CPU, torch.float32) is None
    assert "lacks avx512_vnni" in capsys.readouterr().out
