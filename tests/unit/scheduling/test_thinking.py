"""Where an output stands with its thoughts: the same by every way of reading it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from understudy.protocol.request import Request, SamplingParams, Thinking
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.thinking import Phase, begin, forced_token, progress_of

OPEN, CLOSE, NEWLINE = 90, 91, 9
TOKENS = st.integers(0, 3)
SETTINGS = st.builds(
    Thinking,
    openings=st.sampled_from([(), ((1,),), ((1, 2), (3, 1, 2)), ((0,), (0, 0))]),
    closings=st.sampled_from([((2,),), ((2, 3),), ((2, 3, 2), (2, 1)), ((1, 1),)]),
    is_open=st.booleans(),
    budget=st.none() | st.integers(0, 6),
    forced=st.lists(TOKENS, min_size=1, max_size=4).map(tuple),
)


def stands(thinking: Thinking, output: list[int]) -> tuple[Phase, int]:
    """The slow, obvious reading: the phase, and where the answer begins or may begin."""
    start = 0
    if not thinking.is_open:
        # A longer opening that begins with a shorter one is never reached.
        starts = [len(o) for o in thinking.openings if tuple(output[: len(o)]) == o]
        if not starts:
            may_open = any(o[: len(output)] == tuple(output) for o in thinking.openings)
            return (Phase.START if may_open else Phase.ANSWER), 0
        start = min(starts)
    spent = len(output) + 1 if thinking.budget is None else start + thinking.budget
    for end in range(start + 1, len(output) + 1):
        if end > spent:
            break
        thoughts = tuple(output[start:end])
        if any(thoughts[-len(closing) :] == closing for closing in thinking.closings):
            return Phase.ANSWER, end
    if len(output) < spent:
        return Phase.THOUGHTS, 0
    answer = spent + len(thinking.forced)
    return (Phase.ANSWER, answer) if len(output) >= answer else (Phase.CLOSING, 0)


@given(SETTINGS, st.lists(TOKENS, max_size=20))
def test_reading_token_by_token_finds_what_a_look_at_the_whole_finds(
    thinking: Thinking, output: list[int]
) -> None:
    progress = progress_of(thinking, output)
    phase, answer_start = stands(thinking, output)
    assert progress.phase is phase
    assert progress.num_tokens == len(output)
    if phase is Phase.ANSWER:
        assert progress.answer_start == answer_start


@given(SETTINGS, st.lists(TOKENS, max_size=30))
def test_thoughts_never_exceed_their_budget_and_are_then_closed(
    thinking: Thinking, choices: list[int]
) -> None:
    """An output as an engine makes it: what is forced is what comes."""
    output: list[int] = []
    most = 0
    for choice in choices:
        progress = progress_of(thinking, output)
        forced = forced_token(thinking, progress)
        output.append(choice if forced is None else forced)
        if progress.phase is Phase.THOUGHTS:
            most = max(most, progress.num_in_phase + 1)
    if thinking.budget is not None:
        assert most <= thinking.budget
        is_at_once = thinking.is_open and thinking.budget == 0
        if is_at_once and len(output) >= len(thinking.forced):
            assert tuple(output[: len(thinking.forced)]) == thinking.forced


@given(SETTINGS, st.lists(st.lists(TOKENS, max_size=5), max_size=6), st.data())
def test_a_sequence_knows_where_it_stands_however_its_tokens_came(
    thinking: Thinking, pieces: list[list[int]], data: st.DataObject
) -> None:
    """Token by token, resumed in the middle, or given another list, as a guesser's mirror is."""
    params = SamplingParams(seed=0, max_tokens=100, thinking=thinking)
    sequence = Sequence(Request(1, 1, (7, 2, 2), params), attempt=0)
    output: list[int] = []
    for piece in pieces:
        for token in piece:
            sequence.append(token)
        output += piece
        assert sequence.thoughts == progress_of(thinking, output)
        resumed = Sequence(Request(1, 1, (7, 2, 2), params), attempt=1, output=tuple(output))
        assert resumed.thoughts == sequence.thoughts
        if data.draw(st.booleans()):
            kept = data.draw(st.integers(0, len(output)))
            output = output[:kept]
            sequence.token_ids = [7, 2, 2, *output]
            assert sequence.thoughts == progress_of(thinking, output)


def test_a_budget_of_nothing_closes_at_once() -> None:
    thinking = Thinking(((OPEN,),), ((CLOSE,),), is_open=True, budget=0, forced=(NEWLINE, CLOSE))
    assert forced_token(thinking, begin(thinking)) == NEWLINE
    unopened = Thinking(((OPEN,),), ((CLOSE,),), is_open=False, budget=0, forced=(NEWLINE, CLOSE))
    assert forced_token(unopened, begin(unopened)) is None
    assert forced_token(unopened, progress_of(unopened, [OPEN])) == NEWLINE
    assert forced_token(unopened, progress_of(unopened, [5, OPEN])) is None


def test_the_echo_closes_thoughts_as_a_model_does() -> None:
    thinking = Thinking((), ((CLOSE,),), is_open=True, budget=3, forced=(NEWLINE, CLOSE, NEWLINE))
    params = SamplingParams(seed=4, max_tokens=9, thinking=thinking)
    request = Request(1, 1, (5,), params)
    runner = EchoRunner(VirtualClock(), vocab_size=80, reserved=(NEWLINE,))
    output: list[int] = []
    while len(output) < 9:
        sequence = Sequence(request, attempt=0, output=tuple(output))
        plan = StepPlan(1, (ScheduledSequence(sequence, sequence.num_tokens),))
        drawn = runner.execute(plan)[1]
        assert isinstance(drawn, tuple)
        output.append(drawn[0].token_id)
    assert output[3:6] == [NEWLINE, CLOSE, NEWLINE]
    assert NEWLINE not in output[:3] + output[6:]
    # A draft that foresees it is taken whole.
    sequence = Sequence(request, attempt=0, output=tuple(output[:1]))
    sequence.num_computed_tokens = 1
    share = ScheduledSequence(sequence, 1 + 5, tuple(output[1:6]))
    drawn = runner.execute(StepPlan(1, (share,)))[1]
    assert isinstance(drawn, tuple)
    assert [one.token_id for one in drawn] == output[1:7]
