"""Child processes that are watched: starting, waiting for an end or a signal, stopping in time.

One thread, and no thread beside it: a pidfd becomes readable when its process ends (pidfd_open(2)),
a signal writes a byte into a socket, and one ``select`` waits for both. Decides nothing.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Final, NamedTuple, Self

from understudy.runtime.kit.process import ProcessSpec, RestartHistory

_STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_LAST_WORDS_BYTES_MAX: Final = 16384


class Child:
    """One process of the topology, through all of its lives."""

    def __init__(self, spec: ProcessSpec, *, last_words: Path) -> None:
        self.spec = spec
        self.history = RestartHistory(spec.restart)
        self.process: subprocess.Popen[bytes] | None = None
        self.restart_at: float | None = None
        """When it is to be started again, on the monotonic clock."""
        self.is_broken = False
        """It died too often, or hopelessly, and stays down."""
        self.pid: int | None = None
        """The number of the last process that was started."""
        self._last_words = last_words

    def start(self) -> int:
        """Start a fresh process, which dies with this one; gives its pid.

        Its own process group keeps a terminal's Ctrl-C for the launcher, which then stops the
        processes in order.
        """
        self._last_words.unlink(missing_ok=True)
        self.restart_at = None
        flags = [f"--parent-pid={os.getpid()}", f"--last-words={self._last_words}"]
        self.process = subprocess.Popen(
            [*self.spec.argv, *flags],
            env={**os.environ, **self.spec.environment},
            stdin=subprocess.DEVNULL,
            stdout=sys.stderr.fileno(),
            process_group=0,
            pass_fds=self.spec.descriptors,
        )
        self.pid = self.process.pid
        return self.pid

    def send_signal(self, number: signal.Signals) -> None:
        """Signal the process, if it runs."""
        if self.process is not None:
            self.process.send_signal(number)

    def last_words(self) -> str:
        """The message that the last process ended with, if it left one."""
        with suppress(OSError), self._last_words.open("rb") as file:
            return file.read(_LAST_WORDS_BYTES_MAX).decode(errors="replace").strip()
        return ""


class Exit(NamedTuple):
    """A process that ended."""

    child: Child
    pid: int
    status: int
    """The exit status, or minus the number of the signal, as ``subprocess`` gives it."""


class Watch:
    """Waits for processes to end and for signals to come. Made by ``watch()``."""

    def __init__(self, wakeup: socket.socket) -> None:
        self.stop_signals = 0
        """How often this process was asked to stop."""
        self._wakeup = wakeup
        self._selector = selectors.DefaultSelector()
        self._selector.register(wakeup, selectors.EVENT_READ)
        self._pidfds: dict[Child, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pidfd in self._pidfds.values():
            os.close(pidfd)
        self._selector.close()

    def attend(self, other: socket.socket) -> None:
        """Wake up for this socket, too. Whoever waits has to read it."""
        self._selector.register(other, selectors.EVENT_READ)

    def start(self, child: Child) -> int:
        """Start a child and watch it; gives its pid."""
        pid = child.start()
        pidfd = os.pidfd_open(pid)
        self._pidfds[child] = pidfd
        self._selector.register(pidfd, selectors.EVENT_READ, child)
        return pid

    def wait(self, timeout_s: float | None) -> list[Exit]:
        """Sleep until a process ends, a signal comes, or the time is over."""
        exits = []
        for key, _ in self._selector.select(timeout_s):
            if key.fileobj is self._wakeup:
                with suppress(BlockingIOError):
                    self._wakeup.recv(4096)
            elif key.data is not None:
                exits.append(self._reap(key.data))
        return exits

    def stop(self, children: Iterable[Child], *, limit_s: float) -> bool:
        """Ask processes to end, and kill those that have not after ``limit_s``.

        A second signal to stop means now. Gives whether all ended by themselves.
        """
        deadline = time.monotonic() + limit_s
        running = [child for child in children if child.process is not None]
        for child in running:
            child.send_signal(signal.SIGTERM)
        while any(child.process is not None for child in running):
            left_s = deadline - time.monotonic()
            if left_s <= 0 or self.stop_signals > 1:
                break
            self.wait(left_s)
        late = [child for child in running if child.process is not None]
        for child in late:
            child.send_signal(signal.SIGKILL)
        while any(child.process is not None for child in late):
            self.wait(None)
        return not late

    def _reap(self, child: Child) -> Exit:
        assert child.process is not None
        pidfd = self._pidfds.pop(child)
        self._selector.unregister(pidfd)
        os.close(pidfd)
        pid, status = child.process.pid, child.process.wait()
        child.process = None
        return Exit(child, pid, status)


@contextmanager
def watch() -> Iterator[Watch]:
    """A watch over children, with the signals that mean stop counted instead of fatal."""
    receiver, sender = socket.socketpair()
    receiver.setblocking(False)
    sender.setblocking(False)
    with receiver, sender, Watch(receiver) as watching:

        def count(_number: int, _frame: FrameType | None) -> None:
            watching.stop_signals += 1

        previous = {number: signal.signal(number, count) for number in _STOP_SIGNALS}
        wakeup_before = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        try:
            yield watching
        finally:
            signal.set_wakeup_fd(wakeup_before)
            for number, handler in previous.items():
                signal.signal(number, handler)
