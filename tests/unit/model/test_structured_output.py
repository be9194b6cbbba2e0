"""Answers that follow a grammar: valid, and the same however and wherever they are made."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch

from tests.serving import Service, request_of, serve
from tests.unit.model.speculators import speculator_of
from understudy.protocol.openai.structured_output import (
    choice_grammar,
    json_grammar,
    regex_grammar,
)
from understudy.protocol.request import FinishReason, Request, SamplingParams
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import Grammars, load_vocabulary
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory, draft_model_directory

TOKENIZER = Tokenizer.from_directory(demo_model_directory())
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "description": {"type": "string", "maxLength": 12},
        "kind": {"enum": ["function", "functional", "class"]},
        "arguments": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["description", "kind", "arguments"],
    "additionalProperties": False,
}
MAX_TOKENS = 120
FREE = SamplingParams(seed=9, max_tokens=20, logprobs=2)


@cache
def model_at(path: str) -> Transformer:
    directory = demo_model_directory() if path == "demo" else draft_model_directory()
    cpu = torch.device("cpu")
    return load_model(directory, dtype=torch.float32, device=cpu, numerics="exact")


@pytest.fixture(scope="module")
def grammars() -> Grammars:
    return Grammars(lambda: load_vocabulary(demo_model_directory()))


@pytest.fixture
def masks(grammars: Grammars) -> Iterator[GrammarMasks]:
    masks = GrammarMasks(grammars)
    yield masks
    masks.close()


def requests() -> list[Request]:
    """Grammars of all kinds, all manners of drawing, and a request that has none beside them."""
    schema = json_grammar(SCHEMA, param="p").text
    grammars = [schema, schema, schema, regex_grammar("(ab|cd){2,6}", param="p").text]
    grammars += [choice_grammar(["return", "returns it", "x"], param="p").text]
    params = [
        SamplingParams(
            seed=seed,
            max_tokens=MAX_TOKENS,
            temperature=(1.0, 0.0, 1.3, 1.0, 1.0)[seed],
            top_p=(1.0, 1.0, 0.9, 1.0, 1.0)[seed],
            repetition_penalty=(1.0, 1.1, 1.0, 1.0, 1.0)[seed],
            logprobs=(None, 1, None, None, 0)[seed],
            grammar=grammar,
            stop_token_ids=(0,),
        )
        for seed, grammar in enumerate(grammars)
    ]
    prompt = TOKENIZER.encode("def add(a, b):\n    return", add_special_tokens=False)
    return [request_of(i, prompt[: 3 + i], each) for i, each in enumerate([*params, FREE], start=1)]


@pytest.fixture(scope="module")
def truth(grammars: Grammars) -> Service:
    """Each request alone, a token at a time."""
    return serve(model_at("demo"), requests(), at_once=False, grammar_masks=GrammarMasks(grammars))


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def test_answers_follow_their_grammars_and_end_when_they_are_complete(truth: Service) -> None:
    finished = [truth.served[i] for i in range(1, 6)]
    assert [served.finish for served in finished] == 5 * [FinishReason.STOP]
    assert all(served.tokens[-1] == 0 for served in finished)
    for served in finished[:3]:
        jsonschema.validate(json.loads(text_of(served.tokens)), SCHEMA)
    assert re.fullmatch("(ab|cd){2,6}", text_of(finished[3].tokens))
    assert text_of(finished[4].tokens) in {"return", "returns it", "x"}


def test_a_batch_with_small_chunks_and_preemptions_makes_the_same(
    truth: Service, masks: GrammarMasks
) -> None:
    crowd = [
        replace(request, request_id=10 * copy + request.request_id)
        for request in requests()
        for copy in range(3)
    ]
    service = serve(
        model_at("demo"),
        crowd,
        grammar_masks=masks,
        max_num_batched_tokens=17,
        num_blocks=33,
        block_size=4,
    )
    assert service.num_preemptions > 0
    assert all(served == truth.served[i % 10] for i, served in service.served.items())


@pytest.mark.parametrize("kind", ["lookup", "oracle", "both"])
def test_speculation_makes_the_same(
    kind: str, truth: Service, masks: GrammarMasks, grammars: Grammars
) -> None:
    speculator = speculator_of(kind, truth, model_at("draft"), grammars)
    service = serve(model_at("demo"), requests(), grammar_masks=masks, speculator=speculator)
    assert service.served == truth.served
    assert speculator.num_accepted_tokens > 0


def test_an_answer_goes_on_elsewhere_from_wherever_it_was(
    truth: Service, masks: GrammarMasks
) -> None:
    """Also from the middle of a key."""
    runner = ModelRunner(model_at("demo"), num_blocks=64, block_size=8, grammar_masks=masks)
    for request in requests()[1:4:2]:
        whole = truth.served[request.request_id].tokens
        for made in range(len(whole)):
            # A new request id each time: an engine that has never seen it.
            other = replace(request, request_id=1000 * request.request_id + made)
            sequence = Sequence(other, attempt=1, output=tuple(whole[:made]))
            sequence.block_table = list(range(64))
            plan = StepPlan(1, (ScheduledSequence(sequence, sequence.num_tokens),))
            drawn = runner.execute(plan)[other.request_id]
            assert isinstance(drawn, tuple)
            assert drawn[0].token_id == whole[made]


def test_log_probabilities_are_those_of_the_raw_logits(truth: Service) -> None:
    """The likeliest tokens that are told need not be allowed."""
    request, served = requests()[1], truth.served[2]
    assert len(served.logprobs) == len(served.tokens)
    likeliest = [each.top[0][0] for each in served.logprobs]
    assert likeliest != served.tokens
    free = replace(request, params=replace(request.params, grammar="", max_tokens=1))
    [first] = serve(model_at("demo"), [free]).served[2].logprobs
    assert first.top == served.logprobs[0].top


def test_a_grammar_that_fails_ends_its_request_and_no_other(masks: GrammarMasks) -> None:
    good, *_, free = requests()
    bad = replace(good, request_id=77, params=replace(good.params, grammar="start: nothing"))
    service = serve(model_at("demo"), [bad, good, free], grammar_masks=masks)
    assert service.served[77].finish is FinishReason.REFUSED
    assert service.served[77].tokens == []
    assert service.served[good.request_id].finish is FinishReason.STOP
    assert service.served[free.request_id].finish is FinishReason.LENGTH
