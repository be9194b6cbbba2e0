"""What is kept on disk for a faster start: where it is, and whether it can be trusted."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

_KINDS: Final = ("kernels", "weights", "costs", "exact")
"""What the names of kept files begin with; nothing else is ever removed."""
_UNUSED_S_MAX: Final = 30 * 86400.0


def cache_directory() -> Path:
    """``CACHE_DIRECTORY`` under systemd, else the user's cache; made if it is not there.

    Raises:
        OSError: it cannot be made.
    """
    given = os.environ.get("CACHE_DIRECTORY")
    if given:
        folder = Path(given.partition(":")[0])
    else:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "understudy"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def is_ours(path: Path) -> bool:
    """Whether the file is there, and nobody else can have written what it holds.

    Raises:
        PermissionError: it belongs to somebody else, or is no file.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISREG(status.st_mode) or status.st_uid not in {os.geteuid(), 0}:
        raise PermissionError(f"{path} belongs to somebody else; remove it")
    return not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def note_use(path: Path) -> None:
    """Say that a file was of use today, so that it stays; a file of root's has its own time."""
    with suppress(OSError):
        os.utime(path)


def remove_unused() -> None:
    """Remove what nobody has used for a month; another process may do the same.

    Raises:
        OSError: there is no cache, or something in it cannot be removed.
    """
    folder = cache_directory()
    for path in (path for kind in _KINDS for path in folder.glob(f"{kind}-*")):
        with suppress(FileNotFoundError):
            if path.lstat().st_mtime < time.time() - _UNUSED_S_MAX:
                path.unlink()
