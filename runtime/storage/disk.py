"""The disk, as the journal sees it, and the real one. Knows nothing of records.

``VirtualDisk``, in its own module, stands beside ``OsDisk`` with the same interface.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Final, Protocol

LOCK_WAIT_S: Final = 3.0
"""For so long a starting supervisor waits for its predecessor, which may still be dying."""
_LOCK_NAME: Final = "lock"
_LOCK_POLL_S: Final = 0.02


class SegmentFile(Protocol):
    """An open file that is only ever appended to. Every method may raise ``OSError``."""

    def write(self, data: bytes | memoryview) -> int:
        """Append; gives how many bytes were taken, which may be fewer."""
        ...

    def sync(self) -> None:
        """Return when everything written, and the file's name, is on the medium."""
        ...

    def start_sync(self, now: float) -> None:
        """Bring what was written so far onto the medium, beside the caller's work."""
        ...

    def poll_sync(self, now: float) -> bool:
        """Whether the sync that was started is done. Raises what it failed with, once."""
        ...

    def close(self) -> None:
        """Give the file back. Does not sync."""
        ...


class Disk(Protocol):
    """A directory that one journal lives in. Every method may raise ``OSError``."""

    @property
    def name(self) -> str:
        """What to call it in a message."""
        ...

    def lock(self) -> None:
        """Take the directory for this process, or raise ``BlockingIOError``."""
        ...

    def names(self) -> list[str]:
        """The names of all files, in order."""
        ...

    def size(self, name: str) -> int:
        """A file's length in bytes."""
        ...

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's content, or its first ``limit`` bytes."""
        ...

    def create(self, name: str) -> SegmentFile:
        """Make a new file to append to."""
        ...

    def sync(self, name: str) -> None:
        """Return when a file, and its name, is on the medium, whoever wrote it."""
        ...

    def truncate(self, name: str, length: int) -> None:
        """Cut a file."""
        ...

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name."""
        ...

    def remove(self, name: str) -> None:
        """Remove a file."""
        ...

    def close(self) -> None:
        """Let others take the directory."""
        ...


class OsFile:
    """A file in the operating system's file system."""

    def __init__(self, path: Path, syncer: ThreadPoolExecutor) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
        self._descriptor = os.open(path, flags, 0o600)
        self._directory = path.parent
        self._is_name_synced = False
        self._syncer = syncer
        self._sync: Future[None] | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Append by a single system call."""
        return os.write(self._descriptor, data)

    def sync(self) -> None:
        """Call fdatasync(2), and the first time fsync(2) for the name."""
        os.fdatasync(self._descriptor)
        if not self._is_name_synced:
            _sync_names(self._directory)
            self._is_name_synced = True

    def start_sync(self, now: float) -> None:  # noqa: ARG002 - a virtual disk takes time
        """The same in the helper thread."""
        assert self._sync is None
        self._sync = self._syncer.submit(self.sync)

    def poll_sync(self, now: float) -> bool:  # noqa: ARG002
        """Look at the helper thread's work."""
        if self._sync is not None:
            if not self._sync.done():
                return False
            done, self._sync = self._sync, None
            done.result()
        return True

    def close(self) -> None:
        """Close it, when the helper thread has let go of it."""
        if self._sync is None:
            os.close(self._descriptor)
        else:
            descriptor = self._descriptor
            self._sync.add_done_callback(lambda _: os.close(descriptor))


class OsDisk:
    """A directory of the operating system: 0700, its files 0600."""

    def __init__(self, directory: Path, *, lock_wait_s: float = LOCK_WAIT_S) -> None:
        self._directory = directory
        self._lock_wait_s = lock_wait_s
        self._lock: int | None = None
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="journal-sync")

    @property
    def name(self) -> str:
        """The directory's path."""
        return str(self._directory)

    def lock(self) -> None:
        """Make the directory if need be, and hold a flock(2) on a file in it.

        The lock ends with the process, however that ends; but a big process takes its time to
        die, so one that is still there is waited for.
        """
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._directory / _LOCK_NAME
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        give_up_at = time.monotonic() + self._lock_wait_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= give_up_at:
                    os.close(descriptor)
                    raise
            time.sleep(_LOCK_POLL_S)
        self._lock = descriptor
        with contextlib.suppress(OSError):  # The directory may be on a full disk: serve on.
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)

    def names(self) -> list[str]:
        """The names in the directory."""
        return sorted(entry.name for entry in self._directory.iterdir())

    def size(self, name: str) -> int:
        """A file's length in bytes."""
        return (self._directory / name).stat().st_size

    def read(self, name: str, limit: int | None = None) -> bytes:
        """Read, and do not map: a bad sector under a mapping would be a signal, not an error."""
        with (self._directory / name).open("rb") as file:
            return file.read() if limit is None else file.read(limit)

    def create(self, name: str) -> OsFile:
        """Make a new file; what an earlier attempt left under the name is gone."""
        return OsFile(self._directory / name, self._syncer)

    def sync(self, name: str) -> None:
        """Sync a file that may have been written by another process."""
        descriptor = os.open(self._directory / name, os.O_WRONLY)
        try:
            os.fdatasync(descriptor)
        finally:
            os.close(descriptor)
        _sync_names(self._directory)

    def truncate(self, name: str, length: int) -> None:
        """Cut a file."""
        os.truncate(self._directory / name, length)

    def rename(self, name: str, new_name: str) -> None:
        """Rename a file within the directory."""
        (self._directory / name).rename(self._directory / new_name)

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        (self._directory / name).unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the lock."""
        self._syncer.shutdown(wait=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync_names(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
