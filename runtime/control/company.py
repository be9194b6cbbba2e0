"""The company: who is in it, who has fallen, and who may be given work.

Brings together the registry, the verdicts of ``health``, and the canary. Pure: what the kernel says
of a process is asked through a ``ProcessProbe``, killing is left to the caller.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from understudy.protocol.messages import Heartbeat, Hello, Role
from understudy.runtime.control import health
from understudy.runtime.control.canary import CanaryAnswers
from understudy.runtime.control.health import ProcessProbe, ProcessState, StepBudget, Verdict
from understudy.runtime.control.registry import Greeting, Member, MemberState, Registry

GATEWAY_SILENT_S: Final = 5.0
"""After so long without any message a gateway counts as gone."""


class Fallen(NamedTuple):
    """A member that cannot go on."""

    member: Member
    verdict: Verdict


class Company:
    """All members, and their health."""

    def __init__(self, first_epoch: int, probe: ProcessProbe) -> None:
        self.registry = Registry(first_epoch)
        self._probe = probe
        self._budgets: dict[str, StepBudget] = {}
        self._answers = CanaryAnswers()

    def greet(self, hello: Hello, identity: str, now: float) -> Greeting | None:
        """Take in a Hello; an engine that never served has to pass the canary first."""
        greeting = self.registry.greet(hello, identity, now)
        if greeting is None:
            return None
        if greeting.is_new_session and hello.role is Role.ENGINE and hello.last_epoch == 0:
            greeting.member.state = MemberState.TESTING
        return greeting

    def take_beat(self, member: Member, beat: Heartbeat) -> None:
        """Take in an engine's sign of life, and learn from it how long steps take."""
        last = member.beat
        if last is not None and last.phase != "idle" and last.step != beat.step:
            # Only a step that has ended tells how long steps take: one that hangs would else
            # raise its own budget for as long as it hangs.
            self._budget(member).observe(last.phase_for_s)
        member.beat = beat

    def take_canary(self, member: Member, tokens: tuple[int, ...]) -> bool:
        """Let an engine in if its canary's answer is right; whether it is."""
        is_right = self._answers.check(member.numerics, tokens)
        if is_right and member.state is MemberState.TESTING:
            member.state = MemberState.SERVING
        return is_right

    def judge(self, now: float) -> list[Fallen]:
        """The members that cannot go on any more. Each is named once: it counts as dead then."""
        fallen = []
        for member in self.registry.alive(Role.ENGINE):
            verdict = self._judge_engine(member, now)
            if verdict is not None:
                fallen.append(Fallen(member, verdict))
                if verdict is Verdict.SILENT:
                    member.silent_since = now
        fallen += [
            Fallen(member, Verdict.SILENT)
            for member in self.registry.alive(Role.GATEWAY)
            if now >= member.heard_at + GATEWAY_SILENT_S
        ]
        for one in fallen:
            self.registry.bury(one.member)
        return fallen

    def overdue_silent(self, now: float) -> list[Member]:
        """Engines given up as silent whose processes have had their chance: they are killed."""
        overdue = []
        for member in self.registry.members(Role.ENGINE):
            if member.silent_since is None or member.is_alive:
                continue
            if health.should_kill_silent(member.silent_since, now):
                member.silent_since = None
                overdue.append(member)
        return overdue

    def next_judgement(self, now: float) -> float | None:
        """When ``judge`` could next come to a verdict."""
        times = [
            max(member.heard_at + health.SUSPECT_AFTER_S, now + health.PROBE_EVERY_S)
            if now >= member.heard_at + health.SUSPECT_AFTER_S
            else member.heard_at + health.SUSPECT_AFTER_S
            for member in self.registry.alive(Role.ENGINE)
        ]
        return min(times, default=None)

    def _judge_engine(self, member: Member, now: float) -> Verdict | None:
        beat = member.beat
        vitals = health.Vitals(
            heard_at=member.heard_at,
            phase="idle" if beat is None else beat.phase,
            phase_for_s=0.0 if beat is None else beat.phase_for_s,
            step_budget_s=self._budget(member).seconds,
        )
        process = ProcessState.UNKNOWN
        if health.is_suspect(vitals, now):
            process = self._probe.state(member.pid, member.start_time)
        return health.judge(vitals, process, now)

    def _budget(self, member: Member) -> StepBudget:
        return self._budgets.setdefault(member.name, StepBudget())
