"""What happens around actors on one machine: the step cards of engines, and killing.

A *step card* is a small file in the run directory, mapped into the engine's memory, on which the
engine notes the requests of the step that it is about to run. Writing to it is a copy in memory;
and what was written is there for the supervisor even if the engine ends in the same microsecond,
because the page belongs to the kernel and not to the process. A message could not promise that.
"""

from __future__ import annotations

import mmap
import os
import signal
import time
from pathlib import Path
from struct import Struct
from typing import Final

from understudy.protocol.request import Request
from understudy.runtime.control.health import ProcessState
from understudy.runtime.kit.probe import ProcProbe
from understudy.runtime.storage.convicts import ConvictDirectory

CARD_REQUESTS_MAX: Final = 4096
_IDENTITY_BYTES: Final = 64
_COUNT_AT: Final = _IDENTITY_BYTES
_REQUESTS_AT: Final = _COUNT_AT + 8
_CARD_BYTES: Final = _REQUESTS_AT + 8 * CARD_REQUESTS_MAX
_U64: Final = Struct("<Q")


def card_path(run_dir: Path, name: str) -> Path:
    """Where the card of the engine of this name lies."""
    return run_dir / f"{name}.step"


class FileStepCard:
    """The engine's side of its card."""

    def __init__(self, path: Path, identity: str) -> None:
        # A new file, for an earlier engine of this name may still write on its own.
        path.unlink(missing_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.ftruncate(descriptor, _CARD_BYTES)
            self._map = mmap.mmap(descriptor, _CARD_BYTES)
        finally:
            os.close(descriptor)
        self.leave()
        self._map[:_IDENTITY_BYTES] = identity.encode()[:_IDENTITY_BYTES].ljust(_IDENTITY_BYTES)

    def enter(self, request_ids: list[int]) -> None:
        """A step with these requests begins."""
        shown = request_ids[:CARD_REQUESTS_MAX]
        end = _REQUESTS_AT + 8 * len(shown)
        self._map[_REQUESTS_AT:end] = b"".join(map(_U64.pack, shown))
        # Last, so that whoever reads a count finds that many requests.
        self._map[_COUNT_AT:_REQUESTS_AT] = _U64.pack(len(shown))

    def leave(self) -> None:
        """The step has ended well."""
        self._map[_COUNT_AT:_REQUESTS_AT] = _U64.pack(0)


class NodeStage:
    """The supervisor's side, on the machine that it shares with its engines."""

    def __init__(self, run_dir: Path, probe: ProcProbe, convicts: ConvictDirectory) -> None:
        self._run_dir = run_dir
        self._probe = probe
        self._convicts = convicts

    def fatal_step(self, name: str, identity: str) -> frozenset[int]:
        """The requests of the step in which this incarnation of an engine ended."""
        try:
            card = card_path(self._run_dir, name).read_bytes()
        except OSError:
            return frozenset()
        if len(card) != _CARD_BYTES or card[:_IDENTITY_BYTES].rstrip() != identity.encode():
            return frozenset()
        (count,) = _U64.unpack_from(card, _COUNT_AT)
        count = min(count, CARD_REQUESTS_MAX)
        return frozenset(_U64.unpack_from(card, _REQUESTS_AT + 8 * n)[0] for n in range(count))

    def kill(self, pid: int, start_time: int) -> None:
        """End a process at once, if it is still the one that was started then."""
        if self._probe.state(pid, start_time) is ProcessState.ALIVE:
            os.kill(pid, signal.SIGKILL)

    def keep_convict(self, request: Request) -> None:
        """Keep what a quarantined request asked, for the operator."""
        self._convicts.keep(request, written_at=time.time())
