"""The audience: which gateways listen to which requests, and what they are told.

Rows are kept until the end of the turn and leave in one message for each engine, in which each
request has one row however many steps brought it. Knows gateways by their identities only; whether
they live is decided elsewhere.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from understudy.protocol.errors import RequestError
from understudy.protocol.messages import Deliver, Failed
from understudy.protocol.request import TokenRow, joined, portions
from understudy.runtime.control.ledger import Entry
from understudy.runtime.kit.actor import Outbox

DELIVER_ROWS_MAX: Final = 4096
"""Rows in one message: even with all logprobs they take but a fraction of a frame."""
CATCH_UP_TOKENS_MAX: Final = 8192
"""Tokens in one message to who joins late: with all logprobs they take but a part of a frame."""
UNCLAIMED_MAX_S: Final = 60.0
"""A request whose gateway is gone ends if no client has joined its stream again by then. One with
an idempotency key goes on: its client may send it again at any time."""


class Audience:
    """Who listens to the living requests."""

    def __init__(self, outbox: Outbox) -> None:
        self._outbox = outbox
        self._with_gateway: defaultdict[str, set[int]] = defaultdict(set)
        self._unclaimed_since: dict[int, float] = {}
        self._deliveries: defaultdict[tuple[str, str], list[TokenRow]] = defaultdict(list)

    def streams(self, gateway: str) -> set[int]:
        """The living requests that a gateway listens to."""
        return self._with_gateway[gateway]

    def unclaimed(self, now: float) -> list[int]:
        """The requests that nobody has listened to for too long."""
        since = self._unclaimed_since.items()
        return [request_id for request_id, at in since if now >= at + UNCLAIMED_MAX_S]

    def join(self, entry: Entry, gateway: str) -> None:
        """A gateway wants to hear what comes of a living request."""
        if gateway not in entry.subscribers:
            entry.subscribers.append(gateway)
            self._with_gateway[gateway].add(entry.request_id)
        self._unclaimed_since.pop(entry.request_id, None)

    def leave(self, entry: Entry, gateway: str) -> None:
        """A gateway does not want to hear of a request any more."""
        entry.subscribers.remove(gateway)
        self._with_gateway[gateway].discard(entry.request_id)

    def miss(self, entry: Entry, now: float) -> None:
        """Nobody listens to a request at the moment."""
        self._unclaimed_since[entry.request_id] = now

    def forget_gateway(self, gateway: str) -> list[int]:
        """A gateway is gone; gives what it listened to."""
        return sorted(self._with_gateway.pop(gateway, ()))

    def dismiss(self, entry: Entry) -> None:
        """A request has ended: nothing more will be told of it."""
        for gateway in entry.subscribers:
            self._with_gateway[gateway].discard(entry.request_id)
        entry.subscribers.clear()
        self._unclaimed_since.pop(entry.request_id, None)

    def tell(self, entry: Entry, row: TokenRow, engine: str) -> None:
        """Tell those who listen to a request of a row, with the end of the turn."""
        for gateway in entry.subscribers:
            self._deliveries[gateway, engine].append(row)

    def deliver(self) -> None:
        """Tell the gateways what has come in since the last call."""
        for (gateway, engine), rows in self._deliveries.items():
            for some in portions(rows, rows_max=DELIVER_ROWS_MAX):
                self._outbox.send(gateway, Deliver(tuple(joined(some)), engine))
        self._deliveries.clear()

    def catch_up(self, entry: Entry, position: int, gateway: str) -> None:
        """Tell one gateway all that it lacks."""
        # What this turn has accepted is in the entry already and must not come again behind it.
        self.deliver()
        rows = entry.rows_from(position, CATCH_UP_TOKENS_MAX)
        if entry.error_code:  # it says more than the last row does
            rows = [row._replace(finish=0) for row in rows if row.tokens]
        for row in rows:
            self._outbox.send(gateway, Deliver((row,)))
        if entry.error_code:
            failed = Failed(entry.request_id, entry.error_code, entry.error_message)
            self._outbox.send(gateway, failed)

    def fail(self, entry: Entry, error: RequestError) -> None:
        """Tell those who listen to a request that it ends with an error."""
        failed = Failed(entry.request_id, error.code or "", error.message, error.retry_after_s)
        self.deliver()  # its last tokens may have come in this turn
        for gateway in entry.subscribers:
            self._outbox.send(gateway, failed)

    def check_integrity(self, entry: Entry) -> None:
        """Assert that a living request and its gateways tell the same story."""
        for gateway in entry.subscribers:
            assert entry.request_id in self._with_gateway[gateway]
        assert (not entry.subscribers) == (entry.request_id in self._unclaimed_since)
