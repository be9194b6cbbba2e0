"""Quarantine: two deaths convict the one who did it, and nobody who merely stood beside it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.control.quarantine import FATAL_STEPS_MAX, Quarantine

POISON = 0


def test_who_kills_alone_after_having_been_in_a_fatal_step_is_convicted() -> None:
    quarantine = Quarantine()
    assert not quarantine.record_death(1, was_alone=False, is_proven=False)
    assert quarantine.is_suspect(1)
    assert quarantine.record_death(1, was_alone=True, is_proven=False)


def test_who_has_come_through_a_step_before_has_to_kill_twice_alone() -> None:
    quarantine = Quarantine()
    assert not quarantine.record_death(1, was_alone=False, is_proven=True)
    assert not quarantine.record_death(1, was_alone=True, is_proven=True)
    quarantine.lift(1)
    assert not quarantine.record_death(1, was_alone=False, is_proven=True)
    quarantine.forget(1)
    assert not quarantine.record_death(1, was_alone=False, is_proven=True)
    assert not quarantine.record_death(1, was_alone=True, is_proven=True)
    assert quarantine.record_death(1, was_alone=True, is_proven=True)


def test_a_first_death_convicts_nobody_even_alone() -> None:
    assert not Quarantine().record_death(1, was_alone=True, is_proven=False)


def test_a_suspect_whose_own_step_ends_well_is_one_no_more() -> None:
    quarantine = Quarantine()
    quarantine.record_death(1, was_alone=False, is_proven=False)
    quarantine.lift(1)
    assert not quarantine.is_suspect(1)
    assert not quarantine.record_death(1, was_alone=True, is_proven=False)


def test_nobody_is_in_fatal_steps_for_ever() -> None:
    quarantine = Quarantine()
    for _ in range(FATAL_STEPS_MAX - 1):
        assert not quarantine.record_death(1, was_alone=False, is_proven=False)
        quarantine.lift(1)
    assert quarantine.record_death(1, was_alone=False, is_proven=False)


def test_a_request_that_has_ended_is_forgotten() -> None:
    quarantine = Quarantine()
    quarantine.record_death(1, was_alone=False, is_proven=False)
    quarantine.forget(1)
    assert not quarantine.is_suspect(1)
    assert not quarantine.record_death(1, was_alone=True, is_proven=False)


@given(st.lists(st.sets(st.integers(1, 9)), max_size=FATAL_STEPS_MAX - 1))
def test_one_poison_is_convicted_at_its_second_death_whoever_was_with_it(
    companies: list[set[int]],
) -> None:
    for company in companies:
        quarantine = Quarantine()
        step = {POISON, *company}
        convicted = {
            one
            for one in step
            if quarantine.record_death(one, was_alone=step == {POISON}, is_proven=False)
        }
        assert not convicted
        for one in sorted(company):
            quarantine.lift(one)
        assert quarantine.record_death(POISON, was_alone=True, is_proven=False)
        assert not any(quarantine.is_suspect(one) for one in company)
