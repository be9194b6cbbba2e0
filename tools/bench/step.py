"""``understudy bench step``: how long an engine's steps take, without servers.

Loads a model as an engine does and carries out plans of one kind again and again: decode steps of B
sequences with so many tokens in the cache each, and prefill steps of one prompt's first tokens. The
cache is left empty (zeros), whose attention takes as long as any other.

The command line never loads torch, so ``run`` starts this module as a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from understudy.tools.bench import flags

if TYPE_CHECKING:
    from understudy.actors.loading import Loaded
    from understudy.runtime.scheduling.decision import StepPlan

BATCH_MAX: Final = 4_096
TOKENS_MAX: Final = 1_000_000
REPEATS_MAX: Final = 10_000
WARM_UP_STEPS: Final = 2
_SETTINGS: Final = {
    "model": "directory of the model; default: the bundled one",
    "dtype": "format of weights",
    "quantization": "none, int8 or int4",
    "numerics": "exact or fast",
    "device": "auto, cpu or cuda",
    "threads": "default: all cores",
    "kv_cache_memory": "KV cache, as 2GiB",
}
_EXIT_FAILED: Final = 1
_EXIT_USAGE: Final = 2


class StepTime(NamedTuple):
    """What repeating one step showed. ``None`` where the KV cache is too small for it."""

    num_sequences: int
    num_tokens_each: int
    """Computed in the step, by each sequence."""
    context: int
    """Tokens in the cache before the step, of each sequence."""
    median_s: float | None
    min_s: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``understudy bench step``."""
    parser.description = "Measure an engine's steps, in one process."
    for name, words in _SETTINGS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, metavar="X", help=words)
    parser.add_argument(
        "--batch-sizes",
        type=flags.several(flags.count(BATCH_MAX)),
        default=(1, 8, 32),
        metavar="N,N,...",
        help="sequences of a decode step (default: 1,8,32)",
    )
    parser.add_argument(
        "--contexts",
        type=flags.several(flags.count(TOKENS_MAX)),
        default=(128, 512),
        metavar="N,N,...",
        help="tokens that each has in the cache (default: 128,512)",
    )
    parser.add_argument(
        "--chunks",
        type=flags.several(flags.count(TOKENS_MAX)),
        default=(128, 512),
        metavar="N,N,...",
        help="tokens of a prefill step (default: 128,512)",
    )
    parser.add_argument(
        "--repeats", type=flags.count(REPEATS_MAX), default=10, metavar="N", help="default: 10"
    )
    flags.add_json(parser)


def child_flags(arguments: argparse.Namespace) -> list[str]:
    """The flags that give these arguments again."""
    words: list[str] = []
    for name in (*_SETTINGS, "batch_sizes", "contexts", "chunks", "repeats", "json"):
        value = getattr(arguments, name)
        if value is not None:
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"--{name.replace('_', '-')}={text}")
    return words


def run(arguments: argparse.Namespace) -> int:
    """Measure in a process of its own: 0, 1 if that failed, 2 on usage, 78 on configuration."""
    problem = flags.json_problem(arguments.json)
    if problem is not None:
        sys.stderr.write(f"understudy bench step: {problem}\n")
        return _EXIT_USAGE
    command = [sys.executable, "-m", "understudy.tools.bench.step", *child_flags(arguments)]
    return subprocess.run(command, check=False).returncode


def measure_step(loaded: Loaded, plan: StepPlan, *, repeats: int) -> list[float]:
    """Seconds of each repetition of one plan, the first few left out."""
    times_s: list[float] = []
    for _ in range(WARM_UP_STEPS + repeats):
        began_s = time.perf_counter()
        loaded.runner.execute(plan)
        times_s.append(time.perf_counter() - began_s)
    return times_s[WARM_UP_STEPS:]


def make_plan(
    *, num_sequences: int, num_tokens_each: int, context: int, block_size: int, vocab_size: int
) -> StepPlan:
    """A step of equal sequences, each in blocks of its own, and greedy."""
    from understudy.protocol.request import Request, SamplingParams
    from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
    from understudy.runtime.scheduling.sequence import Sequence as EngineSequence

    num_tokens = context + num_tokens_each
    blocks_each = -(-num_tokens // block_size)
    params = SamplingParams(seed=0, max_tokens=1, temperature=0.0)
    scheduled: list[ScheduledSequence] = []
    for number in range(num_sequences):
        prompt = tuple((31 * number + 7 * place) % vocab_size for place in range(num_tokens))
        sequence = EngineSequence(Request(number, number, prompt, params), attempt=1)
        sequence.num_computed_tokens = context
        first = number * blocks_each
        sequence.block_table = list(range(first, first + blocks_each))
        scheduled.append(ScheduledSequence(sequence, num_tokens_each))
    return StepPlan(0, tuple(scheduled))


def measure_all(arguments: argparse.Namespace) -> dict[str, Any]:
    """Load the model, and measure every step that the flags name.

    Raises:
        ConfigurationError: the model cannot be loaded as the flags say.
    """
    import torch

    from understudy.actors.loading import load_runner
    from understudy.runtime.config import engine_config
    from understudy.runtime.kit.clock import MonotonicClock
    from understudy.runtime.log import configure_logging
    from understudy.runtime.model.config import ModelConfig
    from understudy.tools.bench.limits import measure_limits, num_weights, weight_bytes
    from understudy.tools.configuration import settle_with_model

    given = {name: getattr(arguments, name) for name in _SETTINGS}
    settings = settle_with_model({name: text for name, text in given.items() if text is not None})
    config = engine_config(settings, name="engine-0")
    configure_logging("step")
    began_s = time.perf_counter()
    loaded = load_runner(config, MonotonicClock())
    load_s = time.perf_counter() - began_s
    model_config = ModelConfig.from_directory(config.model)

    def measure(num_sequences: int, num_tokens_each: int, context: int) -> StepTime:
        shape = (num_sequences, num_tokens_each, context)
        blocks_each = -(-(context + num_tokens_each) // config.block_size)
        too_long = context + num_tokens_each > loaded.max_model_len
        if too_long or num_sequences * blocks_each > loaded.num_blocks:
            return StepTime(*shape, None, None)
        plan = make_plan(
            num_sequences=num_sequences,
            num_tokens_each=num_tokens_each,
            context=context,
            block_size=config.block_size,
            vocab_size=model_config.vocab_size,
        )
        times_s = measure_step(loaded, plan, repeats=arguments.repeats)
        return StepTime(*shape, statistics.median(times_s), min(times_s))

    is_on_gpu = config.device != "cpu" and torch.cuda.is_available()
    decode = [measure(b, 1, c - 1) for b in arguments.batch_sizes for c in arguments.contexts]
    prefill = [measure(1, chunk, 0) for chunk in arguments.chunks]
    return {
        "settings": {
            **{name: getattr(config, name) for name in _SETTINGS},
            "model": config.model.name,
            "repeats": arguments.repeats,
        },
        "load_s": load_s,
        "decode": [taken._asdict() for taken in decode],
        "prefill": [taken._asdict() for taken in prefill],
        "operations_a_prompt_token": 2 * num_weights(model_config)[0],
        "weight_bytes": weight_bytes(config.model, model_config, config.quantization),
        "limits": None if is_on_gpu else measure_limits()._asdict(),
    }


def render(figures: Mapping[str, Any]) -> str:
    """Two tables: milliseconds a decode step, and prompt tokens/s; and the machine beside them."""
    from understudy.tools.bench.report import render_table

    decode: Sequence[Mapping[str, Any]] = figures["decode"]
    contexts = list(dict.fromkeys(taken["context"] + 1 for taken in decode))
    times_s = {
        (taken["num_sequences"], taken["context"] + 1): taken["median_s"] for taken in decode
    }
    rows = [
        (f"{size}", *(_shown(times_s[size, context], 1000) for context in contexts))
        for size in dict.fromkeys(taken["num_sequences"] for taken in decode)
    ]
    tables = [
        "decode, ms a step (median), by sequences and tokens in the cache",
        render_table(("", *(f"{context:,}" for context in contexts)), rows),
    ]
    prefill_rows = []
    for taken in figures["prefill"]:
        size, time_s = taken["num_tokens_each"], taken["median_s"]
        rate = None if time_s is None else size / time_s
        prefill_rows.append((f"{size}", _shown(time_s, 1000), _shown(rate, 1)))
    tables += ["", "prefill", render_table(("tokens", "ms", "tokens/s"), prefill_rows)]
    return "\n".join([*tables, *_beside_limits(figures)])


def _beside_limits(figures: Mapping[str, Any]) -> list[str]:
    """How fast one sequence reads its weights, and how fast prompts multiply with them."""
    limits = figures["limits"]
    if limits is None:
        return []
    reads, multiplies = (
        limits["read_bytes_per_s"],
        [
            f"{limits[f'{kind}_per_s'] / 1e9:,.0f} ({kind.partition('_')[0]})"
            for kind in ("float32_flop", "bfloat16_flop", "int8_op")
        ],
    )
    lines = ["", f"torch on this machine: reads {reads / 1e9:.1f} GB/s,"]
    lines[-1] += f" multiplies {', '.join(multiplies)} G/s"
    alone = [taken["median_s"] for taken in figures["decode"] if taken["num_sequences"] == 1]
    if alone and alone[0] is not None and figures["weight_bytes"] is not None:
        rate = figures["weight_bytes"] / alone[0]
        lines.append(f"one sequence reads weights at {rate / 1e9:.1f} GB/s, {rate / reads:.0%}")
    rates = [t["num_tokens_each"] / t["median_s"] for t in figures["prefill"] if t["median_s"]]
    if rates:
        rate = max(rates) * figures["operations_a_prompt_token"]
        lines.append(f"prompts multiply with weights at {rate / 1e9:,.0f} G/s")
    return lines


def _shown(value: float | None, factor: float) -> str:
    return "-" if value is None else f"{value * factor:,.2f}"


def main() -> int:
    """The child: measure, print, write."""
    from understudy.protocol.errors import ConfigurationError
    from understudy.runtime.exit_status import ExitStatus

    parser = argparse.ArgumentParser(prog="understudy bench step", allow_abbrev=False)
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        figures = measure_all(arguments)
    except ConfigurationError as error:
        for problem in error.problems:
            sys.stderr.write(f"understudy bench step: {problem}\n")
        return ExitStatus.CONFIG
    sys.stdout.write(render(figures) + "\n")
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            sys.stderr.write(f"understudy bench step: --json: {error}\n")
            return _EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
