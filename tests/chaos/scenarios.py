"""One function for each figure of the long-run table: disturb real processes, measure, judge.

Golden is what the same calls are answered with in the same cluster when nothing happens. Only
what clients are told counts; the supervisor's own counters merely show that the fault took place.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Final, NamedTuple

from tests.chaos.clients import Call, Comparison, Progress, run_calls
from tests.chaos.proxy import TO_MEMBER, TO_SUPERVISOR, Weather
from tests.chaos.stage import Stage, in_bad_weather, on_stage
from tests.chaos.workload import mixed_calls, plain_calls

ECHO_RATE: Final = "--echo-tokens-per-s=60"
CLIENTS: Final = 50


class Figure(NamedTuple):
    """A line of the table."""

    name: str
    what: str
    measured: str
    wanted: str
    is_met: bool


class Size(NamedTuple):
    """How much of it: the short run shows that it works, the long one measures it."""

    clients: int
    max_tokens: int
    repeats: int
    engine: str
    seed: int


def _told(comparison: Comparison) -> str:
    text = (
        f"{comparison.num_failed} failed, {comparison.num_changed} changed,"
        f" {comparison.num_repeated} repeated of {comparison.num_calls};"
        f" added stall p99 {comparison.added_stall_p99_s:.2f} s"
    )
    return text + "".join(f"\n      {problem}" for problem in comparison.problems)


def _merge(comparisons: list[Comparison]) -> Comparison:
    return Comparison(
        num_calls=sum(one.num_calls for one in comparisons),
        num_failed=sum(one.num_failed for one in comparisons),
        num_changed=sum(one.num_changed for one in comparisons),
        num_repeated=sum(one.num_repeated for one in comparisons),
        num_joins=sum(one.num_joins for one in comparisons),
        added_stall_p99_s=max(one.added_stall_p99_s for one in comparisons),
        problems=tuple(itertools.chain.from_iterable(one.problems for one in comparisons))[:3],
    )


def _begun(calls: list[Call]) -> int:
    """So many events are told when all streams are under way."""
    return 4 * len(calls)


def f1_kill_each_engine(size: Size) -> list[Figure]:
    """Kill -9 of each engine in turn, under load."""
    comparisons, detections = [], []
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        for repeat in range(2 * size.repeats):
            name = f"engine-{repeat % 2}"

            def fault(progress: Progress, name: str = name) -> None:
                progress.wait_for_events(_begun(calls))
                pid = stage.kill(name)
                killed_at = time.monotonic()
                detections.append(stage.wait_until_fallen(name, pid) - killed_at)

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
        resumed = stage.cluster.reply().resumed
    merged = _merge(comparisons)
    slowest = max(detections)
    return [
        Figure(
            "F1",
            f"kill -9 of each engine, {size.clients} streams, {len(comparisons)} times"
            f" ({size.engine}; {resumed} resumed)",
            f"{_told(merged)}; detected within {1000 * slowest:.0f} ms",
            "0, 0, 0; < 1 s; < 150 ms",
            merged.is_golden
            and merged.num_joins == 0
            and merged.added_stall_p99_s < 1
            and slowest < 0.15,
        )
    ]


def f5_freeze(size: Size) -> list[Figure]:
    """SIGSTOP, then SIGCONT: a short freeze moves nothing, a long one moves everything."""
    figures = []
    for freeze_s, moves in ((0.3, False), (2.0, True), (20.0, True)):
        with on_stage(ECHO_RATE) as stage:
            calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
            golden = stage.golden(calls)
            stale = 0

            def fault(
                progress: Progress,
                stage: Stage = stage,
                calls: list[Call] = calls,
                freeze_s: float = freeze_s,
            ) -> None:
                progress.wait_for_events(_begun(calls))
                pid = stage.pid("engine-0")
                os.kill(pid, signal.SIGSTOP)
                time.sleep(freeze_s)
                try:
                    os.kill(pid, signal.SIGCONT)
                except ProcessLookupError:
                    return  # it was silent for too long, and was killed

            found = stage.disturbed(calls, golden, fault)
            resumed = stage.cluster.reply().resumed
            stage.wait_until_whole(2)
        figures.append(
            Figure(
                "F5",
                f"SIGSTOP for {freeze_s} s",
                f"{_told(found)}; {resumed} resumed; {stale} zombie tokens",
                "golden; " + ("all of the engine's resumed" if moves else "none resumed"),
                found.is_golden and (resumed > 0) == moves,
            )
        )
    return figures


def f6_slow_and_stuck(size: Size) -> list[Figure]:
    """A slow step and a held lock are borne; a step that never returns is killed."""
    figures = []
    for fault_text, is_killed in (("slow 0.5", False), ("hold 5", False), ("hang", True)):
        with on_stage(ECHO_RATE) as stage:
            calls = plain_calls(size.clients // 2, seed=size.seed, max_tokens=size.max_tokens)
            golden = stage.golden(calls)
            before = stage.pid("engine-0")
            took_s = 0.0

            def fault(
                progress: Progress,
                stage: Stage = stage,
                calls: list[Call] = calls,
                fault_text: str = fault_text,
                is_killed: bool = is_killed,
                before: int = before,
            ) -> None:
                nonlocal took_s
                progress.wait_for_events(_begun(calls))
                stage.sabotage("engine-0", fault_text)
                began_at = time.monotonic()
                if is_killed:
                    took_s = stage.wait_until_fallen("engine-0", before) - began_at
                elif fault_text.startswith("slow"):
                    time.sleep(3)
                    stage.mend("engine-0")

            found = stage.disturbed(calls, golden, fault)
            stage.wait_until_whole(2)
            was_killed = stage.pid("engine-0") != before
        figures.append(
            Figure(
                "F6",
                {
                    "hang": "a step that never returns",
                    "hold 5": "interpreter lock held for 5 s",
                }.get(fault_text, "steps of 0.5 s"),
                f"{_told(found)}; "
                + (f"killed after {took_s:.1f} s" if was_killed else "not killed"),
                "golden; " + ("killed within the budget of 10 s + 1 s" if is_killed else "no kill"),
                found.is_golden and was_killed == is_killed and took_s < 11,
            )
        )
    return figures


def f7_kill_supervisor(size: Size) -> list[Figure]:
    """Kill -9 of the supervisor again and again, under load."""
    kills = 0
    comparisons = []
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            nonlocal kills
            progress.wait_for_events(_begun(calls))
            stage.kill("supervisor")
            kills += 1
            stage.wait_until_whole(2)

        while kills < 10 * size.repeats:
            comparisons.append(stage.disturbed(calls, golden, fault))
    merged = _merge(comparisons)
    return [
        Figure(
            "F7",
            f"kill -9 of the supervisor, {kills} times ({size.engine})",
            _told(merged),
            "0, 0, 0; < 2 s",
            merged.is_golden and merged.num_joins == 0 and merged.added_stall_p99_s < 2,
        )
    ]


def f8_kill_supervisor_and_engine(size: Size) -> list[Figure]:
    """Supervisor and an engine within 50 ms, in either order."""
    comparisons = []
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        orders = itertools.cycle((("supervisor", "engine-0"), ("engine-1", "supervisor")))
        for order in itertools.islice(orders, 2 * size.repeats):

            def fault(progress: Progress, order: tuple[str, str] = order) -> None:
                progress.wait_for_events(_begun(calls))
                pids = [stage.pid(name) for name in order]
                os.kill(pids[0], signal.SIGKILL)
                time.sleep(0.03)
                os.kill(pids[1], signal.SIGKILL)
                stage.wait_until_whole(2)

            comparisons.append(stage.disturbed(calls, golden, fault))
    merged = _merge(comparisons)
    return [
        Figure(
            "F8",
            f"kill -9 of supervisor and an engine within 50 ms, {len(comparisons)} times",
            _told(merged),
            "0, 0, 0; < 2 s",
            merged.is_golden and merged.num_joins == 0 and merged.added_stall_p99_s < 2,
        )
    ]


def f9_kill_gateway(size: Size) -> list[Figure]:
    """Kill -9 of the gateway; clients come back with ``Last-Event-ID``."""
    comparisons = []
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        for is_supervisor_too in (False, True) * size.repeats:

            def fault(
                progress: Progress,
                is_supervisor_too: bool = is_supervisor_too,
            ) -> None:
                progress.wait_for_events(_begun(calls))
                stage.kill("gateway-0")
                if is_supervisor_too:
                    stage.kill("supervisor")

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
    merged = _merge(comparisons)
    return [
        Figure(
            "F9",
            f"kill -9 of the gateway, alone and with the supervisor ({merged.num_joins} re-joined)",
            _told(merged),
            "0 lost, 0 repeated",
            merged.is_golden and merged.num_joins >= size.clients,
        )
    ]


def f10_all_engines_die(size: Size) -> list[Figure]:
    """All engines die at once: streams wait and go on."""
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
            for pid in [stage.pid(name) for name in ("engine-0", "engine-1")]:
                os.kill(pid, signal.SIGKILL)

        found = stage.disturbed(calls, golden, fault)
    return [
        Figure(
            "F10",
            "kill -9 of all engines at once",
            _told(found),
            "0, 0, 0",
            found.is_golden and found.num_joins == 0,
        )
    ]


def f12_bad_bus(size: Size) -> list[Figure]:
    """The bus drops, duplicates, delays and reorders."""
    with in_bad_weather(ECHO_RATE, engines=2, seed=size.seed) as (stage, proxy):
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            proxy.weather = Weather(loss=0.01, duplication=0.01, delay=0.01)

        comparisons = [stage.disturbed(calls, golden, fault) for _ in range(size.repeats)]
        lost = proxy.num_lost
    merged = _merge(comparisons)
    return [
        Figure(
            "F12",
            f"bus loses, doubles, delays and reorders 1 % each ({lost} frames lost)",
            _told(merged),
            "golden",
            merged.is_golden and lost > 0,
        )
    ]


def f13_cut_bus(size: Size) -> list[Figure]:
    """The bus is cut for 5 s: each member, each direction, and both."""
    members = ("engine-0", "gateway-0")
    directions = ((TO_SUPERVISOR,), (TO_MEMBER,), (TO_SUPERVISOR, TO_MEMBER))
    comparisons = []
    with in_bad_weather(ECHO_RATE, engines=2, seed=size.seed) as (stage, proxy):
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        for name, cut in itertools.product(members, directions):

            def fault(progress: Progress, name: str = name, cut: tuple[str, ...] = cut) -> None:
                progress.wait_for_events(_begun(calls))
                proxy.weather = Weather(cut=frozenset((name, direction) for direction in cut))
                time.sleep(5)
                proxy.weather = Weather()

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
    merged = _merge(comparisons)
    return [
        Figure(
            "F13",
            f"bus cut for 5 s: {len(comparisons)} pairs and directions",
            _told(merged),
            "golden",
            merged.is_golden,
        )
    ]


def f16_out_of_memory(size: Size) -> list[Figure]:
    """Steps that do not fit the device are shed, and the batch grows again."""
    with on_stage(ECHO_RATE) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
            stage.sabotage("engine-0", "oom")
            time.sleep(1)
            stage.mend("engine-0")

        found = stage.disturbed(calls, golden, fault)
        shed = sum(engine.num_shed for engine in stage.cluster.reply().engines)
        restarts = sum(engine.restarts for engine in stage.cluster.reply().engines)
    return [
        Figure(
            "F16",
            "every step of more than one sequence is out of memory for 1 s",
            f"{_told(found)}; {shed} steps shed, {restarts} restarts",
            "golden; shed, not killed",
            found.is_golden and shed > 0 and restarts == 0,
        )
    ]


def f17_not_finite(size: Size) -> list[Figure]:
    """One row without finite numbers ends; an engine without any is fenced."""
    figures = []
    for count, name in ((1, "non-finite logits of one sequence"), (0, "of all: engine fenced")):
        with on_stage(ECHO_RATE) as stage:
            calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
            golden = stage.golden(calls)
            before = stage.pid("engine-0")

            def fault(
                progress: Progress,
                stage: Stage = stage,
                calls: list[Call] = calls,
                count: int = count,
            ) -> None:
                progress.wait_for_events(_begun(calls))
                stage.sabotage("engine-0", f"nan {count}")

            found = stage.disturbed(calls, golden, fault)
            stage.wait_until_whole(2)
            is_same = stage.pid("engine-0") == before
        figures.append(
            Figure(
                "F17",
                name,
                _told(found) + ("" if is_same else "; engine replaced"),
                "1 failed, others golden" if count else "golden; replaced",
                found.num_failed == count and not found.num_changed and is_same == bool(count),
            )
        )
    return figures


def f18_dead_at_start(size: Size) -> list[Figure]:
    """An engine that dies at each start ends up broken; the others serve."""
    with on_stage(ECHO_RATE) as stage:
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
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
            f"{_told(found)}; broken {broken_at - began_at:.0f} s later, after {restarts} restarts;"
            f" exit status {status}",
            "golden; broken after 3 in 60 s; status not 0",
            found.is_golden and is_served and status != 0,
        )
    ]


def f19_poison(size: Size) -> list[Figure]:
    """A request that kills any engine that runs it."""
    with on_stage(ECHO_RATE) as stage:
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=2 * size.max_tokens)
        golden = stage.golden(calls)
        stage.sabotage("engines", "poison 1234")
        poison = Call(
            "/v1/completions",
            {"model": "understudy-demo", "prompt": [1234, 5], "max_tokens": 5, "stream": True},
        )
        answers = []
        took_s = 0.0

        def fault(progress: Progress) -> None:
            nonlocal took_s
            progress.wait_for_events(_begun(calls))
            began_at = time.monotonic()
            answers.append(_post(stage.cluster.base_url, poison))
            took_s = time.monotonic() - began_at
            answers.append(_post(stage.cluster.base_url, poison))

        found = stage.disturbed(calls, golden, fault)
        deaths = sum(engine.restarts for engine in stage.cluster.reply().engines)
        quarantined = stage.cluster.reply().quarantined
    statuses = [status for status, _ in answers]
    return [
        Figure(
            "F19",
            "a poison request under load, and the same again",
            f"{_told(found)}; {deaths} engines killed, {quarantined} quarantined after"
            f" {took_s:.1f} s; answers {answers}",
            "≤ 2 killed; others golden; quarantined < 30 s",
            found.is_golden and deaths <= 2 and took_s < 30 and statuses == [500, 500],
        )
    ]


def f21_rolling_restart(size: Size) -> list[Figure]:
    """Every process is replaced under load."""
    with on_stage(ECHO_RATE, engine=size.engine) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=2 * size.max_tokens)
        golden = stage.golden(calls)
        before = stage.cluster.pids()
        done = []

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
            done.append(stage.cluster.run("restart", "--rolling").returncode)

        found = stage.disturbed(calls, golden, fault)
        after = set(stage.cluster.pids().values())
    is_replaced = after.isdisjoint(before.values())
    return [
        Figure(
            "F21",
            "rolling restart of every process",
            f"{_told(found)}; {found.num_joins} resets",
            "0, 0, 0; 0 resets",
            found.is_golden and found.num_joins == 0 and done == [0] and is_replaced,
        )
    ]


def f22_other_numerics(size: Size) -> list[Figure]:
    """An engine of another class of numerics joins, and takes over."""
    with on_stage(ECHO_RATE) as stage:
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        stage.sabotage("engine-1", "numerics other")
        stage.kill("engine-1")
        stage.wait_until_whole(2)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
            stage.kill("engine-0")

        found = stage.disturbed(calls, golden, fault)
        inexact = stage.cluster.reply().resumed_inexact
    return [
        Figure(
            "F22",
            "an engine of another class of numerics takes over",
            f"{_told(found)}; {inexact} inexact resumes counted",
            "0 failed; counted",
            not found.num_failed and inexact > 0,
        )
    ]


def f23_wall_clock(size: Size) -> list[Figure]:
    """The wall clock is stepped by an hour, forth and back."""
    with on_stage(ECHO_RATE) as stage:
        calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)
        before = stage.cluster.pids()

        def fault(progress: Progress) -> None:
            progress.wait_for_events(_begun(calls))
            for offset_s in (3600, -3600, 0):
                stage.sabotage("clock", str(offset_s))
                time.sleep(0.7)

        found = stage.disturbed(calls, golden, fault)
        after = stage.cluster.pids()
        resumed = stage.cluster.reply().resumed
    return [
        Figure(
            "F23",
            "wall clock stepped by ±1 h",
            f"{_told(found)}; {resumed} resumed",
            "golden; no verdicts",
            found.is_golden and before == after and resumed == 0,
        )
    ]


def o8_duplicate_posts(size: Size) -> list[Figure]:
    """Many posts with one idempotency key: one generation."""
    count = 20 * size.clients
    with on_stage(ECHO_RATE) as stage:
        before = stage.cluster.reply().admitted
        (call,) = plain_calls(1, seed=size.seed, max_tokens=size.max_tokens)
        outcomes = run_calls(
            stage.cluster.base_url, [call] * count, idempotency_key="the same for all"
        )
        admitted = stage.cluster.reply().admitted - before
    digests = {outcome.digest for outcome in outcomes}
    problems = {outcome.problem for outcome in outcomes} - {""}
    return [
        Figure(
            "O8",
            f"{count} posts with one idempotency key",
            f"{admitted} generations, {len(digests)} answers, {len(problems)} problems",
            "1 generation",
            admitted == 1 and len(digests) == 1 and not problems,
        )
    ]


def _post(base_url: str, call: Call) -> tuple[int, str]:
    """One call without a stream; status and error code."""
    request = urllib.request.Request(
        base_url + call.path,
        json.dumps(call.body | {"stream": False}).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        body: Any = json.loads(error.read())
        return error.code, str(body["error"].get("code"))


SCENARIOS: Final[Mapping[str, Callable[[Size], list[Figure]]]] = MappingProxyType(
    {
        "F1": f1_kill_each_engine,
        "F5": f5_freeze,
        "F6": f6_slow_and_stuck,
        "F7": f7_kill_supervisor,
        "F8": f8_kill_supervisor_and_engine,
        "F9": f9_kill_gateway,
        "F10": f10_all_engines_die,
        "F12": f12_bad_bus,
        "F13": f13_cut_bus,
        "F16": f16_out_of_memory,
        "F17": f17_not_finite,
        "F18": f18_dead_at_start,
        "F19": f19_poison,
        "F21": f21_rolling_restart,
        "F22": f22_other_numerics,
        "F23": f23_wall_clock,
        "O8": o8_duplicate_posts,
    }
)
