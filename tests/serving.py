"""A model served as an engine serves it, without the engine: scheduler, runner, steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from understudy.protocol.packed_logprobs import unpack_logprobs
from understudy.protocol.request import FinishReason, Request, SamplingParams, TokenLogprobs
from understudy.runtime.grammar_masks import GrammarMasks
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import Flight, StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence
from understudy.runtime.scheduling.speculation import Speculator


@dataclass
class Served:
    """One request's answer."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None


@dataclass
class Service:
    """All answers, by request id, and how often somebody was preempted."""

    served: dict[int, Served] = field(default_factory=dict)
    num_preemptions: int = 0
    num_cached_tokens: int = 0
    """Of all prompts, together."""
    num_steps_ahead: int = 0
    """Steps that were launched before the one before them was over."""


def request_of(request_id: int, prompt: Iterable[int], params: SamplingParams) -> Request:
    return Request(request_id, request_id, tuple(prompt), params)


def serve(
    model: Transformer,
    requests: Iterable[Request],
    *,
    max_num_batched_tokens: int = 64,
    max_num_seqs: int = 32,
    num_blocks: int = 512,
    block_size: int = 8,
    enable_prefix_caching: bool = True,
    at_once: bool = True,
    speculator: Speculator | None = None,
    grammar_masks: GrammarMasks | None = None,
    overlaps: bool = False,
) -> Service:
    """Serve requests to their ends, all of them there from the start, or one after another."""
    config = SchedulerConfig(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=model.config.max_model_len,
        block_size=block_size,
    )
    manager = KVCacheManager(
        num_blocks=num_blocks,
        block_size=block_size,
        enable_prefix_caching=enable_prefix_caching,
    )
    scheduler = Scheduler(config, manager)
    runner = ModelRunner(
        model, num_blocks=num_blocks, block_size=block_size, grammar_masks=grammar_masks
    )
    service = Service()
    waiting = deque(requests)
    under_way: tuple[StepPlan, Flight] | None = None
    while waiting or scheduler.has_work or under_way is not None:
        while waiting and (at_once or not scheduler.has_work):
            request = waiting.popleft()
            service.served[request.request_id] = Served()
            scheduler.add(Sequence(request, attempt=0))
        if under_way is None:
            drafts = {} if speculator is None else speculator.propose(scheduler.running)
            plan = scheduler.schedule(drafts)
            assert plan is not None
            service.num_preemptions += len(plan.preempted)
            under_way = plan, runner.launch(plan)
        plan, flight = under_way
        ahead = scheduler.schedule_ahead() if overlaps else None
        under_way = None if ahead is None else (ahead, runner.launch(ahead))
        service.num_steps_ahead += ahead is not None
        draws = flight.collect()
        if speculator is not None:
            speculator.note(plan, draws, 0.01)
        for row in scheduler.update(plan, draws):
            served = service.served[row.request_id]
            assert served.finish is None
            assert row.position == len(served.tokens)
            service.num_cached_tokens += row.num_cached_tokens
            served.tokens += row.tokens
            served.logprobs += map(unpack_logprobs, row.logprobs)
            served.finish = FinishReason(row.finish) if row.finish else None
        scheduler.check_integrity()
    assert manager.num_free_blocks == num_blocks
    return service
