"""Paged attention against its oracle: masked softmax attention, span by span, head by head."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from understudy.runtime.model.attention import PagedAttention, Span
from understudy.runtime.model.canonical_attention import (
    KEYS_BASE,
    KeyMask,
    Shapes,
    agreeing_shapes,
    canonical_attention,
)
from understudy.runtime.model.config import ModelConfig, SamplingDefaults
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.numerics import ROWS_BASE, Numerics

CPU = torch.device("cpu")
BLOCK_SIZE = 16
BLOCKS_EACH = 80
SPANS_MAX = 4
ZERO_SLOT = SPANS_MAX * BLOCKS_EACH * BLOCK_SIZE


def config_of(num_heads: int, num_kv_heads: int, head_dim: int) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=10,
        hidden_size=8,
        intermediate_size=8,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        rope_scaling=None,
        tie_word_embeddings=False,
        attention_bias=False,
        attention_output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        max_position_embeddings=4096,
        eos_token_ids=(),
        bos_token_id=None,
        sampling=SamplingDefaults(),
        dtype=None,
    )


@dataclass
class Case:
    """A step of a few spans over caches whose unused slots hold what must not be read."""

    config: ModelConfig
    spans: list[Span]
    num_rows: int
    cache: LayerCache
    heads: Tensor

    @classmethod
    def random(
        cls,
        config: ModelConfig,
        shares: list[tuple[int, int]],
        *,
        dtype: torch.dtype = torch.float32,
        padding: int = 3,
    ) -> Case:
        """``shares`` are (position, number of tokens) of each span."""
        generator = torch.Generator().manual_seed(3)
        shape = (ZERO_SLOT + 1, config.num_kv_heads, config.head_dim)
        keys, values = torch.full(shape, torch.nan), torch.full(shape, torch.inf)
        keys[ZERO_SLOT] = values[ZERO_SLOT] = 0.0
        spans: list[Span] = []
        start = 0
        for index, (position, num_tokens) in enumerate(shares):
            order = torch.randperm(BLOCKS_EACH, generator=generator)
            table: list[int] = (order * SPANS_MAX + index).tolist()
            spans.append(Span(start, num_tokens, position, table))
            start += num_tokens
            slots = slots_of(spans[-1])
            size = (len(slots), *shape[1:])
            keys[slots] = torch.randn(size, generator=generator)
            values[slots] = torch.randn(size, generator=generator)
        rows = start + padding
        heads = torch.randn(
            rows, config.num_heads + config.num_kv_heads, config.head_dim, generator=generator
        )
        return cls(config, spans, rows, LayerCache(keys.to(dtype), values.to(dtype)), heads)

    def attend(self, numerics: Numerics) -> Tensor:
        dtype = self.cache.keys.dtype
        attention = PagedAttention(self.config, numerics=numerics, dtype=dtype, device=CPU)
        plan = attention.plan(
            self.spans, num_rows=self.num_rows, block_size=BLOCK_SIZE, zero_slot=ZERO_SLOT
        )
        first = attention.attend(self.heads, self.cache, plan).clone()
        # Another layer with the same plan must not see what this one left behind.
        assert torch.equal(attention.attend(self.heads, self.cache, plan), first)
        return first

    def expected(self) -> Tensor:
        config = self.config
        output = torch.zeros(self.num_rows, config.num_heads, config.head_dim, dtype=torch.float64)
        for span in self.spans:
            slots = slots_of(span)
            positions = torch.arange(span.position, len(slots))
            hidden = torch.arange(len(slots)) > positions[:, None]
            for head in range(config.num_heads):
                cached = (self.cache.keys, self.cache.values)
                keys, values = (each[slots, head // config.group_size].double() for each in cached)
                query = self.heads[span.start : span.start + span.num_tokens, head].double()
                scores = (query @ keys.T / math.sqrt(config.head_dim)).masked_fill(
                    hidden, -math.inf
                )
                output[span.start : span.start + span.num_tokens, head] = scores.softmax(1) @ values
        return output.flatten(1)


def slots_of(span: Span) -> list[int]:
    return [
        span.block_table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
        for position in range(span.position + span.num_tokens)
    ]


SHARES = st.lists(
    st.tuples(st.integers(0, 100) | st.integers(400, 1200), st.just(1) | st.integers(1, 80)),
    min_size=1,
    max_size=SPANS_MAX,
)


@given(
    shares=SHARES,
    heads=st.sampled_from([(4, 2, 16), (7, 1, 8), (3, 3, 12), (8, 2, 32)]),
    numerics=st.sampled_from(["exact", "fast"]),
)
@settings(max_examples=40)
def test_every_token_attends_to_its_context_and_nothing_else(
    shares: list[tuple[int, int]], heads: tuple[int, int, int], numerics: Numerics
) -> None:
    case = Case.random(config_of(*heads), shares)
    torch.testing.assert_close(
        case.attend(numerics).double(), case.expected(), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_token_of_more_rows_than_a_block_is_cut(numerics: Numerics) -> None:
    case = Case.random(config_of(100, 1, 8), [(20, 1), (0, 3)])
    torch.testing.assert_close(
        case.attend(numerics).double(), case.expected(), atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_a_cache_in_bfloat16_is_read_as_it_is(numerics: Numerics) -> None:
    case = Case.random(config_of(4, 2, 16), [(30, 1), (700, 20)], dtype=torch.bfloat16)
    torch.testing.assert_close(
        case.attend(numerics).double(), case.expected(), atol=0.03, rtol=0.03
    )


def test_padded_lengths_are_allowed_sizes_and_coarser_for_long_contexts() -> None:
    shapes = Shapes((4, 16), (32, 128, 512), 1)
    assert [shapes.padded_keys(n) for n in (1, 32, 33, 129, 512)] == [32, 32, 128, 512, 512]
    assert shapes.padded_keys(513) == 512 + 128
    assert shapes.padded_keys(4 * 512 + 1) == 5 * 512
    assert shapes.padded_keys(9 * 512 + 1) == 10 * 512
    assert shapes.padded_rows(37) == (16, 16, 16)
    assert shapes.padded_rows(35) == (16, 16, 4)


@pytest.mark.parametrize("head_dim", [8, 20, 64, 128])
def test_shapes_that_are_called_agreeing_give_equal_bits(head_dim: int) -> None:
    shapes = agreeing_shapes(head_dim, CPU)
    assert ROWS_BASE in shapes.rows
    assert KEYS_BASE in shapes.keys
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(5, 64, head_dim, generator=generator)
    length = KEYS_BASE + 30
    keys, values = (torch.randn(5, length, head_dim, generator=generator) for _ in range(2))

    def attend(batch: int, num_rows: int, padded: int) -> Tensor:
        padding = torch.zeros(batch, padded - length, head_dim)
        return canonical_attention(
            query[:batch, :num_rows],
            torch.cat((keys[:batch], padding), dim=1),
            torch.cat((values[:batch], padding), dim=1),
            KeyMask.of(torch.arange(padded)[None, None] < length),
            scale=head_dim**-0.5,
            batch_min=shapes.batch_min,
        )

    expected = attend(5, ROWS_BASE, 2 * KEYS_BASE)
    for batch in (1, 2, 5):
        for num_rows in shapes.rows:
            for size in shapes.keys:
                tried = attend(batch, num_rows, KEYS_BASE + size)
                rows = min(num_rows, ROWS_BASE)
                assert torch.equal(tried[:, :rows], expected[:batch, :rows])


def test_too_small_a_batch_is_padded_and_cut_again() -> None:
    query, keys, values = torch.randn(3, 1, 4, 8)
    mask = KeyMask.of(torch.ones(1, 1, 4, dtype=torch.bool))
    padded = canonical_attention(query, keys, values, mask, scale=1.0, batch_min=3)
    assert padded.shape == query.shape
    plain = canonical_attention(query, keys, values, mask, scale=1.0)
    torch.testing.assert_close(padded, plain)


def test_scores_far_below_the_peak_cost_no_accuracy() -> None:
    query, keys, values = torch.ones(1, 2, 4), torch.ones(1, 3, 4), torch.randn(1, 3, 4)
    keys[0, 1:] *= torch.tensor([[-50.0], [-1e30]])
    mask = KeyMask.of(torch.ones(1, 2, 3, dtype=torch.bool))
    attended = canonical_attention(query, keys, values, mask, scale=1.0)
    assert torch.equal(attended, values[:, :1].expand(1, 2, 4))
