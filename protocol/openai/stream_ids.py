"""The names of streams and of their events, as clients give them back to go on from there.

A stream has the id of its answer, ``cmpl-`` or ``chatcmpl-`` and 16 hexadecimal digits. An event
has the id ``<the 16 digits>.<position>``; with several choices it names a position for each,
``<digits>.<p0>-<p1>-…``. A position is the number of the choice's output tokens that are covered
by the text delivered up to and including the event.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

_STREAM_ID: Final = re.compile(r"(?:(chatcmpl|cmpl)-)?([0-9a-f]{16})")
_POSITIONS: Final = re.compile(r"(?:([0-9a-f]{16})\.)?([0-9]{1,10}(?:-[0-9]{1,10}){0,127})")


class StreamId(NamedTuple):
    """A stream as a client names it."""

    prefix: str | None
    group_id: int


class StreamPosition(NamedTuple):
    """Where a client left a stream."""

    group_id: int | None
    positions: tuple[int, ...]
    """One for each choice."""


class EventIds:
    """Names the events of one stream, each by how far the choices are when it has been read.

    Args:
        group_id: The stream's.
        positions: What the client has of each choice when the stream begins.
    """

    __slots__ = ("_positions", "_stem")

    def __init__(self, group_id: int, positions: Sequence[int]) -> None:
        self._stem = b"id: %016x." % group_id
        self._positions = [b"%d" % position for position in positions]

    def line(self, index: int, position: int) -> bytes:
        """The line for an event that brings choice ``index`` to ``position``."""
        self._positions[index] = b"%d" % position
        return self._stem + b"-".join(self._positions)


def parse_stream_id(text: str) -> StreamId | None:
    """Read the id of a stream; ``None`` if it is none."""
    match = _STREAM_ID.fullmatch(text)
    return None if match is None else StreamId(match[1], int(match[2], 16))


def parse_position(text: str) -> StreamPosition | None:
    """Read an event's id, or the positions alone; ``None`` if it is neither."""
    match = _POSITIONS.fullmatch(text)
    if match is None:
        return None
    group_id = None if match[1] is None else int(match[1], 16)
    return StreamPosition(group_id, tuple(map(int, match[2].split("-"))))
