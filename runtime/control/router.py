"""The router chooses the engine for a request: the one with the least outstanding work.

Work is counted in requests given and not ended. An engine has credit for twice its batch: the
second half is there so that it never waits for the supervisor between two steps, and is short
enough that what waits in it costs little when the engine dies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

CREDIT_WINDOW_BATCHES: Final = 2


class Candidate(NamedTuple):
    """An engine that serves."""

    identity: str
    outstanding: int
    max_num_seqs: int

    @property
    def credit(self) -> int:
        """How many more requests it may be given."""
        return CREDIT_WINDOW_BATCHES * self.max_num_seqs - self.outstanding


def choose(candidates: Iterable[Candidate]) -> Candidate | None:
    """The engine with the least outstanding work relative to its batch, or none with credit."""
    able = [candidate for candidate in candidates if candidate.credit > 0]
    return min(able, key=lambda c: (c.outstanding / c.max_num_seqs, c.identity), default=None)
