"""A short part of the abuse between processes for every run of the tests."""

from __future__ import annotations

import pytest

from tests.abuse.bus import Round, at_members, at_supervisor
from tests.abuse.frames import Frames
from understudy.protocol.codec import decode
from understudy.protocol.errors import ProtocolError

FRAMES = 3000


@pytest.mark.parametrize("where", [at_supervisor, at_members], ids=["supervisor", "members"])
def test_nothing_that_comes_over_the_bus_hurts_anybody(where: type[Round]) -> None:
    came = where(FRAMES, seed=3)
    assert came.is_right, came


def test_frames_are_the_same_whenever_they_are_drawn_and_few_are_messages() -> None:
    frames = [Frames(5).parts(number) for number in range(2000)]
    assert frames == [Frames(5).parts(number) for number in range(2000)]
    messages = 0
    for parts in frames:
        try:
            decode(parts[0])
        except ProtocolError:
            continue
        messages += 1
    assert 100 < messages < 1000
