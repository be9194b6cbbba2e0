"""The prefix hash: equal for an output however it was cut, different for different outputs."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from understudy.protocol.request import FinishReason, extend_prefix_hash

TOKENS = st.lists(st.integers(min_value=0, max_value=2**32 - 1), max_size=20)
HASHES_TO_ZERO = 0x811C9DC5
"""FNV-1a's starting value; a token equal to it brings the plain hash to 0."""


@given(TOKENS, st.integers(min_value=0, max_value=20))
@example([HASHES_TO_ZERO, 5], 1)
@example([1, 2, 3], 1)
def test_a_hash_does_not_depend_on_where_the_output_was_cut(tokens: list[int], cut: int) -> None:
    whole = extend_prefix_hash(0, tokens)
    head, tail = tokens[:cut], tokens[cut:]
    assert extend_prefix_hash(extend_prefix_hash(0, head), tail) == whole
    one_by_one = 0
    for token in tokens:
        one_by_one = extend_prefix_hash(one_by_one, (token,))
    assert one_by_one == whole


@given(TOKENS)
def test_a_hash_fits_32_bits_and_is_the_same_for_lists_and_tuples(tokens: list[int]) -> None:
    assert 0 <= extend_prefix_hash(0, tokens) < 2**32
    assert extend_prefix_hash(0, tokens) == extend_prefix_hash(0, tuple(tokens))


def test_no_tokens_leave_the_hash_as_it_was() -> None:
    assert extend_prefix_hash(0, ()) == 0
    assert extend_prefix_hash(77, []) == 77


@given(TOKENS, st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_outputs_that_differ_in_their_last_token_differ(
    tokens: list[int], one: int, other: int
) -> None:
    hashes = {extend_prefix_hash(0, [*tokens, token]) for token in (one, other)}
    assert len(hashes) == len({one, other})


def test_order_counts() -> None:
    assert extend_prefix_hash(0, (1, 2)) != extend_prefix_hash(0, (2, 1))


def test_every_reason_to_finish_is_truthy() -> None:
    assert all(FinishReason)
    assert [(reason.name, int(reason)) for reason in FinishReason] == [
        ("STOP", 1),
        ("LENGTH", 2),
        ("CANCELLED", 3),
        ("ERROR", 4),
        ("DEADLINE", 5),
        ("REFUSED", 6),
    ]
