"""The fakes beside ``runtime.kit.stage``, ``runtime.kit.probe`` and the journal.

Everything that a supervisor asks of its machine, kept in memory: step cards, process states, what
was killed, and what was written down, so that the next supervisor can read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from understudy.protocol.request import Request
from understudy.runtime.control.health import ProcessState
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.scheduling.decision import Draws, Flight, Runner, StepPlan


class VirtualCard:
    """An engine's step card."""

    def __init__(self) -> None:
        self.request_ids: list[int] = []

    def enter(self, request_ids: list[int]) -> None:
        """See ``FileStepCard``."""
        self.request_ids = request_ids

    def leave(self) -> None:
        """See ``FileStepCard``."""
        self.request_ids = []


class VirtualStage:
    """The machine: its processes by pid, and the cards of its engines by identity."""

    def __init__(self) -> None:
        self.cards: dict[str, VirtualCard] = {}
        self.killed: list[int] = []
        self.states: dict[int, ProcessState] = {}
        self.on_kill: Callable[[int], None] = lambda _pid: None
        self.convicts: list[Request] = []
        self.delays_s: dict[str, float] = {}
        """By how much the next step of an engine is late, by its name."""

    def fatal_step(self, name: str, identity: str) -> frozenset[int]:
        """See ``NodeStage``."""
        card = self.cards.get(identity)
        return frozenset() if card is None else frozenset(card.request_ids)

    def kill(self, pid: int, start_time: int) -> None:
        """See ``NodeStage``."""
        self.killed.append(pid)
        self.states[pid] = ProcessState.ENDING
        self.on_kill(pid)

    def keep_convict(self, request: Request) -> None:
        """See ``NodeStage``."""
        self.convicts.append(request)

    def state(self, pid: int, start_time: int) -> ProcessState:
        """See ``ProcProbe``."""
        return self.states.get(pid, ProcessState.UNKNOWN)


class Lazy(NamedTuple):
    """A step that is computed when it is asked for; its time passes then."""

    runner: Runner
    plan: StepPlan

    def collect(self) -> Draws:
        """See ``Flight``."""
        return self.runner.execute(self.plan)


class DelayedRunner:
    """A runner on a machine that may be late with a step."""

    overlaps = True

    def __init__(self, runner: Runner, name: str, stage: VirtualStage, clock: VirtualClock) -> None:
        self._runner = runner
        self._name = name
        self._stage = stage
        self._clock = clock

    def launch(self, plan: StepPlan) -> Flight:
        """See ``OverlappingRunner``."""
        return Lazy(self, plan)

    def execute(self, plan: StepPlan) -> Draws:
        """See ``Runner``."""
        delay_s = self._stage.delays_s.pop(self._name, None)
        if delay_s is not None:
            self._clock.sleep(delay_s)
        return self._runner.execute(plan)
