"""What holds for an output however it was cut into steps: its prefix hash, and its rows joined."""

from __future__ import annotations

from hypothesis import example, given
from hypothesis import strategies as st

from understudy.protocol.packed_logprobs import pack_logprobs, unpack_logprobs
from understudy.protocol.request import (
    FinishReason,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
    joined,
)

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


STEPS = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30)
"""For each step of an engine: which request, and how many tokens; none is its end."""


def rows_of(steps: list[tuple[int, int]]) -> list[TokenRow]:
    outputs: dict[int, tuple[int, ...]] = {}
    ended: set[int] = set()
    rows = []
    for request_id, num_tokens in steps:
        if request_id in ended:
            continue
        before = outputs.get(request_id, ())
        tokens = tuple(range(len(before), len(before) + num_tokens))
        outputs[request_id] = (*before, *tokens)
        finish = 0 if tokens else FinishReason.LENGTH
        if finish:
            ended.add(request_id)
        prefix_hash = extend_prefix_hash(0, outputs[request_id])
        logprobs = tuple(pack_logprobs(TokenLogprobs(-float(token), ())) for token in tokens)
        num_cached = 7 if not before else 0
        drafted = max(num_tokens - 1, 0)
        rows.append(
            TokenRow(
                request_id,
                1,
                len(before),
                tokens,
                prefix_hash,
                finish,
                logprobs,
                num_cached,
                drafted,
            )
        )
    return rows


@given(STEPS)
def test_joined_rows_are_what_one_step_would_have_brought(steps: list[tuple[int, int]]) -> None:
    rows = rows_of(steps)
    found = joined(rows)
    assert [row.request_id for row in found] == list(dict.fromkeys(row.request_id for row in rows))
    for row in found:
        parts = [part for part in rows if part.request_id == row.request_id]
        assert row.position == 0
        assert row.tokens == tuple(range(len(row.tokens)))
        assert len(row.tokens) == len(row.logprobs) == sum(len(part.tokens) for part in parts)
        told = [unpack_logprobs(packed).chosen for packed in row.logprobs]
        assert told == [-float(token) for token in row.tokens]
        assert row.prefix_hash == extend_prefix_hash(0, row.tokens) == parts[-1].prefix_hash
        assert row.finish == parts[-1].finish
        assert row.num_cached_tokens == 7
        assert row.num_draft_tokens == sum(part.num_draft_tokens for part in parts)
    assert joined(found) == found


def test_rows_that_do_not_continue_each_other_stay_apart() -> None:
    first = TokenRow(1, 1, 0, (5,), 0, 0)
    again = TokenRow(1, 1, 0, (5, 6), 0, 0)
    gap = TokenRow(1, 1, 3, (8,), 0, 0)
    next_attempt = TokenRow(1, 2, 4, (9,), 0, 0)
    late = TokenRow(1, 2, 5, (10,), 0, FinishReason.STOP)
    after_the_end = TokenRow(1, 2, 6, (11,), 0, 0)
    other = TokenRow(2, 1, 0, (), 0, FinishReason.STOP, vector=b"1234")
    assert joined([first, other, again, gap, next_attempt, late, after_the_end]) == [
        first,
        other,
        again,
        gap,
        TokenRow(1, 2, 4, (9, 10), 0, FinishReason.STOP),
        after_the_end,
    ]
