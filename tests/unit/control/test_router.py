"""The router: where a request costs the least, and never beyond the credit."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.messages import Capacity, Role
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.ledger import Entry
from understudy.runtime.control.registry import Member
from understudy.runtime.control.router import CREDIT_WINDOW_BATCHES, Candidate, Router, choose

candidates = st.lists(
    st.builds(
        Candidate,
        st.integers(0, 30).map(lambda n: f"engine-{n}.1"),
        st.integers(0, 40),
        st.integers(-1, 16),
        st.just(""),
        st.just(0),
    ),
    max_size=8,
    unique_by=lambda candidate: candidate.identity,
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


# Prefixes


def test_a_cached_prefix_draws_a_request_to_a_busier_engine() -> None:
    has_it = Candidate("engine-0.1", 3, 8, num_cached_tokens=512)
    idle = Candidate("engine-1.1", 0, 8)
    assert choose([has_it, idle]) == has_it


def test_a_prefix_is_not_worth_an_overloaded_engine() -> None:
    has_it = Candidate("engine-0.1", 15, 8, num_cached_tokens=512)
    idle = Candidate("engine-1.1", 0, 8)
    assert choose([has_it, idle]) == idle


def test_a_prefix_does_not_lead_beyond_the_credit() -> None:
    full = Candidate("engine-0.1", CREDIT_WINDOW_BATCHES * 8, 8, num_cached_tokens=1 << 20)
    assert choose([full]) is None


def test_the_same_bits_count_more_than_a_cached_prefix() -> None:
    same = Candidate("engine-0.1", 7, 8, "a")
    other = Candidate("engine-1.1", 0, 8, "b", num_cached_tokens=1 << 20)
    assert choose([same, other], numerics="a") == same


def make_entry(request_id: int, prompt: Iterable[int], tenant: str = "") -> Entry:
    params = SamplingParams(seed=0, max_tokens=8)
    return Entry(Request(request_id, request_id, tuple(prompt), params, tenant=tenant), 0.0)


def make_engine(number: int) -> Member:
    capacity = Capacity(max_num_seqs=8, max_model_len=4096, num_blocks=64, block_size=16)
    name = f"engine-{number}"
    return Member(name, f"{name}.1", Role.ENGINE, 1, 1, 0.0, capacity=capacity)


def test_requests_with_one_prefix_gather_and_others_spread() -> None:
    router, engines = Router(), [make_engine(0), make_engine(1)]
    load = dict.fromkeys(("engine-0.1", "engine-1.1"), 0)

    def give(entry: Entry) -> str:
        chosen = router.choose(entry, engines, load.__getitem__)
        assert chosen is not None
        load[chosen.identity] += 1
        return chosen.name

    common = range(256)
    assert give(make_entry(1, common)) == "engine-0"
    assert give(make_entry(2, range(1000, 1256))) == "engine-1"
    assert give(make_entry(3, [*common, 1])) == "engine-0"
    assert give(make_entry(4, [*common, 2])) == "engine-0"
    assert give(make_entry(5, common, tenant="other")) == "engine-1"


def test_a_conversation_comes_back_to_where_its_answer_was_made() -> None:
    router, engines = Router(), [make_engine(0), make_engine(1)]
    said = list(range(100))
    first = make_entry(1, said)
    chosen = router.choose(first, reversed(engines), lambda _: 0)
    assert chosen is engines[0]
    first.output = list(range(500, 600))
    router.ended(first, engines[0])
    again = make_entry(2, [*said, *first.output, 7])
    assert router.choose(again, engines, {"engine-0.1": 2, "engine-1.1": 0}.__getitem__) is chosen


def test_an_engine_that_is_gone_has_nothing_any_more() -> None:
    router, engines = Router(), [make_engine(0), make_engine(1)]
    load = {"engine-0.1": 1, "engine-1.1": 0}
    assert router.choose(make_entry(1, range(128)), engines, lambda _: 0) is engines[0]
    assert router.choose(make_entry(2, range(128)), engines, load.__getitem__) is engines[0]
    router.forget("engine-0.1")
    assert router.choose(make_entry(3, range(128)), engines, load.__getitem__) is engines[1]


def test_nobody_with_credit_means_that_nobody_is_chosen() -> None:
    router, engines = Router(), [make_engine(0), make_engine(1)]
    assert router.choose(make_entry(1, range(128)), engines, lambda _: 16) is None
