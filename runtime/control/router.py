"""The router chooses the engine for a request: the one where it costs the least.

Two things cost: the tokens of the prompt that the engine has to compute, and the company, each
request that is there already, by which every step takes longer. A prefix that an engine has in its
cache draws a request there, until more work waits there than the prefix saves. ``tools/bench/
routing.py`` compares this with policies that others have published.

An engine has credit for twice its batch: the second half is there so that it never waits for the
supervisor between two steps, and is short enough that what waits in it costs little when the
engine dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final, NamedTuple

from understudy.runtime.control.ledger import Entry
from understudy.runtime.control.prefix_index import PrefixIndex, prefix_keys
from understudy.runtime.control.registry import Member

CREDIT_WINDOW_BATCHES: Final = 2
COMPANY_TOKENS: Final = 64
"""What one outstanding request costs another beside it, in tokens of a prompt; measured."""


class Candidate(NamedTuple):
    """An engine that serves."""

    identity: str
    outstanding: int
    max_num_seqs: int
    numerics: str = ""
    num_cached_tokens: int = 0
    """Of the request's tokens, as far as one can tell from here."""

    @property
    def credit(self) -> int:
        """How many more requests it may be given."""
        return CREDIT_WINDOW_BATCHES * self.max_num_seqs - self.outstanding


def choose(candidates: Iterable[Candidate], *, numerics: str | None = None) -> Candidate | None:
    """The engine where the request costs the least, or none with credit.

    A request that has output already goes to an engine of the class of ``numerics`` that made it,
    if one has credit: only such an engine goes on with the very bits.
    """
    able = [candidate for candidate in candidates if candidate.credit > 0]
    if not able:
        return None
    batch = max(candidate.max_num_seqs for candidate in able)

    def rank(candidate: Candidate) -> tuple[bool, float, str]:
        is_other = numerics is not None and candidate.numerics != numerics
        company = candidate.outstanding * batch / candidate.max_num_seqs
        cost = COMPANY_TOKENS * company - candidate.num_cached_tokens
        return is_other, cost, candidate.identity

    return min(able, key=rank)


class Router:
    """Chooses engines for requests, and remembers who was given which prefixes."""

    def __init__(self) -> None:
        self._prefixes = PrefixIndex()

    def choose(
        self, entry: Entry, engines: Iterable[Member], outstanding: Callable[[str], int]
    ) -> Member | None:
        """The engine to give a request to, or none with credit.

        Args:
            entry: The request, which is given to the engine that is chosen.
            engines: Those that take new work.
            outstanding: How many requests an engine has, by its identity.
        """
        by_identity = {member.identity: member for member in engines}
        able = [
            Candidate(
                identity, outstanding(identity), member.capacity.max_num_seqs, member.numerics
            )
            for identity, member in by_identity.items()
            if member.capacity is not None
        ]
        able = [candidate for candidate in able if candidate.credit > 0]
        if not able:
            return None
        keys: list[bytes] = []
        if len(by_identity) > 1:  # with one engine there is nothing to compare or to remember
            keys = prefix_keys(entry.request, entry.output)
            able = [
                candidate._replace(
                    num_cached_tokens=self._prefixes.num_cached_tokens(candidate.identity, keys)
                )
                for candidate in able
            ]
        chosen = choose(able, numerics=entry.numerics if entry.output else None)
        assert chosen is not None
        member = by_identity[chosen.identity]
        self._note(member, keys)
        return member

    def ended(self, entry: Entry, engine: Member) -> None:
        """An engine has made the whole output of a request, and remembers that as well."""
        if self._prefixes.knows(engine.identity):
            self._note(engine, prefix_keys(entry.request, entry.output))

    def forget(self, engine: str) -> None:
        """An engine is gone."""
        self._prefixes.forget(engine)

    def _note(self, engine: Member, keys: list[bytes]) -> None:
        if engine.capacity is not None and keys:
            tokens_max = engine.capacity.num_blocks * engine.capacity.block_size
            self._prefixes.note(engine.identity, keys, tokens_max=tokens_max)
