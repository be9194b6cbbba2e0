"""What gateways may know of requests that they do not hold: a group's, or what became of some."""

from __future__ import annotations

from understudy.protocol.messages import Found, TimelineRequest, Timelines
from understudy.runtime.control.ledger import Ledger
from understudy.runtime.kit.actor import Outbox


class Enquiries:
    """Answers from the ledger; nobody learns of another tenant's requests."""

    def __init__(self, outbox: Outbox, ledger: Ledger) -> None:
        self._outbox = outbox
        self._ledger = ledger

    def look_up(self, group_id: int, tenant: str, gateway: str) -> None:
        """Tell a gateway the requests of a group."""
        entries = self._ledger.group(group_id, tenant)
        requests = tuple(entry.request for entry in entries)
        lengths = tuple(len(entry.output) for entry in entries)
        ends = tuple(entry.finish for entry in entries)
        self._outbox.send(gateway, Found(group_id, tenant, requests, lengths, ends))

    def timelines(self, asked: TimelineRequest, gateway: str) -> None:
        """Tell a gateway what became of a tenant's requests."""
        found = self._ledger.timelines(asked.tenant, asked.group_id, asked.requests_max)
        answer = Timelines(asked.tenant, asked.group_id, asked.requests_max, tuple(found))
        self._outbox.send(gateway, answer)
