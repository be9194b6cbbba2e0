"""``understudy drain`` and ``understudy restart``: planned change of a node that serves.

Imports neither asyncio nor aiohttp nor structlog, like all that an operator types often.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import DrainMode, DrainReply, DrainRequest
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.kit.control_socket import Outcome, give_command
from understudy.runtime.kit.process import LAUNCHER_LOCK, LAUNCHER_SOCKET, lock_holder
from understudy.runtime.settings import SUPERVISOR_SOCKET
from understudy.tools.configuration import settle
from understudy.tools.control import Report, look

_ANSWER_WITHIN_S: Final = 1.0
_LOOK_EVERY_S: Final = 0.05
_ALIVE: Final = frozenset({"serving", "testing", "draining"})
_SILENCE_MAX_S: Final = 5.0
"""A supervisor that is restarted is back by then."""


def drain(flags: Mapping[str, str], engine: str, *, finishes: bool, timeout_s: float) -> int:
    """Let an engine rest, and wait until it does."""
    run_dir: Path = settle(flags, only=("run_dir",)).values["run_dir"]
    report = look(run_dir)
    if report.reply is None:
        _say(f"{report.state.label}: {report.reason}")
        return ExitStatus.UNAVAILABLE
    _warn(report, engine)
    request = DrainRequest(engine, DrainMode.FINISH if finishes else DrainMode.MIGRATE)
    started_at = heard_at = time.monotonic()
    left: int | None = None
    with SupervisorClient(run_dir / SUPERVISOR_SOCKET) as client:
        while True:
            now = time.monotonic()
            try:
                reply = client.request(request, DrainReply, timeout_s=_ANSWER_WITHIN_S)
            except Unavailable as error:
                if now - heard_at >= _SILENCE_MAX_S:
                    _say(str(error))
                    return ExitStatus.UNAVAILABLE
                continue
            heard_at = now
            if not reply.is_known:
                _say(f"no engine {engine!r} is alive here; there is {_names(report)}")
                return ExitStatus.USAGE
            if reply.outstanding == 0:
                _say(f"{engine} rests, after {now - started_at:.1f} s")
                return ExitStatus.DONE
            if now - started_at >= timeout_s:
                _say(f"{engine} still has {_requests(reply.outstanding)} after {timeout_s:g} s")
                return ExitStatus.TRY_AGAIN
            if reply.outstanding != left:
                left = reply.outstanding
                _say(f"{engine} has {_requests(left)} left")
            time.sleep(_LOOK_EVERY_S)


def restart(flags: Mapping[str, str]) -> int:
    """Have the launcher replace every process, one at a time, and tell how far it is."""
    run_dir: Path = settle(flags, only=("run_dir",)).values["run_dir"]
    if lock_holder(run_dir / LAUNCHER_LOCK) is None:
        _say(f"not running: no launcher in {run_dir}")
        return ExitStatus.UNAVAILABLE
    outcome = Outcome()
    try:
        for line in give_command(run_dir / LAUNCHER_SOCKET, "restart", outcome):
            _say(line)
    except Unavailable as error:
        _say(str(error))
        return ExitStatus.UNAVAILABLE
    _say(outcome.line)
    return ExitStatus.FAILED if outcome.status is None else outcome.status


def _warn(report: Report, engine: str) -> None:
    """Say what follows if nobody is left to take the requests."""
    assert report.reply is not None
    serving = [other.name for other in report.reply.engines if other.state == "serving"]
    if serving == [engine]:
        _say(f"no other engine serves: what {engine} does not finish waits for one")


def _names(report: Report) -> str:
    assert report.reply is not None
    alive = [engine.name for engine in report.reply.engines if engine.state in _ALIVE]
    return ", ".join(alive) or "none"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
