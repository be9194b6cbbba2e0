"""The canary: a short prompt whose answer is known, for an engine that comes after a dead one.

A machine on which an engine died may be the cause of it: a GPU with a broken memory answers, but
not the truth. So a new incarnation gets no request before it has made, from a fixed prompt, the
very tokens that the first engine of its numerics class made.
"""

from __future__ import annotations

from typing import Final

from understudy.protocol.request import Pooling, PoolingKind, Request, SamplingParams, TokenRow
from understudy.runtime.control.registry import Member

CANARY_TOKENS: Final = 4
"""Each step reads all weights, and a lone engine's restart waits for these."""
CANARY_WITHIN_S: Final = 30.0
"""An engine that has not answered by then is not let in."""
_FIRST_ID: Final = 1 << 63
_PROMPT: Final = (1, 2, 3, 5, 8, 13, 21, 34)


def canary_request(number: int, *, pools_only: bool = False) -> Request:
    """The canary, under an id that no gateway gives to a request: those have 63 bits.

    ``pools_only`` asks for a vector, of an engine that makes no tokens.
    """
    request_id = _FIRST_ID + number
    if pools_only:
        params, pooling = SamplingParams(seed=0, max_tokens=1), Pooling(PoolingKind.MEAN)
        return Request(request_id, request_id, _PROMPT, params, pooling=pooling)
    params = SamplingParams(seed=0, max_tokens=CANARY_TOKENS, temperature=0.0)
    return Request(request_id, request_id, _PROMPT, params)


class CanaryAnswers:
    """What each class of numerics answered first."""

    def __init__(self) -> None:
        self._by_class: dict[str, tuple[int, ...]] = {}

    def check(self, numerics: str, tokens: tuple[int, ...]) -> bool:
        """Whether an answer is the known one; the first of a class becomes the known one."""
        return self._by_class.setdefault(numerics, tokens) == tokens

    def is_known(self, numerics: str) -> bool:
        """Whether there is an answer to compare with."""
        return numerics in self._by_class


class Canary:
    """A canary that an engine has not answered yet."""

    __slots__ = ("answer", "due_at", "engine")

    def __init__(self, engine: Member, due_at: float) -> None:
        self.engine = engine
        self.due_at = due_at
        self.answer: list[int] = []
        """Tokens, or the bytes of a vector."""

    def take(self, row: TokenRow) -> None:
        """Take in what the engine says."""
        self.answer += row.tokens
        self.answer += row.vector
