"""Who uses which cores."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.processor import cores_of

CORES = range(16)


@given(
    num_engines=st.integers(2, 6),
    threads=st.integers(1, 6),
    available=st.sets(st.integers(0, 255), min_size=1, max_size=40),
)
def test_engines_share_no_core(num_engines: int, threads: int, available: set[int]) -> None:
    dealt = [
        cores_of(f"engine-{index}", num_engines=num_engines, threads=threads, available=available)
        for index in range(num_engines)
    ]
    if num_engines * threads > len(available):
        assert dealt == [None] * num_engines
        return
    kept = [cores for cores in dealt if cores is not None]
    assert [len(cores) for cores in kept] == [threads] * num_engines
    together = frozenset[int]().union(*kept)
    assert len(together) == num_engines * threads
    assert together <= available


def test_who_replaces_an_engine_has_its_place() -> None:
    old, new = (
        cores_of(name, num_engines=4, threads=3, available=CORES)
        for name in ("engine-1", "engine-5")
    )
    assert old == new == frozenset({3, 4, 5})


@pytest.mark.parametrize(("name", "num_engines"), [("engine-0", 1), ("solo", 2), ("engine-x", 2)])
def test_one_alone_or_without_a_number_keeps_to_none(name: str, num_engines: int) -> None:
    assert cores_of(name, num_engines=num_engines, threads=1, available=CORES) is None
