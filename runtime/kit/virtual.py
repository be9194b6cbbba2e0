"""One thread, one seed, virtual time: the whole company of actors in a test.

``VirtualLoop`` stands beside ``ActorLoop`` and ``StepLoop`` and drives the same actors through
the same sessions and the same codec. ``VirtualNetwork`` stands beside ZeroMQ and does what
networks do: delay, lose, duplicate, reorder, cut. Actors crash and come back. Everything random
is drawn from one seed, so a run can be repeated exactly; the hash of its trace says that it was.
"""

from __future__ import annotations

import hashlib
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Final, NamedTuple

from understudy.protocol.messages import Heartbeat
from understudy.runtime.kit.actor import SUPERVISOR, Actor, BeatingActor
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.kit.driver import Driver
from understudy.runtime.kit.loop import BEAT_EVERY_S
from understudy.runtime.kit.session import Outgoing, SessionTable

TURN_DELAY_S: Final = 20e-6
"""Between a frame's arrival and the turn that takes it: arrivals this close make one turn."""


@dataclass(frozen=True)
class NetworkFaults:
    """What the network does to frames; shares are probabilities from 0 to 1."""

    delay_min_s: float = 20e-6
    delay_max_s: float = 200e-6
    loss: float = 0.0
    duplication: float = 0.0
    reorder: float = 0.0
    """The share of frames that are held back by up to ``reorder_delay_max_s``."""
    reorder_delay_max_s: float = 0.005


class Cut(NamedTuple):
    """Nothing passes from one actor to another until the time is over."""

    source: str
    target: str
    until: float


class VirtualNetwork:
    """Decides each frame's fate. Names are actors' names, whatever their incarnation."""

    def __init__(self, seed: int, faults: NetworkFaults | None = None) -> None:
        self._random = random.Random(seed)  # noqa: S311 - a simulation, not a secret
        self.faults = faults or NetworkFaults()
        self._cuts: list[Cut] = []
        self.lost = 0

    def cut(self, source: str, target: str, *, until: float) -> None:
        """Cut one direction between two actors."""
        self._cuts.append(Cut(source, target, until))

    def delays(self, source: str, target: str, now: float) -> list[float]:
        """After which delays a frame arrives: once, twice, or never."""
        self._cuts = [cut for cut in self._cuts if cut.until > now]
        if any((cut.source, cut.target) == (source, target) for cut in self._cuts):
            self.lost += 1
            return []
        if self._random.random() < self.faults.loss:
            self.lost += 1
            return []
        copies = 2 if self._random.random() < self.faults.duplication else 1
        return [self._delay() for _ in range(copies)]

    def _delay(self) -> float:
        delay = self._random.uniform(self.faults.delay_min_s, self.faults.delay_max_s)
        if self._random.random() < self.faults.reorder:
            delay += self._random.uniform(0, self.faults.reorder_delay_max_s)
        return delay


class _Nap(NamedTuple):
    """Work within a turn that takes time, and the sign of life at its start."""

    start: float
    end: float
    beat: Heartbeat


@dataclass
class _Player:
    """An actor on the stage, and what the loop knows of it."""

    name: str
    identity: str
    actor: Actor
    driver: Driver
    clock: VirtualClock
    inbox: list[tuple[str, bytes]] = field(default_factory=list)
    turn_at: float | None = None
    frozen_until: float = 0.0
    """No turn and no beat before: its process is stopped, and what is sent to it waits."""
    naps: list[_Nap] = field(default_factory=list)
    """Those of its latest turn. The turn is over at once, but its beats must not know that."""
    alarms: set[float] = field(default_factory=set)
    """When it will be looked at; only the alarm at ``turn_at`` makes a turn."""


Factory = Callable[[int, VirtualClock], Actor]
"""Makes an actor from its incarnation and its clock."""


class VirtualLoop:
    """Drives actors under virtual time."""

    def __init__(self, network: VirtualNetwork) -> None:
        self.now = 0.0
        self._network = network
        self._events: list[tuple[float, int, Callable[[], object]]] = []
        self._event_count = 0
        self._factories: dict[str, Factory] = {}
        self._incarnations: dict[str, int] = {}
        self._players: dict[str, _Player] = {}
        self._by_identity: dict[str, _Player] = {}
        self._trace = hashlib.sha256()
        self.frames = 0

    def add(self, name: str, factory: Factory) -> Actor:
        """Put an actor on the stage, at once."""
        self._factories[name] = factory
        return self.restart(name)

    def actor(self, name: str) -> Actor:
        """The present incarnation of an actor."""
        return self._players[name].actor

    def is_on_stage(self, name: str) -> bool:
        """Whether an actor lives at this moment."""
        return name in self._players

    def incarnation(self, name: str) -> int:
        """Which incarnation of an actor it is, or was last, counting from 1."""
        return self._incarnations[name]

    def crash(self, name: str) -> None:
        """Kill an actor at this moment: its state and what it has not sent yet are gone."""
        player = self._players.pop(name)
        del self._by_identity[player.identity]
        self._record(f"crash {player.identity}")

    def freeze(self, name: str, seconds: float) -> None:
        """Stop an actor's process for a while, as SIGSTOP does; it knows nothing of it."""
        player = self._players[name]
        player.frozen_until = max(player.frozen_until, self.now + seconds)
        self._record(f"freeze {player.identity} for {seconds}")

    def restart(self, name: str) -> Actor:
        """Start an actor's next incarnation from its factory."""
        assert name not in self._players, f"{name} is already there"
        incarnation = self._incarnations.get(name, 0) + 1
        self._incarnations[name] = incarnation
        clock = VirtualClock(self.now)
        actor = self._factories[name](incarnation, clock)
        identity = SUPERVISOR if name == SUPERVISOR else f"{name}.{incarnation}"
        sessions = SessionTable(identity, fences=name == SUPERVISOR)
        player = _Player(name, identity, actor, Driver(actor, sessions, clock), clock)
        self._players[name] = self._by_identity[identity] = player
        self._record(f"start {identity}")
        self._schedule_turn(player, self.now)
        if isinstance(actor, BeatingActor):
            clock.on_sleep = lambda start, end: player.naps.append(
                _Nap(start, end, actor.heartbeat(start))
            )
            self.at(self.now + BEAT_EVERY_S, lambda: self._beat(player, actor))
        return actor

    def at(self, time: float, action: Callable[[], object]) -> None:
        """Do something at a time: a fault, a client, an end."""
        self._event_count += 1
        heapq.heappush(self._events, (max(time, self.now), self._event_count, action))

    def wake(self, name: str) -> None:
        """Ask for a turn of an actor that was changed from outside its messages."""
        player = self._players.get(name)
        if player is not None:
            self._schedule_turn(player, self.now)

    def run_until(self, end: float, *, stop_when: Callable[[], bool] | None = None) -> None:
        """Let time pass until ``end``, or until the condition holds."""
        while self._events and self._events[0][0] <= end:
            if stop_when is not None and stop_when():
                return
            self.now, _, action = heapq.heappop(self._events)
            action()
        self.now = max(self.now, end)

    def trace_hash(self) -> str:
        """A hash over every frame and its fate, every crash and restart so far, with its time."""
        return self._trace.hexdigest()

    def _schedule_turn(self, player: _Player, at: float) -> None:
        at = max(at, self.now, player.clock.now())
        if player.turn_at is not None and player.turn_at <= at:
            return
        player.turn_at = at
        if at not in player.alarms:
            player.alarms.add(at)
            self.at(at, lambda: self._turn(player, at))

    def _turn(self, player: _Player, at: float) -> None:
        player.alarms.discard(at)
        if player.turn_at != at or self._by_identity.get(player.identity) is not player:
            return
        player.turn_at = None
        if self.now < player.frozen_until:
            self._schedule_turn(player, player.frozen_until)
            return
        player.clock.advance_to(self.now)
        frames, player.inbox = player.inbox, []
        player.naps.clear()
        outgoing = player.driver.turn(frames)
        done_at = player.clock.now()
        if done_at > self.now:
            # The work of this turn lasts until then: a crash before loses what it made.
            self.at(done_at, lambda: self._send_at_end(player, outgoing))
        else:
            self._send_all(player, outgoing)
        wake_at = player.driver.wake_at()
        if wake_at is not None:
            self._schedule_turn(player, max(wake_at, done_at))

    def _send_at_end(self, player: _Player, outgoing: list[Outgoing]) -> None:
        """Send what a turn that took its time has made, unless its process is stopped."""
        if self.now < player.frozen_until:
            self.at(player.frozen_until, lambda: self._send_at_end(player, outgoing))
        else:
            self._send_all(player, outgoing)

    def _beat(self, player: _Player, actor: BeatingActor) -> None:
        if self._by_identity.get(player.identity) is not player:
            return
        if self.now >= player.frozen_until:
            beat = _beat_within(player.naps, self.now) or actor.heartbeat(self.now)
            frame = player.driver.sessions.datagram(SUPERVISOR, beat)
            self._send_all(player, [Outgoing(SUPERVISOR, frame)])
        self.at(self.now + BEAT_EVERY_S, lambda: self._beat(player, actor))

    def _send_all(self, source: _Player, outgoing: list[Outgoing]) -> None:
        if self._by_identity.get(source.identity) is not source:
            return
        for to, frame in outgoing:
            target = self._by_identity.get(to)
            if target is None:
                continue
            delays = self._network.delays(source.name, target.name, self.now)
            self._record(f"{source.identity} {to} {delays}", frame)
            for delay in delays:
                self._deliver(source.identity, target, frame, self.now + delay)

    def _deliver(self, source: str, target: _Player, frame: bytes, at: float) -> None:
        def arrive() -> None:
            if self._by_identity.get(target.identity) is target:
                target.inbox.append((source, frame))
                self._schedule_turn(target, self.now + TURN_DELAY_S)

        self.at(at, arrive)

    def _record(self, what: str, frame: bytes = b"") -> None:
        self.frames += 1
        self._trace.update(f"{self.now:.9f} {what} ".encode())
        self._trace.update(frame)


def _beat_within(naps: list[_Nap], now: float) -> Heartbeat | None:
    """What an actor would say of itself in the middle of its work; ``None`` if it has none."""
    for start, end, beat in naps:
        if start <= now < end:
            return replace(beat, phase_for_s=beat.phase_for_s + now - start)
    return None
