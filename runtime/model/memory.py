"""How much memory there is to take, on the machine and within a container's limit.

Reads the kernel's own files, so that nothing needs installing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from understudy.protocol.errors import ConfigurationError

_PROC: Final = Path("/proc")
_CGROUPS: Final = Path("/sys/fs/cgroup")


def available_memory(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> int:
    """Bytes that this process can still allocate without swapping or being killed.

    The least of the kernel's estimate for the machine and what every control group (version 2)
    above this process has left. Page cache that can be dropped counts as left, but for files that
    this process has mapped: weights that were dropped would be read from the disk in every step.
    """
    mapped = 1024 * (_named_number(proc / "self" / "status", "RssFile:") or 0)
    meminfo = proc / "meminfo"
    available = _named_number(meminfo, "MemAvailable:")
    if available is None:
        raise ConfigurationError(f"{meminfo}: no MemAvailable; set --kv-cache-memory")
    left = [max(0, available * 1024 - mapped)]
    for group in _own_groups(proc, cgroups):
        limit = _text(group / "memory.max").strip()
        current = _text(group / "memory.current").strip()
        if limit.isdecimal() and current.isdecimal():
            droppable = _named_number(group / "memory.stat", "inactive_file") or 0
            left.append(max(0, int(limit) - int(current) + max(0, droppable - mapped)))
    return min(left)


def _own_groups(proc: Path, cgroups: Path) -> list[Path]:
    """This process's control group and all above it."""
    for line in _text(proc / "self" / "cgroup").splitlines():
        if line.startswith("0::/"):
            group = cgroups / line.removeprefix("0::/")
            return [group, *(parent for parent in group.parents if parent.is_relative_to(cgroups))]
    return []


def _named_number(path: Path, name: str) -> int | None:
    for line in _text(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdecimal():
            return int(words[1])
    return None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
