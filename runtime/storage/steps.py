"""Steps, which make up nearly all of a journal: a token costs four bytes and a little. Pure.

A step names its batch by the serial of the first row. The batch is the one that this request was
in before, without those that have ended since; a step says who joined behind the others, or lists
everybody. At the beginning of a segment there are no batches. Positions are not written: a row
goes on where the one before it ended. The first and then every 32nd step of a batch carries
*anchors*, length and prefix hash of every output in it, and every end carries the same of its own;
a recovery proves by them that what it put together is what the engines made. The payload is::

    u8 flags │ u32 serial of the first row │ u32 token of each row                 flags = 0
    u8 flags │ u32 serial of the first row │ u32 n │ the parts that the flags name, in this order

    ENDS     u32 count, then serial, finish, length, prefix hash of each
    MEMBERS  u32 serial of each row: a new batch
    JOINED   u32 count, then u32 serial of each row that is new, the last ones
    COUNTS   u32 number of tokens of each row (one each without it)
    (always) u32 tokens, row by row
    ANCHORS  u32 length of each row's output, u32 prefix hash of each
    LOGPROBS u32 number of bytes for each row, then the bytes
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from itertools import chain
from struct import Struct
from typing import Final, NamedTuple

from understudy.protocol.request import TokenRow
from understudy.runtime.storage.image import RUN_STEPS_MAX, Batch, Image
from understudy.runtime.storage.records import (
    END_MARK,
    FINAL_STEP,
    STEP,
    EndMark,
)

ANCHOR_EVERY: Final = 32

ENDS: Final = 1
MEMBERS: Final = 2
COUNTS: Final = 4
ANCHORS: Final = 8
LOGPROBS: Final = 16
JOINED: Final = 32

PLAIN_HEAD: Final = Struct("<BI")
_GENERAL_HEAD = Struct("<BII")
_COUNT = Struct("<I")
_PREFIX = Struct("<QBBII")


class StepPayload(NamedTuple):
    """A step as it lies in a segment."""

    first: int
    """The serial of the first row: it names the batch if ``members`` is ``None``."""
    num_rows: int
    ends: tuple[EndMark, ...]
    members: tuple[int, ...] | None
    joined: tuple[int, ...]
    counts: tuple[int, ...] | None
    """``None`` means one token for each row."""
    tokens: bytes
    lengths: tuple[int, ...]
    prefix_hashes: tuple[int, ...]
    logprobs: tuple[bytes, ...]


class _Change(NamedTuple):
    """A batch that is not the one of the step before."""

    batch: Batch
    flags: int
    joined: int


class _Columns(NamedTuple):
    """Rows, field by field."""

    positions: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    prefix_hashes: tuple[int, ...]
    finishes: tuple[int, ...]
    logprobs: tuple[tuple[bytes, ...], ...]


def write_steps(image: Image, rows: tuple[TokenRow, ...], lsn: int, now: float) -> list[bytes]:
    """Take rows into the image, and give the bodies of the records that say so.

    The requests must live. It is one record, unless a request comes twice: tokens are dealt out
    by column, so no request may have two columns. ``lsn`` is the first record's.
    """
    ids, _, positions, tokens, prefix_hashes, finishes, logprobs, *_ = zip(*rows, strict=True)
    batch = image.live[ids[0]].batch
    flags, joined = 0, 0
    if batch is None or batch.ids != ids:
        if len(set(ids)) < len(ids):
            return _write_apart(image, rows, lsn, now)
        batch, flags, joined = _change(image, batch, ids, positions)
    batch.unanchored += 1
    singles: list[int] | None
    try:
        singles = [token for (token,) in tokens]
    except ValueError:
        singles = None
    else:
        # Counting is the quickest way to see that all of a tuple is one thing.
        is_plain = finishes.count(0) == len(ids) == logprobs.count(())
        if is_plain and not flags and batch.unanchored < ANCHOR_EVERY:
            # Nearly all steps are like this one.
            batch.prefix_hashes = prefix_hashes
            batch.steps.append(singles)
            if len(batch.steps) >= RUN_STEPS_MAX:
                batch.flush()
            return [_plain(len(singles))(lsn, STEP, 0, batch.members[0].serial, *singles)]
    columns = _Columns(positions, tokens, prefix_hashes, finishes, logprobs)
    return [_write_general(image, batch, columns, singles, flags, joined, lsn, now)]


def read_step(data: bytes, start: int, stop: int) -> StepPayload:
    """Parse the payload of a step.

    Raises:
        struct.error: it is shorter than it says.
    """
    flags, first = PLAIN_HEAD.unpack_from(data, start)
    if not flags:
        at = start + PLAIN_HEAD.size
        rows = (stop - at) // 4
        return StepPayload(first, rows, (), None, (), None, data[at:stop], (), (), ())
    _, _, num_rows = _GENERAL_HEAD.unpack_from(data, start)
    at = start + _GENERAL_HEAD.size
    ends = read_ends(data, start) if flags & ENDS else ()
    at += _COUNT.size + len(ends) * END_MARK.size if flags & ENDS else 0
    members = counts = None
    numbers = _numbers(num_rows)
    if flags & MEMBERS:
        members = numbers.unpack_from(data, at)
        at += numbers.size
    joined: tuple[int, ...] = ()
    if flags & JOINED:
        (count,) = _COUNT.unpack_from(data, at)
        joined = _numbers(count).unpack_from(data, at + _COUNT.size)
        at += _COUNT.size + 4 * count
    if flags & COUNTS:
        counts = numbers.unpack_from(data, at)
        at += numbers.size
    tokens_at = at
    at += 4 * (num_rows if counts is None else sum(counts))
    tokens = data[tokens_at:at]
    lengths: tuple[int, ...] = ()
    prefix_hashes: tuple[int, ...] = ()
    if flags & ANCHORS:
        lengths = numbers.unpack_from(data, at)
        prefix_hashes = numbers.unpack_from(data, at + numbers.size)
        at += 2 * numbers.size
    logprobs = _read_logprobs(data, at, num_rows) if flags & LOGPROBS else ()
    return StepPayload(
        first, num_rows, ends, members, joined, counts, tokens, lengths, prefix_hashes, logprobs
    )


def read_ends(data: bytes, start: int) -> tuple[EndMark, ...]:
    """The ends in the payload of a step that has any."""
    at = start + _GENERAL_HEAD.size
    (count,) = _COUNT.unpack_from(data, at)
    at += _COUNT.size
    size = END_MARK.size
    return tuple([EndMark(*END_MARK.unpack_from(data, at + i * size)) for i in range(count)])


def deal_out(batch: Batch, counts: Iterable[int], tokens: Iterable[int]) -> None:
    """Give each member of a batch as many of the tokens as its count says."""
    batch.flush()
    rest = list(tokens)
    at = 0
    for held, count in zip(batch.members, counts, strict=True):
        if held.is_kept:
            held.output.extend(rest[at : at + count])
        at += count


def _write_apart(image: Image, rows: tuple[TokenRow, ...], lsn: int, now: float) -> list[bytes]:
    """Write rows among which a request comes twice: cut them before each repetition."""
    groups: list[dict[int, TokenRow]] = [{}]
    for row in rows:
        if row.request_id in groups[-1]:
            groups.append({})
        groups[-1][row.request_id] = row
    bodies: list[bytes] = []
    for group in groups:
        bodies += write_steps(image, tuple(group.values()), lsn + len(bodies), now)
    return bodies


def _change(
    image: Image, batch: Batch | None, ids: tuple[int, ...], positions: tuple[int, ...]
) -> _Change:
    """Make the batch of these requests: the present one with newcomers, or else a new one."""
    known = len(batch.ids) if batch is not None else 0
    if batch is not None and ids[:known] == batch.ids:
        newcomers = [image.live[request_id] for request_id in ids[known:]]
        batch.join(ids, newcomers)
        change = _Change(batch, JOINED, len(newcomers))
    else:
        newcomers = [image.live[request_id] for request_id in ids]
        known = 0
        change = _Change(image.form_batch(ids, newcomers), MEMBERS, 0)
    for held, position in zip(newcomers, positions[known:], strict=True):
        assert position == len(held.output), "rows are journalled once, and in order"
    return change


def _write_general(
    image: Image,
    batch: Batch,
    columns: _Columns,
    singles: list[int] | None,
    flags: int,
    joined: int,
    lsn: int,
    now: float,
) -> bytes:
    """Write a step that says more than one token for each row of the batch before."""
    members = batch.members
    first, num_rows = members[0].serial, len(members)
    positions, tokens, prefix_hashes, finishes, logprobs = columns
    counts = [1] * num_rows if singles is not None else [len(row) for row in tokens]
    numbers = _numbers(num_rows)
    ended = [i for i, finish in enumerate(finishes) if finish] if any(finishes) else []
    marks = [
        EndMark(members[i].serial, finishes[i], positions[i] + counts[i], prefix_hashes[i])
        for i in ended
    ]
    parts: list[bytes] = [b""]
    if marks:
        flags |= ENDS
        parts += [_COUNT.pack(len(marks)), *[END_MARK.pack(*mark) for mark in marks]]
    if flags & MEMBERS:
        parts.append(numbers.pack(*[held.serial for held in members]))
    if flags & JOINED:
        newcomers = [held.serial for held in members[num_rows - joined :]]
        parts += [_COUNT.pack(joined), _numbers(joined).pack(*newcomers)]
    if singles is None:
        flags |= COUNTS
        flat = list(chain.from_iterable(tokens))
        parts += [numbers.pack(*counts), _numbers(len(flat)).pack(*flat)]
        deal_out(batch, counts, flat)
    else:
        parts.append(numbers.pack(*singles))
        batch.steps.append(singles)
    batch.prefix_hashes = prefix_hashes
    if flags & MEMBERS or batch.unanchored >= ANCHOR_EVERY:
        flags |= ANCHORS
        lengths = [position + count for position, count in zip(positions, counts, strict=True)]
        parts += [numbers.pack(*lengths), numbers.pack(*prefix_hashes)]
        batch.unanchored = 0
    if any(logprobs):
        flags |= LOGPROBS
        packed = [b"".join(one) for one in logprobs]
        parts += [numbers.pack(*map(len, packed)), *packed]
        for held, one in zip(members, packed, strict=True):
            held.logprobs += one
    for held, finish in [(members[index], finishes[index]) for index in ended]:
        image.end(held, finish, now)
    kind = FINAL_STEP if marks else STEP
    parts[0] = _PREFIX.pack(lsn, kind, flags, first, num_rows)
    return b"".join(parts)


def _read_logprobs(data: bytes, at: int, num_rows: int) -> tuple[bytes, ...]:
    numbers = _numbers(num_rows)
    sizes = numbers.unpack_from(data, at)
    at += numbers.size
    found = []
    for size in sizes:
        found.append(data[at : at + size])
        at += size
    return tuple(found)


@lru_cache(maxsize=4096)
def _plain(num_rows: int) -> Callable[..., bytes]:
    return Struct(f"<QBBI{num_rows}I").pack


@lru_cache(maxsize=4096)
def _numbers(count: int) -> Struct:
    return Struct(f"<{count}I")
