"""Loads the kernels for Triton's interpreter, which runs them on the CPU."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is not None:
    # What a kernel becomes is decided when its module is loaded. The variable is gone afterwards,
    # so that nothing that another test starts on a GPU is interpreted.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        import triton.experimental.gluon  # noqa: F401 - the interpreter would load it too late

        from understudy.runtime.model.kernels import (  # noqa: F401 - loaded, not used
            activation,
            int8_product,
            normalisation,
            paged_attention,
            rotation,
            sampling,
        )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The interpreter reads numbers out of arrays in a way that NumPy has grown tired of."""
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(
                pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")
            )
