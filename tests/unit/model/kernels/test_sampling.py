"""The kernels draw what the plain sampler draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from understudy.protocol.request import SamplingParams
from understudy.runtime.model.kernels.sampling import Draw, Draws, draw_tokens
from understudy.runtime.model.sampler import Sampler, SamplingRow

CPU = torch.device("cpu")


def draws_of(rows: list[SamplingRow]) -> Draws:
    return Draws.of(
        [
            Draw(
                0.0 if row.is_greedy else row.params.temperature,
                row.params.seed,
                row.position,
                row.params.top_k,
                row.params.top_p,
                row.params.min_p,
            )
            for row in rows
        ]
    )


def params_of(index: int) -> SamplingParams:
    kinds = (
        SamplingParams(index, 9, temperature=0.0, top_k=3),
        SamplingParams(index, 9, temperature=0.7),
        SamplingParams(index, 9, temperature=1.3, top_k=7),
        SamplingParams(index, 9, top_p=0.8),
        SamplingParams(index, 9, top_p=0.5, top_k=100, temperature=2.0),
        SamplingParams(index, 9, min_p=0.1),
        SamplingParams(index, 9, min_p=0.02, top_p=0.97, top_k=300),
        SamplingParams(index, 9, top_k=1 << 20, top_p=1e-9),
    )
    return kinds[index % len(kinds)]


@pytest.mark.parametrize("vocab_size", [5, 300, 4200])
@pytest.mark.parametrize("has_ties", [True, False])
def test_tokens_are_the_plain_samplers(vocab_size: int, has_ties: bool) -> None:
    count = 8
    logits: Tensor = torch.randn(count, vocab_size, generator=torch.Generator().manual_seed(1)) * 3
    if has_ties:
        logits = logits.mul(2).round().div(2)
    logits[1, ::3] = -torch.inf
    rows = [SamplingRow(params_of(index), [1, 2, 3], 1) for index in range(count)]
    expected = [each.token_id for each in Sampler(vocab_size, CPU).sample(logits.clone(), rows)]
    assert draw_tokens(logits, draws_of(rows)).tolist() == expected


@pytest.mark.parametrize("num_allowed", [1, 2, 9])
def test_rows_that_may_draw_only_a_few_tokens_draw_those(num_allowed: int) -> None:
    vocab_size = 300
    logits = torch.randn(8, vocab_size, generator=torch.Generator().manual_seed(3)) * 3
    order = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(4))
    logits[:, order[num_allowed:]] = -torch.inf
    rows = [SamplingRow(params_of(index), [1, 2, 3], 1) for index in range(8)]
    expected = [each.token_id for each in Sampler(vocab_size, CPU).sample(logits.clone(), rows)]
    assert draw_tokens(logits, draws_of(rows)).tolist() == expected
    assert set(expected) <= set(order[:num_allowed].tolist())


def test_a_broken_row_gives_some_token_and_spoils_no_other() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))
    rows = [SamplingRow(SamplingParams(index, 9, top_k=5), [1], 1) for index in range(3)]
    expected = draw_tokens(logits, draws_of(rows)).tolist()
    logits[1, 7] = torch.nan
    found = draw_tokens(logits, draws_of(rows)).tolist()
    assert found[::2] == expected[::2]
    assert 0 <= found[1] < 50


def test_draws_behind_others_are_those_of_rows_with_a_token_more() -> None:
    logits = torch.randn(8, 300, generator=torch.Generator().manual_seed(5)) * 3
    rows = [SamplingRow(params_of(index), [1, 2, 3], 1) for index in range(8)]
    longer = [SamplingRow(params_of(index), [1, 2, 3, 4], 1) for index in range(8)]
    behind = draws_of(rows).next(None)
    assert draw_tokens(logits, behind).tolist() == draw_tokens(logits, draws_of(longer)).tolist()
    kept = [1, 3, 6]
    some = draws_of(rows).next(np.array(kept))
    expected = draw_tokens(logits[kept], draws_of([longer[index] for index in kept]))
    assert draw_tokens(logits[kept], some).tolist() == expected.tolist()


def test_only_rows_that_draw_among_some_tokens_are_truncated() -> None:
    plain = draws_of([SamplingRow(params_of(index), [1], 1) for index in range(2)])
    assert not plain.are_truncated
    for index in range(2, 8):
        assert draws_of([SamplingRow(params_of(index), [1], 1)]).are_truncated


def test_draws_within_an_echoed_prompt_have_positions_below_zero() -> None:
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(6))
    rows = [SamplingRow(params_of(1), [1, 2, 3], 3 + num_echoed) for num_echoed in (4, 0)]
    expected = [each.token_id for each in Sampler(300, CPU).sample(logits.clone(), rows)]
    assert draw_tokens(logits, draws_of(rows)).tolist() == expected
