"""A supervisor on its own: what it is told, what it wants done, and ways for others to die."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from tests.simulation.stage import VirtualStage
from understudy.actors.supervisor import PULSE_EVERY_S, Supervisor, restored_entries
from understudy.protocol.codec import PROTOCOL_VERSION
from understudy.protocol.messages import (
    Assign,
    Capacity,
    Deliver,
    Dying,
    Failed,
    Hello,
    Inventory,
    Message,
    ProcessExited,
    Pulse,
    Rejected,
    Role,
    StatusReply,
    StatusRequest,
    StepOutput,
)
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control.admission import AdmissionLimits
from understudy.runtime.control.health import SILENT_AFTER_S
from understudy.runtime.control.router import CREDIT_WINDOW_BATCHES
from understudy.runtime.control.tenancy import UNLIMITED, PolicyOf
from understudy.runtime.kit.actor import Effect, Send
from understudy.runtime.storage.journal import Journal, JournalOptions
from understudy.runtime.storage.virtual_disk import VirtualDisk

T = TypeVar("T")

START_S = 1000.0
GATEWAY = "gateway-0.1"
ENGINES = ("engine-0.1", "engine-1.1", "engine-2.1")
BATCH = 4
CREDIT = CREDIT_WINDOW_BATCHES * BATCH
PARAMS = SamplingParams(seed=1, max_tokens=100)


def request(request_id: int, *, prompt: int = 3, priority: int = 0) -> Request:
    return Request(request_id, request_id, (1,) * prompt, PARAMS, priority)


def row(
    request_id: int,
    *tokens: int,
    before: tuple[int, ...] = (),
    attempt: int = 1,
    finish: int = 0,
    logprobs: tuple[bytes, ...] = (),
) -> TokenRow:
    prefix_hash = extend_prefix_hash(0, (*before, *tokens))
    return TokenRow(request_id, attempt, len(before), tokens, prefix_hash, finish, logprobs)


class Stage:
    """A supervisor, and everything it wanted done so far."""

    def __init__(
        self,
        *,
        limits: AdmissionLimits | None = None,
        disk: VirtualDisk | None = None,
        policy_of: PolicyOf = lambda _: UNLIMITED,
        today: Callable[[], int] = lambda: 0,
    ) -> None:
        self.now = START_S
        self.machine = VirtualStage()
        self.disk = disk or VirtualDisk()
        journal, recovery = Journal.open(self.disk, JournalOptions(), START_S)
        self.restored = restored_entries(journal, recovery)
        """What an earlier supervisor has left on the disk."""
        self.supervisor = Supervisor(
            model="demo",
            first_epoch=100,
            journal=journal,
            probe=self.machine,
            stage=self.machine,
            limits=limits,
            started_at=START_S,
            policy_of=policy_of,
            today=today,
        )
        if self.restored:
            self.supervisor.restore(self.restored, START_S, recovery.usage)
        self.effects: list[Effect] = []
        self._pids = 40

    def hear(self, sender: str, *messages: Message) -> None:
        for message in messages:
            self.supervisor.handle(message, sender, self.now)

    def decide(self, *, after_s: float = 0.0) -> None:
        """End a turn, and check that the supervisor agrees with itself."""
        self.now += after_s
        self.supervisor.decide(self.now)
        self.supervisor.check_integrity()
        self.effects += self.supervisor.outbox.take()

    def turn(self, sender: str, *messages: Message) -> None:
        self.hear(sender, *messages)
        self.decide()

    def join(
        self, identity: str, role: Role, *, last_epoch: int = 0, model_len: int = 2048
    ) -> None:
        self._pids += 1
        capacity = Capacity(BATCH, model_len, 64, 16) if role is Role.ENGINE else None
        name = identity.rpartition(".")[0]
        hello = Hello(
            role,
            name,
            self._pids,
            last_epoch,
            "demo",
            "h:1",
            capacity,
            numerics="echo" if role is Role.ENGINE else "",
            protocol=PROTOCOL_VERSION,
        )
        self.turn(identity, hello)
        if role is Role.ENGINE and last_epoch == 0:
            self.answer_canary(identity)

    def answer_canary(self, engine: str, *tokens: int) -> None:
        """Let a new engine answer as every engine does, or with these tokens."""
        (canary,) = self.sent(engine, Assign)
        made = tokens or (1, 2, 3)
        answer = row(canary.request.request_id, *made, finish=FinishReason.LENGTH)
        self.turn(engine, StepOutput(1, (answer,)))

    def sent(self, to: str, kind: type[T]) -> list[T]:
        """What was sent to someone, of one kind, since it was last asked for; and forget it."""
        found: list[T] = []
        others: list[Effect] = []
        for effect in self.effects:
            match effect:
                case Send(to=receiver, message=kind() as message) if receiver == to:
                    found.append(message)
                case _:
                    others.append(effect)
        self.effects = others
        return found

    def assigned(self, engine: str) -> list[int]:
        return [assign.request.request_id for assign in self.sent(engine, Assign)]

    def delivered(self) -> list[TokenRow]:
        return [row for deliver in self.sent(GATEWAY, Deliver) for row in deliver.rows]

    def keep_alive(self, identities: Iterable[str], *, seconds: float) -> None:
        """Let time pass in which these are heard of."""
        end = self.now + seconds
        while self.now < end:
            for identity in identities:
                self.hear(identity, Pulse())
            self.decide(after_s=PULSE_EVERY_S)

    def status(self) -> StatusReply:
        self.turn("client-1.1", StatusRequest())
        (reply,) = self.sent("client-1.1", StatusReply)
        return reply


def stage_with(
    engines: int = 1,
    *,
    limits: AdmissionLimits | None = None,
    gateways: int = 1,
    policy_of: PolicyOf = lambda _: UNLIMITED,
    today: Callable[[], int] = lambda: 0,
) -> Stage:
    stage = Stage(limits=limits, policy_of=policy_of, today=today)
    for number in range(gateways):
        stage.join(f"gateway-{number}.1", Role.GATEWAY)
    for engine in ENGINES[:engines]:
        stage.join(engine, Role.ENGINE)
    stage.effects.clear()
    return stage


def ends_of(stage: Stage, request_id: int) -> int:
    """How many ends the gateway has been told for a request."""
    effects = [effect.message for effect in stage.effects if isinstance(effect, Send)]
    rows = [row for message in effects if isinstance(message, Deliver) for row in message.rows]
    return sum(row.finish != 0 for row in rows if row.request_id == request_id) + sum(
        message.request_id == request_id
        for message in effects
        if isinstance(message, Failed | Rejected)
    )


# Ways to die


def dies_by_will(stage: Stage, engine: str) -> None:
    stage.turn(engine, Dying("out of memory"))


def dies_by_exit(stage: Stage, engine: str) -> None:
    status = next(s for s in stage.status().engines if engine.startswith(s.name))
    stage.turn("launcher.1", ProcessExited(status.name, status.pid, -9, 0))


def dies_by_silence(stage: Stage, engine: str) -> None:
    others = [identity for identity in (GATEWAY, *ENGINES) if identity != engine]
    stage.keep_alive(others, seconds=SILENT_AFTER_S + PULSE_EVERY_S)


def dies_by_deafness(stage: Stage, engine: str) -> None:
    stage.supervisor.lose(engine, stage.now)
    stage.decide()


def dies_by_a_new_incarnation(stage: Stage, engine: str) -> None:
    stage.join(engine.replace(".1", ".2"), Role.ENGINE)


def comes_back_with_nothing(stage: Stage, engine: str) -> None:
    epoch = next(s.epoch for s in stage.status().engines if engine.startswith(s.name))
    stage.join(engine, Role.ENGINE, last_epoch=epoch)
    stage.turn(engine, Inventory((), is_last=True))
