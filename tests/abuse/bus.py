"""Abuse between processes: bad frames at every ZeroMQ socket, and bad bytes at every unix socket.

The supervisor's socket is bound and takes whoever connects; those of engines and gateways connect
to it, and hear what they should not from a proxy in its place. Whoever can do any of this has the
run directory's owner as user: what is tested is that mistakes stay small.
"""

from __future__ import annotations

import random
import re
import socket
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

import zmq

from tests.abuse.frames import STRANGER, Frames
from tests.chaos.clients import Comparison, Progress
from tests.chaos.proxy import Proxy
from tests.chaos.stage import Stage, in_bad_weather, on_stage
from tests.chaos.workload import mixed_calls
from understudy.runtime.kit.process import LAUNCHER_SOCKET
from understudy.runtime.settings import SUPERVISOR_SOCKET

RATE: Final = "--echo-tokens-per-s=60"
STREAMS: Final = 6
STREAM_TOKENS: Final = 120
_DROPPED: Final = re.compile(r'\{[^\n]*"frames were dropped"[^\n]*\}')
_PAUSE_EVERY: Final = 50
_PAUSE_S: Final = 0.01
"""So that the streams beside have their share of the machine."""
_IDENTITIES: Final = 20


class Round(NamedTuple):
    """Frames that were sent beside a set of streams, and what came of it."""

    where: str
    num_frames: int
    comparison: Comparison
    problems: list[str]
    dropped: dict[str, int]
    """How many frames each actor counted as no message of anybody who may speak there."""

    @property
    def is_right(self) -> bool:
        """Whether nobody noticed."""
        return self.comparison.is_golden and not self.problems


def at_supervisor(count: int, *, seed: int) -> Round:
    """Bad frames from strangers at the supervisor, and bad bytes at all unix sockets."""
    with on_stage(RATE) as stage:
        run_dir = stage.cluster.run_dir

        def disturb(_: Progress) -> None:
            chance = random.Random(seed)
            with zmq.Context() as context:
                sockets = [_stranger(context, run_dir, chance) for _ in range(_IDENTITIES)]
                frames = Frames(seed)
                for number in range(count):
                    _send(chance.choice(sockets), frames.parts(number))
                    if number % _PAUSE_EVERY == 0:
                        _at_unix_sockets(run_dir, chance)
                        time.sleep(_PAUSE_S)
                for one in sockets:
                    one.close(linger=1000)

        return _round("supervisor", stage, count, disturb, seed)


def at_members(count: int, *, seed: int) -> Round:
    """Bad frames from a supervisor that is none at the engines and at the gateway."""
    with in_bad_weather(RATE, engines=2, seed=seed) as (stage, proxy):

        def disturb(_: Progress) -> None:
            chance = random.Random(seed)
            frames = Frames(seed)
            for number in range(count):
                _forge(proxy, chance, frames.parts(number))
                if number % _PAUSE_EVERY == 0:
                    time.sleep(_PAUSE_S)

        return _round("members", stage, count, disturb, seed)


def dropped(log: str) -> dict[str, int]:
    """How many frames each actor says it has dropped, by its name, when it has ended."""
    found = {}
    for line in _DROPPED.findall(log):
        [malformed] = re.findall(r'"malformed": (\d+)', line)
        [actor] = re.findall(r'"actor": "([^"]+)"', line)
        found[actor] = int(malformed)
    return found


def _round(
    where: str, stage: Stage, count: int, disturb: Callable[[Progress], None], seed: int
) -> Round:
    calls = mixed_calls(STREAMS, seed=seed, max_tokens=STREAM_TOKENS)
    golden = stage.golden(calls)
    before = stage.cluster.pids()
    comparison = stage.disturbed(calls, golden, disturb)
    # Once more: what was poisoned would show in who comes later.
    stage.wait_until_whole(engines=2)
    again = stage.disturbed(calls, golden, lambda _: None)
    problems = [f"afterwards: {again.problems}"] if not again.is_golden else []
    after = {name: pid for name, pid in stage.cluster.pids().items() if STRANGER not in name}
    if before != {name: after.get(name) for name in before}:
        problems.append(f"the processes were {before}, and are {after}")
    processes = stage.cluster.processes
    log = stage.cluster.log
    for process in reversed(processes):
        process.terminate()
    for process in processes:
        process.wait(60)
    problems += [
        line[:500]
        for line in log.splitlines()
        if "Traceback" in line or '"level": "error"' in line or '"level": "critical"' in line
    ]
    counted = dropped(stage.cluster.log)
    wanted = {"supervisor"} if where == "supervisor" else {"engine-0", "engine-1", "gateway-0"}
    if missing := wanted - counted.keys():
        problems.append(f"{', '.join(sorted(missing))} did not count what was dropped: {counted}")
    return Round(where, count, comparison, problems, counted)


def _stranger(
    context: zmq.Context[zmq.Socket[bytes]], run_dir: Path, chance: random.Random
) -> zmq.Socket[bytes]:
    """A connection to the supervisor under a name that is nobody's, or somebody else's."""
    stranger = context.socket(zmq.DEALER)
    names = (f"{STRANGER}.{chance.randrange(9)}", "engine-0", "supervisor", "x" * 255)
    identity = chance.choice((*(name.encode() for name in names), b"\xff\xfe", None))
    if identity is not None:
        stranger.setsockopt(zmq.ROUTING_ID, identity)
    stranger.setsockopt(zmq.SNDTIMEO, 1000)
    stranger.connect(f"ipc://{run_dir / SUPERVISOR_SOCKET}")
    return stranger


def _send(stranger: zmq.Socket[bytes], parts: list[bytes]) -> None:
    # Two of one name: the second is not let in, and its frames go nowhere.
    with suppress(zmq.Again):
        stranger.send_multipart(parts, zmq.NOBLOCK)


def _forge(proxy: Proxy, chance: random.Random, parts: list[bytes]) -> None:
    if chance.random() < 0.05 and proxy.heard:
        proxy.forge(*_again(chance.choice(list(proxy.heard)[-50:])))
    elif members := proxy.members:
        proxy.forge(chance.choice(members), parts)


def _again(heard: tuple[bytes, bytes]) -> tuple[bytes, list[bytes]]:
    return heard[0], [heard[1]]


def _at_unix_sockets(run_dir: Path, chance: random.Random) -> None:
    """Bytes that are neither ZeroMQ's protocol, nor HTTP, nor a command."""
    greeting = b"\xff" + b"\0" * 8 + b"\x7f\x03\x00NULL" + b"\0" * 48
    lines = (
        *(
            b"",
            b"\0",
            b"\xff" * 64,
            b"GET / HTTP/1.1\r\n\r\n",
            b"POST /x HTTP/1.1\r\n\r\n",
            b"x" * 999,
        ),
        *(greeting, greeting + b"\x04\xff" + b"\xff" * 8, b"restart\0", b"RESTART", b"%s%n", b"\n"),
        *(b"GET /../reset_prefix_cache HTTP/1.1\r\nHost: x\r\n\r\n", chance.randbytes(300)),
    )
    paths: Iterable[tuple[Path, int]] = (
        (run_dir / SUPERVISOR_SOCKET, socket.SOCK_STREAM),
        (run_dir / LAUNCHER_SOCKET, socket.SOCK_SEQPACKET),
        (run_dir / "gateway-0.admin", socket.SOCK_STREAM),
    )
    for path, kind in paths:
        with suppress(OSError), socket.socket(socket.AF_UNIX, kind) as connection:
            connection.settimeout(1.0)
            connection.connect(str(path))
            connection.send(chance.choice(lines))
            if chance.random() < 0.2:
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1000)
