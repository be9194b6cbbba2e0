"""The compiled kernels, and a mark for tests that need them."""

from __future__ import annotations

import pytest
import torch

from understudy.runtime.model.native.library import Library, native_library

CPU = torch.device("cpu")


def compiled() -> Library | None:
    """The kernels of this machine, on as many threads as torch uses now."""
    return native_library(CPU, torch.float32)


needs_native = pytest.mark.skipif(
    compiled() is None, reason="needs a C++ compiler and a processor with AVX512-VNNI"
)
