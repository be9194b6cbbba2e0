"""The supervisor: admits, queues, routes, watches, and carries on what an engine left behind.

One for each cell. Every token passes it once, in one message for each engine step, and counts only
if the ledger says so. The decisions are in ``runtime.control``; here they meet the messages.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Final

from understudy.protocol.errors import InternalError, Overloaded, Unavailable
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    ClusterState,
    Deliver,
    Dying,
    EngineStatus,
    Failed,
    Fenced,
    GatewayStatus,
    Heartbeat,
    Hello,
    Message,
    ProcessExited,
    Pulse,
    Refused,
    Rejected,
    Role,
    StatusReply,
    StatusRequest,
    StepOutput,
    Submit,
    Welcome,
)
from understudy.protocol.request import Request, TokenRow
from understudy.runtime.control import router
from understudy.runtime.control.admission import Admission, AdmissionLimits, Refusal
from understudy.runtime.control.ledger import Entry, Ledger, Verdict
from understudy.runtime.control.registry import Member, MemberState, Registry
from understudy.runtime.control.request_queue import RequestQueue
from understudy.runtime.kit.actor import Outbox

PULSE_EVERY_S: Final = 0.25
STALL_MAX_S: Final = 600.0
"""A request that waits, or is with an engine, for so long without a token ends with an error."""
DELIVER_ROWS_MAX: Final = 4096
"""Rows in one message: even with all logprobs they take but a fraction of a frame."""


_OVERLOADED: Final = Overloaded.code or ""
_UNAVAILABLE: Final = Unavailable.code or ""
_INTERNAL: Final = InternalError.code or ""


class Totals:
    """Counts since the start."""

    __slots__ = ("admitted", "broken", "finished", "rejected", "resumed", "stale", "tokens")

    def __init__(self) -> None:
        self.admitted = self.finished = self.rejected = self.resumed = 0
        self.tokens = self.stale = self.broken = 0


class Supervisor:
    """The supervisor actor."""

    def __init__(
        self,
        *,
        model: str,
        first_epoch: int,
        limits: AdmissionLimits | None = None,
        started_at: float = 0.0,
    ) -> None:
        self.outbox = Outbox()
        self.totals = Totals()
        self._model = model
        self._started_at = started_at
        self._registry = Registry(first_epoch)
        self._ledger = Ledger()
        self._queue = RequestQueue()
        self._admission = Admission(limits or AdmissionLimits())
        self._deliveries: defaultdict[tuple[str, str], list[TokenRow]] = defaultdict(list)
        self._has_news = False
        self._chores_at = started_at

    @property
    def wake_at(self) -> float | None:
        """The next round of chores."""
        return self._chores_at

    def handle(self, message: Message, sender: str, now: float) -> None:
        """Take in a message from anyone."""
        member = self._registry.get(sender)
        if member is not None and member.state is MemberState.SERVING:
            member.heard_at = now
        match message:
            case StepOutput(_, rows):
                self._take_rows(rows, member, now)
            case Heartbeat() if member is not None:
                member.beat = message
            case Submit(request):
                self._admit(request, sender, now)
            case Cancel(request_id):
                self._cancel(request_id, sender)
            case Refused(request_id, attempt, code, text):
                self._refused(request_id, attempt, sender, code, text)
            case Hello():
                self._greet(message, sender, now)
            case Dying() if member is not None:
                self._bury(member)
            case ProcessExited(name, pid):
                self._exited(name, pid, message.restarts)
            case StatusRequest():
                self.outbox.send(sender, self._status(now))
            case _:
                pass

    def lose(self, peer: str, now: float) -> None:  # noqa: ARG002
        """A member has not listened for too long: it counts as gone."""
        member = self._registry.get(peer)
        if member is not None:
            self._bury(member)

    def decide(self, now: float) -> None:
        """Pass on what was accepted, give out what waits, and look after the company."""
        self._deliver()
        if now >= self._chores_at:
            self._do_chores(now)
        self._assign_waiting(now)
        self._announce()

    def check_integrity(self) -> None:
        """Assert that queue, ledger and registry tell the same story."""
        self._queue.check_integrity()
        for entry in self._ledger.entries():
            request_id = entry.request.request_id
            assert (entry.engine is None) == (request_id in self._queue)
            if entry.engine is not None:
                member = self._registry.get(entry.engine)
                assert member is not None
                assert member.state is MemberState.SERVING
                assert request_id in member.requests

    # Requests

    def _admit(self, request: Request, gateway: str, now: float) -> None:
        member = self._registry.get(gateway)
        if member is None or member.role is not Role.GATEWAY:
            return
        if member.state is MemberState.DEAD:
            return  # buried earlier in this turn: nobody would hear of the request's end
        if request.request_id in self._ledger:
            text = "the request's id is taken"
            self._reject(gateway, Rejected(request.request_id, _INTERNAL, text))
            return
        refusal = self._refusal(request, now)
        if refusal is not None:
            # What came before it in this turn may have an engine, and not really wait.
            self._assign_waiting(now)
            refusal = self._refusal(request, now)
        if refusal is not None:
            self._reject(gateway, Rejected(request.request_id, _OVERLOADED, *refusal))
            return
        self.totals.admitted += 1
        entry = self._ledger.admit(request, gateway, now)
        member.requests.add(request.request_id)
        self._enqueue(entry)
        self.outbox.send(gateway, Accepted(request.request_id))

    def _refusal(self, request: Request, now: float) -> Refusal | None:
        return self._admission.refusal(
            num_tokens=len(request.prompt),
            requests_waiting=len(self._queue),
            tokens_waiting=self._queue.num_tokens,
            now=now,
        )

    def _reject(self, gateway: str, answer: Rejected) -> None:
        self.totals.rejected += 1
        self.outbox.send(gateway, answer)

    def _cancel(self, request_id: int, gateway: str) -> None:
        entry = self._ledger.get(request_id)
        if entry is None or entry.gateway != gateway:
            return
        if entry.engine is not None:
            self.outbox.send(entry.engine, Cancel(request_id))
        self._end(request_id)

    def _refused(self, request_id: int, attempt: int, engine: str, code: str, text: str) -> None:
        entry = self._ledger.get(request_id)
        if entry is not None and (entry.engine, entry.attempt) == (engine, attempt):
            self._fail(entry, code, text)

    def _take_rows(self, rows: tuple[TokenRow, ...], member: Member | None, now: float) -> None:
        if member is None:
            return
        for row in rows:
            entry = self._ledger.get(row.request_id)
            match self._ledger.accept(row, member.identity, member.epoch, now):
                case Verdict.ACCEPTED:
                    assert entry is not None
                    self.totals.tokens += len(row.tokens)
                    self._deliveries[entry.gateway, member.name].append(row)
                    if row.finish:
                        self._forget(entry)
                        self._admission.finish_rate.record(now)
                        self.totals.finished += 1
                case Verdict.STALE:
                    self.totals.stale += 1
                case Verdict.BROKEN:
                    assert entry is not None
                    self.totals.broken += 1
                    self.outbox.send(member.identity, Cancel(row.request_id))
                    self._take_back(entry)

    def _deliver(self) -> None:
        for (gateway, engine), rows in self._deliveries.items():
            for first in range(0, len(rows), DELIVER_ROWS_MAX):
                some = tuple(rows[first : first + DELIVER_ROWS_MAX])
                self.outbox.send(gateway, Deliver(some, engine))
        self._deliveries.clear()

    def _assign_waiting(self, now: float) -> None:
        """Give waiting requests to engines for as long as any has credit."""
        if not len(self._queue):
            return
        engines = {member.identity: member for member in self._registry.serving(Role.ENGINE)}
        while len(self._queue):
            chosen = router.choose(
                router.Candidate(identity, len(member.requests), member.capacity.max_num_seqs)
                for identity, member in engines.items()
                if member.capacity is not None
            )
            if chosen is None:
                return
            request_id = self._queue.pop()
            assert request_id is not None
            member = engines[chosen.identity]
            entry = self._ledger.assign(request_id, member.identity, member.epoch, now)
            member.requests.add(request_id)
            assign = Assign(entry.request, entry.attempt, tuple(entry.output))
            self.outbox.send(member.identity, assign)

    def _enqueue(self, entry: Entry) -> None:
        self._queue.push(
            entry.request.request_id,
            num_tokens=len(entry.request.prompt) + len(entry.output),
            priority=entry.request.priority,
            is_resumed=entry.attempt > 0,
        )

    def _take_back(self, entry: Entry) -> None:
        """Take a request from its engine and queue it, to go on where its output ends."""
        request_id = entry.request.request_id
        assert entry.engine is not None
        member = self._registry.get(entry.engine)
        if member is not None:
            member.requests.discard(request_id)
        self._ledger.release(request_id)
        self.totals.resumed += 1
        self._enqueue(entry)

    def _fail(self, entry: Entry, code: str, text: str) -> None:
        request_id = entry.request.request_id
        if entry.engine is not None:
            self.outbox.send(entry.engine, Cancel(request_id))
        self._deliver()  # its last tokens may have come in this turn
        self.outbox.send(entry.gateway, Failed(request_id, code, text))
        self._end(request_id)

    def _end(self, request_id: int) -> None:
        """Forget a request that ends for another reason than its last token."""
        entry = self._ledger.end(request_id)
        assert entry is not None
        self._queue.remove(request_id)
        self._forget(entry)
        self.totals.finished += 1

    def _forget(self, entry: Entry) -> None:
        for identity in (entry.gateway, entry.engine):
            member = self._registry.get(identity) if identity is not None else None
            if member is not None:
                member.requests.discard(entry.request.request_id)

    # The company

    def _greet(self, hello: Hello, identity: str, now: float) -> None:
        greeting = self._registry.greet(hello, identity, now)
        if greeting is None:
            return
        if greeting.replaced is not None:
            self._bury(greeting.replaced)
        self.outbox.send(identity, Welcome(greeting.member.epoch))
        if greeting.is_new_session:
            self.outbox.open_session(identity, greeting.member.epoch)
            self._has_news = True

    def _exited(self, name: str, pid: int, restarts: int) -> None:
        member = self._registry.named(name)
        if member is not None and member.pid == pid:
            member.restarts = restarts
            self._bury(member)

    def _bury(self, member: Member) -> None:
        """A member is gone: fence it, and settle what it was doing."""
        if member.state is MemberState.DEAD:
            return
        self._registry.bury(member)
        self._has_news = True
        self.outbox.send(member.identity, Fenced(member.epoch))
        self.outbox.close_session(member.identity)
        for request_id in sorted(member.requests):
            entry = self._ledger.get(request_id)
            assert entry is not None
            if member.role is Role.ENGINE:
                self._take_back(entry)
            else:
                self._cancel(request_id, member.identity)
        member.requests.clear()

    def _do_chores(self, now: float) -> None:
        """What time alone brings about: silence, stalls, and our own sign of life."""
        if now < self._chores_at + PULSE_EVERY_S:
            for member in self._registry.silent(now):
                self._bury(member)
        # else it was we who were held up, and what the others said meanwhile is still to be read.
        for entry in self._ledger.entries():
            if now >= entry.progress_at + STALL_MAX_S:
                self._fail_stalled(entry)
        for role in (Role.ENGINE, Role.GATEWAY):
            for member in self._registry.serving(role):
                self.outbox.send(member.identity, Pulse())
        self._chores_at = now + PULSE_EVERY_S

    def _fail_stalled(self, entry: Entry) -> None:
        if entry.engine is None:
            text = f"no engine took the request within {STALL_MAX_S:.0f} s"
            self._fail(entry, _UNAVAILABLE, text)
        else:
            text = f"the engine made no token within {STALL_MAX_S:.0f} s"
            self._fail(entry, _INTERNAL, text)

    def _announce(self) -> None:
        """Tell the gateways who serves, when that may have changed."""
        if self._has_news:
            self._has_news = False
            for member in self._registry.serving(Role.GATEWAY):
                self.outbox.send(member.identity, self._cluster_state())

    def _cluster_state(self) -> ClusterState:
        engines = self._registry.members(Role.ENGINE)
        lengths = [
            member.capacity.max_model_len
            for member in engines
            if member.state is MemberState.SERVING and member.capacity is not None
        ]
        return ClusterState(
            engines_serving=len(lengths),
            engines_known=len(engines),
            max_model_len=min(lengths, default=0),
        )

    def _status(self, now: float) -> StatusReply:
        return StatusReply(
            model=self._model,
            uptime_s=now - self._started_at,
            engines=tuple(
                _engine_status(member, now) for member in self._registry.members(Role.ENGINE)
            ),
            gateways=tuple(
                _gateway_status(member, now) for member in self._registry.serving(Role.GATEWAY)
            ),
            queued=len(self._queue),
            running=len(self._ledger) - len(self._queue),
            admitted=self.totals.admitted,
            finished=self.totals.finished,
            rejected=self.totals.rejected,
            resumed=self.totals.resumed,
            tokens=self.totals.tokens,
        )


def _engine_status(member: Member, now: float) -> EngineStatus:
    beat, capacity = member.beat, member.capacity
    return EngineStatus(
        name=member.name,
        state=member.state.value,
        pid=member.pid,
        epoch=member.epoch,
        restarts=member.restarts,
        running=0 if beat is None else beat.running,
        waiting=0 if beat is None else beat.waiting,
        outstanding=len(member.requests),
        blocks_free=0 if beat is None else beat.blocks_free,
        blocks_total=0 if capacity is None else capacity.num_blocks,
        step=0 if beat is None else beat.step,
        beat_age_s=now - member.heard_at,
    )


def _gateway_status(member: Member, now: float) -> GatewayStatus:
    return GatewayStatus(
        name=member.name,
        pid=member.pid,
        address=member.address,
        streams=len(member.requests),
        beat_age_s=now - member.heard_at,
    )
