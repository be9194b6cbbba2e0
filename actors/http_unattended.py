"""The sink of a choice whose client is gone, and which goes on without it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from understudy.protocol.errors import RequestError
from understudy.protocol.request import TokenRow

if TYPE_CHECKING:
    from understudy.actors.http_choices import ChoiceOutput, RequestPort


class Unattended:
    """The sink of a choice whose client is gone: a stop string still has to end the request."""

    def __init__(self, output: ChoiceOutput, port: RequestPort, wake: Callable[[], None]) -> None:
        self._output = output
        self._port = port
        self._wake = wake

    def deliver(self, row: TokenRow, engine: str) -> None:  # noqa: ARG002
        """See ``Sink``."""
        self._output.advance(row)
        self._output.take_logprobs()
        self._output.take_deltas()
        if self._output.is_over and not row.finish:
            self._port.cancel(row.request_id, self)
            self._wake()

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
