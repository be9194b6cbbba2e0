from __future__ import annotations

import zlib

import pytest

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage import records
from understudy.runtime.storage.records import EPOCH, RECORD_HEAD_BYTES
from understudy.runtime.storage.segments import (
    HEADER_BYTES,
    MAGIC,
    Header,
    Seal,
    decode_header,
    encode_header,
    scan,
    segment_name,
    segment_number,
)

HEADER = Header(
    lsn=100,
    has_gap=False,
    number=7,
    oldest_needed=3,
    previous=Seal(1, 2, 3),
    next_serial=4,
    epoch=5,
    clock=6.5,
)


def record(lsn: int, kind: int = EPOCH, payload: bytes = b"12345678") -> bytes:
    body = records.make_body(lsn, kind, payload)
    return records.frame(body) + body


def segment(count: int = 5) -> bytes:
    return encode_header(HEADER) + b"".join(record(101 + i) for i in range(count))


def seal_of(data: bytes, count: int = 5) -> Seal:
    return Seal(len(data), 100 + count, zlib.crc32(data))


def test_a_header_comes_back() -> None:
    assert decode_header(encode_header(HEADER)) == HEADER
    assert len(encode_header(HEADER)) == HEADER_BYTES


def test_a_header_of_a_newer_format_says_what_to_do() -> None:
    data = bytearray(encode_header(HEADER))
    at = RECORD_HEAD_BYTES + len(MAGIC)
    data[at : at + 2] = (9).to_bytes(2, "little")
    data[4:8] = zlib.crc32(data[8:]).to_bytes(4, "little")

    with pytest.raises(ConfigurationError, match=r"format 9 .* start the version that wrote it"):
        decode_header(bytes(data))


def test_a_damaged_version_is_damage_and_no_newer_format() -> None:
    data = bytearray(encode_header(HEADER))
    data[RECORD_HEAD_BYTES + len(MAGIC)] ^= 8

    assert decode_header(bytes(data)) is None


def test_only_segments_have_a_number() -> None:
    assert segment_number(segment_name(42)) == 42
    assert segment_number("lock") is None
    assert segment_number(segment_name(42) + ".damaged") is None


@pytest.mark.parametrize("is_sealed", [False, True])
def test_a_whole_segment_is_read_whole(is_sealed: bool) -> None:
    data = segment()

    found = scan(data, seal_of(data) if is_sealed else None)

    assert found.header == HEADER
    assert found.damage is None
    assert (found.valid_length, found.last_lsn, found.torn_bytes) == (len(data), 105, 0)
    assert [one.lsn for one in found.records(data)] == [100, 101, 102, 103, 104, 105]
    assert all(data[one.start : one.stop] == b"12345678" for one in list(found.records(data))[1:])
    assert found.seal == seal_of(data)


def test_a_cut_anywhere_in_the_last_record_loses_that_record_only() -> None:
    data = segment()
    last_at = len(segment(4))
    for length in range(last_at, len(data)):
        found = scan(data[:length])

        assert found.damage is None
        assert (found.valid_length, found.last_lsn) == (last_at, 104)
        assert found.torn_bytes == length - last_at


def test_zeros_behind_a_cut_are_torn_and_no_damage() -> None:
    data = segment()

    found = scan(data[:-3] + bytes(5000))

    assert found.damage is None
    assert found.last_lsn == 104


def test_every_flipped_bit_before_the_last_record_is_seen() -> None:
    data = segment()
    last_at = len(segment(4))
    for offset in range(last_at):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit

            found = scan(bytes(flipped))

            assert found.damage is not None, (offset, bit)
            assert found.valid_length <= offset


def test_every_flipped_bit_of_the_last_record_costs_that_record() -> None:
    data = segment()
    last_at = len(segment(4))
    for offset in range(last_at, len(data)):
        flipped = bytearray(data)
        flipped[offset] ^= 1

        found = scan(bytes(flipped))

        assert (found.valid_length, found.last_lsn) == (last_at, 104)


def test_every_flipped_bit_of_a_sealed_segment_is_seen() -> None:
    data = segment()
    for offset in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << bit

            found = scan(bytes(flipped), seal_of(data), is_last=False)

            assert found.damage is not None, (offset, bit)
            assert found.valid_length <= offset


def test_a_sealed_segment_may_not_be_cut() -> None:
    data = segment()

    assert scan(data[: len(segment(4))], seal_of(data), is_last=False).damage is not None
    assert scan(b"", seal_of(data), is_last=False).damage is not None


def test_another_segment_with_whole_records_does_not_fit_the_seal() -> None:
    other = encode_header(HEADER) + b"".join(
        record(101 + i, payload=b"otherwise") for i in range(5)
    )

    assert scan(other, seal_of(segment()), is_last=False).damage is not None


def test_what_a_writer_gave_up_behind_a_seal_does_not_count() -> None:
    data = segment()

    found = scan(data + record(106)[:-2], seal_of(data), is_last=False)

    assert found.damage is None
    assert found.last_lsn == 105
    assert found.torn_bytes == len(record(106)) - 2


def test_a_missing_record_is_damage_although_every_other_is_whole() -> None:
    data = segment(2) + record(104) + record(105)

    assert scan(data).damage is not None


def test_a_header_that_was_not_written_whole_is_torn() -> None:
    for length in range(HEADER_BYTES):
        found = scan(segment()[:length])

        assert found.header is None
        assert found.damage is None
        assert found.torn_bytes == length


def test_a_closed_segment_without_a_seal_has_no_torn_end() -> None:
    assert scan(segment()[:-1], is_last=False).damage is not None
    assert scan(segment(), is_last=False).damage is None


def test_the_search_for_later_records_crosses_the_lsn_s_upper_bytes() -> None:
    header = HEADER._replace(lsn=0xFFFE)
    data = encode_header(header) + record(0xFFFF) + record(0x10000) + record(0x10001)
    damaged = bytearray(data)
    damaged[HEADER_BYTES] ^= 1

    assert scan(bytes(damaged)).damage is not None
