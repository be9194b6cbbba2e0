"""Windows over documents: every token in its place, in an order that the seed decides."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from understudy.tools.demo.batches import Windows, halve

SEPARATOR = 0


def numbered_windows(*, seed: int = 1, length: int = 8, documents: int = 9) -> Windows:
    """Windows over documents whose tokens all differ."""
    texts = [list(range(1 + 20 * index, 21 + 20 * index)) for index in range(documents)]
    return Windows(texts, separator=SEPARATOR, length=length, seed=seed)


@given(seed=st.integers(0, 1000), length=st.integers(2, 30), number=st.integers(0, 5))
def test_an_epoch_shows_no_token_twice_as_a_target(seed: int, length: int, number: int) -> None:
    windows = numbered_windows(seed=seed, length=length)
    epoch = windows.epoch(number)
    assert epoch.shape == (windows.per_epoch, length + 1)
    targets = epoch[:, 1:].flatten()
    words = targets[targets != SEPARATOR]
    assert len(set(words.tolist())) == len(words)


@given(seed=st.integers(0, 1000))
def test_documents_stay_whole_between_separators(seed: int) -> None:
    for window in numbered_windows(seed=seed).epoch(0):
        for before, after in zip(window[:-1].tolist(), window[1:].tolist(), strict=True):
            if SEPARATOR not in (before, after):
                assert after == before + 1


@given(first_step=st.integers(0, 30), windows_per_step=st.integers(1, 7))
def test_batches_from_any_step_are_those_of_the_whole_run(
    first_step: int, windows_per_step: int
) -> None:
    windows = numbered_windows()
    whole = windows.batches(windows_per_step=windows_per_step, first_step=0)
    later = windows.batches(windows_per_step=windows_per_step, first_step=first_step)
    expected, found = next(islice(whole, first_step, None)), next(later)
    assert torch.equal(expected.inputs, found.inputs)
    assert torch.equal(expected.targets, found.targets)


def test_targets_are_the_inputs_one_token_later_and_stay_so_when_halved() -> None:
    batch = next(numbered_windows().batches(windows_per_step=3, first_step=0))
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
    short = halve(batch, times=2)
    assert short.inputs.shape == (12, 2)
    assert torch.equal(short.inputs[:, 1:], short.targets[:, :-1])


def test_epochs_and_seeds_bring_other_orders() -> None:
    assert not torch.equal(numbered_windows().epoch(0), numbered_windows().epoch(1))
    assert not torch.equal(numbered_windows().epoch(0), numbered_windows(seed=2).epoch(0))


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ValueError, match="too few"):
        numbered_windows(length=200)
