"""The gateway's core: which requests are open, and what each must be told next.

Between the HTTP server, which knows clients and text, and the supervisor, which knows neither.
Sans-I/O like every actor; ``http_server`` puts a socket in front of it.
"""

from __future__ import annotations

from typing import Final, Protocol

from understudy.protocol.errors import InternalError, RequestError, Unavailable, from_code
from understudy.protocol.messages import (
    Accepted,
    Cancel,
    ClusterState,
    Deliver,
    Failed,
    Hello,
    Message,
    Rejected,
    Role,
    Submit,
)
from understudy.protocol.request import Request, TokenRow
from understudy.runtime.kit.actor import SUPERVISOR, Outbox
from understudy.runtime.kit.membership import Membership, MembershipChange

ANSWER_WITHIN_S: Final = 10.0
"""A request that the supervisor has neither taken nor refused by then fails."""

NOBODY: Final = ClusterState(engines_serving=0, engines_known=0, max_model_len=0)


class Sink(Protocol):
    """Where one request's output goes. Exactly one end reaches it: a finish or a failure."""

    def deliver(self, row: TokenRow, engine: str) -> None:
        """Take in new tokens, in order, and the end if ``row.finish`` says so."""
        ...

    def fail(self, error: RequestError) -> None:
        """Take in that the request ends with an error."""
        ...


class _OpenRequest:
    """A request that has not ended."""

    __slots__ = ("answer_by", "position", "sink")

    def __init__(self, sink: Sink, answer_by: float) -> None:
        self.sink = sink
        self.position = 0
        self.answer_by: float | None = answer_by


class Gateway:
    """The gateway actor."""

    def __init__(self, name: str, *, pid: int, model: str, address: str = "") -> None:
        self.outbox = Outbox()
        self.cluster = NOBODY
        self._hello = Hello(Role.GATEWAY, name, pid, model=model, address=address)
        self._membership = Membership(self._hello, self.outbox)
        self._open: dict[int, _OpenRequest] = {}
        # In order of submission, and so of their times: the first is the next to be due.
        self._unanswered: dict[int, float] = {}

    @property
    def is_connected(self) -> bool:
        """Whether there is a session with the supervisor."""
        return self._membership.is_open

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._open)

    @property
    def wake_at(self) -> float | None:
        """The next sign of life, or the next answer that is overdue."""
        times = [self._membership.wake_at, *list(self._unanswered.values())[:1]]
        return min(times)

    def submit(self, request: Request, sink: Sink, now: float) -> None:
        """Hand in a request; ``sink`` hears all that comes of it."""
        if not self._membership.is_open:
            sink.fail(Unavailable("the supervisor cannot be reached", retry_after_s=1.0))
            return
        assert request.request_id not in self._open
        answer_by = now + ANSWER_WITHIN_S
        self._open[request.request_id] = _OpenRequest(sink, answer_by)
        self._unanswered[request.request_id] = answer_by
        self.outbox.send(SUPERVISOR, Submit(request))

    def cancel(self, request_id: int) -> None:
        """End a request from this side; its sink hears nothing more. May be repeated."""
        if self._forget(request_id) is not None and self._membership.is_open:
            self.outbox.send(SUPERVISOR, Cancel(request_id))

    def handle(self, message: Message, sender: str, now: float) -> None:  # noqa: ARG002
        """Take in a message from the supervisor."""
        if self._membership.handle(message, now) is not None:
            self._lose_all()
        match message:
            case Deliver(rows, engine):
                for row in rows:
                    self._deliver(row, engine)
            case Accepted(request_id):
                self._unanswered.pop(request_id, None)
            case Rejected(request_id, code, text, retry_after_s):
                self._fail(request_id, from_code(code, text, retry_after_s=retry_after_s))
            case Failed(request_id, code, text):
                self._fail(request_id, from_code(code, text))
            case ClusterState():
                self.cluster = message
            case _:
                pass

    def lose(self, peer: str, now: float) -> None:  # noqa: ARG002
        """The supervisor has not listened for too long."""
        self._membership.leave(now)
        self._lose_all()

    def decide(self, now: float) -> None:
        """Keep the membership up, and fail what was never answered."""
        if self._membership.decide(now) is MembershipChange.LOST:
            self._lose_all()
        while self._unanswered:
            request_id, answer_by = next(iter(self._unanswered.items()))
            if answer_by > now:
                break
            self.outbox.send(SUPERVISOR, Cancel(request_id))
            self._fail(request_id, Unavailable("no answer from the supervisor", retry_after_s=1.0))

    def _deliver(self, row: TokenRow, engine: str) -> None:
        request = self._open.get(row.request_id)
        if request is None:
            return  # cancelled from this side while the row was on its way
        assert row.position == request.position, "the session and the ledger keep the order"
        request.position += len(row.tokens)
        if row.finish:
            self._forget(row.request_id)
        request.sink.deliver(row, engine)

    def _fail(self, request_id: int, error: RequestError) -> None:
        request = self._forget(request_id)
        if request is not None:
            request.sink.fail(error)

    def _forget(self, request_id: int) -> _OpenRequest | None:
        self._unanswered.pop(request_id, None)
        return self._open.pop(request_id, None)

    def _lose_all(self) -> None:
        """The session is over, and with it what the supervisor knew of the open requests."""
        self.cluster = NOBODY
        for request_id in list(self._open):
            self._fail(request_id, InternalError("the supervisor was lost during the request"))
