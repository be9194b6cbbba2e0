"""A file in memory: read once for all engines of a machine, as pages of the system's cache.

Free of torch until somebody asks for numbers.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

from understudy.protocol.errors import ConfigurationError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MADV_POPULATE_READ: Final = 22
"""See madvise(2); the standard library has no name for it."""
_SMAPS: Final = Path("/proc/self/smaps")
_C: Final = ctypes.CDLL(None, use_errno=True)
_C.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class MappedFile:
    """What is written to its memory changes neither the file nor what others see."""

    def __init__(self, path: Path) -> None:
        """Raises ``OSError`` if it cannot be mapped."""
        self.path = path
        with path.open("rb") as file:
            try:
                self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except ValueError as error:  # it is empty
                raise OSError(errno.EINVAL, str(error), str(path)) from error
        with suppress(OSError):  # a kernel without large pages
            # The system then reads 2 MiB at a time, and maps them as one where it can.
            self._memory.madvise(mmap.MADV_HUGEPAGE)

    @property
    def num_bytes(self) -> int:
        """How long the file was when it was mapped."""
        return len(self._memory)

    def tensor(self, dtype: torch.dtype, count: int, start: int) -> Tensor:
        """So many numbers, at least one, that begin at byte ``start``.

        Raises:
            ConfigurationError: the file is shorter.
        """
        if len(self._memory) < start + count * dtype.itemsize:
            raise ConfigurationError(f"{self.path}: truncated while it was read")
        import torch

        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=start)

    def fetch(self, start: int, num_bytes: int) -> None:
        """Have some bytes in memory when this returns, so that their first use waits for no disk.

        Raises:
            ConfigurationError: the file was cut off after it was mapped, or cannot be read.
        """
        first = start // mmap.PAGESIZE * mmap.PAGESIZE
        # Not by the mmap object, which would keep all other threads from running Python meanwhile.
        if _C.madvise(self._address + first, start + num_bytes - first, _MADV_POPULATE_READ) == 0:
            return
        error = ctypes.get_errno()
        if error != errno.EINVAL:  # before Linux 5.14 they come when they are used
            raise ConfigurationError(f"{self.path}: {os.strerror(error)}")

    @property
    def _address(self) -> int:
        return ctypes.addressof(ctypes.c_char.from_buffer(self._memory))

    @property
    def large_page_bytes(self) -> int:
        """How much of what was fetched the system maps as large pages, which are read faster.

        That takes a file system that keeps them, as XFS does since Linux 5.18 and ext4 since 6.16.
        See ``FilePmdMapped`` in proc_pid_smaps(5).
        """
        try:
            areas = _SMAPS.read_text(encoding="utf-8", errors="replace")
        except OSError:
            return 0
        pattern = rf"^{self._address:x}-.*?^FilePmdMapped: +(\d+) kB$"
        found = re.search(pattern, areas, re.MULTILINE | re.DOTALL)
        return 0 if found is None else int(found[1]) * 1024
