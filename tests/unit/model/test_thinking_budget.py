"""Thoughts that are closed for a model: the same tokens however and wherever they are made."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import jsonschema
import pytest
import torch

from tests.serving import Service, request_of, serve
from tests.unit.model.speculators import speculator_of
from understudy.protocol.openai.structured_output import json_grammar
from understudy.protocol.request import FinishReason, Request, SamplingParams, Thinking
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.grammars import Grammars, load_vocabulary
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.parsers.thinking import thinking_of
from understudy.runtime.scheduling.decision import NoDraw, ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory, draft_model_directory

TOKENIZER = Tokenizer.from_directory(demo_model_directory())
SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["function", "functional", "class"]},
        "arguments": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    },
    "required": ["kind", "arguments"],
    "additionalProperties": False,
}
SPACE = TOKENIZER.encode(" ", add_special_tokens=False)[0]


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


def thinking(budget: int | None, *, has_grammar: bool = False, is_open: bool = True) -> Thinking:
    return thinking_of(
        "qwen3",
        TOKENIZER,
        is_open=is_open,
        budget=budget,
        has_grammar=has_grammar,
        vocab_size=model_at("demo").vocab_size,
    )


FORCED = thinking(0).forced


def requests() -> list[Request]:
    """Budgets of all sizes, with and without a form for the answer, greedy and sampled."""
    grammar = json_grammar(SCHEMA, param="p").text
    plain = SamplingParams(seed=1, max_tokens=40, thinking=thinking(9))
    formed = SamplingParams(
        seed=2,
        max_tokens=90,
        grammar=grammar,
        stop_token_ids=(0,),
        thinking=thinking(7, has_grammar=True),
    )
    # As a model of this kind would think: a token of its own opens, one that it likes closes.
    own = Thinking(((SPACE,),), thinking(0).closings, is_open=False, budget=4, forced=FORCED)
    likely = _likely_tokens()
    params = [
        plain,
        replace(plain, temperature=0.0, repetition_penalty=1.2, thinking=thinking(0)),
        replace(plain, logprobs=2, top_p=0.9, thinking=thinking(25)),
        replace(plain, thinking=thinking(1000)),
        formed,
        replace(formed, seed=3, temperature=0.0, thinking=thinking(0, has_grammar=True)),
        replace(formed, seed=4, logit_bias=((SPACE, -100.0),), thinking=own),
        replace(formed, seed=5, temperature=0.0, logit_bias=((SPACE, 100.0),), thinking=own),
        # Closed by the model itself, long before the budget is spent.
        replace(formed, thinking=Thinking((), likely, is_open=True, budget=60, forced=FORCED)),
        replace(plain, thinking=None),
    ]
    prompt = TOKENIZER.encode("def add(a, b):\n    return", add_special_tokens=False)
    return [request_of(i, prompt[: 3 + i % 4], each) for i, each in enumerate(params, start=1)]


@cache
def _likely_tokens() -> tuple[tuple[int, ...], ...]:
    """What this request says as its ninth token, as a closing mark."""
    params = SamplingParams(seed=2, max_tokens=9)
    prompt = TOKENIZER.encode("def add(a, b):\n    return", add_special_tokens=False)
    service = serve(model_at("demo"), [request_of(9, prompt[: 3 + 9 % 4], params)])
    return ((service.served[9].tokens[8],),)


@pytest.fixture(scope="module")
def truth(grammars: Grammars) -> Service:
    """Each request alone, a token at a time."""
    return serve(model_at("demo"), requests(), at_once=False, grammar_masks=GrammarMasks(grammars))


def text_of(tokens: list[int]) -> str:
    return TOKENIZER.decode(tokens)


def test_thoughts_end_when_their_budget_is_spent_and_what_was_free_stays(truth: Service) -> None:
    forced = list(FORCED)
    assert text_of(forced) == "\n</think>\n\n"
    free = truth.served[10].tokens
    assert truth.served[1].tokens[9:][: len(forced)] == forced
    assert truth.served[2].tokens[: len(forced)] == forced
    assert truth.served[3].tokens[25:][: len(forced)] == forced
    assert truth.served[3].logprobs[25].chosen <= 0.0
    assert text_of(truth.served[4].tokens).count("</think>") == 0
    assert len(free) == len(truth.served[4].tokens) == 40
    for served in truth.served.values():
        assert text_of(served.tokens).count("</think>") <= 1


def test_a_form_holds_for_what_follows_the_thoughts(truth: Service) -> None:
    for number, budget in ((5, 7), (6, 0)):
        tokens = truth.served[number].tokens
        answer = text_of(tokens[budget + len(FORCED) :])
        jsonschema.validate(json.loads(answer), SCHEMA)
        assert truth.served[number].finish is FinishReason.STOP
    # Not opened, so the form holds from the beginning; opened, from behind the thoughts.
    jsonschema.validate(json.loads(text_of(truth.served[7].tokens)), SCHEMA)
    opened = truth.served[8].tokens
    assert opened[0] == SPACE
    assert tuple(opened[5 : 5 + len(FORCED)]) == FORCED
    jsonschema.validate(json.loads(text_of(opened[5 + len(FORCED) :])), SCHEMA)
    [(closing,)] = _likely_tokens()
    thought = truth.served[9].tokens
    place = thought.index(closing)
    assert place <= 8
    jsonschema.validate(json.loads(text_of(thought[place + 1 :])), SCHEMA)


def test_a_batch_with_small_chunks_and_preemptions_makes_the_same(
    truth: Service, masks: GrammarMasks
) -> None:
    crowd = [
        replace(request, request_id=100 * copy + request.request_id)
        for request in requests()
        for copy in range(2)
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
    assert all(served == truth.served[i % 100] for i, served in service.served.items())


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
    """Also from the middle of the mark, and with a draft that reaches beyond it."""
    runner = ModelRunner(model_at("demo"), num_blocks=64, block_size=8, grammar_masks=masks)
    for request in requests()[:9]:
        whole = truth.served[request.request_id].tokens
        for made in range(len(whole)):
            # A new request id each time: an engine that has never seen it.
            other = replace(request, request_id=1000 * request.request_id + made)
            sequence = Sequence(other, attempt=1, output=tuple(whole[:made]))
            sequence.block_table = list(range(64))
            draft = tuple(whole[made : made + made % 4])
            share = ScheduledSequence(sequence, sequence.num_tokens + len(draft), draft)
            drawn = runner.execute(StepPlan(1, (share,)))[other.request_id]
            while drawn is NoDraw.WAITING:  # for its masks; an engine would step again as well
                drawn = runner.execute(StepPlan(1, (share,)))[other.request_id]
            assert isinstance(drawn, tuple)
            tokens = [one.token_id for one in drawn]
            # The sequence's end is the scheduler's business.
            assert tokens[: len(whole) - made] == whole[made : made + len(tokens)]
