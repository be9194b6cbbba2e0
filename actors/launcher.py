"""The launcher: starts the processes of one node, watches them, restarts them, and stops them.

What is started is data (``topology``); how it is kept alive is here. Under systemd the units take
the launcher's place. Knows nothing of requests.
"""

from __future__ import annotations

import dataclasses
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError, Unavailable
from understudy.protocol.messages import ProcessExited, StatusReply, StatusRequest
from understudy.runtime.config import (
    EngineConfig,
    GatewayConfig,
    LauncherConfig,
    SupervisorConfig,
    arguments_of,
)
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.children import Child, Exit, Watch, watch
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.kit.process import (
    LAUNCHER_LOCK,
    Lock,
    ProcessSpec,
    RestartPolicy,
    prepare_run_directory,
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


class Ready(NamedTuple):
    """The cluster serves."""

    address: str
    """``host:port`` of the gateway."""
    model: str
    engines: int


class StartFailed(Exception):
    """The cluster cannot serve, and everything was stopped again."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def topology(config: LauncherConfig) -> list[ProcessSpec]:
    """The processes of a node, in the order in which they start."""
    return [
        _supervisor_spec(config.supervisor),
        *map(_engine_spec, config.engines),
        _gateway_spec(config.gateway),
    ]


def run_launcher(config: LauncherConfig, *, on_ready: Callable[[Ready], None]) -> int:
    """Run a node until a signal stops it; gives the exit status.

    Raises:
        ConfigurationError: the run directory cannot be used.
        LockHeld: another launcher runs in it.
        StartFailed: a process cannot start; all others are stopped.
    """
    if config.gateway.port == 0:
        # A gateway that is started again must be found where the first one was, so the free port
        # is chosen here and not by each gateway anew.
        gateway = dataclasses.replace(config.gateway, port=_free_port(config.gateway.host))
        config = dataclasses.replace(config, gateway=gateway)
    prepare_run_directory(config.run_dir)
    lock = Lock.acquire(config.run_dir / LAUNCHER_LOCK, timeout_s=_LOCK_WAIT_S)
    try:
        with SupervisorClient(config.supervisor.socket) as client, watch() as watching:
            return Launcher(config, client, watching).run(on_ready)
    finally:
        lock.release()


class Launcher:
    """Keeps the processes of a node alive."""

    def __init__(self, config: LauncherConfig, client: SupervisorClient, watching: Watch) -> None:
        self._config = config
        self._client = client
        self._watch = watching
        self._log = get_logger()
        self._jitter = random.SystemRandom()
        supervisor, *engines, gateway = (
            Child(spec, last_words=_last_words_path(config.run_dir, spec.name))
            for spec in topology(config)
        )
        self._supervisor, self._engines, self._gateway = supervisor, engines, gateway
        self._children = [supervisor, *engines, gateway]
        self._is_ready = False

    def run(self, on_ready: Callable[[Ready], None]) -> int:
        """Start everything, keep it alive, and stop it when a signal comes."""
        try:
            for child in self._children:
                self._start(child)
            deadline = time.monotonic() + self._config.start_timeout_s
            while not self._watch.stop_signals:
                self._turn()
                if not self._is_ready:
                    self._look(deadline, on_ready)
        except StartFailed:
            self._stop()
            raise
        self._log.info("stopping")
        is_whole = not any(child.is_broken for child in self._children)
        return 0 if self._stop() and is_whole else ExitStatus.FAILED

    def _turn(self) -> None:
        """Wait for what comes next: an end, a signal, a restart that is due, the next look."""
        due = [child.restart_at for child in self._children if child.restart_at is not None]
        if not self._is_ready:
            due.append(time.monotonic() + _LOOK_EVERY_S)
        timeout_s = max(0.0, min(due) - time.monotonic()) if due else None
        for end in self._watch.wait(timeout_s):
            self._answer(end)
        now = time.monotonic()
        for child in self._children:
            is_due = child.restart_at is not None and child.restart_at <= now
            if is_due and not self._watch.stop_signals:
                self._start(child)

    def _start(self, child: Child) -> None:
        pid = self._watch.start(child)
        self._log.info("process started", process=child.spec.name, pid=pid)

    def _answer(self, end: Exit) -> None:
        """Decide what follows from the end of a process.

        Raises:
            StartFailed: it stays down, and nothing can be served without it.
        """
        child, name, words = end.child, end.child.spec.name, end.child.last_words()
        is_hopeless = end.status in _HOPELESS
        if is_hopeless and not self._is_ready:
            raise StartFailed(end.status, words or f"{name} ended with status {end.status}")
        now, delay_s, restarts = time.monotonic(), None, child.history.restarts
        if not is_hopeless:
            delay_s = child.history.delay_after_death(now, jitter=self._jitter.random())
        self._log.warning("process ended", process=name, status=end.status, restart_in_s=delay_s)
        if child is not self._supervisor:
            # The supervisor would find out by a missing heartbeat, only later.
            told = ProcessExited(name, end.pid, end.status, restarts)
            self._client.send(told, timeout_s=_TELL_WITHIN_S)
        if delay_s is not None:
            child.restart_at = now + delay_s
            return
        child.is_broken = True
        words = words or f"{name} died too often; it last ended with status {end.status}"
        if child not in self._engines or all(engine.is_broken for engine in self._engines):
            raise StartFailed(ExitStatus.FAILED, words)
        self._log.error("process stays down", process=name, reason=words)

    def _look(self, deadline: float, on_ready: Callable[[Ready], None]) -> None:
        """Ask the supervisor whether a gateway and every engine that can come have come."""
        if time.monotonic() >= deadline:
            limit_s = self._config.start_timeout_s
            raise StartFailed(ExitStatus.UNAVAILABLE, f"not ready after {limit_s:g} s: giving up")
        try:
            reply = self._client.request(StatusRequest(), StatusReply, timeout_s=_ANSWER_WITHIN_S)
        except Unavailable:
            return
        serving = sum(engine.state == "serving" for engine in reply.engines)
        wanted = sum(not engine.is_broken for engine in self._engines)
        addresses = [gateway.address for gateway in reply.gateways if gateway.address]
        if serving < wanted or not addresses:
            return
        self._is_ready = True
        on_ready(Ready(addresses[0], reply.model, serving))

    def _stop(self) -> bool:
        """End the processes, those first that take work in; whether all ended by themselves."""
        streams_s = self._config.shutdown_timeout_s
        is_clean = self._watch.stop([self._gateway], limit_s=streams_s + _END_WITHIN_S)
        is_clean &= self._watch.stop(self._engines, limit_s=_END_WITHIN_S)
        is_clean &= self._watch.stop([self._supervisor], limit_s=_END_WITHIN_S)
        if not is_clean:
            self._log.warning("killed what had not ended in time")
        return is_clean


def _free_port(host: str) -> int:
    """A port of this host that nobody listens on."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            return int(probe.getsockname()[1])
    except OSError as error:
        raise ConfigurationError(f"cannot listen on {host}:0: {error}") from error


def _supervisor_spec(config: SupervisorConfig) -> ProcessSpec:
    return _spec("supervisor", "supervisor", arguments_of(config))


def _gateway_spec(config: GatewayConfig) -> ProcessSpec:
    return _spec(config.name, "gateway", arguments_of(config))


def _engine_spec(config: EngineConfig) -> ProcessSpec:
    # OpenMP reads its variable once, when torch is loaded: later it is too late to ask for less.
    environment = {} if config.threads is None else {"OMP_NUM_THREADS": str(config.threads)}
    return _spec(config.name, "engine", arguments_of(config), environment)


def _spec(
    name: str,
    role: str,
    arguments: list[str],
    environment: Mapping[str, str] = MappingProxyType({}),
) -> ProcessSpec:
    # -P keeps the working directory off the module path: a stray file there is no module of ours.
    command = (sys.executable, "-P", "-m", "understudy.tools.cli", role)
    return ProcessSpec(
        name=name,
        argv=(*command, *arguments),
        environment=environment,
        restart=RestartPolicy(),
    )


def _last_words_path(run_dir: Path, name: str) -> Path:
    return run_dir / f"{name}.error"
