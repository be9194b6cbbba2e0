"""What routing by cached prefixes brings: ``python -m understudy.tools.bench.routing``.

Four engines, each the real scheduler with the real prefix cache, under virtual time; a step costs
what a line through measured steps says. The same calls come to each policy:

* ``round robin``, and ``least``: the least outstanding work, whatever is cached where.
* ``threshold``: cache-aware load balancing as SGLang's router has it with its default values (Zheng
  et al., arXiv:2312.07104, and the router's documentation): the longest match if it is more than
  half of the prompt, else the engine with the most room; the shortest queue as soon as the queues
  differ by more than 64 requests and by half.
* ``ours``: see ``runtime/control/router.py``.
"""

from __future__ import annotations

import argparse
import heapq
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.prefix_index import PIECE_TOKENS, PrefixIndex, prefix_keys
from understudy.runtime.control.router import Candidate, choose
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.scheduling.decision import SampledToken, StepPlan
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.runtime.scheduling.sequence import Sequence as EngineSequence
from understudy.tools.bench.reuse_trace import MIXES, Call, Mix, reuse_trace

NUM_ENGINES: Final = 4
NUM_BLOCKS: Final = 3000
BLOCK_SIZE: Final = 16
STEP_S: Final = 0.02
TOKEN_S: Final = 0.0002
CONFIG: Final = SchedulerConfig(
    max_num_seqs=32, max_num_batched_tokens=1024, max_model_len=1 << 15, block_size=BLOCK_SIZE
)

Policy = Callable[[Sequence[Candidate], int], Candidate]


class _Arrival(NamedTuple):
    at: float
    number: int
    call: Call


class _VirtualEngine:
    """One engine: what it has to do, and since when."""

    def __init__(self, name: str) -> None:
        self.name = name
        manager = KVCacheManager(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self.scheduler = Scheduler(CONFIG, manager)
        self.outstanding = 0
        self.plan: StepPlan | None = None

    def begin(self, now: float) -> float | None:
        """Plan a step, if there is work; gives the time of its end."""
        self.plan = self.scheduler.schedule()
        if self.plan is None:
            return None
        return now + STEP_S + TOKEN_S * self.plan.num_tokens

    def end(self) -> list[tuple[int, int, bool]]:
        """Take in the step: request, position and whether it was the last token."""
        assert self.plan is not None
        sampled = {
            s.sequence.request_id: (SampledToken(1),) for s in self.plan.scheduled if s.samples
        }
        rows = self.scheduler.update(self.plan, sampled)
        self.outstanding -= sum(bool(row.finish) for row in rows)
        return [(row.request_id, row.position, bool(row.finish)) for row in rows]


class _Outcome(NamedTuple):
    """What one policy made of the calls."""

    hit_rate: float
    ttft_mean_s: float
    ttft_p99_s: float
    latency_mean_s: float


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m understudy.tools.bench.routing")
    parser.add_argument("--conversations", type=int, default=1500, help="length of a trace (1500)")
    parser.add_argument("--rate", type=float, default=12.0, help="conversations a second (12)")
    parser.add_argument("--seed", type=int, default=1, help="of the traces (1)")
    parser.add_argument("--json", type=Path, help="write the figures here as well")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for mix in MIXES:
        for name, outcome in _compare(mix, arguments.conversations, arguments.rate, arguments.seed):
            rows.append({"mix": mix.name, "policy": name, **outcome._asdict()})
            sys.stdout.write(
                f"{mix.name:14} {name:12} found {outcome.hit_rate:.3f}"
                f"  first token {1000 * outcome.ttft_mean_s:6.0f} ms,"
                f" p99 {1000 * outcome.ttft_p99_s:7.0f} ms"
                f"  whole {outcome.latency_mean_s:6.2f} s\n"
            )
            sys.stdout.flush()
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


def _compare(mix: Mix, conversations: int, rate: float, seed: int) -> list[tuple[str, _Outcome]]:
    calls = reuse_trace(mix, conversations=conversations, seed=seed)
    arrivals = [_Arrival(call.at / rate, number, call) for number, call in enumerate(calls)]
    return [(name, _play(arrivals, policy)) for name, policy in _policies().items()]


def _policies() -> dict[str, Policy]:
    turn = 0

    def round_robin(candidates: Sequence[Candidate], _: int) -> Candidate:
        nonlocal turn
        turn += 1
        return candidates[turn % len(candidates)]

    def ours(candidates: Sequence[Candidate], _: int) -> Candidate:
        # Who has no credit left is not asked; here nobody is turned away, so the queue is endless.
        chosen = choose([c._replace(max_num_seqs=1 << 20) for c in candidates])
        assert chosen is not None
        return chosen

    return {"round robin": round_robin, "least": _least, "threshold": _threshold, "ours": ours}


def _least(candidates: Sequence[Candidate], _: int) -> Candidate:
    return min(candidates, key=lambda candidate: candidate.outstanding)


def _threshold(candidates: Sequence[Candidate], num_tokens: int) -> Candidate:
    loads = [candidate.outstanding for candidate in candidates]
    if max(loads) - min(loads) > 64 and max(loads) > 1.5 * min(loads):
        return _least(candidates, num_tokens)
    best = max(candidates, key=lambda candidate: candidate.num_cached_tokens)
    if best.num_cached_tokens > num_tokens / 2:
        return best
    return _least(candidates, num_tokens)


def _play(arrivals: list[_Arrival], policy: Policy) -> _Outcome:
    """Let all calls come, one engine step after another, to the last token."""
    engines = [_VirtualEngine(f"engine-{number}") for number in range(NUM_ENGINES)]
    index = PrefixIndex()
    sequences: dict[int, EngineSequence] = {}
    first_s: dict[int, float] = {}
    last_s: dict[int, float] = {}
    # Arrivals (no engine) come before ends of steps at the same time.
    events = [(arrival.at, -1, arrival.number) for arrival in arrivals]
    heapq.heapify(events)
    while events:
        now, place, number = heapq.heappop(events)
        if place < 0:
            call = arrivals[number].call
            params = SamplingParams(seed=0, max_tokens=call.num_output_tokens)
            request = Request(number, number, call.prompt, params)
            place = engines.index(_route(engines, index, request, policy))
            sequences[number] = EngineSequence(request, attempt=1)
            engines[place].outstanding += 1
            engines[place].scheduler.add(sequences[number])
            if engines[place].plan is not None:
                continue
        else:
            for request_id, position, is_last in engines[place].end():
                if position == 0:
                    first_s[request_id] = now - arrivals[request_id].at
                if is_last:
                    last_s[request_id] = now - arrivals[request_id].at
        ends_at = engines[place].begin(now)
        if ends_at is not None:
            heapq.heappush(events, (ends_at, place, 0))
    num_found = sum(sequence.num_cached_tokens or 0 for sequence in sequences.values())
    num_tokens = sum(sequence.num_prompt_tokens for sequence in sequences.values())
    ordered = sorted(first_s.values())
    return _Outcome(
        num_found / num_tokens,
        statistics.mean(ordered),
        ordered[int(0.99 * len(ordered))],
        statistics.mean(last_s.values()),
    )


def _route(
    engines: list[_VirtualEngine], index: PrefixIndex, request: Request, policy: Policy
) -> _VirtualEngine:
    keys = prefix_keys(request)
    candidates = [
        Candidate(
            engine.name,
            engine.outstanding,
            CONFIG.max_num_seqs,
            num_cached_tokens=index.num_cached_tokens(engine.name, keys),
        )
        for engine in engines
    ]
    chosen = policy(candidates, len(request.prompt))
    assert len(keys) * PIECE_TOKENS <= len(request.prompt)
    index.note(chosen.identity, keys, tokens_max=NUM_BLOCKS * BLOCK_SIZE)
    return next(engine for engine in engines if engine.name == chosen.identity)


if __name__ == "__main__":
    sys.exit(main())
