"""The ledger against plain lists: whatever engines claim, an output is one straight line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from understudy.protocol.packed_logprobs import pack_logprobs
from understudy.protocol.request import (
    FinishReason,
    Request,
    SamplingParams,
    TokenLogprobs,
    TokenRow,
    extend_prefix_hash,
)
from understudy.runtime.control import ledger as ledger_module
from understudy.runtime.control.ledger import RETENTION_S, Entry, Ledger, Verdict

PARAMS = SamplingParams(seed=1, max_tokens=100)
PACKED = pack_logprobs(TokenLogprobs(-0.5, ((7, -0.5),)))


def request(request_id: int) -> Request:
    return Request(request_id, request_id, (1, 2, 3), PARAMS)


def row(
    tokens: tuple[int, ...],
    *,
    before: tuple[int, ...] = (),
    request_id: int = 1,
    attempt: int = 1,
    finish: int = 0,
) -> TokenRow:
    """A row that continues an output of ``before``."""
    prefix_hash = extend_prefix_hash(0, (*before, *tokens))
    return TokenRow(request_id, attempt, len(before), tokens, prefix_hash, finish)


def assigned() -> tuple[Ledger, Entry]:
    """Request 1, with engine "e.1" under epoch 7 for the first time."""
    ledger = Ledger()
    entry = ledger.admit(request(1), 10.0)
    ledger.assign(1, "e.1", 7, 11.0)
    return ledger, entry


def test_tokens_are_accepted_in_order() -> None:
    ledger, entry = assigned()
    assert ledger.accept(row((5,)), "e.1", 7, 12.0) is Verdict.ACCEPTED
    assert ledger.accept(row((6, 7), before=(5,)), "e.1", 7, 13.0) is Verdict.ACCEPTED
    assert entry.output == [5, 6, 7]
    assert entry.progress_at == 13.0
    assert entry.prefix_hash == extend_prefix_hash(0, (5, 6, 7))


@pytest.mark.parametrize(
    ("asked", "told", "verdict"),
    [
        (1, (PACKED,) * 2, Verdict.ACCEPTED),
        (1, (PACKED, PACKED[:-1]), Verdict.BROKEN),
        (1, (PACKED,), Verdict.BROKEN),
        (1, (PACKED,) * 3, Verdict.BROKEN),
        (None, (), Verdict.ACCEPTED),
        (None, (PACKED,) * 2, Verdict.BROKEN),
    ],
)
def test_rows_tell_log_probabilities_of_each_token_if_they_were_asked_for(
    asked: int | None, told: tuple[bytes, ...], verdict: Verdict
) -> None:
    ledger = Ledger()
    entry = ledger.admit(Request(1, 1, (1, 2, 3), replace(PARAMS, logprobs=asked)), 10.0)
    ledger.assign(1, "e.1", 7, 11.0)
    assert ledger.accept(row((5, 6))._replace(logprobs=told), "e.1", 7, 12.0) is verdict
    assert len(entry.logprobs) == (len(told) if verdict is Verdict.ACCEPTED else 0)


def test_a_row_that_comes_twice_is_accepted_once() -> None:
    ledger, entry = assigned()
    assert ledger.accept(row((5,)), "e.1", 7, 12.0) is Verdict.ACCEPTED
    assert ledger.accept(row((5,)), "e.1", 7, 12.0) is Verdict.BROKEN
    assert entry.output == [5]


@pytest.mark.parametrize(
    ("engine", "epoch", "attempt", "request_id"),
    [
        ("e.2", 7, 1, 1),
        ("e.1", 6, 1, 1),
        ("e.1", 8, 1, 1),
        ("e.1", 7, 2, 1),
        ("e.1", 7, 0, 1),
        ("e.1", 7, 1, 2),
    ],
)
def test_rows_of_anyone_but_the_present_attempt_are_stale(
    engine: str, epoch: int, attempt: int, request_id: int
) -> None:
    ledger, entry = assigned()
    late = row((5,), attempt=attempt, request_id=request_id, finish=FinishReason.STOP)
    assert ledger.accept(late, engine, epoch, 12.0) is Verdict.STALE
    assert entry.output == []
    assert ledger.get(1) is entry


def test_rows_of_a_request_that_waits_are_stale() -> None:
    ledger, entry = assigned()
    ledger.release(1)
    assert ledger.accept(row((5,)), "e.1", 7, 12.0) is Verdict.STALE
    ledger.assign(1, "e.1", 7, 13.0)
    assert ledger.accept(row((5,), attempt=1), "e.1", 7, 14.0) is Verdict.STALE
    assert ledger.accept(row((5,), attempt=2), "e.1", 7, 14.0) is Verdict.ACCEPTED
    assert entry.output == [5]


@pytest.mark.parametrize(
    "broken",
    [
        row((6,), before=(5, 5)),
        row((6,), before=()),
        row((6,), before=(4,)),
        row((6,), before=(5,))._replace(prefix_hash=0),
        row((6,), before=(5,))._replace(position=-1),
        row((), before=(4,), finish=FinishReason.STOP),
        row((6,), before=(5,), finish=FinishReason.STOP)._replace(tokens=(7,)),
    ],
)
def test_rows_that_do_not_continue_the_output_are_broken(broken: TokenRow) -> None:
    ledger, entry = assigned()
    ledger.accept(row((5,)), "e.1", 7, 12.0)
    assert ledger.accept(broken, "e.1", 7, 13.0) is Verdict.BROKEN
    assert entry.output == [5]
    assert entry.progress_at == 12.0
    assert ledger.get(1) is entry


@pytest.mark.parametrize("tokens", [(), (5,)])
def test_what_has_ended_takes_no_rows_and_can_be_read_for_a_while(tokens: tuple[int, ...]) -> None:
    ledger, entry = assigned()
    last = row(tokens, finish=FinishReason.LENGTH)
    assert ledger.accept(last, "e.1", 7, 12.0) is Verdict.ACCEPTED
    ledger.end(entry, FinishReason.LENGTH, 12.0)
    assert (entry.output, entry.finish, entry.engine) == (list(tokens), FinishReason.LENGTH, None)
    assert (len(ledger), ledger.get(1), ledger.find(1)) == (0, None, entry)
    assert ledger.accept(last, "e.1", 7, 12.0) is Verdict.STALE
    ledger.forget_old(12.0 + RETENTION_S - 0.001)
    assert ledger.find(1) is entry
    ledger.forget_old(12.0 + RETENTION_S)
    assert ledger.find(1) is None
    ledger.check_integrity()


def test_of_too_many_ended_tokens_the_oldest_requests_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ledger_module, "RETAINED_TOKENS_MAX", 10)
    ledger = Ledger()
    for number in range(5):
        ledger.end(ledger.admit(request(number), 0.0), FinishReason.STOP, float(number))
        ledger.forget_old(float(number))
        ledger.check_integrity()
    assert [number for number in range(5) if ledger.find(number)] == [2, 3, 4]


def test_what_was_put_out_stays_when_a_request_goes_to_another_engine() -> None:
    ledger, entry = assigned()
    ledger.accept(row((5, 6)), "e.1", 7, 12.0)
    assert ledger.release(1) is entry
    again = ledger.assign(1, "e.2", 8, 13.0)
    assert (again.attempt, again.output, again.engine, again.epoch) == (2, [5, 6], "e.2", 8)
    assert ledger.accept(row((7,), before=(5, 6)), "e.1", 7, 14.0) is Verdict.STALE
    going_on = row((7,), before=(5, 6), attempt=2)
    assert ledger.accept(going_on, "e.2", 8, 14.0) is Verdict.ACCEPTED
    assert entry.output == [5, 6, 7]


def test_a_request_is_with_one_engine_at_a_time() -> None:
    ledger, _ = assigned()
    with pytest.raises(AssertionError, match="one engine"):
        ledger.assign(1, "e.2", 8, 12.0)


def test_a_request_is_admitted_once() -> None:
    ledger, _ = assigned()
    with pytest.raises(AssertionError):
        ledger.admit(request(1), 12.0)


def test_a_request_ends_once() -> None:
    ledger, entry = assigned()
    ledger.end(entry, FinishReason.ERROR, 12.0, code="internal_error", message="lost")
    assert (entry.error_code, entry.error_message) == ("internal_error", "lost")
    with pytest.raises(AssertionError, match="once"):
        ledger.end(entry, FinishReason.STOP, 12.0)


def keyed(request_id: int, group_id: int, *, key: bytes = b"key") -> Request:
    return Request(
        request_id, group_id, (1, 2, 3), PARAMS, idempotency_key=key, body_digest=b"body"
    )


def test_the_requests_of_a_group_are_found_together_living_or_ended() -> None:
    ledger = Ledger()
    first, second = ledger.admit(keyed(1, 1), 0.0), ledger.admit(keyed(2, 1), 0.0)
    assert ledger.group(1) == [first, second]
    ledger.end(first, FinishReason.STOP, 1.0)
    assert ledger.group(1) == [first, second]
    assert ledger.group(2) == []
    ledger.check_integrity()


def test_an_idempotency_key_stands_for_its_group_until_that_is_forgotten() -> None:
    ledger = Ledger()
    first, second = ledger.admit(keyed(1, 1), 0.0), ledger.admit(keyed(2, 1), 0.0)
    assert ledger.duplicated(b"key") == (1, b"body")
    assert ledger.duplicated(b"other") is None
    assert ledger.duplicated(b"") is None
    ledger.accept(row((5,)), "e.1", 7, 1.0)
    for entry in (first, second):
        ledger.end(entry, FinishReason.STOP, 1.0)
    assert ledger.duplicated(b"key") == (1, b"body")
    ledger.forget_old(1.0 + RETENTION_S)
    assert ledger.duplicated(b"key") is None


def test_a_call_that_was_called_off_before_anything_came_of_it_frees_its_key() -> None:
    ledger = Ledger()
    void = ledger.admit(keyed(1, 1), 0.0)
    ledger.end(void, FinishReason.CANCELLED, 1.0)
    assert ledger.duplicated(b"key") is None
    ledger.admit(keyed(3, 3), 2.0)
    assert ledger.duplicated(b"key") == (3, b"body")
    ledger.forget_old(1.0 + RETENTION_S)
    assert ledger.duplicated(b"key") == (3, b"body"), "it is another's key now"


def test_a_key_that_comes_again_stays_with_the_first() -> None:
    ledger = Ledger()
    ledger.admit(keyed(1, 1), 0.0)
    ledger.admit(keyed(2, 2), 0.0)
    assert ledger.duplicated(b"key") == (1, b"body")


def test_an_engine_that_is_back_goes_on_where_its_output_is_ahead() -> None:
    ledger, entry = assigned()
    ledger.accept(row((5,)), "e.1", 7, 12.0)
    ledger.release(1)
    whole = row((5, 6, 7))
    assert ledger.adopt(whole, "e.1", 9, 13.0) == row((6, 7), before=(5,))
    assert (entry.output, entry.engine, entry.epoch) == ([5, 6, 7], "e.1", 9)
    assert ledger.accept(row((8,), before=(5, 6, 7)), "e.1", 9, 14.0) is Verdict.ACCEPTED
    known = ledger.adopt(row((5, 6, 7, 8)), "e.1", 10, 15.0)
    assert known is not None
    assert known.tokens == ()


@pytest.mark.parametrize(
    "told",
    [
        pytest.param(row((5, 6), attempt=2), id="another attempt"),
        pytest.param(row((6, 7)), id="another output"),
        pytest.param(row((7,), before=(5, 6)), id="a gap"),
        pytest.param(row((5, 6), request_id=3), id="another request"),
        pytest.param(row((5, 6))._replace(prefix_hash=1), id="a wrong hash"),
    ],
)
def test_what_does_not_fit_is_not_adopted(told: TokenRow) -> None:
    ledger, entry = assigned()
    ledger.accept(row((5,)), "e.1", 7, 12.0)
    assert ledger.adopt(told, "e.1", 9, 13.0) is None
    assert (entry.output, entry.epoch) == ([5], 7)


def test_what_is_with_another_engine_is_not_adopted() -> None:
    ledger, entry = assigned()
    assert ledger.adopt(row((5,)), "e.2", 9, 13.0) is None
    assert entry.engine == "e.1"


@given(
    st.lists(st.integers(0, 9), max_size=12),
    st.integers(0, 12),
    st.integers(1, 5),
    st.booleans(),
)
def test_whoever_joins_is_told_all_from_its_position_on(
    output: list[int], position: int, size: int, has_ended: bool
) -> None:
    entry = Entry(request(1), 0.0, attempt=1, output=output, finish=1 if has_ended else 0)
    entry.prefix_hash = extend_prefix_hash(0, output)
    position = min(position, len(output))
    rows = entry.rows_from(position, size)
    known = output[:position]
    for told in rows:
        assert told.position == len(known)
        assert len(told.tokens) <= size
        known += told.tokens
        assert told.prefix_hash == extend_prefix_hash(0, known)
    assert known == output
    assert [told.finish for told in rows] == [0] * (len(rows) - 1) + [entry.finish]


def test_entries_are_given_oldest_first() -> None:
    ledger = Ledger()
    for request_id in (9, 2, 5):
        ledger.admit(request(request_id), float(request_id))
    assert [entry.request.request_id for entry in ledger.entries()] == [9, 2, 5]


def test_only_the_first_assignment_counts_as_progress() -> None:
    """Else a request that ends every engine it is given to would never be given up."""
    ledger, entry = assigned()
    assert entry.progress_at == 11.0
    for number in range(5):
        ledger.release(1)
        ledger.assign(1, "e.1", 7, 12.0 + number)
    assert entry.progress_at == 11.0


ids = st.integers(0, 3)
engines = st.sampled_from(["a.1", "a.2", "b.1"])
epochs = st.integers(1, 3)


class LedgerMachine(RuleBasedStateMachine):
    """Does to plain lists what it does to the ledger.

    The model says in words what the ledger computes with hashes: a row counts if it comes from
    where the request is, and if the whole output it claims begins with the one that is known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger()
        self.outputs: dict[int, list[int]] = {}
        self.places: dict[int, tuple[str, int] | None] = {}
        self.attempts: dict[int, int] = {}

    @rule(request_id=ids)
    def admit(self, request_id: int) -> None:
        if request_id not in self.outputs and self.ledger.find(request_id) is None:
            self.ledger.admit(request(request_id), 0.0)
            self.outputs[request_id] = []
            self.places[request_id] = None
            self.attempts[request_id] = 0

    @rule(request_id=ids, engine=engines, epoch=epochs)
    def assign(self, request_id: int, engine: str, epoch: int) -> None:
        if request_id in self.outputs and self.places[request_id] is None:
            self.ledger.assign(request_id, engine, epoch, 0.0)
            self.places[request_id] = engine, epoch
            self.attempts[request_id] += 1

    @rule(request_id=ids)
    def release(self, request_id: int) -> None:
        if request_id in self.outputs:
            self.ledger.release(request_id)
            self.places[request_id] = None

    @rule(request_id=ids)
    def end(self, request_id: int) -> None:
        entry = self.ledger.get(request_id)
        assert (entry is not None) == (request_id in self.outputs)
        if entry is not None:
            self.ledger.end(entry, FinishReason.CANCELLED, 0.0)
            self.forget(request_id)

    @rule()
    def time_passes(self) -> None:
        self.ledger.forget_old(RETENTION_S)
        assert all(self.ledger.find(number) is self.ledger.get(number) for number in range(4))

    @rule(
        request_id=ids,
        engine=engines,
        epoch=epochs,
        attempt=st.integers(0, 3),
        start=st.integers(0, 3),
        told=st.lists(st.integers(0, 1), max_size=4),
    )
    def adopt(
        self,
        request_id: int,
        engine: str,
        epoch: int,
        attempt: int,
        start: int,
        told: list[int],
    ) -> None:
        """An engine that is back tells all that it added, from where it began."""
        output = self.outputs.get(request_id, [])
        before = output[:start]
        whole = [*before, *told]
        claim = row(tuple(told), before=tuple(before), request_id=request_id, attempt=attempt)
        place = self.places.get(request_id)
        is_right = (
            request_id in self.outputs
            and self.attempts[request_id] == attempt
            and (place is None or place[0] == engine)
            and whole[: len(output)] == output
        )
        rest = self.ledger.adopt(claim, engine, epoch, 0.0)
        assert (rest is not None) == is_right
        if rest is not None:
            assert list(rest.tokens) == whole[len(output) :]
            self.outputs[request_id] = whole
            self.places[request_id] = engine, epoch

    @rule(
        request_id=ids,
        engine=engines,
        epoch=epochs,
        attempt=st.integers(0, 3),
        claimed=st.lists(st.integers(0, 1), max_size=4),
        num_new=st.integers(0, 3),
        finish=st.sampled_from([0, 0, 0, 1, 3]),
    )
    def claim(
        self,
        request_id: int,
        engine: str,
        epoch: int,
        attempt: int,
        claimed: list[int],
        num_new: int,
        finish: int,
    ) -> None:
        """An engine reports the last ``num_new`` tokens of an output that it believes in."""
        before = claimed[: max(0, len(claimed) - num_new)]
        self.report(request_id, engine, epoch, attempt, before, claimed[len(before) :], finish)

    @rule(
        request_id=ids, new=st.lists(st.integers(0, 1), max_size=3), finish=st.sampled_from([0, 2])
    )
    def go_on(self, request_id: int, new: list[int], finish: int) -> None:
        """The right engine goes on with the right output."""
        place = self.places.get(request_id)
        if place is not None:
            before = list(self.outputs[request_id])
            self.report(request_id, *place, self.attempts[request_id], before, new, finish)

    def report(
        self,
        request_id: int,
        engine: str,
        epoch: int,
        attempt: int,
        before: list[int],
        new: list[int],
        finish: int,
    ) -> None:
        claim = row(
            tuple(new),
            before=tuple(before),
            request_id=request_id,
            attempt=attempt,
            finish=finish,
        )
        expected = Verdict.BROKEN
        if self.places.get(request_id) != (engine, epoch) or self.attempts[request_id] != attempt:
            expected = Verdict.STALE
        elif self.outputs[request_id] == before:
            expected = Verdict.ACCEPTED
            self.outputs[request_id] += new
        assert self.ledger.accept(claim, engine, epoch, 0.0) is expected
        if expected is Verdict.ACCEPTED and finish:
            self.end(request_id)

    def forget(self, request_id: int) -> None:
        for known in (self.outputs, self.places, self.attempts):
            known.pop(request_id, None)

    @invariant()
    def both_hold_the_same(self) -> None:
        self.ledger.check_integrity()
        assert len(self.ledger) == len(self.outputs)
        held = {entry.request.request_id: entry for entry in self.ledger.entries()}
        assert {number: entry.output for number, entry in held.items()} == self.outputs
        assert {number: entry.attempt for number, entry in held.items()} == self.attempts
        for number, entry in held.items():
            place = self.places[number]
            assert entry.engine == (None if place is None else place[0])
            assert entry.prefix_hash == extend_prefix_hash(0, self.outputs[number])


TestLedger = LedgerMachine.TestCase
TestLedger.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
