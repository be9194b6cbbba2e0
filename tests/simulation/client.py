"""A client under virtual time: it insists on what is promised to it.

Every position once and in order, the same prefix hash, one end, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable

from understudy.protocol.errors import NotFound, RequestError
from understudy.protocol.request import FinishReason, Request, TokenRow, extend_prefix_hash


class Client:
    """One request's client: a sink with memory."""

    def __init__(self, request: Request) -> None:
        self.request = request
        self.tokens: list[int] = []
        self.vector = b""
        self.engines: list[str] = []
        self.end: str | None = None
        """``stop``, ``length``… or an error's code; ``left`` if it went away by itself."""
        self.is_in = False
        """Whether it has handed in its request."""
        self.gateway = ""
        """The gateway that it is connected to."""
        self.on_not_found: Callable[[], None] | None = None
        """What it does if the stream that it wants to join again is not there."""
        self._prefix_hash = 0

    def deliver(self, row: TokenRow, engine: str) -> None:
        """Take in what must be the next tokens."""
        assert self.end is None, f"{self.request.request_id}: tokens after {self.end}"
        assert row.position == len(self.tokens), f"{self.request.request_id}: out of order"
        self.tokens += row.tokens
        self._prefix_hash = extend_prefix_hash(self._prefix_hash, row.tokens)
        assert row.prefix_hash == self._prefix_hash
        if self.request.params.logprobs is not None:
            assert len(row.logprobs) == len(row.tokens)
        if engine not in self.engines:
            self.engines.append(engine)
        if row.vector:
            assert row.finish, f"{self.request.request_id}: a vector is an end"
            self.vector = row.vector
        if row.finish:
            self.end = FinishReason(row.finish).name.lower()

    def fail(self, error: RequestError) -> None:
        """Take in the end."""
        assert self.end is None, f"{self.request.request_id}: {error} after {self.end}"
        if isinstance(error, NotFound) and self.on_not_found is not None and not self.tokens:
            # The gateway died before anybody else had heard of the request.
            self.on_not_found()
            return
        self.end = error.code or "error"
