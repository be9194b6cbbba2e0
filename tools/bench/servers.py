"""Servers under test as processes: start them, learn their address and processor time, stop them.

A run owns what it starts: leaving the context ends every process of it.
"""

from __future__ import annotations

import contextlib
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Final, NamedTuple

import msgspec

from understudy.tools.bench.client import Target

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0
ROLES: Final = ("gateway", "supervisor", "engine")
_CLI: Final = (sys.executable, "-m", "understudy.tools.cli")
_READY: Final = re.compile(r"understudy is ready: .* at (http://\S+)")
_PSS: Final = re.compile(r"^Pss:\s+(\d+) kB", re.MULTILINE)
_LINES_KEPT: Final = 50
_BARE: Final = (sys.executable, "-m", "understudy.tools.bench.bare_server")


class ServerFailed(Exception):
    """A server under test did not come up; the text says what it said."""


class Server(NamedTuple):
    """One running server."""

    name: str
    target: Target
    pid: int
    """The first process; the others descend from it."""

    def cpu_s_by_role(self) -> dict[str, float]:
        """Processor seconds used so far by its processes: by role, several engines together."""
        used: dict[str, float] = {}
        for pid in _family(self.pid):
            # A process may end between being listed and being read.
            with contextlib.suppress(OSError):
                role = _role(pid)
                used[role] = used.get(role, 0.0) + _cpu_s(pid)
        return used

    def memory_bytes(self) -> int:
        """Memory of its processes together: see ``family_memory_bytes``."""
        return family_memory_bytes(self.pid)


def family_memory_bytes(pid: int) -> int:
    """Memory of a process and its descendants now; shared pages count once (proc(5), Pss)."""
    total = 0
    for member in _family(pid):
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{member}/smaps_rollup").read_text(encoding="ascii")
            total += sum(int(size) for size in _PSS.findall(rollup)) * 1024
    return total


@contextlib.contextmanager
def bare_server(name: str, *, tokens_per_s: float) -> Iterator[Server]:
    """Run the bare aiohttp server for as long as the context lasts.

    Raises:
        ServerFailed: It did not come up.
    """
    command = [*_BARE, f"--tokens-per-s={tokens_per_s}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            if not address:
                raise ServerFailed(f"{name}: the process ended with status {process.wait()}")
            yield Server(name, Target.parse(f"http://{address}"), process.pid)
        finally:
            _stop(process)


def echo_cluster(
    name: str, *, num_engines: int, tokens_per_s: float
) -> contextlib.AbstractContextManager[Server]:
    """Run ``understudy start --engine echo``: see ``cluster``."""
    rate = f"--echo-tokens-per-s={tokens_per_s}"
    return cluster(name, num_engines=num_engines, flags=("--engine=echo", rate))


@contextlib.contextmanager
def cluster(name: str, *, num_engines: int, flags: Sequence[str]) -> Iterator[Server]:
    """Run ``understudy start`` with these flags for as long as the context lasts.

    Raises:
        ServerFailed: It did not come up within START_TIMEOUT_S.
    """
    # The directory holds a socket, whose path must be short.
    with tempfile.TemporaryDirectory(prefix="us-") as scratch:
        run_dir = Path(scratch) / "run"
        log = Path(scratch) / "log"
        command = [
            *_CLI,
            "start",
            "--config=/dev/null",
            f"--run-dir={run_dir}",
            "--port=0",
            f"--data-parallel-size={num_engines}",
            *flags,
        ]
        with (
            log.open("wb") as output,
            subprocess.Popen(command, stdout=output, stderr=output) as process,
        ):
            try:
                address = _await_address(process, run_dir, num_engines)
                if address is None:
                    said = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                    raise ServerFailed(f"{name} did not come up: {' '.join(command)}\n{said}")
                yield Server(name, Target.parse(f"http://{address}"), process.pid)
            finally:
                _stop(process)


@contextlib.contextmanager
def started_node(flags: Sequence[str], *, timeout_s: float) -> Iterator[Server]:
    """Run ``understudy start``; the context begins in the moment in which it says it is ready.

    Nothing asks it meanwhile, so that its start takes the time that it takes.

    Raises:
        ServerFailed: It did not become ready within ``timeout_s``.
    """
    with tempfile.TemporaryDirectory(prefix="us-") as scratch:
        run_dir = Path(scratch) / "run"
        command = [*_CLI, "start", "--config=/dev/null", f"--run-dir={run_dir}", "--port=0", *flags]
        with subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, bufsize=0
        ) as process:
            try:
                assert process.stderr is not None
                said = SpokenLines(process.stderr)
                found = said.wait_for(_READY, timeout_s=timeout_s)
                if found is None:
                    raise ServerFailed(f"{' '.join(command)} did not become ready\n{said.tail}")
                yield Server("understudy", Target.parse(found[1]), process.pid)
            finally:
                _stop(process)


class SpokenLines:
    """What a process writes: read to its end in a thread, so that it never waits for a reader."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._last: deque[str] = deque(maxlen=_LINES_KEPT)
        self._arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, name="spoken lines", daemon=True).start()

    def next(self, *, timeout_s: float) -> str | None:
        """The next line; None if the process has ended or the time is over."""
        try:
            return self._arrived.get(timeout=max(0.0, timeout_s))
        except queue.Empty:
            return None

    def wait_for(self, pattern: re.Pattern[str], *, timeout_s: float) -> re.Match[str] | None:
        """Where this pattern is first found; None if the process ends or the time is over."""
        give_up_at = time.monotonic() + timeout_s
        while (line := self.next(timeout_s=give_up_at - time.monotonic())) is not None:
            if found := pattern.search(line):
                return found
        return None

    @property
    def tail(self) -> str:
        """The last lines."""
        return "".join(self._last)

    def _read(self) -> None:
        # The stream is closed under the thread when its process is done with.
        with contextlib.suppress(ValueError, OSError):
            for raw in self._stream:
                line = raw.decode("utf-8", "replace")
                self._last.append(line)
                self._arrived.put(line)
        self._arrived.put(None)


def _await_address(process: subprocess.Popen[bytes], run_dir: Path, num_engines: int) -> str | None:
    """The gateway's address once all engines serve; None if that does not come about."""
    command = [*_CLI, "status", "--json", f"--run-dir={run_dir}"]
    give_up_at = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < give_up_at:
        answer = subprocess.run(command, capture_output=True, check=False, timeout=START_TIMEOUT_S)
        address = serving_address(answer.stdout, num_engines) if not answer.returncode else None
        if address is not None:
            return address
        time.sleep(0.2)
    return None


def serving_address(status_json: bytes, num_engines: int) -> str | None:
    """Read ``understudy status --json``: the gateway's address if all engines serve, else None."""
    try:
        status: Any = msgspec.json.decode(status_json)
        serving = sum(engine["state"] == "serving" for engine in status["engines"])
        addresses = [str(gateway["address"]) for gateway in status["gateways"]]
    except (msgspec.DecodeError, KeyError, TypeError):
        return None
    return addresses[0] if serving == num_engines and addresses and addresses[0] else None


def _stop(process: subprocess.Popen[Any]) -> None:
    """End the server in order, or by force: what it started ends with it."""
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def end_in_order_on_sigterm() -> None:
    """Let SIGTERM end this process through its contexts, so that it ends what it has started."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))


def stop_family(process: subprocess.Popen[bytes]) -> None:
    """End a process, in order or by force, and then what is left of its descendants."""
    family: dict[int, str] = {}
    for pid in _family(process.pid):
        with contextlib.suppress(OSError):
            family[pid] = _start_time(pid)
    _stop(process)
    for pid, start_time in family.items():
        # A process of another start time has come by the number since.
        with contextlib.suppress(OSError):
            if pid != process.pid and _start_time(pid) == start_time:
                os.kill(pid, signal.SIGKILL)


def _family(pid: int) -> list[int]:
    """A process and all its descendants, from /proc (proc(5))."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                children.setdefault(int(_stat(int(entry.name))[1]), []).append(int(entry.name))
    family = [pid]
    for member in family:
        family += children.get(member, [])
    return family


def _stat(pid: int) -> Sequence[str]:
    """The fields of /proc/<pid>/stat after the command's name: state, parent, ..."""
    text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    return text.rpartition(")")[2].split()


def _start_time(pid: int) -> str:
    return _stat(pid)[19]


def _cpu_s(pid: int) -> float:
    """User and system time of a process, in steps of 10 ms."""
    fields = _stat(pid)
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _role(pid: int) -> str:
    """What a process's command line calls it: one of ROLES, or ``other``."""
    words = Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").split("\0")
    return next((role for role in ROLES if role in words), "other")
