"""The runner: which sequences are sampled, and that a seed's text is its own."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch

from tests.serving import request_of, serve
from tests.unit.model.conftest import LoadModel
from understudy.protocol.request import FinishReason, Request, SamplingParams
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling.decision import EngineFault, ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence, SequenceStatus

PARAMS = [
    SamplingParams(seed=0, max_tokens=24, temperature=0.0),
    SamplingParams(seed=1, max_tokens=24),
    SamplingParams(seed=2, max_tokens=24, top_k=20, top_p=0.9, temperature=1.3),
    SamplingParams(seed=3, max_tokens=24, min_p=0.05, repetition_penalty=1.2),
    SamplingParams(seed=4, max_tokens=24, frequency_penalty=0.4, presence_penalty=0.3, logprobs=2),
    SamplingParams(
        seed=5, max_tokens=24, logit_bias=((3, 2.0),), stop_token_ids=(3,), min_tokens=4
    ),
]


def requests() -> list[Request]:
    """32 requests: prompts of all lengths, parameters of all kinds."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 2, 9, 30, 64)
    chosen = [(params, length) for params, length in product(PARAMS, lengths)]
    chosen += [(PARAMS[1], 7), (PARAMS[2], 100)]
    return [
        request_of(i, torch.randint(128, (length,), generator=generator).tolist(), params)
        for i, (params, length) in enumerate(chosen)
    ]


def test_a_step_without_sequences_computes_nothing(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    assert ModelRunner(model, num_blocks=1, block_size=8).execute(StepPlan(1, ())) == {}


def test_only_sequences_that_caught_up_are_sampled(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    runner = ModelRunner(model, num_blocks=4, block_size=8)
    params = SamplingParams(seed=0, max_tokens=4, temperature=0.0)
    first = Sequence(request_of(1, range(10), params), attempt=0)
    second = Sequence(request_of(2, range(5), params), attempt=0)
    first.block_table, second.block_table = [0, 1], [3]
    plan = StepPlan(1, (ScheduledSequence(first, 9), ScheduledSequence(second, 5)))
    assert set(runner.execute(plan)) == {2}
    first.num_computed_tokens = 9
    assert set(runner.execute(StepPlan(2, (ScheduledSequence(first, 1),)))) == {1}
    first.num_computed_tokens = 0
    assert runner.execute(StepPlan(3, (ScheduledSequence(first, 3),))) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_text_alone_together_and_in_any_order(
    model_of: LoadModel, dtype: torch.dtype
) -> None:
    model = model_of("qwen3", dtype, "exact")
    together = serve(model, requests(), max_num_batched_tokens=512).served
    assert all(served.finish is not None for served in together.values())
    assert len({tuple(served.tokens) for served in together.values()}) > 25
    for request in requests()[::3]:
        alone = serve(model, [request], max_num_batched_tokens=512).served
        assert alone[request.request_id] == together[request.request_id]
    chunked = serve(model, reversed(requests()), max_num_batched_tokens=16, max_num_seqs=7)
    assert chunked.served == together
    preempted = serve(model, requests(), max_num_batched_tokens=64, num_blocks=40)
    assert preempted.num_preemptions > 5
    assert preempted.served == together


def test_a_resumed_request_goes_on_as_if_nothing_had_happened(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    for request in requests()[2::5]:
        whole = serve(model, [request]).served[request.request_id]
        for made in range(len(whole.tokens)):
            runner = ModelRunner(model, num_blocks=32, block_size=8)
            sequence = Sequence(request, attempt=1, output=tuple(whole.tokens[:made]))
            sequence.block_table = list(range(32))
            plan = StepPlan(1, (ScheduledSequence(sequence, sequence.num_tokens),))
            drawn = runner.execute(plan)[request.request_id]
            assert isinstance(drawn, tuple)
            assert drawn[0].token_id == whole.tokens[made]


def test_stop_tokens_end_a_request_once_min_tokens_were_made(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    params = SamplingParams(
        seed=7, max_tokens=50, stop_token_ids=tuple(range(0, 128, 2)), min_tokens=6
    )
    served = serve(model, [request_of(1, [1, 2, 3], params)]).served[1]
    assert served.finish is FinishReason.STOP
    assert len(served.tokens) > 6
    assert all(token % 2 for token in served.tokens[:-1])
    assert served.tokens[-1] % 2 == 0


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_steps_that_overlap_draw_what_they_draw_one_after_another(
    model_of: LoadModel, family: str
) -> None:
    model = model_of(family, torch.float32, "exact")
    asked = [
        replace(
            each,
            params=replace(
                each.params,
                repetition_penalty=1.0,
                frequency_penalty=0.0,
                presence_penalty=0.0,
                logprobs=None,
                # They end at different times, some where nobody could know it.
                max_tokens=10 + each.request_id % 30,
                stop_token_ids=tuple(range(each.request_id % 9)),
            ),
        )
        for each in requests()
    ]
    apart = serve(model, asked, max_num_batched_tokens=512)
    overlapping = serve(model, asked, max_num_batched_tokens=512, overlaps=True)
    assert overlapping.num_steps_ahead > 20
    assert overlapping.served == apart.served
    tight = serve(model, asked, max_num_batched_tokens=48, num_blocks=60, overlaps=True)
    assert 0 < tight.num_steps_ahead < overlapping.num_steps_ahead + 40
    assert tight.served == apart.served


def test_numbers_that_are_not_finite_end_an_engine_only_if_all_that_counts_is_not(
    model_of: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of("llama", torch.float32, "exact")
    runner = ModelRunner(model, num_blocks=8, block_size=8)
    sequences = [Sequence(request_of(i, range(1, 6), PARAMS[0]), attempt=1) for i in range(3)]
    for index, sequence in enumerate(sequences):
        sequence.block_table = [2 * index, 2 * index + 1]
    monkeypatch.setattr(model, "logits", lambda hidden: torch.full((len(hidden), 128), torch.nan))
    plan = StepPlan(1, tuple(ScheduledSequence(sequence, 5) for sequence in sequences))
    with pytest.raises(EngineFault, match="no logits of 3 sequences are finite"):
        runner.execute(plan)
    flight = runner.launch(plan)
    for sequence in sequences[:2]:
        sequence.status = SequenceStatus.FINISHED
    assert flight.collect() == {}, "one alone has itself to blame"


def test_who_needs_to_know_what_was_drawn_before_is_not_launched_ahead(
    model_of: LoadModel,
) -> None:
    model = model_of("llama", torch.float32, "exact")
    for params in PARAMS[3:5]:
        service = serve(model, [request_of(1, range(9), params)], overlaps=True)
        assert service.num_steps_ahead == 0
        assert len(service.served[1].tokens) == 24


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_text_does_not_depend_on_what_the_prefix_cache_has_of_it(
    model_of: LoadModel, family: str, at_once: bool
) -> None:
    model = model_of(family, torch.float32, "exact")
    common = torch.randint(128, (45,), generator=torch.Generator().manual_seed(9)).tolist()
    # Prompts that end or part within a block, at its edge, and that repeat each other whole.
    asked = [
        request_of(i, [*common[: 13 + 8 * i], *range(i % 3)], params)
        for i, params in enumerate(PARAMS[:5])
    ]
    asked += [replace(request, request_id=10 + request.request_id) for request in asked]
    cold = serve(model, asked, at_once=at_once, enable_prefix_caching=False)
    warm = serve(model, asked, at_once=at_once)
    assert cold.num_cached_tokens == 0
    assert warm.num_cached_tokens > sum(len(request.prompt) for request in asked) / 2
    assert warm.served == cold.served


def test_a_text_does_not_depend_on_which_prefixes_had_to_be_given_up(model_of: LoadModel) -> None:
    model = model_of("llama", torch.float32, "exact")
    common = torch.randint(128, (64,), generator=torch.Generator().manual_seed(9)).tolist()
    asked = [
        request_of(i, [*common[: 8 * (i % 7) + i % 5], i], replace(PARAMS[i % 6], max_tokens=12))
        for i in range(24)
    ]
    cold = serve(model, asked, enable_prefix_caching=False)
    tight = serve(model, asked, num_blocks=14, max_num_batched_tokens=24)
    assert tight.num_preemptions > 0
    assert tight.num_cached_tokens > 0
    assert tight.served == cold.served
