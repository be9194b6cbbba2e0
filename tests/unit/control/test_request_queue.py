"""The queue against a plain list that is sorted at every turn."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from understudy.runtime.control.request_queue import RequestQueue


def push(queue: RequestQueue, *request_ids: int, priority: int = 0, resumed: bool = False) -> None:
    for request_id in request_ids:
        queue.push(request_id, num_tokens=10, priority=priority, is_resumed=resumed)


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
    heap = vars(queue)["_heap"]
    assert len(heap) < 200
    assert drain(queue) == [0]


class QueueMachine(RuleBasedStateMachine):
    """Does to a list what it does to the queue."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = RequestQueue()
        self.waiting: list[tuple[bool, int, int, int]] = []
        self.tokens: dict[int, int] = {}
        self.arrivals = 0

    @rule(
        request_id=st.integers(0, 200),
        priority=st.integers(-2, 2),
        num_tokens=st.integers(0, 1000),
        is_resumed=st.booleans(),
    )
    def push(self, request_id: int, priority: int, num_tokens: int, *, is_resumed: bool) -> None:
        if request_id in self.tokens:
            return
        self.arrivals += 1
        self.queue.push(request_id, num_tokens=num_tokens, priority=priority, is_resumed=is_resumed)
        self.waiting.append((not is_resumed, priority, self.arrivals, request_id))
        self.tokens[request_id] = num_tokens

    @rule()
    def pop(self) -> None:
        expected = None
        if self.waiting:
            first = min(self.waiting)
            self.waiting.remove(first)
            expected = first[3]
            del self.tokens[expected]
        assert self.queue.pop() == expected

    @rule(request_id=st.integers(0, 200))
    def remove(self, request_id: int) -> None:
        assert self.queue.remove(request_id) == (request_id in self.tokens)
        self.waiting = [place for place in self.waiting if place[3] != request_id]
        self.tokens.pop(request_id, None)

    @precondition(lambda self: len(self.waiting) > 0)
    @rule()
    def remove_all_but_one(self) -> None:
        for place in self.waiting[1:]:
            assert self.queue.remove(place[3])
            del self.tokens[place[3]]
        del self.waiting[1:]

    @invariant()
    def both_hold_the_same(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.waiting)
        assert self.queue.num_tokens == sum(self.tokens.values())
        assert all(request_id in self.queue for request_id in self.tokens)


TestQueue = QueueMachine.TestCase
TestQueue.settings = settings(max_examples=50, stateful_step_count=60, deadline=None)
