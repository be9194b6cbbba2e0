"""The processes: each actor with its loop, its mailbox and its signals, in the foreground.

Under systemd, from the launcher or by hand, an actor starts here. SIGTERM and SIGINT end it in
good order; the exit status is 0, or what the command line's table of statuses says.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop
import zmq

from understudy.actors.engine import Engine, engine_hello
from understudy.actors.gateway import NOBODY, Gateway
from understudy.actors.loading import load_runner
from understudy.actors.supervisor import Supervisor, restored_entries
from understudy.protocol.errors import ConfigurationError
from understudy.protocol.messages import Dying
from understudy.runtime.config import EngineConfig, GatewayConfig, SupervisorConfig
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.keys import KeyWatch
from understudy.runtime.kit.actor import SUPERVISOR, Send
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.listening import address_of, open_listener
from understudy.runtime.kit.loop import ActorLoop, StepLoop, send_all
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.probe import ProcProbe
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.kit.stage import FileStepCard, NodeStage, card_path
from understudy.runtime.kit.tls import Certificate
from understudy.runtime.log import get_logger
from understudy.runtime.scheduling.scheduler import SchedulerConfig
from understudy.runtime.settings import SUPERVISOR_SOCKET
from understudy.runtime.storage.convicts import ConvictDirectory
from understudy.runtime.storage.disk import OsDisk
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.records import Epoch
from understudy.runtime.storage.segment_writer import SyncPolicy

T = TypeVar("T")

TOLD_WITHIN_S: Final = 2.0
"""A gateway that has heard of no engine by then says so itself to whoever calls."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_DAY_S: Final = 86_400
_LOOK_EVERY_S: Final = 0.01
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


def run_supervisor(config: SupervisorConfig) -> int:
    """Run a supervisor until it is told to stop.

    Raises:
        ConfigurationError: its socket cannot be bound.
    """
    return _run(_serve_supervisor(config))


def run_gateway(config: GatewayConfig, *, listen_fd: int | None = None) -> int:
    """Run a gateway until it is told to stop and its streams have ended.

    Args:
        config: What it must know. Host and port do not matter if a socket is passed to it, by
            ``listen_fd`` or by systemd.
        listen_fd: A listening socket that this process has inherited.

    Raises:
        ConfigurationError: its model directory or its address cannot be used.
    """
    return _run(_serve_gateway(config, listen_fd))


def run_engine(config: EngineConfig) -> int:
    """Run an engine until it is told to stop.

    Raises:
        ConfigurationError: its model cannot be loaded.
    """
    clock = MonotonicClock()
    identity = _identity(config.name)
    engine = _make_engine(config, identity, clock)
    mailbox = Mailbox.connect(zmq.Context.instance(), _address(config.run_dir), identity)
    sessions = SessionTable(identity)
    driver = Driver(engine, sessions, clock)
    loop = StepLoop(driver, mailbox, engine)
    for number in _STOP_SIGNALS:
        signal.signal(number, lambda *_: loop.stop())
    _settle()
    get_logger().info("engine is up", name=config.name, pid=os.getpid())
    reason = "told to stop"
    try:
        loop.run()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        raise
    finally:
        # The last will: whoever reads it need not wait for the silence.
        will = driver.sessions.outgoing([Send(SUPERVISOR, Dying(reason))], clock.now())
        send_all(mailbox, will)
        mailbox.close()
        _tell_dropped(sessions, mailbox)
    return 0


def incarnation() -> int:
    """A number that grows from one start of a process to the next on this machine."""
    return time.monotonic_ns() // 1_000_000


async def _serve_supervisor(config: SupervisorConfig) -> int:
    clock = MonotonicClock()
    config.journal_dir.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    options = JournalOptions(policy=SyncPolicy(config.journal_sync))
    journal, recovery = Journal.open(OsDisk(config.journal_dir), options, clock.now())
    for damage in recovery.damage:
        get_logger().error("the journal is damaged", what=str(damage))
    # Epochs grow from one supervisor to the next, and from one start of the machine to the next:
    # there is room for a million of them in each millisecond between two starts.
    first_epoch = max(incarnation() << 20, recovery.epoch + 1)
    journal.append([Epoch(first_epoch + (1 << 20))])
    probe = ProcProbe()
    convicts = ConvictDirectory(config.quarantine_dir)
    supervisor = Supervisor(
        model=config.served_model_name,
        first_epoch=first_epoch,
        journal=journal,
        probe=probe,
        stage=NodeStage(config.run_dir, probe, convicts),
        limits=AdmissionLimits(requests_max=config.queue_max),
        started_at=clock.now(),
        policy_of=_watch_keys(config.key_file, None, clock).policy_of,
        today=lambda: int(time.time() // _DAY_S),
    )
    supervisor.restore(restored_entries(journal, recovery), clock.now(), recovery.usage)
    for fingerprint in convicts.fingerprints():
        supervisor.dispatcher.quarantine.convict(fingerprint, clock.now())
    try:
        mailbox = Mailbox.bind(zmq.Context.instance(), _address(config.run_dir))
    except zmq.ZMQError as error:
        raise ConfigurationError(f"{config.run_dir}: no socket can be bound: {error}") from error
    sessions = SessionTable(SUPERVISOR, fences=True)
    loop = ActorLoop(Driver(supervisor, sessions, clock), mailbox)
    _settle()
    get_logger().info("supervisor is up", run_dir=str(config.run_dir), pid=os.getpid())
    await _until_stopped(loop)
    loop.stop()
    _tell_dropped(sessions, mailbox)
    journal.close(clock.now())
    return 0


async def _serve_gateway(config: GatewayConfig, listen_fd: int | None) -> int:
    # The HTTP server is imported here, so that a supervisor or an engine does not pay for it.
    from understudy.actors.http_admin import admin_socket, serve_admin
    from understudy.actors.http_answers import HttpLimits
    from understudy.actors.http_server import serve_http, stop_http
    from understudy.runtime.served_model import ServedModel

    served = ServedModel.from_directory(
        config.model,
        name=config.served_model_name,
        max_model_len=config.max_model_len,
        tool_parser=config.tool_call_parser,
        reasoning_parser=config.reasoning_parser,
    )
    listener = open_listener(config.host, config.port, listen_fd)
    address = address_of(listener)
    clock = MonotonicClock()
    gateway = Gateway(config.name, pid=os.getpid(), model=config.served_model_name, address=address)
    identity = _identity(config.name)
    mailbox = Mailbox.connect(zmq.Context.instance(), _address(config.run_dir), identity)
    sessions = SessionTable(identity)
    loop = ActorLoop(Driver(gateway, sessions, clock), mailbox)
    stopped = asyncio.ensure_future(_until_stopped(loop))  # it may be told to while it starts
    await _until_told(gateway, clock)
    keys = _watch_keys(config.key_file, config.api_key, clock)
    certificate = _certificate(config)
    if not (keys.asks_for_keys or config.host in _LOOPBACK):
        get_logger().warning("anybody may call: there are no keys", address=address)
    runner = await serve_http(
        gateway,
        loop.wake,
        served,
        listener=listener,
        clock=clock,
        limits=HttpLimits(
            shutdown_timeout_s=config.shutdown_timeout_s,
            connections_per_address=config.connections_per_address,
        ),
        find_key=keys.find if keys.asks_for_keys else None,
        certificate=certificate,
    )

    def reload() -> None:
        keys.reload()
        if certificate is not None:
            certificate.reload()

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reload)
    admin = await serve_admin(gateway, loop.wake, admin_socket(config.run_dir, config.name))
    _settle()
    get_logger().info("gateway is up", address=address, pid=os.getpid())
    await stopped
    await admin.cleanup()
    await stop_http(runner)
    loop.stop()
    _tell_dropped(sessions, mailbox)
    return 0


def _certificate(config: GatewayConfig) -> Certificate | None:
    chain, key = config.tls_certificate, config.tls_key
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise ConfigurationError("tls-certificate and tls-key belong together: give both")
    return Certificate(chain, key, get_logger().error)


def _watch_keys(path: Path | None, api_key: str | None, clock: MonotonicClock) -> KeyWatch:
    return KeyWatch(path, api_key, now=clock.now, complain=get_logger().error)


def _make_engine(config: EngineConfig, identity: str, clock: MonotonicClock) -> Engine:
    loaded = load_runner(config, clock)
    scheduler_config = SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=loaded.max_model_len,
        block_size=config.block_size,
    )
    hello = engine_hello(
        config.name,
        pid=os.getpid(),
        start_time=ProcProbe().start_time(os.getpid()),
        model=config.served_model_name,
        numerics=loaded.numerics,
        scheduler_config=scheduler_config,
        num_blocks=loaded.num_blocks,
        pools_only=loaded.pools_only,
    )
    return Engine(
        hello,
        scheduler_config=scheduler_config,
        num_blocks=loaded.num_blocks,
        # What a token's state is depends on all that follows it where nothing is generated.
        enable_prefix_caching=config.enable_prefix_caching and not loaded.pools_only,
        speculator=loaded.speculator,
        runner=loaded.runner,
        card=FileStepCard(card_path(config.run_dir, config.name), identity),
        clock=clock,
    )


def _settle() -> None:
    """What there is by now lasts as long as the process: look for no garbage in it again.

    Full collections of it took 25 to 115 ms, in which no token moved.
    """
    gc.collect()
    gc.freeze()


def _tell_dropped(sessions: SessionTable, mailbox: Mailbox) -> None:
    """Say at the end how much came that was no message of anybody who may speak here."""
    malformed = sessions.malformed + mailbox.misshapen
    if malformed:
        get_logger().warning("frames were dropped", malformed=malformed, stale=sessions.stale)


async def _until_told(gateway: Gateway, clock: MonotonicClock) -> None:
    """Wait a little until a gateway knows who serves: until then clients wait in the queue."""
    give_up_at = clock.now() + TOLD_WITHIN_S
    while gateway.cluster is NOBODY and clock.now() < give_up_at:  # noqa: ASYNC110 - knows no loop
        await asyncio.sleep(_LOOK_EVERY_S)


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
