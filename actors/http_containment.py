"""What goes wrong with one call's answer is the end of that call, and of nothing else.

The gateway's core brings every token of every stream in one turn of its loop. A parser or a
detokenizer that fails on one text would else end them all, and again when their clients come back.
"""

from __future__ import annotations

from collections.abc import Callable

from understudy.actors.gateway import Sink
from understudy.protocol.errors import InternalError, RequestError
from understudy.protocol.request import TokenRow
from understudy.runtime.log import get_logger, where_it_failed


class ContainedSink:
    """A sink that fails alone.

    Args:
        sink: What may fail.
        give_up: Ends the request then.
    """

    __slots__ = ("_give_up", "_has_failed", "_sink")

    def __init__(self, sink: Sink, give_up: Callable[[], None]) -> None:
        self._sink = sink
        self._give_up = give_up
        self._has_failed = False

    def deliver(self, row: TokenRow, engine: str) -> None:
        """See ``Sink``."""
        if self._has_failed:
            return
        try:
            self._sink.deliver(row, engine)
        except Exception as error:  # noqa: BLE001 - the outermost frame of a call
            self._has_failed = True
            get_logger().error("an answer failed", where=where_it_failed(error))
            self._give_up()
            self._sink.fail(InternalError("the gateway failed"))

    def fail(self, error: RequestError) -> None:
        """See ``Sink``."""
        if not self._has_failed:
            self._sink.fail(error)
