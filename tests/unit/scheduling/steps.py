"""A scheduler's steps, one after another, for tests: sequences that share nothing, fixed draws."""

from __future__ import annotations

from understudy.protocol.request import Request, SamplingParams, TokenRow
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import Draws, SampledToken, StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence

STOP_TOKEN = 2


def make_scheduler(
    *,
    num_blocks: int = 100,
    block_size: int = 4,
    max_num_seqs: int = 8,
    budget: int = 64,
    max_model_len: int = 256,
) -> Scheduler:
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=max_model_len,
        block_size=block_size,
    )
    return Scheduler(config, KVCacheManager(num_blocks=num_blocks, block_size=block_size))


def make_sequence(
    request_id: int = 1,
    *,
    prompt_length: int = 4,
    output: tuple[int, ...] = (),
    max_tokens: int = 100,
    min_tokens: int = 0,
    priority: int = 0,
    attempt: int = 1,
) -> Sequence:
    params = SamplingParams(
        seed=0, max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=(STOP_TOKEN,)
    )
    prompt = tuple(range(1000 * request_id, 1000 * request_id + prompt_length))  # nothing shared
    request = Request(request_id, request_id, prompt, params, priority)
    return Sequence(request, attempt=attempt, output=output)


def schedule(scheduler: Scheduler) -> StepPlan:
    plan = scheduler.schedule()
    assert plan is not None
    return plan


def shares(plan: StepPlan) -> dict[int, int]:
    return {scheduled.sequence.request_id: scheduled.num_tokens for scheduled in plan.scheduled}


def draw(plan: StepPlan, token_id: int = 9) -> Draws:
    return {s.sequence.request_id: (SampledToken(token_id),) for s in plan.scheduled if s.samples}


def run_step(scheduler: Scheduler, token_id: int = 9) -> list[TokenRow]:
    plan = schedule(scheduler)
    rows = scheduler.update(plan, draw(plan, token_id))
    scheduler.check_integrity()
    return rows


def run_to_end(scheduler: Scheduler) -> list[TokenRow]:
    rows: list[TokenRow] = []
    while scheduler.has_work:
        rows += run_step(scheduler)
    return rows
