"""What the kernel says of a process: alive, ending, or not to be seen from here.

A process is named by its pid and its start time, for a pid may belong to another one later. Reads
``/proc/PID/stat`` (proc(5)): the state, the flags, and the start time in clock ticks since boot.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from understudy.runtime.control.health import ProcessState

_EXITING: Final = 0x4
"""``PF_EXITING`` of the kernel's task flags: set long before a big process is gone."""
_STATE, _FLAGS, _START_TIME = 0, 6, 19
"""Fields behind the command's name, which may itself hold spaces and brackets."""


class ProcProbe:
    """Asks this machine's kernel."""

    def __init__(self, root: Path = Path("/proc")) -> None:
        self._root = root

    def state(self, pid: int, start_time: int) -> ProcessState:
        """What the kernel says of the process with this pid and start time."""
        if start_time == 0:
            return ProcessState.UNKNOWN
        fields = self._fields(pid)
        if fields is None or int(fields[_START_TIME]) != start_time:
            return ProcessState.ENDING
        is_ending = fields[_STATE] in "ZXx" or int(fields[_FLAGS]) & _EXITING
        return ProcessState.ENDING if is_ending else ProcessState.ALIVE

    def start_time(self, pid: int) -> int:
        """When the process with this pid was started; 0 if there is none."""
        fields = self._fields(pid)
        return 0 if fields is None else int(fields[_START_TIME])

    def _fields(self, pid: int) -> list[str] | None:
        try:
            stat = (self._root / str(pid) / "stat").read_text()
        except OSError:
            return None
        return stat[stat.rindex(")") + 2 :].split()
