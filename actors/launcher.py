"""The launcher: starts the processes of one node, watches them, restarts them, and stops them.

What is started is data (``topology``); how it is kept alive is here. Under systemd the units take
the launcher's place. Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from understudy.actors.rolling_restart import RestartFailed, Steps, restart_all
from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import ProcessExited, StatusReply, StatusRequest
from understudy.runtime.config import (
    EngineConfig,
    GatewayConfig,
    LauncherConfig,
    SupervisorConfig,
    arguments_of,
    environment_of,
)
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.children import Child, Exit, Watch, watch
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.kit.control_socket import Caller, ControlSocket
from understudy.runtime.kit.listening import address_of, open_listener
from understudy.runtime.kit.process import (
    LAUNCHER_LOCK,
    LAUNCHER_SOCKET,
    SUPERVISOR_LOCK,
    TIRELESS,
    WAVES_MAX,
    Death,
    Lock,
    ProcessSpec,
    RestartPolicy,
    has_open,
    prepare_run_directory,
    waves_of_death,
)
from understudy.runtime.log import get_logger

_HOPELESS: Final = frozenset({ExitStatus.UNAVAILABLE, ExitStatus.CONFIG})
"""Exit statuses that say: another start would end the same way."""

_LOCK_WAIT_S: Final = 1.0
_LOOK_EVERY_S: Final = 0.05
_ANSWER_WITHIN_S: Final = 0.25
_TELL_WITHIN_S: Final = 0.25
_END_WITHIN_S: Final = 5.0
"""What a process gets to end, beside the time for its streams, before it is killed."""
_RETELL_EVERY_S: Final = 5.0
_DEATHS_KEPT: Final = 256

RESTART: Final = "restart"
"""The command that asks for a rolling restart."""


class Ready(NamedTuple):
    """The cluster serves."""

    address: str
    """``host:port`` on which gateways accept."""
    model: str
    engines: int


class StartFailed(Exception):
    """The cluster cannot serve, and everything was stopped again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def topology(config: LauncherConfig, *, listen_fd: int) -> list[ProcessSpec]:
    """The processes of a node, in the order in which they start.

    ``listen_fd`` is the socket that gateways accept on; they inherit it. It is one for all of them,
    so that no connection waits for a gateway that is dead while another could accept it.
    """
    return [
        _supervisor_spec(config.supervisor),
        *map(_engine_spec, config.engines),
        *(_gateway_spec(gateway, listen_fd) for gateway in config.gateways),
    ]


def run_launcher(config: LauncherConfig, *, on_ready: Callable[[Ready], None]) -> int:
    """Run a node until a signal stops it; gives the exit status.

    Raises:
        ConfigurationError: the run directory or the address to listen on cannot be used.
        LockHeld: another launcher runs in it.
        StartFailed: a process cannot start; all others are stopped.
    """
    prepare_run_directory(config.run_dir)
    lock = Lock.acquire(config.run_dir / LAUNCHER_LOCK, timeout_s=_LOCK_WAIT_S)
    try:
        with (
            open_listener(config.gateways[0].host, config.gateways[0].port) as listener,
            ControlSocket(config.run_dir / LAUNCHER_SOCKET) as control,
            SupervisorClient(config.supervisor.socket) as client,
            watch() as watching,
        ):
            watching.attend(control.socket)
            return Launcher(config, listener, control, client, watching).run(on_ready)
    finally:
        lock.release()


class Launcher:
    """Keeps the processes of a node alive."""

    def __init__(
        self,
        config: LauncherConfig,
        listener: socket.socket,
        control: ControlSocket,
        client: SupervisorClient,
        watching: Watch,
    ) -> None:
        self._config = config
        self._listener = listener
        self._control = control
        self._client = client
        self._watch = watching
        self._log = get_logger()
        self._jitter = random.SystemRandom()
        # A gateway started by itself, or again, must be found where the first one was.
        port = listener.getsockname()[1]
        gateways = tuple(dataclasses.replace(gateway, port=port) for gateway in config.gateways)
        self._gateway_config = gateways[0]
        specs = topology(
            dataclasses.replace(config, gateways=gateways), listen_fd=listener.fileno()
        )
        self.supervisor, *members = map(self._child, specs)
        self.engines = members[: len(config.engines)]
        self.gateways = members[len(config.engines) :]
        self._without_part: dict[Child, float] = {}
        """Processes that may end without a consequence, and when they are killed if they do not."""
        self._replaced: Child | None = None
        """Another process is about to take its place: it is not started again meanwhile."""
        self._deaths: deque[Death] = deque(maxlen=_DEATHS_KEPT)
        self._is_given_up = False
        self._retell_at = math.inf
        self._restart: Steps | None = None
        self._caller: Caller | None = None
        self._is_ready = False

    @property
    def children(self) -> list[Child]:
        """The processes that have a part, and are kept alive."""
        return [self.supervisor, *self.engines, *self.gateways]

    def run(self, on_ready: Callable[[Ready], None]) -> int:
        """Start everything, keep it alive, and stop it when a signal comes."""
        try:
            for child in self.children:
                self._start(child)
            deadline = time.monotonic() + self._config.start_timeout_s
            while not self._watch.stop_signals:
                self._turn()
                if not self._is_ready:
                    self._look(deadline, on_ready)
        except StartFailed as error:
            self._end_restart(error.status, str(error))
            self._stop()
            raise
        self._log.info("stopping")
        self._end_restart(ExitStatus.FAILED, "the node is stopping")
        is_whole = not any(child.is_broken for child in self.children)
        return 0 if self._stop() and is_whole else ExitStatus.FAILED

    def _turn(self) -> None:
        """Wait for what comes next: an end, a signal, a command, a time that is due."""
        due = [child.restart_at for child in self.children if child.restart_at is not None]
        due += [*self._without_part.values(), self._retell_at]
        if not self._is_ready or self._restart is not None:
            due.append(time.monotonic() + _LOOK_EVERY_S)
        first = min(due)
        for end in self._watch.wait(
            None if first == math.inf else max(0.0, first - time.monotonic())
        ):
            self._answer(end)
        if self._watch.stop_signals:
            return
        now = time.monotonic()
        for child in self.children:
            if child.restart_at is not None and child.restart_at <= now:
                self._start(child)
        for child, kill_at in list(self._without_part.items()):
            if kill_at <= now:
                self._without_part[child] = math.inf
                child.send_signal(signal.SIGKILL)
        if self._retell_at <= now:
            self._tell_broken(now)
        self._take_command()
        self._step_restart()

    def _start(self, child: Child) -> None:
        pid = self._watch.start(child)
        self._log.info("process started", process=child.spec.name, pid=pid)

    def _answer(self, end: Exit) -> None:
        """Decide what follows from the end of a process.

        Raises:
            StartFailed: it stays down, and nothing can be served without it.
        """
        child, name, words = end.child, end.child.spec.name, end.child.last_words()
        if child in self._without_part:
            del self._without_part[child]
            self._log.info("process ended as intended", process=name, status=end.status)
            self._tell_exited(end, child.history.restarts)
            return
        if child is self._replaced:
            self._log.warning("process ended before it was replaced", process=name)
            self._tell_exited(end, child.history.restarts)
            return
        is_hopeless = end.status in _HOPELESS
        if is_hopeless and not self._is_ready:
            raise StartFailed(end.status, words or f"{name} ended with status {end.status}")
        now, delay_s, restarts = time.monotonic(), None, child.history.restarts
        if child in self.engines:
            self._note_death(name, now)
        if not is_hopeless and not (self._is_given_up and child in self.engines):
            delay_s = child.history.delay_after_death(now, jitter=self._jitter.random())
        self._log.warning("process ended", process=name, status=end.status, restart_in_s=delay_s)
        self._tell_exited(end, restarts)
        if delay_s is not None:
            child.restart_at = now + delay_s
            return
        often = "together with most engines" if self._is_given_up else "too often"
        words = words or f"{name} died {often}; it last ended with status {end.status}"
        self._leave_down(child, words, now)

    def _leave_down(self, child: Child, reason: str, now: float) -> None:
        """A process is not started any more."""
        child.is_broken = True
        child.restart_at = None
        if child not in self.engines or all(engine.is_broken for engine in self.engines):
            raise StartFailed(ExitStatus.FAILED, reason)
        self._log.error("process stays down", process=child.spec.name, reason=reason)
        self._tell_broken(now)

    def _note_death(self, name: str, now: float) -> None:
        """Start no engine any more if most of them died together once too often."""
        self._deaths.append(Death(name, now))
        waves = waves_of_death(self._deaths, len(self.engines))
        if waves < WAVES_MAX or self._is_given_up:
            return
        self._is_given_up = True
        self._log.critical(
            "most engines died together again and again: no engine is started any more. Look for"
            " what they share (machine, model, driver), then: understudy restart --rolling",
            times=waves,
        )
        for engine in self.engines:
            if engine.restart_at is not None:
                self._leave_down(engine, "engines died together", now)

    def _tell_exited(self, end: Exit, restarts: int) -> None:
        """The supervisor would find out by a missing heartbeat, only later."""
        if end.child.spec.name != self.supervisor.spec.name:
            told = ProcessExited(end.child.spec.name, end.pid, end.status, restarts)
            self._client.send(told, timeout_s=_TELL_WITHIN_S)

    def _tell_broken(self, now: float) -> None:
        """Tell who stays down; again and again, for a new supervisor does not know it."""
        broken = [engine for engine in self.engines if engine.is_broken]
        for engine in broken:
            told = ProcessExited(
                engine.spec.name, engine.pid or 0, 0, engine.history.restarts, is_broken=True
            )
            self._client.send(told, timeout_s=_TELL_WITHIN_S)
        self._retell_at = now + _RETELL_EVERY_S if broken else math.inf

    def _look(self, deadline: float, on_ready: Callable[[Ready], None]) -> None:
        """Ask the supervisor whether every engine and gateway that can come has come."""
        if time.monotonic() >= deadline:
            limit_s = self._config.start_timeout_s
            raise StartFailed(ExitStatus.UNAVAILABLE, f"not ready after {limit_s:g} s: giving up")
        reply = self.reply()
        if reply is None:
            return
        serving = sum(engine.state == "serving" for engine in reply.engines)
        accepting = sum(bool(gateway.address) for gateway in reply.gateways)
        if serving < _unbroken(self.engines) or accepting < _unbroken(self.gateways):
            return
        self._is_ready = True
        for child in self.children:
            if child not in self.engines:
                child.history.follow(TIRELESS)
        on_ready(Ready(address_of(self._listener), reply.model, serving))

    # What a rolling restart does with a node

    def reply(self) -> StatusReply | None:
        """See ``Node``."""
        try:
            return self._client.request(StatusRequest(), StatusReply, timeout_s=_ANSWER_WITHIN_S)
        except Unavailable:
            return None

    def waits_for_lock(self, supervisor: Child) -> bool:
        """See ``Node``."""
        lock = self._config.run_dir / SUPERVISOR_LOCK
        return supervisor.pid is not None and has_open(supervisor.pid, lock)

    def start_beside(self, child: Child) -> Child:
        """See ``Node``."""
        spec = child.spec
        if child in self.gateways:
            # Of two members of one name, only the later counts; here both have streams.
            taken = {gateway.spec.name for gateway in self.gateways}
            names = (f"gateway-{index}" for index in itertools.count())
            name = next(name for name in names if name not in taken)
            config = dataclasses.replace(self._gateway_config, name=name)
            spec = _gateway_spec(config, self._listener.fileno())
        new = self._child(spec)
        if child not in self.engines:
            new.history.follow(TIRELESS)
        self._start(new)
        self._without_part[new] = math.inf
        self._replaced = child
        return new

    def replace(self, old: Child, new: Child) -> None:
        """See ``Node``."""
        streams_s = self._config.shutdown_timeout_s if old in self.gateways else 0.0
        del self._without_part[new]
        self._replaced = None
        if old is self.supervisor:
            self.supervisor = new
        else:
            part = self.gateways if old in self.gateways else self.engines
            part[part.index(old)] = new
        old.restart_at = None
        if old.process is not None:
            self._without_part[old] = time.monotonic() + streams_s + _END_WITHIN_S
            old.send_signal(signal.SIGTERM)

    def give_up(self, new: Child, old: Child) -> None:
        """See ``Node``."""
        self._log.warning("not replaced", process=old.spec.name, pid=old.pid)
        now, self._replaced = time.monotonic(), None
        if new.process is not None:
            self._without_part[new] = now
        else:
            self._without_part.pop(new, None)
        if old.process is None and not old.is_broken:
            old.restart_at = now

    def _take_command(self) -> None:
        caller = self._control.accept()
        if caller is None:
            return
        if caller.command != RESTART:
            caller.end(ExitStatus.USAGE, f"unknown command {caller.command!r}")
        elif self._restart is not None:
            caller.end(ExitStatus.TRY_AGAIN, "a restart is under way already")
        elif not self._is_ready:
            caller.end(ExitStatus.TRY_AGAIN, "the node is still starting")
        else:
            self._log.info("rolling restart")
            limit_s = self._config.start_timeout_s
            self._caller = caller
            self._restart = restart_all(self, limit_s=limit_s, now=time.monotonic)

    def _step_restart(self) -> None:
        """Go on with the restart that is under way, as far as it can go now."""
        if self._restart is None or self._caller is None:
            return
        try:
            for line in self._restart:
                if line is None:
                    return
                self._log.info("rolling restart", step=line)
                self._caller.say(line)
        except RestartFailed as error:
            self._log.error("rolling restart failed", reason=str(error))
            self._end_restart(ExitStatus.FAILED, str(error))
        else:
            self._is_given_up = False
            self._deaths.clear()
            self._end_restart(ExitStatus.DONE, "every process was replaced")

    def _end_restart(self, status: int, line: str) -> None:
        if self._caller is not None:
            self._caller.end(status, line)
        self._restart = self._caller = None

    def _stop(self) -> bool:
        """End the processes, those first that take work in; whether all ended by themselves."""
        # Nobody accepts any more, so nobody is left to wait in the queue.
        self._listener.close()
        others = [child for child in self._without_part if child.process is not None]
        streams_s = self._config.shutdown_timeout_s
        gateways = [child for child in others if "gateway" in child.spec.argv]
        gateways += self.gateways
        is_clean = self._watch.stop(gateways, limit_s=streams_s + _END_WITHIN_S)
        is_clean &= self._watch.stop([*self.engines, *others], limit_s=_END_WITHIN_S)
        is_clean &= self._watch.stop([self.supervisor], limit_s=_END_WITHIN_S)
        if not is_clean:
            self._log.warning("killed what had not ended in time")
        return is_clean

    def _child(self, spec: ProcessSpec) -> Child:
        return Child(spec, last_words=_last_words_path(self._config.run_dir, spec.name))


def _supervisor_spec(config: SupervisorConfig) -> ProcessSpec:
    return _spec("supervisor", "supervisor", arguments_of(config))


def _gateway_spec(config: GatewayConfig, listen_fd: int) -> ProcessSpec:
    arguments = [*arguments_of(config), f"--listen-fd={listen_fd}"]
    return _spec(
        config.name, "gateway", arguments, environment_of(config), descriptors=(listen_fd,)
    )


def _engine_spec(config: EngineConfig) -> ProcessSpec:
    # OpenMP reads its variable once, when torch is loaded: later it is too late to ask for less.
    environment = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    return _spec(config.name, "engine", arguments_of(config), environment)


def _spec(
    name: str,
    role: str,
    arguments: list[str],
    environment: Mapping[str, str] = MappingProxyType({}),
    descriptors: tuple[int, ...] = (),
) -> ProcessSpec:
    # -P keeps the working directory off the module path: a stray file there is no module of ours.
    command = (sys.executable, "-P", "-m", "understudy.tools.cli", role)
    return ProcessSpec(
        name=name,
        argv=(*command, *arguments),
        environment=environment,
        restart=RestartPolicy(),
        descriptors=descriptors,
    )


def _unbroken(children: list[Child]) -> int:
    return sum(not child.is_broken for child in children)


def _last_words_path(run_dir: Path, name: str) -> Path:
    return run_dir / f"{name}.error"
