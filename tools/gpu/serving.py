"""Requests served as an engine serves them, without the engine: scheduler, runner, steps."""

from __future__ import annotations

import time
from collections.abc import Sequence as Rows
from dataclasses import dataclass, field

from understudy.protocol.request import Request
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling.decision import Flight, StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence


@dataclass
class Service:
    """What was answered, and how."""

    tokens: dict[int, list[int]] = field(default_factory=dict)
    """By request id."""
    num_steps: int = 0
    num_steps_ahead: int = 0
    """Steps that were launched before the one before them was over."""
    waited_s: float = 0.0
    """How long there was nothing to do but wait for the device."""


def serve(
    runner: ModelRunner,
    requests: Rows[Request],
    *,
    num_blocks: int,
    max_num_batched_tokens: int,
    overlaps: bool,
) -> Service:
    """Serve requests to their ends, all of them there from the start."""
    config = SchedulerConfig(
        max_num_seqs=len(requests),
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max(len(each.prompt) + each.params.max_tokens for each in requests),
        block_size=runner.cache.block_size,
    )
    manager = KVCacheManager(num_blocks=num_blocks, block_size=config.block_size)
    scheduler = Scheduler(config, manager)
    service = Service()
    for request in requests:
        scheduler.add(Sequence(request, attempt=0))
        service.tokens[request.request_id] = []
    under_way: tuple[StepPlan, Flight] | None = None
    while under_way is not None or scheduler.has_work:
        if under_way is None:
            plan = scheduler.schedule()
            assert plan is not None
            under_way = plan, runner.launch(plan)
        plan, flight = under_way
        ahead = scheduler.schedule_ahead() if overlaps else None
        under_way = None if ahead is None else (ahead, runner.launch(ahead))
        begun_at = time.monotonic()
        draws = flight.collect()
        service.waited_s += time.monotonic() - begun_at
        for row in scheduler.update(plan, draws):
            service.tokens[row.request_id] += row.tokens
        service.num_steps += 1
        service.num_steps_ahead += ahead is not None
    return service
