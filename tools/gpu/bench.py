"""Measures decoding, prompts and a whole run on a card, as shares of what the card can do at most.

What a step must at least take follows from two rates that are measured first: weights are read once
or multiplied, whichever takes longer, and then keys and values are read once::

    floor = max(weight bytes / bandwidth, operations / rate of products) + KV bytes / bandwidth

Results are printed and written after each row, so that a run that is cut short has told what it
knew.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kv_cache import kv_block_bytes
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.tools.bench.limits import num_weights
from understudy.tools.gpu.check import EXIT_NO_CARD, EXIT_OK
from understudy.tools.gpu.serving import serve
from understudy.tools.gpu.shapes import (
    LLAMA_3_8B,
    QWEN_2_5_05B,
    QWEN_2_5_7B,
    QWEN_3_06B,
    random_model,
)

_BLOCK_SIZE: Final = 16
_CONTEXT: Final = 1024
_BATCHES: Final = (1, 32, 128, 256)
_PROMPTS: Final = (2048, 8192)
_STEPS: Final = 20
_WARM_UPS: Final = 3
_HEAD_START_CYCLES: Final = 10_000_000
_LIMIT_S: Final = 420.0
_RUN_SEQUENCES: Final = 256
_RUN_TOKENS: Final = (100, 1024)
_RUN_BATCH_TOKENS: Final = 16384


class Card(NamedTuple):
    """What the card does at most, as measured."""

    bytes_per_s: float
    operations_per_s: float


class Form(NamedTuple):
    """In what a model keeps its numbers."""

    weights: Quantization = "none"
    kv_dtype: torch.dtype = torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Of each number."""
        return 2 if self.weights == "none" else 1


_MODELS: Final = (
    ("Qwen2.5-0.5B", QWEN_2_5_05B, Form()),
    ("Llama-3-8B", LLAMA_3_8B, Form()),
    ("Llama-3-8B int8", LLAMA_3_8B, Form("int8")),
    ("Qwen2.5-7B", QWEN_2_5_7B, Form()),
    ("Qwen2.5-7B int8", QWEN_2_5_7B, Form("int8")),
    ("Qwen3-0.6B", QWEN_3_06B, Form()),
    ("Llama-3-8B int8 + keys int8", LLAMA_3_8B, Form("int8", torch.int8)),
    ("Llama-3-8B fp8 + keys fp8", LLAMA_3_8B, Form("fp8", torch.float8_e4m3fn)),
)

Row = dict[str, Any]


class Report:
    """Rows, printed and written as they come."""

    def __init__(self, path: Path | None, limit_s: float) -> None:
        self._path = path
        self._stop = time.monotonic() + limit_s
        self.rows: list[Row] = []

    @property
    def is_over(self) -> bool:
        """Whether there is no time for another row."""
        return time.monotonic() > self._stop

    def add(self, row: Row) -> None:
        """Print and keep a row."""
        self.rows.append(row)
        numbers = {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
        print("  ".join(f"{name}={value}" for name, value in numbers.items()), flush=True)
        if self._path is not None:
            self._path.write_text(json.dumps(self.rows, indent=1), encoding="utf-8")

    def try_to(self, name: str, measure: Callable[[], Row]) -> None:
        """Add what is measured, or why it was not."""
        if self.is_over:
            self.add({"row": name, "skipped": "no time left"})
            return
        try:
            with torch.inference_mode():
                self.add({"row": name} | measure())
        except Exception as error:  # noqa: BLE001 - the other rows tell more
            self.add({"row": name, "error": f"{type(error).__name__}: {error}"[:300]})
        gc.collect()
        torch.cuda.empty_cache()


def main() -> int:
    """Measure everything that there is time for."""
    parser = argparse.ArgumentParser(
        prog="tools/gpu_bench", description="example: python tools/gpu_bench --json bench.json"
    )
    parser.add_argument("--json", type=Path, help="write the rows to this file, after each one")
    parser.add_argument("--limit-s", type=float, default=_LIMIT_S, help="begin no row after this")
    parser.add_argument("--only", default="", help="measure the models whose names contain this")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_bench: torch sees no GPU here; nothing was measured", file=sys.stderr)
        return EXIT_NO_CARD

    device = torch.device("cuda", torch.cuda.current_device())
    report = Report(arguments.json, arguments.limit_s)
    card = _measure_card(device)
    report.add({"row": "card", "name": torch.cuda.get_device_name(device)} | card._asdict())
    for name, config, form in _MODELS:
        if arguments.only in name and not report.is_over:
            _measure_model(report, card, name, config, device, form)
    return EXIT_OK


def _measure_model(
    report: Report, card: Card, name: str, config: ModelConfig, device: torch.device, form: Form
) -> None:
    with torch.inference_mode():
        model = random_model(config, device, quantization=form.weights, kv_dtype=form.kv_dtype)
    for batch in _BATCHES:
        report.try_to(f"{name} decode {batch}", partial(_decode, model, card, batch, form))
    if config.hidden_size == 4096:
        for length in _PROMPTS:
            report.try_to(f"{name} prompt {length}", partial(_prompt, model, card, length, form))
    if config.hidden_size < 2048:
        report.try_to(f"{name} run", partial(_run, model))


def _measure_card(device: torch.device) -> Card:
    source = torch.empty(1 << 30, dtype=torch.int8, device=device).random_()
    target = torch.empty_like(source)
    copied = _median_ms(lambda: target.copy_(source))
    a, b = torch.randn(2, 8192, 8192, device=device, dtype=torch.bfloat16)
    product = _median_ms(lambda: a @ b)
    return Card(2 * source.nbytes / copied * 1e3, 2 * 8192**3 / product * 1e3)


def _median_ms(work: Callable[[], object], repeats: int = _STEPS) -> float:
    """Device time of some work, milliseconds."""
    for _ in range(_WARM_UPS):
        work()
    times: list[float] = []
    for _ in range(repeats):
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        # The host is done before the device begins, and is no part of what is measured.
        torch.cuda._sleep(_HEAD_START_CYCLES)  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def _floor_ms(
    config: ModelConfig, card: Card, form: Form, *, tokens: int, sampled: int, context: int
) -> float:
    """What a step must take: each of ``sampled`` sequences reads ``context`` keys and values."""
    layers, head = num_weights(config)
    weight_bytes = (layers + head) * form.weight_bytes
    # Products of 8 bits have twice the rate.
    operations = (layers * tokens + head * sampled) * form.weight_bytes
    width = config.num_heads * config.head_dim * config.num_layers
    if tokens > sampled:
        operations += 2 * width * tokens * (tokens + 1)
    kv_bytes = kv_block_bytes(config, 1, form.kv_dtype) * context * sampled
    products_s = max(weight_bytes / card.bytes_per_s, operations / card.operations_per_s)
    return 1e3 * (products_s + kv_bytes / card.bytes_per_s)


def _sequences(model: Transformer, count: int, length: int) -> list[Sequence]:
    blocks_each = -(-length // _BLOCK_SIZE)
    order = list(range(count * blocks_each))
    random.Random(0).shuffle(order)  # noqa: S311 - blocks lie anywhere, as after a while
    sequences = []
    for index in range(count):
        tokens = tuple((7919 * index + 31 * i) % model.vocab_size for i in range(length))
        params = SamplingParams(seed=index, max_tokens=9, temperature=0.0)
        sequence = Sequence(Request(index, index, tokens, params), attempt=1)
        sequence.block_table = order[index * blocks_each : (index + 1) * blocks_each]
        sequences.append(sequence)
    return sequences


def _decode(model: Transformer, card: Card, batch: int, form: Form) -> Row:
    num_blocks = batch * -(-_CONTEXT // _BLOCK_SIZE)
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    sequences = _sequences(model, batch, _CONTEXT)
    for sequence in sequences:
        sequence.num_computed_tokens = _CONTEXT - 1
    plan = StepPlan(0, tuple(ScheduledSequence(sequence, 1) for sequence in sequences))
    begin = time.monotonic()
    runner.execute(plan)
    first_s = time.monotonic() - begin
    (graph,) = runner._graphs._graphs.values() if runner._graphs else (None,)
    device_ms = _median_ms(graph.replay if graph else lambda: runner.logits(plan))
    step_ms = _wall_ms(lambda: runner.execute(plan))
    busy_ms = device_ms + _draw_ms(runner)
    overlapped_ms = _overlapped_ms(runner, sequences)
    floor = _floor_ms(model.config, card, form, tokens=batch, sampled=batch, context=_CONTEXT)
    return {
        "device_ms": device_ms,
        "step_ms": step_ms,
        "overlapped_ms": overlapped_ms,
        "floor_ms": floor,
        "share_of_floor": floor / device_ms,
        "idle_share": max(0.0, 1 - busy_ms / overlapped_ms),
        "first_s": first_s,
    }


def _wall_ms(step: Callable[[], object]) -> float:
    """Time of a step, with all that the host does for it."""
    for _ in range(_WARM_UPS):
        step()
    begin = time.monotonic()
    for _ in range(_STEPS):
        step()
    return (time.monotonic() - begin) / _STEPS * 1e3


def _draw_ms(runner: ModelRunner) -> float:
    """What the step that was just executed does on the device behind its graph."""
    draws = runner._latest.drawing.draws if runner._latest else None
    if draws is None:
        return 0.0
    device = runner.cache.layers[0].keys.device
    logits = torch.zeros(len(draws), runner._sampler._vocab_size, device=device)
    return _median_ms(lambda: runner._sampler.draw_behind(logits, draws, None))


def _overlapped_ms(runner: ModelRunner, sequences: list[Sequence]) -> float:
    """Time of a step of which each is launched before the last one is waited for.

    The sequences are made shorter, by so much as the steps make them longer.
    """
    for sequence in sequences:
        del sequence.token_ids[-(1 + _WARM_UPS + _STEPS) :]
        sequence.num_computed_tokens = sequence.num_tokens - 1
    plan = StepPlan(0, tuple(ScheduledSequence(sequence, 1) for sequence in sequences))
    under_way = runner.launch(plan)
    ahead = plan._replace(is_ahead=True)

    def step() -> None:
        nonlocal under_way
        following = runner.launch(ahead)
        under_way.collect()
        under_way = following

    step_ms = _wall_ms(step)
    under_way.collect()
    return step_ms


def _prompt(model: Transformer, card: Card, length: int, form: Form) -> Row:
    runner = ModelRunner(model, num_blocks=-(-length // _BLOCK_SIZE), block_size=_BLOCK_SIZE)
    sequences = _sequences(model, 1, length)
    plan = StepPlan(0, (ScheduledSequence(sequences[0], length),))
    device_ms = _median_ms(lambda: runner.logits(plan), repeats=5)
    floor = _floor_ms(model.config, card, form, tokens=length, sampled=1, context=length)
    return {
        "device_ms": device_ms,
        "floor_ms": floor,
        "share_of_floor": floor / device_ms,
        "tokens_per_s": length / device_ms * 1e3,
    }


def _run_requests(vocab_size: int) -> Iterator[Request]:
    """nano-vllm's benchmark: prompts and outputs of 100 to 1024 tokens, drawn evenly."""
    source = random.Random(0)  # noqa: S311 - a workload, no secret
    for index in range(_RUN_SEQUENCES):
        prompt = [
            source.randint(0, 10000) % vocab_size for _ in range(source.randint(*_RUN_TOKENS))
        ]
        params = SamplingParams(
            seed=index, max_tokens=source.randint(*_RUN_TOKENS), temperature=0.6
        )
        yield Request(index, index, tuple(prompt), params)


def _run(model: Transformer) -> Row:
    num_blocks = _RUN_SEQUENCES * -(-2 * _RUN_TOKENS[1] // _BLOCK_SIZE)
    runner = ModelRunner(model, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
    _warm_up(model, runner)
    requests = list(_run_requests(model.vocab_size))
    begin = time.monotonic()
    service = serve(
        runner,
        requests,
        num_blocks=num_blocks,
        max_num_batched_tokens=_RUN_BATCH_TOKENS,
        overlaps=runner.overlaps,
    )
    seconds = time.monotonic() - begin
    return {
        "tokens_per_s": sum(map(len, service.tokens.values())) / seconds,
        "seconds": seconds,
        "steps": service.num_steps,
        "ahead_share": service.num_steps_ahead / service.num_steps,
        "host_share": 1 - service.waited_s / seconds,
    }


def _warm_up(model: Transformer, runner: ModelRunner) -> None:
    """Record all graphs and compile all kernels: a server has done it before it counts."""
    for length in (500, 1000, 2000):
        for batch in (1, 2, 4, 8, 16, 32, 48, 64, 96, 128, 192, 256):
            sequences = _sequences(model, batch, length)
            for sequence in sequences:
                sequence.num_computed_tokens = length - 1
            shares = tuple(ScheduledSequence(sequence, 1) for sequence in sequences)
            runner.execute(StepPlan(0, shares))
    for count, length in ((1, 600), (16, 1000)):
        sequences = _sequences(model, count, length)
        shares = tuple(ScheduledSequence(sequence, length) for sequence in sequences)
        runner.execute(StepPlan(0, shares))
