"""One actor alone in the foreground: for the launcher, for systemd, or for a look at it.

Whatever ends it is one clear message, on stderr and, if a launcher asked, in a file for it.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Mapping
from pathlib import Path

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.process import (
    SUPERVISOR_LOCK,
    Lock,
    LockHeld,
    die_with_parent,
    leave_no_core,
    prepare_run_directory,
    remove_stale_socket,
)
from understudy.tools.configuration import settle

_LOCK_WAIT_S = 5.0
"""A supervisor that was killed just now holds its lock until the kernel has ended it."""


def run_actor(
    role: str,
    name: str,
    flags: Mapping[str, str],
    *,
    parent_pid: int | None,
    last_words: Path | None,
    listen_fd: int | None = None,
) -> int:
    """Run the actor until it is told to stop; gives its exit status."""
    leave_no_core()
    gc.disable()  # imports leave no garbage; the actor looks for some once it is up
    if parent_pid is not None:
        die_with_parent(parent_pid)
    from understudy.runtime.log import configure_logging, get_logger

    configure_logging(name)
    try:
        if role == "gateway":
            return _run_gateway(name, flags, listen_fd)
        return _run_engine(name, flags) if role == "engine" else _run_supervisor(flags)
    except ConfigurationError as error:
        return _end(ExitStatus.CONFIG, str(error), last_words)
    except LockHeld as error:
        message = f"a supervisor already runs in {error.path.parent} (process {error.pid})"
        return _end(ExitStatus.UNAVAILABLE, message, last_words)
    except Exception as error:  # noqa: BLE001 - the outermost frame of this process
        get_logger().exception("crashed")
        return _end(
            ExitStatus.FAILED, f"{name} crashed: {type(error).__name__}: {error}", last_words
        )


def _run_supervisor(flags: Mapping[str, str]) -> int:
    from understudy.actors.supervisor_process import run_supervisor
    from understudy.runtime.config import supervisor_config

    config = supervisor_config(settle(flags))
    prepare_run_directory(config.run_dir)
    lock = Lock.acquire(config.run_dir / SUPERVISOR_LOCK, timeout_s=_LOCK_WAIT_S)
    remove_stale_socket(config.socket, lock)
    try:
        return run_supervisor(config)
    finally:
        lock.release()


def _run_engine(name: str, flags: Mapping[str, str]) -> int:
    from understudy.actors.engine_process import run_engine
    from understudy.runtime.config import engine_config

    config = engine_config(settle(flags), name=name)
    prepare_run_directory(config.run_dir)
    return run_engine(config)


def _run_gateway(name: str, flags: Mapping[str, str], listen_fd: int | None) -> int:
    from understudy.actors.gateway_process import run_gateway
    from understudy.runtime.config import gateway_config

    config = gateway_config(settle(flags), name=name)
    prepare_run_directory(config.run_dir)
    return run_gateway(config, listen_fd=listen_fd)


def _end(status: int, message: str, last_words: Path | None) -> int:
    print(message, file=sys.stderr, flush=True)
    if last_words is not None:
        last_words.write_text(message, encoding="utf-8")
    return status
