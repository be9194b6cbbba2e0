"""Processes as data, and the ground they stand on: restarts, parents, the run directory.

Starts nothing by itself; ``understudy.actors.launcher`` does. Knows no actor and no message.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import resource
import signal
import stat
import time
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError

LAUNCHER_LOCK: Final = "launcher.lock"
LAUNCHER_SOCKET: Final = "launcher.sock"
SUPERVISOR_LOCK: Final = "supervisor.lock"

WAVE_S: Final = 10.0
CALM_S: Final = 600.0
WAVES_MAX: Final = 3
"""After so many waves of death in a row nothing is started again: see ``waves_of_death``."""

_PR_SET_PDEATHSIG: Final = 1
_LOCK_POLL_S: Final = 0.02
_LOCK_BYTES_MAX: Final = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class RestartPolicy:
    """How often a process may die, and how long its successor waits.

    More than ``deaths_max`` deaths within ``window_s`` and it stays down (the restart intensity
    of Erlang/OTP's supervisors). A first death is answered at once, because most deaths are
    single. Each further one waits twice as long as the one before, until a process has lived for
    ``window_s``: so one that takes its time to fail does not fail for ever at full speed.
    ``deaths_max`` ``None`` means that it is started again for ever.
    """

    deaths_max: int | None = 3
    window_s: float = 60.0
    backoff_s: float = 1.0
    backoff_max_s: float = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessSpec:
    """One process of the topology: what to run, and what to do when it dies."""

    name: str
    argv: tuple[str, ...]
    environment: Mapping[str, str]
    """Variables set for it beside those of its parent."""
    restart: RestartPolicy
    descriptors: tuple[int, ...] = ()
    """Open files that it inherits, by these same numbers."""


TIRELESS: Final = RestartPolicy(deaths_max=None, window_s=1.0, backoff_s=0.1, backoff_max_s=5.0)
"""For what has served already, starts in a moment, and without which nothing is served at all."""


class RestartHistory:
    """Decides, death by death, when a process may start again. Reads no clock."""

    def __init__(self, policy: RestartPolicy) -> None:
        self.restarts = 0
        self._policy = policy
        self._deaths: deque[float] = deque()
        self._failures = 0
        self._started_at = 0.0

    def follow(self, policy: RestartPolicy) -> None:
        """From now on, another policy holds."""
        self._policy = policy

    def delay_after_death(self, now: float, *, jitter: float) -> float | None:
        """Seconds until the next start; ``None``: it died too often and stays down.

        Args:
            now: the time of the death, in seconds of any clock that never goes back.
            jitter: 0 to 1, drawn evenly; spreads the restarts of processes that die together
                over the second half of the back-off.
        """
        assert 0.0 <= jitter <= 1.0
        policy = self._policy
        while self._deaths and now - self._deaths[0] > policy.window_s:
            self._deaths.popleft()
        self._deaths.append(now)
        if policy.deaths_max is not None and len(self._deaths) > policy.deaths_max:
            return None
        self.restarts += 1
        if now - self._started_at > policy.window_s:
            self._failures = 0
        self._failures += 1
        delay_s = 0.0
        if self._failures > 1:
            # The exponent is bounded for the sake of the float, not of the result.
            backoff_s = policy.backoff_s * 2.0 ** min(self._failures - 2, 64)
            delay_s = min(backoff_s, policy.backoff_max_s) * (0.5 + jitter / 2)
        self._started_at = now + delay_s
        return delay_s


class Death(NamedTuple):
    """An engine died, at a time in seconds of any clock that never goes back."""

    name: str
    at: float


def waves_of_death(deaths: Iterable[Death], num_engines: int) -> int:
    """How often in a row most engines have died together, at the end of this history.

    A *wave* is ``WAVE_S`` seconds or less in which a majority of the engines dies, two at least.
    Engines fail one at a time; what fells most of them at once, and again, is something that they
    share: the machine, the model, the driver. Then starting them again helps nobody and may do
    harm. A wave that comes ``CALM_S`` or more after the one before counts from one again.

    Args:
        deaths: in the order of time; those that somebody intended are left out.
        num_engines: how many there are when all live.
    """
    majority = max(2, num_engines // 2 + 1)
    waves, wave_at = 0, -math.inf
    recent: list[Death] = []
    for death in deaths:
        recent = [earlier for earlier in recent if death.at - earlier.at <= WAVE_S]
        recent.append(death)
        if len({each.name for each in recent}) >= majority:
            waves = waves + 1 if death.at - wave_at < CALM_S else 1
            wave_at = death.at
            recent = []
    return waves


def has_open(pid: int, path: Path) -> bool:
    """Whether a process of this user has a file open, as one that waits for a lock does."""
    try:
        return any(entry.readlink() == path for entry in Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return False  # it ends, or a file was closed while we looked


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, in whatever way (prctl(2)).

    The parent may have died before the call took hold; nobody would tell us then, so look.
    """
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def leave_no_core() -> None:
    """Have this process, and those that it starts, leave no image of their memory when they crash.

    It would hold prompts and keys. The limit is one byte and not none: a program to which the
    kernel pipes cores gets them whatever the limit is, but for this very one (core(5), and
    ``do_coredump`` in the kernel's fs/coredump.c).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 1 if hard == resource.RLIM_INFINITY else min(1, hard)
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))


def prepare_run_directory(run_dir: Path) -> None:
    """Make the directory of sockets and locks, for this user alone.

    Raises:
        ConfigurationError: it cannot be made, is no directory, or is open to others; a socket in
            it would then be open to them, too.
    """
    try:
        run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = run_dir.lstat()
    except OSError as error:
        raise ConfigurationError(f"run directory {run_dir}: {error.strerror}") from error
    if not stat.S_ISDIR(found.st_mode):
        raise ConfigurationError(f"run directory {run_dir}: not a directory")
    if found.st_uid != os.geteuid():
        raise ConfigurationError(
            f"run directory {run_dir}: belongs to user {found.st_uid}, not {os.geteuid()}"
        )
    if stat.S_IMODE(found.st_mode) & 0o077:
        mode = stat.S_IMODE(found.st_mode)
        raise ConfigurationError(
            f"run directory {run_dir}: open to other users (mode {mode:o}); chmod 700 it"
        )


class LockHeld(Exception):
    """Another process holds the lock; ``pid`` is its number, if it could be read."""

    def __init__(self, path: Path, pid: int | None) -> None:
        super().__init__(f"{path} is held by process {pid}")
        self.path = path
        self.pid = pid


class Lock:
    """A lock file that names its holder. The kernel releases it when the holder ends (flock(2))."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor

    @classmethod
    def acquire(cls, path: Path, *, timeout_s: float) -> Lock:
        """Take the lock and write our pid into it.

        Waits a little: a reader of ``lock_holder`` has the lock for a moment, and a process that
        was killed just now gives it back only when the kernel has ended it.

        Raises:
            LockHeld: somebody else has it.
        """
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        deadline = time.monotonic() + timeout_s
        while not _try_lock(descriptor, fcntl.LOCK_EX):
            if time.monotonic() >= deadline:
                holder = _read_pid(descriptor)
                os.close(descriptor)
                raise LockHeld(path, holder)
            time.sleep(_LOCK_POLL_S)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, b"%d\n" % os.getpid(), 0)
        return cls(path, descriptor)

    def release(self) -> None:
        """Give the lock back. The file stays: removing it would let two holders in."""
        os.ftruncate(self._descriptor, 0)
        os.close(self._descriptor)


class Holder(NamedTuple):
    """Who holds a lock; ``pid`` is ``None`` in the moment before it is written."""

    pid: int | None


def lock_holder(path: Path) -> Holder | None:
    """Who holds the lock, or ``None`` if nobody does."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        if _try_lock(descriptor, fcntl.LOCK_SH):
            return None
        return Holder(_read_pid(descriptor))
    finally:
        os.close(descriptor)


def remove_stale_socket(path: Path, lock: Lock) -> None:
    """Remove the socket that a dead predecessor left. Only the holder of the lock may do so."""
    assert lock.path.parent == path.parent
    path.unlink(missing_ok=True)


def _try_lock(descriptor: int, operation: int) -> bool:
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in {errno.EWOULDBLOCK, errno.EACCES}:
            return False
        raise
    return True


def _read_pid(descriptor: int) -> int | None:
    written = os.pread(descriptor, _LOCK_BYTES_MAX, 0).strip()
    return int(written) if written.isdigit() else None
