"""The router: least outstanding work relative to the batch, and never beyond the credit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.control.router import CREDIT_WINDOW_BATCHES, Candidate, choose

candidates = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 30).map(lambda n: f"engine-{n}.1"),
        st.integers(0, 40),
        st.integers(-1, 16),
        st.just(""),
    ),
    max_size=8,
)


def test_the_engine_with_the_least_outstanding_work_is_chosen() -> None:
    busy, idle = Candidate("engine-0.1", 3, 8), Candidate("engine-1.1", 2, 8)
    assert choose([busy, idle]) == idle
    assert choose([idle, busy]) == idle


def test_work_counts_relative_to_the_batch() -> None:
    small, large = Candidate("engine-0.1", 2, 4), Candidate("engine-1.1", 6, 64)
    assert choose([small, large]) == large


def test_equals_are_told_apart_by_name_so_that_runs_repeat() -> None:
    one, other = Candidate("engine-0.1", 1, 8), Candidate("engine-1.1", 1, 8)
    assert choose([other, one]) == one


def test_nobody_is_chosen_from_nobody() -> None:
    assert choose([]) is None


def test_an_engine_gets_two_batches_and_no_more() -> None:
    for outstanding in range(CREDIT_WINDOW_BATCHES * 4):
        assert choose([Candidate("engine-0.1", outstanding, 4)]) is not None
    assert choose([Candidate("engine-0.1", CREDIT_WINDOW_BATCHES * 4, 4)]) is None


def test_an_engine_that_claims_no_batch_gets_nothing() -> None:
    assert choose([Candidate("engine-0.1", 0, 0), Candidate("engine-1.1", 0, -3)]) is None


@given(candidates)
def test_the_chosen_has_credit_and_nobody_able_has_less_to_do(engines: list[Candidate]) -> None:
    chosen = choose(engines)
    able = [engine for engine in engines if engine.credit > 0]
    assert (chosen is None) == (not able)
    if chosen is not None:
        assert chosen in able
        assert all(
            chosen.outstanding * engine.max_num_seqs <= engine.outstanding * chosen.max_num_seqs
            for engine in able
        )


@given(candidates)
def test_the_choice_does_not_depend_on_the_order(engines: list[Candidate]) -> None:
    assert choose(engines) == choose(reversed(engines)) == choose(sorted(engines))


def test_what_has_output_goes_on_with_its_class_of_numerics_if_that_has_credit() -> None:
    exact, fast = Candidate("e.1", 15, 8, "exact"), Candidate("e.2", 0, 8, "fast")
    assert choose([exact, fast]) == fast
    assert choose([exact, fast], numerics="exact") == exact
    assert choose([exact._replace(outstanding=16), fast], numerics="exact") == fast
    assert choose([exact, fast], numerics="neither") == fast
