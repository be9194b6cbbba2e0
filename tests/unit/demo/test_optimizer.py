"""Muon makes its updates orthogonal, and the optimiser can be put down and taken up again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from understudy.tools.demo.network import Network
from understudy.tools.demo.optimizer import TwinOptimizer, orthogonalise
from understudy.tools.demo.train import Preset


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (40, 8)])
def test_an_orthogonalised_matrix_has_singular_values_about_one(
    shape: tuple[int, int],
) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.max() < 1.3
    # The smallest ones of a square matrix may start too near nothing to reach one.
    assert values.median() > 0.6


def test_a_matrix_of_nothing_stays_nothing() -> None:
    assert orthogonalise(torch.zeros(4, 6)).abs().max() == 0


def test_every_weight_moves_and_gradients_are_cleared(preset: Preset) -> None:
    network = Network(preset.model.shape, generator=torch.Generator().manual_seed(1))
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = TwinOptimizer(network, matrix_rate=0.1, other_rate=0.1)
    for weight in network.parameters():
        weight.grad = torch.ones_like(weight)
    with ThreadPoolExecutor(1) as pool:
        optimizer.step(1.0, pool)
    for old, weight in zip(before, network.parameters(), strict=True):
        assert not torch.equal(old, weight)
        assert weight.grad is None
