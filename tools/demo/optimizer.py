"""Muon for the matrices inside the layers, AdamW for everything else.

Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon/) makes a step's momentum
orthogonal before it is applied. A run as short as the demo model's learns markedly more from each
token with it than with AdamW alone. `torch.optim.Muon` iterates in bfloat16, which processors
without matrix units compute slower than float32, hence this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Executor
from itertools import repeat

import torch
from torch import Tensor, nn

# The quintic of the Muon article: its slope at nothing is steep, so few iterations are enough.
QUINTIC = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
MOMENTUM = 0.95
WEIGHT_DECAY = 0.01


class TwinOptimizer:
    """One optimiser over all weights of a network; steps are given as shares of the peak rates."""

    def __init__(self, network: nn.Module, *, matrix_rate: float, other_rate: float) -> None:
        weights = [(name, weight) for name, weight in network.named_parameters()]
        self._others = [w for name, w in weights if w.dim() != 2 or "embed" in name]
        self._matrices = [w for name, w in weights if w.dim() == 2 and "embed" not in name]
        self._momenta = [torch.zeros_like(matrix) for matrix in self._matrices]
        self._matrix_rate = matrix_rate
        self._other_rate = other_rate
        self._adam = torch.optim.AdamW(
            self._others, lr=other_rate, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
        )

    @torch.no_grad()
    def step(self, share: float, pool: Executor) -> None:
        """Apply the gradients at `share` of the peak rates, and clear them.

        The matrices are independent of each other; the workers of `pool` share them out.
        """
        rate = share * self._matrix_rate
        moves = pool.map(self._step_matrix, self._matrices, self._momenta, repeat(rate))
        for _ in moves:
            pass
        for group in self._adam.param_groups:
            group["lr"] = share * self._other_rate
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)

    @torch.no_grad()
    def _step_matrix(self, matrix: nn.Parameter, memory: Tensor, rate: float) -> None:
        gradient = matrix.grad
        assert isinstance(gradient, Tensor)
        memory.lerp_(gradient, 1 - MOMENTUM)
        change = orthogonalise(gradient.lerp(memory, MOMENTUM))
        rows, columns = change.shape
        scaled_rate = rate * max(1.0, rows / columns) ** 0.5
        matrix.mul_(1 - rate * WEIGHT_DECAY).add_(change, alpha=-scaled_rate)
        matrix.grad = None

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on as if nothing had happened."""
        state = {f"momentum.{index}": momentum for index, momentum in enumerate(self._momenta)}
        for index, memory in self._adam.state_dict()["state"].items():
            state |= {f"adam.{index}.{name}": value for name, value in memory.items()}
        return state

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take over the `state()` of an optimiser of the same network."""
        for index, momentum in enumerate(self._momenta):
            momentum.copy_(state[f"momentum.{index}"])
        memories: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            kind, _, rest = key.partition(".")
            if kind == "adam":
                number, _, name = rest.partition(".")
                memories.setdefault(int(number), {})[name] = value
        groups = self._adam.state_dict()["param_groups"]
        self._adam.load_state_dict({"state": memories, "param_groups": groups})


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest matrix to `matrix` [rows, columns] whose singular values are about one."""
    first, third, fifth = QUINTIC
    tall = matrix.shape[0] > matrix.shape[1]
    current = matrix.mT if tall else matrix
    current = current / (current.norm() + 1e-7)
    for _ in range(ITERATIONS):
        product = current @ current.mT
        polynomial = third * product + fifth * (product @ product)
        current = first * current + polynomial @ current
    result: Tensor = current.mT if tall else current
    return result
