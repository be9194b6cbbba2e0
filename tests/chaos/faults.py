"""Engines that freeze, hang, run out of memory, compute nonsense, or are killed by a request."""

from __future__ import annotations

import json
import os
import signal
import time
import urllib.error
import urllib.request
from typing import Any

from tests.chaos.clients import Call, Progress
from tests.chaos.figures import ECHO_RATE, Figure, Size, begun, told
from tests.chaos.stage import Stage, on_stage
from tests.chaos.workload import mixed_calls, plain_calls


def f5_freeze(size: Size) -> list[Figure]:
    """SIGSTOP, then SIGCONT: a short freeze moves nothing, a long one moves everything."""
    figures = []
    for freeze_s, moves in ((0.3, False), (2.0, True), (20.0, True)):
        with on_stage(ECHO_RATE) as stage:
            calls = plain_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
            golden = stage.golden(calls)

            def fault(
                progress: Progress,
                stage: Stage = stage,
                calls: list[Call] = calls,
                freeze_s: float = freeze_s,
            ) -> None:
                progress.wait_for_events(begun(calls))
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
                f"{told(found)}; {resumed} resumed",
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
                progress.wait_for_events(begun(calls))
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
                f"{told(found)}; "
                + (f"killed after {took_s:.1f} s" if was_killed else "not killed"),
                "golden; " + ("killed within the budget of 10 s + 1 s" if is_killed else "no kill"),
                found.is_golden and was_killed == is_killed,
                took_s < 11,
            )
        )
    return figures


def f16_out_of_memory(size: Size) -> list[Figure]:
    """Steps that do not fit the device are shed, and the batch grows again."""
    with on_stage(ECHO_RATE) as stage:
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            progress.wait_for_events(begun(calls))
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
            f"{told(found)}; {shed} steps shed, {restarts} restarts",
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
                progress.wait_for_events(begun(calls))
                stage.sabotage("engine-0", f"nan {count}")

            found = stage.disturbed(calls, golden, fault)
            stage.wait_until_whole(2)
            is_same = stage.pid("engine-0") == before
        figures.append(
            Figure(
                "F17",
                name,
                told(found) + ("" if is_same else "; engine replaced"),
                "1 failed, others golden" if count else "golden; replaced",
                found.num_failed == count and not found.num_changed and is_same == bool(count),
            )
        )
    return figures


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
            progress.wait_for_events(begun(calls))
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
            f"{told(found)}; {deaths} engines killed, {quarantined} quarantined after"
            f" {took_s:.1f} s; answers {answers}",
            "≤ 2 killed; others golden; quarantined < 30 s",
            found.is_golden and deaths <= 2 and statuses == [500, 500],
            took_s < 30,
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
            progress.wait_for_events(begun(calls))
            stage.kill("engine-0")

        found = stage.disturbed(calls, golden, fault)
        inexact = stage.cluster.reply().resumed_inexact
    return [
        Figure(
            "F22",
            "an engine of another class of numerics takes over",
            f"{told(found)}; {inexact} inexact resumes counted",
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
            progress.wait_for_events(begun(calls))
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
            f"{told(found)}; {resumed} resumed",
            "golden; no verdicts",
            found.is_golden and before == after and resumed == 0,
        )
    ]


def _post(base_url: str, call: Call) -> tuple[int, str]:
    """One call without a stream; status and error code."""
    request = urllib.request.Request(
        base_url + call.path,
        json.dumps(call.body | {"stream": False}).encode(),
        {"Content-Type": "application/json", "Authorization": f"Bearer {call.key}"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, ""
    except urllib.error.HTTPError as error:
        body: Any = json.loads(error.read())
        return error.code, str(body["error"].get("code"))
