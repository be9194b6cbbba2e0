"""Compiles the kernels, once for a machine, and makes their functions callable.

The sources lie beside this module. They are compiled by the system's compiler the first time that
a model is loaded, which takes some seconds, and kept in a cache directory under a name that
contains a digest of the sources, flags and compiler. No headers but the compiler's own are needed.
Where there is no compiler, or the processor lacks the instructions, there is no library, and plain
torch computes.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

import torch

from understudy.runtime.cache import cache_directory, is_ours, note_use
from understudy.runtime.log import get_logger
from understudy.runtime.model.native.sources import (
    KERNEL_FLAGS,
    KERNEL_SOURCES,
    kernels_digest,
    kernels_version,
)
from understudy.runtime.model.native.structures import FLOAT, LONG, POINTER
from understudy.runtime.processor import processor_features

_FEATURES: Final = frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "fma"})
"""As ``/proc/cpuinfo`` names them; processors since 2019 have them."""
_COMPILERS: Final = ("c++", "g++", "clang++")
_COMPILE_S_MAX: Final = 120.0

_INT: Final = ctypes.c_int
_SIGNATURES: Final = {
    "use_threads": (_INT,),
    "product": (POINTER, LONG, POINTER, POINTER, LONG),
    "pack_float": (POINTER, POINTER, LONG, LONG),
    "pack_brain": (POINTER, POINTER, LONG, LONG),
    "pack_int8": (POINTER, POINTER, POINTER, LONG, LONG),
    "quantize_int8": (POINTER, _INT, POINTER, POINTER, LONG, LONG),
    "keep_memory": (),
    "use_large_pages": (POINTER, LONG),
    "add_and_normalise": (POINTER, POINTER, POINTER, POINTER, LONG, LONG, FLOAT),
    "silu_and_multiply": (POINTER, POINTER, LONG, LONG),
    "rotate_and_store": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "attend": (POINTER, POINTER, POINTER, POINTER, POINTER),
    "run_layers": (POINTER, POINTER, LONG, POINTER, POINTER, POINTER, POINTER),
    "guess": (POINTER, POINTER, LONG, *(POINTER,) * 7),
    "likeliest": (POINTER, POINTER, POINTER, LONG, LONG),
    "may_win": (POINTER, LONG, POINTER, POINTER, POINTER, POINTER, LONG, LONG),
}


class Library(NamedTuple):
    """The compiled kernels."""

    functions: ctypes.CDLL
    version: str
    """A digest of what decides about bits: the sources and the flags."""


def native_library(device: torch.device, dtype: torch.dtype) -> Library | None:
    """The kernels, if they compute on a device and in a dtype: on the CPU, in float32.

    They share their work among as many threads as torch does now.
    """
    if device.type != "cpu" or dtype != torch.float32:
        return None
    library = _library()
    if library is not None:
        library.functions.use_threads(torch.get_num_threads())
    return library


@cache
def _library() -> Library | None:
    """The kernels, compiled if they were not; None where they cannot be had, and why is logged."""
    missing = _FEATURES - processor_features()
    if missing:
        get_logger().info("native kernels: this processor lacks " + ", ".join(sorted(missing)))
        return None
    compiler = _compiler()
    if compiler is None:
        get_logger().warning(
            "native kernels: there is no C++ compiler, the CPU computes with plain torch, slower;"
            " install g++ or clang++"
        )
        return None
    try:
        functions = ctypes.CDLL(str(_compiled(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", None) or error
        get_logger().warning(f"native kernels: cannot be compiled, torch computes: {reason}")
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(functions, name)
        function.argtypes = arguments
        function.restype = None
    functions.keep_memory()
    return Library(functions, kernels_version())


def _compiler() -> str | None:
    named = os.environ.get("CXX")
    found = (shutil.which(name) for name in ((named,) if named else _COMPILERS))
    return next((path for path in found if path is not None), None)


def _compiled(compiler: str) -> Path:
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=_COMPILE_S_MAX
    ).stdout
    # The library is linked against torch's threads, so it belongs to a release of torch, too.
    name = kernels_digest(version, torch.__version__)[:32]
    folder = cache_directory()
    path = folder / f"kernels-{name}.so"
    with (folder / "lock").open("w") as lock:
        # Engines that start together wait for the one that compiles.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_ours(path):
            get_logger().info("native kernels: compiling, once for this machine", compiler=compiler)
            _compile(compiler, path)
    note_use(path)
    return path


def _compile(compiler: str, path: Path) -> None:
    """Compile all sources at once; the library appears whole or not at all."""
    folder = Path(__file__).parent
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        objects = [str(Path(scratch, name).with_suffix(".o")) for name in KERNEL_SOURCES]

        def run(*arguments: str) -> None:
            subprocess.run(
                [compiler, *arguments],
                check=True,
                capture_output=True,
                text=True,
                timeout=_COMPILE_S_MAX,
            )

        with ThreadPoolExecutor() as pool:
            pairs = zip(KERNEL_SOURCES, objects, strict=True)
            jobs = [
                pool.submit(run, *KERNEL_FLAGS, "-c", str(folder / source), "-o", made)
                for source, made in pairs
            ]
            for job in jobs:
                job.result()
        linked = Path(scratch, path.name)
        run("-shared", "-fopenmp", *objects, "-o", str(linked))
        linked.chmod(0o500)
        linked.replace(path)
