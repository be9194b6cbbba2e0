"""The engine's own proof, before it joins, that this model on this machine keeps its promise.

A matrix library may choose another kernel tomorrow, for another shape or on another processor, and
sum in another order. So exact numerics are not only built: each start computes the same tokens in
two ways that have nothing in common, and compares all bits.
"""

from __future__ import annotations

import hashlib
from contextlib import suppress
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.cache import cache_directory, is_ours, note_use
from understudy.runtime.log import get_logger
from understudy.runtime.model.model_digest import model_digest
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.operations import kernels_name
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.torch_import import seeded
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.processor import processor_name
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence

_TOKENS_SEED: Final = 0x7E57
_LENGTHS: Final = (45, 21)
"""Two sequences; the second one only keeps the first one company."""
_SHARES: Final = ((7, 1), (16, 3), (9, 16), (1, 1), (1, 0), (2, 0), *((1, 0),) * 9)
"""Of each sequence, how many tokens each step computes: chunks, mixed steps, single tokens."""


def prove_exactness(model: Transformer, *, block_size: int) -> None:
    """Compute a sequence at once and alone, then in pieces and in company.

    Takes a few dozen tokens' time, and a few blocks of KV cache for its duration.

    Raises:
        ConfigurationError: keys, values, hidden states or logits are not the same in every bit.
    """
    whole, pieces = _Bench(model, block_size), _Bench(model, block_size)
    with torch.inference_mode():
        whole.step((_LENGTHS[0], 0))
        whole.step((0, _LENGTHS[1]))
        for shares in _SHARES:
            pieces.step(shares)
        names = ("keys and values", "hidden states", "logits")
        for name, expected, found in zip(names, whole.results(), pieces.results(), strict=True):
            if not torch.equal(expected, found):
                raise ConfigurationError(
                    f"numerics exact does not hold here: {name} depend on how they are batched"
                    f" ({int((expected != found).sum())} of {expected.numel()} numbers differ);"
                    " set numerics fast, and expect texts to change when requests move"
                )


def prove_exactness_once(model: Transformer, *, block_size: int, name: str) -> None:
    """The same, unless a start before proved it; ``name`` holds all that the proof is about."""
    digest = hashlib.sha256(f"{name}\n{processor_name()}\n{block_size}".encode()).hexdigest()
    try:
        mark = cache_directory() / f"exact-{digest[:32]}"
        if is_ours(mark):
            note_use(mark)
            return
    except OSError as error:
        get_logger().warning(f"the proof of exactness cannot be kept: {error}")
        prove_exactness(model, block_size=block_size)
        return
    prove_exactness(model, block_size=block_size)
    with suppress(OSError):  # then the next start proves it again
        mark.touch(mode=0o600)


def numerics_class(
    directory: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    numerics: Numerics,
    quantization: Quantization = "none",
    kv_dtype: torch.dtype | None = None,
) -> str:
    """Name whatever decides about bits: two engines that have the same name make the same.

    The model's digest, dtype, quantisation and format of keys and values, device and its kind,
    instruction set, threads, the kernels, and torch's release.
    """
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device).replace(" ", "_")
    else:
        card = f"{torch.backends.cpu.get_cpu_capability()}x{torch.get_num_threads()}"
    kind = f"{card}/{kernels_name(device, dtype)}"
    name = str(dtype).removeprefix("torch.")
    if quantization != "none":
        name = f"{name}+{quantization}"
    if kv_dtype is not None and kv_dtype != dtype:
        name = f"{name}+kv-{str(kv_dtype).removeprefix('torch.')}"
    return "/".join((model_digest(directory), numerics, name, device.type, kind, torch.__version__))


class _Bench:
    """Two sequences and a cache of their own."""

    def __init__(self, model: Transformer, block_size: int) -> None:
        self._model = model
        self._block_size = block_size
        blocks_each = -(-max(_LENGTHS) // block_size)
        self._runner = ModelRunner(model, num_blocks=2 * blocks_each, block_size=block_size)
        generator = seeded(_TOKENS_SEED)
        self._sequences = []
        for index, length in enumerate(_LENGTHS):
            tokens = torch.randint(model.vocab_size, (length,), generator=generator).tolist()
            request = Request(index, index, tuple(tokens), SamplingParams(seed=0, max_tokens=1))
            sequence = Sequence(request, attempt=1)
            sequence.block_table = list(range(index, 2 * blocks_each, 2))
            self._sequences.append(sequence)
        self._states: list[list[Tensor]] = [[], []]

    def step(self, shares: tuple[int, int]) -> None:
        """Compute so many next tokens of each sequence."""
        scheduled = [
            ScheduledSequence(sequence, share)
            for sequence, share in zip(self._sequences, shares, strict=True)
            if share
        ]
        rows = self._runner.hidden_states(StepPlan(0, tuple(scheduled)))
        for sequence, share, _ in scheduled:
            self._states[sequence.request_id].append(rows[:share])
            rows = rows[share:]
            sequence.num_computed_tokens += share

    def results(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of both sequences: keys and values, states, and the logits that follow the states."""
        states = torch.cat([part for parts in self._states for part in parts])
        cached = [
            torch.cat([tensor[slots].flatten().to(torch.float32) for tensor in layer.tensors])
            for slots in map(self._slots, self._sequences)
            for layer in self._runner.cache.layers
        ]
        logits = [self._model.logits(part) for parts in self._states for part in parts]
        return torch.cat(cached), states, torch.cat(logits)

    def _slots(self, sequence: Sequence) -> Tensor:
        positions = torch.arange(sequence.num_computed_tokens)
        blocks = torch.tensor(sequence.block_table)[positions // self._block_size]
        return (blocks * self._block_size + positions % self._block_size).to(self._model.device)
