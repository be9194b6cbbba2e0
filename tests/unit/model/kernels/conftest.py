"""Kernels run in Triton's interpreter, on the CPU: see ``tests/conftest.py``."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is not None:
    import triton.experimental.gluon  # noqa: F401 - the interpreter would load it too late


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter reads numbers out of arrays in a way that NumPy has grown tired of."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
            )
            if "TRITON_INTERPRET" not in os.environ and item.path.name != "test_compiled.py":
                item.add_marker(pytest.mark.skip(reason="a GPU's kernels: tools/gpu_check"))
