"""One seed, one history: what a cluster has to go through, all of it drawn from the seed.

``python -m tests.simulation.chaos SEED …`` repeats it, from the repository's root, and
``python -m tests.simulation.chaos 0:10000`` plays so many on all cores.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Final

from tests.simulation.cluster import Cluster, undisturbed
from tests.simulation.workload import draw_requests, with_vectors
from understudy.runtime.kit.actor import SUPERVISOR
from understudy.runtime.kit.virtual import NetworkFaults

FAULTS_END_S: Final = 12.0
SETTLED_WITHIN_S: Final = 60.0
"""After the last fault everybody has an end."""
GOOD_ENDS: Final = {"stop", "length"}
KINDS: Final = {
    "engine": 5,
    "cut engine": 4,
    "cut gateway": 2,
    "freeze": 2,
    "gateway": 2,
    "supervisor": 3,
    "disk": 1,
}
"""What can happen, and how often."""


@dataclass
class History:
    """What came of a seed."""

    seed: int
    cluster: Cluster
    has_full_disk: bool = False
    has_dead_supervisor: bool = False
    events: list[str] = field(default_factory=list)


class SeedFailed(AssertionError):
    """A seed broke a promise; says how to see it again."""

    def __init__(self, seed: int, error: BaseException) -> None:
        super().__init__(
            f"seed {seed}: {type(error).__name__}: {error}\n"
            f"repeat it with: python -m tests.simulation.chaos {seed}"
        )


def play(seed: int) -> History:
    """Live through what the seed holds; raises if any promise is broken.

    Raises:
        SeedFailed: one was.
    """
    history = _draw(seed)
    try:
        history.cluster.run(FAULTS_END_S + SETTLED_WITHIN_S)
        history.cluster.check_all_ended()
        _check_outputs(history)
    except Exception as error:
        raise SeedFailed(seed, error) from error
    return history


def _draw(seed: int) -> History:
    draw = random.Random(seed)
    faults = NetworkFaults(
        loss=draw.choice([0.0, 0.01, 0.05]),
        duplication=draw.choice([0.0, 0.02]),
        reorder=draw.choice([0.0, 0.05, 0.3]),
        reorder_delay_max_s=draw.choice([0.005, 0.1]),
    )
    cluster = Cluster(
        seed,
        engines=draw.randint(1, 4),
        gateways=draw.randint(1, 2),
        faults=faults,
        step_s=draw.choice([0.02, 0.05, 0.2]),
    )
    history = History(seed, cluster)
    for request in with_vectors(seed, draw_requests(seed, draw.randint(10, 50))):
        at = draw.uniform(0.0, FAULTS_END_S / 4)
        client = cluster.submit(request, at=at, gateway=draw.choice(cluster.gateway_names))
        if draw.random() < 0.15:
            cluster.leave(client, at=at + draw.expovariate(2.0))
    for _ in range(draw.randint(0, 8)):
        _draw_fault(draw, history)
    return history


def _draw_fault(draw: random.Random, history: History) -> None:
    cluster = history.cluster
    at = draw.uniform(0.3, FAULTS_END_S - 8.0)
    lasting = draw.choice([draw.uniform(0.01, 0.5), draw.uniform(0.5, 5.0)])
    engine, gateway = draw.choice(cluster.engine_names), draw.choice(cluster.gateway_names)
    (kind,) = draw.choices(list(KINDS), list(KINDS.values()))
    history.events.append(f"{at:.3f} s: {kind} {engine} {gateway} for {lasting:.3f} s")
    match kind:
        case "engine":
            cluster.crash_engine(engine, at=at, back_after_s=lasting, is_told=draw.random() < 0.5)
        case "cut engine":
            pair = draw.choice([(engine, SUPERVISOR), (SUPERVISOR, engine)])
            cluster.cut(*pair, at=at, seconds=lasting)
        case "cut gateway":
            pair = draw.choice([(gateway, SUPERVISOR), (SUPERVISOR, gateway)])
            cluster.cut(*pair, at=at, seconds=lasting)
        case "freeze":
            cluster.freeze(draw.choice([engine, gateway, SUPERVISOR]), at=at, seconds=2 * lasting)
        case "gateway":
            cluster.crash_gateway(gateway, at=at, back_after_s=lasting)
        case "disk" if not history.has_dead_supervisor:
            # What the disk did not take is lost with the supervisor: that is no broken promise.
            history.has_full_disk = True
            cluster.fill_disk(at=at, seconds=lasting)
        case "supervisor" if not history.has_full_disk:
            history.has_dead_supervisor = True
            in_write_after = draw.choice([None, draw.randint(0, 4000)])
            cluster.crash_supervisor(at=at, back_after_s=lasting, in_write_after=in_write_after)
        case _:
            pass


def _check_outputs(history: History) -> None:
    """Whatever was delivered is what the request alone says."""
    for client in history.cluster.clients:
        whole, finish, vector = undisturbed(client.request)
        assert client.tokens == whole[: len(client.tokens)], f"{client.request}: other tokens"
        assert client.end in {*GOOD_ENDS, "left"}, f"{client.request}: {client.end}"
        if client.end in GOOD_ENDS:
            assert client.tokens == whole, f"{client.request}: cut short"
            assert client.vector == vector, f"{client.request}: another vector, or none"
            assert client.end == finish.name.lower(), f"{client.request}: {client.end}"


def describe(history: History) -> str:
    """A few lines on what happened."""
    ends = [client.end or "none" for client in history.cluster.clients]
    counts = {end: ends.count(end) for end in sorted(set(ends))}
    moved = sum(len(client.engines) > 1 for client in history.cluster.clients)
    lines = [f"seed {history.seed}: {counts}, {moved} moved, {history.cluster.loop.now:.3f} s"]
    return "\n  ".join([*lines, *history.events, history.cluster.loop.trace_hash()])


def play_many(seeds: Iterable[int]) -> list[str]:
    """Play seeds on all cores; what is wrong with each that failed."""
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        return [failure for failure in pool.map(_failure, seeds, chunksize=8) if failure]


def _failure(seed: int) -> str:
    try:
        play(seed)
    except SeedFailed as failure:
        return str(failure)
    return ""


def _main(words: list[str]) -> int:
    """Describe single seeds, or play a range of them (``0:1000``)."""
    status = 0
    for word in words:
        first, colon, end = word.partition(":")
        if not colon:
            sys.stdout.write(describe(play(int(word))) + "\n")
            continue
        seeds = range(int(first), int(end))
        started_at = time.monotonic()
        failures = play_many(seeds)
        sys.stdout.writelines(failure + "\n" for failure in failures)
        took_s = time.monotonic() - started_at
        sys.stdout.write(f"{len(seeds)} seeds, {len(failures)} failed, {took_s:.0f} s\n")
        status = 1 if failures else status
    return status


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
