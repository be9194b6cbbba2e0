"""The log probabilities of a prompt: those of its tokens as output, and nothing else changes."""

from __future__ import annotations

import pytest
import torch

from tests.serving import request_of, serve
from understudy.protocol.openai.sampling import telling_prompt
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.echo import EchoRunner
from understudy.runtime.kit.clock import VirtualClock
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.prompt_lookup import NgramDrafter
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.speculation import Speculator
from understudy.runtime.tokenizer import Tokenizer
from understudy.tools.demo.paths import demo_model_directory

TOKENIZER = Tokenizer.from_directory(demo_model_directory())
MODEL = load_model(
    demo_model_directory(), dtype=torch.float32, device=torch.device("cpu"), numerics="exact"
)
TEXT = "def add(a, b):\n    return a + b\n\n\ndef check(path, size):\n    if size > 0:\n" * 2
PROMPT = tuple(TOKENIZER.encode(TEXT, add_special_tokens=False))
PARAMS = (
    SamplingParams(seed=1, max_tokens=12, temperature=0.0, logprobs=1),
    SamplingParams(seed=2, max_tokens=12, top_p=0.9, logprobs=0, presence_penalty=1.5),
    SamplingParams(seed=3, max_tokens=0, logprobs=2),
    # A stop token in the prompt ends nothing.
    SamplingParams(seed=4, max_tokens=9, min_tokens=4, stop_token_ids=PROMPT[5:7], logprobs=1),
)


def requests() -> list[Request]:
    return [request_of(i, PROMPT[: 50 + i], each) for i, each in enumerate(PARAMS, start=1)]


@pytest.mark.parametrize("max_num_batched_tokens", [7, 64])
@pytest.mark.parametrize("guesses", [False, True])
def test_prompts_are_told_as_the_model_sees_them_and_answers_stay(
    max_num_batched_tokens: int, guesses: bool
) -> None:
    speculator = None
    if guesses:
        speculator = Speculator(NgramDrafter(), drafter=None, depth_max=4, costs=None)
    service = serve(
        MODEL,
        map(telling_prompt, requests()),
        max_num_batched_tokens=max_num_batched_tokens,
        speculator=speculator,
    )
    plain = serve(MODEL, [r for r in requests() if r.params.max_tokens])
    for request in requests():
        told = service.served[request.request_id]
        rest = request.prompt[1:]
        assert tuple(told.tokens[: len(rest)]) == rest
        assert len(told.logprobs) == len(told.tokens)
        if request.params.max_tokens:
            alone = plain.served[request.request_id]
            assert told.tokens[len(rest) :] == alone.tokens
            assert told.logprobs[len(rest) :] == alone.logprobs
        # Each token's is what the model would say of it behind the tokens before.
        for place in (1, 17, len(rest)):
            params = SamplingParams(seed=0, max_tokens=1, logprobs=20)
            one = serve(MODEL, [request_of(9, request.prompt[:place], params)]).served[9]
            top = dict(one.logprobs[0].top)
            chosen = told.logprobs[place - 1].chosen
            assert top.get(request.prompt[place], chosen) == chosen
            assert chosen <= one.logprobs[0].top[0][1]


def test_a_told_prompt_goes_on_elsewhere_from_wherever_it_was() -> None:
    request = telling_prompt(requests()[0])
    truth = serve(MODEL, [request]).served[1]
    runner = ModelRunner(MODEL, num_blocks=64, block_size=8)
    for made in range(len(truth.tokens)):
        sequence = Sequence(request, attempt=1, output=tuple(truth.tokens[:made]))
        sequence.block_table = list(range(64))
        draft = sequence.forced_ahead(made % 5)
        share = ScheduledSequence(sequence, sequence.num_tokens + len(draft), draft)
        drawn = runner.execute(StepPlan(1, (share,)))[1]
        assert isinstance(drawn, tuple)
        assert len(drawn) == len(draft) + 1
        tokens = truth.tokens[made : made + len(drawn)]
        assert [one.token_id for one in drawn][: len(tokens)] == tokens
        logprobs = truth.logprobs[made : made + len(drawn)]
        assert [one.logprobs for one in drawn][: len(tokens)] == logprobs


def test_the_echo_says_a_prompt_again_and_then_what_it_would_have_said() -> None:
    request = request_of(1, (7, 8, 9), SamplingParams(seed=5, max_tokens=4))
    runner = EchoRunner(VirtualClock(), vocab_size=80)

    def output(of: Request, count: int) -> list[int]:
        made: list[int] = []
        while len(made) < count:
            sequence = Sequence(of, attempt=0, output=tuple(made))
            drawn = runner.execute(
                StepPlan(1, (ScheduledSequence(sequence, sequence.num_tokens),))
            )[1]
            assert isinstance(drawn, tuple)
            made.append(drawn[0].token_id)
        return made

    assert output(telling_prompt(request), 6) == [8, 9, *output(request, 4)]
