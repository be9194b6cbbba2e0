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
    SlowDrafter,
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

    def __init__(self, *, unread: int = 0) -> None:
        self.depths: list[int] = []
        self.unread = unread
        self.has_no_room: set[int] = set()

    def num_unread(self, sequence: EngineSequence) -> int:
        return self.unread

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        self.depths = [depth for _, depth in wanted]
        return {
            sequence.request_id: list(range(1, 1 + depth))
            for sequence, depth in wanted
            if depth and sequence.request_id not in self.has_no_room
        }


class Finder:
    """Finds 1, 2, 3 … for some requests, and nothing for others."""

    def __init__(self, *request_ids: int) -> None:
        self.request_ids = request_ids

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> dict[int, list[int]]:
        return {
            sequence.request_id: list(range(1, 1 + depth))
            for sequence, depth in wanted
            if sequence.request_id in self.request_ids
        }


def speculator_of(drafter: SlowDrafter, *, depth_max: int, costs: Costs | None) -> Speculator:
    return Speculator(Finder(), drafter=drafter, depth_max=depth_max, costs=costs)


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


def test_a_profile_that_found_nothing_to_cost_anything_is_learnt_over() -> None:
    nothing = CostTable([(1, 0.0), (8, 0.0)])
    step, draft = StepCosts(nothing), DraftCosts(nothing, nothing, nothing)
    for _ in range(500):
        step.note(1, 1, 0.01)
        draft.note(1, 4, 0, 0.01)
    assert step.seconds(1, 1) == pytest.approx(0.01, rel=0.01)
    assert draft.seconds(1, 4) == pytest.approx(0.01, rel=0.01)


def test_what_is_seen_counts_more_than_the_profile_of_which_the_cost_of_drafts_stays() -> None:
    costs = StepCosts(CostTable([(1, 0.1), (4, 0.2)]))
    assert costs.seconds(1, 4) == pytest.approx(0.2)
    for _ in range(200):
        costs.note(1, 1, 0.3)
    assert costs.seconds(1, 1) == pytest.approx(0.3, rel=0.01)
    assert costs.seconds(1, 4) == pytest.approx(0.4, rel=0.01)
    for _ in range(200):
        costs.note(1, 4, 0.25)
    assert costs.seconds(1, 4) == pytest.approx(0.25, rel=0.01)


def test_of_more_sequences_than_were_seen_the_profile_says_what_they_cost_more() -> None:
    costs = StepCosts(CostTable([(1, 0.1), (8, 0.2), (16, 0.5)]))
    for _ in range(200):
        costs.note(8, 8, 0.4)
    assert costs.seconds(16, 16) == pytest.approx(0.7, rel=0.01)
    assert costs.seconds(1, 1) == pytest.approx(0.3, rel=0.01)
    assert costs.seconds(16, 32) == pytest.approx(1.2, rel=0.01)


def test_a_disturbed_time_rules_nothing_out() -> None:
    costs = StepCosts(CostTable([(1, 0.1), (8, 0.1)]))
    costs.note(1, 8, 60.0)
    assert costs.seconds(1, 8) < 0.25
    for _ in range(3000):
        costs.note(1, 1, 0.1)
    assert costs.seconds(1, 8) == pytest.approx(0.1, rel=0.3)


def test_the_drafter_is_timed_as_well() -> None:
    table = CostTable([(1, 0.001)])
    oracle = Oracle()
    speculator = Speculator(
        Finder(),
        drafter=oracle,
        depth_max=4,
        costs=Costs(StepCosts(CostTable([(1, 0.01), (8, 0.01)])), DraftCosts(table, table, table)),
    )
    dear: list[int] = []
    cheap: list[int] = []
    for depths, seconds in ((dear, 1.0), (cheap, 1e-5)):
        for _ in range(1000):
            depths.append(play(speculator, make_sequence([1, 2]), accepted=4))
            speculator.note_proposal(seconds)
    assert dear[100:].count(0) > 800
    # Who is not asked is not timed; the next try comes with hope.
    assert cheap[-100:] == [4] * 100


# How far to guess


def test_a_fixed_depth_is_the_most() -> None:
    speculator = speculator_of(Oracle(), depth_max=5, costs=None)
    assert play(speculator, make_sequence([1, 2]), accepted=0) == 5


def test_guessing_goes_far_where_guesses_come_true_and_cost_nothing() -> None:
    speculator = speculator_of(Oracle(), depth_max=6, costs=free_steps())
    sequence = make_sequence([1, 2])
    depths = [play(speculator, sequence, accepted=6) for _ in range(50)]
    assert depths[-1] == 6


def test_guessing_ends_where_it_does_not_pay() -> None:
    speculator = speculator_of(Oracle(), depth_max=6, costs=dear_tokens())
    sequence = make_sequence([1, 2])
    depths = [play(speculator, sequence, accepted=0) for _ in range(100)]
    assert depths[20:].count(0) > 70


def test_who_was_given_up_is_tried_again_some_day() -> None:
    speculator = speculator_of(Oracle(), depth_max=6, costs=free_steps())
    sequence = make_sequence([1, 2])
    for _ in range(60):
        play(speculator, sequence, accepted=0, token_s=0.003)
    depths = [play(speculator, sequence, accepted=0, token_s=0.003) for _ in range(400)]
    assert 0 < sum(depth > 0 for depth in depths) < 40


def test_what_is_looked_up_and_was_given_up_is_tried_again_without_a_drafter_too() -> None:
    costs = Costs(StepCosts(CostTable([(1, 0.01), (8, 0.045)])))
    speculator = Speculator(Finder(1), drafter=None, depth_max=1, costs=costs)
    sequence = make_sequence([1, 2])
    for _ in range(60):
        play(speculator, sequence, accepted=0, token_s=0.005)
    depths = [play(speculator, sequence, accepted=0, token_s=0.005) for _ in range(1000)]
    assert 0 < sum(depths) < 100


def test_a_dear_drafter_guesses_less_far_than_a_free_one() -> None:
    costs = CostTable([(1, 0.006)])
    free, dear = free_steps(), free_steps()._replace(draft=DraftCosts(costs, costs, costs))
    far = speculator_of(Oracle(), depth_max=8, costs=free)
    near = speculator_of(Oracle(), depth_max=8, costs=dear)
    sequence = make_sequence([1, 2])
    far_depths = [play(far, sequence, accepted=1) for _ in range(50)]
    near_depths = [play(near, sequence, accepted=1) for _ in range(50)]
    assert far_depths[-1] > near_depths[-1]


def test_nobody_guesses_beyond_the_end_of_a_request() -> None:
    oracle = Oracle()
    speculator = speculator_of(oracle, depth_max=5, costs=None)
    speculator.propose([make_sequence([1, 2], left=3), make_sequence([1], request_id=2, left=1)])
    assert oracle.depths == [2]


def test_nobody_guesses_for_who_has_not_caught_up() -> None:
    oracle = Oracle()
    sequence = make_sequence([1, 2, 3])
    sequence.num_computed_tokens = 1
    assert speculator_of(oracle, depth_max=5, costs=None).propose([sequence]) == {}


def test_what_came_true_is_counted() -> None:
    speculator = speculator_of(Oracle(), depth_max=4, costs=None)
    play(speculator, make_sequence([1, 2]), accepted=3)
    assert (speculator.num_draft_tokens, speculator.num_accepted_tokens) == (4, 3)


# Two who guess


def test_what_is_found_is_not_asked_for() -> None:
    oracle = Oracle()
    speculator = Speculator(Finder(2), drafter=oracle, depth_max=3, costs=None)
    drafts = speculator.propose([make_sequence([1]), make_sequence([1], request_id=2)])
    assert drafts == {1: [1, 2, 3], 2: [1, 2, 3]}
    # The drafter hears of the other, so that it forgets nothing of it.
    assert oracle.depths == [3, 0]


def test_without_a_drafter_there_is_what_is_found() -> None:
    speculator = Speculator(Finder(2), drafter=None, depth_max=3, costs=None)
    drafts = speculator.propose([make_sequence([1]), make_sequence([1], request_id=2)])
    assert drafts == {2: [1, 2, 3]}


def test_what_is_found_and_never_comes_true_gives_way_to_who_is_right_at_times() -> None:
    oracle = Oracle()
    speculator = Speculator(Finder(1), drafter=oracle, depth_max=3, costs=None)
    sequence = make_sequence([1, 2])
    was_asked = []
    for step in range(600):
        oracle.depths = []
        draft = tuple(speculator.propose([sequence])[1])
        was_asked.append(bool(oracle.depths))
        drawn = (SampledToken(0),) * (4 if oracle.depths and step % 2 else 1)
        plan = StepPlan(1, (ScheduledSequence(sequence, 4, draft),))
        speculator.note(plan, {1: drawn}, 0.01)
    assert not was_asked[0]
    assert was_asked.count(True) > 400
    # What was given up is tried again some day.
    assert was_asked[-300:].count(False) > 0


def test_depths_are_chosen_for_each_kind_of_guess() -> None:
    """What is found costs only its check, which is nearly free here; asking costs a step."""
    dear = CostTable([(1, 0.02), (8, 0.02)])
    costs = Costs(StepCosts(CostTable([(1, 0.01), (64, 0.012)])), DraftCosts(dear, dear, dear))
    oracle = Oracle()
    speculator = Speculator(Finder(2), drafter=oracle, depth_max=4, costs=costs)
    drafts = speculator.propose([make_sequence([1]), make_sequence([1], request_id=2)])
    assert drafts == {2: [1, 2, 3, 4]}
    assert oracle.depths == []


def test_what_was_found_is_taken_where_asking_instead_does_not_pay() -> None:
    """What the drafter says is likelier to come true, and too dear."""
    table = CostTable([(1, 1e-4)])
    costs = Costs(StepCosts(CostTable([(1, 0.01), (64, 0.012)])), DraftCosts(table, table, table))
    oracle, finder = Oracle(), Finder(1)
    speculator = Speculator(finder, drafter=oracle, depth_max=4, costs=costs)
    sequence = make_sequence([1, 2])
    for _ in range(3):
        play(speculator, sequence, accepted=0)
    finder.request_ids = ()
    for _ in range(40):
        play(speculator, sequence, accepted=4)
    assert oracle.depths == [4]
    finder.request_ids, oracle.depths = (1,), []
    for _ in range(200):
        speculator.note_proposal(1.0)
    assert speculator.propose([sequence])[1]
    assert oracle.depths == []


def test_who_has_much_to_read_first_is_asked_where_much_is_left_to_say() -> None:
    token = CostTable([(1, 1e-4)])
    for left, is_asked in ((10, False), (2000, True)):
        costs = Costs(StepCosts(CostTable([(1, 0.01), (8, 0.01)])), DraftCosts(token, token, token))
        oracle = Oracle(unread=1000)  # ten steps' worth
        speculator = Speculator(Finder(), drafter=oracle, depth_max=4, costs=costs)
        assert bool(speculator.propose([make_sequence([1, 2], left=left)])) == is_asked


def test_who_reads_nothing_for_want_of_room_is_not_taken_for_quick() -> None:
    token = CostTable([(1, 1e-3)])
    costs = Costs(StepCosts(CostTable([(1, 1.0), (8, 1.0)])), DraftCosts(token, token, token))
    assert costs.draft is not None
    oracle = Oracle(unread=1000)
    speculator = Speculator(Finder(), drafter=oracle, depth_max=1, costs=costs)
    for has_no_room in ({2}, {1, 2}):
        oracle.has_no_room = has_no_room
        for _ in range(50):
            speculator.propose([make_sequence([1]), make_sequence([1], request_id=2)])
            speculator.note_proposal(1e-3 if 2 - len(has_no_room) else 1e-9)
        assert costs.draft.seconds(1, 1) == pytest.approx(1e-3)


def test_reading_is_not_taken_for_a_slow_drafter() -> None:
    token = CostTable([(1, 1e-3)])
    costs = DraftCosts(token, token, token)
    for num_read in (0, 500, 20):
        for _ in range(100):
            costs.note(1, 4, num_read, 1e-3 * (4 + num_read))
        assert costs.seconds(1, 4) == pytest.approx(0.004)
        assert costs.reading_s(num_read) == pytest.approx(1e-3 * num_read)


@given(
    st.lists(st.sampled_from(["found", "asked"]), min_size=1, max_size=6),
    st.integers(1, 6),
    st.lists(st.integers(0, 6), min_size=1, max_size=30),
    st.booleans(),
)
def test_drafts_are_never_longer_than_the_most(
    kinds: list[str], depth_max: int, accepted: list[int], is_adaptive: bool
) -> None:
    finder = Finder(*(number for number, kind in enumerate(kinds) if kind == "found"))
    speculator = Speculator(
        finder, drafter=Oracle(), depth_max=depth_max, costs=free_steps() if is_adaptive else None
    )
    sequences = [make_sequence([1], request_id=number) for number in range(len(kinds))]
    for count in accepted:
        drafts = speculator.propose(sequences)
        assert all(len(draft) <= depth_max for draft in drafts.values())
        shares = []
        for sequence in sequences:
            draft = tuple(drafts.get(sequence.request_id, ()))
            shares.append(ScheduledSequence(sequence, 1 + len(draft), draft))
        draws = {
            share.sequence.request_id: (SampledToken(0),) * (1 + min(count, len(share.draft)))
            for share in shares
        }
        speculator.note(StepPlan(1, tuple(shares)), draws, 0.01)
    assert speculator.num_accepted_tokens <= speculator.num_draft_tokens
