"""What the machine itself can do, measured beside a model's steps: reading, and multiplying.

A decode step of one sequence reads all weights once, so it cannot be faster than reading them; a
long prompt is bound by its products. The rates are those that torch reaches with as many threads:
the sum of a large tensor, and the product of two square matrices. Only a CPU's are measured here;
``tools/gpu_bench`` has a card's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

import torch

from understudy.runtime.model.checkpoint import Checkpoint
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.parts import matrices_of, outer_parts
from understudy.runtime.model.quantization_config import Quantization

_READ_BYTES: Final = 512 << 20
_SIDE: Final = 2048
_TRIES: Final = 5


class Limits(NamedTuple):
    """Rates of this machine with the threads that torch has."""

    read_bytes_per_s: float
    float32_flop_per_s: float
    bfloat16_flop_per_s: float
    int8_op_per_s: float


def measure_limits() -> Limits:
    """Measure them; takes about two seconds, and 512 MiB."""
    numbers = torch.zeros(_READ_BYTES // 8, dtype=torch.int64)
    wide = torch.randn(_SIDE, _SIDE)
    brain = wide.to(torch.bfloat16)
    small = (32 * wide).clamp(-127, 127).to(torch.int8)
    flop = 2 * _SIDE**3
    return Limits(
        _READ_BYTES / _best_s(numbers.sum),
        flop / _best_s(lambda: wide @ wide),
        flop / _best_s(lambda: brain @ brain),
        flop / _best_s(lambda: torch._int_mm(small, small)),
    )


def num_weights(config: ModelConfig) -> tuple[int, int]:
    """How many weights are in the layers' matrices, and in the output embedding.

    Each token is multiplied with all of the layers', two operations each; only one that something
    is drawn from with the output embedding.
    """
    head = outer_parts(config)[2]
    parts = {part for parts in matrices_of(config) for part in parts} - {head}
    sizes = [math.prod(part.shape) for part in parts]
    return sum(sizes), math.prod(head.shape)


def weight_bytes(directory: Path, config: ModelConfig, quantization: Quantization) -> int | None:
    """What a decode step reads of them; None for a checkpoint that is quantised itself.

    Weights that are not quantised are kept in the checkpoint's dtype, and an output embedding in
    8 bits at least.
    """
    if config.quantization is not None:
        return None
    in_layers, in_head = num_weights(config)
    stored = Checkpoint.open(directory).tensors[outer_parts(config)[2].name].dtype
    bits = {"none": 8 * stored.itemsize, "int8": 8, "fp8": 8, "int4": 5}[quantization]
    return (in_layers * bits + in_head * max(bits, 8)) // 8


def _best_s(work: Callable[[], object]) -> float:
    times_s = []
    for _ in range(_TRIES):
        began_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - began_s)
    return min(times_s)
