"""From token ids to training batches: an endless, seeded order of windows over the documents.

Which windows a step sees depends on the documents, the seed and the step's number alone, so an
interrupted training run goes on with the batches that it would have had.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Batch(NamedTuple):
    """Rows of `inputs` [row, position] and the tokens that follow each of them, `targets`."""

    inputs: Tensor
    targets: Tensor


class Windows:
    """Windows of equal length cut from shuffled documents, which `separator` tokens keep apart.

    Each epoch puts the documents in another order and starts cutting at another offset, so windows
    begin anywhere in a file.
    """

    def __init__(
        self, documents: Sequence[Sequence[int]], *, separator: int, length: int, seed: int
    ) -> None:
        self._documents = [torch.tensor([*document, separator]) for document in documents]
        self._length = length
        self._seed = seed
        total = sum(len(document) for document in self._documents)
        # One window fewer than fits leaves room for the offset.
        self.per_epoch = (total - 1) // length - 1
        if self.per_epoch < 1:
            raise ValueError(f"{total} tokens are too few for windows of {length}")

    def epoch(self, number: int) -> Tensor:
        """All windows [per_epoch, length + 1] of one epoch; neighbours share one token."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        order = torch.randperm(len(self._documents), generator=generator).tolist()
        stream = torch.cat([self._documents[index] for index in order])
        offset = int(torch.randint(self._length, (1,), generator=generator))
        windows = stream[offset:].unfold(0, self._length + 1, self._length)[: self.per_epoch]
        return windows[torch.randperm(self.per_epoch, generator=generator)]

    def batches(self, *, windows_per_step: int, first_step: int) -> Iterator[Batch]:
        """The batches of all steps from `first_step` on, without end."""
        position = first_step * windows_per_step
        number, offset = divmod(position, self.per_epoch)
        waiting = self.epoch(number)[offset:]
        while True:
            while len(waiting) < windows_per_step:
                number += 1
                waiting = torch.cat((waiting, self.epoch(number)))
            taken, waiting = waiting[:windows_per_step], waiting[windows_per_step:]
            yield Batch(inputs=taken[:, :-1], targets=taken[:, 1:])


def halve(batch: Batch, *, times: int) -> Batch:
    """The same tokens as twice as many rows of half the length, `times` over."""
    rows = batch.inputs.shape[0] * 2**times
    return Batch(inputs=batch.inputs.reshape(rows, -1), targets=batch.targets.reshape(rows, -1))
