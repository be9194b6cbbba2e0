from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import FinishReason, Request, SamplingParams, extend_prefix_hash
from understudy.runtime.scheduling.sequence import Sequence


def make_sequence(
    *,
    prompt: tuple[int, ...] = (10, 11, 12),
    output: tuple[int, ...] = (),
    max_tokens: int = 100,
    min_tokens: int = 0,
    stop_token_ids: tuple[int, ...] = (2,),
) -> Sequence:
    params = SamplingParams(
        seed=0, max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop_token_ids
    )
    return Sequence(Request(1, 1, prompt, params, -3), attempt=2, output=output)


def test_a_new_sequence_has_its_prompt_and_nothing_computed() -> None:
    sequence = make_sequence()
    assert sequence.token_ids == [10, 11, 12]
    assert (sequence.num_tokens, sequence.num_prompt_tokens, sequence.num_output_tokens) == (
        3,
        3,
        0,
    )
    assert (sequence.num_computed_tokens, sequence.block_table, sequence.prefix_hash) == (0, [], 0)
    assert (sequence.request_id, sequence.attempt, sequence.priority) == (1, 2, -3)


def test_what_a_resumed_sequence_brings_along_is_output() -> None:
    sequence = make_sequence(output=(20, 21))
    assert sequence.token_ids == [10, 11, 12, 20, 21]
    assert (sequence.num_prompt_tokens, sequence.num_output_tokens) == (3, 2)
    assert sequence.prefix_hash == extend_prefix_hash(0, (20, 21))


def test_a_sequence_goes_on_until_max_tokens() -> None:
    sequence = make_sequence(max_tokens=2)
    assert sequence.append(20) is None
    assert sequence.append(21) is FinishReason.LENGTH


def test_a_sequence_is_cut_at_the_limit_that_was_set_for_it() -> None:
    sequence = make_sequence()
    sequence.num_tokens_max = 4
    assert sequence.append(20) is FinishReason.LENGTH


def test_a_stop_token_wins_over_length() -> None:
    assert make_sequence(max_tokens=1).append(2) is FinishReason.STOP


def test_a_stop_token_counts_as_output() -> None:
    sequence = make_sequence()
    sequence.append(2)
    assert sequence.num_output_tokens == 1


def test_stop_tokens_stop_only_once_min_tokens_were_made() -> None:
    sequence = make_sequence(min_tokens=2)
    assert sequence.append(2) is None
    assert sequence.append(2) is None
    assert sequence.append(2) is FinishReason.STOP


def test_a_stop_token_at_the_end_of_the_prompt_stops_nothing() -> None:
    assert make_sequence(prompt=(10, 2)).finish_reason() is None


@given(
    tokens=st.lists(st.integers(0, 5), max_size=12),
    num_resumed=st.integers(0, 12),
    max_tokens=st.integers(1, 12),
    min_tokens=st.integers(0, 5),
)
def test_resuming_at_any_point_changes_neither_hash_nor_end(
    tokens: list[int], num_resumed: int, max_tokens: int, min_tokens: int
) -> None:
    whole = make_sequence(max_tokens=max_tokens, min_tokens=min_tokens)
    resumed = make_sequence(
        max_tokens=max_tokens, min_tokens=min_tokens, output=tuple(tokens[:num_resumed])
    )
    for token in tokens:
        whole.append(token)
    for token in tokens[num_resumed:]:
        resumed.append(token)
    assert resumed.token_ids == whole.token_ids
    assert resumed.prefix_hash == whole.prefix_hash
    assert resumed.finish_reason() is whole.finish_reason()


def test_a_sequence_says_where_it_stands() -> None:
    assert repr(make_sequence(output=(20,))) == "<Sequence 1.2 waiting 0/3+1>"
