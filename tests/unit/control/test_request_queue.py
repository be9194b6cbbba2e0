"""The queue against a plain list that is sorted at every turn."""

from __future__ import annotations

from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from understudy.runtime.control.fair_share import FairShare
from understudy.runtime.control.request_queue import AGED_AFTER_S, AGED_EVERY, RequestQueue
from understudy.runtime.control.tenancy import TenantPolicy


def push(queue: RequestQueue, *request_ids: int, priority: int = 0, resumed: bool = False) -> None:
    for request_id in request_ids:
        queue.push(request_id, num_tokens=10, priority=priority, is_resumed=resumed)


def fair(**weights: float) -> FairShare:
    return FairShare(lambda tenant: TenantPolicy(weight=weights.get(tenant, 1.0)))


def drain(queue: RequestQueue) -> list[int]:
    taken = []
    while (request_id := queue.pop()) is not None:
        taken.append(request_id)
    return taken


def test_requests_leave_in_the_order_in_which_they_came() -> None:
    queue = RequestQueue()
    push(queue, 5, 3, 9, 1)
    assert drain(queue) == [5, 3, 9, 1]


def test_a_lower_priority_is_earlier() -> None:
    queue = RequestQueue()
    push(queue, 1, priority=5)
    push(queue, 2, priority=0)
    push(queue, 3, priority=-5)
    assert drain(queue) == [3, 2, 1]


def test_resumed_requests_come_before_new_ones_whatever_their_priority() -> None:
    queue = RequestQueue()
    push(queue, 1, priority=-100)
    push(queue, 2, priority=100, resumed=True)
    push(queue, 3, priority=0, resumed=True)
    assert drain(queue) == [3, 2, 1]


def test_an_empty_queue_gives_nothing() -> None:
    queue = RequestQueue()
    assert queue.pop() is None
    assert not queue.remove(1)
    assert len(queue) == queue.num_tokens == 0


def test_a_request_waits_once() -> None:
    queue = RequestQueue()
    push(queue, 1)
    with pytest.raises(AssertionError, match="once"):
        push(queue, 1)


def test_a_removed_request_may_come_back_at_the_end() -> None:
    queue = RequestQueue()
    push(queue, 1, 2)
    assert queue.remove(1)
    assert 1 not in queue
    push(queue, 1)
    assert drain(queue) == [2, 1]


def test_removed_requests_do_not_pile_up_in_the_heap() -> None:
    queue = RequestQueue()
    push(queue, 0)
    for request_id in range(1, 10_000):
        push(queue, request_id)
        assert queue.remove(request_id)
    assert len(vars(queue)["_levels"][0][""].heap) < 200
    assert drain(queue) == [0]


def test_of_a_tenants_requests_the_earliest_deadline_is_first() -> None:
    queue = RequestQueue()
    for request_id, due_at in ((1, 9.0), (2, float("inf")), (3, 5.0), (4, 9.0)):
        queue.push(request_id, num_tokens=1, priority=0, is_resumed=False, due_at=due_at)
    assert drain(queue) == [3, 1, 4, 2]


def test_a_deadline_takes_nothing_from_other_tenants() -> None:
    share = fair()
    queue = RequestQueue(share)
    queue.push(1, num_tokens=1, priority=0, is_resumed=False, tenant="a")
    queue.push(2, num_tokens=1, priority=0, is_resumed=False, tenant="b", due_at=1.0)
    share.charge("b", 1.0)
    assert drain(queue) == [1, 2]


def test_the_tenant_that_has_had_the_least_is_next() -> None:
    share = fair(b=2.0)
    queue = RequestQueue(share)
    for number in range(12):
        for tenant in ("a", "b"):
            queue.push(
                2 * number + (tenant == "b"),
                num_tokens=1,
                priority=0,
                is_resumed=False,
                tenant=tenant,
            )
    served = []
    for _ in range(12):
        request_id = queue.pop()
        assert request_id is not None
        tenant = "b" if request_id % 2 else "a"
        share.charge(tenant, 10.0)
        served.append(tenant)
    assert (served.count("a"), served.count("b")) == (4, 8)


def test_nobody_saves_up_a_claim_by_being_idle() -> None:
    share = fair()
    queue = RequestQueue(share)
    queue.push(0, num_tokens=1, priority=0, is_resumed=False, tenant="busy")
    for request_id in range(1, 100):
        queue.push(request_id, num_tokens=1, priority=0, is_resumed=False, tenant="busy")
        queue.pop()
        share.charge("busy", 10.0)
    queue.push(1000, num_tokens=1, priority=0, is_resumed=False, tenant="idle")
    assert share.counter("idle") == share.counter("busy")
    while queue.pop() is not None:
        pass
    queue.push(2000, num_tokens=1, priority=0, is_resumed=False, tenant="new")
    assert share.counter("new") == share.counter("busy")


def test_nothing_starves_behind_urgent_work() -> None:
    queue = RequestQueue()
    push(queue, 0, priority=9)
    for number in range(1, 3 * AGED_EVERY):
        push(queue, number)
    young = [queue.pop(AGED_AFTER_S - 1.0) for _ in range(AGED_EVERY)]
    assert 0 not in young
    old = [queue.pop(AGED_AFTER_S) for _ in range(AGED_EVERY)]
    assert 0 in old


def test_what_has_grown_old_does_not_hold_urgent_work_up() -> None:
    queue = RequestQueue()
    push(queue, *range(100), priority=9)
    push(queue, *range(100, 200), priority=0)
    taken = [queue.pop(2 * AGED_AFTER_S) for _ in range(8 * AGED_EVERY)]
    assert sum(number is not None and number < 100 for number in taken) == 8


def test_a_newcomer_takes_the_place_of_who_is_less_urgent_the_latest_first() -> None:
    queue = RequestQueue()
    push(queue, 1, 2, priority=5)
    push(queue, 3, priority=1)
    push(queue, 4, priority=5, resumed=True)
    assert queue.victim(tenant="", priority=0) == 2
    assert queue.victim(tenant="", priority=5) is None
    assert queue.victim(tenant="", priority=9) is None
    queue.remove(1)
    queue.remove(2)
    assert queue.victim(tenant="", priority=0) == 3
    queue.remove(3)
    assert queue.victim(tenant="", priority=0) is None


def test_a_flood_makes_room_for_the_others() -> None:
    queue = RequestQueue(fair(c=4.0))
    for number in range(10):
        queue.push(number, num_tokens=1, priority=0, is_resumed=False, tenant="flood")
    for number in range(10, 15):
        queue.push(number, num_tokens=1, priority=0, is_resumed=False, tenant="b")
    assert queue.victim(tenant="flood", priority=0) is None
    assert queue.victim(tenant="b", priority=0) == 9
    assert queue.victim(tenant="c", priority=0) == 9
    for number in range(15, 40):
        queue.push(number, num_tokens=1, priority=0, is_resumed=False, tenant="c")
    assert queue.victim(tenant="c", priority=0) == 9  # 6.5 to 10
    for number in range(40, 60):
        queue.push(number, num_tokens=1, priority=0, is_resumed=False, tenant="c")
    assert queue.victim(tenant="c", priority=0) is None  # 11.5 to 10
    assert queue.victim(tenant="b", priority=0) == 59


def test_a_newcomer_is_told_how_many_are_before_it() -> None:
    queue = RequestQueue(fair(heavy=3.0))
    push(queue, 0, resumed=True)
    push(queue, 1, 2, priority=-1)
    for number in range(10, 30):
        queue.push(number, num_tokens=1, priority=0, is_resumed=False, tenant="flood")
    queue.push(40, num_tokens=1, priority=0, is_resumed=False, tenant="a")
    push(queue, 50, 51, priority=7)
    assert queue.num_ahead(tenant="flood", priority=0) == 3 + 20 + 1
    assert queue.num_ahead(tenant="a", priority=0) == 3 + 1 + 2
    assert queue.num_ahead(tenant="heavy", priority=0) == 3
    assert queue.num_ahead(tenant="", priority=-9) == 1


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.floats(1.0, 50.0)), min_size=150, max_size=200),
    st.tuples(st.floats(0.5, 4.0), st.floats(0.5, 4.0), st.floats(0.5, 4.0)),
)
def test_counters_of_those_who_wait_stay_together(
    work: list[tuple[str, float]], weights: tuple[float, float, float]
) -> None:
    """The bound of the paper's theorem: at most one largest request apart, for the weight."""
    share = fair(**dict(zip("abc", weights, strict=True)))
    queue = RequestQueue(share)
    costs = dict(enumerate(work))
    for request_id, (tenant, _) in costs.items():
        queue.push(request_id, num_tokens=1, priority=0, is_resumed=False, tenant=tenant)
    waiting = {tenant: sum(one == tenant for one, _ in work) for tenant in "abc"}
    while all(waiting.values()):
        taken = queue.pop()
        assert taken is not None
        tenant, cost = costs[taken]
        share.charge(tenant, cost)
        waiting[tenant] -= 1
        counters = [share.counter(tenant) for tenant in "abc"]
        assert max(counters) - min(counters) <= 50.0 / min(weights) + 1e-6


class Waiting(NamedTuple):
    """A request as the oracle knows it."""

    request_id: int
    tenant: str
    priority: int
    due_at: float
    since: float
    arrival: int
    is_resumed: bool
    num_tokens: int


class QueueMachine(RuleBasedStateMachine):
    """Does to a plain list what it does to the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.share = fair(b=2.0)
        self.queue = RequestQueue(self.share)
        self.waiting: list[Waiting] = []
        self.arrivals = self.taken = 0
        self.now = 0.0

    @rule(
        request_id=st.integers(0, 200),
        tenant=st.sampled_from("abc"),
        priority=st.integers(-1, 1),
        due_at=st.sampled_from([1.0, 2.0, float("inf")]),
        num_tokens=st.integers(0, 1000),
        is_resumed=st.booleans(),
    )
    def push(
        self,
        request_id: int,
        tenant: str,
        priority: int,
        due_at: float,
        num_tokens: int,
        *,
        is_resumed: bool,
    ) -> None:
        if any(one.request_id == request_id for one in self.waiting):
            return
        self.arrivals += 1
        self.queue.push(
            request_id,
            tenant=tenant,
            num_tokens=num_tokens,
            priority=priority,
            is_resumed=is_resumed,
            due_at=due_at,
            now=self.now,
        )
        self.waiting.append(
            Waiting(
                request_id,
                tenant,
                priority,
                due_at,
                self.now,
                self.arrivals,
                is_resumed,
                num_tokens,
            )
        )

    @rule(seconds=st.sampled_from([1.0, AGED_AFTER_S]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(tenant=st.sampled_from("abc"), cost=st.integers(1, 100))
    def charge(self, tenant: str, cost: int) -> None:
        self.share.charge(tenant, float(cost))

    @rule()
    def pop(self) -> None:
        expected = self.expected()
        assert self.queue.first(self.now) == (expected and expected.request_id)
        assert self.queue.pop(self.now) == (expected and expected.request_id)
        if expected is not None:
            self.waiting.remove(expected)
            self.taken += not expected.is_resumed

    def expected(self) -> Waiting | None:
        resumed = [one for one in self.waiting if one.is_resumed]
        if resumed or not self.waiting:
            return min(resumed, key=lambda one: (one.priority, one.arrival), default=None)
        aged = [one for one in self.waiting if self.now >= one.since + AGED_AFTER_S]
        if aged and self.taken % AGED_EVERY == AGED_EVERY - 1:
            return min(aged, key=lambda one: (self.share.counter(one.tenant), one.arrival))
        level = min(one.priority for one in self.waiting)
        # Of tenants that have had the same it is the one whose line of this priority is older.
        ties = {one.tenant for one in self.waiting if one.priority == level}
        least = min(map(self.share.counter, ties))
        able = {tenant for tenant in ties if self.share.counter(tenant) == least}
        front = self.queue.first(self.now)
        chosen = next(one.tenant for one in self.waiting if one.request_id == front)
        assert chosen in able
        return min(
            (one for one in self.waiting if (one.tenant, one.priority) == (chosen, level)),
            key=lambda one: (one.due_at, one.arrival),
        )

    @rule(request_id=st.integers(0, 200))
    def remove(self, request_id: int) -> None:
        known = {one.request_id for one in self.waiting}
        assert self.queue.remove(request_id) == (request_id in known)
        self.waiting = [one for one in self.waiting if one.request_id != request_id]

    @precondition(lambda self: len(self.waiting) > 0)
    @rule()
    def remove_all_but_one(self) -> None:
        for one in self.waiting[1:]:
            assert self.queue.remove(one.request_id)
        del self.waiting[1:]

    @rule(tenant=st.sampled_from("abc"), priority=st.integers(-1, 1))
    def look_for_a_victim(self, tenant: str, priority: int) -> None:
        victim = self.queue.victim(tenant=tenant, priority=priority)
        found = [one for one in self.waiting if one.request_id == victim]
        for one in found:
            assert not one.is_resumed
            assert one.priority >= priority
            assert one.priority > priority or one.tenant != tenant
            others = [other.priority for other in self.waiting if not other.is_resumed]
            assert one.priority == max(others)

    @invariant()
    def both_hold_the_same(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_tokens == sum(one.num_tokens for one in self.waiting)
        assert all(one.request_id in self.queue for one in self.waiting)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
