"""The company: who falls by which verdict, and who is let in by which answer."""

from __future__ import annotations

import pytest

from understudy.protocol.messages import Capacity, Heartbeat, Hello, Role
from understudy.runtime.control import health
from understudy.runtime.control.company import GATEWAY_SILENT_S, Company
from understudy.runtime.control.health import ProcessState, Verdict
from understudy.runtime.control.registry import Member, MemberState

CAPACITY = Capacity(8, 2048, 512, 16)


class Kernel:
    """Says of every process what it is told to; counts how often it is asked."""

    def __init__(self) -> None:
        self.answer = ProcessState.ALIVE
        self.asked: list[tuple[int, int]] = []

    def state(self, pid: int, start_time: int) -> ProcessState:
        self.asked.append((pid, start_time))
        return self.answer


@pytest.fixture
def kernel() -> Kernel:
    return Kernel()


@pytest.fixture
def company(kernel: Kernel) -> Company:
    return Company(100, kernel)


def join(company: Company, name: str, *, last_epoch: int = 0, role: Role = Role.ENGINE) -> Member:
    hello = Hello(role, name, 41, last_epoch, "demo", "", CAPACITY, start_time=7, numerics="exact")
    greeting = company.greet(hello, f"{name}.1", 10.0)
    assert greeting is not None
    return greeting.member


def beat(step: int, phase: str, phase_for_s: float) -> Heartbeat:
    return Heartbeat(step, phase, phase_for_s, 500, 1, 0)


def test_who_never_served_is_tested_and_who_lost_its_session_is_not(company: Company) -> None:
    assert join(company, "engine-0").state is MemberState.TESTING
    assert join(company, "engine-1", last_epoch=99).state is MemberState.SERVING
    assert join(company, "gateway-0", role=Role.GATEWAY).state is MemberState.SERVING


def test_the_canary_lets_in_who_answers_like_the_first_of_its_kind(company: Company) -> None:
    first, right, wrong = (join(company, f"engine-{number}") for number in range(3))
    assert company.take_canary(first, (1, 2, 3))
    assert company.take_canary(right, (1, 2, 3))
    assert not company.take_canary(wrong, (1, 2, 4))
    assert [m.state for m in (first, right, wrong)] == [
        MemberState.SERVING,
        MemberState.SERVING,
        MemberState.TESTING,
    ]


def test_the_kernel_is_asked_about_suspects_only(company: Company, kernel: Kernel) -> None:
    join(company, "engine-0")
    assert company.judge(10.05) == []
    assert kernel.asked == []
    assert company.judge(10.0 + health.SUSPECT_AFTER_S) == []
    assert kernel.asked == [(41, 7)]


@pytest.mark.parametrize(
    ("answer", "after_s", "verdict"),
    [
        (ProcessState.ENDING, health.SUSPECT_AFTER_S, Verdict.DEAD),
        (ProcessState.ALIVE, health.SILENT_AFTER_S, Verdict.SILENT),
    ],
)
def test_an_engine_falls_once(
    company: Company, kernel: Kernel, answer: ProcessState, after_s: float, verdict: Verdict
) -> None:
    member = join(company, "engine-0")
    kernel.answer = answer
    assert company.judge(10.0 + after_s) == [(member, verdict)]
    assert not member.is_alive
    assert company.judge(10.0 + after_s + 1.0) == []


def test_a_silent_process_is_named_for_killing_once_when_its_time_is_over(
    company: Company,
) -> None:
    member = join(company, "engine-0")
    company.judge(10.0 + health.SILENT_AFTER_S)
    assert company.overdue_silent(10.0 + health.KILL_SILENT_AFTER_S - 0.1) == []
    assert company.overdue_silent(10.0 + health.KILL_SILENT_AFTER_S) == [member]
    assert company.overdue_silent(10.0 + health.KILL_SILENT_AFTER_S + 1.0) == []


def test_who_comes_back_from_its_silence_is_not_killed(company: Company) -> None:
    join(company, "engine-0")
    company.judge(10.0 + health.SILENT_AFTER_S)
    join(company, "engine-0", last_epoch=100)
    assert company.overdue_silent(1000.0) == []


def test_a_step_that_does_not_end_is_stuck_and_does_not_raise_its_own_budget(
    company: Company,
) -> None:
    member = join(company, "engine-0")
    fallen = []
    for tenths in range(1, 200):
        now = 10.0 + 0.1 * tenths
        member.heard_at = now
        company.take_beat(member, beat(5, "step", 0.1 * tenths))
        fallen += company.judge(now)
        if fallen:
            break
    assert fallen == [(member, Verdict.STUCK)]
    assert tenths == pytest.approx(10 * health.STEP_BUDGET_MIN_S, abs=1)


def test_long_steps_that_end_are_learnt_from(company: Company) -> None:
    member = join(company, "engine-0")
    company.take_beat(member, beat(5, "step", 3.0))
    company.take_beat(member, beat(6, "step", 0.0))
    company.take_beat(member, beat(6, "step", 3.0 * health.STEP_BUDGET_FACTOR - 1.0))
    member.heard_at = 100.0
    assert company.judge(100.05) == []


def test_a_gateway_is_gone_after_a_longer_silence(company: Company) -> None:
    gateway = join(company, "gateway-0", role=Role.GATEWAY)
    assert company.judge(10.0 + GATEWAY_SILENT_S - 0.01) == []
    assert company.judge(10.0 + GATEWAY_SILENT_S) == [(gateway, Verdict.SILENT)]


def test_the_next_judgement_is_when_the_first_could_be_suspect_and_then_soon(
    company: Company,
) -> None:
    assert company.next_judgement(10.0) is None
    member = join(company, "engine-0")
    assert company.next_judgement(10.0) == 10.0 + health.SUSPECT_AFTER_S
    assert company.next_judgement(10.3) == 10.3 + health.PROBE_EVERY_S
    member.heard_at = 10.3
    assert company.next_judgement(10.3) == 10.3 + health.SUSPECT_AFTER_S
