"""Masks in the sampler: nothing else is drawn, and all the rest is as without them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from understudy.protocol.request import SamplingParams
from understudy.runtime.model.sampler import Sampler, SamplingRow

CPU = torch.device("cpu")
PARAMS = [
    SamplingParams(seed=1, max_tokens=9, temperature=0.0),
    SamplingParams(seed=2, max_tokens=9),
    SamplingParams(seed=3, max_tokens=9, top_k=5, top_p=0.9),
    SamplingParams(seed=4, max_tokens=9, top_p=0.5, min_p=0.01),
    SamplingParams(seed=5, max_tokens=9, temperature=2.0, repetition_penalty=1.5),
    SamplingParams(seed=6, max_tokens=9, logit_bias=((0, 100.0),)),
]


def mask_of(allowed: set[int], width: int) -> bytes:
    bits = np.zeros(width, dtype=np.uint8)
    bits[list(allowed)] = 1
    return np.packbits(bits, bitorder="little").tobytes()


def random_logits(rows: int, vocab_size: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab_size, generator=generator)


@settings(max_examples=60, deadline=None)
@given(
    params=st.sampled_from(PARAMS),
    vocab_size=st.sampled_from([37, 128, 2000]),
    allowed=st.sets(st.integers(0, 36), min_size=1),
    seed=st.integers(0, 1000),
)
def test_only_what_the_mask_allows_is_drawn_and_as_if_the_rest_were_impossible(
    params: SamplingParams, vocab_size: int, allowed: set[int], seed: int
) -> None:
    logits = random_logits(1, vocab_size, seed)
    row = SamplingRow(params, [1, 2, 3], 1)
    masked = row._replace(mask=mask_of(allowed, vocab_size))
    sampler = Sampler(vocab_size, CPU)
    [drawn] = sampler.sample(logits.clone(), [masked])
    assert drawn.token_id in allowed
    impossible = logits.clone()
    forbidden = sorted(set(range(vocab_size)) - allowed)
    impossible[0, forbidden] = -math.inf
    [expected] = sampler.sample(impossible, [row])
    assert drawn == expected


def test_a_bias_does_not_open_what_the_mask_forbids() -> None:
    params = SamplingParams(seed=0, max_tokens=9, logit_bias=((7, 100.0),))
    row = SamplingRow(params, [1], 1, mask_of({3}, 64))
    [drawn] = Sampler(64, CPU).sample(random_logits(1, 64, 0), [row])
    assert drawn.token_id == 3


def test_rows_without_a_mask_do_not_notice_those_with_one() -> None:
    logits = random_logits(4, 128, 1)
    rows = [SamplingRow(replace(PARAMS[1], seed=i), [1, 2], 1) for i in range(4)]
    sampler = Sampler(128, CPU)
    plain = sampler.sample(logits.clone(), rows)
    rows[1] = rows[1]._replace(mask=mask_of({5, 6}, 128))
    mixed = sampler.sample(logits.clone(), rows)
    assert mixed[1].token_id in {5, 6}
    assert [mixed[i] for i in (0, 2, 3)] == [plain[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("num_logprobs", [0, 3])
def test_log_probabilities_are_those_of_the_raw_logits(num_logprobs: int) -> None:
    logits = random_logits(1, 128, 2)
    params = SamplingParams(seed=0, max_tokens=9, logprobs=num_logprobs)
    row = SamplingRow(params, [1], 1, mask_of({int(logits.argmin())}, 128))
    raw = logits.log_softmax(dim=1)[0]
    likeliest = int(logits.argmax())
    [drawn] = Sampler(128, CPU).sample(logits.clone(), [row])
    assert drawn.token_id == int(logits.argmin())
    assert drawn.logprobs is not None
    assert drawn.logprobs.chosen == pytest.approx(float(raw.min()))
    assert [token for token, _ in drawn.logprobs.top[:1]] == [likeliest][:num_logprobs]


def test_tokens_beyond_the_mask_are_forbidden() -> None:
    logits = torch.zeros(1, 100)
    logits[0, 90:] = 50.0
    row = SamplingRow(PARAMS[0], [1], 1, mask_of(set(range(32)), 32))
    [drawn] = Sampler(100, CPU).sample(logits, [row])
    assert drawn.token_id < 32


def test_an_end_that_the_grammar_asks_for_is_not_forbidden() -> None:
    params = SamplingParams(seed=0, max_tokens=9, min_tokens=5, stop_token_ids=(7,))
    row = SamplingRow(params, [1], 1, mask_of({7}, 64))
    [drawn] = Sampler(64, CPU).sample(random_logits(1, 64, 0), [row])
    assert drawn.token_id == 7
