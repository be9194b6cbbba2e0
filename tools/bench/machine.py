"""What a measurement was taken on, for its file."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any, Final

from understudy.runtime.processor import field, processor_features, processor_name

_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast a matrix product is."""


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    return {
        "processor": processor_name(),
        "instructions": [flag for flag in _FLAGS if flag in processor_features()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(field(memory, "MemTotal").split()[0]) * 1024 / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }
