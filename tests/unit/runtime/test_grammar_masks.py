"""Masks for a step: whatever happens to a sequence, they depend on its output alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher

from understudy.protocol.openai.structured_output import json_grammar
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.grammar_masks import KEPT_STEPS, GrammarMasks, Masks
from understudy.runtime.grammars import Grammars, GrammarVocabulary, load_vocabulary
from understudy.runtime.scheduling.decision import NoDraw, ScheduledSequence
from understudy.runtime.scheduling.sequence import Sequence
from understudy.tools.demo.paths import demo_model_directory

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["alpha", "alphabet", "beta"]},
        "sizes": {"type": "array", "items": {"type": "integer", "maximum": 999}, "maxItems": 3},
    },
    "required": ["name", "kind"],
}
GRAMMARS = [
    json_grammar(SCHEMA, param="p").text,
    'start: "begin " (word ",")+ "end"\nword: /[a-z]{2,9}/',
    "start: /(foo|foobar|[0-9]{3,7}x)*/",
    'start: expr\nexpr: expr "+" expr | "(" expr ")" | /[0-9]+/',
]


@cache
def vocabulary() -> GrammarVocabulary:
    return load_vocabulary(demo_model_directory())


@cache
def compiled() -> Grammars:
    return Grammars(vocabulary)


def sequence_of(grammar: str, output: tuple[int, ...] = (), *, request_id: int = 1) -> Sequence:
    params = SamplingParams(seed=0, max_tokens=500, grammar=grammar, stop_token_ids=(0,))
    return Sequence(Request(request_id, 1, (5, 6, 7), params), attempt=0, output=output)


def share_of(sequence: Sequence, draft: tuple[int, ...] = ()) -> ScheduledSequence:
    num_tokens = sequence.num_tokens - sequence.num_computed_tokens
    return ScheduledSequence(sequence, num_tokens + len(draft), draft)


def step(masks: GrammarMasks, *shares: ScheduledSequence) -> dict[int, Masks | NoDraw]:
    """A step, or as many as it takes until nobody waits."""
    while True:
        masks.begin(shares)
        found = masks.collect(shares)
        if NoDraw.WAITING not in found.values():
            return found


def masks_of(masks: GrammarMasks, share: ScheduledSequence) -> Masks:
    found = step(masks, share)[share.sequence.request_id]
    assert isinstance(found, tuple)
    return found


def replayed(grammar: str, output: list[int]) -> bytes:
    """The mask of a matcher that has done nothing but read the output."""
    matcher = compiled().matcher(grammar)
    assert matcher.consume_tokens(output)
    return matcher.compute_bitmask()


def allowed(mask: bytes) -> list[int]:
    return [token for token in range(8 * len(mask)) if mask[token >> 3] >> (token & 7) & 1]


@settings(max_examples=15, deadline=None)
@given(grammar=st.sampled_from(GRAMMARS), seed=st.integers(0, 10**6))
def test_masks_along_an_output_are_those_of_a_replay_whatever_was_drafted(
    grammar: str, seed: int
) -> None:
    chance = random.Random(seed)
    masks = GrammarMasks(compiled())
    sequence = sequence_of(grammar)
    for _ in range(30):
        guessed = [chance.randrange(100) for _ in range(chance.randrange(3))]
        draft = tuple(draft_along(grammar, sequence, chance, chance.randrange(4))) + tuple(guessed)
        found = masks_of(masks, share_of(sequence, draft))
        output = sequence.token_ids[sequence.num_prompt_tokens :]
        for place, mask in enumerate(found):
            assert mask == replayed(grammar, [*output, *draft[:place]])
        if len(found) <= len(draft):
            refused = draft[len(found) - 1]
            assert refused not in allowed(found[-1]) or refused == 0
        token = chance.choice(allowed(found[0]))
        if token == 0:
            return
        sequence.token_ids.append(token)


def draft_along(grammar: str, sequence: Sequence, chance: random.Random, depth: int) -> list[int]:
    """Guesses that the grammar allows."""
    draft: list[int] = []
    output = sequence.token_ids[sequence.num_prompt_tokens :]
    for _ in range(depth):
        draft.append(chance.choice(allowed(replayed(grammar, [*output, *draft]))))
        if draft[-1] == 0:
            break
    return draft


@settings(max_examples=15, deadline=None)
@given(grammar=st.sampled_from(GRAMMARS), seed=st.integers(0, 10**6))
def test_a_mirror_may_change_its_mind(grammar: str, seed: int) -> None:
    chance = random.Random(seed)
    masks = GrammarMasks(compiled())
    output: list[int] = []
    for _ in range(20):
        output = output[: chance.randrange(len(output) + 1)]  # what was guessed wrong is taken back
        while len(output) < 30 and chance.random() < 0.7:
            token = chance.choice(allowed(replayed(grammar, output)))
            if token == 0:
                break
            output.append(token)
        [mask] = masks_of(masks, share_of(sequence_of(grammar, (*output,))))
        assert mask == replayed(grammar, output)


def test_behind_its_end_an_answer_has_nothing_but_its_end() -> None:
    masks = GrammarMasks(compiled())
    sequence = sequence_of("start: /a*/")
    sequence.token_ids += [0, 0]
    assert [allowed(mask) for mask in masks_of(masks, share_of(sequence))] == [[0]]
    sequence.token_ids.append(0)
    assert [allowed(mask) for mask in masks_of(masks, share_of(sequence))] == [[0]]


def test_a_draft_ends_with_the_answer() -> None:
    masks = GrammarMasks(compiled())
    sequence = sequence_of("start: /a*/")
    assert len(masks_of(masks, share_of(sequence, (0, 0, 0)))) == 1


def test_sequences_without_a_grammar_or_that_do_not_sample_are_left_alone() -> None:
    masks = GrammarMasks(compiled())
    free, reading = sequence_of(""), sequence_of(GRAMMARS[0], request_id=2)
    shares = share_of(free), ScheduledSequence(reading, 1)
    assert step(masks, *shares) == {}
    assert masks.num_masks == 0


def test_a_matcher_that_was_forgotten_is_made_again() -> None:
    masks = GrammarMasks(compiled())
    sequence = sequence_of(GRAMMARS[1], (vocabulary().tokenizer.greedy_tokenize("begin ")[0],))
    before = masks_of(masks, share_of(sequence))
    other = sequence_of(GRAMMARS[2], request_id=2)
    for _ in range(KEPT_STEPS + 2):
        masks_of(masks, share_of(other))
    assert masks_of(masks, share_of(sequence)) == before


def test_an_output_that_its_grammar_does_not_allow_is_refused_and_told() -> None:
    told: list[tuple[int, str]] = []
    masks = GrammarMasks(compiled(), report=lambda *words: told.append(words))
    good, bad = sequence_of(GRAMMARS[0]), sequence_of("start: /a/", (70, 71, 72), request_id=2)
    found = step(masks, share_of(good), share_of(bad))
    assert found[2] is NoDraw.REFUSED
    assert isinstance(found[1], tuple)
    assert [request_id for request_id, _ in told] == [2]


def test_a_grammar_that_cannot_be_compiled_is_refused() -> None:
    masks = GrammarMasks(compiled())
    assert step(masks, share_of(sequence_of("start: x")))[1] is NoDraw.REFUSED


def test_a_grammar_that_grows_beyond_its_limits_ends_its_request_alone() -> None:
    masks = GrammarMasks(compiled())
    greedy = sequence_of("start: /([a-z]{1,1000}){1,1000}/", request_id=1)
    modest = sequence_of("start: /[a-z]*/", request_id=2)
    token = vocabulary().tokenizer.greedy_tokenize("a")[0]
    for _ in range(200):
        found = step(masks, share_of(greedy), share_of(modest))
        assert isinstance(found[2], tuple)
        if found[1] is NoDraw.REFUSED:
            return
        greedy.token_ids.append(token)
        modest.token_ids.append(token)
    pytest.skip("this version of the library has no trouble with it")


class SlowVocabulary:
    """A vocabulary that is there when it is told to be."""

    def __init__(self) -> None:
        self.is_there = threading.Event()

    def __call__(self) -> GrammarVocabulary:
        assert self.is_there.wait(30)
        return vocabulary()


def test_who_has_no_mask_yet_waits_and_the_mask_is_there_in_the_end() -> None:
    slow = SlowVocabulary()
    masks = GrammarMasks(Grammars(slow))
    share = share_of(sequence_of(GRAMMARS[0]))
    for _ in range(3):
        masks.begin([share])
        assert masks.collect([share]) == {1: NoDraw.WAITING}
    slow.is_there.set()
    assert masks_of(masks, share) == (replayed(GRAMMARS[0], []),)
    assert masks.num_waits >= 3


def test_a_mask_found_for_another_draft_holds_as_far_as_the_drafts_agree() -> None:
    slow = SlowVocabulary()
    masks = GrammarMasks(Grammars(slow))
    grammar = "start: /a{20}/"
    a = vocabulary().tokenizer.greedy_tokenize("a")[0]
    sequence = sequence_of(grammar)
    share = share_of(sequence, (a, a, a))
    masks.begin([share])
    assert masks.collect([share]) == {1: NoDraw.WAITING}
    slow.is_there.set()
    longest = masks_of(masks, share)
    assert longest
    assert masks_of(masks, share_of(sequence, (a, 70))) == longest[:2]
    assert masks_of(masks, share_of(sequence)) == longest[:1]


def test_an_error_on_a_draft_says_nothing_of_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    grammars = Grammars(vocabulary)
    masks = GrammarMasks(grammars)
    sequence = sequence_of("start: /a{20}/")
    a = vocabulary().tokenizer.greedy_tokenize("a")[0]
    make: Callable[[str], LLMatcher] = grammars.matcher

    class Fragile:
        """Breaks at its second mask, as one does that runs out of fuel."""

        def __init__(self, matcher: LLMatcher) -> None:
            self._matcher = matcher
            self._num_masks = 0

        def compute_bitmask(self) -> bytes:
            self._num_masks += 1
            if self._num_masks > 1:
                self._matcher.consume_token(70)  # refused: it is in an error state from now on
            return self._matcher.compute_bitmask()

        def __getattr__(self, name: str) -> object:
            return getattr(self._matcher, name)

    monkeypatch.setattr(grammars, "matcher", lambda grammar: Fragile(make(grammar)))
    assert len(masks_of(masks, share_of(sequence, (a, a)))) == 1
    sequence.token_ids.append(a)
    assert masks_of(masks, share_of(sequence)) == (replayed("start: /a{20}/", [a]),)
