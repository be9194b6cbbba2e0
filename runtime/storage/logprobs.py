"""Log probabilities as bytes: small, and exactly the same numbers when they come back. Pure.

For each token one group: a byte with the number of alternatives and, in its top bit, the width of
the floats; the chosen token's value; then (token id, value) of each alternative. Engines compute
in 32 bits, so 32 bits nearly always hold a value without loss; where they do not, 64 bits do.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, cached_property
from struct import Struct
from typing import Final, overload

from understudy.protocol.request import TokenLogprobs

ALTERNATIVES_MAX: Final = 127
_WIDE: Final = 0x80


def pack_logprobs(logprobs: tuple[TokenLogprobs, ...]) -> bytes:
    """Pack the log probabilities of a row's tokens."""
    return b"".join([_pack_one(one) for one in logprobs])


def unpack_logprobs(data: bytes) -> tuple[TokenLogprobs, ...]:
    """The inverse of ``pack_logprobs``; of several packed rows, joined, it gives all of them."""
    found = []
    position = 0
    while position < len(data):
        head = data[position]
        layout = _layout(head & ~_WIDE, "d" if head & _WIDE else "f")
        _, chosen, *top = layout.unpack_from(data, position)
        found.append(TokenLogprobs(chosen, tuple(zip(top[0::2], top[1::2], strict=True))))
        position += layout.size
    return tuple(found)


class PackedLogprobs(Sequence[TokenLogprobs]):
    """The log probabilities of an output, unpacked when somebody looks.

    Hardly anybody joins a stream that has ended, and a supervisor that starts anew has thousands.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data

    def __len__(self) -> int:
        return len(self._unpacked)

    @overload
    def __getitem__(self, index: int) -> TokenLogprobs: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[TokenLogprobs, ...]: ...
    def __getitem__(self, index: int | slice) -> TokenLogprobs | tuple[TokenLogprobs, ...]:
        return self._unpacked[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._unpacked == tuple(other)

    __hash__ = None  # type: ignore[assignment]

    @cached_property
    def _unpacked(self) -> tuple[TokenLogprobs, ...]:
        return unpack_logprobs(self._data)


def _pack_one(one: TokenLogprobs) -> bytes:
    assert len(one.top) <= ALTERNATIVES_MAX
    values = (one.chosen, *[value for pair in one.top for value in pair])
    narrow = _layout(len(one.top), "f")
    try:
        packed = narrow.pack(len(one.top), *values)
    except OverflowError:
        pass
    else:
        if narrow.unpack(packed)[1:] == values:
            return packed
    return _layout(len(one.top), "d").pack(len(one.top) | _WIDE, *values)


@cache
def _layout(num_top: int, width: str) -> Struct:
    return Struct(f"<B{width}" + f"I{width}" * num_top)
