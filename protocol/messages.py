"""Every message that crosses a process boundary, each a frozen dataclass with a small tag.

A message is packed as its fields in order. Fields are only ever appended, with a default: an older
peer ignores what it does not know, a newer one fills in the rest. Tags are never used again.

Who says what to whom::

    any actor ──Hello──▶ supervisor ──Welcome──▶ it      opens a session (a new epoch)
    any actor ──Heartbeat/Pulse──▶ supervisor            and the supervisor pulses back
    supervisor ──Fenced──▶ any actor                     the session is over: say Hello again
    gateway ──Submit/Cancel──▶ supervisor ──Accepted/Rejected/Deliver/Failed──▶ gateway
    gateway ──Reclaim/Attach/Lookup──▶ supervisor ──Deliver/Failed/Found──▶ gateway
    gateway ──EndGroup/TimelineRequest/UsageRequest──▶ supervisor ──Timelines/UsageReply──▶ gateway
    gateway ──ResetPrefixCache──▶ supervisor ──ResetPrefixCache──▶ engine
    supervisor ──Assign/Cancel──▶ engine ──StepOutput/Inventory/Refused──▶ supervisor
    engine ──Dying──▶ supervisor;  launcher ──ProcessExited──▶ supervisor
    supervisor ──ClusterState──▶ gateway
    command line ──StatusRequest──▶ supervisor ──StatusReply──▶ command line

A *datagram* is sent once, outside the session's order, and may be lost: its sender repeats it, or
makes up for it. Everything else is delivered once and in order as long as the session lasts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, NamedTuple, TypeAlias, TypeVar, dataclass_transform

from understudy.protocol.request import Request, TokenRow
from understudy.protocol.status import EngineStatus, GatewayStatus
from understudy.protocol.timeline import RequestTimeline
from understudy.protocol.usage import DayUsage

T = TypeVar("T")

MESSAGE_TYPES: Final[dict[int, type]] = {}
"""Every message class by its tag; filled by the decorator below."""

_TAGS: Final[dict[type, int]] = {}
_DATAGRAMS: Final[set[type]] = set()


@dataclass_transform(frozen_default=True)
def message(tag: int, *, datagram: bool = False) -> Callable[[type[T]], type[T]]:
    """Make a class a message: a frozen, slotted dataclass, known to the codec by its tag."""

    def register(plain: type[T]) -> type[T]:
        kind = dataclass(frozen=True, slots=True)(plain)
        assert tag not in MESSAGE_TYPES, f"tag {tag} is taken by {MESSAGE_TYPES[tag].__name__}"
        MESSAGE_TYPES[tag] = kind
        _TAGS[kind] = tag
        if datagram:
            _DATAGRAMS.add(kind)
        return kind

    return register


def tag_of(kind: type) -> int:
    """The wire tag of a message class."""
    return _TAGS[kind]


def is_datagram(kind: type) -> bool:
    """Whether messages of this class travel outside a session's order."""
    return kind in _DATAGRAMS


class Role(IntEnum):
    """The part that an actor plays."""

    SUPERVISOR = 1
    ENGINE = 2
    GATEWAY = 3


class Capacity(NamedTuple):
    """What an engine can take, told once in its Hello."""

    max_num_seqs: int
    max_model_len: int
    num_blocks: int
    block_size: int
    pools_only: bool = False
    """It turns prompts into vectors, and makes no tokens."""


@message(1, datagram=True)
class Hello:
    """An actor asks for a session. Repeated until it is welcomed.

    ``last_epoch`` is the epoch of the session that it had and lost, or 0. It tells a request for
    a new session from a late duplicate of the one that opened the present session.
    """

    role: Role
    name: str
    pid: int
    last_epoch: int = 0
    model: str = ""
    """The name of the model that an engine runs or a gateway offers."""
    address: str = ""
    """Where a gateway listens, as ``host:port``."""
    capacity: Capacity | None = None
    start_time: int = 0
    """The process's start, in clock ticks since boot; with the pid it names the process for good.
    0 if the supervisor cannot ask this process's kernel."""
    numerics: str = ""
    """The class of an engine's numerics: engines of one class make the same bits."""
    protocol: int = 3
    """The newest protocol version that it speaks; unsaid, the oldest that anybody does."""


@message(2, datagram=True)
class Welcome:
    """The session is open: its frames carry ``epoch``."""

    epoch: int
    protocol: int = 3
    """The protocol version of the session: the newest that both speak."""


@message(3, datagram=True)
class Fenced:
    """No session has this epoch (any more): drop its work and say Hello again."""

    epoch: int


@message(4, datagram=True)
class Pulse:
    """A sign of life that carries nothing but the envelope's acknowledgement."""


@message(9, datagram=True)
class Resend:
    """The receiver of a session misses the message with this ``seq``."""

    seq: int
    count: int = 1
    """How many it misses in a row, as far as it has looked."""


@message(5, datagram=True)
class Heartbeat:
    """An engine's sign of life, every 50 ms, sent from a thread beside its step loop."""

    step: int
    phase: str
    phase_for_s: float
    blocks_free: int
    running: int
    waiting: int
    num_shed: int = 0
    """Steps that did not fit the device's memory, and were planned anew."""
    num_draft_tokens: int = 0
    """Tokens that were guessed, and checked."""
    num_accepted_tokens: int = 0
    """Those of them that came true."""


@message(6, datagram=True)
class Dying:
    """An actor's last will: it ends now, for this reason."""

    reason: str


@message(7, datagram=True)
class ProcessExited:
    """The launcher saw one of its processes end."""

    name: str
    pid: int
    status: int
    """The exit status, or minus the number of the signal, as ``subprocess`` gives it."""
    restarts: int
    is_broken: bool = False
    """It is an engine, and is not started again. Repeated for as long as that is so."""


@message(8)
class ClusterState:
    """What a gateway must know to answer for the cluster's health."""

    engines_serving: int
    engines_known: int
    max_model_len: int
    """The longest context that every serving engine takes; 0 while none serves."""
    is_draining: bool = False
    numerics: tuple[str, ...] = ()
    """The classes of numerics among the serving engines, each once, in alphabetical order."""


@message(16)
class Submit:
    """A gateway hands in a request."""

    request: Request


@message(17)
class Accepted:
    """The supervisor has taken the request: it will end, exactly once."""

    request_id: int


@message(18)
class Rejected:
    """The supervisor has not taken the request."""

    request_id: int
    code: str
    """The ``code`` of an error in ``understudy.protocol.errors``."""
    message: str
    retry_after_s: float | None = None


@message(19)
class Deliver:
    """New tokens and ends for requests of one gateway."""

    rows: tuple[TokenRow, ...]
    engine: str = ""
    """Which engine made them."""


@message(20)
class Failed:
    """An accepted request ends with an error."""

    request_id: int
    code: str
    message: str
    retry_after_s: float | None = None


@message(21)
class Cancel:
    """Stop working on a request; nothing is said about it afterwards."""

    request_id: int


@message(22)
class Attach:
    """A gateway wants a request's output from a position on, and what follows."""

    request_id: int
    position: int


class HeldRequest(NamedTuple):
    """A request that a gateway holds open, and the position that it must deliver next."""

    request_id: int
    position: int


@message(23)
class Reclaim:
    """After a new session: what the gateway holds. It gave up whatever is not named."""

    held: tuple[HeldRequest, ...]


@message(24)
class Lookup:
    """A gateway asks for the requests of a group, on behalf of a client who wants to join."""

    group_id: int
    tenant: str


@message(25)
class Found:
    """The requests of a group, by index; none if there is no such group for this tenant."""

    group_id: int
    tenant: str
    requests: tuple[Request, ...]
    lengths: tuple[int, ...] = ()
    """How long the output of each request is at this moment."""
    finishes: tuple[int, ...] = ()
    """How each has ended, or 0."""


@message(26)
class Duplicate:
    """A submitted request came with an idempotency key that another group has."""

    request_id: int
    original_group_id: int


@message(32)
class Assign:
    """An engine is given a request, with the output that it already has (all of it counts)."""

    request: Request
    attempt: int
    output: tuple[int, ...] = ()
    is_suspect: bool = False
    """An engine died in a step of it: its first step is run alone."""
    deadline_s: float | None = None
    """What is left until the request has to be complete."""


@message(33)
class StepOutput:
    """All that one engine step made."""

    step: int
    rows: tuple[TokenRow, ...]


@message(35)
class Inventory:
    """After a new session: what the engine holds, and all that it added to each request.

    That is all once ``is_last`` came: what is missing is not with this engine any more.
    """

    rows: tuple[TokenRow, ...]
    is_last: bool


@message(34)
class Refused:
    """An engine cannot serve a request that it was given."""

    request_id: int
    attempt: int
    code: str
    message: str


@message(36)
class ResetPrefixCache:
    """Forget every computed prefix: from a gateway, and from the supervisor to each engine."""


@message(40)
class EndGroup:
    """A client wants an end of its call, whoever listens; or that nobody hears of it again."""

    group_id: int
    tenant: str
    is_forgotten: bool = False


@message(41)
class TimelineRequest:
    """A gateway asks what became of a group's requests, or of the tenant's latest ones."""

    tenant: str
    group_id: int
    """0: the latest, of whatever group."""
    requests_max: int = 128


@message(42)
class Timelines:
    """What became of requests, the latest first; answers a ``TimelineRequest`` of these fields."""

    tenant: str
    group_id: int
    requests_max: int
    timelines: tuple[RequestTimeline, ...]


@message(45)
class UsageRequest:
    """A gateway asks what a tenant has used."""

    tenant: str


@message(46)
class UsageReply:
    """What a tenant has used, day by day."""

    tenant: str
    days: tuple[DayUsage, ...]


@message(48, datagram=True)
class StatusRequest:
    """The command line asks how things are."""


@message(49, datagram=True)
class StatusReply:
    """How things are."""

    model: str
    uptime_s: float
    engines: tuple[EngineStatus, ...]
    gateways: tuple[GatewayStatus, ...]
    queued: int
    running: int
    admitted: int
    finished: int
    rejected: int
    resumed: int
    tokens: int
    resumed_inexact: int = 0
    """Requests that went on with an engine of another class of numerics than had them first."""
    quarantined: int = 0
    """Requests that were given up because engines died of them."""
    journal_fault: str = ""
    """Why the journal cannot be written at present; empty: it can."""
    shed: int = 0
    """Requests that were admitted, waited, and had to go for more urgent ones."""


class DrainMode(IntEnum):
    """What becomes of the requests of an engine that is to rest."""

    FINISH = 1
    """They end where they are."""
    MIGRATE = 2
    """They go on elsewhere, from their next token."""


@message(50, datagram=True)
class DrainRequest:
    """The command line asks for an engine to rest. Repeated to learn how far it is."""

    engine: str
    mode: DrainMode


@message(51, datagram=True)
class DrainReply:
    """How far an engine is on its way to rest."""

    engine: str
    is_known: bool
    outstanding: int
    """Requests that it still has; 0: it rests."""


@message(52, datagram=True)
class ReleaseRequest:
    """The command line asks to take back a quarantine. Repeated until it is answered."""

    fingerprint: bytes


@message(53, datagram=True)
class ReleaseReply:
    """Whether there was such a quarantine; there is none now."""

    fingerprint: bytes
    is_known: bool


Message: TypeAlias = (
    Hello
    | Welcome
    | Fenced
    | Pulse
    | Resend
    | Heartbeat
    | Dying
    | ProcessExited
    | ClusterState
    | Submit
    | Accepted
    | Rejected
    | Deliver
    | Failed
    | Cancel
    | Attach
    | Reclaim
    | Lookup
    | Found
    | Duplicate
    | EndGroup
    | TimelineRequest
    | Timelines
    | Assign
    | Inventory
    | StepOutput
    | Refused
    | ResetPrefixCache
    | UsageRequest
    | UsageReply
    | StatusRequest
    | StatusReply
    | DrainRequest
    | DrainReply
    | ReleaseRequest
    | ReleaseReply
)
"""The closed union that handlers match over."""
