"""``understudy start``: a whole node, in the foreground or in the background."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn, TextIO

from understudy.actors.launcher import Ready, StartFailed, run_launcher
from understudy.protocol.errors import ConfigurationError
from understudy.runtime.config import LauncherConfig, launcher_config
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.process import LockHeld, leave_no_core, prepare_run_directory
from understudy.runtime.log import configure_logging, get_logger
from understudy.tools.configuration import settle_with_model

LOG_FILE = "understudy.log"


def start(flags: Mapping[str, str], *, is_detached: bool) -> int:
    """Start a node; in the foreground until it is stopped, else until it is ready."""
    cores = len(os.sched_getaffinity(0))
    config = launcher_config(settle_with_model(flags), cores=cores)
    if is_detached:
        return _start_detached(config)
    return run_node(config, lambda ready: _say(_ready_message(config, ready, "Ctrl-C, or ")))


def run_node(
    config: LauncherConfig,
    on_ready: Callable[[Ready], None],
    *,
    tell: Callable[[str], None] | None = None,
) -> int:
    """Run a node until it is stopped, telling (on stderr by default) what ended it too early."""
    leave_no_core()
    configure_logging("launcher")
    say = tell or _say
    try:
        return run_launcher(config, on_ready=on_ready)
    except ConfigurationError as error:
        say(str(error))
        return ExitStatus.CONFIG
    except LockHeld as error:
        say(
            f"understudy already runs in {config.run_dir} (process {error.pid}):"
            " stop it, or choose another --run-dir"
        )
        return ExitStatus.UNAVAILABLE
    except StartFailed as error:
        say(str(error))
        return error.status


def base_url(address: str, *, scheme: str = "http") -> str:
    """The URL of the API for a client on this machine."""
    for wildcard, loopback in (("0.0.0.0:", "127.0.0.1:"), ("[::]:", "[::1]:")):
        if address.startswith(wildcard):
            address = loopback + address.removeprefix(wildcard)
    return f"{scheme}://{address}/v1"


def send_output_to(path: Path) -> TextIO:
    """Send stdout and stderr of this process to a log file; gives a stream to the old stdout."""
    sys.stdout.flush()
    sys.stderr.flush()
    old = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)
    return old


def _start_detached(config: LauncherConfig) -> int:
    """Start in the background, and come back once it is ready or has failed.

    Forks twice, with a new session between (daemon(7)): the node has no terminal and cannot get
    one. What it has to say comes through a pipe, which closes by itself should it die.
    """
    prepare_run_directory(config.run_dir)
    log_path = config.run_dir / LOG_FILE
    reader, writer = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.close(reader)
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        _run_in_background(config, log_path, writer)
    os.close(writer)
    os.wait()
    with os.fdopen(reader, encoding="utf-8") as pipe:
        status, _, message = pipe.read().partition(" ")
    if not status:
        _say(f"the launcher ended before it was ready: see {log_path}")
        return ExitStatus.FAILED
    _say(message)
    return int(status)


def _run_in_background(config: LauncherConfig, log_path: Path, writer: int) -> NoReturn:
    """The background process: reports once through ``writer``, and never returns."""
    reports = os.fdopen(writer, "w", encoding="utf-8")

    def report(status: int, message: str) -> None:
        if not reports.closed:
            reports.write(f"{status} {message}")
            reports.close()

    status: int = ExitStatus.FAILED
    last_message = ""

    def tell(message: str) -> None:
        nonlocal last_message
        last_message = message
        _say(message)

    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        send_output_to(log_path)
        status = run_node(config, lambda ready: report(0, _ready_message(config, ready)), tell=tell)
        report(status, last_message)
    except Exception:  # noqa: BLE001 - the outermost frame of this process
        get_logger().exception("crashed")
    finally:
        os._exit(status)


def _ready_message(config: LauncherConfig, ready: Ready, quick_stop: str = "") -> str:
    engines = "1 engine serves" if ready.engines == 1 else f"{ready.engines} engines serve"
    is_secure = config.gateways[0].tls_certificate is not None
    url = base_url(ready.address, scheme="https" if is_secure else "http")
    return (
        f"understudy is ready: {engines} {ready.model} at {url}\n"
        f"to stop it: {quick_stop}understudy stop --run-dir {config.run_dir}"
    )


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
