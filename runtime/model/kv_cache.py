"""The KV cache's tensors, and how many blocks of them the memory holds.

Keys and values of one layer lie as ``[block, slot, kv_head, head_dim]``: all heads of a token side
by side, all tokens of a block after each other::

    block 0                          block 1
    ├ slot 0 ┬ slot 1 ┬ … ┬ slot 15 ┤├ slot 0 ┬ …
    │h0 h1 … │h0 h1 … │   │         ││h0 h1 … │

Which block belongs to whom is the KV cache manager's business; here a slot is a number,
``block * block_size + offset``.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.runtime.kvcache.kv_cache_manager import BlockCopy
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.memory import available_memory

_MIB: Final = 1 << 20


class LayerCache(NamedTuple):
    """Keys and values of one layer, each ``[num_slots + 1, kv_heads, head_dim]``.

    Of 8 bits, they are to be multiplied with scales ``[num_slots + 1, kv_heads]``, float32.

    The last slot belongs to no block and stays zero. Padding is read from there: a free block may
    hold anything, and even a weight of zero does not make an infinity harmless.
    """

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that there are; fp8 as bits, since few operations know such numbers."""
        given = (tensor for tensor in self if tensor is not None)
        return tuple(each.view(torch.int8) if each.itemsize == 1 else each for each in given)

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store ``[tokens, kv_heads, head_dim]`` in ``slots`` ``[tokens]``."""
        self.keys.index_copy_(0, slots, keys.to(self.keys.dtype))
        self.values.index_copy_(0, slots, values.to(self.values.dtype))


class KVCache:
    """The keys and values of every token that an engine remembers."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocate the tensors; raise ConfigurationError if the memory is not there."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.zero_slot = num_blocks * block_size
        shape = (self.zero_slot + 1, config.num_kv_heads, config.head_dim)
        has_scales = dtype.itemsize == 1
        stored = torch.int8 if has_scales else dtype
        shapes = {stored: shape} | ({torch.float32: shape[:2]} if has_scales else {})
        try:
            self.layers = tuple(
                LayerCache(
                    *(
                        _zeros(each, kind, device).view(dtype if kind == stored else kind)
                        for kind, each in shapes.items()
                        for _ in ("keys", "values")
                    )
                )
                for _ in range(config.num_layers)
            )
        # torch's OutOfMemoryError is a RuntimeError on every device.
        except (RuntimeError, OSError, OverflowError) as error:
            needed = num_blocks * kv_block_bytes(config, block_size, dtype)
            raise ConfigurationError(
                f"out of memory: the KV cache needs {needed // _MIB} MiB for {num_blocks} blocks; "
                "lower --kv-cache-memory or --gpu-memory-utilization"
            ) from error

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks in every layer, all at once: sources are read before targets are written."""
        if not copies:
            return
        offsets = torch.arange(self.block_size)
        blocks = torch.tensor(copies) * self.block_size
        sources, targets = (blocks[:, :, None] + offsets).unbind(dim=1)
        sources = sources.flatten().to(self.layers[0].keys.device)
        targets = targets.flatten().to(self.layers[0].keys.device)
        for layer in self.layers:
            for tensor in layer.tensors:
                tensor.index_copy_(0, targets, tensor.index_select(0, sources))


def _zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros that take no memory on the CPU, and no time, before they are written."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    count = math.prod(shape)
    memory = mmap.mmap(-1, count * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without large pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype, count=count).view(*shape)


class KVCacheSize(NamedTuple):
    """How large the KV cache is to be, and why."""

    num_blocks: int
    reason: str
    """One line for the log."""
    warning: str | None
    """One line if the cache is smaller than the longest context, else None."""


def kv_block_bytes(config: ModelConfig, block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block: keys and values of ``block_size`` tokens in all layers."""
    scale_bytes = torch.float32.itemsize if dtype.itemsize == 1 else 0
    head_bytes = config.head_dim * dtype.itemsize + scale_bytes
    return 2 * config.num_layers * block_size * config.num_kv_heads * head_bytes


def blocks_that_fit(
    config: ModelConfig,
    *,
    block_size: int,
    dtype: torch.dtype,
    device: torch.device,
    max_model_len: int,
    max_num_seqs: int,
    kv_cache_memory: int | None = None,
    memory_share: float = 0.5,
    gpu_memory_utilization: float = 0.9,
    step_bytes: int = 0,
) -> KVCacheSize:
    """Size the KV cache from a budget, or from the memory that is there.

    Call it after the weights are loaded. Never more blocks than ``max_num_seqs`` sequences of
    ``max_model_len`` tokens can use.

    Args:
        config: The model.
        block_size: Tokens of a block.
        dtype: Of keys and values.
        device: Where the cache will be.
        max_model_len: Tokens of the longest sequence.
        max_num_seqs: Sequences that run at once.
        kv_cache_memory: Budget in bytes; ``None`` measures the memory.
        memory_share: On a CPU, the share of the available memory to take.
        gpu_memory_utilization: On a GPU, the share of the whole memory that engine may use.
        step_bytes: Of a GPU's memory, what a step takes besides.

    Raises:
        ConfigurationError: Not even one block fits.
    """
    block_bytes = kv_block_bytes(config, block_size, dtype)
    if kv_cache_memory is not None:
        budget, source, setting = kv_cache_memory, "--kv-cache-memory", "raise --kv-cache-memory"
    elif device.type == "cuda":
        torch.cuda.empty_cache()  # what making the weights has left behind is free, too
        free, total = torch.cuda.mem_get_info(device)
        budget = int(total * gpu_memory_utilization) - (total - free) - step_bytes
        source = (
            f"{gpu_memory_utilization:g} of {total // _MIB} MiB of GPU memory, less what is used"
            f" and {step_bytes // _MIB} MiB for a step"
        )
        setting = "raise --gpu-memory-utilization"
    else:
        available = available_memory()
        budget = int(available * memory_share)
        source = f"{memory_share:g} of {available // _MIB} MiB of available memory"
        setting = "set --kv-cache-memory"
    num_blocks = max(budget, 0) // block_bytes
    blocks_for_one = -(-max_model_len // block_size)
    if num_blocks < 1:
        raise ConfigurationError(
            f"the KV cache does not fit: one block of {block_size} tokens needs {block_bytes} "
            f"bytes, there are {max(budget, 0)} ({source}); {setting} or lower --block-size"
        )
    warning = None
    if num_blocks < blocks_for_one:
        warning = (
            f"the KV cache holds {num_blocks * block_size} tokens, fewer than the "
            f"{max_model_len} of --max-model-len: {blocks_for_one * block_bytes // _MIB} MiB are "
            f"needed, there are {budget // _MIB} MiB ({source}); {setting} or lower --max-model-len"
        )
    num_blocks = min(num_blocks, blocks_for_one * max_num_seqs)
    reason = (
        f"{num_blocks} KV blocks of {block_size} tokens, "
        f"{num_blocks * block_bytes // _MIB} MiB ({source})"
    )
    return KVCacheSize(num_blocks, reason, warning)
