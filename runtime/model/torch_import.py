"""Importing torch without what only its compilers need.

``import torch`` brings decompositions and meta kernels for thousands of operators, a quarter of the
time that it takes. They serve tracing, which no engine does. Here they are postponed until
somebody asks for one of their names; until then tensors on ``meta`` lack some operators. The
standard library's ``LazyLoader`` does not do: torch itself looks at the file names of all modules
while it is imported, and that wakes what was put to sleep by it.

Two things need care. Generators of random numbers want their part of it: ``seeded`` makes them. And
on a machine with a GPU nothing is postponed, since CUDA begins by making such generators.

Imports no torch by itself. Once torch is imported, ``postponing`` changes nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from torch import Generator

POSTPONED: Final = frozenset({"torch._meta_registrations", "torch.export"})
_GPU_DRIVERS: Final = (Path("/proc/driver/nvidia"), Path("/dev/nvidiactl"), Path("/dev/dxg"))


class _Sleeping(ModuleType):
    """A module that has a name and a place, and is run when it is asked for anything else."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        loader = self.__loader__
        assert isinstance(loader, _LateLoader)
        self.__class__ = ModuleType  # type: ignore[assignment]
        loader.late.exec_module(self)
        return getattr(self, name)


class _LateLoader(Loader):
    """Makes a sleeping module for another loader to wake."""

    def __init__(self, late: Loader) -> None:
        self.late = late

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """See ``Loader``."""
        return _Sleeping(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Not now."""


class _LateFinder(MetaPathFinder):
    """Finds the postponed modules where others would."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``MetaPathFinder``."""
        if fullname not in POSTPONED:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)
        return spec


@contextmanager
def postponing() -> Iterator[None]:
    """While this lasts, importing torch leaves for later what is not needed yet."""
    if any(driver.exists() for driver in _GPU_DRIVERS):
        yield
        return
    finder = _LateFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


def seeded(seed: int) -> Generator:
    """A generator of torch's random numbers on the CPU, also where half of torch sleeps."""
    import torch
    import torch._prims.rng_prims

    return torch.Generator().manual_seed(seed)
