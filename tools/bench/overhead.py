"""What an engine's step costs besides the model: ``python -m understudy.tools.bench.overhead``.

Serves sequences as an engine does, in one process: the scheduler decides, the runner lays the step
out, the model computes, the sampler draws, the scheduler takes in what was drawn, and the report is
packed. Each part is timed in each step; medians are printed, and as a share of the step. Then the
scheduler alone, with few and with many requests that wait: its steps should cost the same.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from understudy.protocol.codec import Envelope, encode
from understudy.protocol.messages import StepOutput
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.kvcache.kv_cache_manager import KVCacheManager
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.scheduling import sequence as scheduling
from understudy.runtime.scheduling.decision import SampledToken
from understudy.runtime.scheduling.scheduler import Scheduler, SchedulerConfig
from understudy.tools.demo.paths import demo_model_directory

BLOCK_SIZE: Final = 16
PROMPT_TOKENS: Final = 128
STEPS: Final = 60
WARM_UP_STEPS: Final = 4
FEW_WAITING: Final = 100
MANY_WAITING: Final = 10_000


class Parts:
    """Times named parts of a step."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def call(*arguments: Any, **named: Any) -> Any:
            begun_at = time.perf_counter()
            result = function(*arguments, **named)
            passed = time.perf_counter() - begun_at
            self._seconds[name] = self._seconds.get(name, 0.0) + passed
            return result

        return call

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call."""
        taken, self._seconds = self._seconds, {}
        return taken


def scheduler_of(num_streams: int, num_blocks: int) -> Scheduler:
    """A scheduler for so many sequences at once."""
    config = SchedulerConfig(
        max_num_seqs=num_streams,
        max_num_batched_tokens=2048,
        max_model_len=1024,
        block_size=BLOCK_SIZE,
    )
    return Scheduler(config, KVCacheManager(num_blocks=num_blocks, block_size=BLOCK_SIZE))


def add_sequences(scheduler: Scheduler, count: int, *, vocab_size: int, temperature: float) -> None:
    """Let so many sequences with prompts of their own wait."""
    for number in range(count):
        prompt = tuple((number * 31 + place * 7) % vocab_size for place in range(PROMPT_TOKENS))
        params = SamplingParams(seed=number, max_tokens=512, temperature=temperature)
        scheduler.add(scheduling.Sequence(Request(number, number, prompt, params), attempt=1))


def measure_steps(chosen: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each part of a decoding step."""
    model = load_model(
        chosen.model,
        dtype=torch.float32,
        device=torch.device("cpu"),
        quantization=chosen.quantization,
    )
    num_blocks = chosen.streams * -(-(PROMPT_TOKENS + STEPS + 80) // BLOCK_SIZE)
    scheduler = scheduler_of(chosen.streams, num_blocks)
    add_sequences(
        scheduler, chosen.streams, vocab_size=model.vocab_size, temperature=chosen.temperature
    )
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    parts = Parts()
    for owner, name, part in (
        (model, "forward", "model: layers"),
        (model, "logits", "model: logits"),
        (runner._sampler, "draw", "draw"),
        (runner, "_batch", "lay out"),
    ):
        setattr(owner, name, parts.timed(part, getattr(owner, name)))
    schedule = parts.timed("schedule", scheduler.schedule)
    execute = parts.timed("execute", runner.execute)
    update = parts.timed("take in", scheduler.update)
    report = parts.timed("report", encode)
    steps: list[dict[str, float]] = []
    while len(steps) < STEPS + WARM_UP_STEPS:
        begun_at = time.perf_counter()
        plan = schedule({})
        assert plan is not None
        rows = update(plan, execute(plan))
        report(Envelope("engine-0", 1, len(steps), 0), StepOutput(len(steps), tuple(rows)))
        taken = parts.take()
        taken["whole step"] = time.perf_counter() - begun_at
        if plan.num_tokens == chosen.streams:
            steps.append(taken)
    measured = steps[WARM_UP_STEPS:]
    return {name: statistics.median(step[name] for step in measured) for name in measured[0]}


def measure_scheduler(num_streams: int, num_waiting: int) -> float:
    """Median seconds that the scheduler takes for a step while so many requests wait."""
    num_blocks = num_streams * 64
    scheduler = scheduler_of(num_streams, num_blocks)
    add_sequences(scheduler, num_streams + num_waiting, vocab_size=1000, temperature=0.0)
    seconds = []
    for _ in range(300):
        begun_at = time.perf_counter()
        plan = scheduler.schedule({})
        assert plan is not None
        draws = {
            each.sequence.request_id: (SampledToken(7),) for each in plan.scheduled if each.samples
        }
        scheduler.update(plan, draws)
        seconds.append(time.perf_counter() - begun_at)
    return statistics.median(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, default=demo_model_directory(), metavar="DIR")
    parser.add_argument("--quantization", choices=("none", "int8", "int4"), default="none")
    parser.add_argument("--streams", type=int, default=32, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T")
    parser.add_argument("--threads", type=int, default=2, metavar="N")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    medians = measure_steps(chosen)
    whole = medians["whole step"]
    for name, seconds in medians.items():
        print(f"{name:<14} {seconds * 1e3:9.3f} ms  {seconds / whole:6.1%}")
    model_s = sum(seconds for name, seconds in medians.items() if name.startswith("model"))
    print(
        f"outside the model {(whole - model_s) * 1e3:.3f} ms, {1 - model_s / whole:.1%} of a step"
    )
    few, many = (measure_scheduler(chosen.streams, n) for n in (FEW_WAITING, MANY_WAITING))
    print(
        f"scheduler, {FEW_WAITING} waiting {few * 1e6:.0f} us,"
        f" {MANY_WAITING} waiting {many * 1e6:.0f} us: {many / few:.2f}"
    )


if __name__ == "__main__":
    main()
