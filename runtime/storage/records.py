"""The records of the journal: what the supervisor says, and how it lies in a segment.

Pure: values in, bytes out, and back. All numbers are little-endian. A record is::

    u32 length of the payload │ u32 crc32 of all that follows │ u64 lsn │ u8 kind │ payload

and its *body* is what the checksum covers: lsn, kind and payload. The lsn counts records over all
segments without a gap. A request is named by its ``serial``, a 32-bit number that the journal
gives it at admission, because that is half as long as its id. Steps, which make up nearly all of a
journal, have their own module; the rest is rare, and what varies in it is packed as msgpack, with
fields by name, so that a field with a default can be added.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

import msgspec

from understudy.protocol.request import FinishReason, Request, TokenRow
from understudy.protocol.usage import DayUsage

RECORD_HEAD: Final = Struct("<IIQB")
"""Length, crc32, lsn, kind."""
RECORD_HEAD_BYTES: Final = RECORD_HEAD.size
RECORD_BYTES_MAX: Final = 256 * 1024 * 1024
"""A longer payload is no record of ours."""

HEADER: Final = 1
ADMIT: Final = 2
ASSIGN: Final = 3
STEP: Final = 4
FINAL_STEP: Final = 5
"""A step in which a request ended; apart from the others so that ends are found quickly."""
END: Final = 6
EPOCH: Final = 7
CLOCK: Final = 8
CHECKPOINT: Final = 9
RETIRE: Final = 10
CACHE_HIT: Final = 11
FORGET: Final = 12
USAGE: Final = 14
VECTOR: Final = 15

KIND_NAMES: Final = {
    HEADER: "header",
    ADMIT: "admit",
    ASSIGN: "assign",
    STEP: "step",
    FINAL_STEP: "step",
    END: "end",
    EPOCH: "epoch",
    CLOCK: "clock",
    CHECKPOINT: "checkpoint",
    RETIRE: "retire",
    CACHE_HIT: "cache hit",
    FORGET: "forget",
    USAGE: "usage",
    VECTOR: "vector",
}


@dataclass(frozen=True, slots=True)
class Admit:
    """A request was admitted. From here on it will end, exactly once."""

    request: Request
    gateway: str
    """The identity of the gateway that the output goes to."""
    admitted_at: float
    tenant: str = ""
    """The id of the key that the request came with."""
    key_digest: bytes = b""
    """A hash of the client's idempotency key, opaque here."""
    body_digest: bytes = b""
    """A hash of the body that came with the idempotency key, opaque here."""


@dataclass(frozen=True, slots=True)
class Assign:
    """A request was given to an engine, as a new attempt."""

    request_id: int
    attempt: int
    engine: str
    epoch: int


@dataclass(frozen=True, slots=True)
class CacheHit:
    """The engine that made a request's first token had so much of its prompt in its cache."""

    request_id: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Vector:
    """What a prompt was pooled to. The step in which the request ended comes behind it."""

    request_id: int
    vector: bytes


@dataclass(frozen=True, slots=True)
class Step:
    """Rows that the ledger accepted, in the order of the engine's batch.

    One engine step each is best: a batch that stays the same from step to step is cheap.
    """

    rows: tuple[TokenRow, ...]


@dataclass(frozen=True, slots=True)
class End:
    """A request ended for another reason than its last token."""

    request_id: int
    reason: FinishReason
    code: str = ""
    """The ``code`` of the error that its client was told, if it was."""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Epoch:
    """Every epoch up to this one counts as given out."""

    highest: int


@dataclass(frozen=True, slots=True)
class Forget:
    """The client of an ended request does not want it to be known any more."""

    request_id: int


@dataclass(frozen=True, slots=True)
class Usage:
    """All that a tenant has used in one day so far."""

    tenant: str
    usage: DayUsage


Record: TypeAlias = Admit | Assign | CacheHit | Vector | Step | End | Epoch | Forget | Usage


def beside(row: TokenRow) -> list[Record]:
    """What a step's rows do not tell of one of them. It comes before the step."""
    told: list[Record] = []
    if row.num_cached_tokens:
        told.append(CacheHit(row.request_id, row.num_cached_tokens))
    if row.vector:
        told.append(Vector(row.request_id, row.vector))
    return told


class AssignPayload(NamedTuple):
    """An assignment as it lies in a segment."""

    serial: int
    attempt: int
    epoch: int
    engine: str


class EndMark(NamedTuple):
    """How a request ended, with the length and the hash of its whole output as proof."""

    serial: int
    finish: int
    length: int
    prefix_hash: int


class EndPayload(NamedTuple):
    """An end as it lies in a segment."""

    mark: EndMark
    code: str
    message: str


class CheckpointPayload(NamedTuple):
    """All that is known of one request: it stands for every earlier record about it."""

    serial: int
    request_id: int
    attempt: int
    epoch: int
    finish: int
    """A ``FinishReason``, or 0 if the request goes on."""
    length: int
    prefix_hash: int
    ended_at: float
    engine: str | None
    code: str
    message: str
    admit: bytes
    """The admission, packed."""
    output: bytes
    """The tokens, 32 bits each."""
    logprobs: bytes
    num_cached_tokens: int = 0
    vector: bytes = b""


class _CheckpointRest(NamedTuple):
    engine: str | None
    code: str
    message: str
    num_cached_tokens: int = 0
    vector: bytes = b""


_PREFIX = Struct("<QB")
_CHECK = Struct("<II")
_CACHE_HIT = Struct("<II")
_SERIAL = Struct("<I")
_ADMIT = Struct("<IQ")
_ASSIGN = Struct("<IIQ")
END_MARK: Final = Struct("<IBII")
_CHECKPOINT = Struct("<IQIQBIIdIIII")
_U64 = Struct("<Q")
_F64 = Struct("<d")
PAYLOAD_AT: Final = _PREFIX.size
"""Where the payload starts in a body."""

_pack = msgspec.msgpack.Encoder().encode
_unpack_admit = msgspec.msgpack.Decoder(Admit).decode
_unpack_rest = msgspec.msgpack.Decoder(_CheckpointRest).decode
_unpack_usage = msgspec.msgpack.Decoder(Usage).decode
_unpack_error = msgspec.msgpack.Decoder(tuple[str, str]).decode


def frame(body: bytes) -> bytes:
    """What goes in front of a body to make it a record."""
    return _CHECK.pack(len(body) - PAYLOAD_AT, zlib.crc32(body))


def make_body(lsn: int, kind: int, payload: bytes) -> bytes:
    """The body of a record with this payload."""
    return _PREFIX.pack(lsn, kind) + payload


def pack_admit(admit: Admit) -> bytes:
    """An admission as it is kept, in the journal and in memory."""
    return _pack(admit)


def unpack_admit(packed: bytes) -> Admit:
    """The inverse of ``pack_admit``.

    Raises:
        ValueError: the bytes are no admission.
    """
    return _unpack_admit(packed)


def encode_admit(serial: int, request_id: int, packed: bytes) -> bytes:
    """The payload of an admission."""
    return _ADMIT.pack(serial, request_id) + packed


def decode_admit_ids(data: bytes, start: int) -> tuple[int, int]:
    """The serial and the request id of an admission or a checkpoint at ``start``."""
    serial, request_id = _ADMIT.unpack_from(data, start)
    return serial, request_id


def decode_admit(data: bytes, start: int, stop: int) -> bytes:
    """The packed admission in a payload."""
    return data[start + _ADMIT.size : stop]


def encode_assign(serial: int, assign: Assign) -> bytes:
    """The payload of an assignment."""
    return _ASSIGN.pack(serial, assign.attempt, assign.epoch) + assign.engine.encode()


def decode_assign(data: bytes, start: int, stop: int) -> AssignPayload:
    """The inverse of ``encode_assign``."""
    serial, attempt, epoch = _ASSIGN.unpack_from(data, start)
    return AssignPayload(serial, attempt, epoch, data[start + _ASSIGN.size : stop].decode())


def encode_cache_hit(serial: int, num_tokens: int) -> bytes:
    """The payload of a cache hit."""
    return _CACHE_HIT.pack(serial, num_tokens)


def decode_cache_hit(data: bytes, start: int) -> tuple[int, int]:
    """The serial and the number of tokens."""
    serial, num_tokens = _CACHE_HIT.unpack_from(data, start)
    return serial, num_tokens


def encode_vector(serial: int, vector: bytes) -> bytes:
    """The payload of a vector."""
    return _SERIAL.pack(serial) + vector


def decode_vector(data: bytes, start: int, stop: int) -> tuple[int, bytes]:
    """The serial and the vector."""
    (serial,) = _SERIAL.unpack_from(data, start)
    return serial, data[start + _SERIAL.size : stop]


def encode_usage(usage: Usage) -> bytes:
    """The payload of a day's usage."""
    return _pack(usage)


def decode_usage(data: bytes, start: int, stop: int) -> Usage:
    """The inverse of ``encode_usage``."""
    return _unpack_usage(data[start:stop])


def encode_end(mark: EndMark, code: str, message: str) -> bytes:
    """The payload of an end."""
    return END_MARK.pack(*mark) + _pack((code, message))


def decode_end_mark(data: bytes, start: int) -> EndMark:
    """The mark at the beginning of an end."""
    return EndMark(*END_MARK.unpack_from(data, start))


def decode_end(data: bytes, start: int, stop: int) -> EndPayload:
    """The inverse of ``encode_end``."""
    code, message = _unpack_error(data[start + END_MARK.size : stop])
    return EndPayload(decode_end_mark(data, start), code, message)


def encode_epoch(epoch: int) -> bytes:
    """The payload of an epoch; of a retirement, which is a segment's number; of a request's id."""
    return _U64.pack(epoch)


def decode_epoch(data: bytes, start: int) -> int:
    """The inverse of ``encode_epoch``."""
    (epoch,) = _U64.unpack_from(data, start)
    return int(epoch)


def encode_clock(now: float) -> bytes:
    """The payload of a clock."""
    return _F64.pack(now)


def decode_clock(data: bytes, start: int) -> float:
    """The inverse of ``encode_clock``."""
    (now,) = _F64.unpack_from(data, start)
    return float(now)


def encode_checkpoint(payload: CheckpointPayload) -> bytes:
    """The payload of a checkpoint."""
    rest = _CheckpointRest(
        payload.engine, payload.code, payload.message, payload.num_cached_tokens, payload.vector
    )
    parts = (_pack(rest), payload.admit, payload.output, payload.logprobs)
    fixed = _CHECKPOINT.pack(*payload[:8], *map(len, parts))
    return b"".join((fixed, *parts))


def decode_checkpoint_end(data: bytes, start: int) -> tuple[int, int, float]:
    """How a request in a checkpoint ended: finish (0 if it lives), length and time."""
    fixed = _CHECKPOINT.unpack_from(data, start)
    return fixed[4], fixed[5], fixed[7]


def decode_checkpoint(data: bytes, start: int) -> CheckpointPayload:
    """The inverse of ``encode_checkpoint``."""
    fixed = _CHECKPOINT.unpack_from(data, start)
    parts = []
    at = start + _CHECKPOINT.size
    for size in fixed[-4:]:
        parts.append(data[at : at + size])
        at += size
    packed, admit, output, logprobs = parts
    rest = _unpack_rest(packed)
    values = (rest.engine, rest.code, rest.message, admit, output, logprobs)
    return CheckpointPayload._make((*fixed[:-4], *values, rest.num_cached_tokens, rest.vector))
