"""A rolling restart, step by step, on a node that a test plays."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import cast

import pytest

from understudy.actors.rolling_restart import RestartFailed, restart_all
from understudy.protocol.messages import StatusReply
from understudy.protocol.status import EngineStatus, GatewayStatus
from understudy.runtime.kit.children import Child
from understudy.runtime.kit.process import ProcessSpec, RestartPolicy

LIMIT_S = 60.0


class Process:
    """Stands for a process that runs."""


def child(name: str, pid: int) -> Child:
    spec = ProcessSpec(name=name, argv=(), environment={}, restart=RestartPolicy())
    made = Child(spec, last_words=Path("/nonexistent"))
    made.pid = pid
    made.process = cast("subprocess.Popen[bytes]", Process())
    return made


class FakeNode:
    """A node whose processes are ready at once, unless a test holds them back."""

    def __init__(self) -> None:
        self.now = 0.0
        self.supervisor = child("supervisor", 1)
        self.engines = [child("engine-0", 10), child("engine-1", 11)]
        self.gateways = [child("gateway-0", 20), child("gateway-1", 21)]
        self.done: list[str] = []
        self.fails = ""
        self.hangs = ""
        self.is_deaf = False
        self._next_pid = 100

    def start_beside(self, old: Child) -> Child:
        self._next_pid += 1
        new = child(old.spec.name, self._next_pid)
        if old.spec.name == self.fails:
            new.process = None
        self.done.append(f"start {old.spec.name}")
        self._fresh = new
        return new

    def replace(self, old: Child, new: Child) -> None:
        self.done.append(f"replace {old.spec.name}")
        if old is self.supervisor:
            self.supervisor = new
        else:
            part = self.gateways if old in self.gateways else self.engines
            part[part.index(old)] = new
        old.process = None

    def give_up(self, new: Child, old: Child) -> None:
        self.done.append(f"give up {old.spec.name}")

    def waits_for_lock(self, supervisor: Child) -> bool:
        return supervisor.spec.name != self.hangs

    def reply(self) -> StatusReply | None:
        """The fresh engine takes its name's place; the fresh gateway comes beside the old one."""
        if self.is_deaf:
            return None
        engines = {engine.spec.name: engine.pid or 0 for engine in self.engines}
        gateways = {gateway.pid or 0 for gateway in self.gateways}
        fresh = self._fresh
        if fresh.process is not None and fresh.spec.name != self.hangs:
            if fresh.spec.name in engines:
                engines[fresh.spec.name] = fresh.pid or 0
            elif fresh.spec.name.startswith("gateway"):
                gateways.add(fresh.pid or 0)
        return StatusReply(
            "demo",
            0.0,
            tuple(
                EngineStatus(name, "serving", pid, 1, 0, 0, 0, 0, 1, 1, 0, 0.0)
                for name, pid in engines.items()
            ),
            tuple(GatewayStatus(f"g{pid}", pid, "h:1", 0, 0.0) for pid in gateways),
            *(0,) * 7,
        )


def run(node: FakeNode) -> list[str]:
    """Step until it is over, a second at a time."""
    lines = []
    for line in restart_all(node, limit_s=LIMIT_S, now=lambda: node.now):
        if line is None:
            node.now += 1.0
            assert node.now < 10 * LIMIT_S
        else:
            lines.append(line)
    return lines


def test_each_process_is_started_before_the_one_that_it_replaces_ends() -> None:
    node = FakeNode()
    old = [node.supervisor, *node.engines, *node.gateways]
    run(node)
    assert node.done == [
        f"{what} {name}"
        for name in ("supervisor", "engine-0", "engine-1", "gateway-0", "gateway-1")
        for what in ("start", "replace")
    ]
    assert all(process.process is None for process in old)


def test_every_step_is_told() -> None:
    assert run(FakeNode())[:4] == [
        "supervisor: process 101 starts beside 1",
        "supervisor: process 101 has taken over",
        "engine-0: process 102 starts beside 10",
        "engine-0: process 102 has taken over",
    ]


@pytest.mark.parametrize("name", ["supervisor", "engine-1", "gateway-1"])
def test_nothing_is_replaced_by_a_process_that_ends(name: str) -> None:
    node = FakeNode()
    node.fails = name
    # A supervisor that has ended does not wait for the lock, either.
    node.hangs = name
    with pytest.raises(RestartFailed, match=f"{name}: the new process ended: without a word"):
        run(node)
    assert node.done[-1] == f"give up {name}"
    assert f"replace {name}" not in node.done


@pytest.mark.parametrize("name", ["supervisor", "engine-0", "gateway-0"])
def test_nothing_is_replaced_by_a_process_that_is_not_ready_in_time(name: str) -> None:
    node = FakeNode()
    node.hangs = name
    with pytest.raises(RestartFailed, match=f"{name}: .* not ready after 60 s"):
        run(node)
    assert node.done[-1] == f"give up {name}"


def test_it_does_not_go_on_before_the_new_supervisor_has_everybody() -> None:
    node = FakeNode()
    node.is_deaf = True
    with pytest.raises(RestartFailed, match=r"supervisor: .* not ready after 60 s"):
        run(node)
    assert node.done == ["start supervisor", "replace supervisor"]


def test_a_broken_engine_is_replaced_too_and_is_not_waited_for() -> None:
    node = FakeNode()
    node.engines[0].process = None
    node.engines[0].is_broken = True
    run(node)
    assert "replace engine-0" in node.done
