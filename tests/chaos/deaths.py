"""Processes that are killed, one by one and together, and started again."""

from __future__ import annotations

import itertools
import os
import signal
import time

from tests.chaos.clients import Progress, run_calls
from tests.chaos.figures import ECHO_RATE, Figure, Size, begun, merge, told
from tests.chaos.stage import on_stage
from tests.chaos.workload import mixed_calls, plain_calls


def f1_kill_each_engine(size: Size) -> list[Figure]:
    """Kill -9 of each engine in turn, under load."""
    comparisons, detections = [], []
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        for repeat in range(2 * size.repeats):
            name = f"engine-{repeat % 2}"

            def fault(progress: Progress, name: str = name) -> None:
                progress.wait_for_events(begun(calls))
                pid = stage.kill(name)
                killed_at = time.monotonic()
                detections.append(stage.wait_until_fallen(name, pid) - killed_at)

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
        resumed = stage.cluster.reply().resumed
    merged = merge(comparisons)
    slowest = max(detections)
    return [
        Figure(
            "F1",
            f"kill -9 of each engine, {size.clients} streams, {len(comparisons)} times"
            f" ({size.kind}; {resumed} resumed)",
            f"{told(merged)}; detected within {1000 * slowest:.0f} ms",
            "0, 0, 0; < 1 s; < 150 ms",
            merged.is_golden and merged.num_joins == 0,
            merged.added_stall_p99_s < 1 and slowest < 0.15,
        )
    ]


def f7_kill_supervisor(size: Size) -> list[Figure]:
    """Kill -9 of the supervisor again and again, under load."""
    kills = 0
    comparisons = []
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            nonlocal kills
            progress.wait_for_events(begun(calls))
            stage.kill("supervisor")
            kills += 1
            stage.wait_until_whole(2)

        while kills < 10 * size.repeats:
            comparisons.append(stage.disturbed(calls, golden, fault))
    merged = merge(comparisons)
    return [
        Figure(
            "F7",
            f"kill -9 of the supervisor, {kills} times ({size.kind})",
            told(merged),
            "0, 0, 0; < 2 s",
            merged.is_golden and merged.num_joins == 0,
            merged.added_stall_p99_s < 2,
        )
    ]


def f8_kill_supervisor_and_engine(size: Size) -> list[Figure]:
    """Supervisor and an engine within 50 ms, in either order."""
    comparisons = []
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        orders = itertools.cycle((("supervisor", "engine-0"), ("engine-1", "supervisor")))
        for order in itertools.islice(orders, 2 * size.repeats):

            def fault(progress: Progress, order: tuple[str, str] = order) -> None:
                progress.wait_for_events(begun(calls))
                pids = [stage.pid(name) for name in order]
                os.kill(pids[0], signal.SIGKILL)
                time.sleep(0.03)
                os.kill(pids[1], signal.SIGKILL)
                stage.wait_until_whole(2)

            comparisons.append(stage.disturbed(calls, golden, fault))
    merged = merge(comparisons)
    return [
        Figure(
            "F8",
            f"kill -9 of supervisor and an engine within 50 ms, {len(comparisons)} times",
            told(merged),
            "0, 0, 0; < 2 s",
            merged.is_golden and merged.num_joins == 0,
            merged.added_stall_p99_s < 2,
        )
    ]


def f9_kill_gateway(size: Size) -> list[Figure]:
    """Kill -9 of the gateway; clients come back with ``Last-Event-ID``."""
    comparisons = []
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        for is_supervisor_too in (False, True) * size.repeats:

            def fault(
                progress: Progress,
                is_supervisor_too: bool = is_supervisor_too,
            ) -> None:
                progress.wait_for_events(begun(calls))
                stage.kill("gateway-0")
                if is_supervisor_too:
                    stage.kill("supervisor")

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
    merged = merge(comparisons)
    return [
        Figure(
            "F9",
            f"kill -9 of the gateway, alone and with the supervisor ({merged.num_joins} re-joined)",
            told(merged),
            "0 lost, 0 repeated",
            merged.is_golden and merged.num_joins >= size.clients,
        )
    ]


def f10_all_engines_die(size: Size) -> list[Figure]:
    """All engines die at once: streams wait and go on."""
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(begun(calls))
            for pid in [stage.pid(name) for name in ("engine-0", "engine-1")]:
                os.kill(pid, signal.SIGKILL)

        found = stage.disturbed(calls, golden, fault)
    return [
        Figure(
            "F10",
            "kill -9 of all engines at once",
            told(found),
            "0, 0, 0",
            found.is_golden and found.num_joins == 0,
        )
    ]


def f18_dead_at_start(size: Size) -> list[Figure]:
    """An engine that dies at each start ends up broken; the others serve."""
    with on_stage(ECHO_RATE) as stage:
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(begun(calls))
            stage.sabotage("engine-1", "start-dead")
            stage.kill("engine-1")

        found = stage.disturbed(calls, golden, fault)
        began_at = time.monotonic()
        broken_at = stage.wait_for_reply(
            lambda reply: any(engine.state == "broken" for engine in reply.engines)
        )
        after = run_calls(stage.cluster.base_url, calls[:4])
        restarts = stage.cluster.engine("engine-1").restarts
        stage.cluster.launcher.send_signal(signal.SIGTERM)
        status = stage.cluster.wait_for_end()
    is_served = not any(outcome.problem for outcome in after)
    return [
        Figure(
            "F18",
            "an engine that dies at each start",
            f"{told(found)}; broken {broken_at - began_at:.0f} s later, after {restarts} restarts;"
            f" exit status {status}",
            "golden; broken after 3 in 60 s; status not 0",
            found.is_golden and is_served and status != 0,
        )
    ]


def f21_rolling_restart(size: Size) -> list[Figure]:
    """Every process is replaced under load."""
    with on_stage(ECHO_RATE, size=size) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=2 * size.max_tokens)
        golden = stage.golden(calls)
        before = stage.cluster.pids()
        done = []

        def fault(progress: Progress) -> None:
            progress.wait_for_events(begun(calls))
            done.append(stage.cluster.run("restart", "--rolling").returncode)

        found = stage.disturbed(calls, golden, fault)
        after = set(stage.cluster.pids().values())
    is_replaced = after.isdisjoint(before.values())
    return [
        Figure(
            "F21",
            "rolling restart of every process",
            f"{told(found)}; {found.num_joins} resets",
            "0, 0, 0; 0 resets",
            found.is_golden and found.num_joins == 0 and done == [0] and is_replaced,
        )
    ]
