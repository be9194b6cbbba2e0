"""What every endpoint's encoder of a stream is told, and the form in which it is asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from understudy.protocol.errors import RequestError
from understudy.protocol.openai.deltas import Delta
from understudy.protocol.openai.logprobs import TokenLogprob


class Told(NamedTuple):
    """How far an answer is."""

    num_prompt_tokens: int
    num_tokens: int
    num_cached_tokens: int
    num_reasoning_tokens: int = 0
    finish_reason: str | None = None
    """Once it has ended."""
    stop_string: str | None = None
    """What it ended at, if at one that the client gave."""


class DeltaEncoder(Protocol):
    """Turns the pieces of one choice into events."""

    def opening(self, told: Told) -> bytes:
        """The events before anything is known of the answer; may be none."""
        ...

    def encode(
        self, deltas: Sequence[Delta], told: Told, *, logprobs: Sequence[TokenLogprob] | None
    ) -> bytes:
        """The events for what is new; with ``told.finish_reason`` the last ones."""
        ...

    def error(self, error: RequestError) -> bytes:
        """The event that ends a stream which cannot go on."""
        ...
