from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.errors import InternalError, InvalidRequest
from understudy.protocol.openai.presentation import (
    PRESENTATION_BYTES_MAX,
    Presentation,
    decode_presentation,
    encode_presentation,
)

PLAIN = Presentation(
    endpoint="chat", created=1_700_000_000, model="demo", index=1, num_choices=2, n=2
)


@given(
    stop=st.lists(st.text(min_size=1, max_size=256), max_size=8),
    echo=st.none() | st.text(),
    flags=st.lists(st.booleans(), min_size=6, max_size=6),
)
def test_a_presentation_is_read_as_it_was_written(
    stop: list[str], echo: str | None, flags: list[bool]
) -> None:
    names = (
        "include_stop",
        "stream",
        "include_usage",
        "continuous_usage",
        "is_resumable",
        "echoes_prompt",
    )
    options: dict[str, Any] = dict(zip(names, flags, strict=True))
    given_presentation = msgspec.structs.replace(PLAIN, stop=tuple(stop), echo=echo, **options)
    assert decode_presentation(encode_presentation(given_presentation)) == given_presentation


def test_most_presentations_are_small() -> None:
    assert len(encode_presentation(PLAIN)) < 64


def test_an_echo_that_is_too_long_is_refused() -> None:
    long = msgspec.structs.replace(PLAIN, echo="x" * PRESENTATION_BYTES_MAX)
    with pytest.raises(InvalidRequest) as raised:
        encode_presentation(long)
    assert raised.value.param == "echo"


@given(st.binary(max_size=64))
def test_bytes_that_are_no_presentation_are_our_own_fault(packed: bytes) -> None:
    with pytest.raises(InternalError):
        decode_presentation(packed)


@given(position=st.integers(0, 200), value=st.integers(0, 255))
def test_a_damaged_presentation_is_refused_or_still_one(position: int, value: int) -> None:
    packed = bytearray(encode_presentation(PLAIN))
    packed[position % len(packed)] = value
    try:
        presentation = decode_presentation(bytes(packed))
    except InternalError:
        return
    assert presentation.index < presentation.num_choices


@pytest.mark.parametrize(
    "change",
    [
        {"version": 3},
        {"endpoint": "other"},
        {"created": -1},
        {"index": 2},
        {"index": -1},
        {"num_choices": 0},
        {"num_choices": 3},
        {"n": 0},
        {"stop": ("",)},
        {"stop": ("x",) * 9},
        {"echo": 5},
    ],
)
def test_a_presentation_of_another_version_or_out_of_range_is_refused(
    change: dict[str, Any],
) -> None:
    packed = msgspec.msgpack.encode(msgspec.structs.replace(PLAIN, **change))
    with pytest.raises(InternalError, match="presentation"):
        decode_presentation(packed)


def test_a_later_gateway_may_say_more() -> None:
    fields = msgspec.msgpack.decode(encode_presentation(PLAIN))
    assert decode_presentation(msgspec.msgpack.encode([*fields, "news"])) == PLAIN


def test_what_an_older_reader_would_take_for_plain_text_has_a_newer_version() -> None:
    meant = msgspec.structs.replace(PLAIN, tool_parser="hermes", calls_max=1)
    assert decode_presentation(encode_presentation(PLAIN)).version == 1
    assert decode_presentation(encode_presentation(meant)).version == 2
