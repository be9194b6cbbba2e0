"""The exit statuses of every process, as its callers know them (sysexits.h)."""

from __future__ import annotations

from enum import IntEnum


class ExitStatus(IntEnum):
    """What a process says by its end. Never 0 on a fault."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    UNAVAILABLE = 69
    """What is needed is not there, or somebody else has it."""
    TRY_AGAIN = 75
    CONFIG = 78
    """Wrong configuration: a restart cannot help."""
    INTERRUPTED = 130
