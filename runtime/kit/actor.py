"""What an actor is: state, and plain methods that change it. Nothing here does I/O.

A loop drives an actor in turns. In a turn it hands over every message that is there, lets the
actor decide once, and carries out what the actor put into its outbox. The same actor runs under
``ActorLoop`` (asyncio and ZeroMQ), ``StepLoop`` (a blocking loop around a GPU) and
``VirtualLoop`` (one thread, virtual time, seeded faults), and cannot tell which.
"""

from __future__ import annotations

from typing import Final, NamedTuple, Protocol, TypeAlias, runtime_checkable

from understudy.protocol.codec import PROTOCOL_VERSION
from understudy.protocol.messages import Heartbeat, Message

SUPERVISOR: Final = "supervisor"
"""The name under which every other actor reaches its supervisor."""


class Send(NamedTuple):
    """Send a message: in the session's order, or as a datagram if its class says so."""

    to: str
    message: Message


class OpenSession(NamedTuple):
    """From now on, speak with this peer under this epoch; an older session is forgotten."""

    peer: str
    epoch: int
    protocol: int = PROTOCOL_VERSION
    """The protocol version of the session."""


class CloseSession(NamedTuple):
    """Forget the session with this peer."""

    peer: str


Effect: TypeAlias = Send | OpenSession | CloseSession


class Outbox:
    """What an actor wants done, in order, when its turn ends."""

    def __init__(self) -> None:
        self._effects: list[Effect] = []

    def send(self, to: str, message: Message) -> None:
        """Ask for a message to be sent."""
        self._effects.append(Send(to, message))

    def open_session(self, peer: str, epoch: int, protocol: int = PROTOCOL_VERSION) -> None:
        """Ask for a session to be opened."""
        self._effects.append(OpenSession(peer, epoch, protocol))

    def close_session(self, peer: str) -> None:
        """Ask for a session to be forgotten."""
        self._effects.append(CloseSession(peer))

    def take(self) -> list[Effect]:
        """Give everything asked for so far to the loop, and start anew."""
        effects, self._effects = self._effects, []
        return effects


class Actor(Protocol):
    """An actor, as its loop sees it.

    ``wake_at`` is the time at which ``decide`` should be called even if no message comes.
    """

    outbox: Outbox

    @property
    def wake_at(self) -> float | None:
        """When the actor wants its next turn; ``None`` when only a message can matter."""
        ...

    def handle(self, message: Message, sender: str, now: float) -> None:
        """Take in one message. Changes the actor's own state and its outbox, nothing else."""
        ...

    def lose(self, peer: str, now: float) -> None:
        """The session with a peer broke: it left more unacknowledged than may be kept."""
        ...

    def decide(self, now: float) -> None:
        """Act on everything taken in, once a turn, and on the timers that are due."""
        ...


@runtime_checkable
class BeatingActor(Actor, Protocol):
    """An actor whose loop also sends a sign of life beside its turns, however long they take."""

    def heartbeat(self, now: float) -> Heartbeat:
        """The sign of life. Called from another thread: reads, and changes nothing."""
        ...
