"""From the states of a prompt's tokens to one vector.

A prompt is computed in chunks, as the scheduler cuts it. A mean is summed up token by token, from
the first to the last and in double precision, so that not a bit of it depends on the cuts::

    chunks      [s0 s1 s2] [s3] [s4 s5]
    sums        ((((((0 + s0) + s1) + s2) + s3) + s4) + s5)

Every vector is cut to the dimensions that are wanted, and then brought to length 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from understudy.protocol.request import PoolingKind
from understudy.runtime.scheduling.decision import Pooled, ScheduledSequence
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

Vector: TypeAlias = npt.NDArray[np.float64]


class _Sum(NamedTuple):
    """The sum of a sequence's first states."""

    num_tokens: int
    total: Vector


class Pooler:
    """Pools the states of a decoder, step by step.

    Args:
        normalise: The model's last norm, row by row.
    """

    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        self._normalise = normalise
        # The latest sum, and the one before it: a step that was not carried out comes again.
        self._sums: WeakKeyDictionary[EngineSequence, tuple[_Sum, ...]] = WeakKeyDictionary()

    def pool(self, scheduled: Sequence[ScheduledSequence], hidden: Tensor) -> dict[int, Pooled]:
        """Take in a step's states ``[tokens, hidden_size]``, in the order of the plan.

        Returns:
            The vectors of sequences that are complete, by request id; none for one that is not
            finite.
        """
        pooled: dict[int, Pooled] = {}
        start = 0
        for share in scheduled:
            rows = slice(start, start + share.num_tokens)
            start += share.num_tokens
            pooling = share.sequence.pooling
            if pooling is None:
                continue
            if pooling.kind is PoolingKind.MEAN:
                mean = self._add(share, hidden[rows])
                vector = mean if share.samples else None
            elif pooling.kind is PoolingKind.LAST and share.samples:
                vector = numbers(self._normalise(hidden[rows][-1:]))[0]
            else:
                vector = None
            if vector is not None and np.isfinite(vector).all():
                pooled[share.sequence.request_id] = unit_vector(vector, pooling.dimensions)
        return pooled

    def _add(self, share: ScheduledSequence, hidden: Tensor) -> Vector:
        """Add a chunk's states to those before it; the mean so far."""
        sequence = share.sequence
        done = sequence.num_computed_tokens
        empty = _Sum(0, np.zeros(hidden.shape[1]))
        known = (empty, *self._sums.get(sequence, ()))
        [before] = {each.num_tokens: each for each in known if each.num_tokens == done}.values()
        total = add_rows(before.total, numbers(self._normalise(hidden)))
        after = _Sum(done + share.num_tokens, total)
        self._sums[sequence] = (before, after)
        return total / after.num_tokens


def add_rows(total: Vector, rows: Vector) -> Vector:
    """The sum of a vector and of rows, one after another: no grouping of them changes a bit."""
    total = total.copy()
    for row in rows:
        np.add(total, row, out=total)
    return total


def unit_vector(vector: Vector, dimensions: int) -> Pooled:
    """The first ``dimensions`` numbers of a vector, all for 0, at length 1; zeros stay zeros."""
    kept = vector[:dimensions] if dimensions else vector
    # An exact sum of squares has no order that it could depend on.
    length = math.sqrt(math.fsum((kept * kept).tolist()))
    return as_pooled(kept / length if length else kept)


def as_pooled(vector: Vector) -> Pooled:
    """A vector as it travels."""
    return Pooled(vector.astype("<f4").tobytes())


def numbers(rows: Tensor) -> Vector:
    """Rows in double precision, outside the device."""
    return rows.to(device="cpu", dtype=torch.float64).numpy()
