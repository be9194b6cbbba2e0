"""Training learns, and an interruption leaves no trace in what is learnt."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from understudy.tools.demo import training
from understudy.tools.demo.batches import Batch, Windows
from understudy.tools.demo.network import Network
from understudy.tools.demo.train import Preset
from understudy.tools.demo.training import (
    DistillationLoss,
    Loss,
    TrainingPlan,
    next_token_loss,
    train,
)


@pytest.fixture
def windows(preset: Preset) -> Windows:
    documents = [[3 + (start + step) % 40 for step in range(50)] for start in range(30)]
    return Windows(documents, separator=0, length=preset.context_length, seed=1)


def train_quietly(
    plan: TrainingPlan,
    windows: Windows,
    progress_file: Path,
    *,
    loss: Loss = next_token_loss,
    workers: int = 1,
) -> Network:
    return train(
        plan, windows, loss=loss, name="test", progress_file=progress_file, workers=workers
    )


class Interrupted(Exception):
    """The machine was needed for something else."""


def test_training_learns_a_regular_text(preset: Preset, windows: Windows, tmp_path: Path) -> None:
    network = train_quietly(preset.model, windows, tmp_path / "progress")
    fresh = Network(preset.model.shape, generator=torch.Generator().manual_seed(1))
    batch = next(windows.batches(windows_per_step=4, first_step=100))
    with torch.no_grad():
        learnt = next_token_loss(network(batch.inputs), batch)
        unlearnt = next_token_loss(fresh(batch.inputs), batch)
    assert learnt < unlearnt - 1


def test_an_interrupted_training_ends_with_the_same_weights(
    preset: Preset, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "PROGRESS_EVERY_STEPS", 7)
    plan = preset.model
    calls = 0

    def failing_loss(logits: Tensor, batch: Batch) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 18:
            raise Interrupted
        return next_token_loss(logits, batch)

    whole = train_quietly(plan, windows, tmp_path / "whole")
    halves = tmp_path / "halves"
    with pytest.raises(Interrupted):
        train_quietly(plan, windows, halves, loss=failing_loss)
    assert halves.exists()
    resumed = train_quietly(plan, windows, halves)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_number_of_workers_changes_no_weight(
    preset: Preset, windows: Windows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "TOKENS_PER_PASS", 32)
    alone = train_quietly(preset.model, windows, tmp_path / "alone")
    shared = train_quietly(preset.model, windows, tmp_path / "shared", workers=3)
    for one, other in zip(alone.parameters(), shared.parameters(), strict=True):
        assert torch.equal(one, other)


def test_distillation_is_least_where_the_student_says_what_the_teacher_says(
    preset: Preset, windows: Windows
) -> None:
    teacher = Network(preset.model.shape, generator=torch.Generator().manual_seed(1))
    other = Network(preset.model.shape, generator=torch.Generator().manual_seed(2))
    loss = DistillationLoss(teacher)
    batch = next(windows.batches(windows_per_step=2, first_step=0))
    with torch.no_grad():
        assert loss(teacher(batch.inputs), batch) < loss(other(batch.inputs), batch)


def test_the_rate_rises_stays_and_falls_to_nothing(preset: Preset) -> None:
    plan: TrainingPlan = replace(preset.model, steps=100, warmup_steps=10, decay_share=0.4)
    shares = [plan.rate_share(step) for step in range(100)]
    assert shares[0] == pytest.approx(0.1)
    assert shares[9:61] == [1.0] * 52
    assert shares[60:] == sorted(shares[60:], reverse=True)
    assert shares[-1] == pytest.approx(1 / 40)


def test_rows_are_short_first_and_whole_at_the_end(preset: Preset) -> None:
    plan = replace(preset.model, steps=100, short_share=0.75, short_halvings=1)
    assert [plan.halvings(step) for step in (0, 74, 75, 99)] == [1, 1, 0, 0]
