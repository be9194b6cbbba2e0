"""``understudy quarantine``: requests that engines died of, and that are refused since.

Imports neither asyncio nor aiohttp nor structlog, like all that an operator types often.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from understudy.protocol.errors import Unavailable
from understudy.protocol.messages import ReleaseReply, ReleaseRequest
from understudy.runtime.exit_status import ExitStatus
from understudy.runtime.kit.client import SupervisorClient
from understudy.runtime.settings import SUPERVISOR_SOCKET
from understudy.runtime.storage.convicts import Convict, ConvictDirectory
from understudy.tools.configuration import settle

_ANSWER_WITHIN_S: Final = 1.0
_DIGITS_SHOWN: Final = 12


def list_all(flags: Mapping[str, str]) -> int:
    """Print a line for each request in quarantine, and nothing of what it asked."""
    _, directory = _places(flags)
    convicts = directory.convicts(now=time.time())
    if not convicts:
        print("nothing is in quarantine", file=sys.stderr)
        return ExitStatus.DONE
    print(f"{'fingerprint':{_DIGITS_SHOWN}}  {'age':>8}  {'prompt':>13}  tenant")
    for convict in convicts:
        num_tokens = f"{len(convict.content.get('prompt', ()))} tokens"
        tenant = convict.content.get("tenant") or "-"
        age = f"{convict.age_s:.0f} s"
        print(f"{convict.fingerprint[:_DIGITS_SHOWN]}  {age:>8}  {num_tokens:>13}  {tenant}")
    return ExitStatus.DONE


def show(flags: Mapping[str, str], digits: str) -> int:
    """Print all that is known of one request in quarantine."""
    _, directory = _places(flags)
    convict = _find(directory, digits)
    if convict is None:
        return ExitStatus.USAGE
    json.dump({"fingerprint": convict.fingerprint, **convict.content}, sys.stdout, indent=2)
    print()
    return ExitStatus.DONE


def release(flags: Mapping[str, str], digits: str) -> int:
    """Let the same be asked again."""
    run_dir, directory = _places(flags)
    convict = _find(directory, digits)
    if convict is None:
        return ExitStatus.USAGE
    directory.remove(convict.fingerprint)
    name = convict.fingerprint[:_DIGITS_SHOWN]
    request = ReleaseRequest(bytes.fromhex(convict.fingerprint))
    try:
        with SupervisorClient(run_dir / SUPERVISOR_SOCKET) as client:
            client.request(request, ReleaseReply, timeout_s=_ANSWER_WITHIN_S)
    except Unavailable:
        print(f"{name} is released from the next start on: no supervisor answers", file=sys.stderr)
        return ExitStatus.DONE
    print(f"{name} is released", file=sys.stderr)
    return ExitStatus.DONE


def _places(flags: Mapping[str, str]) -> tuple[Path, ConvictDirectory]:
    values = settle(flags, only=("run_dir", "state_dir")).values
    run_dir: Path = values["run_dir"]
    state_dir: Path = values["state_dir"] or run_dir / "state"
    return run_dir, ConvictDirectory(state_dir / "quarantine")


def _find(directory: ConvictDirectory, digits: str) -> Convict | None:
    """The one request whose fingerprint begins so; says what is wrong if there is not one."""
    found = [
        convict
        for convict in directory.convicts(now=time.time())
        if digits and convict.fingerprint.startswith(digits.lower())
    ]
    if len(found) == 1:
        return found[0]
    problem = "more than one begins with" if found else "nothing in quarantine begins with"
    print(f"{problem} {digits!r}", file=sys.stderr)
    return None
