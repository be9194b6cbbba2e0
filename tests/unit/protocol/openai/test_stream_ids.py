from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.openai.stream_ids import (
    EventIds,
    StreamId,
    StreamPosition,
    parse_position,
    parse_stream_id,
)

GROUP_IDS = st.integers(0, 2**63 - 1)
POSITIONS = st.lists(st.integers(0, 10**9), min_size=1, max_size=128)


@given(group_id=GROUP_IDS, positions=POSITIONS, data=st.data())
def test_an_events_id_is_read_as_it_was_written(
    group_id: int, positions: list[int], data: st.DataObject
) -> None:
    index = data.draw(st.integers(0, len(positions) - 1))
    position = data.draw(st.integers(0, 10**9))
    line = EventIds(group_id, positions).line(index, position).decode()
    positions[index] = position
    assert parse_position(line.removeprefix("id: ")) == StreamPosition(group_id, tuple(positions))


def test_the_id_of_a_single_choices_event_is_group_and_position() -> None:
    assert EventIds(0xABC, [0]).line(0, 7) == b"id: 0000000000000abc.7"


def test_positions_are_remembered_from_event_to_event() -> None:
    event_ids = EventIds(1, [0, 0, 0])
    event_ids.line(1, 5)
    assert event_ids.line(2, 9) == b"id: 0000000000000001.0-5-9"


def test_positions_may_stand_alone() -> None:
    assert parse_position("12") == StreamPosition(None, (12,))
    assert parse_position("12-0") == StreamPosition(None, (12, 0))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "1-",
        "-",
        "1.2",
        "x",
        "1e3",
        "٣",
        " 1",
        "1\n",
        "abc.1",
        "0000000000000abc.",
        "9" * 11,
    ],
)
def test_what_is_no_position_is_not_read_as_one(text: str) -> None:
    assert parse_position(text) is None


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    parse_position(text)
    parse_stream_id(text)


def test_a_stream_is_named_with_or_without_its_prefix() -> None:
    assert parse_stream_id("chatcmpl-0000000000000abc") == StreamId("chatcmpl", 0xABC)
    assert parse_stream_id("cmpl-0000000000000abc") == StreamId("cmpl", 0xABC)
    assert parse_stream_id("0000000000000abc") == StreamId(None, 0xABC)


@pytest.mark.parametrize(
    "text", ["", "abc", "resp-0000000000000abc", "0000000000000ABC", "cmpl-", "00000000000000abc"]
)
def test_what_is_no_stream_is_not_read_as_one(text: str) -> None:
    assert parse_stream_id(text) is None
