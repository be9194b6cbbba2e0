"""What every actor's process shares: its signals, its loop, its name and its end.

An actor runs in the foreground, under systemd, from the launcher or by hand; SIGTERM and SIGINT
end it in good order. ``supervisor_process``, ``gateway_process`` and ``engine_process`` build the
actors; each imports only what its own actor needs, since imports are most of a start.
"""

from __future__ import annotations

import asyncio
import gc
import signal
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from understudy.runtime.kit.loop import ActorLoop
from understudy.runtime.kit.mailbox import Mailbox
from understudy.runtime.kit.session import SessionTable
from understudy.runtime.log import get_logger
from understudy.runtime.settings import SUPERVISOR_SOCKET

T = TypeVar("T")

STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
COLLECT_AFTER: Final = (700, 10, 1000)
"""Containers made and not freed, young collections, middle ones: when the next kind is due."""


def incarnation() -> int:
    """A number that grows from one start of a process to the next on this machine."""
    return time.monotonic_ns() // 1_000_000


def identity_of(name: str) -> str:
    """What an actor is called on the bus, this time."""
    return f"{name}.{incarnation()}"


def address_in(run_dir: Path) -> str:
    """Where the supervisor of a run directory is found."""
    return f"ipc://{run_dir / SUPERVISOR_SOCKET}"


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on a fast loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(main)


async def until_stopped(loop: ActorLoop) -> None:
    """Wait for a signal to stop, or for the failure of the loop."""
    asked = asyncio.Event()
    for number in STOP_SIGNALS:
        asyncio.get_running_loop().add_signal_handler(number, asked.set)
    waits = {asyncio.ensure_future(asked.wait()), asyncio.ensure_future(loop.wait_stopped())}
    done, pending = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in pending:
        wait.cancel()
    for wait in done:
        wait.result()


def settle() -> None:
    """What there is by now lasts as long as the process: look for no garbage in it again.

    And seldom in all the rest. A full collection took 20 to 115 ms, in which no token moved, and
    came every two seconds with 500 streams; what calls take is freed without one, when they end.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*COLLECT_AFTER)
    gc.enable()


def tell_dropped(sessions: SessionTable, mailbox: Mailbox) -> None:
    """Say at the end how much came that was no message of anybody who may speak here."""
    malformed = sessions.malformed + mailbox.misshapen
    if malformed:
        get_logger().warning("frames were dropped", malformed=malformed, stale=sessions.stale)
