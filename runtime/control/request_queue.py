"""The one queue of requests that wait for an engine.

It lies with the supervisor: an engine holds no more than a short credit window, so that waiting
work can always go elsewhere. Who is next?

1. Who was resumed: a client is already reading.
2. Who has waited too long, whatever its priority: one place in ``AGED_EVERY``, so that nothing
   starves, and urgent work is not held up by all that has grown old in an overload.
3. The lowest priority number; in it the tenant that has had the least for its weight (see
   ``fair_share``); of that tenant's requests the one with the earliest deadline (Liu and Layland,
   1973), and among equals the one that came first.

Deadlines order a tenant's own requests only: else whoever names the tightest would be served first.

When the queue is full, a newcomer may take the place of a less urgent request, or, of equals, of
one of the tenant that has the most waiting for its weight (McKenney, "Stochastic Fairness
Queueing", 1990, drops from the longest queue for the same reason): one tenant's flood does not
shut the door on the others.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Final, NamedTuple

from understudy.runtime.control.fair_share import FairShare
from understudy.runtime.control.tenancy import UNLIMITED

AGED_AFTER_S: Final = 30.0
AGED_EVERY: Final = 8
_STALE_MIN: Final = 64
"""A heap is tidied up when it has so many and twice as many entries as requests."""


class _Place(NamedTuple):
    """A request's place in the queue. Compares by deadline, then by arrival."""

    due_at: float
    arrival: int
    request_id: int
    since: float
    tenant: str
    priority: int
    num_tokens: int
    num_bytes: int


class _Line:
    """The requests of one tenant and priority.

    Removal only marks: a place stays in the heap until it comes to the front, or until there are
    too many such.
    """

    __slots__ = ("heap", "places")

    def __init__(self) -> None:
        self.heap: list[_Place] = []
        self.places: dict[int, _Place] = {}
        """The living, in the order of their arrival."""

    def push(self, place: _Place) -> None:
        heapq.heappush(self.heap, place)
        self.places[place.request_id] = place

    def first(self) -> _Place:
        """The next of a line that is not empty."""
        while self.places.get(self.heap[0].request_id) is not self.heap[0]:
            heapq.heappop(self.heap)
        return self.heap[0]

    def oldest(self) -> _Place:
        return next(iter(self.places.values()))

    def latest(self) -> _Place:
        return next(reversed(self.places.values()))

    def remove(self, request_id: int) -> None:
        del self.places[request_id]
        if len(self.heap) > 2 * len(self.places) + _STALE_MIN:
            self.heap = list(self.places.values())
            heapq.heapify(self.heap)


class RequestQueue:
    """A queue of request ids with removal.

    With T tenants that wait, an operation takes O(log n + T).
    """

    def __init__(self, fair_share: FairShare | None = None) -> None:
        self._fair_share = fair_share or FairShare(lambda _: UNLIMITED)
        self._resumed = _Line()
        self._levels: dict[int, dict[str, _Line]] = {}
        self._order: list[int] = []
        """The priorities that somebody has, in order."""
        self._places: dict[int, _Place] = {}
        self._num_waiting: dict[str, int] = {}
        """New requests of each tenant that has any."""
        self._arrivals = 0
        self._num_taken = 0
        self.num_tokens = 0
        """Prompt and output tokens of all waiting requests."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._places

    def push(
        self,
        request_id: int,
        *,
        num_tokens: int,
        priority: int,
        is_resumed: bool,
        tenant: str = "",
        num_bytes: int = 0,
        due_at: float = float("inf"),
        now: float = 0.0,
    ) -> None:
        """Let a request wait."""
        assert request_id not in self._places, "a request waits once"
        self._arrivals += 1
        # The resumed have the same order among themselves whatever their deadlines.
        key = float(priority) if is_resumed else due_at
        place = _Place(
            key, self._arrivals, request_id, now, tenant, priority, num_tokens, num_bytes
        )
        self._places[request_id] = place
        self.num_tokens += num_tokens
        self.num_bytes += num_bytes
        if is_resumed:
            self._resumed.push(place)
            return
        if tenant not in self._num_waiting:
            self._fair_share.begin_waiting(tenant, self._num_waiting)
        self._num_waiting[tenant] = self._num_waiting.get(tenant, 0) + 1
        if priority not in self._levels:
            self._levels[priority] = {}
            insort(self._order, priority)
        self._levels[priority].setdefault(tenant, _Line()).push(place)

    def first(self, now: float = 0.0) -> int | None:
        """The request whose turn it is; it goes on waiting."""
        if self._resumed.places:
            return self._resumed.first().request_id
        if not self._order:
            return None
        if self._num_taken % AGED_EVERY == AGED_EVERY - 1:
            aged = self._aged(now)
            if aged is not None:
                return aged
        lines = self._levels[self._order[0]]
        if len(lines) == 1:
            (line,) = lines.values()
            return line.first().request_id
        return lines[min(lines, key=self._fair_share.counter)].first().request_id

    def pop(self, now: float = 0.0) -> int | None:
        """Take the request whose turn it is."""
        request_id = self.first(now)
        if request_id is not None:
            self._num_taken += request_id not in self._resumed.places
            self._forget(request_id)
        return request_id

    def remove(self, request_id: int) -> bool:
        """Take a request out, wherever it stands; whether it was there."""
        if request_id not in self._places:
            return False
        self._forget(request_id)
        return True

    def num_ahead(self, *, tenant: str, priority: int) -> int:
        """About how many requests would be served before a newcomer.

        All that are more urgent; of its own priority those of its tenant, and of each other tenant
        as many as are served beside them.
        """
        ahead = len(self._resumed.places)
        for level in self._order:
            if level > priority:
                break
            lines = self._levels[level]
            if level < priority:
                ahead += sum(len(line.places) for line in lines.values())
                continue
            weight = self._fair_share.weight(tenant)
            own = len(lines[tenant].places) if tenant in lines else 0
            for other, line in lines.items():
                share = own if other == tenant else (own + 1) / weight * self._weight(other)
                ahead += min(len(line.places), int(share))
        return ahead

    def victim(self, *, tenant: str, priority: int) -> int | None:
        """Whose place a newcomer may take; ``None`` if all have a better claim than it."""
        if not self._order or self._order[-1] < priority:
            return None
        lines = self._levels[self._order[-1]]
        load = {name: len(line.places) / self._weight(name) for name, line in lines.items()}
        fullest = max(load, key=load.__getitem__)
        if self._order[-1] == priority:
            own = len(lines[tenant].places) if tenant in lines else 0
            if fullest == tenant or load[fullest] <= (own + 1) / self._weight(tenant):
                return None
        return lines[fullest].latest().request_id

    def size_of(self, request_id: int) -> tuple[int, int]:
        """How many tokens and bytes a waiting request has."""
        place = self._places[request_id]
        return place.num_tokens, place.num_bytes

    def check_integrity(self) -> None:
        """Every waiting request has exactly one living place, and the counts are right."""
        places = [place for line in self._lines() for place in line.places.values()]
        assert sorted(place.request_id for place in places) == sorted(self._places)
        assert self.num_tokens == sum(place.num_tokens for place in places)
        assert self.num_bytes == sum(place.num_bytes for place in places)
        assert self._order == sorted(self._levels)
        assert all(line.places for lines in self._levels.values() for line in lines.values())
        assert all(self._levels.values())
        num_new = len(self._places) - len(self._resumed.places)
        assert sum(self._num_waiting.values()) == num_new
        for line in self._lines():
            living = [place for place in line.heap if line.places.get(place.request_id) is place]
            assert len(living) == len(line.places)

    def _lines(self) -> Iterator[_Line]:
        yield self._resumed
        for lines in self._levels.values():
            yield from lines.values()

    def _weight(self, tenant: str) -> float:
        return self._fair_share.weight(tenant)

    def _aged(self, now: float) -> int | None:
        """Of those that have waited too long, the oldest of the tenant that has had the least."""
        aged = [
            oldest
            for lines in self._levels.values()
            for line in lines.values()
            if now >= (oldest := line.oldest()).since + AGED_AFTER_S
        ]
        if not aged:
            return None
        counter = self._fair_share.counter
        return min(aged, key=lambda place: (counter(place.tenant), place.arrival)).request_id

    def _forget(self, request_id: int) -> None:
        place = self._places.pop(request_id)
        self.num_tokens -= place.num_tokens
        self.num_bytes -= place.num_bytes
        if request_id in self._resumed.places:
            self._resumed.remove(request_id)
            return
        lines = self._levels[place.priority]
        line = lines[place.tenant]
        line.remove(request_id)
        if not line.places:
            del lines[place.tenant]
        if not lines:
            del self._levels[place.priority]
            del self._order[bisect_left(self._order, place.priority)]
        self._num_waiting[place.tenant] -= 1
        if not self._num_waiting[place.tenant]:
            del self._num_waiting[place.tenant]
            self._fair_share.end_waiting(place.tenant)
