"""Whole models on the card: against the CPU, in pieces and in company, by graphs and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.tools.demo.paths import demo_model_directory
from understudy.tools.gpu.check import Check, Finding
from understudy.tools.gpu.kernel_checks import error_of, num_different
from understudy.tools.gpu.shapes import QWEN_2_5_05B, QWEN_3_06B, random_model

_BLOCK_SIZE: Final = 16
_CPU: Final = torch.device("cpu")


def random_sequences(
    model: Transformer, count: int, length: int, *, length_step: int = 0
) -> list[Sequence]:
    """Sequences of random tokens with blocks for ``length + count * length_step`` tokens each."""
    generator = torch.Generator().manual_seed(0)
    blocks_each = -(-(length + count * length_step) // _BLOCK_SIZE)
    sequences = []
    for index in range(count):
        size = length + index * length_step
        tokens = torch.randint(model.vocab_size, (size,), generator=generator).tolist()
        params = SamplingParams(seed=index, max_tokens=9, temperature=0.0)
        sequence = Sequence(Request(index, index, tuple(tokens), params), attempt=1)
        sequence.block_table = list(range(index * blocks_each, (index + 1) * blocks_each))
        sequences.append(sequence)
    return sequences


def _prompt_logits(model: Transformer, length: int) -> Tensor:
    runner = ModelRunner(model, num_blocks=-(-length // _BLOCK_SIZE), block_size=_BLOCK_SIZE)
    (sequence,) = random_sequences(model, 1, length)
    hidden = runner.hidden_states(StepPlan(0, (ScheduledSequence(sequence, length),)))
    return model.logits(hidden).cpu()


def check_demo_model(device: torch.device) -> Iterator[Finding]:
    """The bundled model's logits on the card against those on the CPU."""
    directory = demo_model_directory()
    cpu = load_model(directory, dtype=torch.float32, device=_CPU, numerics="exact")
    expected = _prompt_logits(cpu, 600)
    for dtype, limit in ((torch.float32, 1e-3), (torch.bfloat16, 5e-2)):
        model = load_model(directory, dtype=dtype, device=device, numerics="fast")
        yield Finding(f"{dtype} logits", error_of(_prompt_logits(model, 600), expected), limit)


def check_exactness(device: torch.device) -> Iterator[Finding]:
    """The proof that an engine with exact numerics makes at its start."""
    directory = demo_model_directory()
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(directory, dtype=dtype, device=device, numerics="exact")
        holds = True
        try:
            prove_exactness(model, block_size=_BLOCK_SIZE)
        except ConfigurationError as error:
            print(f"    {error}")
            holds = False
        sizes = ",".join(map(str, model.tiles.sizes or ()))
        yield Finding(f"{dtype} rows {sizes}"[:46], 0.0 if holds else 1.0, 0)
    int8 = random_model(replace(QWEN_2_5_05B, num_layers=4), device, is_int8=True)
    wanted = _prompt_logits(int8, 300)
    found = _prompt_logits(int8, 300)
    yield Finding("int8 layers twice", num_different(found, wanted), 0)


def check_graphs(device: torch.device) -> Iterator[Finding]:
    """Steps by graphs against the same steps without."""
    for name, shape in (("Qwen2.5-0.5B", QWEN_2_5_05B), ("Qwen3-0.6B", QWEN_3_06B)):
        for numerics in ("fast", "exact"):
            config = replace(shape, num_layers=2)
            model = random_model(
                config, device, numerics="exact" if numerics == "exact" else "fast"
            )
            for count in (1, 2, 5, 16, 33, 128, 256):
                sequences = random_sequences(model, count, 100, length_step=5)
                num_blocks = sum(len(sequence.block_table) for sequence in sequences)
                runner = ModelRunner(model, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
                found = _decoded(runner, sequences)
                different = num_different(found[0], found[1])
                what = f"{name} {numerics} batch {count}"
                # Where the batch is padded, the library may choose another product.
                is_padded = count in {5, 33} and numerics == "fast"
                error = error_of(found[0], found[1])
                yield Finding(what, error if is_padded else different, 2e-2 if is_padded else 0)


def _decoded(runner: ModelRunner, sequences: list[Sequence]) -> tuple[Tensor, Tensor]:
    """Logits of one step of single tokens, by a graph and without."""
    for sequence in sequences:
        sequence.num_computed_tokens = 0
        share = ScheduledSequence(sequence, sequence.num_tokens - 1)
        runner.hidden_states(StepPlan(0, (share,)))
        sequence.num_computed_tokens = sequence.num_tokens - 1
    step = StepPlan(1, tuple(ScheduledSequence(sequence, 1) for sequence in sequences))
    by_graph = runner.logits(step)
    assert by_graph is not None
    by_graph = by_graph.clone()
    graphs = runner._graphs
    runner._graphs = None
    without = runner.logits(step)
    runner._graphs = graphs
    assert without is not None
    return by_graph, without


ENGINE_CHECKS: Final[dict[str, Check]] = {
    "demo model": check_demo_model,
    "exactness": check_exactness,
    "graphs": check_graphs,
}
