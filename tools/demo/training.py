"""The training loop of the demo model and of its draft model.

A step's rows are shared out in small passes among worker threads, each of which computes on one
core; the gradients are added up in the order of the passes. So the weights do not depend on the
number of workers, and a core that is busy with something else hardly holds up the other one.

Knows networks and batches; nothing of files but its own progress file, and nothing of text.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from understudy.runtime.log import get_logger
from understudy.tools.demo.batches import Batch, Windows, halve
from understudy.tools.demo.network import Network, NetworkShape
from understudy.tools.demo.optimizer import TwinOptimizer

log = get_logger()

TOKENS_PER_PASS = 1024
PROGRESS_EVERY_STEPS = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """Everything that decides what a network becomes, besides its data."""

    shape: NetworkShape
    steps: int
    windows_per_step: int
    matrix_rate: float
    other_rate: float
    warmup_steps: int
    decay_share: float
    short_share: float
    short_halvings: int
    seed: int

    def rate_share(self, step: int) -> float:
        """The share of the peak learning rate in `step`: warm-up, plateau, linear decay to nothing.

        The plateau (Hu et al., 2024, MiniCPM) makes a run's length a late decision.
        """
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        decay = (self.steps - step) / (self.decay_share * self.steps)
        return min(warmup, decay, 1.0)

    def halvings(self, step: int) -> int:
        """How often windows are halved in `step`: attention over short rows costs less."""
        return self.short_halvings if step < self.short_share * self.steps else 0


Loss = Callable[[Tensor, Batch], Tensor]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy in nats per token of `logits` [row, position, vocab_size]."""
    return functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


class DistillationLoss:
    """Cross-entropy against a teacher's distribution (Hinton et al., 2015), at temperature one.

    A draft is accepted when it says what the target says, not when it says what the text says;
    so the draft model learns from the target.
    """

    def __init__(self, teacher: Network) -> None:
        self._teacher = teacher

    def __call__(self, logits: Tensor, batch: Batch) -> Tensor:
        """Mean loss in nats per token of `logits` [row, position, vocab_size]."""
        with torch.no_grad():
            wanted = self._teacher(batch.inputs).softmax(dim=-1)
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten(0, 1))


def train(
    plan: TrainingPlan,
    windows: Windows,
    *,
    loss: Loss,
    name: str,
    progress_file: Path,
    workers: int,
) -> Network:
    """Train a network as `plan` says; a `progress_file` of the same plan is gone on with.

    The result is the same with and without an interruption, and for any number of `workers`.
    """
    network = Network(plan.shape, generator=torch.Generator().manual_seed(plan.seed))
    optimizer = TwinOptimizer(network, matrix_rate=plan.matrix_rate, other_rate=plan.other_rate)
    first_step = _restore(progress_file, network, optimizer)
    batches = windows.batches(windows_per_step=plan.windows_per_step, first_step=first_step)
    smoothed = float("nan")
    started = time.process_time()
    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for step in range(first_step, plan.steps):
            batch = halve(next(batches), times=plan.halvings(step))
            value = _accumulate(network, batch, loss, pool)
            optimizer.step(plan.rate_share(step), pool)
            smoothed = value if step == first_step else 0.95 * smoothed + 0.05 * value
            done = step + 1
            if done % 10 == 0 or done == plan.steps:
                cpu_s = round(time.process_time() - started, 1)
                log.info("trained", network=name, step=done, loss=round(smoothed, 3), cpu_s=cpu_s)
            if done % PROGRESS_EVERY_STEPS == 0:
                _save(progress_file, network, optimizer, step=done)
    return network


def _accumulate(network: Network, batch: Batch, loss: Loss, pool: Executor) -> float:
    """Give every weight the gradient of the mean loss of `batch`; that loss."""
    weights = list(network.parameters())
    rows = batch.inputs.shape[0]
    rows_per_pass = max(1, TOKENS_PER_PASS // batch.inputs.shape[1])

    def pass_rows(start: int) -> tuple[float, tuple[Tensor, ...]]:
        inputs = batch.inputs[start : start + rows_per_pass]
        part = Batch(inputs, batch.targets[start : start + rows_per_pass])
        value = loss(network(inputs), part) * (inputs.shape[0] / rows)
        return value.item(), torch.autograd.grad(value, weights)

    total = 0.0
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    for value, gradients in pool.map(pass_rows, range(0, rows, rows_per_pass)):
        total += value
        for weight, gradient in zip(weights, gradients, strict=True):
            assert weight.grad is not None
            weight.grad.add_(gradient)
    return total


def _save(path: Path, network: Network, optimizer: TwinOptimizer, *, step: int) -> None:
    state = {f"network.{name}": value for name, value in network.state_dict().items()}
    state |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
    unfinished = path.with_suffix(".unfinished")
    save_file(state | {"step": torch.tensor(step)}, unfinished)
    unfinished.replace(path)


def _restore(path: Path, network: Network, optimizer: TwinOptimizer) -> int:
    """Load the state in `path` if there is one; the step to go on with."""
    if not path.exists():
        return 0
    state = load_file(path)
    step = int(state.pop("step"))
    parts: dict[str, dict[str, Tensor]] = {"network": {}, "optimizer": {}}
    for key, value in state.items():
        part, _, name = key.partition(".")
        parts[part][name] = value
    network.load_state_dict(parts["network"])
    optimizer.load_state(parts["optimizer"])
    log.info("resumed", file=str(path), step=step)
    return step
