"""A whole cluster under virtual time: supervisor, echo engines, gateways, and scripted clients.

The actors are those of production. A client is a sink that insists on what is promised to it:
every position once and in order, one end, and nothing after it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Final

from tests.simulation.client import Client
from tests.simulation.invariants import (
    HIDDEN_SIZE,
    VOCAB_SIZE,
    CheckedRunner,
    Golden,
    Watch,
    WatchedJournal,
    golden,
)
from tests.simulation.stage import DelayedRunner, VirtualCard, VirtualStage
from understudy.actors.engine import Engine, engine_hello
from understudy.actors.gateway import Gateway
from understudy.actors.supervisor import Supervisor, restored_entries
from understudy.protocol.messages import (
    Message,
    ProcessExited,
    StatusReply,
    StatusRequest,
)
from understudy.protocol.request import Request
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.health import KILL_SILENT_AFTER_S, STEP_BUDGET_MAX_S
from understudy.runtime.control.ledger import Entry
from understudy.runtime.control.tenancy import UNLIMITED, PolicyOf
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.actor import SUPERVISOR, Effect, Outbox, Send
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.virtual import NetworkFaults, VirtualLoop, VirtualNetwork
from understudy.runtime.scheduling.scheduler import SchedulerConfig
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.virtual_disk import Killed, VirtualDisk

LAUNCHER: Final = "launcher"
NUM_BLOCKS: Final = 40
SCHEDULER: Final = SchedulerConfig(
    max_num_seqs=8, max_num_batched_tokens=64, max_model_len=128, block_size=8
)
STEP_S: Final = 0.01
RETRY_AFTER_S: Final = 0.25
LEFTOVERS_END_S: Final = 90.0
VERDICTS_END_S: Final = KILL_SILENT_AFTER_S + 5.0
"""After the last fault: by then whoever had to be killed for it is dead."""


CHECK_EVERY_TURNS: Final = 10


JOURNAL: Final = JournalOptions(segment_bytes=16 * 1024, compact_above_bytes=64 * 1024)
"""Small enough that a history of seconds fills segments and compacts them."""


class CheckedSupervisor(Supervisor):
    """The supervisor, watched, which looks every few turns whether it agrees with itself.

    ``on_killed`` is called if it dies in the middle of writing its journal.
    """

    turns = 0
    on_killed: Callable[[], None]
    watch: Watch
    leaving: tuple[Effect, ...] = ()
    """What was put out while the turn's messages were taken in: it leaves with the turn."""

    def handle(self, message: Message, sender: str, now: float) -> None:
        """Take in a message, and note what comes of it."""
        before = len(self.outbox._effects)
        super().handle(message, sender, now)
        self.leaving += tuple(self.outbox._effects[before:])

    def decide(self, now: float) -> None:
        """Decide, and check."""
        before = len(self.outbox._effects)
        try:
            super().decide(now)
        except Killed:
            self.outbox.take()  # nothing leaves a process that is dead
            self.on_killed()
            return
        self.watch.leave((*self.leaving, *self.outbox._effects[before:]))
        self.leaving = ()
        self.turns += 1
        if self.turns % CHECK_EVERY_TURNS == 0:
            self.check_integrity()


class CheckedEngine(Engine):
    """The engine, which looks every few turns whether its blocks are all accounted for."""

    turns = 0

    def decide(self, now: float) -> None:
        """Run a step, and check."""
        super().decide(now)
        self.turns += 1
        if self.turns % CHECK_EVERY_TURNS == 0:
            self.check_integrity()


class Launcher:
    """Stands in for the launcher: tells the supervisor which process has ended."""

    def __init__(self) -> None:
        self.outbox = Outbox()
        self.wake_at: float | None = None

    def handle(self, message: Message, sender: str, now: float) -> None:
        """Nobody speaks to it."""

    def lose(self, peer: str, now: float) -> None:
        """It has no session."""

    def decide(self, now: float) -> None:
        """It decides nothing."""


class Cluster:
    """Builds it, breaks it, and looks at what came of it."""

    def __init__(
        self,
        seed: int,
        *,
        engines: int = 3,
        gateways: int = 1,
        faults: NetworkFaults | None = None,
        limits: AdmissionLimits | None = None,
        step_s: float = STEP_S,
        policy_of: PolicyOf = lambda _: UNLIMITED,
    ) -> None:
        self.network = VirtualNetwork(seed, faults)
        self.loop = VirtualLoop(self.network)
        self.clients: list[Client] = []
        self.engine_names = [f"engine-{number}" for number in range(engines)]
        self.gateway_names = [f"gateway-{number}" for number in range(gateways)]
        self.stage = VirtualStage()
        self.stage.on_kill = self._kill
        self.disk = VirtualDisk(seed)
        self.watch = Watch()
        self._calm_at = 0.0

        def make_supervisor(incarnation: int, clock: VirtualClock) -> Supervisor:
            journal, recovery = Journal.open(self.disk, JOURNAL, clock.now())
            assert not recovery.damage
            supervisor = CheckedSupervisor(
                model="echo",
                first_epoch=incarnation << 32,
                journal=WatchedJournal(journal, self.watch),
                probe=self.stage,
                stage=self.stage,
                limits=limits,
                started_at=clock.now(),
                policy_of=policy_of,
            )
            supervisor.on_killed = self._die_in_a_write
            supervisor.watch = self.watch
            entries = restored_entries(journal, recovery)
            self.watch.begin(entries)
            if self.watch.is_disk_sound:
                self._check_remembered(entries)
            supervisor.restore(entries, clock.now(), recovery.usage)
            return supervisor

        self.loop.add(SUPERVISOR, make_supervisor)
        self.loop.add(LAUNCHER, lambda _incarnation, _clock: Launcher())
        for name in self.engine_names:
            self.loop.add(name, partial(make_engine, name, step_s, self.stage))
        for name in self.gateway_names:
            self.loop.add(name, partial(make_gateway, name))

    @property
    def supervisor(self) -> Supervisor:
        """The present supervisor."""
        actor = self.loop.actor(SUPERVISOR)
        assert isinstance(actor, Supervisor)
        return actor

    def engine(self, name: str) -> Engine:
        """The present incarnation of an engine."""
        actor = self.loop.actor(name)
        assert isinstance(actor, Engine)
        return actor

    def gateway(self, name: str) -> Gateway:
        """The present incarnation of a gateway."""
        actor = self.loop.actor(name)
        assert isinstance(actor, Gateway)
        return actor

    # Clients

    def submit(self, request: Request, *, at: float, gateway: str = "gateway-0") -> Client:
        """Let a client come; it comes back until its gateway is connected."""
        client = Client(request)
        client.gateway = gateway
        self.clients.append(client)
        self.watch.requests[request.request_id] = request
        self.loop.at(at, lambda: self._try(client))
        return client

    def leave(self, client: Client, *, at: float) -> None:
        """Let a client go away by itself; it must hear nothing more."""

        def go() -> None:
            if client.end is None:
                client.end = "left"
                if self.loop.is_on_stage(client.gateway):
                    self.gateway(client.gateway).cancel(client.request.request_id, client)
                    self.loop.wake(client.gateway)

        self.loop.at(at, go)

    def _try(self, client: Client) -> None:
        if client.end is not None:
            return
        name = client.gateway
        if not self.loop.is_on_stage(name) or not self.gateway(name).is_connected:
            self.loop.at(self.loop.now + RETRY_AFTER_S, lambda: self._try(client))
            return
        client.is_in = True
        self.gateway(name).submit(client.request, client, self.loop.now)
        self.loop.wake(name)

    def _join_again(self, client: Client) -> None:
        """Let a client whose connection broke go on with its stream, by any gateway."""
        client.is_in = False
        if client.end is not None:
            return
        able = [
            name
            for name in self.gateway_names
            if self.loop.is_on_stage(name) and self.gateway(name).is_connected
        ]
        if not able:
            self.loop.at(self.loop.now + RETRY_AFTER_S, lambda: self._join_again(client))
            return
        request_id = client.request.request_id
        client.gateway = able[request_id % len(able)]
        client.on_not_found = lambda: self.loop.at(self.loop.now, lambda: self._try(client))
        client.is_in = True
        self.gateway(client.gateway).attach(request_id, client, len(client.tokens))
        self.loop.wake(client.gateway)

    # Faults

    def crash_engine(self, name: str, *, at: float, back_after_s: float, is_told: bool) -> None:
        """Kill an engine and start it again; a launcher may or may not tell the supervisor."""

        def crash() -> None:
            self._crash(name)
            if is_told:
                pid = pid_of(name, self.loop.incarnation(name))
                told = ProcessExited(name, pid, -9, 0)
                self.loop.actor(LAUNCHER).outbox.send(SUPERVISOR, told)
                self.loop.wake(LAUNCHER)

        self._expect_trouble(until=at + back_after_s)
        self.loop.at(at, crash)
        self.loop.at(at + back_after_s, lambda: self._restart(name))

    def crash_busy_engine(self, name: str, *, at: float) -> None:
        """Kill an engine if it has work at that time."""

        def crash() -> None:
            now = self.loop.now
            if self.loop.is_on_stage(name):
                beat = self.engine(name).heartbeat(now)
                if beat.running + beat.waiting:
                    self.crash_engine(name, at=now, back_after_s=1.0, is_told=False)

        self.loop.at(at, crash)

    def crash_supervisor(
        self, *, at: float, back_after_s: float, in_write_after: int | None = None
    ) -> None:
        """Kill the supervisor and start it again; it remembers what it wrote down.

        With ``in_write_after`` it dies in the middle of a write, after so many bytes more; if it
        has not written so many by the time it should be back, it lives on.
        """

        def crash() -> None:
            if in_write_after is None:
                self._crash(SUPERVISOR)
            else:
                self.disk.faults.kill_after_bytes = in_write_after

        def restart() -> None:
            self.disk.faults.kill_after_bytes = None
            self._restart(SUPERVISOR)

        self._expect_trouble(until=at + back_after_s)
        self.loop.at(at, crash)
        self.loop.at(at + back_after_s, restart)

    def crash_gateway(self, name: str, *, at: float, back_after_s: float) -> None:
        """Kill a gateway, and with it the connections of its clients, who come back."""

        def crash() -> None:
            if not self.loop.is_on_stage(name):
                return
            self._crash(name)
            for client in self.clients:
                if client.is_in and client.gateway == name and client.end is None:
                    self._join_again(client)

        self._expect_trouble(until=at + back_after_s)
        self.loop.at(at, crash)
        self.loop.at(at + back_after_s, lambda: self._restart(name))

    def freeze(self, name: str, *, at: float, seconds: float) -> None:
        """Stop a process for a while, as SIGSTOP does."""
        self._expect_trouble(until=at + seconds)

        def stop() -> None:
            if self.loop.is_on_stage(name):
                self.loop.freeze(name, seconds)

        self.loop.at(at, stop)

    def delay_step(self, name: str, *, at: float, seconds: float) -> None:
        """Let an engine's next step take so much longer, while its process goes on to beat."""
        self._expect_trouble(until=at + min(seconds, STEP_BUDGET_MAX_S))
        self.loop.at(at, lambda: self.stage.delays_s.update({name: seconds}))

    def fill_disk(self, *, at: float, seconds: float) -> None:
        """Let the disk take nothing for a while."""

        def fill(*, is_full: bool) -> None:
            self.disk.faults.is_full = is_full
            self.watch.is_disk_sound = False

        self.loop.at(at, partial(fill, is_full=True))
        self.loop.at(at + seconds, partial(fill, is_full=False))

    def cut(self, source: str, target: str, *, at: float, seconds: float) -> None:
        """Let nothing pass from one actor to another for a while."""
        self._expect_trouble(until=at + seconds)
        self.loop.at(at, lambda: self.network.cut(source, target, until=at + seconds))

    def _expect_trouble(self, *, until: float) -> None:
        """A fault is planned."""
        self._calm_at = max(self._calm_at, until)

    def _crash(self, name: str) -> None:
        if self.loop.is_on_stage(name):
            self.loop.crash(name)
            if name == SUPERVISOR:
                self.disk.crash_process()

    def _die_in_a_write(self) -> None:
        """The supervisor has died in the middle of a write; it is back when it was to be."""
        self._crash(SUPERVISOR)

    def _kill(self, pid: int) -> None:
        """The supervisor has killed an engine; a launcher starts the next one."""
        assert self.loop.now < self._calm_at + VERDICTS_END_S, f"{pid} was killed for nothing"
        for name in self.engine_names:
            if pid_of(name, self.loop.incarnation(name)) == pid and self.loop.is_on_stage(name):
                # Not before the supervisor's turn is over.
                self.loop.at(self.loop.now, partial(self._crash, name))
                self.loop.at(self.loop.now + 0.5, partial(self._restart, name))

    def _check_remembered(self, entries: Iterable[Entry]) -> None:
        """Whatever a client was told is in the journal."""
        known = {entry.request_id: entry for entry in entries}
        for client in self.clients:
            if client.tokens or client.end in {"stop", "length"}:
                entry = known.get(client.request.request_id)
                assert entry is not None, f"{client.request}: {client.end}: forgotten"
                told = len(client.tokens)
                assert entry.output[:told] == client.tokens, f"{client.request}: forgotten"
                assert entry.finish or client.end not in {"stop", "length"}, f"{client.request}"

    def _restart(self, name: str) -> None:
        if not self.loop.is_on_stage(name):
            self.loop.restart(name)

    # What came of it

    def run(self, until: float) -> None:
        """Let time pass until every client has had its end, or until the time is over."""
        self.loop.run_until(until, stop_when=self._all_have_ended)

    def _all_have_ended(self) -> bool:
        return all(client.end is not None for client in self.clients)

    def _is_idle(self) -> bool:
        """Whether nothing waits or runs: what clients left behind may go on for a while."""
        return not self.supervisor.dispatcher.num_living

    def _is_whole(self) -> bool:
        """Whether every engine serves."""
        states = [engine.state for engine in self.status().engines]
        return states == ["serving"] * len(self.engine_names)

    def status(self) -> StatusReply:
        """What the supervisor would tell an operator."""
        self.supervisor.handle(StatusRequest(), "operator.1", self.loop.now)
        (send,) = self.supervisor.outbox.take()
        assert isinstance(send, Send)
        assert isinstance(send.message, StatusReply)
        return send.message

    def check_all_ended(self) -> None:
        """Assert that everybody has had an end, and that nothing is left of anything anywhere."""
        open_clients = [client.request.request_id for client in self.clients if client.end is None]
        assert not open_clients, f"at {self.loop.now:.3f} s without an end: {open_clients}"
        # The last cancellations may still be on their way, or a member have to be missed first.
        self.loop.run_until(max(self.loop.now, self._calm_at) + 6.0)
        self.loop.run_until(self.loop.now + LEFTOVERS_END_S, stop_when=self._is_idle)
        self.loop.run_until(self.loop.now + LEFTOVERS_END_S, stop_when=self._is_whole)
        self.supervisor.check_integrity()
        status = self.status()
        assert (status.queued, status.running) == (0, 0)
        assert self._is_whole(), [engine.state for engine in status.engines]
        for name in self.engine_names:
            engine = self.engine(name)
            engine.check_integrity()
            beat = engine.heartbeat(self.loop.now)
            assert (beat.running, beat.waiting, beat.blocks_free) == (0, 0, NUM_BLOCKS)
        for name in self.gateway_names:
            assert self.gateway(name).num_open == 0


def pid_of(name: str, incarnation: int) -> int:
    """A process id for each incarnation of each actor."""
    number = int(name.rpartition("-")[2])
    return 1000 * (1 + name.startswith("gateway")) + 100 * number + incarnation


def make_gateway(name: str, incarnation: int, _clock: VirtualClock) -> Gateway:
    """A gateway without HTTP: its clients stand right beside it."""
    return Gateway(name, pid=pid_of(name, incarnation), model="echo")


def make_engine(
    name: str, step_s: float, stage: VirtualStage, incarnation: int, clock: VirtualClock
) -> Engine:
    """An engine that echoes, small enough that it has to preempt."""
    card = stage.cards[f"{name}.{incarnation}"] = VirtualCard()
    hello = engine_hello(
        name,
        pid=pid_of(name, incarnation),
        start_time=incarnation,
        model="echo",
        numerics="echo",
        scheduler_config=SCHEDULER,
        num_blocks=NUM_BLOCKS,
    )
    return CheckedEngine(
        hello,
        scheduler_config=SCHEDULER,
        num_blocks=NUM_BLOCKS,
        runner=CheckedRunner(
            DelayedRunner(
                EchoRunner(clock, vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, step_s=step_s),
                name,
                stage,
                clock,
            ),
            block_size=SCHEDULER.block_size,
        ),
        card=card,
        clock=clock,
    )


def undisturbed(request: Request) -> Golden:
    """What a client is to get, whatever happens."""
    return golden(request, max_model_len=SCHEDULER.max_model_len)
