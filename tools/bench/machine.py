"""What a measurement was taken on, for its file."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Any, Final

_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
"""What decides how fast a matrix product is."""


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system."""
    processor = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    memory = Path("/proc/meminfo").read_text(encoding="utf-8")
    return {
        "processor": field(processor, "model name"),
        "instructions": [flag for flag in _FLAGS if flag in field(processor, "flags").split()],
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(int(field(memory, "MemTotal").split()[0]) * 1024 / 1e9, 1),
        "load_average": os.getloadavg()[0],
        "system": platform.system(),
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def field(text: str, name: str) -> str:
    """The first value of this name in a file of ``name : value`` lines; empty if there is none."""
    found = re.search(rf"^{re.escape(name)}\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""
