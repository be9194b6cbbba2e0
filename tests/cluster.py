"""A real cluster for tests: started by the command line, on the loopback, in its own directory.

The directory lies under /tmp whatever pytest uses: the path of a unix socket has 107 bytes. When
a test is done, the cluster is stopped and nothing of it may be left.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from understudy.protocol.messages import StatusReply
from understudy.protocol.status import EngineStatus
from understudy.runtime.kit.process import SUPERVISOR_LOCK, lock_holder
from understudy.tools.control import Report, State, look

WAIT_MAX_S: Final = 60.0
"""For a busy machine; nothing takes as long on an idle one."""

_POLL_S: Final = 0.05


class Cluster:
    """A launcher and what it started, or actors that a test starts one by one."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.log_path = run_dir.with_suffix(".log")
        self.processes: list[subprocess.Popen[bytes]] = []

    @property
    def launcher(self) -> subprocess.Popen[bytes]:
        """The process that was started first."""
        return self.processes[0]

    @property
    def base_url(self) -> str:
        """Where the gateway serves HTTP, without a path."""
        return f"http://{self.reply().gateways[0].address}"

    @property
    def log(self) -> str:
        """All that the processes said on stderr."""
        return self.log_path.read_text(encoding="utf-8", errors="replace")

    def start(
        self, command: str, *flags: str, environment: Mapping[str, str] | None = None
    ) -> None:
        """Start a command of ``understudy`` in this run directory."""
        with self.log_path.open("ab") as log:
            process = subprocess.Popen(
                self.command(command, *flags),
                env={**clean_environment(), **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.processes.append(process)

    def command(self, command: str, *flags: str) -> list[str]:
        """The words of a command in this run directory."""
        return [
            *(sys.executable, "-m", "understudy.tools.cli", command),
            *(f"--run-dir={self.run_dir}", *flags),
        ]

    def run(self, command: str, *flags: str) -> subprocess.CompletedProcess[str]:
        """Run a command of ``understudy`` to its end, in this run directory."""
        return run_understudy(*self.command(command, *flags)[3:])

    def report(self) -> Report:
        """How the cluster is now."""
        return look(self.run_dir)

    def reply(self) -> StatusReply:
        """What the supervisor says now."""
        reply = self.report().reply
        assert reply is not None, self.log
        return reply

    def engine(self, name: str) -> EngineStatus:
        """One engine as the supervisor sees it now."""
        return next(engine for engine in self.reply().engines if engine.name == name)

    def pids(self) -> dict[str, int]:
        """The processes of all actors, by name."""
        supervisor = lock_holder(self.run_dir / SUPERVISOR_LOCK)
        assert supervisor is not None
        assert supervisor.pid is not None
        return {"supervisor": supervisor.pid, **member_pids(self.report())}

    def wait_until(self, is_so: Callable[[Report], bool]) -> Report:
        """Wait until a report says what is expected."""
        deadline = time.monotonic() + WAIT_MAX_S
        while True:
            report = self.report()
            if is_so(report):
                return report
            assert time.monotonic() < deadline, f"{report}\n{self.log}"
            ended = [p.args for p in self.processes if p.poll() is not None]
            assert not ended, f"{ended} ended\n{self.log}"
            time.sleep(_POLL_S)

    def wait_until_serving(self, *, engines: int) -> None:
        """Wait until so many engines serve, and a gateway."""
        self.wait_until(
            lambda report: (
                report.state is State.SERVING
                and report.reply is not None
                and len(report.reply.engines) == engines
            )
        )

    def wait_for_end(self) -> int:
        """Wait for the launcher's end; gives its exit status."""
        return self.launcher.wait(WAIT_MAX_S)

    def stop(self) -> None:
        """Stop what still runs, and look that nothing is left."""
        for process in reversed(self.processes):
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes:
            process.wait(WAIT_MAX_S)
        self.wait_until_nothing_is_left()

    def wait_until_nothing_is_left(self) -> None:
        """Wait until no process of this run directory exists, nor one that is on its way out."""
        deadline = time.monotonic() + WAIT_MAX_S
        while self.leftovers() or self.report().state is not State.NOT_RUNNING:
            assert time.monotonic() < deadline, f"left over: {self.leftovers()}\n{self.log}"
            time.sleep(_POLL_S)

    def leftovers(self) -> dict[int, str]:
        """The command lines of processes that name this run directory."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                words = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue  # it ended in the meantime
            if str(self.run_dir) in words and int(entry.name) != os.getpid():
                found[int(entry.name)] = words.replace("\0", " ")
        return found

    def kill_leftovers(self) -> None:
        """Kill what a failed test left behind."""
        for process in self.processes:
            process.kill()
            process.wait()
        for pid in self.leftovers():
            os.kill(pid, signal.SIGKILL)


def member_pids(report: Report) -> dict[str, int]:
    """The processes of engines and gateways, by name, as a report has them."""
    if report.reply is None:
        return {}
    engines = {engine.name: engine.pid for engine in report.reply.engines}
    return engines | {gateway.name: gateway.pid for gateway in report.reply.gateways}


def clean_environment() -> dict[str, str]:
    """The environment without settings for understudy, and without this machine's files."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UNDERSTUDY_")}
    return kept | {"UNDERSTUDY_CONFIG": "/dev/null", "OMP_NUM_THREADS": "1"}


def run_understudy(
    *words: str, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run ``understudy`` with these words to its end."""
    return subprocess.run(
        [sys.executable, "-m", "understudy.tools.cli", *words],
        env={**clean_environment(), **(environment or {})},
        check=False,
        capture_output=True,
        text=True,
        timeout=2 * WAIT_MAX_S,
        stdin=subprocess.DEVNULL,
    )


@contextmanager
def empty_cluster() -> Iterator[Cluster]:
    """A run directory in which nothing runs yet."""
    run_dir = Path(tempfile.mkdtemp(prefix="understudy-test-", dir="/tmp"))
    cluster = Cluster(run_dir)
    try:
        yield cluster
        cluster.stop()
    finally:
        cluster.kill_leftovers()
        shutil.rmtree(run_dir, ignore_errors=True)
        cluster.log_path.unlink(missing_ok=True)


@contextmanager
def running_cluster(
    *flags: str,
    engines: int = 2,
    engine: str = "echo",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Cluster]:
    """A cluster that serves, on a free port."""
    with empty_cluster() as cluster:
        cluster.start(
            "start",
            f"--data-parallel-size={engines}",
            f"--engine={engine}",
            "--port=0",
            *flags,
            environment=environment,
        )
        cluster.wait_until_serving(engines=engines)
        yield cluster
