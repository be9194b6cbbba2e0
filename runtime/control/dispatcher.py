"""The dispatcher: the life of every request, from its admission to its one end.

Holds the ledger, the queue and what gateways are to be told; decides who gets what. What it wants
said goes into the supervisor's outbox, what must be remembered into ``take_records``, which the
supervisor journals before anything leaves. Knows members by their identities only: whether they
live is decided elsewhere, and told by ``engine_fell`` and ``gateway_left``.

::

    admit ──▶ queue ──assign──▶ engine ──rows──▶ ledger ──▶ subscribers
                ▲                  │ fell, drained, broke the line
                └──── resumed ◀────┘ (prompt and output so far, apart)
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

from understudy.protocol.errors import (
    DeadlineExceeded,
    IdempotencyMismatch,
    NotFound,
    Overloaded,
    Quarantined,
    RequestError,
)
from understudy.protocol.messages import (
    Accepted,
    Assign,
    Cancel,
    Duplicate,
    Failed,
    HeldRequest,
    Rejected,
)
from understudy.protocol.request import FinishReason, Request, TokenRow, fingerprint
from understudy.protocol.timeline import RESTORED
from understudy.runtime.control.accounts import Accounts
from understudy.runtime.control.admission import Admission, AdmissionLimits
from understudy.runtime.control.audience import Audience
from understudy.runtime.control.circuit_breaker import Circuits
from understudy.runtime.control.deadlines import STALL_MAX_S, Deadlines, stall_error
from understudy.runtime.control.door import Answer, Door, Places, size_of
from understudy.runtime.control.enquiries import Enquiries
from understudy.runtime.control.ledger import Entry, Ledger, Verdict
from understudy.runtime.control.quarantine import Quarantine
from understudy.runtime.control.registry import Member
from understudy.runtime.control.request_queue import RequestQueue
from understudy.runtime.control.router import Router
from understudy.runtime.control.tenancy import UNLIMITED, PolicyOf
from understudy.runtime.control.totals import Totals
from understudy.runtime.kit.actor import Outbox
from understudy.runtime.storage import records


class Dispatcher:
    """All requests, and where each of them is."""

    def __init__(
        self,
        outbox: Outbox,
        limits: AdmissionLimits,
        serving: Callable[[], list[Member]],
        *,
        policy_of: PolicyOf = lambda _: UNLIMITED,
        today: Callable[[], int] = lambda: 0,
    ) -> None:
        """``serving`` gives the engines that take new work, ``today`` the days since 1970."""
        self.totals = Totals()
        self._outbox = outbox
        self._serving = serving
        self._ledger = Ledger()
        self.accounts = Accounts(policy_of, today)
        self._queue = RequestQueue(self.accounts.fair_share)
        self._router = Router()
        self._admission = Admission(limits)
        self.quarantine = Quarantine()
        self._door = Door(self._admission, self._queue, self.accounts, self.quarantine)
        self.audience = Audience(outbox)
        self.enquiries = Enquiries(outbox, self._ledger)
        self._circuits = Circuits()
        self.deadlines = Deadlines()
        self._convicts: list[Request] = []
        self._with_engine: defaultdict[str, set[int]] = defaultdict(set)
        self._records: list[records.Record] = []

    @property
    def num_queued(self) -> int:
        """Requests that wait for an engine."""
        return len(self._queue)

    @property
    def num_living(self) -> int:
        """Requests that have not ended."""
        return len(self._ledger)

    def outstanding(self, engine: str) -> int:
        """How many requests an engine has."""
        return len(self._with_engine[engine])

    def engines_expected(self) -> list[str]:
        """Engines that have requests, whether they are here or not."""
        return sorted(identity for identity, held in self._with_engine.items() if held)

    def take_records(self) -> list[records.Record]:
        """What must be journaled before anything that was decided becomes known."""
        taken, self._records = self._records, []
        return [*taken, *self.accounts.take_records()]

    # What gateways want

    def admit(self, request: Request, gateway: str, now: float) -> None:
        """Take a request in, or say why not. A request that is known already is joined."""
        known = self._ledger.find(request.request_id)
        if known is not None:
            self._outbox.send(gateway, Accepted(request.request_id))
            self.attach(request.request_id, 0, gateway)
            return
        duplicated = self._ledger.duplicated(request.idempotency_key)
        if duplicated is not None and duplicated.group_id != request.group_id:
            if duplicated.body_digest == request.body_digest:
                self._outbox.send(gateway, Duplicate(request.request_id, duplicated.group_id))
            else:
                text = "this idempotency key was used with another body"
                self._reject(request, gateway, IdempotencyMismatch(text))
            return
        answer = self._ask(request, now)
        if isinstance(answer.error, Overloaded) or answer.victim is not None:
            # What came before it in this turn may have an engine, and not really wait.
            self.assign_waiting(now)
            answer = self._ask(request, now)
        if answer.error is not None:
            self._reject(request, gateway, answer.error)
            return
        if answer.victim is not None:
            victim = self._ledger.get(answer.victim)
            assert victim is not None
            self.totals.shed += 1
            self._fail(victim, self._door.shed_error(now), now)
        self.totals.admitted += 1
        entry = self._ledger.admit(request, now)
        self._records.append(
            records.Admit(
                request,
                gateway,
                now,
                tenant=request.tenant,
                key_digest=request.idempotency_key,
                body_digest=request.body_digest,
            )
        )
        self.accounts.begin(entry, now, answer.forecast)
        self.deadlines.watch(entry)
        self.audience.join(entry, gateway)
        self._enqueue(entry, now)
        self._outbox.send(gateway, Accepted(request.request_id))

    def cancel(self, request_id: int, gateway: str, now: float) -> None:
        """A gateway does not want a request any more; it ends when none is left that does."""
        entry = self._ledger.get(request_id)
        if entry is None or gateway not in entry.subscribers:
            return
        self.audience.leave(entry, gateway)
        if not entry.subscribers:
            self._end(entry, FinishReason.CANCELLED, now)

    def attach(self, request_id: int, position: int, gateway: str) -> None:
        """A gateway wants a request's output from a position on."""
        entry = self._ledger.find(request_id)
        if entry is None or position > len(entry.output):
            failed = Failed(request_id, NotFound.code or "", "there is no such stream (any more)")
            self._outbox.send(gateway, failed)
            return
        if not entry.finish:
            self.audience.join(entry, gateway)
        if position < len(entry.output) or entry.finish:
            self.audience.catch_up(entry, position, gateway)

    def reclaim(self, held: Iterable[HeldRequest], gateway: str, now: float) -> None:
        """A gateway is back: it holds these, and has given up whatever else it had."""
        positions = dict(held)
        for request_id in sorted(self.audience.streams(gateway) - positions.keys()):
            self.cancel(request_id, gateway, now)
        for request_id, position in positions.items():
            self.attach(request_id, position, gateway)

    def end_group(self, group_id: int, tenant: str, now: float, *, is_forgotten: bool) -> None:
        """End a call for all who listen, at its client's wish; perhaps forget it altogether."""
        for entry in self._ledger.group(group_id, tenant):
            if not entry.finish:
                gateways = list(entry.subscribers)
                self._end(entry, FinishReason.CANCELLED, now)
                for gateway in gateways:
                    self.audience.catch_up(entry, len(entry.output), gateway)
            if is_forgotten:
                self._ledger.forget(entry)
                self._records.append(records.Forget(entry.request_id))

    def gateway_left(self, gateway: str, now: float) -> None:
        """A gateway is gone. Its requests go on for a while: clients may come back by another."""
        for request_id in self.audience.forget_gateway(gateway):
            entry = self._ledger.get(request_id)
            assert entry is not None
            entry.subscribers.remove(gateway)
            if not entry.subscribers:
                self.audience.miss(entry, now)

    def take_convicts(self) -> list[Request]:
        """The requests that were quarantined since the last call."""
        convicts, self._convicts = self._convicts, []
        return convicts

    # What engines bring

    def take_rows(self, rows: tuple[TokenRow, ...], engine: Member, now: float) -> None:
        """Take in a step's output."""
        accepted = []
        for row in rows:
            entry = self._ledger.get(row.request_id)
            match self._ledger.accept(row, engine.identity, engine.epoch, now):
                case Verdict.ACCEPTED:
                    assert entry is not None
                    accepted.append(row)
                    self.quarantine.lift(row.request_id)
                    self._pass_on(entry, row, engine, now)
                case Verdict.STALE:
                    self.totals.stale += 1
                case Verdict.BROKEN:
                    assert entry is not None
                    self.totals.broken += 1
                    self._outbox.send(engine.identity, Cancel(row.request_id))
                    self._circuits.failed(engine.identity, row.request_id, now)
                    self._take_back(entry, now)
        for row in accepted:
            if row.num_cached_tokens or row.vector:
                self._records += records.beside(row)
        if accepted:
            self._records.append(records.Step(tuple(accepted)))

    def take_inventory(self, rows: tuple[TokenRow, ...], engine: Member, now: float) -> None:
        """Take in what an engine kept through the time without a session."""
        for row in rows:
            rest = self._ledger.adopt(row, engine.identity, engine.epoch, now)
            if rest is None:
                # If it has the request anew, that attempt takes the place of what it tells of.
                is_anew = row.request_id in self._with_engine[engine.identity]
                if not row.finish and not is_anew:
                    self._outbox.send(engine.identity, Cancel(row.request_id))
                continue
            entry = self._ledger.get(row.request_id)
            assert entry is not None
            self.totals.adopted += 1
            entry.numerics = engine.numerics
            self._queue.remove(row.request_id)
            self._with_engine[engine.identity].add(row.request_id)
            engine.unclaimed.discard(row.request_id)
            self._records += records.beside(rest)
            if rest.tokens or rest.finish:
                self._records.append(records.Step((rest,)))
                self._pass_on(entry, rest, engine, now)

    def begin_inventory(self, engine: Member) -> None:
        """A session with an engine has opened: it will tell what of its requests it still has."""
        engine.unclaimed = set(self._with_engine[engine.identity])

    def end_inventory(self, engine: Member) -> None:
        """An engine has told all that it holds: what else was with it then is with nobody."""
        for request_id in sorted(engine.unclaimed & self._with_engine[engine.identity]):
            entry = self._ledger.get(request_id)
            assert entry is not None
            self._take_back(entry, entry.progress_at)
        engine.unclaimed.clear()

    def refused(
        self, request_id: int, attempt: int, engine: str, error: RequestError, now: float
    ) -> None:
        """An engine cannot serve a request."""
        entry = self._ledger.get(request_id)
        if entry is not None and (entry.engine, entry.attempt) == (engine, attempt):
            self._circuits.failed(engine, request_id, now)
            self._fail(entry, error, now)

    def engine_fell(self, engine: str, suspects: frozenset[int], now: float) -> None:
        """An engine is gone; ``suspects`` were in the step in which it ended."""
        for request_id in sorted(self._with_engine.pop(engine, ())):
            entry = self._ledger.get(request_id)
            assert entry is not None
            if request_id in suspects and self.quarantine.record_death(
                request_id, was_alone=len(suspects) == 1, is_proven=bool(entry.output)
            ):
                self.totals.quarantined += 1
                self.quarantine.convict(fingerprint(entry.request), now)
                self._convicts.append(entry.request)
                text = "engines died of this request; it is quarantined"
                self._fail(entry, Quarantined(text), now)
            else:
                self._take_back(entry, now)
        self._with_engine.pop(engine, None)
        self._circuits.forget(engine)
        self._router.forget(engine)

    def forget_prefixes(self, engine: str) -> None:
        """An engine has no computed prefixes any more."""
        self._router.forget(engine)

    def move_away(self, engine: str, now: float) -> None:
        """Take all requests from an engine that is to rest; they go on elsewhere."""
        for request_id in sorted(self._with_engine[engine]):
            entry = self._ledger.get(request_id)
            assert entry is not None
            self._outbox.send(engine, Cancel(request_id))
            self._take_back(entry, now)

    # What time and turns bring

    def assign_waiting(self, now: float) -> None:
        """Give waiting requests to engines for as long as any has credit."""
        if not len(self._queue):
            return
        engines = self._serving()
        while (request_id := self._queue.first(now)) is not None:
            entry = self._ledger.get(request_id)
            assert entry is not None
            if now >= entry.due_at:
                self._expire(entry, now)
                continue
            if self._circuits:
                engines = [e for e in self._serving() if self._circuits.allows(e.identity, now)]
            chosen = self._router.choose(entry, engines, self.outstanding)
            if chosen is None:
                return
            self._queue.pop(now)
            self._assign(request_id, chosen, now)

    def expire(self, now: float) -> None:
        """End what is past its deadline, and nobody else has ended."""
        for entry in self.deadlines.passed(self._ledger.get, now):
            self._expire(entry, now)

    def do_chores(self, now: float) -> None:
        """End what has stood still for too long, and forget what is past its time."""
        for stalled in self._ledger.entries():
            if now >= stalled.progress_at + STALL_MAX_S:
                self._fail(stalled, stall_error(stalled), now)
        for entry in self._ledger.entries():
            if entry.engine is not None:
                self.accounts.settle(entry, now)
        for request_id in self.audience.unclaimed(now):
            lost = self._ledger.get(request_id)
            assert lost is not None
            if not lost.request.idempotency_key:
                self._end(lost, FinishReason.CANCELLED, now)
        self._ledger.forget_old(now)

    def restore(self, entry: Entry, now: float) -> None:
        """Enter a request as the journal knows it. Its engine may still be at it."""
        entry.progress_at = now
        entry.note(RESTORED, now)
        self._ledger.restore(entry)
        if entry.finish:
            return
        self.accounts.resume(entry, now)
        self.deadlines.watch(entry)
        self.audience.miss(entry, now)
        if entry.engine is None:
            self._enqueue(entry, now)
        else:
            self._with_engine[entry.engine].add(entry.request_id)

    def check_integrity(self) -> None:
        """Assert that queue, ledger, engines and gateways tell the same story."""
        self._queue.check_integrity()
        self._ledger.check_integrity()
        self.accounts.check_integrity(self._ledger.entries())
        for entry in self._ledger.entries():
            assert (entry.engine is None) == (entry.request_id in self._queue)
            if entry.engine is not None:
                assert entry.request_id in self._with_engine[entry.engine]
            self.audience.check_integrity(entry)
        held = [held for sets in self._with_engine.values() for held in sets]
        assert len(held) == len(set(held)) == self.num_living - self.num_queued

    def _ask(self, request: Request, now: float) -> Answer:
        if self._ledger.group(request.group_id):
            return Answer()  # a call is taken as a whole
        return self._door.ask(request, self._places, now)

    def _places(self) -> Places:
        seats = [engine.capacity.max_num_seqs for engine in self._serving() if engine.capacity]
        return Places(sum(seats), self.num_living - self.num_queued)

    def _reject(self, request: Request, gateway: str, error: RequestError) -> None:
        self.totals.rejected += 1
        answer = Rejected(request.request_id, error.code or "", error.message, error.retry_after_s)
        self._outbox.send(gateway, answer)

    def _assign(self, request_id: int, engine: Member, now: float) -> None:
        entry = self._ledger.assign(request_id, engine.identity, engine.epoch, now)
        if entry.output and entry.numerics not in {None, engine.numerics}:
            self.totals.resumed_inexact += 1
        entry.numerics = engine.numerics
        self._with_engine[engine.identity].add(request_id)
        self.accounts.assigned(entry, engine, self.outstanding(engine.identity), now)
        self._circuits.assigned(engine.identity, request_id, now)
        engine.unclaimed.discard(request_id)
        self._records.append(
            records.Assign(request_id, entry.attempt, engine.identity, engine.epoch)
        )
        is_suspect = self.quarantine.is_suspect(request_id)
        deadline_s = None if entry.request.deadline_s is None else entry.deadline_at - now
        output = tuple(entry.output)
        assign = Assign(entry.request, entry.attempt, output, is_suspect, deadline_s)
        self._outbox.send(engine.identity, assign)

    def _enqueue(self, entry: Entry, now: float) -> None:
        self._queue.push(
            entry.request_id,
            num_tokens=entry.num_tokens,
            priority=entry.request.priority,
            is_resumed=entry.attempt > 0,
            tenant=entry.request.tenant,
            num_bytes=size_of(entry.request).num_bytes,
            due_at=entry.due_at,
            now=now,
        )

    def _pass_on(self, entry: Entry, row: TokenRow, engine: Member, now: float) -> None:
        """Tell the subscribers of an accepted row, and settle the end if it is one."""
        self.totals.tokens += len(row.tokens)
        self.audience.tell(entry, row, engine.name)
        if row.finish == FinishReason.ERROR:
            self._circuits.failed(engine.identity, row.request_id, now)
        elif self._circuits:
            self._circuits.succeeded(engine.identity, row.request_id)
        if row.finish:
            self._router.ended(entry, engine)
            self.accounts.settle(entry, now)
            self._leave(entry)
            self._ledger.end(entry, FinishReason(row.finish), now)
            self.accounts.end(entry, now)
            self._admission.finish_rate.record(now)
            self.totals.finished += 1

    def _take_back(self, entry: Entry, now: float) -> None:
        """Take a request from its engine and queue it, to go on where its output ends."""
        assert entry.engine is not None
        self.accounts.settle(entry, now)
        self._with_engine[entry.engine].discard(entry.request_id)
        self._circuits.withdrawn(entry.engine, entry.request_id)
        self._ledger.release(entry.request_id)
        self.totals.resumed += 1
        self._enqueue(entry, now)

    def _fail(self, entry: Entry, error: RequestError, now: float) -> None:
        is_late = isinstance(error, DeadlineExceeded)
        self.audience.fail(entry, error)
        self._end(entry, FinishReason.DEADLINE if is_late else FinishReason.ERROR, now, error)

    def _expire(self, entry: Entry, now: float) -> None:
        """End a request whose time is over, with what it has."""
        if not entry.output:
            error = DeadlineExceeded("the deadline passed before there was a token")
            self._fail(entry, error, now)
            return
        self.audience.tell(entry, entry.end_row(FinishReason.DEADLINE), "")
        self._end(entry, FinishReason.DEADLINE, now)

    def _end(
        self,
        entry: Entry,
        finish: FinishReason,
        now: float,
        error: RequestError | None = None,
    ) -> None:
        """End a request for another reason than its last token."""
        code, message = ("", "") if error is None else (error.code or "", error.message)
        if entry.engine is not None:
            self._outbox.send(entry.engine, Cancel(entry.request_id))
        self.accounts.settle(entry, now)
        self._leave(entry)
        self._ledger.end(entry, finish, now, code=code, message=message)
        self.accounts.end(entry, now)
        self._records.append(records.End(entry.request_id, finish, code, message))
        self.totals.finished += 1

    def _leave(self, entry: Entry) -> None:
        """Take a request that ends from wherever it is."""
        request_id = entry.request_id
        self._queue.remove(request_id)
        if entry.engine is not None:
            self._with_engine[entry.engine].discard(request_id)
            self._circuits.withdrawn(entry.engine, request_id)
        self.audience.dismiss(entry)
        self.quarantine.forget(request_id)
