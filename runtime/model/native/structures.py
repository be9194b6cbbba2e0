"""The forms in which kernels are told things, as ``kernels.h`` has them."""

from __future__ import annotations

import ctypes
from typing import Final

from torch import Tensor

POINTER, LONG, FLOAT = ctypes.c_void_p, ctypes.c_long, ctypes.c_float

WIDE: Final = 0
BRAIN: Final = 1
INTEGER: Final = 2
"""Kinds of a matrix: 32 bits a number, bfloat16, 8-bit integers."""


class Matrix(ctypes.Structure):
    """A packed weight."""

    _fields_ = (
        *(("panels", POINTER), ("start", POINTER), ("scales", POINTER), ("bias", POINTER)),
        *(("inputs", LONG), ("outputs", LONG), ("kind", LONG)),
    )


class Cache(ctypes.Structure):
    """Keys and values of a layer."""

    _fields_ = (
        *(("keys", POINTER), ("values", POINTER)),
        *(("key_scales", POINTER), ("value_scales", POINTER)),
    )


class Heads(ctypes.Structure):
    """How a model's heads lie."""

    _fields_ = (
        *(("queries", LONG), ("keys", LONG), ("width", LONG)),
        *(("epsilon", FLOAT), ("scale", FLOAT), ("is_narrow", LONG)),
    )


class Rows(ctypes.Structure):
    """Where the rows of a step are, and what turns them."""

    _fields_ = (
        *(("count", LONG), ("stored", LONG), ("slots", POINTER)),
        *(("positions", POINTER), ("cosines", POINTER), ("sines", POINTER)),
    )


class Spans(ctypes.Structure):
    """Which rows are whose, and where their contexts are."""

    _fields_ = (("spans", POINTER), ("count", LONG), ("tables", POINTER), ("block_size", LONG))


class Layer(ctypes.Structure):
    """A layer's weights, and its part of the cache."""

    _fields_ = (
        *(("attention_norm", POINTER), ("mlp_norm", POINTER), ("qk_norm", POINTER)),
        *(("qkv", Matrix), ("output", Matrix), ("gate_up", Matrix), ("down", Matrix)),
        ("cache", Cache),
    )


class Guessing(ctypes.Structure):
    """What guessing some tokens after each other needs besides the layers."""

    _fields_ = (
        *(("embedding", POINTER), ("is_brain", LONG), ("norm", POINTER), ("head", Matrix)),
        *(("inverse_temperatures", POINTER), ("keys", POINTER), ("tokens", POINTER)),
        ("depth", LONG),
    )


def address(tensor: Tensor | None) -> int | None:
    """What a kernel takes for a tensor: where its numbers are."""
    return None if tensor is None else tensor.data_ptr()
