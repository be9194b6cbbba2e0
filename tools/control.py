"""``understudy stop`` and ``understudy status``: what an operator does to a running node.

Imports neither asyncio nor aiohttp nor structlog: the time of ``status`` is that of its imports.
"""

from __future__ import annotations

import os
import select
import signal
import sys
from collections.abc import Mapping, Sequence
from enum import IntEnum
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import StatusReply, StatusRequest
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.kit.process import LAUNCHER_LOCK, SUPERVISOR_LOCK, lock_holder
from understudy.runtime.settings import SUPERVISOR_SOCKET
from understudy.tools.configuration import settle

_ANSWER_WITHIN_S: Final = 1.0
_STOP_MARGIN_S: Final = 30.0
"""What stopping may take beside the time for running streams."""


_ENGINE_TITLES: Final = (
    "ENGINE",
    "STATE",
    "PID",
    "RUNNING",
    "WAITING",
    "BLOCKS",
    "STEP",
    "RESTARTS",
    "BEAT",
)
_GATEWAY_TITLES: Final = ("GATEWAY", "ADDRESS", "PID", "STREAMS", "BEAT")


class State(IntEnum):
    """How a node is; the values are ``status``'s exit statuses (LSB, "init script actions")."""

    SERVING = 0
    DEGRADED = 1
    NOT_RUNNING = 3
    UNKNOWN = 4

    @property
    def label(self) -> str:
        """The state in words."""
        return self.name.lower().replace("_", " ")


class Report(NamedTuple):
    """What was found out about a node; ``reply`` is ``None`` unless its supervisor answered."""

    state: State
    reason: str
    reply: StatusReply | None


def look(run_dir: Path) -> Report:
    """Find out how the node in a run directory is."""
    try:
        holders = [lock_holder(run_dir / name) for name in (LAUNCHER_LOCK, SUPERVISOR_LOCK)]
    except OSError as error:
        return Report(State.UNKNOWN, f"{run_dir}: {error.strerror}", None)
    if not any(holders):
        return Report(State.NOT_RUNNING, f"nothing runs in {run_dir}", None)
    try:
        with SupervisorClient(run_dir / SUPERVISOR_SOCKET) as client:
            reply = client.request(StatusRequest(), StatusReply, timeout_s=_ANSWER_WITHIN_S)
    except Unavailable as error:
        return Report(State.UNKNOWN, str(error), None)
    faults = [f"{engine.name} is {engine.state}" for engine in reply.engines]
    faults = [fault for fault in faults if not fault.endswith(" serving")]
    if not reply.engines:
        faults.append("no engine has joined")
    if not any(gateway.address for gateway in reply.gateways):
        faults.append("no gateway has joined")
    return Report(State.DEGRADED if faults else State.SERVING, ", ".join(faults), reply)


def status(flags: Mapping[str, str], *, as_json: bool) -> int:
    """Print how the node is; the exit status says it, too."""
    run_dir: Path = settle(flags, only=("run_dir",)).values["run_dir"]
    report = look(run_dir)
    if as_json:
        _print_json(report)
    elif report.reply is None:
        print(f"{report.state.label}: {report.reason}", file=sys.stderr)
    else:
        print("\n".join(_table(report, report.reply)))
    return report.state


def stop(flags: Mapping[str, str]) -> int:
    """Ask the launcher in the run directory to stop, and wait until it is gone."""
    values = settle(flags, only=("run_dir", "shutdown_timeout")).values
    run_dir: Path = values["run_dir"]
    lock_path = run_dir / LAUNCHER_LOCK
    try:
        holder = lock_holder(lock_path)
        if holder is None or holder.pid is None:
            print(f"not running: no launcher in {run_dir}", file=sys.stderr)
            return State.NOT_RUNNING
        pidfd = os.pidfd_open(holder.pid)
    except ProcessLookupError:
        return 0
    except OSError as error:
        print(f"{lock_path}: {error.strerror}", file=sys.stderr)
        return ExitStatus.FAILED
    try:
        # The pid could have passed to another process until the pidfd was open; not since.
        if lock_holder(lock_path) != holder:
            return 0
        signal.pidfd_send_signal(pidfd, signal.SIGTERM)
        limit_s = values["shutdown_timeout"] + _STOP_MARGIN_S
        readable, _, _ = select.select([pidfd], [], [], limit_s)
    except PermissionError:
        print(f"process {holder.pid} belongs to another user", file=sys.stderr)
        return ExitStatus.FAILED
    finally:
        os.close(pidfd)
    if not readable:
        print(f"still stopping after {limit_s:g} s (process {holder.pid})", file=sys.stderr)
        return ExitStatus.TRY_AGAIN
    return 0


def _print_json(report: Report) -> None:
    import json

    body: dict[str, Any] = {"state": report.state.label, "reason": report.reason}
    if (reply := report.reply) is not None:
        scalars = {name: getattr(reply, name) for name in reply.__dataclass_fields__}
        body |= scalars | {
            "engines": [engine._asdict() for engine in reply.engines],
            "gateways": [gateway._asdict() for gateway in reply.gateways],
        }
    print(json.dumps(body, indent=2))


def _table(report: Report, reply: StatusReply) -> list[str]:
    """The lines that ``status`` prints."""
    headline = f"{reply.model}: {report.state.label}, up {_duration(reply.uptime_s)}"
    if report.reason:
        headline += f" ({report.reason})"
    engines = [
        (
            engine.name,
            engine.state,
            engine.pid,
            engine.running,
            engine.waiting,
            f"{engine.blocks_total - engine.blocks_free}/{engine.blocks_total}",
            engine.step,
            engine.restarts,
            f"{engine.beat_age_s:.2f} s",
        )
        for engine in reply.engines
    ]
    gateways = [
        (gateway.name, gateway.address, gateway.pid, gateway.streams, f"{gateway.beat_age_s:.2f} s")
        for gateway in reply.gateways
    ]
    requests = (
        f"requests: {reply.queued} queued, {reply.running} running, {reply.admitted} admitted,"
        f" {reply.finished} finished, {reply.rejected} rejected, {reply.resumed} resumed;"
        f" {reply.tokens} tokens"
    )
    return [
        headline,
        "",
        *_columns([_ENGINE_TITLES, *engines]),
        "",
        *_columns([_GATEWAY_TITLES, *gateways]),
        "",
        requests,
    ]


def _columns(rows: Sequence[Sequence[object]]) -> list[str]:
    widths = [max(len(str(row[i])) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _duration(seconds: float) -> str:
    minutes, whole = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"
