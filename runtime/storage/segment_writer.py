"""The segment writer: whole turns in, one write each, and syncs by policy. Knows no requests.

Raises what the disk raises; its owner then abandons it, and begins again in a new segment. A sync
that failed is not tried again on the same file: the kernel may have dropped what it could not
write and call the rest clean (Rebello et al., "Can Applications Recover from fsync Failures?",
USENIX ATC 2020).
"""

from __future__ import annotations

import contextlib
import errno
import zlib
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final, NamedTuple

from understudy.runtime.storage.disk import Disk, SegmentFile
from understudy.runtime.storage.segments import Seal, segment_name

SYNC_POLL_S: Final = 0.02
"""How often somebody who waits for a sync should look."""


class SyncPolicy(Enum):
    """When what was written is brought onto the medium."""

    PROCESS = "process"
    GROUP = "group"
    STRICT = "strict"


@dataclass(slots=True)
class _Full:
    """A segment that is full and not yet on the medium."""

    file: SegmentFile
    last_lsn: int


class _Sync(NamedTuple):
    """A sync under way."""

    file: SegmentFile
    last_lsn: int
    is_full: bool


class SegmentWriter:
    """Appends to the latest segment."""

    def __init__(
        self, disk: Disk, policy: SyncPolicy, *, sync_every_s: float, number: int, seal: Seal
    ) -> None:
        self.number = number
        """Of the latest segment that anything was written to."""
        self.length, self._last_lsn, self._crc = seal
        self.durable_lsn = 0
        """Everything up to here is on the medium, as far as this process knows."""
        self._disk = disk
        self._is_strict = policy is SyncPolicy.STRICT
        self._is_group = policy is SyncPolicy.GROUP
        self._sync_every_s = sync_every_s
        self._file: SegmentFile | None = None
        self.is_empty = True
        """Whether what is written next begins a segment."""
        self._full: deque[_Full] = deque()
        self._sync: _Sync | None = None
        self._sync_at = 0.0
        """When the latest sync began."""
        self._is_sync_wanted = False

    @property
    def seal(self) -> Seal:
        """Of the latest segment, as far as it is written."""
        return Seal(self.length, self._last_lsn, self._crc)

    @property
    def is_open(self) -> bool:
        """Whether there is a segment to write to."""
        return self._file is not None

    def begin(self) -> None:
        """Begin a new segment; the one before, if any, is full."""
        file = self._disk.create(segment_name(self.number + 1))
        if self._file is not None:
            if self._is_strict:
                self._file.close()
            else:
                self._full.append(_Full(self._file, self._last_lsn))
        self._file = file
        self.is_empty = True

    def write(self, data: bytes, last_lsn: int) -> None:
        """Append whole records, the last of which has this lsn. One write, if the disk takes it."""
        assert self._file is not None
        written = self._file.write(data)
        if written < len(data):
            self._write_rest(memoryview(data)[written:])
        if self.is_empty:
            self.is_empty = False
            self.number += 1
            self.length = self._crc = 0
        self.length += len(data)
        self._last_lsn = last_lsn
        self._crc = zlib.crc32(data, self._crc)
        if self._is_strict:
            self._file.sync()
            self.durable_lsn = last_lsn

    def want_sync(self) -> None:
        """Ask for a sync whatever the policy."""
        self._is_sync_wanted = self.durable_lsn < self._last_lsn

    def tend(self, now: float) -> None:
        """Look after the syncs beside the turns: notice what is done, begin what is due."""
        if not (self._is_group or self._is_sync_wanted or self._sync or self._full):
            return
        if self._sync is not None:
            file, last_lsn, is_full = self._sync
            if not file.poll_sync(now):
                return
            self._sync = None
            self.durable_lsn = max(self.durable_lsn, last_lsn)
            if is_full:
                file.close()
                self._full.popleft()
        if self._full:
            full = self._full[0]
            self._start(_Sync(full.file, full.last_lsn, is_full=True), now)
        elif self._file is not None and self._is_sync_due(now):
            self._is_sync_wanted = False
            self._start(_Sync(self._file, self._last_lsn, is_full=False), now)

    def wake_at(self, now: float) -> float | None:
        """When to tend again even if there is nothing to write."""
        if self._sync is not None or self._full:
            return now + SYNC_POLL_S
        if self._file is None or self.durable_lsn >= self._last_lsn:
            return None
        if self._is_sync_wanted:
            return now
        return self._sync_at + self._sync_every_s if self._is_group else None

    def abandon(self) -> None:
        """Give up on every open file. What was written whole stays readable."""
        if self._file is not None:
            # The seal in the next header says the same; without the torn end it is plainer.
            with contextlib.suppress(OSError):
                if self.is_empty:
                    self._disk.remove(segment_name(self.number + 1))
                else:
                    self._disk.truncate(segment_name(self.number), self.length)
        self._close_all()

    def finish(self) -> None:
        """Bring everything onto the medium and close."""
        for full in self._full:
            full.file.sync()
        if self._file is not None:
            self._file.sync()
            self.durable_lsn = self._last_lsn
        self._close_all()

    def _write_rest(self, rest: memoryview) -> None:
        assert self._file is not None
        while rest:
            written = self._file.write(rest)
            if not written:
                raise OSError(errno.EIO, "the disk takes no bytes and gives no error")
            rest = rest[written:]

    def _is_sync_due(self, now: float) -> bool:
        if self.durable_lsn >= self._last_lsn:
            return False
        is_time = now >= self._sync_at + self._sync_every_s
        return self._is_sync_wanted or (self._is_group and is_time)

    def _start(self, sync: _Sync, now: float) -> None:
        sync.file.start_sync(now)
        self._sync = sync
        self._sync_at = now

    def _close_all(self) -> None:
        files = [full.file for full in self._full]
        if self._file is not None:
            files.append(self._file)
        for file in files:
            with contextlib.suppress(OSError):
                file.close()
        self._file = None
        self.is_empty = True
        self._sync = None
        self._full.clear()
