"""Available memory, from files like the kernel's."""

from __future__ import annotations

from pathlib import Path

import pytest

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.model.memory import available_memory

MEMINFO = "MemTotal:  32000 kB\nMemFree: 1 kB\nMemAvailable:   20000 kB\n"


def write_machine(root: Path, *, group: str | None = None) -> tuple[Path, Path]:
    proc, cgroups = root / "proc", root / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(MEMINFO)
    if group is not None:
        (proc / "self" / "cgroup").write_text(f"4:memory:/old\n0::{group}\n")
    return proc, cgroups


def write_group(group: Path, *, limit: str, current: int, inactive: int = 0) -> None:
    group.mkdir(parents=True, exist_ok=True)
    (group / "memory.max").write_text(f"{limit}\n")
    (group / "memory.current").write_text(f"{current}\n")
    (group / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\n")


def test_without_control_groups_it_is_the_kernels_estimate(tmp_path: Path) -> None:
    assert available_memory(*write_machine(tmp_path)) == 20000 * 1024
    assert available_memory(*write_machine(tmp_path / "b", group="/a/b")) == 20000 * 1024


def test_a_containers_limit_counts(tmp_path: Path) -> None:
    proc, cgroups = write_machine(tmp_path, group="/")
    write_group(cgroups, limit="1000000", current=700_000, inactive=50_000)
    assert available_memory(proc, cgroups) == 350_000


def test_the_tightest_group_above_counts(tmp_path: Path) -> None:
    proc, cgroups = write_machine(tmp_path, group="/outer/inner")
    write_group(cgroups / "outer" / "inner", limit="max", current=900)
    write_group(cgroups / "outer", limit="5000", current=900)
    assert available_memory(proc, cgroups) == 4100
    write_group(cgroups / "outer", limit="5000", current=9000)
    assert available_memory(proc, cgroups) == 0


def test_what_this_process_has_mapped_is_not_there_to_be_taken(tmp_path: Path) -> None:
    proc, cgroups = write_machine(tmp_path, group="/")
    (proc / "self" / "status").write_text("VmRSS:\t9000 kB\nRssFile:\t     30 kB\n")
    assert available_memory(proc, cgroups) == 19970 * 1024
    write_group(cgroups, limit="1000000", current=700_000, inactive=50_000)
    assert available_memory(proc, cgroups) == 300_000 + 50_000 - 30 * 1024
    write_group(cgroups, limit="1000000", current=700_000, inactive=9_000)
    assert available_memory(proc, cgroups) == 300_000, "of these, nothing could be dropped"


def test_this_machine_has_memory() -> None:
    assert available_memory() > 1 << 20


def test_no_estimate_is_an_error_that_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="set --kv-cache-memory"):
        available_memory(tmp_path, tmp_path)
