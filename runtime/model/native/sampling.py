"""What the sampler asks of whole rows of logits, by the CPU's own kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.runtime.model.native.library import Library

_ROOM: Final = 64
"""Tokens that may win a draw; there are one or two, unless logits are the same for hundreds."""


class Draw(NamedTuple):
    """A draw from a whole row."""

    row: int
    key: int
    """``signed(noise_key(...))``."""
    temperature: float


class Likeliest(NamedTuple):
    """Of each row, its greatest number, NaN if it has any, and the first place where that is."""

    values: Tensor
    ids: list[int]


class _Draw(ctypes.Structure):
    """As ``Draw`` in sampling.cpp has it."""

    _fields_ = (
        ("row", ctypes.c_int64),
        ("key", ctypes.c_int64),
        ("inverse_temperature", ctypes.c_float),
    )


def likeliest(library: Library, logits: Tensor) -> Likeliest:
    """The likeliest token of each row of ``logits`` ``[rows, vocab_size]``, float32, contiguous."""
    rows, width = logits.shape
    values, ids = torch.empty(rows), torch.empty(rows, dtype=torch.int64)
    library.functions.likeliest(logits.data_ptr(), values.data_ptr(), ids.data_ptr(), rows, width)
    return Likeliest(values, ids.tolist())


def may_win(library: Library, logits: Tensor, draws: Sequence[Draw]) -> list[list[int]] | None:
    """For each draw, all tokens whose noisy logit may be the greatest.

    Noise is computed for the whole row, but only nearly: the few that this cannot tell apart are
    for the caller to compare. ``None`` if these are many somewhere.
    """
    width = logits.shape[1]
    described = (_Draw * len(draws))(
        *(_Draw(draw.row, draw.key, 1.0 / draw.temperature) for draw in draws)
    )
    noisy = torch.empty(len(draws), width)
    ids = torch.empty(len(draws), _ROOM, dtype=torch.int64)
    counts = torch.empty(len(draws), dtype=torch.int64)
    library.functions.may_win(
        *(logits.data_ptr(), width, ctypes.byref(described), noisy.data_ptr()),
        *(ids.data_ptr(), counts.data_ptr(), len(draws), _ROOM),
    )
    found = [
        row[:count] if count > 0 else None
        for row, count in zip(ids.tolist(), counts.tolist(), strict=True)
    ]
    whole = [row for row in found if row is not None]
    return whole if len(whole) == len(draws) else None
