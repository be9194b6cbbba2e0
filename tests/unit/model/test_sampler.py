"""The sampler against its oracle, a row at a time, sorting everything, with noise for all."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.protocol.request import SamplingParams
from understudy.runtime.model.noise import gumbel_noise, noise_key, signed
from understudy.runtime.model.sampler import Sampler, SamplingRow

CPU = torch.device("cpu")
GREEDY = SamplingParams(seed=0, max_tokens=100, temperature=0.0)
CHI_SQUARE_P = 0.001


def row_of(
    params: SamplingParams, *, prompt: Sequence[int] = (0,), output: Sequence[int] = ()
) -> SamplingRow:
    return SamplingRow(params, [*prompt, *output], len(prompt))


def draw(logits: Tensor, rows: list[SamplingRow]) -> list[int]:
    sampler = Sampler(logits.shape[1], CPU)
    return [sampled.token_id for sampled in sampler.sample(logits.clone(), rows)]


def random_logits(rows: int, vocab_size: int, *, seed: int, scale: float = 3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, vocab_size, generator=generator) * scale


def kept_tokens(logits: Tensor, params: SamplingParams) -> Tensor:
    """The oracle's truncation of one row: which tokens may be drawn, by sorting them all."""
    scaled = logits.double() / params.temperature
    kept = torch.ones_like(scaled, dtype=torch.bool)
    if 0 < params.top_k < len(scaled):
        kept &= scaled >= scaled.sort(descending=True).values[params.top_k - 1]
    if params.top_p < 1.0:
        probabilities = scaled.masked_fill(~kept, -math.inf).softmax(0)
        ordered = probabilities.sort(descending=True).values
        num_nucleus = int((ordered.cumsum(0) < params.top_p).sum()) + 1
        kept &= probabilities >= ordered[min(num_nucleus, len(ordered)) - 1]
    probabilities = scaled.softmax(0)
    return kept & (probabilities >= params.min_p * probabilities.max())


def is_close_call(logits: Tensor, params: SamplingParams) -> bool:
    """Whether rounding decides what is in the nucleus: equal logits may come to half exactly."""
    kept = kept_tokens(logits, replace(params, top_p=1.0, min_p=0.0))
    scaled = (logits.double() / params.temperature).masked_fill(~kept, -math.inf)
    reached = scaled.softmax(0).sort(descending=True).values.cumsum(0)
    return bool(((reached - params.top_p).abs() < 1e-6).any()) and params.top_p < 1.0


def oracle(logits: Tensor, row: SamplingRow) -> int:
    params = row.params
    key = torch.tensor(signed(noise_key(params.seed, row.position)))
    noisy = logits.double() / params.temperature + gumbel_noise(key, torch.arange(len(logits)))
    return int(noisy.masked_fill(~kept_tokens(logits, params), -math.inf).argmax())


SAMPLED = st.builds(
    SamplingParams,
    seed=st.integers(0, (1 << 64) - 1),
    max_tokens=st.just(10),
    temperature=st.floats(0.05, 4.0),
    top_k=st.sampled_from([0, 0, 1, 2, 7, 63, 64, 65, 500, 1023, 1024, 1025, 5000]),
    top_p=st.just(1.0) | st.floats(0.01, 0.999),
    min_p=st.just(0.0) | st.floats(0.001, 0.9),
)


@given(params=st.lists(SAMPLED, min_size=1, max_size=6), data=st.data())
@settings(max_examples=150)
def test_every_row_gets_the_oracles_token(
    params: list[SamplingParams], data: st.DataObject
) -> None:
    vocab_size = data.draw(st.sampled_from([5, 64, 100, 1025, 3000]))
    scale = data.draw(st.sampled_from([0.01, 1.0, 5.0]))
    logits = random_logits(len(params), vocab_size, seed=data.draw(st.integers(0, 99)), scale=scale)
    if data.draw(st.booleans(), label="ties"):
        logits = logits.mul(2).round().div(2)
    assume(not any(itertools.starmap(is_close_call, zip(logits, params, strict=True))))
    output = data.draw(st.lists(st.integers(0, 4), max_size=3))
    rows = [row_of(each, output=output) for each in params]
    assert draw(logits, rows) == [oracle(*each) for each in zip(logits, rows, strict=True)]


def test_a_row_does_not_depend_on_its_neighbours() -> None:
    vocab_size = 2000
    params = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=9),
        SamplingParams(seed=2, max_tokens=9, top_p=0.9),
        SamplingParams(seed=3, max_tokens=9, top_k=40, top_p=0.99, temperature=0.7),
        SamplingParams(seed=4, max_tokens=9, top_k=1500, temperature=2.0),
        SamplingParams(seed=5, max_tokens=9, min_p=0.01, frequency_penalty=0.5),
        SamplingParams(seed=6, max_tokens=9, repetition_penalty=1.3, logprobs=3),
        SamplingParams(seed=7, max_tokens=9, top_k=1 << 20, top_p=0.97),
    ]
    rows = [row_of(each, output=[1, 2, 3]) for each in params]
    logits = random_logits(len(rows), vocab_size, seed=1)
    together = Sampler(vocab_size, CPU).sample(logits.clone(), rows)
    order = [3, 0, 7, 6, 5, 1, 4, 2]
    shuffled = Sampler(vocab_size, CPU).sample(logits[order], [rows[i] for i in order])
    assert shuffled == [together[i] for i in order]
    for index, row in enumerate(rows):
        alone = Sampler(vocab_size, CPU).sample(logits[index : index + 1].clone(), [row])
        assert alone == [together[index]]


def test_a_vocabulary_of_several_chunks_of_noise_is_drawn_from_as_one() -> None:
    logits = random_logits(9, 50_000, seed=2, scale=0.5)
    rows = [row_of(SamplingParams(seed=i, max_tokens=1)) for i in range(9)]
    assert draw(logits, rows) == [oracle(*each) for each in zip(logits, rows, strict=True)]


def test_greedy_takes_the_first_of_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert draw(logits, [row_of(GREEDY)] * 2) == [1, 0]


@pytest.mark.parametrize("temperature", [0.0, 1e-320, 1e-6])
def test_tiny_temperatures_are_greedy(temperature: float) -> None:
    params = SamplingParams(seed=9, max_tokens=1, temperature=temperature)
    logits = random_logits(1, 50, seed=0)
    assert draw(logits, [row_of(params)]) == [int(logits.argmax())]


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = torch.zeros(1, 1000)
    params = SamplingParams(seed=1, max_tokens=100)
    first = draw(logits, [row_of(params, prompt=[1, 2], output=[3])])
    assert draw(logits, [row_of(params, prompt=[9] * 7, output=[8])]) == first
    assert draw(logits, [row_of(params, prompt=[1, 2], output=[3, 4])]) != first
    assert draw(logits, [row_of(replace(params, seed=2), prompt=[1, 2], output=[3])]) != first


def test_repetition_penalty_counts_prompt_and_output() -> None:
    logits = torch.tensor([[4.0, 3.9, -1.0, -1.1, 3.0]])
    params = replace(GREEDY, repetition_penalty=2.0)
    assert draw(logits, [row_of(params, prompt=[0], output=[1])]) == [4]
    only_negative = torch.tensor([[-1.0, -1.5, -9.0]])
    assert draw(only_negative, [row_of(params, prompt=[0])]) == [1]


def test_presence_and_frequency_penalties_count_output_alone() -> None:
    logits = torch.tensor([[3.0, 2.5, 0.0]])
    presence = replace(GREEDY, presence_penalty=1.0)
    assert draw(logits, [row_of(presence, prompt=[0, 0])]) == [0]
    assert draw(logits, [row_of(presence, prompt=[0], output=[0])]) == [1]
    frequency = replace(GREEDY, frequency_penalty=0.3)
    assert draw(logits, [row_of(frequency, output=[0])]) == [0]
    assert draw(logits, [row_of(frequency, output=[0, 0])]) == [1]
    assert draw(logits, [row_of(frequency, output=[0, 0, 1, 1])]) == [0]


def test_logit_bias_is_added() -> None:
    logits = torch.tensor([[1.0, 0.0, 0.0]])
    assert draw(logits, [row_of(replace(GREEDY, logit_bias=((2, 1.5),)))]) == [2]
    assert draw(logits, [row_of(replace(GREEDY, logit_bias=((0, -100.0), (1, 0.1))))]) == [1]


def test_ids_beyond_the_vocabulary_reach_nobody() -> None:
    logits = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    params = replace(
        GREEDY, logit_bias=((2, 50.0), (-1, 50.0)), stop_token_ids=(2, 7, -2), min_tokens=5
    )
    assert draw(logits, [row_of(params), row_of(GREEDY)]) == [0, 1]


def test_stop_tokens_are_forbidden_until_min_tokens_were_made() -> None:
    logits = torch.tensor([[1.0, 9.0, 8.0]])
    params = replace(GREEDY, min_tokens=2, stop_token_ids=(1, 2))
    assert draw(logits, [row_of(params)]) == [0]
    assert draw(logits, [row_of(params, output=[0])]) == [0]
    assert draw(logits, [row_of(params, output=[0, 0])]) == [1]


def test_logprobs_are_of_the_raw_logits() -> None:
    logits = random_logits(2, 40, seed=3)
    params = SamplingParams(
        seed=0,
        max_tokens=5,
        temperature=0.0,
        logprobs=4,
        logit_bias=((7, 100.0),),
        repetition_penalty=1.5,
    )
    rows = [row_of(params), row_of(GREEDY)]
    reported, unreported = Sampler(40, CPU).sample(logits.clone(), rows)
    expected = logits[0].log_softmax(0)
    assert unreported.logprobs is None
    assert reported.token_id == 7
    assert reported.logprobs is not None
    assert reported.logprobs.chosen == pytest.approx(expected[7].item(), abs=1e-6)
    values, ids = expected.topk(4)
    assert [i for i, _ in reported.logprobs.top] == ids.tolist()
    assert [v for _, v in reported.logprobs.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_no_alternatives_still_reports_the_chosen_token() -> None:
    (sampled,) = Sampler(3, CPU).sample(torch.zeros(1, 3), [row_of(replace(GREEDY, logprobs=0))])
    assert sampled.logprobs is not None
    assert sampled.logprobs.top == ()
    assert sampled.logprobs.chosen == pytest.approx(-math.log(3))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_spoils_no_other(bad: float) -> None:
    params = [
        GREEDY,
        SamplingParams(seed=1, max_tokens=9),
        SamplingParams(seed=2, max_tokens=9, top_k=3, top_p=0.9, logprobs=2),
    ]
    rows = [row_of(each) for each in params for _ in range(2)]
    logits = random_logits(6, 100, seed=8)
    expected = draw(logits, rows)
    logits[::2] = bad
    tokens = draw(logits, rows)
    assert tokens[1::2] == expected[1::2]
    assert all(0 <= token < 100 for token in tokens)


def chi_square_is_fine(logits: Tensor, params: SamplingParams, num_draws: int) -> bool:
    """Draw with as many seeds; compare the counts with the softmax of what may be drawn."""
    vocab_size = len(logits)
    sampler = Sampler(vocab_size, CPU)
    counts = torch.zeros(vocab_size, dtype=torch.float64)
    at_once = 2500
    for start in range(0, num_draws, at_once):
        rows = [row_of(replace(params, seed=start + i)) for i in range(at_once)]
        tokens = sampler.sample(logits.repeat(at_once, 1), rows)
        counts += torch.bincount(torch.tensor([t.token_id for t in tokens]), minlength=vocab_size)
    kept = kept_tokens(logits, params)
    scaled = (logits.double() / params.temperature).masked_fill(~kept, -math.inf)
    expected = scaled.softmax(0) * num_draws
    assert float(counts[~kept].sum()) == 0
    statistic = float(((counts - expected) ** 2 / expected)[kept].sum())
    degrees = int(kept.sum()) - 1
    # The regularised upper incomplete gamma function is the tail of the chi-square distribution.
    tail = torch.special.gammaincc(torch.tensor(degrees / 2), torch.tensor(statistic / 2))
    return float(tail) > CHI_SQUARE_P


DISTRIBUTIONS = [
    pytest.param(SamplingParams(seed=0, max_tokens=9), id="plain"),
    pytest.param(SamplingParams(seed=0, max_tokens=9, temperature=1.7), id="hot"),
    pytest.param(SamplingParams(seed=0, max_tokens=9, top_k=8), id="top-k"),
    pytest.param(SamplingParams(seed=0, max_tokens=9, top_p=0.8, temperature=0.8), id="top-p"),
    pytest.param(SamplingParams(seed=0, max_tokens=9, min_p=0.05), id="min-p"),
]


@pytest.mark.parametrize("params", DISTRIBUTIONS)
def test_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(1, 40, seed=5, scale=1.0)[0]
    assert chi_square_is_fine(logits, params, 100_000)


@pytest.mark.soak
@pytest.mark.parametrize("params", DISTRIBUTIONS)
def test_a_million_draws_follow_the_distribution(params: SamplingParams) -> None:
    logits = random_logits(1, 80, seed=6, scale=1.0)[0]
    assert chi_square_is_fine(logits, params, 1_000_000)
