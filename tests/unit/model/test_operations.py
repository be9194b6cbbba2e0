"""Which way a device computes, and what it says about it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from tests.unit.model.test_attention import config_of
from understudy.runtime.model import operations
from understudy.runtime.model.attention import PagedAttention
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


def test_a_cpu_computes_in_plain_torch_and_does_not_ask_for_triton(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(operations, "_triton_version", None)
    parts = parts_for(config_of(4, 2, 16), numerics="fast", dtype=torch.float32, device=CPU)
    assert isinstance(parts.operations, PlainOperations)
    assert isinstance(parts.attention, PagedAttention)
    assert kernels_name(CPU) == "torch"


def test_a_gpu_computes_by_kernels_and_names_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9"))
    assert has_kernels(CUDA)
    assert kernels_name(CUDA) == "triton-9.9"


def test_a_gpu_without_triton_says_so_once_and_computes_in_plain_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert [has_kernels(CUDA) for _ in range(3)] == [False] * 3
    assert kernels_name(CUDA) == "torch"
    said = capsys.readouterr()
    assert (said.out + said.err).count("triton is missing") == 1
