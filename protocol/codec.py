"""Messages to bytes and back: msgpack with limits, checked against the declared types.

A frame is one msgpack array::

    [version, sender, epoch, seq, ack, tag, field, field, …]

Bytes from the bus are not trusted. A frame has a size limit, its arrays and strings have limits,
nothing in it is a map, and every value must have the type that its field declares. No class,
function or module is ever looked up by a name from the wire: the tag is looked up in a table.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from enum import IntEnum
from functools import cache, partial
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias, cast

import msgpack  # type: ignore[import-untyped]

from understudy.protocol.errors import ProtocolError
from understudy.protocol.messages import MESSAGE_TYPES, Message, tag_of

PROTOCOL_VERSION: Final = 3
"""What this release speaks with its equals. A new one comes with messages that older peers lack."""
PROTOCOL_VERSION_OLDEST: Final = 3
"""What it still understands. Releases that understand each other can be exchanged in a cluster one
process at a time."""
FRAME_BYTES_MAX: Final = 16 * 1024 * 1024
ARRAY_LENGTH_MAX: Final = 1024 * 1024
TEXT_BYTES_MAX: Final = 1024 * 1024
_HEADER_LENGTH: Final = 6

_WIRE_TYPES: Final[dict[Any, type]] = {kind: kind for kind in (int, str, bool, bytes, float, tuple)}
"""Declared types that have exactly one type on the wire; for others a value must be looked at."""

Check: TypeAlias = Callable[[Any], Any]
"""Gives a decoded value in its declared type, or raises ``TypeError`` or ``ValueError``."""


class Envelope(NamedTuple):
    """What surrounds a message on the bus.

    ``epoch`` names the session; 0 means none. ``seq`` counts the session's messages from 1;
    0 marks a datagram. ``ack`` is the last ``seq`` received without a gap in this session.
    """

    sender: str
    epoch: int
    seq: int
    ack: int


class Frame(NamedTuple):
    """A decoded frame."""

    envelope: Envelope
    message: Message


def encode(envelope: Envelope, message: Message, version: int = PROTOCOL_VERSION_OLDEST) -> bytes:
    """Pack a message into a frame.

    Args:
        envelope: What surrounds it.
        message: The message.
        version: That of the session; what is said without one must be understood by every peer.

    Raises:
        ProtocolError: no receiver would accept the frame.
    """
    kind: type = type(message)
    header = (version, *envelope, tag_of(kind))
    try:
        frame = cast("bytes", msgpack.packb(header + _fields(message), default=_fields))
    except (OverflowError, ValueError) as error:
        raise ProtocolError(f"{kind.__name__} cannot be packed: {error}") from error
    if len(frame) > FRAME_BYTES_MAX:
        raise ProtocolError(f"{kind.__name__} of {len(frame)} bytes exceeds {FRAME_BYTES_MAX}")
    if len(frame) > min(ARRAY_LENGTH_MAX, TEXT_BYTES_MAX):
        # Only a frame this big can hold an array or a text beyond its limit. Once in a session it
        # would be refused and sent again for ever, and nothing behind it would be delivered.
        decode(frame)
    return frame


def decode(frame: bytes) -> Frame:
    """Unpack a frame that came from the bus.

    Raises:
        ProtocolError: the bytes are no message of this protocol version.
    """
    if len(frame) > FRAME_BYTES_MAX:
        raise ProtocolError(f"frame of {len(frame)} bytes exceeds {FRAME_BYTES_MAX}")
    try:
        values = msgpack.unpackb(
            frame,
            use_list=False,
            max_array_len=ARRAY_LENGTH_MAX,
            max_str_len=TEXT_BYTES_MAX,
            max_bin_len=TEXT_BYTES_MAX,
            max_map_len=0,
            max_ext_len=0,
        )
    except (ValueError, msgpack.UnpackException) as error:
        raise ProtocolError(f"not msgpack within the limits: {error}") from error
    if type(values) is not tuple or len(values) < _HEADER_LENGTH:
        raise ProtocolError("a frame is an array with a header")
    version, sender, epoch, seq, ack, tag = values[:_HEADER_LENGTH]
    if type(sender) is not str or set(map(type, (version, epoch, seq, ack, tag))) != {int}:
        raise ProtocolError("malformed envelope")
    if not PROTOCOL_VERSION_OLDEST <= version <= PROTOCOL_VERSION:
        spoken = f"{PROTOCOL_VERSION_OLDEST} to {PROTOCOL_VERSION}"
        raise ProtocolError(f"protocol version {version} is not one of {spoken}")
    kind = MESSAGE_TYPES.get(tag)
    if kind is None:
        raise ProtocolError(f"unknown tag {tag}")
    if min(epoch, seq, ack) < 0:
        raise ProtocolError("malformed envelope")
    try:
        message = _record_check(kind)(values[_HEADER_LENGTH:])
    except (TypeError, ValueError) as error:
        raise ProtocolError(f"malformed {kind.__name__}: {error}") from error
    return Frame(Envelope(sender, epoch, seq, ack), message)


def _fields(record: Any) -> tuple[Any, ...]:
    """The fields of a message, or of a dataclass within one, in order.

    Also asked for what msgpack cannot pack by itself, which may be an integer that is too large.
    """
    if not dataclasses.is_dataclass(record):
        raise OverflowError(f"{type(record).__name__} out of range")
    return tuple([getattr(record, name) for name in _field_names(type(record))])


@cache
def _record_check(kind: type) -> Check:
    """The check for a dataclass or NamedTuple that is packed as an array of its fields.

    The common case is kept short: where every field has one wire type, one comparison of types
    stands for a call for each field.
    """
    hints = _hints(kind)
    checks = [_check_for(hint) for hint in hints]
    wire_types = _wire_types(hints)
    deep = [(i, checks[i]) for i, wire_type in enumerate(wire_types) if wire_type is tuple]
    required = len(hints) - _count_defaults(kind)
    build: Callable[..., Any] = kind

    def check(values: Any) -> Any:
        if type(values) is not tuple:
            raise TypeError(f"{kind.__name__} is an array")
        if tuple(map(type, values)) == wire_types:
            for index, check_value in deep:
                if values[index]:
                    values = (
                        *values[:index],
                        check_value(values[index]),
                        *values[index + 1 :],
                    )
            return build(*values)
        if len(values) < required:
            raise ValueError(f"{kind.__name__} has at least {required} fields")
        return build(*[check(value) for check, value in zip(checks, values, strict=False)])

    return check


def _records_check(kind: type[tuple[Any, ...]]) -> Check:
    """The check for an array of NamedTuples.

    Token rows make up nearly all of the traffic. So where all of them have all of their fields, in
    types that look the same on the wire, they are looked at column by column, which is one pass
    in C for each field. Whatever is unusual is looked at record by record.
    """
    check_one = _record_check(kind)
    column_checks = [_column_check(hint) for hint in _hints(kind)]
    build = partial(tuple.__new__, kind)

    def check(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple:
            raise TypeError("expected an array")
        if not values:
            return values
        try:
            _check_types(tuple, values)
            if set(map(len, values)) != {len(column_checks)}:
                raise _UnusualError
            for check_column, column in zip(column_checks, zip(*values, strict=True), strict=True):
                check_column(column)
        except _UnusualError:
            return tuple(map(check_one, values))
        return tuple(map(build, values))

    return check


class _UnusualError(Exception):
    """Values that have to be looked at one by one."""


def _column_check(hint: Any) -> Callable[[tuple[Any, ...]], None]:
    """Looks at the values that one field has in an array of records.

    It raises ``_UnusualError`` where their types on the wire are not exactly those that every
    value of the declared type has.
    """
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple and arguments[1:] == (Ellipsis,):
        return partial(_check_arrays, _WIRE_TYPES.get(arguments[0]))
    return partial(_check_types, _WIRE_TYPES.get(hint))


def _check_types(kind: type | None, values: tuple[Any, ...]) -> None:
    if set(map(type, values)) != {kind}:
        raise _UnusualError


def _check_arrays(kind: type | None, values: tuple[Any, ...]) -> None:
    _check_types(tuple, values)
    if not set(map(type, chain.from_iterable(values))) <= {kind}:
        raise _UnusualError


def _check_for(hint: Any) -> Check:
    """The check for one declared type."""
    origin = typing.get_origin(hint)
    if origin is tuple:
        return _tuple_check(typing.get_args(hint))
    if origin in {typing.Union, types.UnionType}:
        (inner,) = (_check_for(arg) for arg in typing.get_args(hint) if arg is not types.NoneType)
        return lambda value: None if value is None else inner(value)
    if hint is float:
        return _check_float
    if hint in {int, str, bool, bytes}:
        return _exact_check(hint)
    if isinstance(hint, type) and issubclass(hint, IntEnum):
        return _enum_check(hint)
    assert isinstance(hint, type), f"{hint} cannot cross the wire"
    return _record_check(hint)


def _tuple_check(arguments: tuple[Any, ...]) -> Check:
    if len(arguments) == 2 and arguments[1] is Ellipsis:
        inner = _check_for(arguments[0])
        if arguments[0] is int:
            return _check_integers
        if isinstance(arguments[0], type) and issubclass(arguments[0], tuple):
            return _records_check(arguments[0])

        def check_all(values: Any) -> tuple[Any, ...]:
            if type(values) is not tuple:
                raise TypeError("expected an array")
            return tuple([inner(value) for value in values])

        return check_all
    inners = [_check_for(argument) for argument in arguments]

    def check_each(values: Any) -> tuple[Any, ...]:
        if type(values) is not tuple or len(values) != len(inners):
            raise TypeError(f"expected an array of {len(inners)}")
        return tuple([inner(value) for inner, value in zip(inners, values, strict=True)])

    return check_each


def _exact_check(kind: type) -> Check:
    def check(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"expected {kind.__name__}, got {type(value).__name__}")
        return value

    return check


def _enum_check(kind: type[IntEnum]) -> Check:
    def check(value: Any) -> IntEnum:
        if type(value) is not int:
            raise TypeError(f"expected int, got {type(value).__name__}")
        return kind(value)

    return check


def _check_float(value: Any) -> float:
    if type(value) is float or type(value) is int:
        return float(value)
    raise TypeError(f"expected float, got {type(value).__name__}")


def _check_integers(values: Any) -> tuple[int, ...]:
    if type(values) is not tuple:
        raise TypeError("expected an array")
    if not set(map(type, values)) <= {int}:
        raise TypeError("expected an array of integers")
    return values


def _hints(kind: type) -> list[Any]:
    """The declared type of each field."""
    hints = typing.get_type_hints(kind)
    return [hints[name] for name in _field_names(kind)]


def _wire_types(hints: list[Any]) -> tuple[type | None, ...]:
    return tuple(_WIRE_TYPES.get(typing.get_origin(hint) or hint) for hint in hints)


def _field_names(kind: Any) -> tuple[str, ...]:
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    return cast("tuple[str, ...]", kind._fields)


def _count_defaults(kind: Any) -> int:
    if dataclasses.is_dataclass(kind):
        missing = dataclasses.MISSING
        return sum(field.default is not missing for field in dataclasses.fields(kind))
    return len(kind._field_defaults)
