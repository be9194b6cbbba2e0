"""The survey: the first look at a journal, which reads everything and understands only the rest.

A recovery wants the living requests and those that ended lately, and in a journal of a gigabyte
that is a small part. So the survey checks every byte, but looks only at what begins and ends
requests; then it is known whose tokens are wanted and from which segment on.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.storage.disk import Disk
from understudy.runtime.storage.image import SERIAL_MASK, Retention
from understudy.runtime.storage.records import (
    ADMIT,
    ASSIGN,
    CHECKPOINT,
    CLOCK,
    END,
    EPOCH,
    FINAL_STEP,
    HEADER,
    RECORD_HEAD_BYTES,
    RETIRE,
    STEP,
    decode_admit_ids,
    decode_assign,
    decode_checkpoint_end,
    decode_clock,
    decode_end_mark,
    decode_epoch,
)
from understudy.runtime.storage.segments import (
    HEADER_BYTES,
    LENGTH_AND_KIND,
    NO_SEAL,
    Header,
    RawRecord,
    Scan,
    Seal,
    decode_header,
    find_records,
    scan,
    segment_name,
    segment_number,
)
from understudy.runtime.storage.steps import read_ends

_MISSING: Final = "the file is missing"


@dataclass(slots=True)
class Part:
    """One segment, as it was found."""

    number: int
    scan: Scan | None = None
    """``None`` if the file is missing or cannot be read."""
    damage: str | None = None
    num_bytes: int = 0
    rest: tuple[RawRecord, ...] = ()
    """Whole records behind the damage: they are not believed for what they say of tokens, but for
    who came and went."""

    @property
    def name(self) -> str:
        """The file's name."""
        return segment_name(self.number)

    @property
    def offset(self) -> int:
        """Up to where the segment can be believed."""
        return self.scan.valid_length if self.scan is not None else 0


class _Span:
    """What the survey knows of a request."""

    __slots__ = ("base", "ended_at", "length", "num_bytes")

    def __init__(self, base: int, num_bytes: int) -> None:
        self.base = base
        self.num_bytes = num_bytes
        self.length = 0
        self.ended_at: float | None = None


@dataclass(slots=True)
class Survey:
    """What a journal consists of, and what of it is wanted."""

    parts: list[Part] = field(default_factory=list)
    """Every segment that is still needed, oldest first, without gaps in the numbers."""
    leftovers: list[str] = field(default_factory=list)
    """Files that are needed no more."""
    kept: frozenset[int] = frozenset()
    """The serials of the requests that are alive or ended lately."""
    start: int = 0
    """The first segment that says anything about those requests."""
    next_serial: int = 1
    clock: float = 0.0
    epoch: int = 0
    oldest_needed: int = 0
    records: int = 0

    torn_bytes: int = 0
    lost_admissions: int = 0
    """Requests that were admitted and of which nothing can be read."""
    unseen: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of serials that were given out where nothing can be read."""

    @property
    def last_number(self) -> int:
        """The number of the latest segment; 0 if there is none."""
        return self.parts[-1].number if self.parts else 0

    @property
    def last_seal(self) -> Seal:
        """What the header of the next segment has to say about the latest one."""
        last = self.parts[-1].scan if self.parts else None
        return last.seal if last is not None else NO_SEAL

    @property
    def last_lsn(self) -> int:
        """The highest lsn that was read."""
        return max((part.scan.last_lsn for part in self.parts if part.scan), default=0)


class _Numbered(NamedTuple):
    number: int
    name: str


def survey(disk: Disk, retention: Retention, now: float) -> Survey:
    """Look over a journal.

    Raises:
        ConfigurationError: it has a format that this version does not know.
        OSError: the directory cannot be read.
    """
    found = Survey()
    spans: dict[int, _Span] = {}
    files = [
        _Numbered(number, name)
        for name in disk.names()
        if (number := segment_number(name)) is not None
    ]
    _drop_torn(disk, found, files)
    for index, (number, _) in enumerate(files):
        following = files[index + 1] if index + 1 < len(files) else None
        while found.parts and found.parts[-1].number + 1 < number:
            missing = found.parts[-1].number + 1
            found.parts.append(Part(missing, damage=_MISSING))
        part, data = _read(disk, number, following)
        found.parts.append(part)
        _take_in(found, spans, part, data)
        _prune(found, spans, retention)
    found.torn_bytes += sum(part.scan.torn_bytes for part in found.parts if part.scan)
    _drop_leftovers(found)
    _choose(found, spans, retention, now)
    return found


def _read(disk: Disk, number: int, following: _Numbered | None) -> tuple[Part, bytes]:
    """Read one segment and judge it by itself and by the header of the next one."""
    part = Part(number)
    try:
        data = disk.read(part.name)
    except OSError as error:
        part.damage = f"the file cannot be read: {error.strerror}"
        return part, b""
    part.num_bytes = len(data)
    try:
        seal = _seal_in(disk, number, following)
        result = scan(data, seal, is_last=following is None)
    except ConfigurationError as error:
        raise ConfigurationError(f"{disk.name}: {error}") from error
    part.damage = result.damage
    if result.header is not None and result.header.number != number:
        part.damage = f"it is segment {result.header.number} under another's name"
    elif result.header is not None or result.damage is None:
        part.scan = result
    return part, data


def _seal_in(disk: Disk, number: int, following: _Numbered | None) -> Seal | None:
    """What the header of the next segment says about this one."""
    if following is None or following.number != number + 1:
        return None
    try:
        header = decode_header(disk.read(following.name, HEADER_BYTES))
    except OSError:
        return None
    return header.previous if header is not None and header.number == number + 1 else None


def _take_in(found: Survey, spans: dict[int, _Span], part: Part, data: bytes) -> None:
    """Note what begins and ends in a segment."""
    if part.scan is not None and part.scan.header is not None:
        header = part.scan.header
        found.records += part.scan.num_records
        if found.parts[0] is not part and header.next_serial != found.next_serial:
            found.unseen.append((found.next_serial, header.next_serial))
        found.next_serial = header.next_serial
        _take_header(found, spans, header)
        _take_marks(found, spans, part.number, part.scan, data)
    if part.damage is not None:
        rest = find_records(data, part.offset, found.last_lsn)
        part.rest = tuple(record for record in rest if record.kind not in {HEADER, STEP})
        for _, kind, start, stop in part.rest:
            _take_record(found, spans, part.number, data, kind, start, stop)


def _take_header(found: Survey, spans: dict[int, _Span], header: Header) -> None:
    found.oldest_needed = max(found.oldest_needed, header.oldest_needed)
    found.epoch = max(found.epoch, header.epoch)
    if header.clock < found.clock:
        # The machine started anew, and its clock with it.
        for span in spans.values():
            if span.ended_at is not None:
                span.ended_at += header.clock - found.clock
    found.clock = header.clock


def _take_marks(
    found: Survey, spans: dict[int, _Span], number: int, result: Scan, data: bytes
) -> None:
    """Take in what a segment marks."""
    unpack = LENGTH_AND_KIND.unpack_from
    for position in result.marks:
        length, kind = unpack(data, position)
        start = position + RECORD_HEAD_BYTES
        _take_record(found, spans, number, data, kind, start, start + length)


def _take_record(
    found: Survey,
    spans: dict[int, _Span],
    number: int,
    data: bytes,
    kind: int,
    start: int,
    stop: int,
) -> None:
    if kind == ADMIT:
        serial, _ = decode_admit_ids(data, start)
        spans[serial] = _Span(number, stop - start)
        if serial == found.next_serial:
            found.next_serial = (serial + 1) & SERIAL_MASK
        else:
            _note_serial(found, serial, is_admitted=True)
    elif kind == ASSIGN:
        # Its admission may be in what is damaged.
        assigned = decode_assign(data, start, stop)
        _note_serial(found, assigned.serial, is_admitted=False)
        found.epoch = max(found.epoch, assigned.epoch)
    elif kind in {END, FINAL_STEP}:
        marks = read_ends(data, start) if kind == FINAL_STEP else (decode_end_mark(data, start),)
        for mark in marks:
            ended = spans.get(mark.serial)
            if ended is not None:
                ended.length = mark.length
                ended.ended_at = found.clock
    elif kind == CHECKPOINT:
        serial, _ = decode_admit_ids(data, start)
        finish, length, ended_at = decode_checkpoint_end(data, start)
        span = spans[serial] = _Span(number, stop - start)
        span.length = length
        span.ended_at = ended_at if finish else None
    elif kind == CLOCK:
        found.clock = decode_clock(data, start)
    elif kind == EPOCH:
        found.epoch = max(found.epoch, decode_epoch(data, start))
    elif kind == RETIRE:
        found.oldest_needed = max(found.oldest_needed, decode_epoch(data, start))


def _prune(found: Survey, spans: dict[int, _Span], retention: Retention) -> None:
    """Forget who ended too long ago, so that a long journal takes no more memory than a short."""
    if not found.unseen:
        horizon = found.clock - retention.seconds
        gone = [
            s for s, one in spans.items() if one.ended_at is not None and one.ended_at <= horizon
        ]
        for serial in gone:
            del spans[serial]


def _note_serial(found: Survey, serial: int, *, is_admitted: bool) -> None:
    """Serials are given out in order: one that comes too early says that others are missing."""
    if (serial - found.next_serial) & SERIAL_MASK < SERIAL_MASK // 2:
        following = (serial + 1) & SERIAL_MASK
        end = serial if is_admitted else following
        if found.records and end != found.next_serial:
            found.unseen.append((found.next_serial, end))
        found.next_serial = following


def _drop_torn(disk: Disk, found: Survey, files: list[_Numbered]) -> None:
    """A latest segment of which not even the header was written whole is none."""
    with contextlib.suppress(OSError):
        while files:
            name = files[-1].name
            try:
                if decode_header(disk.read(name, HEADER_BYTES)) is not None:
                    return
                result = scan(disk.read(name))
            except ConfigurationError as error:
                raise ConfigurationError(f"{disk.name}: {error}") from error
            if result.damage is not None:
                return
            found.torn_bytes += result.torn_bytes
            found.leftovers.append(name)
            files.pop()


def _drop_leftovers(found: Survey) -> None:
    """Put aside what is needed no more, and notice what is needed and not there."""
    found.leftovers += [part.name for part in found.parts if part.number < found.oldest_needed]
    found.parts = [part for part in found.parts if part.number >= found.oldest_needed]
    if found.parts and found.oldest_needed:
        first = found.parts[0].number
        missing = [Part(n, damage=_MISSING) for n in range(found.oldest_needed, first)]
        found.parts = missing + found.parts


def _choose(found: Survey, spans: dict[int, _Span], retention: Retention, now: float) -> None:
    """Choose whose tokens are wanted: of all who live, and of the latest who ended."""
    # After the machine started anew its clock is behind the journal's: no time has passed then.
    now = max(now, found.clock)
    needed = {s: span for s, span in spans.items() if span.base >= found.oldest_needed}
    kept = {serial for serial, span in needed.items() if span.ended_at is None}
    ended = [
        (span.ended_at, serial)
        for serial, span in needed.items()
        if span.ended_at is not None and span.ended_at + retention.seconds > now
    ]
    room = retention.bytes_max
    for _, serial in sorted(ended, reverse=True):
        room -= spans[serial].num_bytes + 4 * spans[serial].length
        if room < 0:
            break
        kept.add(serial)
    found.kept = frozenset(kept)
    for first, end in found.unseen:
        count = (end - first) & SERIAL_MASK
        found.lost_admissions += count - sum((s - first) & SERIAL_MASK < count for s in spans)
    last = found.parts[-1].number if found.parts else 0
    # Usage is repeated at the beginning of each segment, and the latest may be torn just there.
    found.start = min((spans[serial].base for serial in kept), default=last)
    found.start = min(found.start, last - 1)
