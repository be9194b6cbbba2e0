"""Attention whose bits depend on nothing but a row and its context.

Under exact numerics a row's result must not depend on how many other rows or how much padding its
product has. So scores, weights and sums are float32; keys are taken in chunks of ``KEYS_BASE`` from
the first token on, chunk after chunk; a masked key has a weight of exactly zero, and adding zero
changes nothing. Only the sizes within a chunk are left to choose, and, as for the linear layers
(see ``numerics``), the machine is asked which of them give the same bits.

Knows nothing of pages, heads or sequences.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.numerics import ROWS_BASE
from understudy.runtime.model.torch_import import seeded

KEYS_BASE: Final = 512
"""Keys of a chunk."""

_ROW_SIZES: Final = (1, 2, 4, 8, 16, 32, 64)
_KEY_SIZES: Final = (32, 64, 128, 256, 512)
_SCORE_FLOOR: Final = -80.0
_PROBE_SEED: Final = 0xA77E
_PROBE_MARGIN: Final = 3
"""Keys that are masked at the end of a probe's context."""


class Shapes(NamedTuple):
    """Sizes, ascending, that rows and keys of a product may be padded to."""

    rows: tuple[int, ...]
    keys: tuple[int, ...]
    batch_min: int
    """Fewer products at once than this may be computed by another kernel."""

    def padded_rows(self, num_rows: int) -> tuple[int, ...]:
        """Cut rows into blocks of allowed sizes."""
        largest = self.rows[-1]
        blocks = [largest] * (num_rows // largest)
        rest = num_rows % largest
        if rest:
            blocks.append(next(size for size in self.rows if size >= rest))
        return tuple(blocks)

    def padded_keys(self, num_keys: int) -> int:
        """Round a context up: whole chunks, and a last one of an allowed size.

        Long contexts take coarser sizes, so that a batch falls into few groups.
        """
        whole = num_keys // KEYS_BASE * KEYS_BASE
        rest = num_keys - whole
        if rest == 0:
            return whole
        least = max(rest, min(whole // 8, KEYS_BASE))
        return whole + next(size for size in self.keys if size >= least)


ALL_SHAPES: Final = Shapes(_ROW_SIZES, _KEY_SIZES, 1)


class KeyMask(NamedTuple):
    """Which keys a row sees; both broadcast to ``[batch, rows, keys]``, float32."""

    bias: Tensor
    """Added to scores: 0 for a key that is seen, -inf for one that is not."""
    factor: Tensor
    """Multiplies weights: 1 for a key that is seen, 0 for one that is not."""

    @classmethod
    def of(cls, seen: Tensor) -> KeyMask:
        """From booleans."""
        factor = seen.to(torch.float32)
        return cls(torch.zeros_like(factor).masked_fill_(~seen, float("-inf")), factor)

    def to(self, device: torch.device) -> KeyMask:
        """The same on a device."""
        return KeyMask(self.bias.to(device), self.factor.to(device))


def canonical_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: KeyMask, *, scale: float, batch_min: int = 1
) -> Tensor:
    """Softmax attention in a fixed order of additions, all float32.

    Args:
        query: ``[batch, rows, head_dim]``.
        keys: ``[batch, keys, head_dim]``.
        values: The same; finite even where they are not seen.
        mask: Which keys each row sees: one at least.
        scale: Multiplies the scores.
        batch_min: A smaller batch is padded to this.

    Returns:
        ``[batch, rows, head_dim]``.
    """
    batch = len(query)
    if batch < batch_min:
        copies = (-(-batch_min // batch), 1, 1)
        query, keys, values = (each.repeat(copies) for each in (query, keys, values))
        mask = KeyMask(*(each.expand(batch, -1, -1).repeat(copies) for each in mask))
    scores = [
        torch.baddbmm(bias, query, chunk.transpose(1, 2), alpha=scale)
        for bias, chunk in zip(_chunks(mask.bias, dim=2), _chunks(keys, dim=1), strict=True)
    ]
    # The maximum is exact in any order, so the chunks need no running one.
    peak = scores[0].amax(dim=2, keepdim=True)
    for chunk in scores[1:]:
        peak = torch.maximum(peak, chunk.amax(dim=2, keepdim=True))
    factors, value_chunks = _chunks(mask.factor, dim=2), _chunks(values, dim=1)
    weights = _weights(scores[0], peak, factors[0])
    total = weights.sum(dim=2, keepdim=True)
    output = torch.bmm(weights, value_chunks[0])
    for chunk, factor, value_chunk in zip(scores[1:], factors[1:], value_chunks[1:], strict=True):
        weights = _weights(chunk, peak, factor)
        total += weights.sum(dim=2, keepdim=True)
        output.baddbmm_(weights, value_chunk)
    return output.div_(total)[:batch]


def _weights(scores: Tensor, peak: Tensor, factor: Tensor) -> Tensor:
    """Exponentials of scores relative to their peak, in place; 0 for keys that are not seen.

    The floor keeps clear of denormal numbers and of infinity, both of which take processors up to
    a hundred times as long; a weight of e**-80 adds nothing to a sum that has a 1 in it.
    """
    return scores.sub_(peak).clamp_(min=_SCORE_FLOOR).exp_().mul_(factor)


def agreeing_shapes(head_dim: int, device: torch.device) -> Shapes:
    """Try canonical attention in every size; keep those that agree with the base sizes."""
    return _agreeing_shapes(head_dim, device, torch.get_num_threads())


@cache
def _agreeing_shapes(head_dim: int, device: torch.device, num_threads: int) -> Shapes:
    # A library may share few products among its threads in another way than many.
    batches = sorted({1, 2, 3, num_threads, 2 * num_threads + 1})
    trial = _Trial(head_dim, device, batches[-1])
    batch_min = batches[-1]
    for batch in reversed(batches):
        if not trial.agrees(batch, ROWS_BASE, KEYS_BASE):
            break
        batch_min = batch
    batches = [batch for batch in batches if batch >= batch_min]

    def all_agree(rows: Iterable[int], keys: int) -> bool:
        return all(trial.agrees(batch, size, keys) for size in rows for batch in batches)

    rows = {size for size in _ROW_SIZES if all_agree((size,), KEYS_BASE)} | {ROWS_BASE}
    keys = {size for size in _KEY_SIZES if all_agree(rows, size)} | {KEYS_BASE}
    return Shapes(tuple(sorted(rows)), tuple(sorted(keys)), batch_min)


class _Trial:
    """Random queries and contexts, attended to in base sizes and in others."""

    def __init__(self, head_dim: int, device: torch.device, batch: int) -> None:
        generator = seeded(_PROBE_SEED)

        def random(length: int) -> Tensor:
            return torch.randn(batch, length, head_dim, generator=generator).to(device)

        self._query = random(_ROW_SIZES[-1])
        self._keys, self._values = random(2 * KEYS_BASE), random(2 * KEYS_BASE)
        self._scale = head_dim**-0.5
        self._base: dict[int, Tensor] = {}

    def agrees(self, batch: int, rows: int, key_size: int) -> bool:
        """Try a last chunk padded to ``key_size``, as the only one and behind a whole one."""
        for whole in (0, KEYS_BASE):
            length = whole + key_size - _PROBE_MARGIN
            tried = self._attend(self._query[:batch, :rows], length, whole + key_size)
            if not torch.equal(tried, self._base_result(length)[:batch, :rows]):
                return False
        return True

    def _base_result(self, length: int) -> Tensor:
        if length not in self._base:
            padded = -(-length // KEYS_BASE) * KEYS_BASE
            tiles = [
                self._attend(tile, length, padded)
                for tile in torch.split(self._query, ROWS_BASE, dim=1)
            ]
            self._base[length] = torch.cat(tiles, dim=1)
        return self._base[length]

    def _attend(self, query: Tensor, length: int, padded: int) -> Tensor:
        keys, values = self._keys[: len(query), :padded], self._values[: len(query), :padded]
        is_padding = torch.arange(padded, device=query.device) >= length
        return canonical_attention(
            query.contiguous(),
            keys.masked_fill(is_padding[:, None], 0.0),
            values.masked_fill(is_padding[:, None], 0.0),
            KeyMask.of(~is_padding[None, None]),
            scale=self._scale,
        )


def _chunks(tensor: Tensor, *, dim: int) -> Sequence[Tensor]:
    """Chunks of keys, as views."""
    if tensor.shape[dim] <= KEYS_BASE:
        return (tensor,)
    return torch.split(tensor, KEYS_BASE, dim=dim)
