"""A bad bus between the processes, and clients that ask the same again and again."""

from __future__ import annotations

import itertools
import time

from tests.chaos.clients import Progress, run_calls
from tests.chaos.figures import ECHO_RATE, Figure, Size, begun, merge, told
from tests.chaos.proxy import TO_MEMBER, TO_SUPERVISOR, Weather
from tests.chaos.stage import in_bad_weather, on_stage
from tests.chaos.workload import mixed_calls, plain_calls


def f12_bad_bus(size: Size) -> list[Figure]:
    """The bus drops, duplicates, delays and reorders."""
    with in_bad_weather(ECHO_RATE, engines=2, seed=size.seed) as (stage, proxy):
        calls = mixed_calls(size.clients, seed=size.seed, max_tokens=size.max_tokens)
        golden = stage.golden(calls)

        def fault(progress: Progress) -> None:
            proxy.weather = Weather(loss=0.01, duplication=0.01, delay=0.01)

        comparisons = [stage.disturbed(calls, golden, fault) for _ in range(size.repeats)]
        lost = proxy.num_lost
    merged = merge(comparisons)
    return [
        Figure(
            "F12",
            f"bus loses, doubles, delays and reorders 1 % each ({lost} frames lost)",
            told(merged),
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
                progress.wait_for_events(begun(calls))
                proxy.weather = Weather(cut=frozenset((name, direction) for direction in cut))
                time.sleep(5)
                proxy.weather = Weather()

            comparisons.append(stage.disturbed(calls, golden, fault))
            stage.wait_until_whole(2)
    merged = merge(comparisons)
    return [
        Figure(
            "F13",
            f"bus cut for 5 s: {len(comparisons)} pairs and directions",
            told(merged),
            "golden",
            merged.is_golden,
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
