"""The three actors of production under virtual time: nothing lost, nothing twice, one end each."""

from __future__ import annotations

import itertools
import random
import time
from dataclasses import replace
from typing import Final

import pytest

from tests.simulation.chaos import SeedFailed, play, play_many
from tests.simulation.client import Client
from tests.simulation.cluster import SCHEDULER, STEP_S, Cluster, undisturbed
from tests.simulation.workload import draw_requests
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.audience import UNCLAIMED_MAX_S
from understudy.runtime.control.deadlines import STALL_MAX_S
from understudy.runtime.control.health import SILENT_AFTER_S, STEP_BUDGET_MIN_S
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.actor import SUPERVISOR
from understudy.runtime.kit.virtual import NetworkFaults
from understudy.runtime.scheduling.decision import SampledToken

FAULTS: Final = NetworkFaults(loss=0.02, duplication=0.02, reorder=0.1)
LINKS: Final = [
    pytest.param(*pair, id=f"{pair[0]} to {pair[1]}")
    for member in ("engine-0", "gateway-0")
    for pair in ((member, SUPERVISOR), (SUPERVISOR, member))
]


def crowd(cluster: Cluster, count: int, *, within_s: float = 2.0, seed: int = 1) -> list[Client]:
    """Clients that come at random times."""
    draw = random.Random(seed)
    return [
        cluster.submit(request, at=draw.uniform(0.0, within_s))
        for request in draw_requests(seed, count)
    ]


def long_request(request_id: int) -> Request:
    params = SamplingParams(seed=request_id, max_tokens=100)
    return Request(request_id, request_id, (1, 2, 3), params)


def check_outputs(clients: list[Client]) -> None:
    """All are served to the end, with the output that each request alone stands for."""
    for client in clients:
        tokens, finish, _ = undisturbed(client.request)
        assert client.end == finish.name.lower(), client.end
        assert client.tokens == tokens


# The main promise


def two_hundred(seed: int, faults: NetworkFaults | None, *, crash: bool) -> Cluster:
    cluster = Cluster(seed, faults=faults)
    crowd(cluster, 200)
    if crash:
        cluster.crash_engine("engine-1", at=1.0, back_after_s=1.0, is_told=False)
    cluster.run(60.0)
    cluster.check_all_ended()
    return cluster


@pytest.fixture(scope="module")
def calm() -> Cluster:
    """Two hundred requests, and nothing happens to anybody."""
    return two_hundred(5, None, crash=False)


def test_two_hundred_requests_survive_message_loss_and_a_crash(calm: Cluster) -> None:
    one, same = (two_hundred(6, FAULTS, crash=True) for _ in range(2))
    assert one.network.lost > 10
    assert one.status().resumed > 10
    for stormy in (one, same):
        assert {client.end for client in stormy.clients} == {"stop", "length"}
        assert [client.tokens for client in stormy.clients] == [
            client.tokens for client in calm.clients
        ]
    assert one.loop.trace_hash() == same.loop.trace_hash() != calm.loop.trace_hash()


def test_without_faults_everything_is_done_once(calm: Cluster) -> None:
    check_outputs(calm.clients)
    status = calm.status()
    assert (status.admitted, status.finished, status.resumed) == (200, 200, 0)
    assert status.tokens == sum(len(client.tokens) for client in calm.clients)
    assert calm.supervisor.dispatcher.totals.stale == calm.supervisor.dispatcher.totals.broken == 0
    assert calm.network.lost == 0
    assert all(len(client.engines) == 1 for client in calm.clients)
    assert {client.engines[0] for client in calm.clients} == set(calm.engine_names)


def test_each_step_of_an_engine_costs_one_message_however_many_tokens_it_made() -> None:
    cluster = Cluster(5, engines=1)
    num_seqs = SCHEDULER.max_num_seqs // 2
    for number in range(1, num_seqs + 1):
        cluster.submit(long_request(number), at=0.5)
    cluster.loop.run_until(0.6)
    before, tokens_before = cluster.loop.frames, cluster.status().tokens
    cluster.loop.run_until(1.1)
    tokens = cluster.status().tokens - tokens_before
    num_steps = 0.5 / STEP_S
    assert tokens == pytest.approx(num_steps * num_seqs, rel=0.1)
    # One up and one down for each step; the rest are beats, pulses and acknowledgements.
    assert cluster.loop.frames - before < 2 * num_steps + 0.5 * (20 + 16) + num_steps / 4 + 10


# Engines


@pytest.mark.parametrize("is_told", [True, False], ids=["told", "silent"])
def test_a_crashed_engines_streams_go_on_where_they_stood(*, is_told: bool) -> None:
    cluster = Cluster(1, engines=2, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=1.0) for number in range(1, 9)]
    cluster.crash_engine("engine-0", at=2.5, back_after_s=60.0, is_told=is_told)
    stood: list[int] = []
    cluster.loop.at(2.5, lambda: stood.extend(len(client.tokens) for client in clients))
    cluster.run(30.0)
    check_outputs(clients)
    moved = [client for client in clients if len(client.engines) == 2]
    assert len(moved) == 4
    assert all(20 < tokens < 100 for tokens in stood)
    cluster.loop.run_until(62.0)
    cluster.check_all_ended()


@pytest.mark.parametrize("step", range(26))
def test_an_engine_may_die_at_any_step_of_a_request(step: int) -> None:
    """In each chunk of its prompt, at its first token, its last, and after its end."""
    cluster = Cluster(1, engines=2, step_s=0.05)
    params = SamplingParams(seed=3, max_tokens=20, logprobs=2)
    client = cluster.submit(Request(1, 1, tuple(range(1, 101)), params), at=1.01)
    for name in cluster.engine_names:
        # Whichever has it; the other one is there to go on.
        cluster.crash_busy_engine(name, at=1.03 + 0.05 * step)
    cluster.run(30.0)
    check_outputs([client])
    assert len(client.tokens) == 20
    assert cluster.status().resumed == (1 if step < 20 else 0) or step in {20, 21}
    cluster.loop.run_until(35.0)
    cluster.check_all_ended()


def test_all_engines_die_and_come_back() -> None:
    cluster = Cluster(2, faults=FAULTS)
    clients = crowd(cluster, 60, within_s=1.0)
    for number, name in enumerate(cluster.engine_names):
        cluster.crash_engine(name, at=0.5 + 0.1 * number, back_after_s=8.0, is_told=number == 1)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)


def test_engines_that_die_again_and_again_lose_nothing() -> None:
    cluster = Cluster(3, step_s=0.05)
    clients = crowd(cluster, 40)
    for number in range(12):
        name = cluster.engine_names[number % 3]
        cluster.crash_engine(name, at=0.5 + 0.4 * number, back_after_s=0.3, is_told=True)
    cluster.run(120.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed > 20


def test_without_any_engine_every_stream_ends_with_an_error_at_its_time() -> None:
    cluster = Cluster(4, engines=1)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 40)]
    cluster.crash_engine("engine-0", at=0.8, back_after_s=STALL_MAX_S + 5.0, is_told=True)
    cluster.run(0.5 + STALL_MAX_S - 1.0)
    assert {client.end for client in clients} == {None}
    cluster.run(0.8 + STALL_MAX_S + 1.0)
    assert {client.end for client in clients} == {"unavailable"}
    cluster.loop.run_until(STALL_MAX_S + 10.0)
    cluster.check_all_ended()


def test_a_request_that_no_engine_survives_ends() -> None:
    """Each engine dies a moment after it was given the request, and so does the next."""
    cluster = Cluster(4, engines=1)
    client = cluster.submit(long_request(1), at=0.5)

    def crash_if_busy() -> None:
        name = "engine-0"
        now = cluster.loop.now
        if cluster.loop.is_on_stage(name) and cluster.engine(name).heartbeat(now).running:
            cluster.crash_engine(name, at=now, back_after_s=20.0, is_told=True)
        if client.end is None:
            cluster.loop.at(now + 0.01, crash_if_busy)

    cluster.loop.at(0.5, crash_if_busy)
    cluster.run(3 * STALL_MAX_S)
    assert client.end is not None
    cluster.loop.run_until(cluster.loop.now + 20.0)
    cluster.check_all_ended()


# The network


@pytest.mark.parametrize(("source", "target"), LINKS)
@pytest.mark.parametrize("seconds", [0.3, 2.0, 5.0])
def test_a_cut_of_each_link_and_direction_loses_and_doubles_nothing(
    source: str, target: str, seconds: float
) -> None:
    cluster = Cluster(7, step_s=0.05)
    clients = crowd(cluster, 25)
    cluster.cut(source, target, at=1.0, seconds=seconds)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)


def test_a_short_cut_costs_no_engine_its_session() -> None:
    cluster = Cluster(7, step_s=0.05)
    clients = crowd(cluster, 40)
    for name in cluster.engine_names:
        cluster.cut(name, SUPERVISOR, at=1.0, seconds=SILENT_AFTER_S - 0.1)
        cluster.cut(SUPERVISOR, name, at=1.0, seconds=SILENT_AFTER_S - 0.1)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 0


def test_a_cut_off_engine_is_not_heard_again_under_its_old_epoch() -> None:
    """It works on, unaware, and reports all at once when the line is back."""
    cluster = Cluster(8, engines=2, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 9)]
    cluster.cut("engine-0", SUPERVISOR, at=1.5, seconds=2.5)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 4
    assert cluster.status().engines[0].epoch > cluster.status().engines[1].epoch


@pytest.mark.parametrize(
    "faults",
    [
        NetworkFaults(loss=0.3),
        NetworkFaults(duplication=0.5),
        NetworkFaults(reorder=0.8, reorder_delay_max_s=0.2),
        NetworkFaults(delay_min_s=0.05, delay_max_s=0.4),
        NetworkFaults(loss=0.2, duplication=0.3, reorder=0.5, reorder_delay_max_s=0.5),
    ],
    ids=["loss", "duplication", "reorder", "delay", "everything"],
)
def test_a_terrible_network_is_slow_and_right(faults: NetworkFaults) -> None:
    cluster = Cluster(9, faults=faults)
    clients = crowd(cluster, 40)
    cluster.run(120.0)
    cluster.check_all_ended()
    check_outputs(clients)


# Gateways and clients


def test_clients_of_a_crashed_gateway_go_on_by_another_or_by_the_next() -> None:
    cluster = Cluster(10, gateways=2, step_s=0.05)
    moved = [cluster.submit(long_request(number), at=0.5) for number in range(1, 40)]
    cluster.crash_gateway("gateway-0", at=1.0, back_after_s=1.0)
    cluster.crash_gateway("gateway-1", at=1.5, back_after_s=3.0)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(moved)
    assert cluster.status().resumed == 0


def test_what_no_client_comes_back_for_is_cancelled_after_a_while() -> None:
    cluster = Cluster(10, engines=1, step_s=0.5)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 60)]
    for client in clients:
        # Its connection is gone with the gateway, and it does not try again.
        cluster.leave(client, at=2.0)
    cluster.crash_gateway("gateway-0", at=1.9, back_after_s=30.0)
    cluster.loop.run_until(1.9 + 6.0)
    assert cluster.status().running > 0
    cluster.loop.run_until(1.9 + 6.0 + UNCLAIMED_MAX_S)
    status = cluster.status()
    assert (status.queued, status.running) == (0, 0)


def test_clients_that_leave_give_their_blocks_back_at_once() -> None:
    cluster = Cluster(11, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 61)]
    for client in clients:
        cluster.leave(client, at=1.0)
    cluster.loop.run_until(1.0 + 3 * 0.05)
    for name in cluster.engine_names:
        beat = cluster.engine(name).heartbeat(cluster.loop.now)
        assert (beat.running, beat.waiting) == (0, 0)
    assert cluster.status().queued == 0
    cluster.check_all_ended()


@pytest.mark.parametrize("seed", range(2))
def test_clients_that_leave_at_random_times_disturb_nobody(seed: int) -> None:
    cluster = Cluster(seed, faults=FAULTS)
    draw = random.Random(seed)
    clients = crowd(cluster, 100, seed=seed)
    leaving = clients[::2]
    for client in leaving:
        cluster.leave(client, at=draw.uniform(0.0, 3.0))
    cluster.run(60.0)
    cluster.check_all_ended()
    assert {client.end for client in leaving} >= {"left"}
    check_outputs(clients[1::2])


def test_a_full_queue_turns_clients_away_who_are_let_in_later() -> None:
    cluster = Cluster(12, engines=1, limits=AdmissionLimits(requests_max=10))
    # Each call has one choice: one with several is taken, or turned away, as a whole.
    alone = [replace(one, group_id=one.request_id) for one in draw_requests(12, 100)]
    clients = [cluster.submit(request, at=0.5) for request in alone]
    cluster.run(5.0)
    turned_away = [client for client in clients if client.end == "overloaded"]
    assert len(turned_away) == 100 - 10 - 2 * SCHEDULER.max_num_seqs
    status = cluster.status()
    assert status.rejected + status.shed == len(turned_away)
    assert status.shed > 0, "urgent requests have come after others"
    check_outputs([client for client in clients if client.end != "overloaded"])
    cluster.check_all_ended()


# The supervisor


@pytest.mark.parametrize("back_after_s", [0.05, 0.5, 5.0, 25.0])
def test_a_crashed_supervisor_is_not_noticed(back_after_s: float) -> None:
    cluster = Cluster(13, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 60)]
    cluster.crash_supervisor(at=1.0, back_after_s=back_after_s)
    clients += [cluster.submit(long_request(number), at=1.1) for number in range(60, 80)]
    cluster.run(90.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 0, "the engines have played on"


def test_engines_play_on_in_silence() -> None:
    """What they made meanwhile is told as soon as somebody listens again."""
    cluster = Cluster(14, engines=1, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=0.5) for number in range(1, 5)]
    cluster.crash_supervisor(at=1.0, back_after_s=10.0)
    cluster.loop.run_until(10.9)
    assert all(len(client.tokens) < 20 for client in clients)
    cluster.loop.run_until(12.0)
    check_outputs(clients)
    cluster.check_all_ended()


def test_supervisor_and_engine_die_together() -> None:
    cluster = Cluster(15, step_s=0.05)
    clients = crowd(cluster, 60)
    cluster.crash_supervisor(at=1.0, back_after_s=0.2)
    cluster.crash_engine("engine-0", at=1.05, back_after_s=1.0, is_told=False)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)


@pytest.mark.parametrize("num_bytes", [0, 1, 17, 100, 1000])
def test_a_supervisor_that_dies_in_the_middle_of_a_write_has_told_nobody(num_bytes: int) -> None:
    """What was half written is forgotten: nobody was told of it."""
    cluster = Cluster(15, step_s=0.05)
    clients = crowd(cluster, 40)
    cluster.crash_supervisor(at=1.0, back_after_s=0.3, in_write_after=num_bytes)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.loop.incarnation(SUPERVISOR) == 2


def test_a_full_disk_is_told_and_does_not_stop_the_service() -> None:
    cluster = Cluster(17, step_s=0.05)
    clients = crowd(cluster, 60)
    cluster.fill_disk(at=0.5, seconds=2.0)
    cluster.loop.run_until(2.0)
    assert cluster.status().journal_fault
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    cluster.loop.run_until(cluster.loop.now + 30.0)
    assert cluster.status().journal_fault == ""


@pytest.mark.parametrize("seconds", [0.3, 2.0, 9.0, 20.0])
def test_a_frozen_engine_is_given_up_only_if_it_stays_so(seconds: float) -> None:
    cluster = Cluster(18, engines=2, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=1.0) for number in range(1, 9)]
    cluster.freeze("engine-0", at=1.5, seconds=seconds)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert (cluster.status().resumed > 0) == (seconds > SILENT_AFTER_S)
    assert cluster.loop.incarnation("engine-0") == (2 if seconds > 10.0 else 1)


@pytest.mark.parametrize("seconds", [0.3, 2.0, 9.0])
def test_a_frozen_supervisor_judges_nobody_by_its_own_absence(seconds: float) -> None:
    cluster = Cluster(19, step_s=0.05)
    clients = crowd(cluster, 40)
    cluster.freeze(SUPERVISOR, at=1.0, seconds=seconds)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 0


def test_a_slow_step_within_its_budget_costs_nobody_anything() -> None:
    cluster = Cluster(20, engines=2, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=1.0) for number in range(1, 9)]
    cluster.delay_step("engine-0", at=1.5, seconds=STEP_BUDGET_MIN_S - 1.0)
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 0
    assert cluster.stage.killed == []


def test_a_step_that_never_returns_is_ended_when_its_budget_is_spent() -> None:
    cluster = Cluster(20, engines=2, step_s=0.05)
    clients = [cluster.submit(long_request(number), at=1.0) for number in range(1, 9)]
    cluster.delay_step("engine-0", at=1.5, seconds=1e6)
    cluster.loop.run_until(1.5 + STEP_BUDGET_MIN_S - 0.1)
    assert cluster.stage.killed == []
    cluster.loop.run_until(1.5 + STEP_BUDGET_MIN_S + 1.0)
    assert len(cluster.stage.killed) == 1
    cluster.run(60.0)
    cluster.check_all_ended()
    check_outputs(clients)
    assert cluster.status().resumed == 4


# Everything at once


@pytest.mark.parametrize("seed", range(40))
def test_a_random_history_keeps_every_promise(seed: int) -> None:
    play(seed)


@pytest.mark.parametrize("seed", [3, 8])
def test_a_random_history_repeats_exactly(seed: int) -> None:
    one, other = play(seed).cluster, play(seed).cluster
    assert one.loop.trace_hash() == other.loop.trace_hash()
    assert one.loop.frames == other.loop.frames


def test_a_seed_that_fails_says_how_to_see_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def misdraw(_runner: object, _params: object, _position: int) -> object:
        return SampledToken(next(tokens) % 400)

    tokens = itertools.count()
    monkeypatch.setattr(EchoRunner, "_draw", misdraw)
    with pytest.raises(SeedFailed, match=r"python -m tests\.simulation\.chaos 1$"):
        play(1)


@pytest.mark.soak
def test_ten_thousand_random_histories_keep_every_promise() -> None:
    failures = play_many(range(10_000))
    assert not failures, "\n".join(failures)


# Idleness


def test_an_idle_company_says_little_and_nothing_twice() -> None:
    """Beats and pulses, a hundred frames a second or so; no acknowledgements of nothing."""
    cluster = Cluster(16)
    cluster.loop.run_until(10.0)
    before = cluster.loop.frames
    cluster.loop.run_until(20.0)
    beats, pulses, members = 3 * 20, 4, 4
    expected = 10 * (beats + 2 * members * pulses)
    assert abs(cluster.loop.frames - before - expected) <= 20


@pytest.mark.perf
def test_an_idle_company_runs_a_hundred_times_as_fast_as_time() -> None:
    cluster = Cluster(16)
    cluster.loop.run_until(10.0)
    speeds = []
    for _ in range(5):
        started, end = time.process_time(), cluster.loop.now + 100.0
        cluster.loop.run_until(end)
        speeds.append(100.0 / (time.process_time() - started))
    assert max(speeds) >= 100.0
