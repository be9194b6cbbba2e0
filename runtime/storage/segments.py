"""Segments: what a file of the journal looks like, and what of it can be believed. Pure.

A segment starts with a header, and a header *seals* the segment before it: it tells that one's
length, last lsn and checksum. So a segment that is missing, swapped, cut short or changed is
noticed even where each of its records looks well, and a sealed segment is checked at one stroke
instead of record by record.

The last segment has no seal yet. Where its records stop making sense, there are two stories: the
process died in the middle of a write, or something was damaged. They are told apart by what comes
after: behind a torn write there is nothing that could be a record.
"""

from __future__ import annotations

import re
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage.records import (
    HEADER,
    KIND_NAMES,
    RECORD_BYTES_MAX,
    RECORD_HEAD,
    RECORD_HEAD_BYTES,
    STEP,
    frame,
    make_body,
)

FORMAT_VERSION: Final = 1
MAGIC: Final = b"UNDRSTDY"

_HEADER = Struct("<8sHBQQQQIIQd")
HEADER_BYTES: Final = RECORD_HEAD_BYTES + _HEADER.size
_NAME = re.compile(r"segment-(\d{12})\.log")
_HIGH_LSN_AT: Final = 10
"""Where the upper six bytes of the lsn are in a record."""
_RECORD_DAMAGED: Final = "a record is damaged"
_HEADER_DAMAGED: Final = "its header is damaged"
LENGTH_AND_KIND: Final = Struct("<I12xB")
"""Of a record's head, all that it takes to step over it."""


class Seal(NamedTuple):
    """What the next header says about a segment."""

    length: int
    last_lsn: int
    crc: int
    """crc32 of the first ``length`` bytes."""


NO_SEAL: Final = Seal(0, 0, 0)


class Header(NamedTuple):
    """The first record of a segment."""

    lsn: int
    """Its own, the segment's first."""
    has_gap: bool
    """Records are missing before this segment: the disk was full, or failed."""
    number: int
    oldest_needed: int
    """Segments with lower numbers are not needed any more."""
    previous: Seal
    next_serial: int
    """The serial that the next request to be admitted gets."""
    epoch: int
    clock: float


class RawRecord(NamedTuple):
    """Where a record's payload lies."""

    lsn: int
    kind: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Scan:
    """What of a segment can be believed."""

    header: Header | None
    num_records: int
    marks: array[int]
    """Where each record begins that is no step, or in which a request ended."""
    valid_length: int
    """The bytes up to here are whole records."""
    last_lsn: int
    damage: str | None
    """What is wrong with the bytes after ``valid_length``; ``None`` if there are none, or if they
    are a torn write."""
    torn_bytes: int
    crc: int
    """crc32 of the first ``valid_length`` bytes."""

    @property
    def seal(self) -> Seal:
        """What the next header has to say about this segment."""
        return Seal(self.valid_length, self.last_lsn, self.crc)

    def records(self, data: bytes) -> Iterator[RawRecord]:
        """Where the payload of each record lies, in order."""
        position = 0
        while position < self.valid_length:
            length, _, lsn, kind = RECORD_HEAD.unpack_from(data, position)
            start = position + RECORD_HEAD_BYTES
            position = start + length
            yield RawRecord(lsn, kind, start, position)


def segment_name(number: int) -> str:
    """The file name of a segment."""
    return f"segment-{number:012d}.log"


def segment_number(name: str) -> int | None:
    """The number of the segment in a file, or ``None`` if the file is no segment."""
    match = _NAME.fullmatch(name)
    return int(match[1]) if match is not None else None


def encode_header(header: Header) -> bytes:
    """The first record of a segment, whole."""
    payload = _HEADER.pack(
        MAGIC,
        FORMAT_VERSION,
        header.has_gap,
        header.number,
        header.oldest_needed,
        header.previous.length,
        header.previous.last_lsn,
        header.previous.crc,
        header.next_serial,
        header.epoch,
        header.clock,
    )
    body = make_body(header.lsn, HEADER, payload)
    return frame(body) + body


def decode_header(data: bytes) -> Header | None:
    """The header at the beginning of a segment, or ``None`` if there is no whole one.

    Raises:
        ConfigurationError: it is whole, and of a format that this version does not know.
    """
    if len(data) < RECORD_HEAD_BYTES + len(MAGIC) + 2:
        return None
    length, crc, lsn, kind = RECORD_HEAD.unpack_from(data)
    stop = RECORD_HEAD_BYTES + length
    if kind != HEADER or stop > len(data) or zlib.crc32(data[8:stop]) != crc:
        return None
    payload = data[RECORD_HEAD_BYTES:stop]
    if not payload.startswith(MAGIC):
        return None
    version = int.from_bytes(payload[len(MAGIC) : len(MAGIC) + 2], "little")
    if version != FORMAT_VERSION:
        raise ConfigurationError(
            f"the journal has format {version} and this version knows format {FORMAT_VERSION}:"
            " start the version that wrote it, or give this one an empty journal directory"
        )
    if length != _HEADER.size:
        return None
    _, _, gap, number, oldest, previous_length, previous_lsn, previous_crc, serial, epoch, clock = (
        _HEADER.unpack(payload)
    )
    seal = Seal(previous_length, previous_lsn, previous_crc)
    return Header(lsn, bool(gap), number, oldest, seal, serial, epoch, clock)


def scan(data: bytes, seal: Seal | None = None, *, is_last: bool = True) -> Scan:
    """Find the records of a segment, and where they stop making sense.

    Args:
        data: the whole file.
        seal: what the next segment's header says; ``None`` if that cannot be known.
        is_last: whether there is no later segment, so that a torn write is possible.

    Raises:
        ConfigurationError: the segment is of a format that this version does not know.
    """
    surplus = max(0, len(data) - seal.length) if seal is not None else 0
    if surplus:
        # The writer gave the segment up in the middle of a write, and went on in the next one.
        data = data[:-surplus]
    header = decode_header(data)
    crc = zlib.crc32(data)
    if seal is not None and header is not None and (len(data), crc) == (seal.length, seal.crc):
        return _index_sealed(data, header, seal, surplus)
    num_records, marks, valid_length = _follow(data, header)
    last_lsn = header.lsn + num_records - 1 if header is not None else 0
    if seal is not None or not is_last:
        damage = _judge_closed(data, valid_length, seal, has_header=header is not None)
    elif header is not None:
        follower = next(find_records(data, valid_length, last_lsn), None)
        damage = _RECORD_DAMAGED if follower is not None else None
    else:
        damage = _HEADER_DAMAGED if len(data.rstrip(b"\0")) >= HEADER_BYTES else None
    torn_bytes = 0 if damage is not None else len(data) - valid_length + surplus
    crc = crc if valid_length == len(data) else zlib.crc32(data[:valid_length])
    return Scan(header, num_records, marks, valid_length, last_lsn, damage, torn_bytes, crc)


def _index_sealed(data: bytes, header: Header, seal: Seal, surplus: int) -> Scan:
    """Find the marks of a segment whose checksum as a whole is right."""
    marks = array("Q")
    unpack, stop, step, head = LENGTH_AND_KIND.unpack_from, seal.length, STEP, RECORD_HEAD_BYTES
    position = 0
    while position < stop:
        length, kind = unpack(data, position)
        if kind != step:
            marks.append(position)
        position += head + length
    assert position == stop, "a sealed segment holds whole records"
    num_records = seal.last_lsn - header.lsn + 1
    return Scan(header, num_records, marks, stop, seal.last_lsn, None, surplus, seal.crc)


def _follow(data: bytes, header: Header | None) -> tuple[int, array[int], int]:
    """Follow the records from the beginning for as long as each of them is right.

    Gives how many there are, the marks among them, and where the last one ends.
    """
    marks = array("Q")
    position = 0
    if header is None:
        return 0, marks, position
    unpack, crc32, view = RECORD_HEAD.unpack_from, zlib.crc32, memoryview(data)
    last_start = len(data) - RECORD_HEAD_BYTES
    expected = header.lsn
    while position <= last_start:
        length, crc, lsn, kind = unpack(data, position)
        stop = position + RECORD_HEAD_BYTES + length
        if stop > len(data) or lsn != expected or crc32(view[position + 8 : stop]) != crc:
            break
        if kind != STEP:
            marks.append(position)
        position = stop
        expected += 1
    return expected - header.lsn, marks, position


def _judge_closed(
    data: bytes, valid_length: int, seal: Seal | None, *, has_header: bool
) -> str | None:
    """What is wrong with a segment that was written to its end."""
    if not has_header:
        return _HEADER_DAMAGED
    if valid_length < len(data):
        return _RECORD_DAMAGED
    if seal is not None:
        return "it is not the segment that the next one says it is: cut short, or exchanged"
    return None


def find_records(data: bytes, position: int, last_lsn: int) -> Iterator[RawRecord]:
    """Every whole record with a later lsn that lies anywhere after ``position``.

    Only a place where the upper six bytes of the lsn fit needs a closer look. Zeros at the end,
    which a file system leaves behind when a machine dies, are no record.
    """
    stop = len(data.rstrip(b"\0"))
    while position < stop:
        found = _find_record(data, position, stop, last_lsn)
        if found is None:
            return
        yield found
        position, last_lsn = found.stop, found.lsn


def _find_record(data: bytes, position: int, stop: int, last_lsn: int) -> RawRecord | None:
    """The first of them; where one record follows the other it is found at once."""
    at_once = _record_at(data, position, last_lsn)
    if at_once is not None:
        return at_once
    candidates = []
    for high in (last_lsn >> 16, (last_lsn >> 16) + 1):
        pattern = high.to_bytes(6, "little")
        found = data.find(pattern, position + _HIGH_LSN_AT, stop)
        while found >= 0:
            record = _record_at(data, found - _HIGH_LSN_AT, last_lsn)
            if record is not None:
                candidates.append(record)
                break
            found = data.find(pattern, found + 1, stop)
    return min(candidates, key=lambda record: record.start, default=None)


def _record_at(data: bytes, position: int, last_lsn: int) -> RawRecord | None:
    start = position + RECORD_HEAD_BYTES
    if start > len(data):
        return None
    length, crc, lsn, kind = RECORD_HEAD.unpack_from(data, position)
    stop = start + length
    if length > RECORD_BYTES_MAX or stop > len(data) or lsn <= last_lsn:
        return None
    if kind not in KIND_NAMES or zlib.crc32(data[position + 8 : stop]) != crc:
        return None
    return RawRecord(lsn, kind, start, stop)
