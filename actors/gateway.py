"""The gateway's core: which requests are open, and what each must be told next.

Between the HTTP server, which knows clients and text, and the supervisor, which knows neither.
Sans-I/O like every actor; ``http_server`` puts a socket in front of it.

When the supervisor is gone, the core keeps what it has open. With the next session it says which
position each request waits for, and the streams go on from there. A row that covers what was
delivered already is cut to what is new, so a position is delivered once, whatever is repeated.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
from typing import Any, Final, Protocol

from understudy.protocol.errors import AlreadySubmitted, RequestError, Unavailable, from_code
from understudy.protocol.messages import (
    Accepted,
    Attach,
    Cancel,
    ClusterState,
    Deliver,
    Duplicate,
    EndGroup,
    Failed,
    Found,
    HeldRequest,
    Hello,
    Lookup,
    Message,
    Reclaim,
    Rejected,
    ResetPrefixCache,
    Role,
    Submit,
    TimelineRequest,
    Timelines,
    UsageReply,
    UsageRequest,
)
from understudy.protocol.request import Request, TokenRow, hastened, joined
from understudy.runtime.kit.actor import SUPERVISOR, Outbox
from understudy.runtime.kit.membership import Membership, MembershipChange

ANSWER_WITHIN_S: Final = 30.0
"""What the supervisor has not answered by then has failed, restarts of the supervisor included."""
HOPE_S: Final = 10.0
"""For so long after the last engine was lost, or after the start, one may be back in a moment."""

NOBODY: Final = ClusterState(engines_serving=0, engines_known=0, max_model_len=0)


class Sink(Protocol):
    """Where one request's output goes. Exactly one end reaches it: a finish or a failure."""

    def deliver(self, row: TokenRow, engine: str) -> None:
        """Take in new tokens, in order, and the end if ``row.finish`` says so."""
        ...

    def fail(self, error: RequestError) -> None:
        """Take in that the request ends with an error."""
        ...


class _Listener:
    """A sink, and the position that it must be told next; while parked, it is told nothing."""

    __slots__ = ("is_parked", "position", "sink")

    def __init__(self, sink: Sink, position: int) -> None:
        self.sink = sink
        self.position = position
        self.is_parked = False

    def deliver(self, row: TokenRow, engine: str) -> None:
        """Tell what is new of a row."""
        known = self.position - row.position
        if self.is_parked or known < 0 or known > len(row.tokens):
            return  # this listener waits for an earlier row, which is on its way or kept for it
        if known:
            row = row._replace(
                position=self.position, tokens=row.tokens[known:], logprobs=row.logprobs[known:]
            )
        self.position += len(row.tokens)
        if row.tokens or row.finish:
            self.sink.deliver(row, engine)


class _OpenRequest:
    """A request that has not ended, and who listens to it."""

    __slots__ = ("has_ended", "listeners", "position", "request", "submitted_at")

    def __init__(self, request: Request | None, submitted_at: float = 0.0) -> None:
        self.request = request
        """What to submit again, until the supervisor has answered."""
        self.submitted_at = submitted_at
        self.listeners: list[_Listener] = []
        self.position = 0
        """The end of the output that came so far."""
        self.has_ended = False
        """Whether that is all. Who still listens then waits for what came before."""

    @property
    def next_position(self) -> int:
        """The first position that somebody still waits for."""
        return min((listener.position for listener in self.listeners), default=self.position)


class _Search:
    """A question to the supervisor, and who has asked it."""

    __slots__ = ("answer_by", "found")

    def __init__(self, answer_by: float) -> None:
        self.answer_by = answer_by
        self.found: list[Callable[[Any], None]] = []


class Gateway:
    """The gateway actor."""

    def __init__(self, name: str, *, pid: int, model: str, address: str = "") -> None:
        self.outbox = Outbox()
        self.cluster = NOBODY
        hello = Hello(Role.GATEWAY, name, pid, model=model, address=address)
        self._membership = Membership(hello, self.outbox)
        self._open: dict[int, _OpenRequest] = {}
        # In order of submission, and so of their times: the first is the next to be due.
        self._unanswered: dict[int, float] = {}
        self._seekers: dict[Lookup | TimelineRequest, _Search] = {}
        self._usage_asked: dict[str, list[Callable[[UsageReply | None], None]]] = {}
        self._waiting: list[Callable[[bool], None]] = []
        self._deliveries: list[Deliver] = []
        """What this turn has brought so far."""
        self._hope_until: float | None = None

    def reset_prefix_cache(self) -> bool:
        """Have every engine forget what it has computed; whether anybody hears it."""
        if self._membership.is_open:
            self.outbox.send(SUPERVISOR, ResetPrefixCache())
        return self._membership.is_open

    def ask_usage(self, tenant: str, told: Callable[[UsageReply | None], None]) -> None:
        """Ask what a tenant has used; ``told`` is told once, ``None`` if nobody can say."""
        if not self._membership.is_open:
            told(None)
            return
        asked = self._usage_asked.setdefault(tenant, [])
        asked.append(told)
        if len(asked) == 1:
            self.outbox.send(SUPERVISOR, UsageRequest(tenant))

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
        times += [search.answer_by for search in list(self._seekers.values())[:1]]
        if self._waiting and self._hope_until is not None:
            times.append(self._hope_until)
        return min(times)

    def submit(self, request: Request, sink: Sink, now: float) -> None:
        """Hand in a request; ``sink`` hears all that comes of it."""
        assert request.request_id not in self._open
        self._open[request.request_id] = opened = _OpenRequest(request, now)
        opened.listeners.append(_Listener(sink, 0))
        self._unanswered[request.request_id] = now + ANSWER_WITHIN_S
        self._send(Submit(request))

    def attach(self, request_id: int, sink: Sink, position: int) -> None:
        """Join a request that was submitted before, by this gateway or another."""
        opened = self._open.setdefault(request_id, _OpenRequest(None))
        opened.listeners.append(_Listener(sink, position))
        self._send(Attach(request_id, position))

    def look_up(
        self, group_id: int, tenant: str, found: Callable[[Found | None], None], now: float
    ) -> None:
        """Ask which requests a group has; ``found`` is told once, ``None`` if nobody answers.

        Without a session the question waits for the next one.
        """
        self._ask(Lookup(group_id, tenant), found, now)

    def timelines(
        self, asked: TimelineRequest, told: Callable[[Timelines | None], None], now: float
    ) -> None:
        """Ask what became of requests; ``told`` is told once, ``None`` if nobody answers."""
        self._ask(asked, told, now)

    def end_group(self, group_id: int, tenant: str, *, is_forgotten: bool = False) -> None:
        """End a call for all who listen; perhaps have it forgotten.

        Without a session nothing happens: who asks looks afterwards.
        """
        self._send(EndGroup(group_id, tenant, is_forgotten))

    def when_serving(self, tell: Callable[[bool], None], now: float) -> None:
        """Have ``tell`` called with true once an engine serves, or with false if hope is gone.

        There is hope for ``HOPE_S`` after a loss, not for as long as nothing serves.
        """
        if self._hope_until is None:
            self._hope_until = now + HOPE_S
        if self.cluster.engines_serving or now >= self._hope_until:
            tell(bool(self.cluster.engines_serving))
        else:
            self._waiting.append(tell)

    def park(self, request_id: int, sink: Sink) -> None:
        """Tell a sink nothing more for now, until the request ends.

        What it misses meanwhile is kept by the supervisor.
        """
        for listener in self._listeners(request_id, sink):
            listener.is_parked = True

    def unpark(self, request_id: int, sink: Sink) -> None:
        """Tell a parked sink what it has missed, and go on."""
        for listener in self._listeners(request_id, sink):
            self._unpark(request_id, listener)

    def is_answered(self, request_id: int) -> bool:
        """Whether the supervisor has taken or refused a request that was submitted here."""
        return request_id not in self._unanswered

    def cancel(self, request_id: int, sink: Sink) -> None:
        """Stop listening; with its last listener a request ends. May be repeated."""
        if self._stop_listening(request_id, sink) and not self._open[request_id].listeners:
            self._forget(request_id)
            self._send(Cancel(request_id))

    def leave(self, request_id: int, sink: Sink) -> None:
        """Stop listening, and let the request go on: someone may come back for it."""
        if self._stop_listening(request_id, sink):
            opened = self._open[request_id]
            if opened.has_ended and not opened.listeners:
                self._forget(request_id)

    def handle(self, message: Message, sender: str, now: float) -> None:  # noqa: ARG002
        """Take in a message from the supervisor."""
        change = self._membership.handle(message, now)
        if isinstance(message, Deliver):
            self._deliveries.append(message)
            return
        self._deliver_all()
        self._change(change, now)
        match message:
            case Accepted(request_id):
                self._unanswered.pop(request_id, None)
                if request_id in self._open:
                    self._open[request_id].request = None
            case Rejected(request_id, code, text, retry_after_s):
                self._fail(request_id, from_code(code, text, retry_after_s=retry_after_s))
            case Duplicate(request_id, original_group_id):
                self._fail(request_id, AlreadySubmitted(original_group_id))
            case Failed(request_id, code, text, retry_after_s):
                self._fail(request_id, from_code(code, text, retry_after_s=retry_after_s))
            case UsageReply(tenant):
                for told in self._usage_asked.pop(tenant, ()):
                    told(message)
            case Found(group_id, tenant):
                self._answer(Lookup(group_id, tenant), message)
            case Timelines(tenant, group_id, requests_max):
                self._answer(TimelineRequest(tenant, group_id, requests_max), message)
            case ClusterState():
                self._change_cluster(message, now)
            case _:
                pass

    def lose(self, peer: str, now: float) -> None:  # noqa: ARG002
        """The supervisor has not listened for too long: ask for a new session."""
        self._change(self._membership.leave(now), now)

    def decide(self, now: float) -> None:
        """Pass on what came, keep the membership up, and fail what was never answered."""
        self._deliver_all()
        self._change(self._membership.decide(now), now)
        if self._hope_until is None:
            self._hope_until = now + HOPE_S
        elif now >= self._hope_until:
            self._tell_waiting(is_serving=False)
        while self._seekers:
            sought, search = next(iter(self._seekers.items()))
            if search.answer_by > now:
                break
            self._answer(sought, None)
        while self._unanswered:
            request_id, answer_by = next(iter(self._unanswered.items()))
            if answer_by > now:
                break
            self._send(Cancel(request_id))
            self._fail(request_id, Unavailable("no answer from the supervisor", retry_after_s=1.0))

    def _change(self, change: MembershipChange | None, now: float) -> None:
        # When the session is lost, what was last said of the cluster stays: a call that comes now
        # is submitted with the next session, which is most often a moment away.
        if change is not None:
            asked, self._usage_asked = self._usage_asked, {}
            for told in itertools.chain.from_iterable(asked.values()):
                told(None)
        if change is MembershipChange.JOINED:
            self._take_up_again(now)

    def _take_up_again(self, now: float) -> None:
        """Submit again what was never answered, and say what is held.

        In this order, for what was not answered may have been heard all the same: what is held is
        all that the supervisor may keep for this gateway.
        """
        for opened in self._open.values():
            if opened.request is not None:
                late = hastened(opened.request, now - opened.submitted_at)
                self.outbox.send(SUPERVISOR, Submit(late))
        held = [HeldRequest(number, one.next_position) for number, one in self._open.items()]
        self.outbox.send(SUPERVISOR, Reclaim(tuple(held)))
        for question in self._seekers:
            self.outbox.send(SUPERVISOR, question)

    def _change_cluster(self, cluster: ClusterState, now: float) -> None:
        if self.cluster.engines_serving and not cluster.engines_serving:
            self._hope_until = now + HOPE_S
        self.cluster = cluster
        if cluster.engines_serving:
            self._tell_waiting(is_serving=True)

    def _tell_waiting(self, *, is_serving: bool) -> None:
        waiting, self._waiting = self._waiting, []
        for tell in waiting:
            tell(is_serving)

    def _ask(
        self, question: Lookup | TimelineRequest, tell: Callable[[Any], None], now: float
    ) -> None:
        search = self._seekers.get(question)
        if search is None:
            search = self._seekers[question] = _Search(now + HOPE_S)
            self._send(question)
        search.found.append(tell)

    def _answer(self, question: Lookup | TimelineRequest, answer: Found | Timelines | None) -> None:
        search = self._seekers.pop(question, None)
        for found in () if search is None else search.found:
            found(answer)

    def _send(self, message: Message) -> None:
        """Send if there is a session. Else the next one begins with saying what is held."""
        if self._membership.is_open:
            self.outbox.send(SUPERVISOR, message)

    def _deliver_all(self) -> None:
        """Pass on what this turn has brought so far.

        When this process falls behind, several messages wait for it. They are taken as one, so
        that it then writes fewer chunks, of more tokens: the later it is, the faster it gets.
        """
        deliveries, self._deliveries = self._deliveries, []
        if len(deliveries) > 1:
            deliveries = _merged(deliveries)
        for delivery in deliveries:
            for row in delivery.rows:
                self._deliver(row, delivery.engine)

    def _deliver(self, row: TokenRow, engine: str) -> None:
        opened = self._open.get(row.request_id)
        if opened is None:
            return  # cancelled from this side while the row was on its way
        opened.position = max(opened.position, row.position + len(row.tokens))
        listeners = opened.listeners
        if row.finish:
            opened.has_ended = True
            # Who has joined a moment ago still lacks what came before, which is on its way.
            opened.listeners = [
                one for one in listeners if one.is_parked or one.position < row.position
            ]
            if not opened.listeners:
                self._forget(row.request_id)
        for listener in list(listeners):
            listener.deliver(row, engine)
            if row.finish:  # what has ended is not kept for ever
                self._unpark(row.request_id, listener)

    def _unpark(self, request_id: int, listener: _Listener) -> None:
        if listener.is_parked:
            listener.is_parked = False
            self._send(Attach(request_id, listener.position))

    def _fail(self, request_id: int, error: RequestError) -> None:
        opened = self._forget(request_id)
        if opened is None:
            return
        parked = [listener for listener in opened.listeners if listener.is_parked]
        told = [listener for listener in opened.listeners if not listener.is_parked]
        if parked:
            # They hear of it when they have heard what came before.
            opened.listeners = parked
            self._open[request_id] = opened
            for listener in parked:
                self._unpark(request_id, listener)
        for listener in told:
            listener.sink.fail(error)

    def _listeners(self, request_id: int, sink: Sink) -> list[_Listener]:
        opened = self._open.get(request_id)
        return [one for one in opened.listeners if one.sink is sink] if opened else []

    def _stop_listening(self, request_id: int, sink: Sink) -> bool:
        """Forget a sink; whether it was there."""
        opened = self._open.get(request_id)
        if opened is None:
            return False
        kept = [listener for listener in opened.listeners if listener.sink is not sink]
        was_there = len(kept) < len(opened.listeners)
        opened.listeners = kept
        return was_there

    def _forget(self, request_id: int) -> _OpenRequest | None:
        self._unanswered.pop(request_id, None)
        return self._open.pop(request_id, None)


def _merged(deliveries: list[Deliver]) -> list[Deliver]:
    """One message for each engine, in which each request has one row.

    Unless a request has come from one engine and then from another: then they stay in order.
    """
    by_engine: defaultdict[str, list[TokenRow]] = defaultdict(list)
    for delivery in deliveries:
        by_engine[delivery.engine] += delivery.rows
    told = [{row.request_id for row in rows} for rows in by_engine.values()]
    if sum(map(len, told)) > len(set().union(*told)):
        return deliveries
    return [Deliver(tuple(joined(rows)), engine) for engine, rows in by_engine.items()]
