"""The processes: each actor with its loop, its mailbox and its signals, in the foreground.

Under systemd, from the launcher or by hand, an actor starts here. SIGTERM and SIGINT end it in
good order; the exit status is 0, or what the command line's table of statuses says.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import uvloop
import zmq

from understudy.actors.engine import Engine
from understudy.actors.gateway import Gateway
from understudy.actors.loading import load_runner
from understudy.actors.supervisor import Supervisor
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.messages import Dying
from understudy.runtime.config import EngineConfig, GatewayConfig, SupervisorConfig
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.kit.actor import SUPERVISOR, Send
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.loop import ActorLoop, StepLoop, send_all
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.log import get_logger
from understudy.runtime.scheduling.scheduler import SchedulerConfig
from understudy.runtime.settings import SUPERVISOR_SOCKET

T = TypeVar("T")

_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_supervisor(config: SupervisorConfig) -> int:
    """Run a supervisor until it is told to stop.

    Raises:
        ConfigurationError: its socket cannot be bound.
    """
    return _run(_serve_supervisor(config))


def run_gateway(config: GatewayConfig) -> int:
    """Run a gateway until it is told to stop and its streams have ended.

    Raises:
        ConfigurationError: its model directory or its address cannot be used.
    """
    return _run(_serve_gateway(config))


def run_engine(config: EngineConfig) -> int:
    """Run an engine until it is told to stop.

    Raises:
        ConfigurationError: its model cannot be loaded.
    """
    clock = MonotonicClock()
    engine = _make_engine(config, clock)
    identity = _identity(config.name)
    mailbox = Mailbox.connect(zmq.Context.instance(), _address(config.run_dir), identity)
    driver = Driver(engine, SessionTable(identity), clock)
    loop = StepLoop(driver, mailbox, engine)
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.stop())
    get_logger().info("engine is up", name=config.name, pid=os.getpid())
    loop.run()
    will = [Send(SUPERVISOR, Dying("told to stop"))]
    send_all(mailbox, driver.sessions.outgoing(list(will), clock.now()))
    mailbox.close()
    return 0


def incarnation() -> int:
    """A number that grows from one start of a process to the next on this machine."""
    return time.monotonic_ns() // 1_000_000


async def _serve_supervisor(config: SupervisorConfig) -> int:
    clock = MonotonicClock()
    supervisor = Supervisor(
        model=config.served_model_name,
        # Epochs grow from one supervisor to the next: there is room for a million of them in
        # each millisecond between two starts.
        first_epoch=incarnation() << 20,
        limits=AdmissionLimits(requests_max=config.queue_max),
        started_at=clock.now(),
    )
    try:
        mailbox = Mailbox.bind(zmq.Context.instance(), _address(config.run_dir))
    except zmq.ZMQError as error:
        raise ConfigurationError(f"{config.run_dir}: no socket can be bound: {error}") from error
    sessions = SessionTable(SUPERVISOR, fences=True)
    loop = ActorLoop(Driver(supervisor, sessions, clock), mailbox)
    get_logger().info("supervisor is up", run_dir=str(config.run_dir), pid=os.getpid())
    await _until_stopped(loop)
    loop.stop()
    return 0


async def _serve_gateway(config: GatewayConfig) -> int:
    # The HTTP server is imported here, so that a supervisor or an engine does not pay for it.
    from understudy.actors.http_generation import HttpLimits
    from understudy.actors.http_server import listen, serve_http
    from understudy.runtime.served_model import ServedModel

    served = ServedModel.from_directory(
        config.model,
        name=config.served_model_name,
        max_model_len=config.max_model_len,
    )
    listener = listen(config.host, config.port)
    host, port = listener.getsockname()[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    clock = MonotonicClock()
    gateway = Gateway(config.name, pid=os.getpid(), model=config.served_model_name, address=address)
    identity = _identity(config.name)
    mailbox = Mailbox.connect(zmq.Context.instance(), _address(config.run_dir), identity)
    loop = ActorLoop(Driver(gateway, SessionTable(identity), clock), mailbox)
    limits = HttpLimits(shutdown_timeout_s=config.shutdown_timeout_s)
    runner = await serve_http(
        gateway, loop.wake, served, listener=listener, clock=clock, limits=limits
    )
    get_logger().info("gateway is up", address=address, pid=os.getpid())
    await _until_stopped(loop)
    await runner.cleanup()
    loop.stop()
    return 0


def _make_engine(config: EngineConfig, clock: MonotonicClock) -> Engine:
    loaded = load_runner(config, clock)
    return Engine(
        config.name,
        pid=os.getpid(),
        model=config.served_model_name,
        scheduler_config=SchedulerConfig(
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_model_len=loaded.max_model_len,
            block_size=config.block_size,
        ),
        num_blocks=loaded.num_blocks,
        runner=loaded.runner,
        clock=clock,
    )


async def _until_stopped(loop: ActorLoop) -> None:
    """Wait for a signal to stop, or for the failure of the loop."""
    asked = asyncio.Event()
    for number in _STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    waits = {asyncio.ensure_future(asked.wait()), asyncio.ensure_future(loop.wait_stopped())}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    for wait in done:
        wait.result()


def _address(run_dir: Path) -> str:
    return f"ipc://{run_dir / SUPERVISOR_SOCKET}"


def _identity(name: str) -> str:
    return f"{name}.{incarnation()}"


def _run(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)
