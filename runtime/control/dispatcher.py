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
from typing import Final

from understudy.protocol.errors import (
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
    Deliver,
    Duplicate,
    Failed,
    Found,
    HeldRequest,
    Rejected,
    TimelineRequest,
)
from understudy.protocol.request import FinishReason, Request, TokenRow, fingerprint
from understudy.protocol.timeline import RESTORED
from understudy.runtime.control.admission import Admission, AdmissionLimits
from understudy.runtime.control.ledger import Entry, Ledger, Verdict
from understudy.runtime.control.quarantine import Quarantine
from understudy.runtime.control.registry import Member
from understudy.runtime.control.request_queue import RequestQueue
from understudy.runtime.control.router import Router
from understudy.runtime.control.totals import Totals
from understudy.runtime.kit.actor import Outbox
from understudy.runtime.storage import records

STALL_MAX_S: Final = 600.0
"""A request that waits, or is with an engine, for so long without a token ends with an error."""
DELIVER_ROWS_MAX: Final = 4096
"""Rows in one message: even with all logprobs they take but a fraction of a frame."""
CATCH_UP_TOKENS_MAX: Final = 8192
"""Tokens in one message to who joins late: with all logprobs they take but a part of a frame."""
UNCLAIMED_MAX_S: Final = 60.0
"""A request whose gateway is gone ends if no client has joined its stream again by then. One with
an idempotency key goes on: its client may send it again at any time."""


class Dispatcher:
    """All requests, and where each of them is."""

    def __init__(
        self, outbox: Outbox, limits: AdmissionLimits, serving: Callable[[], list[Member]]
    ) -> None:
        """``serving`` gives the engines that take new work."""
        self.totals = Totals()
        self._outbox = outbox
        self._serving = serving
        self._ledger = Ledger()
        self._queue = RequestQueue()
        self._router = Router()
        self._admission = Admission(limits)
        self.quarantine = Quarantine()
        self._convicts: list[Request] = []
        self._with_engine: defaultdict[str, set[int]] = defaultdict(set)
        self._with_gateway: defaultdict[str, set[int]] = defaultdict(set)
        self._unclaimed_since: dict[int, float] = {}
        self._deliveries: defaultdict[tuple[str, str], list[TokenRow]] = defaultdict(list)
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

    def streams(self, gateway: str) -> int:
        """How many living requests a gateway listens to."""
        return len(self._with_gateway[gateway])

    def engines_expected(self) -> list[str]:
        """Engines that have requests, whether they are here or not."""
        return sorted(identity for identity, held in self._with_engine.items() if held)

    def take_records(self) -> list[records.Record]:
        """What must be journaled before anything that was decided becomes known."""
        taken, self._records = self._records, []
        return taken

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
        error = self._refusal(request, now)
        if error is not None:
            # What came before it in this turn may have an engine, and not really wait.
            self.assign_waiting(now)
            error = self._refusal(request, now)
        if error is not None:
            self._reject(request, gateway, error)
            return
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
        self._subscribe(entry, gateway)
        self._enqueue(entry)
        self._outbox.send(gateway, Accepted(request.request_id))

    def cancel(self, request_id: int, gateway: str, now: float) -> None:
        """A gateway does not want a request any more; it ends when none is left that does."""
        entry = self._ledger.get(request_id)
        if entry is None or gateway not in entry.subscribers:
            return
        self._unsubscribe(entry, gateway)
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
            self._subscribe(entry, gateway)
        if position < len(entry.output) or entry.finish:
            self._catch_up(entry, position, gateway)

    def reclaim(self, held: Iterable[HeldRequest], gateway: str, now: float) -> None:
        """A gateway is back: it holds these, and has given up whatever else it had."""
        positions = dict(held)
        for request_id in sorted(self._with_gateway[gateway] - positions.keys()):
            self.cancel(request_id, gateway, now)
        for request_id, position in positions.items():
            self.attach(request_id, position, gateway)

    def look_up(self, group_id: int, tenant: str, gateway: str) -> None:
        """Tell a gateway the requests of a group, if they are this tenant's."""
        entries = self._ledger.group(group_id, tenant)
        requests = tuple(entry.request for entry in entries)
        lengths = tuple(len(entry.output) for entry in entries)
        ends = tuple(entry.finish for entry in entries)
        self._outbox.send(gateway, Found(group_id, tenant, requests, lengths, ends))

    def end_group(self, group_id: int, tenant: str, now: float, *, is_forgotten: bool) -> None:
        """End a call for all who listen, at its client's wish; perhaps forget it altogether."""
        for entry in self._ledger.group(group_id, tenant):
            if not entry.finish:
                gateways = list(entry.subscribers)
                self._end(entry, FinishReason.CANCELLED, now)
                for gateway in gateways:
                    self._catch_up(entry, len(entry.output), gateway)
            if is_forgotten:
                self._ledger.forget(entry)
                self._records.append(records.Forget(entry.request_id))

    def timelines(self, asked: TimelineRequest, gateway: str) -> None:
        """Tell a gateway what became of a tenant's requests."""
        found = self._ledger.timelines(asked.tenant, asked.group_id, asked.requests_max)
        self._outbox.send(gateway, asked.answer(tuple(found)))

    def gateway_left(self, gateway: str, now: float) -> None:
        """A gateway is gone. Its requests go on for a while: clients may come back by another."""
        for request_id in sorted(self._with_gateway.pop(gateway, ())):
            entry = self._ledger.get(request_id)
            assert entry is not None
            entry.subscribers.remove(gateway)
            if not entry.subscribers:
                self._unclaimed_since[request_id] = now
        self._with_gateway.pop(gateway, None)

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
                    self._take_back(entry)
        self._records += [
            records.CacheHit(row.request_id, row.num_cached_tokens)
            for row in accepted
            if row.num_cached_tokens
        ]
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
            if rest.num_cached_tokens:
                self._records.append(records.CacheHit(row.request_id, rest.num_cached_tokens))
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
            self._take_back(entry)
        engine.unclaimed.clear()

    def refused(self, request_id: int, attempt: int, engine: str, error: RequestError) -> None:
        """An engine cannot serve a request."""
        entry = self._ledger.get(request_id)
        if entry is not None and (entry.engine, entry.attempt) == (engine, attempt):
            self._fail(entry, error, entry.progress_at)

    def engine_fell(self, engine: str, suspects: frozenset[int], now: float) -> None:
        """An engine is gone; ``suspects`` were in the step in which it ended."""
        for request_id in sorted(self._with_engine.pop(engine, ())):
            entry = self._ledger.get(request_id)
            assert entry is not None
            if request_id in suspects and self.quarantine.record_death(
                request_id, was_alone=len(suspects) == 1
            ):
                self.totals.quarantined += 1
                self.quarantine.convict(fingerprint(entry.request), now)
                self._convicts.append(entry.request)
                text = "engines died of this request; it is quarantined"
                self._fail(entry, Quarantined(text), now)
            else:
                self._take_back(entry)
        self._with_engine.pop(engine, None)
        self._router.forget(engine)

    def forget_prefixes(self, engine: str) -> None:
        """An engine has no computed prefixes any more."""
        self._router.forget(engine)

    def move_away(self, engine: str) -> None:
        """Take all requests from an engine that is to rest; they go on elsewhere."""
        for request_id in sorted(self._with_engine[engine]):
            entry = self._ledger.get(request_id)
            assert entry is not None
            self._outbox.send(engine, Cancel(request_id))
            self._take_back(entry)

    # What time and turns bring

    def assign_waiting(self, now: float) -> None:
        """Give waiting requests to engines for as long as any has credit."""
        if not len(self._queue):
            return
        engines = self._serving()
        while (request_id := self._queue.first()) is not None:
            entry = self._ledger.get(request_id)
            assert entry is not None
            chosen = self._router.choose(entry, engines, self.outstanding)
            if chosen is None:
                return
            self._queue.pop()
            self._assign(request_id, chosen, now)

    def deliver(self) -> None:
        """Tell the gateways what has come in since the last call: a message for each step."""
        for (gateway, engine), rows in self._deliveries.items():
            for first in range(0, len(rows), DELIVER_ROWS_MAX):
                some = tuple(rows[first : first + DELIVER_ROWS_MAX])
                self._outbox.send(gateway, Deliver(some, engine))
        self._deliveries.clear()

    def do_chores(self, now: float) -> None:
        """End what has stood still for too long, and forget what is past its time."""
        for stalled in self._ledger.entries():
            if now >= stalled.progress_at + STALL_MAX_S:
                self._fail(stalled, stalled.stalled(STALL_MAX_S), now)
        for request_id, since in list(self._unclaimed_since.items()):
            entry = self._ledger.get(request_id)
            assert entry is not None
            if now >= since + UNCLAIMED_MAX_S and not entry.request.idempotency_key:
                self._end(entry, FinishReason.CANCELLED, now)
        self._ledger.forget_old(now)

    def restore(self, entry: Entry, now: float) -> None:
        """Enter a request as the journal knows it. Its engine may still be at it."""
        entry.progress_at = now
        entry.note(RESTORED, now)
        self._ledger.restore(entry)
        if entry.finish:
            return
        self._unclaimed_since[entry.request_id] = now
        if entry.engine is None:
            self._enqueue(entry)
        else:
            self._with_engine[entry.engine].add(entry.request_id)

    def check_integrity(self) -> None:
        """Assert that queue, ledger, engines and gateways tell the same story."""
        self._queue.check_integrity()
        self._ledger.check_integrity()
        for entry in self._ledger.entries():
            assert (entry.engine is None) == (entry.request_id in self._queue)
            if entry.engine is not None:
                assert entry.request_id in self._with_engine[entry.engine]
            for gateway in entry.subscribers:
                assert entry.request_id in self._with_gateway[gateway]
            assert (not entry.subscribers) == (entry.request_id in self._unclaimed_since)
        held = [held for sets in self._with_engine.values() for held in sets]
        assert len(held) == len(set(held)) == self.num_living - self.num_queued

    def _refusal(self, request: Request, now: float) -> RequestError | None:
        if self._ledger.group(request.group_id):
            return None  # a call is taken as a whole
        if self.quarantine.is_convicted(fingerprint(request), now):
            return Quarantined("engines died of this very request not long ago")
        refusal = self._admission.refusal(
            num_tokens=len(request.prompt),
            requests_waiting=len(self._queue),
            tokens_waiting=self._queue.num_tokens,
            now=now,
        )
        if refusal is None:
            return None
        return Overloaded(refusal.message, retry_after_s=refusal.retry_after_s)

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
        engine.unclaimed.discard(request_id)
        self._records.append(
            records.Assign(request_id, entry.attempt, engine.identity, engine.epoch)
        )
        is_suspect = self.quarantine.is_suspect(request_id)
        assign = Assign(entry.request, entry.attempt, tuple(entry.output), is_suspect)
        self._outbox.send(engine.identity, assign)

    def _enqueue(self, entry: Entry) -> None:
        self._queue.push(
            entry.request_id,
            num_tokens=entry.num_tokens,
            priority=entry.request.priority,
            is_resumed=entry.attempt > 0,
        )

    def _pass_on(self, entry: Entry, row: TokenRow, engine: Member, now: float) -> None:
        """Tell the subscribers of an accepted row, and settle the end if it is one."""
        self.totals.tokens += len(row.tokens)
        for gateway in entry.subscribers:
            self._deliveries[gateway, engine.name].append(row)
        if row.finish:
            self._router.ended(entry, engine)
            self._leave(entry)
            self._ledger.end(entry, FinishReason(row.finish), now)
            self._admission.finish_rate.record(now)
            self.totals.finished += 1

    def _catch_up(self, entry: Entry, position: int, gateway: str) -> None:
        """Tell one gateway all that it lacks."""
        if entry.error_code:
            failed = Failed(entry.request_id, entry.error_code, entry.error_message)
            self._outbox.send(gateway, failed)
            return
        # What this turn has accepted is in the entry already and must not come again behind it.
        self.deliver()
        for row in entry.rows_from(position, CATCH_UP_TOKENS_MAX):
            self._outbox.send(gateway, Deliver((row,)))

    def _take_back(self, entry: Entry) -> None:
        """Take a request from its engine and queue it, to go on where its output ends."""
        assert entry.engine is not None
        self._with_engine[entry.engine].discard(entry.request_id)
        self._ledger.release(entry.request_id)
        self.totals.resumed += 1
        self._enqueue(entry)

    def _fail(self, entry: Entry, error: RequestError, now: float) -> None:
        failed = Failed(entry.request_id, error.code or "", error.message)
        self.deliver()  # its last tokens may have come in this turn
        for gateway in entry.subscribers:
            self._outbox.send(gateway, failed)
        self._end(entry, FinishReason.ERROR, now, error)

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
        self._leave(entry)
        self._ledger.end(entry, finish, now, code=code, message=message)
        self._records.append(records.End(entry.request_id, finish, code, message))
        self.totals.finished += 1

    def _leave(self, entry: Entry) -> None:
        """Take a request that ends from wherever it is."""
        request_id = entry.request_id
        self._queue.remove(request_id)
        if entry.engine is not None:
            self._with_engine[entry.engine].discard(request_id)
        for gateway in entry.subscribers:
            self._with_gateway[gateway].discard(request_id)
        entry.subscribers.clear()
        self._unclaimed_since.pop(request_id, None)
        self.quarantine.forget(request_id)

    def _subscribe(self, entry: Entry, gateway: str) -> None:
        if gateway not in entry.subscribers:
            entry.subscribers.append(gateway)
            self._with_gateway[gateway].add(entry.request_id)
        self._unclaimed_since.pop(entry.request_id, None)

    def _unsubscribe(self, entry: Entry, gateway: str) -> None:
        entry.subscribers.remove(gateway)
        self._with_gateway[gateway].discard(entry.request_id)
