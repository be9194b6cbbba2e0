"""The layers hold, and what must not know torch does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).parents[1]

TORCH_FREE: Final = (
    "understudy.actors.engine_process",
    "understudy.actors.gateway",
    "understudy.actors.gateway_process",
    "understudy.actors.grammar_checks",
    "understudy.actors.http_server",
    "understudy.actors.launcher",
    "understudy.actors.supervisor",
    "understudy.actors.supervisor_process",
    "understudy.runtime.config",
    "understudy.runtime.grammar_child",
    "understudy.runtime.grammar_masks",
    "understudy.runtime.kit.client",
    "understudy.runtime.model.config",
    "understudy.runtime.model.packed_path",
    "understudy.runtime.served_model",
    "understudy.tools.actor",
    "understudy.tools.cli",
    "understudy.tools.control",
    "understudy.tools.demonstration",
    "understudy.tools.start",
)
HEAVY: Final = ("aiohttp", "asyncio", "structlog", "tokenizers", "torch", "uvloop")
"""What ``understudy status`` must not wait for."""


def loaded_modules(code: str) -> set[str]:
    """The modules in a fresh interpreter after this code ran."""
    report = f"import sys\n{code}\nprint(*sys.modules, sep='\\n')"
    done = subprocess.run(
        [sys.executable, "-c", report], check=True, capture_output=True, text=True, cwd=ROOT
    )
    return set(done.stdout.splitlines())


def test_the_import_contracts_are_kept() -> None:
    script = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run(
        [script, "--no-cache"], check=False, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("module", TORCH_FREE)
def test_whoever_needs_no_torch_does_not_load_it(module: str) -> None:
    modules = loaded_modules(f"import {module}")
    assert module in modules
    assert "torch" not in modules


def test_status_loads_nothing_heavy() -> None:
    modules = loaded_modules(
        "from understudy.tools.cli import main\n"
        "assert main(['status', '--run-dir', '/nowhere/at/all']) == 3"
    )
    assert "understudy.runtime.kit.client" in modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize(
    "folder", ["runtime.control", "runtime.scheduling", "runtime.kvcache", "protocol"]
)
def test_pure_folders_load_neither_torch_nor_sockets(folder: str) -> None:
    path = ROOT.joinpath(*folder.split("."))
    names = [f"understudy.{folder}.{file.stem}" for file in sorted(path.glob("[a-z]*.py"))]
    assert names
    modules = loaded_modules("\n".join(f"import {name}" for name in names))
    assert not modules & {"aiohttp", "asyncio", "torch", "zmq"}
