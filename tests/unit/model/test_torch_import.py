"""Torch without its compilers' parts: quicker, and nothing is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

POSTPONED = """
import sys
from understudy.runtime.model.torch_import import POSTPONED, postponing
with postponing():
    import torch
assert {type(sys.modules[name]).__name__ for name in POSTPONED} == {"_Sleeping"}
assert type(sys.modules["torch"]).__name__ == "module"
"""


def run(program: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", POSTPONED + program], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "program",
    [
        # What an engine does.
        """
x = torch.randn(3, 4)
assert torch.nn.functional.rms_norm(x, (4,)).shape == (3, 4)
assert (x @ x.T).softmax(dim=1).argmax(dim=1).shape == (3,)
assert type(sys.modules["torch.export"]).__name__ == "_Sleeping"
""",
        # What was postponed is there as soon as somebody wants it.
        """
assert callable(torch.export.export)
assert type(sys.modules["torch.export"]).__name__ == "module"
from torch._meta_registrations import register_meta
assert callable(register_meta)
queries = torch.empty(1, 2, 3, 8, device="meta")
assert torch.nn.functional.scaled_dot_product_attention(*[queries] * 3).shape == queries.shape
""",
        """
try:
    torch.export.nothing_of_this_name
except AttributeError:
    pass
else:
    raise AssertionError
""",
        """
import inspect
inspect.getmodule(sys)
assert type(sys.modules["torch._meta_registrations"]).__name__ == "_Sleeping"
""",
    ],
)
def test_what_is_postponed_is_neither_loaded_nor_missing(program: str) -> None:
    run(program)
