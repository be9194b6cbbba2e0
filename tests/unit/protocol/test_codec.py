"""The codec: every message there and back, and nothing else gets in."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.protocol.examples import EXAMPLES, PARAMS, ROWS
from tests.unit.protocol.wire import (
    INTEGERS,
    conforms,
    hints_of,
    is_built,
    messages,
    num_defaults,
    strategy_for,
    wire_fields,
)
from understudy.protocol.codec import (
    ARRAY_LENGTH_MAX,
    FRAME_BYTES_MAX,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_OLDEST,
    TEXT_BYTES_MAX,
    Envelope,
    Frame,
    decode,
    encode,
)
from understudy.protocol.errors import ProtocolError
from understudy.protocol.messages import (
    MESSAGE_TYPES,
    Assign,
    Cancel,
    Capacity,
    Deliver,
    Dying,
    Hello,
    Message,
    Pulse,
    Role,
    StepOutput,
    Submit,
    Welcome,
    tag_of,
)
from understudy.protocol.request import Request, TokenRow

ENVELOPE = Envelope("engine-0.17", 3, 2, 1)
GOLDEN = {
    version: Path(__file__).with_name(f"golden_frames_{version}.txt")
    for version in range(PROTOCOL_VERSION_OLDEST, PROTOCOL_VERSION + 1)
}
ODD_VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    2**64 - 1,
    0.5,
    float("nan"),
    "text",
    b"bytes",
    (),
    (1,),
    ((),),
    ("text", None),
    (1, 2, 3, 4, 5, 6, 7, 8),
    msgpack.ExtType(5, b""),
    {},
)

counters = st.integers(min_value=0, max_value=2**64 - 1)
envelopes = st.builds(Envelope, st.text(max_size=20), counters, counters, counters)
anything = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        INTEGERS,
        st.floats(),
        st.text(max_size=5),
        st.binary(max_size=5),
        st.sampled_from(Role).map(int),
    ),
    lambda inner: st.lists(inner, max_size=4).map(tuple),
    max_leaves=5,
)
each_example = pytest.mark.parametrize(
    "example", EXAMPLES, ids=lambda example: type(example).__name__
)


def pack(*values: Any) -> bytes:
    packed = msgpack.packb(values)
    assert isinstance(packed, bytes)
    return packed


def frame_of(kind: type, fields: tuple[Any, ...], **header: Any) -> bytes:
    parts = {
        "version": PROTOCOL_VERSION_OLDEST,
        "sender": "a",
        "epoch": 0,
        "seq": 0,
        "ack": 0,
        "tag": tag_of(kind),
    }
    return pack(*(parts | header).values(), *fields)


def refuse(raw: bytes) -> None:
    """Assert that bytes are refused in the one way that receivers know, and in a few words."""
    with pytest.raises(ProtocolError) as caught:
        decode(raw)
    assert len(str(caught.value)) < 300


# There and back


@given(envelopes, messages())
@settings(max_examples=400)
def test_every_message_comes_back_as_it_was(envelope: Envelope, message: Message) -> None:
    frame = decode(encode(envelope, message))
    assert frame == Frame(envelope, message)
    assert type(frame.message) is type(message)
    assert is_built(type(message), frame.message)


@each_example
def test_every_example_comes_back_with_all_its_classes(example: Message) -> None:
    frame = decode(encode(ENVELOPE, example))
    assert frame == Frame(ENVELOPE, example)
    assert is_built(type(example), frame.message)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:1], ROWS[1:], ()])
def test_rows_are_really_rebuilt(rows: tuple[TokenRow, ...]) -> None:
    for message in (StepOutput(1, rows), Deliver(rows, "engine-0")):
        decoded = decode(encode(ENVELOPE, message)).message
        assert isinstance(decoded, StepOutput | Deliver)
        assert [type(row) for row in decoded.rows] == [TokenRow] * len(rows)
        for row in decoded.rows:
            assert row.tokens == row[3]
            assert all(type(logprobs) is bytes for logprobs in row.logprobs)


def test_an_integer_where_a_float_is_declared_becomes_a_float() -> None:
    fields = wire_fields(Submit(Request(1, 1, (1,), PARAMS)))
    request = fields[0]
    params = (*request[3][:3], 1, *request[3][4:])
    decoded = decode(frame_of(Submit, ((*request[:3], params, *request[4:]),))).message
    assert isinstance(decoded, Submit)
    assert type(decoded.request.params.temperature) is float


# Golden bytes


def golden_frames(version: int) -> Iterator[tuple[str, bytes]]:
    for line in GOLDEN[version].read_text().splitlines():
        name, _, digits = line.partition(" ")
        yield name, bytes.fromhex(digits)


def test_bytes_on_the_wire_are_what_they_always_were() -> None:
    made = {
        type(example).__name__: encode(ENVELOPE, example, PROTOCOL_VERSION) for example in EXAMPLES
    }
    assert made == dict(golden_frames(PROTOCOL_VERSION))


def test_bytes_of_old_still_mean_what_they_meant() -> None:
    meant = {name: decode(raw) for name, raw in golden_frames(PROTOCOL_VERSION)}
    assert meant == {type(example).__name__: Frame(ENVELOPE, example) for example in EXAMPLES}


def test_bytes_of_the_version_before_still_mean_what_they_meant() -> None:
    examples = {type(example).__name__: example for example in EXAMPLES}
    for name, raw in golden_frames(PROTOCOL_VERSION_OLDEST):
        decoded = decode(raw).message
        assert type(decoded).__name__ == name
        told = msgpack.unpackb(raw, use_list=False)[6:]
        assert_grown(told, wire_fields(decoded))
        assert_grown(told, wire_fields(examples[name]))


def assert_grown(old: Any, new: Any) -> None:
    """Assert that a record holds what an older one held, at its places, and only more behind it."""
    if isinstance(old, tuple):
        assert len(old) <= len(new)
        for old_part, new_part in zip(old, new, strict=False):
            assert_grown(old_part, new_part)
    else:
        assert old == new


def test_who_does_not_say_what_it_speaks_speaks_the_oldest() -> None:
    hello = Hello(Role.ENGINE, "engine-0", 1)
    assert hello.protocol == Welcome(1).protocol == PROTOCOL_VERSION_OLDEST


def test_versions_beside_the_accepted_ones_are_refused() -> None:
    raw = encode(ENVELOPE, EXAMPLES[0], PROTOCOL_VERSION)
    assert decode(raw) == Frame(ENVELOPE, EXAMPLES[0])
    for version in (PROTOCOL_VERSION_OLDEST - 1, PROTOCOL_VERSION + 1):
        refuse(encode(ENVELOPE, EXAMPLES[0], version))


# Older and newer peers


@each_example
def test_fields_that_an_older_peer_leaves_out_take_their_defaults(example: Message) -> None:
    kind = type(example)
    fields = wire_fields(example)
    names = list(hints_of(kind))
    for num_missing in range(len(fields) + 1):
        raw = frame_of(kind, fields[: len(fields) - num_missing])
        if num_missing > num_defaults(kind):
            refuse(raw)
            continue
        decoded = decode(raw).message
        kept = dict(zip(names, fields[: len(fields) - num_missing], strict=False))
        assert wire_fields(decoded)[: len(kept)] == tuple(kept.values())
        for name in names[len(kept) :]:
            assert getattr(decoded, name) == kind.__dataclass_fields__[name].default


@given(st.lists(anything, min_size=1, max_size=3), messages())
def test_fields_that_a_newer_peer_adds_are_ignored(extra: list[Any], message: Message) -> None:
    raw = frame_of(type(message), (*wire_fields(message), *extra))
    assert decode(raw).message == message


def test_nested_records_grow_and_shrink_as_messages_do() -> None:
    row = (1, 1, 0, (5,), 7, 0)
    for newer_or_older in (
        row,
        (*row, ()),
        (*row, (), 3, 4, b"", "new"),
    ):
        decoded = decode(frame_of(StepOutput, (1, (newer_or_older,)))).message
        assert isinstance(decoded, StepOutput)
        assert decoded.rows[0][:6] == row
        assert is_built(StepOutput, decoded)
    refuse(frame_of(StepOutput, (1, (row[:5],))))
    hello = (2, "engine-0", 1, 0, "", "", (1, 2, 3, 4, False, "new"))
    decoded = decode(frame_of(Hello, hello)).message
    assert decoded == Hello(Role.ENGINE, "engine-0", 1, capacity=Capacity(1, 2, 3, 4))


# Hostile bytes


@given(st.binary(max_size=300))
@settings(max_examples=500)
def test_random_bytes_are_refused(raw: bytes) -> None:
    refuse(raw)


@given(st.lists(anything, max_size=10).map(tuple))
def test_random_arrays_are_refused(values: tuple[Any, ...]) -> None:
    refuse(pack(*values))


@each_example
def test_every_truncation_and_every_tail_is_refused(example: Message) -> None:
    raw = encode(ENVELOPE, example)
    for length in range(len(raw)):
        refuse(raw[:length])
    for tail in (b"\x00", b"\xc0", raw):
        refuse(raw + tail)


@given(messages(), st.data())
@settings(max_examples=400)
def test_a_flipped_byte_is_refused_or_still_a_message(
    message: Message, data: st.DataObject
) -> None:
    raw = bytearray(encode(ENVELOPE, message))
    raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode(bytes(raw)).message
    except ProtocolError:
        return
    assert is_built(type(decoded), decoded)


def with_odd_values(hint: Any, value: Any) -> Iterator[Any]:
    """A value as it is on the wire, with each part of it in turn replaced by each odd value."""
    yield from ODD_VALUES
    if type(value) is not tuple:
        return
    for index, item in enumerate(value):
        for odd in with_odd_values(hint, item):
            yield (*value[:index], odd, *value[index + 1 :])


@each_example
def test_a_wrong_value_anywhere_is_refused(example: Message) -> None:
    kind = type(example)
    fields = wire_fields(example)
    num_refused = 0
    for index, field in enumerate(fields):
        for odd in with_odd_values(None, field):
            values = (*fields[:index], odd, *fields[index + 1 :])
            raw = frame_of(kind, values)
            if conforms(kind, values):
                assert is_built(kind, decode(raw).message)
            else:
                refuse(raw)
                num_refused += 1
    assert num_refused > 0 or not fields


@given(st.sampled_from(sorted(MESSAGE_TYPES)), st.data())
@settings(max_examples=200)
def test_fields_get_in_just_when_each_has_its_declared_type(tag: int, data: st.DataObject) -> None:
    kind = MESSAGE_TYPES[tag]
    choices = [st.one_of(strategy_for(hint).map(as_wire), anything) for hint in hints(kind)]
    values = data.draw(st.tuples(*choices))
    raw = frame_of(kind, values)
    if conforms(kind, values):
        assert is_built(kind, decode(raw).message)
    else:
        refuse(raw)


def hints(kind: type) -> list[Any]:
    return list(hints_of(kind).values())


def as_wire(value: Any) -> Any:
    return wire_fields((value,))[0]


@pytest.mark.parametrize("odd", [*ODD_VALUES, 2, 0, "1", 1.0, True], ids=repr)
@pytest.mark.parametrize("name", ["version", "sender", "epoch", "seq", "ack", "tag"])
def test_a_header_takes_one_version_one_text_and_counters(name: str, odd: Any) -> None:
    raw = frame_of(Pulse, (), **{name: odd})
    is_counter = type(odd) is int and odd >= 0
    is_version = is_counter and PROTOCOL_VERSION_OLDEST <= odd <= PROTOCOL_VERSION
    is_taken = {"sender": type(odd) is str, "version": is_version, "tag": False}
    if is_taken.get(name, is_counter):
        assert decode(raw).message == Pulse()
    else:
        refuse(raw)


@pytest.mark.parametrize("length", range(6))
def test_a_short_header_is_refused(length: int) -> None:
    refuse(pack(*(PROTOCOL_VERSION, "a", 0, 0, 0, 4)[:length]))


@pytest.mark.parametrize("tag", [-1, 0, 10, 15, 27, 60, 255, 2**40])
def test_an_unknown_tag_is_refused(tag: int) -> None:
    assert tag not in MESSAGE_TYPES
    refuse(frame_of(Pulse, (), tag=tag))


@pytest.mark.parametrize("value", [None, 1, "text", {}, {"a": 1}, [], [[]], b"\x96"], ids=repr)
def test_a_frame_that_is_no_array_with_a_header_is_refused(value: Any) -> None:
    refuse(msgpack.packb(value))


@pytest.mark.parametrize("depth", [10, 200, 900, 1100, 100_000])
@pytest.mark.parametrize("place", range(8))
def test_deep_nesting_is_refused_wherever_it_stands(place: int, depth: int) -> None:
    nested = b"\x91" * depth + b"\x90"
    parts = [pack(value)[1:] for value in (PROTOCOL_VERSION, "a", 0, 0, 0, tag_of(Cancel), 7)]
    raw = b"".join([*parts[:place], nested, *parts[place + 1 :]])
    if place < len(parts):
        refuse(b"\x97" + raw)
    elif depth < 1000:  # a field of the future: whatever it may be, it is ignored
        assert decode(b"\x98" + raw).message == Cancel(7)
    else:
        refuse(b"\x98" + raw)


@pytest.mark.parametrize("place", range(8))
@pytest.mark.parametrize("code", [0xC6, 0xC9, 0xDB, 0xDD, 0xDF], ids=hex)
@pytest.mark.parametrize("length", [ARRAY_LENGTH_MAX, ARRAY_LENGTH_MAX + 1, 2**31, 2**32 - 1])
def test_a_length_that_is_only_declared_takes_no_memory(code: int, length: int, place: int) -> None:
    declared = bytes([code]) + struct.pack(">I", length)
    parts = [pack(value)[1:] for value in (PROTOCOL_VERSION, "a", 0, 0, 0, tag_of(Dying), "why")]
    raw = b"\x98" + b"".join([*parts[:place], declared, *parts[place + 1 :]])
    tracemalloc.start()
    try:
        refuse(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_declared_lengths_inside_each_other_take_little_memory() -> None:
    declared = b"\xdd" + struct.pack(">I", ARRAY_LENGTH_MAX)
    tracemalloc.start()
    try:
        refuse(b"\x97" + pack(PROTOCOL_VERSION, "a", 0, 0, 0, tag_of(Cancel))[1:] + declared * 1000)
        assert tracemalloc.get_traced_memory()[1] < 128 << 20
    finally:
        tracemalloc.stop()


def test_text_that_is_no_utf_8_is_refused() -> None:
    raw = frame_of(Dying, ("abcd",))
    for bad in (b"ab\xffd", b"a\xed\xb2\x80", b"\xc0\x80cd", b"abc\xc3"):
        refuse(raw.replace(b"abcd", bad))


def test_an_oversize_frame_is_refused_before_it_is_looked_at() -> None:
    refuse(b"\x00" * (FRAME_BYTES_MAX + 1))


# What is too big leaves no sender: no receiver would take it, and a session would repeat it for
# ever.


def test_a_message_larger_than_a_frame_cannot_be_sent() -> None:
    row = TokenRow(2**63 - 1, 1, 0, (2**31,) * 1000, 7, 0)
    with pytest.raises(ProtocolError, match=r"Deliver of \d+ bytes exceeds"):
        encode(ENVELOPE, Deliver((row,) * 4000, "engine-0"))


@pytest.mark.parametrize(
    "message",
    [
        Dying("x" * (TEXT_BYTES_MAX + 1)),
        Assign(Request(1, 1, (1,) * (ARRAY_LENGTH_MAX + 1), PARAMS), 1),
        Assign(Request(1, 1, (1,), PARAMS), 1, (1,) * (ARRAY_LENGTH_MAX + 1)),
        Cancel(2**64),
        Cancel(-(2**63) - 1),
        Dying("a lone \udc80 surrogate"),
    ],
    ids=["text", "prompt", "output", "too large", "too small", "surrogate"],
)
def test_what_no_receiver_would_take_cannot_be_sent(message: Message) -> None:
    with pytest.raises(ProtocolError):
        encode(ENVELOPE, message)


def test_the_largest_that_a_receiver_takes_can_be_sent() -> None:
    request = Request(1, 1, (1,) * ARRAY_LENGTH_MAX, PARAMS)
    for message in (Dying("x" * TEXT_BYTES_MAX), Assign(request, 1, (300,) * ARRAY_LENGTH_MAX)):
        assert decode(encode(ENVELOPE, message)).message == message
