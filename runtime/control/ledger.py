"""The ledger: what is known of every admitted request, and which tokens count.

A token counts only if it comes from the engine that the request is with now, under that engine's
present epoch, for the present attempt, at the next position, and with the hash of everything
before it. All else is refused here, so a token can neither be lost, nor come twice, nor come from
an engine that was given up: whatever the network and the processes do, the output in the ledger is
one straight line.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from understudy.protocol.request import Request, TokenRow, extend_prefix_hash


class Verdict(Enum):
    """What became of a row."""

    ACCEPTED = "accepted"
    STALE = "stale"
    """From an earlier attempt or epoch, or of a request that has ended. Harmless."""
    BROKEN = "broken"
    """From the right engine and attempt, but it does not continue the output."""


@dataclass(slots=True)
class Entry:
    """One admitted request."""

    request: Request
    gateway: str
    """The identity of the gateway that the output goes to."""
    admitted_at: float
    attempt: int = 0
    """How often it was given to an engine."""
    engine: str | None = None
    """The identity of the engine that it is with; ``None`` while it waits."""
    epoch: int = 0
    progress_at: float = 0.0
    """When it was admitted, assigned for the first time, or last got a token.

    Further assignments are no progress: a request that ends every engine it is given to would
    never be given up.
    """
    output: list[int] = field(default_factory=list)
    prefix_hash: int = 0


class Ledger:
    """Every request that was admitted and has not ended."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: int) -> bool:
        return request_id in self._entries

    def get(self, request_id: int) -> Entry | None:
        """The entry of a living request."""
        return self._entries.get(request_id)

    def entries(self) -> list[Entry]:
        """All living requests, oldest first."""
        return list(self._entries.values())

    def admit(self, request: Request, gateway: str, now: float) -> Entry:
        """Enter a request. From here on it will end, exactly once."""
        assert request.request_id not in self._entries
        entry = Entry(request, gateway, now, progress_at=now)
        self._entries[request.request_id] = entry
        return entry

    def assign(self, request_id: int, engine: str, epoch: int, now: float) -> Entry:
        """Give a waiting request to an engine, as a new attempt."""
        entry = self._entries[request_id]
        assert entry.engine is None, "a request is with one engine at a time"
        entry.attempt += 1
        entry.engine = engine
        entry.epoch = epoch
        if entry.attempt == 1:
            entry.progress_at = now
        return entry

    def release(self, request_id: int) -> Entry:
        """Take a request back from its engine; what it has put out stays."""
        entry = self._entries[request_id]
        entry.engine = None
        return entry

    def accept(self, row: TokenRow, engine: str, epoch: int, now: float) -> Verdict:
        """Take in what an engine says it made. An accepted end removes the request."""
        entry = self._entries.get(row.request_id)
        if entry is None or entry.engine != engine or entry.epoch != epoch:
            return Verdict.STALE
        if entry.attempt != row.attempt:
            return Verdict.STALE
        if row.position != len(entry.output):
            return Verdict.BROKEN
        prefix_hash = extend_prefix_hash(entry.prefix_hash, row.tokens)
        if prefix_hash != row.prefix_hash:
            return Verdict.BROKEN
        entry.output.extend(row.tokens)
        entry.prefix_hash = prefix_hash
        entry.progress_at = now
        if row.finish:
            del self._entries[row.request_id]
        return Verdict.ACCEPTED

    def end(self, request_id: int) -> Entry | None:
        """End a request for another reason than its last token."""
        return self._entries.pop(request_id, None)
