"""The three verdicts, each with its own evidence, and none without it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.control.health import (
    KILL_SILENT_AFTER_S,
    SILENT_AFTER_S,
    STEP_BUDGET_FACTOR,
    STEP_BUDGET_MAX_S,
    STEP_BUDGET_MIN_S,
    SUSPECT_AFTER_S,
    ProcessState,
    StepBudget,
    Verdict,
    Vitals,
    is_suspect,
    judge,
    should_kill_silent,
)

HEARD = Vitals(heard_at=100.0)
processes = st.sampled_from(ProcessState)


@pytest.mark.parametrize(
    ("after_s", "process", "verdict"),
    [
        (0.0, ProcessState.ENDING, None),
        (SUSPECT_AFTER_S - 0.001, ProcessState.ENDING, None),
        (SUSPECT_AFTER_S, ProcessState.ENDING, Verdict.DEAD),
        (SUSPECT_AFTER_S, ProcessState.ALIVE, None),
        (SUSPECT_AFTER_S, ProcessState.UNKNOWN, None),
        (SILENT_AFTER_S - 0.001, ProcessState.ALIVE, None),
        (SILENT_AFTER_S, ProcessState.ALIVE, Verdict.SILENT),
        (SILENT_AFTER_S, ProcessState.UNKNOWN, Verdict.SILENT),
        (SILENT_AFTER_S, ProcessState.ENDING, Verdict.DEAD),
    ],
)
def test_silence_is_judged_by_how_long_it_lasts_and_by_the_kernel(
    after_s: float, process: ProcessState, verdict: Verdict | None
) -> None:
    assert judge(HEARD, process, 100.0 + after_s) is verdict


def test_the_promises_are_150_ms_and_a_second_and_a_half() -> None:
    assert judge(HEARD, ProcessState.ENDING, 100.15) is Verdict.DEAD
    assert judge(HEARD, ProcessState.ALIVE, 101.5) is Verdict.SILENT
    assert is_suspect(HEARD, 100.0 + SUSPECT_AFTER_S)
    assert not is_suspect(HEARD, 100.0)


@pytest.mark.parametrize(
    ("phase", "phase_for_s", "verdict"),
    [("step", 9.99, None), ("step", 10.0, Verdict.STUCK), ("idle", 1000.0, None)],
)
def test_a_step_that_outlasts_its_budget_is_stuck(
    phase: str, phase_for_s: float, verdict: Verdict | None
) -> None:
    vitals = Vitals(100.0, phase, phase_for_s, step_budget_s=10.0)
    assert judge(vitals, ProcessState.ALIVE, 100.05) is verdict


@given(
    late_s=st.floats(0.0, SUSPECT_AFTER_S, exclude_max=True),
    phase_for_s=st.floats(0.0, 9.99),
    process=processes,
)
def test_whoever_beats_in_time_and_stays_within_its_budget_is_never_judged(
    late_s: float, phase_for_s: float, process: ProcessState
) -> None:
    vitals = Vitals(100.0, "step", phase_for_s, step_budget_s=10.0)
    assert judge(vitals, process, 100.0 + late_s * 0.999) is None


@given(st.floats(0.0, 1e6), processes)
def test_silence_never_goes_unnoticed(silent_s: float, process: ProcessState) -> None:
    verdict = judge(HEARD, process, 100.0 + SILENT_AFTER_S + silent_s)
    assert verdict in {Verdict.DEAD, Verdict.SILENT}


def test_who_was_given_up_as_silent_is_killed_when_its_silence_has_lasted_ten_seconds() -> None:
    given_up_at = 100.0 + SILENT_AFTER_S
    assert not should_kill_silent(given_up_at, 100.0 + KILL_SILENT_AFTER_S - 0.01)
    assert should_kill_silent(given_up_at, 100.0 + KILL_SILENT_AFTER_S)


def test_the_budget_follows_what_steps_take_within_limits() -> None:
    budget = StepBudget()
    assert budget.seconds == STEP_BUDGET_MIN_S
    budget.observe(2.0)
    assert budget.seconds == 2.0 * STEP_BUDGET_FACTOR
    budget.observe(1000.0)
    assert budget.seconds == STEP_BUDGET_MAX_S
    for _ in range(2000):
        budget.observe(0.01)
    assert budget.seconds == STEP_BUDGET_MIN_S


@given(st.lists(st.floats(0.0, 100.0), max_size=50))
def test_a_step_like_those_before_is_always_within_the_budget(steps: list[float]) -> None:
    budget = StepBudget()
    for step_s in steps:
        budget.observe(step_s)
        assert STEP_BUDGET_MIN_S <= budget.seconds <= STEP_BUDGET_MAX_S
        assert step_s < budget.seconds
