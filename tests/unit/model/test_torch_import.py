"""Torch without its compilers' parts: quicker, and nothing is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from understudy.runtime.model import torch_import

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
from understudy.runtime.model.torch_import import seeded
assert torch.randint(9, (3,), generator=seeded(1)).shape == (3,)
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


def test_a_model_is_proven_exact_by_a_torch_that_is_half_asleep() -> None:
    run(
        """
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.tools.demo.paths import demo_model_directory
for dtype in (torch.float32, torch.bfloat16):
    model = load_model(
        demo_model_directory(), dtype=dtype, device=torch.device("cpu"), numerics="exact"
    )
    prove_exactness(model, block_size=16)
"""
    )


def test_nothing_is_postponed_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = list(sys.meta_path)
    monkeypatch.setattr(torch_import, "_GPU_DRIVERS", (tmp_path / "none", tmp_path))
    with torch_import.postponing():
        assert sys.meta_path == before
    monkeypatch.setattr(torch_import, "_GPU_DRIVERS", (tmp_path / "none",))
    with torch_import.postponing():
        assert len(sys.meta_path) == len(before) + 1
    assert sys.meta_path == before
