"""What the system says of the processor, and who uses which of its cores."""

from __future__ import annotations

import re
from collections.abc import Collection
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


def cores_of(
    name: str, *, num_engines: int, threads: int, available: Collection[int]
) -> frozenset[int] | None:
    """The cores to which one of several engines keeps, each to its own; ``None``: to none.

    An engine whose threads wander waits for the one that shares a core with another engine's, and
    finds its weights in another core's cache or, on large machines, in another socket's memory.

    Args:
        name: The engine's; by the number at its end each has its place, and who replaces it, too.
        num_engines: How many there are on the machine.
        threads: Of each.
        available: The cores that this process may use. Where they are too few for all, the
            operator has dealt them out already, or wants them shared.
    """
    number = name.rpartition("-")[2]
    cores = sorted(available)
    if num_engines < 2 or not number.isdecimal() or num_engines * threads > len(cores):
        return None
    place = int(number) % num_engines
    return frozenset(cores[place * threads : (place + 1) * threads])


def _described() -> str:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return ""
