"""Prompts pooled as an engine pools them, without the engine: scheduler, runner, steps."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Final

from understudy.protocol.request import (
    FinishReason,
    Pooling,
    PoolingKind,
    Request,
    SamplingParams,
    TokenRow,
)
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import Runner
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence

PARAMS: Final = SamplingParams(seed=0, max_tokens=1)
MEAN: Final = Pooling(PoolingKind.MEAN)
LAST: Final = Pooling(PoolingKind.LAST)


def pooling_request(request_id: int, prompt: Iterable[int], pooling: Pooling) -> Request:
    return Request(request_id, request_id, tuple(prompt), PARAMS, pooling=pooling)


def floats(vector: bytes) -> tuple[float, ...]:
    """The numbers of a vector."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def pool(
    runner: Runner,
    requests: Iterable[Request],
    *,
    max_model_len: int = 1024,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 32,
    num_blocks: int = 512,
    block_size: int = 8,
    enable_prefix_caching: bool = True,
) -> Mapping[int, TokenRow]:
    """The last row of each request, by its id, when all were there from the start."""
    manager = KVCacheManager(
        num_blocks=num_blocks, block_size=block_size, enable_prefix_caching=enable_prefix_caching
    )
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        block_size=block_size,
    )
    scheduler = Scheduler(config, manager)
    for request in requests:
        scheduler.add(Sequence(request, attempt=1))
    ended: dict[int, TokenRow] = {}
    while (plan := scheduler.schedule()) is not None:
        for row in scheduler.update(plan, runner.execute(plan)):
            assert row.request_id not in ended
            if row.finish:
                ended[row.request_id] = row
        scheduler.check_integrity()
    assert manager.num_free_blocks == num_blocks
    return ended


def vectors(rows: Mapping[int, TokenRow]) -> dict[int, bytes]:
    """The vectors of requests that all have one."""
    for row in rows.values():
        assert row.finish == FinishReason.STOP
        assert row.vector
        assert not row.tokens
    return {request_id: row.vector for request_id, row in sorted(rows.items())}
