"""The registry: which engines and gateways there are, and which session each of them has.

It gives out epochs. An epoch is never given twice and grows with time, so a later one always
fences an earlier one. Members are known by their identity on the transport
(``engine-0.8123``: a name and an incarnation); of one name, only the latest incarnation counts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from understudy.protocol.messages import Capacity, Heartbeat, Hello, Role

EPOCH_MAX: Final = 2**63 - 1
"""More than is ever reached; a Hello that names a later one, not given out here, gets no answer."""
MEMBERS_MAX: Final = 1024
"""Names that are remembered. Who comes when there are more takes the place of the one that has been
dead for longest; while all are alive, newcomers get no answer."""


class MemberState(Enum):
    """Whether work can be given to a member."""

    SERVING = "serving"
    TESTING = "testing"
    """It came after one that died, and has to answer the canary first."""
    DRAINING = "draining"
    """It finishes or hands over what it has, and gets nothing new."""
    DEAD = "dead"
    BROKEN = "broken"
    """It is dead and is not started again."""


@dataclass(slots=True)
class Member:
    """An engine or a gateway."""

    name: str
    identity: str
    role: Role
    pid: int
    epoch: int
    heard_at: float
    start_time: int = 0
    address: str = ""
    numerics: str = ""
    capacity: Capacity | None = None
    state: MemberState = MemberState.SERVING
    restarts: int = 0
    beat: Heartbeat | None = None
    unclaimed: set[int] = field(default_factory=set)
    """Requests that an engine had when its session opened, and has not said yet that it has."""
    silent_since: float | None = None
    """Since when a dead engine's process has lived on without a word."""

    @property
    def is_alive(self) -> bool:
        """Whether there is a session with it."""
        # Asked at every turn for every member: a set would hash the state each time.
        return self.state is not MemberState.DEAD and self.state is not MemberState.BROKEN


class Greeting(NamedTuple):
    """The answer to a Hello."""

    member: Member
    is_new_session: bool
    replaced: Member | None
    """The earlier incarnation of this name, if it counted as alive."""


class Registry:
    """All members, by identity."""

    def __init__(self, first_epoch: int) -> None:
        self._next_epoch = first_epoch
        self._by_identity: dict[str, Member] = {}
        self._by_name: dict[str, Member] = {}

    def greet(self, hello: Hello, identity: str, now: float) -> Greeting | None:
        """Take in a Hello; ``None`` if it is not to be answered.

        The first of an incarnation, and one that says the present session is lost, open a new
        session. Any other is a repetition: the same Welcome is the answer. What a member has to
        do is not touched by a new session; an engine says itself what it still holds. An
        incarnation that comes after a later one, delayed or revived, must not take the name from
        it.
        """
        # Whoever names the last epoch of all would else lock out all who are given later ones.
        if hello.last_epoch > EPOCH_MAX and hello.last_epoch >= self._next_epoch:
            return None
        # A member welcomes no epoch but a later one. A supervisor whose machine started anew may
        # have begun to count below those that its members have seen.
        self._next_epoch = max(self._next_epoch, hello.last_epoch + 1)
        present = self._by_name.get(hello.name)
        if present is None and not self._make_room():
            return None
        if present is not None and present.is_alive:
            if present.identity == identity:
                return self._greet_again(present, hello, now)
            if _incarnation(identity) < _incarnation(present.identity):
                return None
        member = Member(
            name=hello.name,
            identity=identity,
            role=hello.role,
            pid=hello.pid,
            epoch=self._take_epoch(),
            heard_at=now,
            start_time=hello.start_time,
            address=hello.address,
            numerics=hello.numerics,
            capacity=hello.capacity,
            restarts=0 if present is None else present.restarts,
        )
        if present is not None:
            if present.pid != hello.pid:
                member.restarts += 1
            del self._by_identity[present.identity]
        self._by_name[hello.name] = self._by_identity[identity] = member
        is_replaced = present is not None and present.is_alive
        return Greeting(member, True, present if is_replaced else None)

    def _make_room(self) -> bool:
        """Forget somebody dead, if there are too many names for one more."""
        if len(self._by_name) < MEMBERS_MAX:
            return True
        dead = [member for member in self._by_name.values() if not member.is_alive]
        if not dead:
            return False
        oldest = min(dead, key=lambda member: member.heard_at)
        del self._by_name[oldest.name], self._by_identity[oldest.identity]
        return True

    def _greet_again(self, member: Member, hello: Hello, now: float) -> Greeting:
        """Answer the present incarnation of a name."""
        member.heard_at = now
        if hello.last_epoch < member.epoch:
            return Greeting(member, False, None)
        member.epoch = self._take_epoch()
        return Greeting(member, True, None)

    def get(self, identity: str) -> Member | None:
        """The member behind an identity, dead or alive."""
        return self._by_identity.get(identity)

    def named(self, name: str) -> Member | None:
        """The latest incarnation of a name."""
        return self._by_name.get(name)

    def bury(self, member: Member) -> None:
        """Mark a member dead: it gets no more work, and what it says is stale."""
        member.state = MemberState.DEAD

    def break_down(self, name: str, pid: int, now: float) -> Member:
        """Mark an engine as one that stays down; it may never have said Hello."""
        member = self._by_name.get(name)
        if member is None:
            member = Member(name, name, Role.ENGINE, pid, self._take_epoch(), heard_at=now)
            self._by_name[name] = self._by_identity[name] = member
        member.state = MemberState.BROKEN
        return member

    def members(self, role: Role) -> list[Member]:
        """All members that play a part, dead or alive, by name."""
        found = [member for member in self._by_identity.values() if member.role is role]
        return sorted(found, key=lambda member: member.name)

    def alive(self, role: Role) -> list[Member]:
        """The members that play a part and have a session, by name."""
        return [member for member in self.members(role) if member.is_alive]

    def serving(self, role: Role) -> list[Member]:
        """The members that play a part and take new work, by name."""
        return [m for m in self.members(role) if m.state is MemberState.SERVING]

    def _take_epoch(self) -> int:
        epoch = self._next_epoch
        self._next_epoch += 1
        return epoch


def _incarnation(identity: str) -> int:
    """The number behind the name; 0 if there is none."""
    number = identity.rpartition(".")[2]
    return int(number) if number.isdecimal() and len(number) < 20 else 0
