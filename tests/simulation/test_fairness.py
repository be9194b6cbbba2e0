"""Shares and deadlines of a whole cluster under virtual time, with the actors of production."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Final

import pytest

from tests.simulation.client import Client
from tests.simulation.cluster import STEP_S, Cluster
from tests.simulation.invariants import VOCAB_SIZE
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.tenancy import TenantPolicy
from understudy.runtime.scheduling.decision import Flight, OverlappingRunner, StepPlan

BEGIN_S: Final = 0.5
TOKENS_PER_S: Final = 8 / STEP_S
"""What one engine makes with a full batch."""


def request(number: int, tenant: str, *, prompt: int = 16, output: int = 20) -> Request:
    tokens = tuple((number * 31 + place) % VOCAB_SIZE for place in range(prompt))
    params = SamplingParams(seed=number, max_tokens=output)
    return Request(number, number, tokens, params, tenant=tenant)


def weighted(weights: Mapping[str, float], limits: AdmissionLimits | None = None) -> Cluster:
    policies = {tenant: TenantPolicy(weight=weight) for tenant, weight in weights.items()}
    return Cluster(1, engines=1, policy_of=policies.__getitem__, limits=limits)


def num_tokens(clients: Iterable[Client], tenant: str) -> int:
    return sum(len(client.tokens) for client in clients if client.request.tenant == tenant)


@pytest.mark.parametrize("weight", [1.0, 4.0])
def test_equal_requests_are_served_in_proportion_to_weights(weight: float) -> None:
    cluster = weighted({"a": weight, "b": 1.0})
    clients = [
        cluster.submit(request(number, "ab"[number % 2]), at=BEGIN_S) for number in range(1, 641)
    ]
    cluster.loop.run_until(BEGIN_S + 1.0)
    before = {tenant: num_tokens(clients, tenant) for tenant in "ab"}
    # Both have work waiting until a has had its 320 requests of 20 tokens.
    cluster.loop.run_until(BEGIN_S + 0.9 * 6400 * (1 + 1 / weight) / TOKENS_PER_S)
    assert not all(client.end for client in clients if client.request.tenant == "a")
    served = {tenant: num_tokens(clients, tenant) - before[tenant] for tenant in "ab"}
    assert served["a"] / served["b"] == pytest.approx(weight, rel=0.03)


def test_a_tenants_share_is_of_the_work_and_not_of_the_requests() -> None:
    cluster = weighted({"long": 1.0, "short": 1.0})
    clients = [
        cluster.submit(request(number, "long", prompt=60, output=40), at=BEGIN_S)
        for number in range(1, 151)
    ]
    clients += [
        cluster.submit(request(number, "short", prompt=6, output=4), at=BEGIN_S)
        for number in range(200, 1000)
    ]

    def cost(tenant: str) -> int:
        return sum(
            len(client.request.prompt) + 2 * len(client.tokens)
            for client in clients
            if client.request.tenant == tenant and client.tokens
        )

    # Whoever comes first, if only by a moment, has what is free to himself.
    cluster.loop.run_until(BEGIN_S + 2.0)
    before = {tenant: cost(tenant) for tenant in ("long", "short")}
    cluster.loop.run_until(BEGIN_S + 10.0)
    long, short = (cost(tenant) - before[tenant] for tenant in ("long", "short"))
    assert long / short == pytest.approx(1.0, rel=0.03)


def test_a_flood_from_one_key_leaves_the_others_their_shares() -> None:
    """The flood fills the queue a hundred times over; others ask for just less than their third."""
    seconds, draw = 6.0, random.Random(7)
    cluster = weighted({"flood": 1.0, "b": 1.0, "c": 1.0}, limits=AdmissionLimits(requests_max=64))
    third_per_s = TOKENS_PER_S / 20 / 3
    number = 1
    others: list[Client] = []
    for tenant in "bc":
        at = BEGIN_S
        while at < BEGIN_S + seconds:
            others.append(cluster.submit(request(number, tenant), at=at))
            number += 1
            at += draw.expovariate(0.9 * third_per_s)
    flood = [
        cluster.submit(request(number + extra, "flood"), at=BEGIN_S + extra * seconds / 2400)
        for extra in range(2400)
    ]
    cluster.loop.run_until(BEGIN_S + seconds + 1.0)
    for tenant in "bc":
        asked = [client for client in others if client.request.tenant == tenant]
        served = [client for client in asked if client.end == "length"]
        assert len(served) >= 0.9 * len(asked), tenant
    assert sum(client.end == "overloaded" for client in flood) > 1800
    assert sum(client.end == "length" for client in flood) > 0.8 * third_per_s * seconds


class PunctualRunner:
    """A runner that insists on not being given what is past its deadline already."""

    overlaps = True

    def __init__(
        self, runner: OverlappingRunner, cluster: Cluster, due_at: dict[int, float]
    ) -> None:
        self._runner = runner
        self._cluster = cluster
        self._due_at = due_at
        self.num_prefills = 0

    def launch(self, plan: StepPlan) -> Flight:
        for sequence, _, _ in plan.scheduled:
            if not sequence.num_output_tokens:
                self.num_prefills += 1
                due_at = self._due_at.get(sequence.request_id, float("inf"))
                assert self._cluster.loop.now < due_at, "an expired request reached prefill"
        return self._runner.launch(plan)


def hasty(number: int, draw: random.Random) -> Request:
    """A request of any length that may be in a hurry; half of them end before their limit."""
    plain = request(number, "", prompt=draw.randint(1, 60), output=draw.choice([5, 10, 20, 40, 60]))
    stops = tuple(range(draw.choice([0, 0, 10, 40])))
    params = replace(plain.params, temperature=1.0, stop_token_ids=stops)
    deadline_s = draw.choice([None, draw.uniform(0.1, 3.0), draw.uniform(0.5, 6.0)])
    return replace(plain, params=params, deadline_s=deadline_s)


def storm(seed: int, count: int) -> tuple[int, int, int]:
    """How many had a deadline, how many of them were admitted, and how many of those made it."""
    draw = random.Random(seed)
    cluster = Cluster(seed, engines=2)
    cluster.loop.run_until(0.3)
    clients: list[Client] = []
    due_at: dict[int, float] = {}
    for name in cluster.engine_names:
        engine = cluster.engine(name)
        engine._runner = PunctualRunner(engine._runner, cluster, due_at)
    at = BEGIN_S
    for number in range(1, count + 1):
        # Calm and storm: from half of what the engines can do to twice as much.
        is_storm = int(at / 4.0) % 2
        at += draw.expovariate(2 * TOKENS_PER_S / 22 * (2.0 if is_storm else 0.5))
        one = hasty(number, draw)
        clients.append(cluster.submit(one, at=at))
        if one.deadline_s is not None:
            due_at[number] = at + one.deadline_s + 0.05
    cluster.loop.run_until(at + 60.0)
    cluster.check_all_ended()
    asked = [client for client in clients if client.request.deadline_s is not None]
    made = [client for client in asked if client.end in {"stop", "length"}]
    admitted = [client for client in asked if not is_refused(cluster, client)]
    return len(asked), len(admitted), len(made)


def test_of_requests_that_are_promised_their_time_nearly_all_make_it() -> None:
    asked, admitted, made = storm(1, 700)
    assert made >= 0.95 * admitted, f"{made} of {admitted} of {asked}"
    assert made >= 0.4 * asked, f"{made} of {admitted} of {asked}"


def is_refused(cluster: Cluster, client: Client) -> bool:
    """Whether a request was turned away at the door: the journal knows nothing of it."""
    entry = cluster.supervisor.dispatcher._ledger.find(client.request.request_id)
    return entry is None
