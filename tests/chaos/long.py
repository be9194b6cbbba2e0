"""What takes its time: a thousand random kills, twelve gigabytes, and a soak with many faults."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple

from tests.chaos.clients import Comparison, Progress
from tests.chaos.figures import ECHO_RATE, Figure, Size, begun, merge, told
from tests.chaos.stage import Stage, on_stage
from tests.chaos.workload import mixed_calls, plain_calls
from tests.cluster import clean_environment, empty_cluster

RESIDENT_BYTES: Final = 12 << 30
FAULT_EVERY_S: Final = 10.0
_CHUNK_BYTES: Final = 256 << 20
_CHUNKS: Final = RESIDENT_BYTES // _CHUNK_BYTES
_ENGINES: Final = ("engine-0", "engine-1", "engine-2", "engine-3")
"""So many that random kills of a few are no wave of death, which would end all restarts."""


def f4_random_kills(size: Size) -> list[Figure]:
    """Random calls, random moments, often a second kill: until enough requests were resumed."""
    source = random.Random(size.seed)
    comparisons: list[Comparison] = []
    kills = 0
    with on_stage(*_rate(size), engines=len(_ENGINES), size=size) as stage:
        while stage.cluster.reply().resumed < size.resumes:
            seed = source.getrandbits(32)
            calls = mixed_calls(size.clients, seed=seed, max_tokens=size.max_tokens)
            golden = stage.golden(calls)
            num_events = sum(outcome.num_events for outcome in golden)
            moment = source.randint(1, num_events // 2)

            def fault(progress: Progress, moment: int = moment) -> None:
                nonlocal kills
                progress.wait_for_events(moment)
                _kill(stage, source.choice(_ENGINES))
                kills += 1
                if source.random() < 0.5:
                    time.sleep(source.uniform(0.0, 2.0))
                    _kill(stage, source.choice(_ENGINES))
                    kills += 1

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(len(_ENGINES))
            # Deaths that follow each other too closely leave an engine down for good.
            time.sleep(size.pause_s)
        resumed = stage.cluster.reply().resumed
    merged = merge(comparisons)
    return [
        Figure(
            "F4",
            f"{kills} random kills; {resumed} requests resumed in the middle ({size.kind})",
            told(merged),
            "all golden",
            merged.is_golden and merged.num_joins == 0,
        )
    ]


def f2_large_process(size: Size) -> list[Figure]:
    """An engine with 12 GiB resident is killed; the kernel takes seconds to give them back."""
    with empty_cluster() as cluster:
        stage = Stage(cluster, cluster.run_dir)
        cluster.start("supervisor")
        cluster.start("engine", "--name=engine-0", "--engine=echo", ECHO_RATE)
        large = _large_engine(cluster.run_dir)
        cluster.processes.append(large)
        cluster.start("gateway", "--name=gateway-0", "--port=0")
        stage.wait_until_whole(2)
        resident = _resident_bytes(large.pid)
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        detected_s = gone_s = 0.0

        def fault(progress: Progress) -> None:
            nonlocal detected_s, gone_s
            progress.wait_for_events(begun(calls))
            large.kill()
            killed_at = time.monotonic()
            detected_s = stage.wait_until_fallen("engine-1", large.pid) - killed_at
            large.wait()
            gone_s = time.monotonic() - killed_at
            cluster.processes.remove(large)

        found = stage.disturbed(calls, golden, fault)
    return [
        Figure(
            "F2",
            f"kill -9 of an engine with {resident / 2**30:.1f} GiB resident",
            f"{told(found)}; detected within {1000 * detected_s:.0f} ms, its memory free after"
            f" {1000 * gone_s:.0f} ms",
            "golden; < 150 ms",
            found.is_golden and resident > 0.95 * RESIDENT_BYTES,
            detected_s < 0.15,
        )
    ]


class _Footprint(NamedTuple):
    """What a process holds."""

    descriptors: int
    resident_bytes: int


def f26_soak(size: Size) -> list[Figure]:
    """A fault every 10 s for a long time; then nothing may be left of anything."""
    source = random.Random(size.seed)
    comparisons: list[Comparison] = []
    faults = 0
    with on_stage(ECHO_RATE, engines=len(_ENGINES)) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=5 * size.max_tokens)
        golden = stage.golden(calls)
        launcher = stage.cluster.launcher.pid
        before = _footprint(launcher)
        end = time.monotonic() + 60 * size.minutes
        while time.monotonic() < end:

            def fault(progress: Progress) -> None:
                nonlocal faults
                progress.wait_for_events(begun(calls))
                _disturb(stage, source)
                faults += 1

            began_at = time.monotonic()
            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(len(_ENGINES))
            time.sleep(max(0.0, began_at + FAULT_EVERY_S - time.monotonic()))
        reply = stage.cluster.reply()
        after = _footprint(launcher)
        rest = {name: _footprint(pid) for name, pid in stage.cluster.pids().items()}
    merged = merge(comparisons)
    blocks = sum(engine.blocks_total - engine.blocks_free for engine in reply.engines)
    growth = after.resident_bytes - before.resident_bytes
    most = max(footprint.resident_bytes for footprint in rest.values())
    descriptors = max(footprint.descriptors for footprint in rest.values())
    is_clean = (blocks, reply.running, reply.queued) == (0, 0, 0)
    return [
        Figure(
            "F26",
            f"{size.minutes:g} minutes with {faults} faults",
            f"{told(merged)}; {blocks} blocks and {reply.running + reply.queued} requests left;"
            f" launcher: {after.descriptors - before.descriptors:+d} descriptors,"
            f" {growth / 2**20:+.1f} MiB; at most {descriptors} descriptors and"
            f" {most / 2**20:.0f} MiB in any process",
            "golden; nothing left; flat",
            merged.is_golden
            and is_clean
            and after.descriptors <= before.descriptors
            and growth < 16 << 20
            and descriptors < 200,
        )
    ]


def _disturb(stage: Stage, source: random.Random) -> None:
    """Do one of the things that happen to processes."""
    kind = source.choice(("engine", "engine", "supervisor", "gateway", "freeze"))
    match kind:
        case "engine":
            _kill(stage, source.choice(_ENGINES))
        case "freeze":
            pid = stage.pid(source.choice((*_ENGINES, "supervisor")))
            os.kill(pid, signal.SIGSTOP)
            time.sleep(source.uniform(0.1, 3.0))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        case name:
            _kill(stage, "supervisor" if name == "supervisor" else "gateway-0")


def _kill(stage: Stage, name: str) -> None:
    """Kill whoever plays a part, if anybody does at this moment."""
    with suppress(ProcessLookupError, KeyError, AssertionError):
        stage.kill(name)


def _rate(size: Size) -> list[str]:
    return [ECHO_RATE] if size.engine == "echo" else []


def _large_engine(run_dir: Path) -> subprocess.Popen[bytes]:
    """An ordinary engine in a process that has taken a lot of memory before."""
    words = ["engine", f"--run-dir={run_dir}", "--name=engine-1", "--engine=echo", ECHO_RATE]
    program = (
        "import sys\n"
        f"ballast = [bytearray(b'1') * {_CHUNK_BYTES} for _ in range({_CHUNKS})]\n"
        "from understudy.tools.cli import main\n"
        f"sys.exit(main({words!r}))\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program], env=clean_environment(), stdin=subprocess.DEVNULL
    )


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _footprint(pid: int) -> _Footprint:
    return _Footprint(len(list(Path(f"/proc/{pid}/fd").iterdir())), _resident_bytes(pid))
