"""Refusals without asking: while the queue is full, a prompt is not even read.

To tokenise a prompt and to ask the supervisor costs far more than to say no, and under an overload
that is what most calls come to. So for a moment after the supervisor has refused a call, others
that ask for no less are told the same: those of the same tenant, no more urgent, and no smaller.
All others are still asked for: a tenant with less in the queue, or more urgent work, may take a
place in a queue that is full.

The moment is short against the time in which a queue runs empty, and long against that of a call.
Pure: times are given.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from understudy.protocol.errors import Overloaded

HOLD_S: Final = 0.1
TENANTS_MAX: Final = 1024


class _Refused(NamedTuple):
    """The least that was refused a moment ago."""

    priority: int
    num_bytes: int
    until: float
    message: str
    retry_after_s: float | None


class EarlyRefusals:
    """What the supervisor has refused just now, by tenant."""

    def __init__(self) -> None:
        self._refused: dict[str, _Refused] = {}

    def note(
        self, error: Overloaded, *, tenant: str, priority: int, num_bytes: int, now: float
    ) -> None:
        """The supervisor has refused a call of so many bytes."""
        if len(self._refused) >= TENANTS_MAX and tenant not in self._refused:
            self._refused.clear()  # what is forgotten is asked for again
        hold_s = HOLD_S
        if error.retry_after_s is not None:
            # Whoever comes back when told to, or somewhat sooner, is asked for.
            hold_s = min(hold_s, error.retry_after_s / 2)
        self._refused[tenant] = _Refused(
            priority, num_bytes, now + hold_s, error.message, error.retry_after_s
        )

    def find(self, *, tenant: str, priority: int, num_bytes: int, now: float) -> Overloaded | None:
        """What a call is refused with whose like was refused just now; ``None``: ask."""
        refused = self._refused.get(tenant)
        if refused is None:
            return None
        if now >= refused.until:
            del self._refused[tenant]
        elif priority >= refused.priority and num_bytes >= refused.num_bytes:
            return Overloaded(refused.message, retry_after_s=refused.retry_after_s)
        return None
