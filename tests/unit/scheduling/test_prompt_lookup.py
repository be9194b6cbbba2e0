from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.scheduling import prompt_lookup
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence


def make_sequence(
    tokens: Sequence[int], *, request_id: int = 1, tenant: str = "", answer: Sequence[int] = ()
) -> EngineSequence:
    params = SamplingParams(seed=0, max_tokens=100)
    request = Request(request_id, request_id, tuple(tokens), params, tenant=tenant)
    return EngineSequence(request, attempt=1, output=tuple(answer))


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


# Other answers


def answered(drafter: NgramDrafter, answer: Sequence[int], **fields: str) -> None:
    """A request comes, is answered and goes."""
    drafter.propose([(make_sequence([99], request_id=7, answer=answer, **fields), 1)])
    drafter.propose([])


def test_what_was_answered_before_is_guessed_again() -> None:
    drafter = NgramDrafter()
    answered(drafter, [1, 2, 3, 4, 5, 6])
    assert drafter.propose([(make_sequence([8, 1, 2, 3, 4]), 5)]) == {1: [5, 6]}
    assert drafter.propose([(make_sequence([8, 2, 3, 4]), 5)]) == {}


def test_a_sequence_is_believed_before_other_answers() -> None:
    drafter = NgramDrafter()
    answered(drafter, [1, 2, 3, 4, 5])
    sequence = make_sequence([1, 2, 3, 4, 9, 1, 2, 3, 4])
    assert drafter.propose([(sequence, 1)]) == {1: [9]}


def test_tenants_hear_nothing_of_each_other() -> None:
    drafter = NgramDrafter()
    answered(drafter, [1, 2, 3, 4, 5], tenant="a")
    asked = {
        tenant: drafter.propose([(make_sequence([8, 1, 2, 3, 4], tenant=tenant), 1)])
        for tenant in ("a", "b")
    }
    assert asked == {"a": {1: [5]}, "b": {}}


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=30), max_size=12),
    st.lists(st.integers(0, 3), min_size=4, max_size=6),
)
def test_answers_are_found_as_long_as_they_are_remembered(
    answers: list[list[int]], tokens: list[int]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompt_lookup, "_SHARED_TOKENS_MAX", 40)
        drafter = NgramDrafter()
        for answer in answers:
            answered(drafter, answer)
    kept: list[list[int]] = []
    for answer in answers[::-1]:
        if len(answer) > 4:
            kept.append(answer)
            if sum(map(len, kept)) > 40:
                kept.pop()
                break
    found = drafter.propose([(make_sequence([9, *tokens]), 1)]).get(1)
    followers = {
        answer[end]
        for answer in kept
        for end in range(4, len(answer))
        if answer[end - 4 : end] == tokens[-4:]
    }
    own = guess([9, *tokens], depth=1)
    assert found == own if own else (not followers if found is None else found[0] in followers)


def test_of_too_many_tenants_the_oldest_is_forgotten() -> None:
    drafter = NgramDrafter()
    for number in range(100):
        answered(drafter, [1, 2, 3, 4, 5], tenant=str(number))
    assert len(drafter._answers) == 64
