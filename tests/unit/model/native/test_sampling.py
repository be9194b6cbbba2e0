"""The likeliest token, and the few that may win a draw, against plain torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.native.kernels import compiled, needs_native
from understudy.runtime.model.native.library import Library
from understudy.runtime.model.native.sampling import Draw, likeliest, may_win
from understudy.runtime.model.noise import gumbel_noise, noise_key, signed

pytestmark = needs_native

WIDTHS = (1, 2, 15, 16, 17, 1000, 4099)


def kernels() -> Library:
    library = compiled()
    assert library is not None
    return library


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", WIDTHS)
def test_the_likeliest_is_the_first_of_the_greatest(width: int) -> None:
    logits = random(20, width).mul_(3).round_()
    logits[0] = -torch.inf
    found = likeliest(kernels(), logits)
    assert torch.equal(found.values, logits.amax(dim=1))
    expected = (logits == logits.amax(dim=1, keepdim=True)).to(torch.int8).argmax(dim=1)
    assert found.ids == expected.tolist()


@pytest.mark.parametrize(("bad", "seen"), [(torch.nan, torch.nan), (torch.inf, torch.inf)])
def test_what_is_not_finite_is_seen_wherever_it_is(bad: float, seen: float) -> None:
    for place in (0, 15, 16, 40, 49):
        logits = random(3, 50)
        logits[1, place] = bad
        values = likeliest(kernels(), logits).values
        torch.testing.assert_close(values[1], torch.tensor(seen), equal_nan=True)
        assert values[[0, 2]].isfinite().all()


@given(
    seed=st.integers(0, 2**40),
    width=st.sampled_from(WIDTHS),
    temperature=st.floats(0.01, 5.0),
    spread=st.sampled_from([0.0, 0.1, 3.0, 100.0]),
    forbidden=st.booleans(),
)
@settings(max_examples=200)
def test_the_winner_of_a_draw_is_among_those_that_may_win(
    seed: int, width: int, temperature: float, spread: float, forbidden: bool
) -> None:
    logits = random(3, width, seed=seed) * spread
    if forbidden:
        logits[:, ::2] = -torch.inf
        logits[:, 0] = 0.0
    keys = [signed(noise_key(seed, position)) for position in range(3)]
    draws = [Draw(row, key, temperature) for row, key in zip((2, 0, 1), keys, strict=True)]
    found = may_win(kernels(), logits, draws)
    if found is None:
        assert spread * 1e-6 / temperature > 1e-4  # so much rounding that too many may win
        return
    for draw, contenders in zip(draws, found, strict=True):
        noise = gumbel_noise(torch.tensor([draw.key]), torch.arange(width))
        noisy = logits[draw.row].double() / temperature + noise
        assert int(noisy.argmax()) in contenders
        assert contenders == sorted(contenders)


def test_a_draw_among_many_has_few_contenders() -> None:
    logits = random(8, 50_000)
    draws = [Draw(row, signed(noise_key(row, 5)), 1.0) for row in range(8)]
    found = may_win(kernels(), logits, draws)
    assert found is not None
    assert max(map(len, found)) <= 3


def test_where_nothing_is_a_number_nobody_is_said_to_win() -> None:
    logits = torch.full((1, 40), torch.nan)
    assert may_win(kernels(), logits, [Draw(0, 1, 1.0)]) is None
