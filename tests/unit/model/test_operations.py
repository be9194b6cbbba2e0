"""Which way a device computes, and what it says about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.unit.model.native.kernels import needs_native
from tests.unit.model.test_attention import config_of
from understudy.runtime.model import operations
from understudy.runtime.model.attention import PagedAttention
from understudy.runtime.model.native import library
from understudy.runtime.model.native.attention import NativeAttention
from understudy.runtime.model.native.layer import NativeOperations
from understudy.runtime.model.operations import (
    PlainOperations,
    has_kernels,
    kernels_name,
    parts_for,
)

CPU = torch.device("cpu")
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def nothing_remembered() -> Iterator[None]:
    remembered = operations._triton_version
    remembered.cache_clear()
    yield
    remembered.cache_clear()


@pytest.fixture
def no_native(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_library", lambda: None)


@pytest.mark.usefixtures("no_native")
def test_a_cpu_without_a_compiler_computes_in_plain_torch_and_does_not_ask_for_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations, "_triton_version", None)
    parts = parts_for(config_of(4, 2, 16), numerics="fast", dtype=torch.float32, device=CPU)
    assert isinstance(parts.operations, PlainOperations)
    assert isinstance(parts.attention, PagedAttention)
    assert kernels_name(CPU, torch.float32) == "torch"


@needs_native
@pytest.mark.parametrize(
    ("head_dim", "dtype", "is_native"),
    [(16, torch.float32, True), (24, torch.float32, False), (16, torch.bfloat16, False)],
)
def test_a_cpu_computes_in_float32_by_its_own_kernels_where_they_fit(
    head_dim: int, dtype: torch.dtype, is_native: bool
) -> None:
    parts = parts_for(config_of(4, 2, head_dim), numerics="exact", dtype=dtype, device=CPU)
    assert isinstance(parts.operations, NativeOperations) == is_native
    assert isinstance(parts.attention, NativeAttention) == is_native
    assert kernels_name(CPU, torch.float32).startswith("native-")
    assert kernels_name(CPU, torch.bfloat16) == "torch"


def test_a_gpu_computes_by_kernels_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9"))
    assert has_kernels(CUDA)
    assert kernels_name(CUDA, torch.bfloat16) == "triton-9.9"


def test_a_gpu_without_triton_says_so_once_and_computes_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert [has_kernels(CUDA) for _ in range(3)] == [False] * 3
    assert kernels_name(CUDA, torch.bfloat16) == "torch"
    said = capsys.readouterr()
    assert (said.out + said.err).count("triton is missing") == 1
