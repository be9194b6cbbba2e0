"""What a message's type hints say of it: values to draw, and the slow, obvious check of a value.

``conforms`` is the oracle for the codec's check, which is written to be fast.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import IntEnum
from typing import Any

from hypothesis import strategies as st

from understudy.protocol.messages import MESSAGE_TYPES, Message

INTEGERS = st.integers(min_value=-(2**63), max_value=2**64 - 1)
FLOATS = st.floats(allow_nan=False)


def hints_of(kind: Any) -> dict[str, Any]:
    """The fields of a dataclass or NamedTuple, in order, with their types."""
    names = (
        [field.name for field in dataclasses.fields(kind)]
        if dataclasses.is_dataclass(kind)
        else kind._fields
    )
    hints = typing.get_type_hints(kind)
    return {name: hints[name] for name in names}


def num_defaults(kind: Any) -> int:
    """How many fields an older peer may leave out, from the last."""
    if not dataclasses.is_dataclass(kind):
        return len(kind._field_defaults)
    return sum(field.default is not dataclasses.MISSING for field in dataclasses.fields(kind))


def strategy_for(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a declared type."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return st.lists(strategy_for(arguments[0]), max_size=3).map(tuple)
    if origin is tuple:
        return st.tuples(*map(strategy_for, arguments))
    if origin in {typing.Union, types.UnionType}:
        return st.one_of(*map(strategy_for, arguments))
    simple: dict[Any, st.SearchStrategy[Any]] = {
        int: INTEGERS,
        float: FLOATS,
        str: st.text(max_size=20),
        bool: st.booleans(),
        bytes: st.binary(max_size=20),
        types.NoneType: st.none(),
    }
    if hint in simple:
        return simple[hint]
    if issubclass(hint, IntEnum):
        return st.sampled_from(hint)
    return st.builds(hint, **{name: strategy_for(inner) for name, inner in hints_of(hint).items()})


def messages() -> st.SearchStrategy[Message]:
    """Any message at all."""
    return st.one_of(*[strategy_for(kind) for kind in MESSAGE_TYPES.values()])


def wire_fields(record: Any) -> tuple[Any, ...]:
    """A record as the nested tuples that go over the wire."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return wire_fields(value)
        if isinstance(value, tuple):
            return tuple(plain(item) for item in value)
        return int(value) if isinstance(value, IntEnum) else value

    if dataclasses.is_dataclass(record):
        return tuple(plain(getattr(record, field.name)) for field in dataclasses.fields(record))
    return tuple(plain(item) for item in record)


def conforms(hint: Any, value: Any) -> bool:
    """Whether a value off the wire may stand where this type is declared."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple and arguments[-1] is Ellipsis:
        return type(value) is tuple and all(conforms(arguments[0], item) for item in value)
    if origin is tuple:
        return (
            type(value) is tuple
            and len(value) == len(arguments)
            and all(map(conforms, arguments, value))
        )
    if origin in {typing.Union, types.UnionType}:
        return any(conforms(argument, value) for argument in arguments)
    if hint is float:
        return type(value) in {float, int}
    if hint in {int, str, bool, bytes, types.NoneType}:
        return type(value) is hint
    if issubclass(hint, IntEnum):
        return type(value) is int and value in set(hint)
    hints = hints_of(hint)
    return (
        type(value) is tuple
        and len(value) >= len(hints) - num_defaults(hint)
        and all(map(conforms, hints.values(), value))
    )


def is_built(hint: Any, value: Any) -> bool:
    """Whether a decoded value is of its declared type to the last leaf, classes included."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is tuple:
        inner = arguments[:1] * len(value) if arguments[-1] is Ellipsis else arguments
        return type(value) is tuple and all(map(is_built, inner, value))
    if origin in {typing.Union, types.UnionType}:
        return any(is_built(argument, value) for argument in arguments)
    if type(value) is not hint:
        return False
    if hint in {int, float, str, bool, bytes, types.NoneType} or issubclass(hint, IntEnum):
        return True
    return all(is_built(inner, getattr(value, name)) for name, inner in hints_of(hint).items())
