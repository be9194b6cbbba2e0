"""Log probabilities as bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.packed_logprobs import (
    ALTERNATIVES_MAX,
    are_packed,
    pack_logprobs,
    split_logprobs,
    unpack_logprobs,
)
from understudy.protocol.request import TokenLogprobs

U32 = st.integers(0, 2**32 - 1)
FLOATS = st.floats(allow_nan=False) | st.floats(width=32, allow_nan=False)
LOGPROBS = st.builds(
    TokenLogprobs, FLOATS, st.lists(st.tuples(U32, FLOATS), max_size=20).map(tuple)
)


@given(several=st.lists(LOGPROBS, max_size=6))
def test_they_come_back_exactly(several: list[TokenLogprobs]) -> None:
    packed = tuple(map(pack_logprobs, several))

    assert are_packed(packed)
    assert list(map(unpack_logprobs, packed)) == several
    assert split_logprobs(b"".join(packed)) == packed


def test_those_that_fit_32_bits_take_no_more() -> None:
    assert len(pack_logprobs(TokenLogprobs(-0.5, ((7, -0.25),)))) == 1 + 4 + 8
    assert len(pack_logprobs(TokenLogprobs(-0.1, ((7, -0.25),)))) == 1 + 8 + 12


def test_what_is_no_number_comes_back() -> None:
    found = unpack_logprobs(pack_logprobs(TokenLogprobs(float("nan"), ())))

    assert found.chosen != found.chosen


def test_as_many_alternatives_as_a_byte_can_count_come_back() -> None:
    many = TokenLogprobs(-0.5, tuple((token, -0.5) for token in range(ALTERNATIVES_MAX)))

    assert unpack_logprobs(pack_logprobs(many)) == many


@given(data=st.binary(max_size=40))
def test_what_nobody_has_packed_is_known_by_its_length(data: bytes) -> None:
    if are_packed([data]):
        assert isinstance(unpack_logprobs(data), TokenLogprobs)
        assert split_logprobs(data) == (data,)


def test_what_is_cut_short_is_refused() -> None:
    packed = pack_logprobs(TokenLogprobs(-0.5, ((7, -0.25),)))

    assert not are_packed([b""])
    assert not are_packed([packed[:-1]])
    assert not are_packed([packed + b"x"])
    with pytest.raises(ValueError, match="cut short"):
        split_logprobs(packed + packed[:-1])
