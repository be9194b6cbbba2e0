"""Log probabilities as bytes: small, and exactly the same numbers when they come back. Pure.

An engine packs them, a client's gateway unpacks them; whoever passes them on or keeps them between
the two only counts them. For each token: a byte with the number of alternatives and, in its top
bit, the width of the floats; the chosen token's value; then (token id, value) of each alternative.
Engines compute in 32 bits, so 32 bits nearly always hold a value without loss; where they do not,
64 bits do.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from struct import Struct
from typing import Final

from understudy.protocol.request import TokenLogprobs

ALTERNATIVES_MAX: Final = 127
_WIDE: Final = 0x80


def pack_logprobs(one: TokenLogprobs) -> bytes:
    """Pack the log probabilities of one token, with 127 alternatives at most."""
    top = one.top[:ALTERNATIVES_MAX]
    values = (one.chosen, *[value for pair in top for value in pair])
    narrow = _layout(len(top))
    try:
        packed = narrow.pack(len(top), *values)
    except OverflowError:
        pass
    else:
        if narrow.unpack(packed)[1:] == values:
            return packed
    head = len(top) | _WIDE
    return _layout(head).pack(head, *values)


def unpack_logprobs(packed: bytes) -> TokenLogprobs:
    """The inverse of ``pack_logprobs``.

    Raises:
        struct.error, IndexError: they are not ``are_packed``.
    """
    _, chosen, *top = _layout(packed[0]).unpack(packed)
    return TokenLogprobs(chosen, tuple(zip(top[0::2], top[1::2], strict=True)))


def are_packed(several: Iterable[bytes]) -> bool:
    """Whether each of these is what ``pack_logprobs`` can give."""
    return all(packed != b"" and len(packed) == _SIZES[packed[0]] for packed in several)


def split_logprobs(joined: bytes) -> tuple[bytes, ...]:
    """Those of several tokens that were joined, each for itself.

    Raises:
        ValueError: the last is cut short.
    """
    found = []
    position = 0
    while position < len(joined):
        end = position + _SIZES[joined[position]]
        found.append(joined[position:end])
        position = end
    if position > len(joined):
        raise ValueError("log probabilities are cut short")
    return tuple(found)


@cache
def _layout(head: int) -> Struct:
    width = "d" if head & _WIDE else "f"
    return Struct(f"<B{width}" + f"I{width}" * (head & ~_WIDE))


_SIZES: Final = tuple([_layout(head).size for head in range(256)])
"""By the first byte."""
