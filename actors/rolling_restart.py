"""A rolling restart: every process of a node is replaced, one at a time, and no stream ends.

What is new is always ready before what is old is told to go::

    supervisor  the new one waits for the lock of the old one; members find it and go on
    engine      the new one loads beside the old one, says Hello by its name, passes the canary
    gateway     the new one has another name, and accepts on the same socket; the old one
                finishes its streams

Pure but for what it asks of its ``Node``: it is stepped, and says at each step what there is to
tell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final, Protocol, TypeAlias

from understudy.protocol.messages import StatusReply
from understudy.runtime.kit.children import Child

Steps: TypeAlias = Iterator[str | None]
"""A line to tell; or ``None``: wait a little, and step again."""

UPTIME_SLACK_S: Final = 0.5
"""What a clock may be off between two looks at it."""


class RestartFailed(Exception):
    """It stopped half-way. What was not replaced goes on as it was."""


class Node(Protocol):
    """The processes of a node, and what may be done to them."""

    @property
    def supervisor(self) -> Child:
        """The supervisor of now."""
        ...

    @property
    def engines(self) -> list[Child]:
        """The engines of now, broken ones included."""
        ...

    @property
    def gateways(self) -> list[Child]:
        """The gateways of now, broken ones included."""
        ...

    def start_beside(self, child: Child) -> Child:
        """Start a process that could take this one's place. Its death would have no consequence."""
        ...

    def replace(self, old: Child, new: Child) -> None:
        """From now on the new one is kept alive. The old one is told to end, and killed if late."""
        ...

    def give_up(self, new: Child, old: Child) -> None:
        """The new one will not take the place of the old one, which is kept alive."""
        ...

    def waits_for_lock(self, supervisor: Child) -> bool:
        """Whether a supervisor has come as far as it can while there is another one."""
        ...

    def reply(self) -> StatusReply | None:
        """How things are, if the supervisor answers now."""
        ...


def restart_all(node: Node, *, limit_s: float, now: Callable[[], float]) -> Steps:
    """Replace every process of a node. Each may take ``limit_s`` to become ready.

    Raises:
        RestartFailed: a new process ended, or was not ready in time.
    """
    restart = _RollingRestart(node, limit_s, now)
    yield from restart.replace_supervisor()
    for engine in list(node.engines):
        yield from restart.replace_engine(engine)
    for gateway in list(node.gateways):
        yield from restart.replace_gateway(gateway)


class _RollingRestart:
    def __init__(self, node: Node, limit_s: float, now: Callable[[], float]) -> None:
        self._node = node
        self._limit_s = limit_s
        self._now = now

    def replace_supervisor(self) -> Steps:
        node, old = self._node, self._node.supervisor
        new = node.start_beside(old)
        yield f"supervisor: process {new.pid} starts beside {old.pid}"
        yield from self._until(lambda: node.waits_for_lock(new), new, old)
        since = self._now()
        node.replace(old, new)
        yield from self._until_gone(old)
        yield from self._until(lambda: self._has_everybody(since), new)
        yield f"supervisor: process {new.pid} has taken over"

    def replace_engine(self, old: Child) -> Steps:
        node, name = self._node, old.spec.name
        new = node.start_beside(old)
        yield f"{name}: process {new.pid} starts beside {old.pid}"
        yield from self._until(lambda: self._serves(new), new, old)
        node.replace(old, new)
        yield from self._until_gone(old)
        yield f"{name}: process {new.pid} has taken over"

    def replace_gateway(self, old: Child) -> Steps:
        node = self._node
        new = node.start_beside(old)
        yield f"{new.spec.name}: process {new.pid} starts beside {old.spec.name}, {old.pid}"
        yield from self._until(lambda: self._is_reached(new), new, old)
        node.replace(old, new)
        yield f"{new.spec.name}: process {new.pid} accepts; {old.spec.name} finishes its streams"
        yield from self._until_gone(old)
        yield f"{old.spec.name}: process {old.pid} has ended"

    def _until(self, is_so: Callable[[], bool], new: Child, old: Child | None = None) -> Steps:
        """Wait until a new process is as far as it has to be.

        With ``old``, which still has its part, the new one is given up if it fails. Without, the
        new one has the part already, and is started again if it ends.
        """
        deadline = self._now() + self._limit_s
        while not is_so():
            problem = ""
            if old is not None and new.process is None:
                problem = f"the new process ended: {new.last_words() or 'without a word'}"
            elif self._now() >= deadline:
                problem = f"the new process was not ready after {self._limit_s:g} s"
            if problem:
                if old is not None:
                    self._node.give_up(new, old)
                raise RestartFailed(f"{new.spec.name}: {problem}")
            yield None

    def _until_gone(self, old: Child) -> Steps:
        while old.process is not None:
            yield None

    def _serves(self, engine: Child) -> bool:
        reply = self._node.reply()
        return reply is not None and any(
            (found.pid, found.state) == (engine.pid, "serving") for found in reply.engines
        )

    def _is_reached(self, gateway: Child) -> bool:
        reply = self._node.reply()
        return reply is not None and any(
            found.pid == gateway.pid and found.address for found in reply.gateways
        )

    def _has_everybody(self, since: float) -> bool:
        """Whether a supervisor that is younger than ``since`` has all members."""
        reply = self._node.reply()
        if reply is None or reply.uptime_s > self._now() - since + UPTIME_SLACK_S:
            return False
        serving = {engine.pid for engine in reply.engines if engine.state == "serving"}
        joined = serving | {gateway.pid for gateway in reply.gateways}
        members = (*self._node.engines, *self._node.gateways)
        return {member.pid for member in members if not member.is_broken} <= joined
