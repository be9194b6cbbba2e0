"""Frames that no peer would send: each drawn from a seed and its number."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections.abc import Sequence
from typing import Any, Final

import msgpack  # type: ignore[import-untyped]

from tests.unit.protocol.examples import EXAMPLES
from understudy.protocol.codec import (
    FRAME_BYTES_MAX,
    PROTOCOL_VERSION,
    PROTOCOL_VERSION_OLDEST,
    Envelope,
    encode,
)
from understudy.protocol.messages import DrainRequest, Hello, Message, ProcessExited

STRANGER: Final = "stranger"
"""What messages name that an operator, or the actor that is meant, would else be obeyed for."""
_LENGTHS: Final = (
    *(b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"),
    *(b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x00", b"\xd9\xff", b"\xdd\x00\x10\x00\x01"),
)
_VALUES: Final[tuple[Any, ...]] = (
    *(
        None,
        True,
        -1,
        0,
        2**63,
        2**64 - 1,
        -(2**63),
        1.5,
        float("nan"),
        float("inf"),
        "",
        "x" * 999,
    ),
    *(
        b"",
        b"\xff" * 99,
        [],
        [[]],
        [None] * 20,
        {},
        {"a": 1},
        msgpack.Timestamp(1),
        "\x00",
        [-1, "x"],
    ),
    msgpack.ExtType(5, b"x"),
)


def _unnamed(message: Message) -> Message:
    """An example that names nobody who is there."""
    if isinstance(message, Hello | ProcessExited):
        return dataclasses.replace(message, name=STRANGER, pid=2**22 + 1)
    if isinstance(message, DrainRequest):
        return dataclasses.replace(message, engine=STRANGER)
    return message


_EXAMPLES: Final = tuple(map(_unnamed, EXAMPLES))


class Frames:
    """All frames of a seed.

    Args:
        seed: Another one gives other frames.
        heard: Frames that were really sent: they come again later, as they were.
    """

    def __init__(self, seed: int, heard: Sequence[bytes] = ()) -> None:
        self._seed = seed
        self._heard = heard

    def parts(self, number: int) -> list[bytes]:
        """The parts of the message of this number; most have one."""
        chance = random.Random(f"{self._seed} {number}")
        make = chance.choices(
            (self._mutated, self._strange, self._typed, self._huge, self._noise, self._again),
            (40, 15, 20, 8, 12, 5),
        )[0]
        frame = make(chance)
        if chance.random() < 0.05:
            return [chance.randbytes(3), frame, b""][: chance.randint(2, 3)]
        return [frame]

    def _example(self, chance: random.Random) -> bytes:
        """A whole frame of a session that there is not, or of none."""
        version = chance.choice((PROTOCOL_VERSION_OLDEST, PROTOCOL_VERSION))
        epoch = chance.choice((0, 0, 1, 3, 2**40, 2**63, 2**64 - 1))
        seq = chance.choice((0, 0, 1, 2**32, 2**64 - 1))
        sender = chance.choice((STRANGER, "", "supervisor", "engine-0.1"))
        envelope = Envelope(sender, epoch, seq, chance.choice((0, 1, 2**64 - 1)))
        return encode(envelope, chance.choice(_EXAMPLES), version)

    def _strange(self, chance: random.Random) -> bytes:
        return self._example(chance)

    def _mutated(self, chance: random.Random) -> bytes:
        """A whole frame with a few bits turned, or bytes lost or added."""
        frame = bytearray(self._example(chance))
        for _ in range(chance.choice((1, 1, 2, 5, 20))):
            at = chance.randrange(len(frame) or 1)
            match chance.randrange(5):
                case 0:
                    del frame[at:]
                case 1:
                    frame[at:at] = chance.randbytes(chance.randint(1, 4))
                case 2:
                    del frame[at : at + chance.randint(1, 4)]
                case _ if frame:
                    frame[at] ^= 1 << chance.randrange(8)
                case _:
                    pass
        return bytes(frame)

    def _typed(self, chance: random.Random) -> bytes:
        """A frame whose fields are of other types than declared."""
        fields = list(msgpack.unpackb(self._example(chance), use_list=True))
        for _ in range(chance.choice((1, 1, 2, 4))):
            container, at = fields, chance.randrange(len(fields))
            while isinstance(container[at], list) and container[at] and chance.random() < 0.7:
                container, at = container[at], chance.randrange(len(container[at]))
            container[at] = copy.deepcopy(chance.choice(_VALUES))
        if chance.random() < 0.2:
            fields = fields[: chance.randrange(len(fields))]
        return bytes(msgpack.packb(fields))

    def _huge(self, chance: random.Random) -> bytes:
        """Lengths that nothing follows, and nesting without end."""
        frame = self._example(chance)
        at = chance.randrange(1, len(frame))
        match chance.randrange(4):
            case 0:
                return chance.choice(_LENGTHS)
            case 1:
                return frame[:at] + chance.choice(_LENGTHS) + frame[at:]
            case 2:
                return b"\x91" * chance.choice((10, 600, 100_000))
            case _:
                size = chance.choice((1 << 16, 1 << 20, FRAME_BYTES_MAX + 1))
                return frame + b"\x00" * (size if chance.random() < 0.02 else 1 << 16)

    def _noise(self, chance: random.Random) -> bytes:
        return chance.randbytes(chance.choice((0, 1, 7, 100, 2000)))

    def _again(self, chance: random.Random) -> bytes:
        return chance.choice(self._heard) if self._heard else self._example(chance)
