"""The supervisor: admits, queues, routes, watches, and carries on what an engine left behind.

One for each cell. Every token passes it once, in one message for each engine step, and counts only
if the ledger says so. The decisions are in ``runtime.control``; here they meet the messages, the
journal and the processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Protocol

from understudy.protocol.codec import PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from understudy.protocol.errors import from_code
from understudy.protocol.messages import (
    Assign,
    Attach,
    Cancel,
    ClusterState,
    DrainMode,
    DrainReply,
    DrainRequest,
    Dying,
    EndGroup,
    Fenced,
    Heartbeat,
    Hello,
    Inventory,
    Lookup,
    Message,
    ProcessExited,
    Pulse,
    Reclaim,
    Refused,
    ReleaseReply,
    ReleaseRequest,
    ResetPrefixCache,
    Role,
    StatusReply,
    StatusRequest,
    StepOutput,
    Submit,
    TimelineRequest,
    UsageReply,
    UsageRequest,
    Welcome,
)
from understudy.protocol.request import Request, TokenRow
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.canary import CANARY_WITHIN_S, Canary, canary_request
from understudy.runtime.control.company import Company
from understudy.runtime.control.dispatcher import Dispatcher
from understudy.runtime.control.health import ProcessProbe, Verdict
from understudy.runtime.control.ledger import Entry
from understudy.runtime.control.member_status import engine_status, gateway_status
from understudy.runtime.control.registry import Member, MemberState
from understudy.runtime.control.tenancy import UNLIMITED, PolicyOf
from understudy.runtime.kit.actor import Outbox
from understudy.runtime.storage.image import HeldRequest
from understudy.runtime.storage.journal import Degraded, Journal
from understudy.runtime.storage.records import Record, Usage
from understudy.runtime.storage.recovery import Recovery

PULSE_EVERY_S: Final = 0.25
HELD_UP_S: Final = 2 * PULSE_EVERY_S
"""A supervisor whose turns are further apart was held up itself, and judges nobody."""
RECOVERY_GRACE_S: Final = 2.0
"""For so long a new supervisor waits for the engines that its journal names."""


class RecordStore(Protocol):
    """Where decisions are written down before they become known: the journal."""

    def append(self, added: Sequence[Record]) -> None:
        """Add records to the turn."""
        ...

    def commit(self, now: float) -> object:
        """Write the turn, in one append."""
        ...

    @property
    def wake_at(self) -> float | None:
        """When to commit even if nothing was appended."""
        ...

    @property
    def degraded(self) -> Degraded | None:
        """Why and since when not everything is on the disk; ``None`` if it is."""
        ...


class Stage(Protocol):
    """What a supervisor may ask about, and do to, the processes of its machine."""

    def fatal_step(self, name: str, identity: str) -> frozenset[int]:
        """The requests of the step in which an engine ended, if it ended in one."""
        ...

    def kill(self, pid: int, start_time: int) -> None:
        """End a process at once, if it is still the one that was started then."""
        ...

    def keep_convict(self, request: Request) -> None:
        """Keep what a quarantined request asked, for the operator."""
        ...


class Supervisor:
    """The supervisor actor."""

    def __init__(
        self,
        *,
        model: str,
        first_epoch: int,
        journal: RecordStore,
        probe: ProcessProbe,
        stage: Stage,
        limits: AdmissionLimits | None = None,
        started_at: float = 0.0,
        policy_of: PolicyOf = lambda _: UNLIMITED,
        today: Callable[[], int] = lambda: 0,
    ) -> None:
        self.outbox = Outbox()
        self._model = model
        self._started_at = started_at
        self._journal = journal
        self._stage = stage
        self._company = Company(first_epoch, probe)
        self._dispatcher = Dispatcher(
            self.outbox,
            limits or AdmissionLimits(),
            lambda: self._company.registry.serving(Role.ENGINE),
            policy_of=policy_of,
            today=today,
        )
        self._canaries: dict[int, Canary] = {}
        self._canary_ids = itertools.count(1)
        self._has_news = False
        self._is_recovering = False
        self._chores_at = self._wake_at = self._decided_at = started_at

    @property
    def wake_at(self) -> float | None:
        """The next round of chores, or the next moment at which an engine may be found dead."""
        return self._wake_at

    @property
    def dispatcher(self) -> Dispatcher:
        """The life of the requests; for tests and for reports."""
        return self._dispatcher

    def restore(self, entries: Iterable[Entry], now: float, usage: Iterable[Usage] = ()) -> None:
        """Take over what an earlier supervisor wrote down."""
        self._dispatcher.accounts.restore(usage)
        for entry in entries:
            self._dispatcher.restore(entry, now)
        self._is_recovering = True

    def handle(self, message: Message, sender: str, now: float) -> None:
        """Take in a message from anyone."""
        member = self._company.registry.get(sender)
        if member is not None and member.is_alive:
            member.heard_at = now
        match message:
            case Hello():
                self._greet(message, sender, now)
            case ProcessExited():
                self._exited(message, now)
            case StatusRequest():
                self.outbox.send(sender, self._status(now))
            case ReleaseRequest(fingerprint):
                is_known = self._dispatcher.quarantine.release(fingerprint)
                self.outbox.send(sender, ReleaseReply(fingerprint, is_known))
            case DrainRequest(engine, mode):
                self.outbox.send(sender, self._drain(engine, mode, now))
            case _ if member is None or not member.is_alive:
                pass  # a stranger, or one that was given up: its session is over
            case _ if member.role is Role.ENGINE:
                self._handle_engine(message, member, now)
            case _:
                self._handle_gateway(message, member, now)

    def lose(self, peer: str, now: float) -> None:
        """A member has not listened for too long: it counts as gone."""
        member = self._company.registry.get(peer)
        if member is not None and member.is_alive:
            self._bury(member, now)

    def decide(self, now: float) -> None:
        """Judge, pass on, give out; write down what was decided before any of it leaves."""
        if now < self._decided_at + HELD_UP_S:
            for member, verdict in self._company.judge(now):
                self._settle(member, verdict, now)
        # else it was we who were held up, and what the others said meanwhile is still to be read.
        self._decided_at = now
        if now >= self._chores_at:
            self._do_chores(now)
        self._dispatcher.expire(now)
        self._dispatcher.audience.deliver()
        self._dispatcher.assign_waiting(now)
        self._announce()
        for convict in self._dispatcher.take_convicts():
            self._stage.keep_convict(convict)
        self._journal.append(self._dispatcher.take_records())
        self._journal.commit(now)
        times = (
            self._chores_at,
            self._company.next_judgement(now),
            self._journal.wake_at,
            self._dispatcher.deadlines.next_at,
        )
        self._wake_at = min(time for time in times if time is not None)

    def check_integrity(self) -> None:
        """Assert that everybody tells the same story."""
        self._dispatcher.check_integrity()

    def _handle_engine(self, message: Message, engine: Member, now: float) -> None:
        match message:
            case StepOutput(_, rows):
                self._dispatcher.take_rows(self._without_canaries(rows, engine, now), engine, now)
            case Heartbeat():
                self._company.take_beat(engine, message)
            case Inventory(rows, is_last):
                held = tuple(row for row in rows if row.request_id not in self._canaries)
                self._dispatcher.take_inventory(held, engine, now)
                if is_last:
                    self._dispatcher.end_inventory(engine)
            case Refused(request_id, attempt, code, text):
                error = from_code(code, text)
                self._dispatcher.refused(request_id, attempt, engine.identity, error, now)
            case Dying():
                self._bury(engine, now)
            case _:
                pass

    def _handle_gateway(self, message: Message, gateway: Member, now: float) -> None:
        identity = gateway.identity
        match message:
            case Submit(request):
                self._dispatcher.admit(request, identity, now)
            case ResetPrefixCache():
                for engine in self._company.registry.alive(Role.ENGINE):
                    self.outbox.send(engine.identity, ResetPrefixCache())
                    self._dispatcher.forget_prefixes(engine.identity)
            case Cancel(request_id):
                self._dispatcher.cancel(request_id, identity, now)
            case Attach(request_id, position):
                self._dispatcher.attach(request_id, position, identity)
            case Reclaim(held):
                self._dispatcher.reclaim(held, identity, now)
            case Lookup(group_id, tenant):
                self._dispatcher.enquiries.look_up(group_id, tenant, identity)
            case TimelineRequest():
                self._dispatcher.enquiries.timelines(message, identity)
            case EndGroup(group_id, tenant, is_forgotten):
                self._dispatcher.end_group(group_id, tenant, now, is_forgotten=is_forgotten)
            case UsageRequest(tenant):
                used = self._dispatcher.accounts.usage(tenant)
                self.outbox.send(identity, UsageReply(tenant, used))
            case Dying():
                self._bury(gateway, now)
            case _:
                pass

    def _greet(self, hello: Hello, identity: str, now: float) -> None:
        if hello.protocol < PROTOCOL_VERSION_OLDEST:
            return  # it would understand nothing that is said in a session
        greeting = self._company.greet(hello, identity, now)
        if greeting is None:
            return
        member = greeting.member
        if greeting.replaced is not None:
            self._bury(greeting.replaced, now)
        for absent in self._dispatcher.engines_expected():
            # A new incarnation is proof that the one before it is gone.
            if absent != identity and absent.rpartition(".")[0] == hello.name:
                self._dispatcher.engine_fell(absent, frozenset(), now)
        protocol = min(hello.protocol, PROTOCOL_VERSION)
        self.outbox.send(identity, Welcome(member.epoch, protocol))
        if greeting.is_new_session:
            self.outbox.open_session(identity, member.epoch, protocol)
            self._dispatcher.begin_inventory(member)
            self._has_news = True
            if member.state is MemberState.TESTING:
                self._send_canary(member, now)

    def _send_canary(self, engine: Member, now: float) -> None:
        for lost in self._call_off_canaries(engine):  # with the session in which it was sent
            self.outbox.send(engine.identity, Cancel(lost))
        pools_only = engine.capacity is not None and engine.capacity.pools_only
        request = canary_request(next(self._canary_ids), pools_only=pools_only)
        self._canaries[request.request_id] = Canary(engine, now + CANARY_WITHIN_S)
        self.outbox.send(engine.identity, Assign(request, 1))

    def _call_off_canaries(self, engine: Member) -> list[int]:
        """Wait for no answer of this engine any more; gives what it was asked."""
        lost = [number for number, canary in self._canaries.items() if canary.engine is engine]
        for number in lost:
            del self._canaries[number]
        return lost

    def _without_canaries(
        self, rows: tuple[TokenRow, ...], engine: Member, now: float
    ) -> tuple[TokenRow, ...]:
        """The rows of requests; those of canaries are taken in here."""
        if not self._canaries:
            return rows
        others = tuple(row for row in rows if row.request_id not in self._canaries)
        for row in rows:
            canary = self._canaries.get(row.request_id)
            if canary is None or canary.engine is not engine:
                continue
            canary.take(row)
            if row.finish:
                del self._canaries[row.request_id]
                self._has_news = True
                if not self._company.take_canary(engine, tuple(canary.answer)):
                    self._settle(engine, Verdict.STUCK, now)
        return others

    def _exited(self, exited: ProcessExited, now: float) -> None:
        registry = self._company.registry
        member = registry.named(exited.name)
        if member is not None and member.pid == exited.pid:
            member.restarts = exited.restarts
            member.silent_since = None
            if member.is_alive:
                self._bury(member, now)
        if exited.is_broken and (member is None or not member.is_alive):
            self._has_news = True
            registry.break_down(exited.name, exited.pid, now).restarts = exited.restarts

    def _drain(self, engine: str, mode: DrainMode, now: float) -> DrainReply:
        """Let an engine rest: it gets nothing new, and keeps or hands over what it has."""
        member = self._company.registry.named(engine)
        if member is None or member.role is not Role.ENGINE or not member.is_alive:
            return DrainReply(engine, is_known=False, outstanding=0)
        if member.state is not MemberState.DRAINING:
            member.state = MemberState.DRAINING
            self._has_news = True
        if mode is DrainMode.MIGRATE:
            self._dispatcher.move_away(member.identity, now)
        outstanding = self._dispatcher.outstanding(member.identity)
        return DrainReply(engine, is_known=True, outstanding=outstanding)

    def _settle(self, member: Member, verdict: Verdict, now: float) -> None:
        """Do to a member's process what the verdict asks, and let others take its part."""
        if verdict is Verdict.STUCK:
            self._stage.kill(member.pid, member.start_time)
        self._bury(member, now)

    def _bury(self, member: Member, now: float) -> None:
        """A member is gone: fence it, and settle what it was doing."""
        self._company.registry.bury(member)
        self._has_news = True
        self.outbox.send(member.identity, Fenced(member.epoch))
        self.outbox.close_session(member.identity)
        if member.role is Role.ENGINE:
            suspects = self._stage.fatal_step(member.name, member.identity)
            self._dispatcher.engine_fell(member.identity, suspects, now)
            self._call_off_canaries(member)
        else:
            self._dispatcher.gateway_left(member.identity, now)

    def _do_chores(self, now: float) -> None:
        """What time alone brings about."""
        for member in self._company.overdue_silent(now):
            self._stage.kill(member.pid, member.start_time)
        for canary in list(self._canaries.values()):
            if now >= canary.due_at:
                self._settle(canary.engine, Verdict.STUCK, now)
        if self._is_recovering and now >= self._started_at + RECOVERY_GRACE_S:
            self._is_recovering = False
            self._has_news = True
            for identity in self._dispatcher.engines_expected():
                if self._company.registry.get(identity) is None:
                    self._dispatcher.engine_fell(identity, frozenset(), now)
        self._dispatcher.do_chores(now)
        for role in (Role.ENGINE, Role.GATEWAY):
            for member in self._company.registry.alive(role):
                self.outbox.send(member.identity, Pulse())
        self._chores_at = now + PULSE_EVERY_S

    def _announce(self) -> None:
        """Tell the gateways who serves, when that may have changed.

        A new supervisor waits until an engine has come back to it: until then it knows less than
        they do.
        """
        if self._has_news and not (self._is_recovering and not self._serving_soon()):
            self._has_news = False
            for member in self._company.registry.alive(Role.GATEWAY):
                self.outbox.send(member.identity, self._cluster_state())

    def _cluster_state(self) -> ClusterState:
        registry = self._company.registry
        lengths = [
            member.capacity.max_model_len
            for member in self._serving_soon()
            if member.capacity is not None
        ]
        return ClusterState(
            engines_serving=len(lengths),
            engines_known=len(registry.members(Role.ENGINE)),
            max_model_len=min(lengths, default=0),
            numerics=tuple(sorted({engine.numerics for engine in self._serving_soon()})),
        )

    def _serving_soon(self) -> list[Member]:
        """The engines that take work, and those that will when they have answered the canary."""
        able = {MemberState.SERVING, MemberState.TESTING}
        engines = self._company.registry.members(Role.ENGINE)
        return [engine for engine in engines if engine.state in able]

    def _status(self, now: float) -> StatusReply:
        registry, totals = self._company.registry, self._dispatcher.totals
        degraded, streams = self._journal.degraded, self._dispatcher.audience.streams
        return StatusReply(
            model=self._model,
            uptime_s=now - self._started_at,
            engines=tuple(
                engine_status(
                    member, now, outstanding=self._dispatcher.outstanding(member.identity)
                )
                for member in registry.members(Role.ENGINE)
            ),
            gateways=tuple(
                gateway_status(member, now, streams=len(streams(member.identity)))
                for member in registry.alive(Role.GATEWAY)
            ),
            queued=self._dispatcher.num_queued,
            running=self._dispatcher.num_living - self._dispatcher.num_queued,
            admitted=totals.admitted,
            finished=totals.finished,
            rejected=totals.rejected,
            resumed=totals.resumed,
            tokens=totals.tokens,
            resumed_inexact=totals.resumed_inexact,
            quarantined=totals.quarantined,
            journal_fault=degraded.reason if degraded is not None else "",
            shed=totals.shed,
        )


def restored_entries(journal: Journal, recovery: Recovery) -> list[Entry]:
    """The requests of a journal, as the ledger knows them."""
    ended = [journal.held(request_id) for request_id in recovery.ended]
    affected = [journal.held(_request_id(held)) for held in recovery.affected]
    return [_entry(held) for held in (*recovery.live, *ended, *affected) if held is not None]


def _request_id(held: HeldRequest) -> int:
    return held.admit.request.request_id


def _entry(held: HeldRequest) -> Entry:
    return Entry(
        held.admit.request,
        held.admit.admitted_at,
        attempt=held.attempt,
        engine=None if held.finish else held.engine,
        epoch=held.epoch,
        output=list(held.output),
        logprobs=held.logprobs if held.finish else list(held.logprobs),
        prefix_hash=held.prefix_hash,
        finish=held.finish or 0,
        error_code=held.code,
        error_message=held.message,
        ended_at=held.ended_at,
        num_cached_tokens=held.num_cached_tokens,
        vector=held.vector,
    )
