"""A disk for simulations, beside ``OsDisk`` and with its interface: one seed, faults as switches.

It knows what a write(2), an fdatasync(2) and a crash do to a file. When a process dies, everything
written stays, but the write it was in may be torn at any byte. When the machine dies, of each file
stays what was synced, and some part of what came after; a file that was never synced may be gone,
and one that was removed may be back. Everything random is drawn from the seed.
"""

from __future__ import annotations

import errno
import os
import random
from dataclasses import dataclass, field


class Killed(BaseException):
    """The process dies here, in the middle of a write. No error: nobody may catch it and go on."""


@dataclass(slots=True)
class DiskFaults:
    """What the disk does wrong; shares are probabilities from 0 to 1. May be changed any time."""

    short_writes: float = 0.0
    """The share of writes that take only some of the bytes."""
    write_errors: float = 0.0
    """The share of writes that fail with EIO, after some of the bytes."""
    sync_errors: float = 0.0
    sync_s: float = 0.0
    """How long a sync beside the turns takes."""
    is_full: bool = False
    """Whether nothing more can be written (ENOSPC). Files can still be made."""
    capacity_bytes: int | None = None
    """The length of all files at which the disk is full."""
    is_read_only: bool = False
    kill_after_bytes: int | None = None
    """After so many more bytes the process dies: ``Killed`` is raised."""
    unreadable: set[str] = field(default_factory=set)
    """Files whose reading fails with EIO."""


class _Content:
    """A file's bytes, and how many of them a crash of the machine cannot take."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.synced_bytes = 0
        self.is_name_synced = False


class VirtualFile:
    """An open file of a virtual disk."""

    def __init__(self, disk: VirtualDisk, content: _Content) -> None:
        self._disk = disk
        self._content = content
        self._incarnation = disk.incarnation
        self._sync_done_at: float | None = None
        self._sync_bytes = 0

    def write(self, data: bytes | memoryview) -> int:
        """Append as many bytes as the faults allow."""
        assert self._incarnation == self._disk.incarnation, "a dead process writes nothing"
        taken, failure = self._disk.judge_write(len(data))
        self._content.data += data[:taken]
        if failure is not None:
            raise failure
        return taken

    def sync(self) -> None:
        """At once."""
        self._disk.judge_sync()
        self._keep(len(self._content.data))

    def start_sync(self, now: float) -> None:
        """Takes ``sync_s``, and covers what is written by now."""
        assert self._sync_done_at is None
        self._sync_done_at = now + self._disk.faults.sync_s
        self._sync_bytes = len(self._content.data)

    def poll_sync(self, now: float) -> bool:
        """Done when its time has come."""
        if self._sync_done_at is None:
            return True
        if now < self._sync_done_at:
            return False
        self._sync_done_at = None
        self._disk.judge_sync()
        self._keep(self._sync_bytes)
        return True

    def close(self) -> None:
        """Nothing is synced by that."""

    def _keep(self, length: int) -> None:
        self._content.synced_bytes = max(self._content.synced_bytes, length)
        self._content.is_name_synced = True


class VirtualDisk:
    """A directory on a disk that exists only in memory."""

    def __init__(
        self, seed: int = 0, faults: DiskFaults | None = None, *, name: str = "virtual disk"
    ) -> None:
        self.faults = faults or DiskFaults()
        self.incarnation = 0
        self.writes = 0
        self._name = name
        self._random = random.Random(seed)  # noqa: S311 - a simulation, not a secret
        self._files: dict[str, _Content] = {}
        self._removed: dict[str, _Content] = {}
        self._is_locked = False

    @property
    def name(self) -> str:
        """What to call it in a message."""
        return self._name

    def crash_process(self) -> None:
        """The process dies: its files are closed, its lock is gone, what it wrote stays."""
        self.incarnation += 1
        self._is_locked = False
        self.faults.kill_after_bytes = None

    def crash_machine(self) -> None:
        """The machine dies: what was not synced is there in part, or not at all."""
        self.crash_process()
        for name, content in self._removed.items():
            if name not in self._files and self._random.random() < 0.5:
                self._files[name] = content
        self._removed.clear()
        for name, content in list(self._files.items()):
            if not content.is_name_synced and self._random.random() < 0.5:
                del self._files[name]
                continue
            kept = self._random.randint(content.synced_bytes, len(content.data))
            del content.data[kept:]
            self._keep_all(content)

    def corrupt(self, name: str, offset: int, mask: int) -> None:
        """Flip the bits of ``mask`` in one byte of a file."""
        self._files[name].data[offset] ^= mask

    def copy(self) -> VirtualDisk:
        """Another disk with the same content, as after a crash of the process."""
        twin = VirtualDisk(name=self._name)
        for name, content in self._files.items():
            twin._files[name] = other = _Content()
            other.data += content.data
            other.synced_bytes = content.synced_bytes
            other.is_name_synced = content.is_name_synced
        return twin

    # What a Disk does

    def lock(self) -> None:
        """Take the disk."""
        self._check_writable()
        if self._is_locked:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._is_locked = True

    def names(self) -> list[str]:
        """The names of all files, in order."""
        return sorted(self._files)

    def size(self, name: str) -> int:
        """A file's length in bytes."""
        return len(self._find(name).data)

    def read(self, name: str, limit: int | None = None) -> bytes:
        """A file's content."""
        if name in self.faults.unreadable:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return bytes(self._find(name).data[:limit])

    def create(self, name: str) -> VirtualFile:
        """Make a new file to append to."""
        self._check_writable()
        content = self._files[name] = _Content()
        return VirtualFile(self, content)

    def sync(self, name: str) -> None:
        """Bring a file onto the medium."""
        content = self._find(name)
        self.judge_sync()
        self._keep_all(content)

    def truncate(self, name: str, length: int) -> None:
        """Cut a file."""
        self._check_writable()
        content = self._find(name)
        del content.data[length:]
        content.synced_bytes = min(content.synced_bytes, length)

    def rename(self, name: str, new_name: str) -> None:
        """Give a file another name."""
        self._check_writable()
        self._files[new_name] = self._find(name)
        del self._files[name]

    def remove(self, name: str) -> None:
        """Remove a file, if it is there."""
        self._check_writable()
        content = self._files.pop(name, None)
        if content is not None:
            self._removed[name] = content

    def close(self) -> None:
        """Let others take the disk."""
        self._is_locked = False

    # What its files ask

    def judge_write(self, num_bytes: int) -> tuple[int, BaseException | None]:
        """How many bytes of a write are taken, and what is raised afterwards."""
        self.writes += 1
        faults = self.faults
        if faults.kill_after_bytes is not None:
            if num_bytes > faults.kill_after_bytes:
                return faults.kill_after_bytes, Killed()
            faults.kill_after_bytes -= num_bytes
        room = self._room()
        if room == 0 and num_bytes:
            return 0, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self._random.random() < faults.write_errors:
            failure = OSError(errno.EIO, os.strerror(errno.EIO))
            return self._random.randint(0, min(num_bytes, room)), failure
        if num_bytes > 1 and self._random.random() < faults.short_writes:
            return min(self._random.randint(1, num_bytes - 1), room), None
        return min(num_bytes, room), None

    def judge_sync(self) -> None:
        """Whether a sync succeeds."""
        if self._random.random() < self.faults.sync_errors:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def _room(self) -> int:
        if self.faults.is_full:
            return 0
        if self.faults.capacity_bytes is None:
            return 1 << 62
        used = sum(len(content.data) for content in self._files.values())
        return max(0, self.faults.capacity_bytes - used)

    def _find(self, name: str) -> _Content:
        content = self._files.get(name)
        if content is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), name)
        return content

    def _check_writable(self) -> None:
        if self.faults.is_read_only:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    @staticmethod
    def _keep_all(content: _Content) -> None:
        content.synced_bytes = len(content.data)
        content.is_name_synced = True
