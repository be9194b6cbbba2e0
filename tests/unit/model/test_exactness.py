"""The promise of exact numerics: a row's bits do not depend on how it came to be computed.

The oracle is a sequence computed whole and alone. Whatever chunks, batches and preemptions another
run draws, every key, every value and every hidden state must equal the oracle's in all bits. All
rows are compared: a first row alone looks invariant when the others are not.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.checkpoints import FAMILIES, write_checkpoint
from tests.unit.model.conftest import CPU, LoadModel
from tests.unit.model.native.kernels import needs_native
from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.model.exactness import prove_exactness
from understudy.runtime.model.loader import load_model
from understudy.runtime.model.quantization_config import Quantization
from understudy.runtime.model.runner import ModelRunner
from understudy.runtime.model.transformer import Transformer
from understudy.runtime.scheduling.decision import ScheduledSequence, StepPlan
from understudy.runtime.scheduling.sequence import Sequence

BLOCK_SIZE = 8
LENGTH_MAX = 600
"""Beyond one chunk of keys."""
NUM_SEQUENCES = 4
BLOCKS_EACH = -(-LENGTH_MAX // BLOCK_SIZE)

EVERY_KIND = [
    pytest.param(family, dtype, native, id=f"{family}-{name}")
    for family in FAMILIES
    for dtype, native, name in (
        (torch.float32, True, "native"),
        (torch.float32, False, "float32"),
        (torch.bfloat16, False, "bfloat16"),
    )
]


def tokens_of(index: int, vocab_size: int) -> list[int]:
    generator = torch.Generator().manual_seed(1000 + index)
    tokens: list[int] = torch.randint(vocab_size, (LENGTH_MAX,), generator=generator).tolist()
    return tokens


class Run:
    """Some sequences, computed share by share; remembers every hidden state."""

    def __init__(self, model: Transformer) -> None:
        self.model = model
        self.runner = ModelRunner(
            model, num_blocks=NUM_SEQUENCES * BLOCKS_EACH, block_size=BLOCK_SIZE
        )
        # Whoever reads a slot that is not its own finds nothing that could pass for a number.
        for layer in self.runner.cache.layers:
            layer.keys[:-1] = torch.nan
            layer.values[:-1] = torch.nan
        self.sequences: dict[int, Sequence] = {}
        self.hidden: dict[int, dict[int, Tensor]] = {}

    def add(self, index: int, length: int, *, seed: int = 0) -> None:
        request = Request(index, index, (0,), SamplingParams(seed=0, max_tokens=1))
        sequence = Sequence(request, attempt=0)
        sequence.token_ids = tokens_of(index, self.model.vocab_size)[:length]
        order = torch.randperm(BLOCKS_EACH, generator=torch.Generator().manual_seed(seed))
        # Blocks of different sequences are interleaved, and in no order.
        sequence.block_table = (order * NUM_SEQUENCES + index).tolist()
        self.sequences[index] = sequence
        self.hidden[index] = {}

    def step(self, shares: list[tuple[int, int]]) -> None:
        """Compute so many next tokens of each of these sequences, in this order."""
        scheduled = []
        for index, num_tokens in shares:
            sequence = self.sequences[index]
            left = sequence.num_tokens - sequence.num_computed_tokens
            if left:
                scheduled.append(ScheduledSequence(sequence, min(num_tokens, left)))
        if not scheduled:
            return
        with torch.inference_mode():
            rows = iter(self.runner.hidden_states(StepPlan(0, tuple(scheduled))))
        for sequence, num_tokens, _ in scheduled:
            start = sequence.num_computed_tokens
            for position in range(start, start + num_tokens):
                self.hidden[sequence.request_id][position] = next(rows)
            sequence.num_computed_tokens += num_tokens

    @property
    def unfinished(self) -> list[int]:
        return [i for i, s in self.sequences.items() if s.num_computed_tokens < s.num_tokens]

    def states(self, index: int) -> Tensor:
        return torch.stack([self.hidden[index][i] for i in sorted(self.hidden[index])])

    def keys_and_values(self, index: int) -> Tensor:
        """``[layers, 2, tokens, kv_heads, head_dim]`` of one sequence."""
        sequence = self.sequences[index]
        positions = torch.arange(sequence.num_tokens)
        table = torch.tensor(sequence.block_table)
        slots = table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        layers = self.runner.cache.layers
        return torch.stack([torch.stack((la.keys[slots], la.values[slots])) for la in layers])


@cache
def oracle(model: Transformer, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """States, keys and values, and logits of a whole sequence, computed at once and alone."""
    run = Run(model)
    run.add(index, LENGTH_MAX)
    run.step([(index, LENGTH_MAX)])
    states = run.states(index)
    with torch.inference_mode():
        logits = torch.cat([model.logits(row[None]) for row in states])
    return states, run.keys_and_values(index), logits


def assert_equals_oracle(run: Run) -> None:
    for index, sequence in run.sequences.items():
        states, keys_and_values, logits = oracle(run.model, index)
        length = sequence.num_tokens
        assert states.isfinite().all()
        mine = run.states(index)
        assert torch.equal(mine, states[:length])
        assert torch.equal(run.keys_and_values(index), keys_and_values[:, :, :length])
        with torch.inference_mode():
            assert torch.equal(run.model.logits(mine), logits[:length])


@pytest.mark.parametrize(("family", "dtype", "native"), EVERY_KIND)
def test_token_by_token_gives_the_bits_of_the_whole(
    model_of: LoadModel, family: str, dtype: torch.dtype, native: bool
) -> None:
    run = Run(model_of(family, dtype, "exact", native=native))
    run.add(0, 80)
    for _ in range(80):
        run.step([(0, 1)])
    assert_equals_oracle(run)


@pytest.mark.parametrize(("family", "dtype", "native"), EVERY_KIND)
def test_a_batch_of_decodes_gives_the_bits_of_each_alone(
    model_of: LoadModel, family: str, dtype: torch.dtype, native: bool
) -> None:
    run = Run(model_of(family, dtype, "exact", native=native))
    for index, length in enumerate((540, 300, 40, 8)):
        run.add(index, length)
        run.step([(index, max(1, length - 30))])
    while run.unfinished:
        run.step([(index, 1) for index in reversed(run.unfinished)])
    assert_equals_oracle(run)


@pytest.mark.parametrize(("family", "dtype", "native"), EVERY_KIND)
def test_recomputing_after_preemption_gives_the_same_bits(
    model_of: LoadModel, family: str, dtype: torch.dtype, native: bool
) -> None:
    run = Run(model_of(family, dtype, "exact", native=native))
    run.add(0, 50)
    run.add(1, 70)
    run.step([(0, 30), (1, 33)])
    run.step([(0, 1), (1, 1)])
    run.add(0, 50, seed=7)  # from the start again, in other blocks
    while run.unfinished:
        run.step([(1, 1), (0, 23)])
    assert_equals_oracle(run)


@pytest.mark.parametrize(("family", "dtype", "native"), EVERY_KIND)
@given(data=st.data())
@settings(max_examples=12)
def test_any_chunks_in_any_batch_give_the_bits_of_the_whole(
    model_of: LoadModel, family: str, dtype: torch.dtype, native: bool, data: st.DataObject
) -> None:
    run = Run(model_of(family, dtype, "exact", native=native))
    num_sequences = data.draw(st.integers(1, NUM_SEQUENCES), label="sequences")
    for index in range(num_sequences):
        length = data.draw(st.integers(1, 130) | st.integers(500, LENGTH_MAX), label="length")
        run.add(index, length, seed=index)
    share = st.integers(1, 5) | st.integers(1, 64) | st.integers(200, LENGTH_MAX)
    while run.unfinished:
        order = data.draw(st.permutations(run.unfinished), label="order")
        run.step([(index, data.draw(share, label="share")) for index in order])
    assert_equals_oracle(run)


def test_fast_numerics_are_close_but_need_not_be_equal(model_of: LoadModel) -> None:
    run = Run(model_of("llama", torch.float32, "fast", native=False))
    run.add(0, 100)
    while run.unfinished:
        run.step([(0, 7)])
    states, _, _ = oracle(model_of("llama", torch.float32, "exact", native=False), 0)
    torch.testing.assert_close(run.states(0), states[:100], atol=1e-3, rtol=1e-3)


@needs_native
@pytest.mark.parametrize("family", ["llama", "wide", "qwen3"])
@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_keys_and_values_of_8_bits_do_not_depend_on_the_batch_either(
    tmp_path: Path, family: str, quantization: Quantization
) -> None:
    directory = write_checkpoint(tmp_path, FAMILIES[family])
    model = load_model(
        directory,
        dtype=torch.float32,
        device=CPU,
        quantization=quantization,
        kv_cache_dtype="int8",
    )
    prove_exactness(model, block_size=BLOCK_SIZE)


@pytest.mark.parametrize("family", FAMILIES)
def test_kernels_compute_what_plain_torch_computes(model_of: LoadModel, family: str) -> None:
    native = oracle(model_of(family, torch.float32, "exact"), 0)
    plain = oracle(model_of(family, torch.float32, "exact", native=False), 0)
    for mine, expected in zip(native, plain, strict=True):
        torch.testing.assert_close(mine, expected, atol=1e-3, rtol=1e-3)
