"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes a step's momentum
orthogonal before it is applied. A run as short as the demo model's learns markedly more from each
token with it than with AdamW alone. `torch.optim.Muon` iterates in bfloat16, which processors
without matrix units compute slower than float32, hence this one.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

# The quintic of the Muon article: its slope at nothing is steep, so few iterations are enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class TwinOptimizer:
    """One optimiser over all weights of a network; steps are given as shares of the peak rates."""

    def __init__(self, network: nn.Module, *, matrix_rate: float, other_rate: float) -> None:
        weights = [(name, weight) for name, weight in network.named_parameters()]
        self._others = [w for name, w in weights if w.dim() != 2 or "embed" in name]
        grouped: dict[torch.Size, list[nn.Parameter]] = defaultdict(list)
        for name, weight in weights:
            if weight.dim() == 2 and "embed" not in name:
                grouped[weight.shape].append(weight)
        self._groups = list(grouped.values())
        self._momenta = [torch.zeros(len(g), *g[0].shape) for g in self._groups]
        self._matrix_rate = matrix_rate
        self._other_rate = other_rate
        self._adam = torch.optim.AdamW(
            self._others, lr=other_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
        )

    @torch.no_grad()
    def step(self, share: float, *, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        """Apply the gradients at `share` of the peak rates, and clear them."""
        for weights, memory in zip(self._groups, self._momenta, strict=True):
            gradients = torch.stack([_gradient(weight) for weight in weights])
            memory.lerp_(gradients, 1 - momentum)
            update = orthogonalise(gradients.lerp(memory, momentum))
            rows, columns = update.shape[-2:]
            rate = share * self._matrix_rate
            scaled = rate * max(1.0, rows / columns) ** 0.5
            for weight, change in zip(weights, update, strict=True):
                weight.mul_(1 - rate * weight_decay).add_(change, alpha=-scaled)
                weight.grad = None
        for group in self._adam.param_groups:
            group["lr"] = share * self._other_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    def state(self) -> dict[str, object]:
        """What `load_state` needs to go on as if nothing had happened."""
        return {"momenta": self._momenta, "adam": self._adam.state_dict()}

    def load_state(self, state: dict[str, object]) -> None:
        """Take over the `state()` of an optimiser of the same network."""
        momenta, adam = state["momenta"], state["adam"]
        assert isinstance(momenta, list)
        assert isinstance(adam, dict)
        self._momenta = momenta
        self._adam.load_state_dict(adam)


def _gradient(weight: nn.Parameter) -> Tensor:
    gradient = weight.grad
    assert isinstance(gradient, Tensor)
    return gradient


def orthogonalise(matrices: Tensor) -> Tensor:
    """The nearest matrices to `matrices` [count, rows, columns] with singular values about one."""
    first, third, fifth = QUINTIC
    tall = matrices.shape[-2] > matrices.shape[-1]
    current = matrices.mT if tall else matrices
    current = current / (current.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        product = current @ current.mT
        polynomial = third * product + fifth * (product @ product)
        current = first * current + polynomial @ current
    result: Tensor = current.mT if tall else current
    return result
