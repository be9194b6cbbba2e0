"""Whole models on the card: against the CPU, in pieces and in company, by graphs and without."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from understudy.protocol.errors import ConfigurationError
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.quantization_config import KVCacheDtype, Quantization
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence
from understudy.tools.demo.paths import demo_model_directory
from understudy.tools.gpu.check import Check, Finding
from understudy.tools.gpu.kernel_checks import error_of, num_different
from understudy.tools.gpu.serving import serve
from understudy.tools.gpu.shapes import QWEN_2_5_05B, QWEN_3_06B, random_model

_BLOCK_SIZE: Final = 16
_CPU: Final = torch.device("cpu")
_FORMS: Final[tuple[tuple[Quantization, KVCacheDtype, float], ...]] = (
    ("int8", "auto", 0.1),
    ("fp8", "auto", 0.2),
    ("none", "int8", 0.1),
    ("none", "fp8", 0.15),
    ("int8", "int8", 0.15),
)
"""Weights, keys and values, and how far off logits may be."""


class _GraphModel(NamedTuple):
    """A model whose steps by graphs are compared with the same steps without."""

    name: str
    shape: ModelConfig
    numerics: Numerics
    weights: Quantization = "none"
    kv_dtype: torch.dtype | None = None

    def make(self, device: torch.device) -> Transformer:
        """Two layers of it: enough for what is compared, and made in no time."""
        return random_model(
            replace(self.shape, num_layers=2),
            device,
            quantization=self.weights,
            kv_dtype=self.kv_dtype,
            numerics=self.numerics,
        )


_GRAPH_MODELS: Final = (
    _GraphModel("Qwen2.5-0.5B", QWEN_2_5_05B, "fast"),
    _GraphModel("Qwen2.5-0.5B", QWEN_2_5_05B, "exact"),
    _GraphModel("Qwen3-0.6B", QWEN_3_06B, "fast"),
    _GraphModel("Qwen3-0.6B", QWEN_3_06B, "exact"),
    _GraphModel("Qwen2.5-0.5B int8", QWEN_2_5_05B, "exact", "int8", torch.int8),
    _GraphModel("Qwen3-0.6B fp8", QWEN_3_06B, "exact", "fp8", torch.float8_e4m3fn),
)


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
        sizes = ",".join(map(str, model.tiles.sizes or ()))
        yield Finding(f"{dtype} rows {sizes}"[:46], _is_disproved(model), 0)


def check_quantised(device: torch.device) -> Iterator[Finding]:
    """The bundled model in 8 bits: close to itself, and exact in pieces and in company."""
    directory = demo_model_directory()
    dtype = torch.bfloat16
    plain = load_model(directory, dtype=dtype, device=device, numerics="fast")
    expected = _prompt_logits(plain, 600)
    for weights, kept, limit in _FORMS:
        model = load_model(
            directory, dtype=dtype, device=device, quantization=weights, kv_cache_dtype=kept
        )
        what = f"weights {weights}, keys {kept}"
        yield Finding(what, error_of(_prompt_logits(model, 600), expected), limit)
        yield Finding(f"{what}, exact", _is_disproved(model), 0)


def _is_disproved(model: Transformer) -> float:
    try:
        prove_exactness(model, block_size=_BLOCK_SIZE)
    except ConfigurationError as error:
        print(f"    {error}")
        return 1.0
    return 0.0


def check_graphs(device: torch.device) -> Iterator[Finding]:
    """Steps by graphs against the same steps without."""
    for made in _GRAPH_MODELS:
        model, name, numerics = made.make(device), made.name, made.numerics
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


def check_overlap(device: torch.device) -> Iterator[Finding]:
    """Steps that are launched before the last one is over, against the same one after another."""
    for made in _GRAPH_MODELS:
        if made.numerics == "exact":
            yield compare_overlap(f"{made.name} overlap", made.make(device))


def compare_overlap(what: str, model: Transformer, count: int = 40) -> Finding:
    """Requests that end at different times, by either way: how many tokens are not the same."""
    generator = torch.Generator().manual_seed(1)
    requests = [
        Request(
            index,
            index,
            tuple(torch.randint(model.vocab_size, (1 + 7 * index,), generator=generator).tolist()),
            SamplingParams(
                seed=index,
                max_tokens=20 + 3 * index,
                temperature=index % 3 / 2,
                top_p=(1.0, 0.9)[index % 2],
                # A tenth of all tokens: some end where nobody could know it.
                stop_token_ids=tuple(range(0, model.vocab_size, 10)) if index % 4 == 0 else (),
            ),
        )
        for index in range(count)
    ]
    num_blocks = count * -(-(11 * count + 20) // _BLOCK_SIZE)
    answers = []
    for overlaps in (False, True):
        runner = ModelRunner(model, num_blocks=num_blocks, block_size=_BLOCK_SIZE)
        service = serve(
            runner,
            requests,
            num_blocks=num_blocks,
            max_num_batched_tokens=2048,
            overlaps=overlaps,
        )
        answers.append(service.tokens)
        if overlaps and not service.num_steps_ahead:
            return Finding(f"{what}: no step overlapped", float("inf"), 0)
    different = sum(answers[0][number] != answers[1][number] for number in answers[0])
    return Finding(what, different, 0)


ENGINE_CHECKS: Final[dict[str, Check]] = {
    "demo model": check_demo_model,
    "exactness": check_exactness,
    "quantised": check_quantised,
    "graphs": check_graphs,
    "overlap": check_overlap,
}
