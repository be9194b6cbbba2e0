"""How an engine or a gateway becomes, and stays, a member of its supervisor's company.

It says Hello until it is welcomed, shows that it lives, and notices when the supervisor has
fenced it or has not been heard of for too long. Pure; composed into the actors that need it.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum
from typing import Final

from understudy.protocol.codec import PROTOCOL_VERSION, PROTOCOL_VERSION_OLDEST
from understudy.protocol.messages import Fenced, Hello, Message, Pulse, Welcome
from understudy.runtime.kit.actor import SUPERVISOR, Outbox

HELLO_EVERY_S: Final = 0.25
PULSE_EVERY_S: Final = 0.25
SUPERVISOR_SILENT_S: Final = 3.0
"""Without a word from the supervisor for so long, the session counts as lost."""


class MembershipChange(Enum):
    """What a message or the passing of time did to the membership."""

    JOINED = 1
    LOST = 2


class Membership:
    """The member's side of its session with the supervisor."""

    def __init__(self, hello: Hello, outbox: Outbox) -> None:
        self._hello = replace(hello, protocol=PROTOCOL_VERSION)
        self._outbox = outbox
        self._epoch: int | None = None
        self._heard_at = 0.0
        self._speak_at = 0.0

    @property
    def is_open(self) -> bool:
        """Whether there is a session."""
        return self._epoch is not None

    @property
    def wake_at(self) -> float:
        """When ``decide`` should be called next."""
        if self._epoch is None:
            return self._speak_at
        return min(self._speak_at, self._heard_at + SUPERVISOR_SILENT_S)

    def handle(self, message: Message, now: float) -> MembershipChange | None:
        """Take in any message from the supervisor."""
        self._heard_at = now
        match message:
            case Welcome(epoch, protocol) if (
                self._epoch is None
                and epoch > self._hello.last_epoch
                and protocol >= PROTOCOL_VERSION_OLDEST
            ):
                self._epoch = epoch
                self._hello = replace(self._hello, last_epoch=epoch)
                self._speak_at = now
                self._outbox.open_session(SUPERVISOR, epoch, min(protocol, PROTOCOL_VERSION))
                return MembershipChange.JOINED
            case Fenced(epoch) if epoch == self._epoch:
                return self.leave(now)
            case _:
                return None

    def leave(self, now: float) -> MembershipChange:
        """Give the session up; a new one is asked for at once."""
        self._epoch = None
        self._speak_at = now
        self._outbox.close_session(SUPERVISOR)
        return MembershipChange.LOST

    def decide(self, now: float) -> MembershipChange | None:
        """Say what is due: Hello without a session, a sign of life with one."""
        change = None
        if self._epoch is not None and now >= self._heard_at + SUPERVISOR_SILENT_S:
            change = self.leave(now)
        if now >= self._speak_at:
            self._outbox.send(SUPERVISOR, self._hello if self._epoch is None else Pulse())
            self._speak_at = now + (HELLO_EVERY_S if self._epoch is None else PULSE_EVERY_S)
        return change
