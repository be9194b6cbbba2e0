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
    numerics: str = ""

    @property
    def credit(self) -> int:
        """How many more requests it may be given."""
        return CREDIT_WINDOW_BATCHES * self.max_num_seqs - self.outstanding


def choose(candidates: Iterable[Candidate], *, numerics: str | None = None) -> Candidate | None:
    """The engine with the least outstanding work relative to its batch, or none with credit.

    A request that has output already goes to an engine of the class of ``numerics`` that made it,
    if one has credit: only such an engine goes on with the very bits.
    """

    def rank(candidate: Candidate) -> tuple[bool, float, str]:
        is_other = numerics is not None and candidate.numerics != numerics
        return is_other, candidate.outstanding / candidate.max_num_seqs, candidate.identity

    return min((c for c in candidates if c.credit > 0), key=rank, default=None)
