"""The door: what a request counts for while it waits."""

from __future__ import annotations

import dataclasses

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.door import size_of


def test_all_that_a_client_can_make_long_counts() -> None:
    plain = Request(1, 1, (5,) * 10, SamplingParams(seed=1, max_tokens=4))
    shown = dataclasses.replace(plain, presentation=b"x" * 500)
    params = dataclasses.replace(plain.params, grammar="x" * 700)
    held = dataclasses.replace(shown, params=params)
    assert size_of(shown).num_bytes == size_of(plain).num_bytes + 500
    assert size_of(held).num_bytes == size_of(shown).num_bytes + 700
