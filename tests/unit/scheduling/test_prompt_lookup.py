from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence


def make_sequence(tokens: Sequence[int], *, request_id: int = 1) -> EngineSequence:
    params = SamplingParams(seed=0, max_tokens=100)
    return EngineSequence(Request(request_id, request_id, tuple(tokens), params), attempt=1)


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
