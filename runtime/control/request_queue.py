"""The one queue of requests that wait for an engine.

It lies with the supervisor: an engine holds no more than a short credit window, so that waiting
work can always go elsewhere. The order is: resumed before new (a client is already reading),
then priority (lower is earlier), then arrival.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple


class _Place(NamedTuple):
    """A request's place in the queue; compares as the order above."""

    is_new: bool
    priority: int
    arrival: int
    request_id: int


class RequestQueue:
    """A priority queue of request ids with removal.

    Removal only marks: the place stays in the heap until it comes to the front, or until marked
    places outnumber living ones. Every operation is O(log n), amortised.
    """

    def __init__(self) -> None:
        self._heap: list[_Place] = []
        self._places: dict[int, _Place] = {}
        self._tokens: dict[int, int] = {}
        self._arrivals = 0
        self.num_tokens = 0
        """Prompt tokens of all waiting requests."""

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._places

    def push(self, request_id: int, *, num_tokens: int, priority: int, is_resumed: bool) -> None:
        """Let a request wait."""
        assert request_id not in self._places, "a request waits once"
        self._arrivals += 1
        place = _Place(not is_resumed, priority, self._arrivals, request_id)
        self._places[request_id] = place
        self._tokens[request_id] = num_tokens
        self.num_tokens += num_tokens
        heapq.heappush(self._heap, place)

    def first(self) -> int | None:
        """The request whose turn it is; it goes on waiting."""
        while self._heap:
            place = self._heap[0]
            if self._places.get(place.request_id) is place:
                return place.request_id
            heapq.heappop(self._heap)
        return None

    def pop(self) -> int | None:
        """Take the request whose turn it is."""
        request_id = self.first()
        if request_id is not None:
            self._forget(request_id)
        return request_id

    def remove(self, request_id: int) -> bool:
        """Take a request out, wherever it stands; whether it was there."""
        if request_id not in self._places:
            return False
        self._forget(request_id)
        if len(self._heap) > 2 * len(self._places) + 64:
            self._heap = list(self._places.values())
            heapq.heapify(self._heap)
        return True

    def check_integrity(self) -> None:
        """Every waiting request has exactly one living place, and the count of tokens is right."""
        living = [p for p in self._heap if self._places.get(p.request_id) is p]
        assert len(living) == len(self._places) == len(self._tokens)
        assert self.num_tokens == sum(self._tokens.values())

    def _forget(self, request_id: int) -> None:
        del self._places[request_id]
        self.num_tokens -= self._tokens.pop(request_id)
