"""Carries out step plans with an encoder: prompts in, vectors out.

The scheduler cuts prompts as it does for decoders, so that a step's budget is shared fairly. What
an encoder makes of a prompt needs all of it at once: a chunk before the last one costs its share
of a step's budget, and no time; with the last one all of the prompt is computed.
"""

from __future__ import annotations

import numpy as np
import torch

from understudy.protocol.request import Pooling, PoolingKind
from understudy.runtime.model.encoder import Encoder
from understudy.runtime.model.out_of_memory import telling_out_of_memory
from understudy.runtime.model.pooling import Vector, add_rows, as_pooled, numbers, unit_vector
from understudy.runtime.scheduling.decision import Draw, Draws, Pooled, StepPlan
from understudy.runtime.scheduling.sequence import Sequence


class EncoderRunner:
    """Runs an encoder on plans. What asks for tokens gets none, and ends."""

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder

    def execute(self, plan: StepPlan) -> Draws:
        """Compute the prompts that are complete with this plan; their vectors."""
        drawn: dict[int, Draw] = {}
        with telling_out_of_memory(), torch.inference_mode():
            for scheduled in plan.scheduled:
                sequence = scheduled.sequence
                if scheduled.samples and sequence.pooling is not None:
                    pooled = self._pool(sequence, sequence.pooling)
                    if pooled is not None:
                        drawn[sequence.request_id] = pooled
        return drawn

    def _pool(self, sequence: Sequence, pooling: Pooling) -> Pooled | None:
        """The vector of a prompt; ``None`` if it has none that is finite."""
        encoder = self._encoder
        is_score = pooling.kind is PoolingKind.SCORE
        if is_score and not encoder.config.has_score_head:
            return None
        states = encoder.states(sequence.token_ids, second_at=pooling.second_at)
        if is_score:
            score = numbers(encoder.score(states))
            return as_pooled(score) if np.isfinite(score).all() else None
        vector = _pick(numbers(states), pooling.kind)
        return unit_vector(vector, pooling.dimensions) if np.isfinite(vector).all() else None


def _pick(states: Vector, kind: PoolingKind) -> Vector:
    match kind:
        case PoolingKind.CLS:
            vector: Vector = states[0]
        case PoolingKind.LAST:
            vector = states[-1]
        case _:
            vector = add_rows(np.zeros(states.shape[1]), states) / len(states)
    return vector
