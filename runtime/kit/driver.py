"""One turn of an actor, the same under every loop.

The loops differ in where frames come from and in what time is; what a turn does is only here.
"""

from __future__ import annotations

from collections.abc import Iterable

from understudy.runtime.kit.actor import Actor
from understudy.runtime.kit.clock import Clock
from understudy.runtime.kit.session import Outgoing, SessionTable


class Driver:
    """Drives one actor: frames in, frames out."""

    def __init__(self, actor: Actor, sessions: SessionTable, clock: Clock) -> None:
        self.actor = actor
        self.sessions = sessions
        self.clock = clock

    def turn(self, frames: Iterable[tuple[str, bytes]]) -> list[Outgoing]:
        """Receive everything that is there, decide once, and give what is to be sent."""
        now = self.clock.now()
        outgoing: list[Outgoing] = []
        for peer, raw in frames:
            for sender, message in self.sessions.incoming(peer, raw, now):
                self.actor.handle(message, sender, now)
            # A session that was opened or closed by this frame decides about the next one.
            if effects := self.actor.outbox.take():
                outgoing += self.sessions.outgoing(effects, now)
        self.actor.decide(now)
        # Work done in decide() takes time: what comes of it is sent at its end.
        now = self.clock.now()
        outgoing += self.sessions.outgoing(self.actor.outbox.take(), now)
        outgoing += self.sessions.due(now)
        for peer in self.sessions.broken():
            self.actor.lose(peer, now)
        return outgoing

    def wake_at(self) -> float | None:
        """When the next turn is due even if no frame comes."""
        times = [at for at in (self.actor.wake_at, self.sessions.next_due()) if at is not None]
        return min(times, default=None)
