from __future__ import annotations

import pytest

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence


def make_sequence() -> Sequence:
    params = SamplingParams(seed=0, max_tokens=10)
    return Sequence(Request(1, 1, (10, 11, 12, 13), params), attempt=1, output=(20,))


@pytest.mark.parametrize(
    ("num_computed_tokens", "num_tokens", "samples"),
    [(0, 4, False), (0, 5, True), (3, 1, False), (3, 2, True), (4, 1, True)],
)
def test_a_scheduled_sequence_samples_when_it_catches_up_with_its_last_token(
    num_computed_tokens: int, num_tokens: int, samples: bool
) -> None:
    sequence = make_sequence()
    sequence.num_computed_tokens = num_computed_tokens
    assert ScheduledSequence(sequence, num_tokens).samples is samples


def test_a_plan_has_as_many_tokens_as_its_shares_together() -> None:
    shares = (ScheduledSequence(make_sequence(), 3), ScheduledSequence(make_sequence(), 4))
    assert StepPlan(1, shares).num_tokens == 7
    assert StepPlan(1, ()).num_tokens == 0
