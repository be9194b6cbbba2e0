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
"""More than is ever reached; a Hello that names a later one is not answered."""
ENGINE_SILENT_S: Final = 1.5
GATEWAY_SILENT_S: Final = 5.0
"""After so long without any message a member counts as gone."""


class MemberState(Enum):
    """Whether work can be given to a member."""

    SERVING = "serving"
    DEAD = "dead"


@dataclass(slots=True)
class Member:
    """An engine or a gateway."""

    name: str
    identity: str
    role: Role
    pid: int
    epoch: int
    heard_at: float
    address: str = ""
    capacity: Capacity | None = None
    state: MemberState = MemberState.SERVING
    restarts: int = 0
    beat: Heartbeat | None = None
    requests: set[int] = field(default_factory=set)
    """An engine's outstanding requests, or a gateway's open ones."""


class Greeting(NamedTuple):
    """The answer to a Hello."""

    member: Member
    is_new_session: bool
    replaced: Member | None
    """The earlier session of the same name, which must be cleared up."""


class Registry:
    """All members, by identity."""

    def __init__(self, first_epoch: int) -> None:
        self._next_epoch = first_epoch
        self._by_identity: dict[str, Member] = {}
        self._by_name: dict[str, Member] = {}

    def greet(self, hello: Hello, identity: str, now: float) -> Greeting | None:
        """Take in a Hello; ``None`` if it is not to be answered.

        The first of an incarnation, and one that says the present session is lost, open a new
        session. Any other is a repetition: the same Welcome is the answer. An incarnation that
        comes after a later one, delayed or revived, must not take the name from it.
        """
        if hello.last_epoch > EPOCH_MAX:
            return None
        present = self._by_name.get(hello.name)
        is_alive = present is not None and present.state is MemberState.SERVING
        if present is not None and is_alive:
            if present.identity == identity:
                present.heard_at = now
                if hello.last_epoch < present.epoch:
                    return Greeting(present, False, None)
            elif _incarnation(identity) < _incarnation(present.identity):
                return None
        # A member welcomes no epoch but a later one. A supervisor whose machine started anew may
        # have begun to count below those that its members have seen.
        self._next_epoch = max(self._next_epoch, hello.last_epoch + 1)
        member = Member(
            name=hello.name,
            identity=identity,
            role=hello.role,
            pid=hello.pid,
            epoch=self._next_epoch,
            heard_at=now,
            address=hello.address,
            capacity=hello.capacity,
            restarts=0 if present is None else present.restarts,
        )
        if present is not None and present.pid != hello.pid:
            member.restarts += 1
        self._next_epoch += 1
        if present is not None:
            del self._by_identity[present.identity]
        self._by_name[hello.name] = self._by_identity[identity] = member
        return Greeting(member, True, present if is_alive else None)

    def get(self, identity: str) -> Member | None:
        """The member behind an identity, dead or alive."""
        return self._by_identity.get(identity)

    def named(self, name: str) -> Member | None:
        """The latest incarnation of a name."""
        return self._by_name.get(name)

    def bury(self, member: Member) -> None:
        """Mark a member dead: it gets no more work, and what it says is stale."""
        member.state = MemberState.DEAD

    def silent(self, now: float) -> list[Member]:
        """Serving members that have not been heard of for too long."""
        return [
            member
            for member in self._by_identity.values()
            if member.state is MemberState.SERVING and now >= member.heard_at + _limit_s(member)
        ]

    def next_silence(self) -> float | None:
        """When the first member will have been silent for too long."""
        return min(
            (
                member.heard_at + _limit_s(member)
                for member in self._by_identity.values()
                if member.state is MemberState.SERVING
            ),
            default=None,
        )

    def members(self, role: Role) -> list[Member]:
        """All members that play a part, dead or alive, by name."""
        found = [member for member in self._by_identity.values() if member.role is role]
        return sorted(found, key=lambda member: member.name)

    def serving(self, role: Role) -> list[Member]:
        """The members that play a part and are alive, by name."""
        return [m for m in self.members(role) if m.state is MemberState.SERVING]


def _incarnation(identity: str) -> int:
    """The number behind the name; 0 if there is none."""
    number = identity.rpartition(".")[2]
    return int(number) if number.isdecimal() and len(number) < 20 else 0


def _limit_s(member: Member) -> float:
    return ENGINE_SILENT_S if member.role is Role.ENGINE else GATEWAY_SILENT_S
