"""What the kernels are compiled from, and how: whoever asks only that needs no torch."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

KERNEL_SOURCES: Final = (
    *("memory.cpp", "products.cpp", "packing.cpp", "layer.cpp"),
    *("attention.cpp", "layers.cpp", "sampling.cpp"),
)
KERNEL_FLAGS: Final = (
    *("-std=c++17", "-O3", "-fPIC", "-fopenmp", "-w"),
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni", "-mfma"),
    "-ffp-contract=off",  # what is fused is said in the sources: bits are not the compiler's choice
)
_HEADERS: Final = ("kernels.h", "simd.h")


def kernels_version() -> str:
    """A short digest of what decides about bits: the sources and the flags."""
    return kernels_digest()[:8]


def kernels_digest(*more: str) -> str:
    """A digest of the sources, the flags and whatever else the compiled kernels belong to."""
    folder = Path(__file__).parent
    sources = b"".join((folder / name).read_bytes() for name in (*_HEADERS, *KERNEL_SOURCES))
    return hashlib.sha256(sources + "\0".join((*KERNEL_FLAGS, *more)).encode()).hexdigest()
