from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.scheduling.decision import SampledToken, ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence
from understudy.runtime.scheduling.speculation import (
    Costs,
    CostTable,
    DraftCosts,
    NgramDrafter,
    Speculator,
    StepCosts,
)


def make_sequence(tokens: Sequence[int], *, request_id: int = 1, left: int = 100) -> EngineSequence:
    params = SamplingParams(seed=0, max_tokens=left)
    sequence = EngineSequence(Request(request_id, request_id, tuple(tokens), params), attempt=1)
    sequence.num_computed_tokens = sequence.num_tokens - 1
    return sequence


class Oracle:
    """Guesses 1, 2, 3 …, and remembers how far it was asked to."""

    def __init__(self) -> None:
        self.depths: list[int] = []

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        self.depths = [depth for _, depth in wanted]
        return {sequence.request_id: list(range(1, 1 + depth)) for sequence, depth in wanted}


def play(
    speculator: Speculator, sequence: EngineSequence, *, accepted: int, token_s: float = 0.0
) -> int:
    """One step in which so many guesses come true, if there are so many; how many there were."""
    draft = tuple(speculator.propose([sequence]).get(sequence.request_id, ()))
    plan = StepPlan(1, (ScheduledSequence(sequence, 1 + len(draft), draft),))
    drawn = (SampledToken(0),) * (1 + min(accepted, len(draft)))
    speculator.note(plan, {sequence.request_id: drawn}, 0.01 + token_s * len(draft))
    return len(draft)


def free_steps() -> Costs:
    """A step costs the same whatever is in it."""
    return Costs(StepCosts(CostTable([(1, 0.01), (64, 0.01)])))


def dear_tokens() -> Costs:
    """Each token costs as much as the first."""
    return Costs(StepCosts(CostTable([(1, 0.01), (64, 0.64)])))


# What a step costs


def test_between_measured_points_cost_is_on_the_line() -> None:
    table = CostTable([(8, 0.4), (1, 0.1), (4, 0.2)])
    assert [table.seconds(n) for n in (1, 4, 6, 8)] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert table.seconds(16) == pytest.approx(0.8)


@given(st.lists(st.tuples(st.integers(1, 99), st.floats(0.001, 1)), min_size=1, max_size=8))
def test_more_tokens_never_cost_less(points: list[tuple[int, float]]) -> None:
    table = CostTable(points)
    seconds = [table.seconds(n) for n in range(1, 130)]
    assert all(b >= a * (1 - 1e-9) for a, b in pairwise(seconds))


def test_what_was_seen_counts_more_than_the_profile_and_sets_the_pace_of_the_rest() -> None:
    costs = StepCosts(CostTable([(1, 0.1), (4, 0.2)]))
    assert costs.seconds(1, 4) == pytest.approx(0.2)
    costs.note(1, 1, 0.3)
    assert costs.seconds(1, 1) == pytest.approx(0.3)
    assert costs.seconds(1, 4) == pytest.approx(0.6)
    costs.note(1, 4, 0.25)
    assert costs.seconds(1, 4) == pytest.approx(0.25)


# How far to guess


def test_a_fixed_depth_is_the_most() -> None:
    speculator = Speculator(Oracle(), depth_max=5, costs=None)
    assert play(speculator, make_sequence([1, 2]), accepted=0) == 5


def test_guessing_goes_far_where_guesses_come_true_and_cost_nothing() -> None:
    speculator = Speculator(Oracle(), depth_max=6, costs=free_steps())
    sequence = make_sequence([1, 2])
    depths = [play(speculator, sequence, accepted=6) for _ in range(50)]
    assert depths[-1] == 6


def test_guessing_ends_where_it_does_not_pay() -> None:
    speculator = Speculator(Oracle(), depth_max=6, costs=dear_tokens())
    sequence = make_sequence([1, 2])
    depths = [play(speculator, sequence, accepted=0) for _ in range(100)]
    assert depths[20:].count(0) > 70


def test_who_was_given_up_is_tried_again_some_day() -> None:
    speculator = Speculator(Oracle(), depth_max=6, costs=free_steps())
    sequence = make_sequence([1, 2])
    for _ in range(60):
        play(speculator, sequence, accepted=0, token_s=0.003)
    depths = [play(speculator, sequence, accepted=0, token_s=0.003) for _ in range(400)]
    assert 0 < sum(depth > 0 for depth in depths) < 40


def test_a_dear_drafter_guesses_less_far_than_a_free_one() -> None:
    costs = CostTable([(1, 0.006)])
    free, dear = free_steps(), free_steps()._replace(draft=DraftCosts(costs, costs))
    far = Speculator(Oracle(), depth_max=8, costs=free)
    near = Speculator(Oracle(), depth_max=8, costs=dear)
    sequence = make_sequence([1, 2])
    far_depths = [play(far, sequence, accepted=1) for _ in range(50)]
    near_depths = [play(near, sequence, accepted=1) for _ in range(50)]
    assert far_depths[-1] > near_depths[-1]


def test_nobody_guesses_beyond_the_end_of_a_request() -> None:
    oracle = Oracle()
    speculator = Speculator(oracle, depth_max=5, costs=None)
    speculator.propose([make_sequence([1, 2], left=3), make_sequence([1], request_id=2, left=1)])
    assert oracle.depths == [2]


def test_nobody_guesses_for_who_has_not_caught_up() -> None:
    oracle = Oracle()
    sequence = make_sequence([1, 2, 3])
    sequence.num_computed_tokens = 1
    assert Speculator(oracle, depth_max=5, costs=None).propose([sequence]) == {}


def test_what_came_true_is_counted() -> None:
    speculator = Speculator(Oracle(), depth_max=4, costs=None)
    play(speculator, make_sequence([1, 2]), accepted=3)
    assert (speculator.num_draft_tokens, speculator.num_accepted_tokens) == (4, 3)


# Lookup


def guess(tokens: Sequence[int], depth: int = 4) -> list[int]:
    return NgramDrafter().propose([(make_sequence(tokens), depth)]).get(1, [])


def test_what_followed_before_is_guessed_to_follow_again() -> None:
    assert guess([7, 1, 2, 3, 4, 5, 6, 9, 1, 2, 3]) == [4, 5, 6, 9]


def test_a_longer_context_is_trusted_more_and_the_latest_most() -> None:
    assert guess([1, 2, 3, 8, 5, 2, 3, 9, 1, 2, 3], depth=1) == [8]
    assert guess([2, 3, 8, 2, 3, 9, 2, 3], depth=1) == [9]


def test_a_loop_is_guessed_to_go_on() -> None:
    assert guess([1, 2, 1, 2, 1, 2], depth=5) == [1, 2, 1, 2, 1]


def test_what_was_never_there_is_not_guessed() -> None:
    assert guess([1, 2, 3, 4]) == []
    assert guess([1]) == []


@given(st.lists(st.integers(0, 2), min_size=1, max_size=40), st.integers(1, 9))
def test_an_index_that_grows_guesses_like_a_new_one(tokens: list[int], depth: int) -> None:
    drafter = NgramDrafter()
    sequence = make_sequence(tokens[:1])
    for token in tokens[1:]:
        sequence.token_ids.append(token)
        grown = drafter.propose([(sequence, depth)]).get(1, [])
        assert grown == guess(sequence.token_ids, depth)
        assert len(grown) in {0, depth}


def test_who_is_gone_is_forgotten() -> None:
    drafter = NgramDrafter()
    drafter.propose([(make_sequence([1, 2]), 1)])
    drafter.propose([(make_sequence([1, 2], request_id=2), 1)])
    assert list(drafter._indices) == [2]
