"""What the system says of the processor, from ``/proc/cpuinfo``; nothing where there is none."""

from __future__ import annotations

import re
from pathlib import Path


def processor_name() -> str:
    """What the processor is called; empty if nobody knows."""
    return field(_described(), "model name")


def processor_features() -> frozenset[str]:
    """Its instruction sets, by the names that Linux has for them."""
    return frozenset(field(_described(), "flags").split())


def field(text: str, name: str) -> str:
    """The first value of this name in a file of ``name : value`` lines; empty if there is none."""
    found = re.search(rf"^{re.escape(name)}\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _described() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
