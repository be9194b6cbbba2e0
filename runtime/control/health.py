"""Health: three verdicts on an engine, each with its own evidence.

``DEAD``
    100 ms without a word, and the kernel says that the process is exiting, gone, or another one:
    its requests go on elsewhere at once.
``STUCK``
    Beats arrive, but one phase of a step outlasts its budget: it is killed, and the rest is as
    above.
``SILENT``
    1.5 s without a word, and the process is alive: its requests go on elsewhere behind a new
    epoch, and it is killed after 10 s of silence.

No verdict can do harm when it is wrong: the ledger refuses whatever a fenced engine still says, so
the worst is work done twice. That is why the limits may be this short. Whether a process lives is
asked of the kernel (``/proc``), not of the parent: a parent is told of a big process's end only
when its memory has been given back, seconds later.

Pure: time and the kernel's answer are arguments.
"""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple, Protocol

SUSPECT_AFTER_S: Final = 0.1
SILENT_AFTER_S: Final = 1.5
KILL_SILENT_AFTER_S: Final = 10.0
PROBE_EVERY_S: Final = 0.05
STEP_BUDGET_MIN_S: Final = 10.0
STEP_BUDGET_FACTOR: Final = 20.0
STEP_BUDGET_MAX_S: Final = 120.0


class ProcessState(Enum):
    """What the kernel says of a process."""

    ALIVE = "alive"
    ENDING = "ending"
    """Exiting, a zombie, gone, or its pid belongs to another process now."""
    UNKNOWN = "unknown"
    """On another host, or not to be seen: only silence can tell."""


class ProcessProbe(Protocol):
    """Asks whether a process lives."""

    def state(self, pid: int, start_time: int) -> ProcessState:
        """What is known now of the process that had this pid and was started at this time."""
        ...


class Verdict(Enum):
    """Why an engine cannot go on."""

    DEAD = "dead"
    STUCK = "stuck"
    SILENT = "silent"


class Vitals(NamedTuple):
    """What is known of an engine's life."""

    heard_at: float
    """When anything was last heard of it."""
    phase: str = "idle"
    phase_for_s: float = 0.0
    """For how long it had been in this phase when it last said so."""
    step_budget_s: float = STEP_BUDGET_MAX_S


def is_suspect(vitals: Vitals, now: float) -> bool:
    """Whether the kernel should be asked: a beat is overdue."""
    return now >= vitals.heard_at + SUSPECT_AFTER_S


def judge(vitals: Vitals, process: ProcessState, now: float) -> Verdict | None:
    """The verdict on an engine, if there is one.

    ``process`` is the kernel's answer; it counts only once the engine is a suspect, so that an
    engine's last words, sent before it ended, are heard first.
    """
    if is_suspect(vitals, now) and process is ProcessState.ENDING:
        return Verdict.DEAD
    if now >= vitals.heard_at + SILENT_AFTER_S:
        return Verdict.SILENT
    # An engine that beats says for how long it has been at it. Between two beats nothing is added:
    # a beat that is late proves nothing about the step.
    if vitals.phase != "idle" and vitals.phase_for_s >= vitals.step_budget_s:
        return Verdict.STUCK
    return None


def should_kill_silent(silent_since: float, now: float) -> bool:
    """Whether an engine that was given up as silent has had its chance to come back."""
    return now >= silent_since + KILL_SILENT_AFTER_S - SILENT_AFTER_S


class StepBudget:
    """How long a step may take: many times what steps have been taking, within limits.

    Follows the longest of recent steps and forgets it slowly, so that one long prompt after a
    thousand short answers is not taken for a fault.
    """

    def __init__(self) -> None:
        self._longest_s = 0.0

    def observe(self, step_s: float) -> None:
        """A step took so long."""
        self._longest_s = max(step_s, 0.99 * self._longest_s)

    @property
    def seconds(self) -> float:
        """The budget of the next step."""
        budget = STEP_BUDGET_FACTOR * self._longest_s
        return min(max(budget, STEP_BUDGET_MIN_S), STEP_BUDGET_MAX_S)
