"""A short part of the abuse between processes for every run of the tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.abuse.bus import Round, at_members, at_supervisor
from tests.abuse.frames import Frames
from understudy.protocol.codec import decode
from understudy.protocol.errors import ProtocolError

FRAMES = 3000


WHERE: dict[str, Callable[[], Round]] = {
    "supervisor": lambda: at_supervisor(FRAMES, seed=3),
    "members": lambda: at_members(FRAMES, seed=3),
}


@pytest.mark.parametrize("where", WHERE)
def test_nothing_that_comes_over_the_bus_hurts_anybody(where: str) -> None:
    came = WHERE[where]()
    assert came.is_right, came
    assert sum(came.dropped.values()) > FRAMES / 4


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
