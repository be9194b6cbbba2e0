"""A gateway's process."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Final

import zmq

from understudy.actors.gateway import NOBODY, Gateway
from understudy.actors.http_admin import admin_socket, serve_admin
from understudy.actors.http_answers import HttpLimits
from understudy.actors.http_server import serve_http, stop_http
from understudy.actors.process import (
    address_in,
    identity_of,
    run,
    settle,
    tell_dropped,
    until_stopped,
)
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.config import GatewayConfig
from understudy.runtime.keys import KeyWatch
from understudy.runtime.kit.clock import MonotonicClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.listening import address_of, open_listener
from understudy.runtime.kit.loop import ActorLoop
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.kit.tls import Certificate
from understudy.runtime.log import get_logger
from understudy.runtime.served_model import ServedModel

TOLD_WITHIN_S: Final = 2.0
"""A gateway that has heard of no engine by then says so itself to whoever calls."""

_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})
_LOOK_EVERY_S: Final = 0.01


def run_gateway(config: GatewayConfig, *, listen_fd: int | None = None) -> int:
    """Run a gateway until it is told to stop and its streams have ended.

    Args:
        config: What it must know. Host and port do not matter if a socket is passed to it, by
            ``listen_fd`` or by systemd.
        listen_fd: A listening socket that this process has inherited.

    Raises:
        ConfigurationError: its model directory or its address cannot be used.
    """
    return run(_serve_gateway(config, listen_fd))


async def _serve_gateway(config: GatewayConfig, listen_fd: int | None) -> int:
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
    identity = identity_of(config.name)
    mailbox = Mailbox.connect(zmq.Context.instance(), address_in(config.run_dir), identity)
    sessions = SessionTable(identity)
    loop = ActorLoop(Driver(gateway, sessions, clock), mailbox)
    stopped = asyncio.ensure_future(until_stopped(loop))  # it may be told to while it starts
    await _until_told(gateway, clock)
    keys = KeyWatch(config.key_file, config.api_key, now=clock.now, complain=get_logger().error)
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
    settle()
    get_logger().info("gateway is up", address=address, pid=os.getpid())
    await stopped
    await admin.cleanup()
    await stop_http(runner)
    loop.stop()
    tell_dropped(sessions, mailbox)
    return 0


def _certificate(config: GatewayConfig) -> Certificate | None:
    chain, key = config.tls_certificate, config.tls_key
    if chain is None and key is None:
        return None
    if chain is None or key is None:
        raise ConfigurationError("tls-certificate and tls-key belong together: give both")
    return Certificate(chain, key, get_logger().error)


async def _until_told(gateway: Gateway, clock: MonotonicClock) -> None:
    """Wait a little until a gateway knows who serves: until then clients wait in the queue."""
    give_up_at = clock.now() + TOLD_WITHIN_S
    while gateway.cluster is NOBODY and clock.now() < give_up_at:  # noqa: ASYNC110 - knows no loop
        await asyncio.sleep(_LOOK_EVERY_S)
