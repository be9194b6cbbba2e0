"""The journal: everything that was promised, on disk before anybody hears of it.

The supervisor appends what a turn brings and commits before the turn's messages leave: one
write(2). After a crash, ``Journal.open`` gives back every request that lives and those that ended
lately. What may be lost, by policy:

==========  ==============================================  =====================================
policy      what a commit does                              what can be lost
==========  ==============================================  =====================================
`process`   write                                           nothing when processes die, however
                                                            they die; when the machine dies, what
                                                            the kernel had not written (30 s)
`group`     write; fdatasync every 100 ms beside the turns  nothing when processes die; 100 ms and
                                                            one fdatasync when the machine dies
`strict`    write and fdatasync                             nothing
==========  ==============================================  =====================================

A disk that is full or fails does not stop the service: the journal is *degraded*, says so, keeps
nothing but its image, and tries again from time to time. Then it begins a new segment, which says
that something is missing before it, and copies everything it holds into that, a portion with each
commit; when all of it is there, the journal is whole again. While it is degraded a crash of the
supervisor loses what the disk did not take: living requests go on from where they were before.

The same copying is compaction: when most of the journal concerns nobody any more, what is still
held moves to the latest segment, and the older ones are removed. One thread uses a journal.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import FinishReason, TokenRow
from understudy.runtime.storage import records
from understudy.runtime.storage.compaction import Compaction
from understudy.runtime.storage.disk import Disk
from understudy.runtime.storage.image import HeldRequest, Retention, describe
from understudy.runtime.storage.records import (
    Admit,
    Assign,
    CacheHit,
    End,
    Epoch,
    Forget,
    Record,
    Step,
    Usage,
    Vector,
)
from understudy.runtime.storage.recovery import (
    DAMAGE_CODE,
    DAMAGE_MESSAGE,
    Recovered,
    Recovery,
    recover,
)
from understudy.runtime.storage.segment_writer import SegmentWriter, SyncPolicy
from understudy.runtime.storage.segments import Header, encode_header, segment_name
from understudy.runtime.storage.steps import write_steps
from understudy.runtime.storage.survey import Survey

CLOCK_EVERY_S: Final = 1.0
DAMAGED_SUFFIX: Final = ".damaged"
_NOT_OURS: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""Errors that the operator has to mend, and that no waiting does."""


@dataclass(frozen=True, slots=True)
class JournalOptions:
    """How a journal works."""

    policy: SyncPolicy = SyncPolicy.PROCESS
    retention: Retention = field(default_factory=Retention)
    segment_bytes: int = 64 * 1024 * 1024
    """A segment is full when it has so many bytes."""
    compact_above_bytes: int = 256 * 1024 * 1024
    """Below this size nothing is compacted."""
    segments_max: int = 64
    """With more segments than that the journal is compacted whatever its size."""
    portion_bytes: int = 64 * 1024
    """How much compaction adds to a commit, or one request if that is more."""
    sync_every_s: float = 0.1
    retry_min_s: float = 1.0
    retry_max_s: float = 30.0
    """How long a degraded journal waits before it tries again; it doubles from one to the other."""


class Degraded(NamedTuple):
    """The disk does not take what is written."""

    reason: str
    since: float


class CommitResult(NamedTuple):
    """What a commit did."""

    num_bytes: int
    is_written: bool
    """Whether a crash of this process cannot lose what was committed."""
    is_durable: bool
    """Whether a crash of the machine cannot either."""


@dataclass(slots=True)
class JournalStatistics:
    """Counts since the journal was opened."""

    commits: int = 0
    bytes_written: int = 0
    degradations: int = 0
    compactions: int = 0


class Opened(NamedTuple):
    """A journal that is ready, and what it says."""

    journal: Journal
    recovery: Recovery


class Journal:
    """The journal of one supervisor."""

    def __init__(self, disk: Disk, options: JournalOptions, recovered: Recovered) -> None:
        _, self._image, survey = recovered
        self.statistics = JournalStatistics()
        self.degraded: Degraded | None = None
        """Why and since when the disk does not hold everything; ``None`` if it does."""
        self._disk = disk
        self._options = options
        self._pending: list[Record] = []
        self._sizes = {part.number: part.num_bytes for part in survey.parts}
        self._damaged = {part.number for part in survey.parts if part.damage is not None}
        self._oldest_needed = min(self._sizes, default=survey.oldest_needed)
        self._writer = SegmentWriter(
            disk,
            options.policy,
            sync_every_s=options.sync_every_s,
            number=survey.last_number,
            seal=survey.last_seal,
        )
        self._lsn = survey.last_lsn + 1
        """Of the next record."""
        self._compaction: Compaction | None = None
        self._has_gap = False
        """Whether records are missing before the next segment."""
        self._error: OSError | None = None
        """What the disk said when it last refused."""
        self._retry_at = 0.0
        self._retry_s = options.retry_min_s
        self._now = 0.0

    @classmethod
    def open(cls, disk: Disk, options: JournalOptions, now: float) -> Opened:
        """Take a directory, read what is in it, and be ready to go on in a new segment.

        Requests that damage has made uncertain end here, with an error; ``Recovery.affected``
        says whose clients are to be told. Those in ``Recovery.live`` go on. On a disk that is
        full the journal starts degraded.

        Raises:
            ConfigurationError: another process has the directory, it cannot be written, or it
                holds a journal of another format.
        """
        _lock(disk)
        try:
            recovered = recover(disk, options.retention, now)
        except (OSError, ConfigurationError) as error:
            disk.close()
            if isinstance(error, OSError):
                raise _unusable(disk, error) from error
            raise
        _clear_up(disk, recovered.survey)
        journal = cls(disk, options, recovered)
        journal.append(
            [
                End(_id_of(request), FinishReason.ERROR, DAMAGE_CODE, DAMAGE_MESSAGE)
                for request in recovered.recovery.affected
                if request.finish is None
            ]
        )
        if recovered.recovery.damage:
            journal._start_compaction()
        journal._sync_old(now)
        journal.commit(now)
        if journal._error is not None and journal._error.errno in _NOT_OURS:
            disk.close()
            raise _unusable(disk, journal._error)
        return Opened(journal, recovered.recovery)

    @property
    def wake_at(self) -> float | None:
        """When to commit even if nothing was appended; ``None`` when there is no need."""
        if not self._writer.is_open:
            return self._retry_at
        if self._compaction is not None and self._compaction.is_moving:
            return self._now
        return self._writer.wake_at(self._now)

    def append(self, added: Sequence[Record]) -> None:
        """Take in what happened, in order. It is on disk after the next commit."""
        self._pending += added

    def commit(self, now: float) -> CommitResult:
        """Write what was appended since the last commit, in one write.

        Never raises for the disk's sake: what it does not take makes the journal degraded.
        """
        self._now = now
        self._image.expire(now)
        self._begin_if_due(now)
        parts: list[bytes] = []
        if self._writer.is_open and self._writer.is_empty:
            parts.append(self._header())
            self._repeat_usage(parts)
        self._encode(parts, now)
        if self._writer.is_open and self._compaction is not None:
            self._move_portion(self._compaction, parts)
        data = b"".join(parts)
        is_written = self._writer.is_open and self._write(data, now)
        self.statistics.commits += 1
        is_durable = is_written and self._writer.durable_lsn >= self._lsn - 1
        return CommitResult(len(data) if is_written else 0, is_written, is_durable)

    def held(self, request_id: int) -> HeldRequest | None:
        """A request as of the last commit: living, or ended not longer ago than is retained."""
        found = self._image.get(request_id)
        return describe(found) if found is not None else None

    def close(self, now: float) -> None:
        """Commit, bring everything onto the medium, and let others have the directory."""
        self.commit(now)
        with contextlib.suppress(OSError):
            self._writer.finish()
        self._disk.close()

    @property
    def size_bytes(self) -> int:
        """The length of all segments."""
        return sum(self._sizes.values())

    # From records to bytes

    def _encode(self, parts: list[bytes], now: float) -> None:
        """Encode everything appended. The image takes it in even if the disk will not."""
        pending, self._pending = self._pending, []
        if pending and now >= self._image.clock + CLOCK_EVERY_S:
            self._image.set_clock(now)
            self._add(parts, records.CLOCK, records.encode_clock(now))
        for record in pending:
            if type(record) is Step:
                self._encode_rows(record.rows, parts)
            else:
                self._encode_event(record, parts)

    def _encode_rows(self, rows: tuple[TokenRow, ...], parts: list[bytes]) -> None:
        if rows:
            for body in write_steps(self._image, rows, self._lsn, self._image.clock):
                parts += (records.frame(body), body)
                self._lsn += 1

    def _encode_event(self, record: Record, parts: list[bytes]) -> None:
        image = self._image
        match record:
            case Step(rows):
                self._encode_rows(rows, parts)
            case Admit():
                packed = records.pack_admit(record)
                request_id = record.request.request_id
                base = self._segment if self._writer.is_open else 0
                held = image.admit(request_id, packed, base)
                payload = records.encode_admit(held.serial, request_id, packed)
                self._add(parts, records.ADMIT, payload)
            case Assign():
                held = image.live[record.request_id]
                held.attempt, held.epoch = record.attempt, record.epoch
                held.engine = record.engine
                image.epoch = max(image.epoch, record.epoch)
                self._add(parts, records.ASSIGN, records.encode_assign(held.serial, record))
            case CacheHit(request_id, num_tokens):
                held = image.live[request_id]
                held.num_cached_tokens = num_tokens
                payload = records.encode_cache_hit(held.serial, num_tokens)
                self._add(parts, records.CACHE_HIT, payload)
            case Vector(request_id, vector):
                held = image.live[request_id]
                held.vector = vector
                self._add(parts, records.VECTOR, records.encode_vector(held.serial, vector))
            case End(request_id, reason, code, message):
                held = image.live[request_id]
                image.end(held, reason, image.clock, code, message)
                mark = records.EndMark(held.serial, reason, len(held.output), held.prefix_hash)
                self._add(parts, records.END, records.encode_end(mark, code, message))
            case Forget(request_id):
                if (ended := image.ended.get(request_id)) is not None:
                    image.forget(ended)
                self._add(parts, records.FORGET, records.encode_epoch(request_id))
            case Usage():
                image.note_usage(record)
                self._add(parts, records.USAGE, records.encode_usage(record))
            case Epoch(highest):
                image.epoch = max(image.epoch, highest)
                self._add(parts, records.EPOCH, records.encode_epoch(highest))

    def _add(self, parts: list[bytes], kind: int, payload: bytes) -> None:
        body = records.make_body(self._lsn, kind, payload)
        parts += (records.frame(body), body)
        self._lsn += 1

    def _header(self) -> bytes:
        header = Header(
            lsn=self._lsn,
            has_gap=self._has_gap,
            number=self._segment,
            oldest_needed=self._oldest_needed,
            previous=self._writer.seal,
            next_serial=self._image.next_serial,
            epoch=self._image.epoch,
            clock=self._image.clock,
        )
        self._lsn += 1
        return encode_header(header)

    def _repeat_usage(self, parts: list[bytes]) -> None:
        """Every segment begins with all that is known of usage: those before it may go."""
        for days in self._image.usage.values():
            for usage in days.values():
                self._add(parts, records.USAGE, records.encode_usage(usage))

    # Segments

    @property
    def _segment(self) -> int:
        """The segment that the next record goes to."""
        return self._writer.number + self._writer.is_empty

    def _begin_if_due(self, now: float) -> None:
        """Begin a segment if there is none, or the present one is full."""
        was_open = self._writer.is_open
        if was_open and self._writer.length < self._options.segment_bytes:
            return
        if not was_open and now < self._retry_at:
            return
        try:
            self._writer.begin()
        except OSError as error:
            self._degrade(error, now)
            return
        self._image.part_all()
        if (not was_open and self.degraded is not None) or self._is_too_large():
            self._start_compaction()

    def _sync_old(self, now: float) -> None:
        """Bring onto the medium what an earlier process had only written."""
        if self._options.policy is SyncPolicy.PROCESS:
            return
        try:
            for number in self._sizes:
                self._disk.sync(segment_name(number))
        except FileNotFoundError:
            pass  # It is missing, and recovery has said so.
        except OSError as error:
            self._degrade(error, now)

    def _write(self, data: bytes, now: float) -> bool:
        """Write one turn, and look after syncs and what waits for them."""
        compaction = self._compaction
        try:
            if data:
                self._writer.write(data, self._lsn - 1)
                self._has_gap = False
                self._sizes[self._writer.number] = self._writer.length
                self.statistics.bytes_written += len(data)
            if compaction is not None and compaction.retire_lsn is not None:
                self._writer.want_sync()
            self._writer.tend(now)
        except OSError as error:
            self._degrade(error, now)
            return False
        if compaction is not None and compaction.is_over(self._writer.durable_lsn):
            self._finish_compaction(compaction)
        return True

    def _degrade(self, error: OSError, now: float) -> None:
        """The disk refused: go on without it for a while."""
        self._writer.abandon()
        self._compaction = None
        self._has_gap = True
        self._error = error
        self._image.unbase()
        self._retry_at = now + self._retry_s
        self._retry_s = min(2 * self._retry_s, self._options.retry_max_s)
        if self.degraded is None:
            self.statistics.degradations += 1
            self.degraded = Degraded(error.strerror or str(error), now)

    # Compaction

    def _is_too_large(self) -> bool:
        if self._compaction is not None:
            return False
        size = self.size_bytes
        is_many = len(self._sizes) > self._options.segments_max
        return is_many or (
            size > self._options.compact_above_bytes and size > 2 * self._image.num_bytes()
        )

    def _start_compaction(self) -> None:
        """Move everything that is held into the segment that is about to begin."""
        self._compaction = Compaction(self._image, self._writer.number + 1)

    def _move_portion(self, compaction: Compaction, parts: list[bytes]) -> None:
        for payload in compaction.portion(self._segment, self._options.portion_bytes):
            self._add(parts, records.CHECKPOINT, records.encode_checkpoint(payload))
        if not compaction.is_moving and compaction.retire_lsn is None:
            compaction.retire_lsn = self._lsn
            self._add(parts, records.RETIRE, records.encode_epoch(compaction.below))

    def _finish_compaction(self, compaction: Compaction) -> None:
        """Everything is in the later segments, on the medium: the older ones can go."""
        for number in [number for number in self._sizes if number < compaction.below]:
            name = segment_name(number)
            # A file that cannot go now is removed when the journal is opened next time.
            with contextlib.suppress(OSError):
                if number in self._damaged:
                    self._disk.rename(name, name + DAMAGED_SUFFIX)
                else:
                    self._disk.remove(name)
            del self._sizes[number]
        self._damaged.clear()
        self._oldest_needed = compaction.below
        self._compaction = None
        self.statistics.compactions += 1
        self.degraded = None
        self._retry_s = self._options.retry_min_s


def _lock(disk: Disk) -> None:
    try:
        disk.lock()
    except BlockingIOError as error:
        raise ConfigurationError(
            f"{disk.name}: another supervisor has this journal: stop it, or give this one"
            " another journal directory"
        ) from error
    except OSError as error:
        raise _unusable(disk, error) from error


def _unusable(disk: Disk, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{disk.name}: the journal cannot be kept here ({error.strerror}): make the directory"
        " writable for the supervisor's user, or choose another"
    )


def _clear_up(disk: Disk, survey: Survey) -> None:
    """Cut off what is torn, and remove what is needed no more; either may as well stay."""
    for name in survey.leftovers:
        with contextlib.suppress(OSError):
            disk.remove(name)
    last = survey.parts[-1] if survey.parts else None
    if last is not None and last.scan is not None and last.scan.torn_bytes:
        with contextlib.suppress(OSError):
            disk.truncate(last.name, last.scan.valid_length)


def _id_of(request: HeldRequest) -> int:
    return request.admit.request.request_id
