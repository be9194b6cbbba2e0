"""What the largest step is that memory is measured with; the measuring itself needs a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoints import FAMILIES, write_checkpoint
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.step_profile import largest_step_bytes
from understudy.runtime.scheduling.decision import Draws, StepPlan


@pytest.mark.parametrize(
    ("max_num_batched_tokens", "max_num_seqs", "count", "tokens_each"),
    [(64, 4, 4, 16), (70, 4, 4, 17), (3, 8, 3, 1), (100_000, 2, 2, 128)],
)
def test_all_sequences_share_all_tokens_and_draw(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    max_num_batched_tokens: int,
    max_num_seqs: int,
    count: int,
    tokens_each: int,
) -> None:
    model = load_model(
        write_checkpoint(tmp_path, FAMILIES["llama"] | {"max_position_embeddings": 128}),
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    allocated = [1000]
    plans: list[StepPlan] = []
    execute = ModelRunner.execute

    def noting(runner: ModelRunner, plan: StepPlan) -> Draws:
        plans.append(plan)
        allocated[0] = 1700
        return execute(runner, plan)

    monkeypatch.setattr(ModelRunner, "execute", noting)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda _: allocated[0])
    found = largest_step_bytes(
        model,
        block_size=16,
        max_num_batched_tokens=max_num_batched_tokens,
        max_num_seqs=max_num_seqs,
    )
    assert found == 700
    (plan,) = plans
    assert [share.num_tokens for share in plan.scheduled] == [tokens_each] * count
    assert all(share.draws for share in plan.scheduled)
    blocks = [block for share in plan.scheduled for block in share.sequence.block_table]
    assert len(blocks) == len(set(blocks))
