"""Each kernel against a reference in higher precision, and its bits against themselves."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that every torch program uses
from torch import Tensor

from understudy.protocol.request import SamplingParams
from understudy.runtime.model.attention import Span
from understudy.runtime.model.config import ModelConfig
from understudy.runtime.model.kernels.activation import (
    silu_and_multiply,
    silu_and_multiply_quantised,
)
from understudy.runtime.model.kernels.attention import TritonAttention
from understudy.runtime.model.kernels.fp8_product import fp8_linear
from understudy.runtime.model.kernels.int8_product import int8_linear
from understudy.runtime.model.kernels.normalisation import add_rms_norm
from understudy.runtime.model.kernels.operations import TritonOperations
from understudy.runtime.model.kernels.quantisation import QuantisedRows, quantise_rows
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.layers import silu_and_multiply as plain_silu_and_multiply
from understudy.runtime.model.numerics import Numerics
from understudy.runtime.model.operations import PlainOperations
from understudy.runtime.model.rope import RotaryEmbedding
from understudy.runtime.model.sampler import Sampler, SamplingRow
from understudy.tools.gpu.check import Check, Finding
from understudy.tools.gpu.shapes import SHAPES

_BF16_ERROR: Final = 1e-2
_BLOCK_SIZE: Final = 16
_BLOCKS_EACH: Final = 320
_ROW_COUNTS: Final = (1, 7, 16, 33, 64, 100, 256, 1000)
_NARROW: Final = {torch.int8: 3e-2, torch.float8_e4m3fn: 4e-2}
"""8-bit dtypes, and how far off numbers may be that are rounded to them."""
_PRODUCTS: Final = {
    torch.int8: (int8_linear, 1e-6),
    # Within a step a GPU adds up products of fp8 with 14 bits or so.
    torch.float8_e4m3fn: (fp8_linear, 1e-3),
}


def error_of(found: Tensor, expected: Tensor) -> float:
    """``‖found - expected‖ / ‖expected‖``."""
    found, expected = found.double(), expected.double()
    return float((found - expected).norm() / expected.norm())


def num_different(found: Tensor, expected: Tensor) -> float:
    """How many numbers are not the same; NaN is the same as nothing."""
    return float((found != expected).sum())


def _random(*shape: int, device: torch.device, seed: int = 0) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(*shape, generator=generator, device=device).to(torch.bfloat16)


def _narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """What torch makes of numbers in the range of an 8-bit dtype."""
    return (x.round() if dtype == torch.int8 else x.to(dtype)).float()


def _narrow_cache(
    keys: Tensor, values: Tensor, dtype: torch.dtype
) -> tuple[LayerCache, LayerCache]:
    """A cache of 8 bits, and the numbers that are left in it."""
    parts = [quantise_rows(cached.flatten(0, 1), dtype) for cached in (keys, values)]
    narrow = [part.values.view(keys.shape) for part in parts]
    scales = [part.scales.view(keys.shape[:2]) for part in parts]
    wide = [(part.values.float() * part.scales[:, None]).view(keys.shape) for part in parts]
    return LayerCache(*narrow, *scales), LayerCache(*wide)


class _Contexts:
    """Some sequences' keys and values, in a cache whose other slots are poison."""

    def __init__(
        self,
        config: ModelConfig,
        count: int,
        device: torch.device,
        narrow: torch.dtype | None = None,
    ) -> None:
        """``narrow``: keys and values are kept in this dtype of 8 bits."""
        self.config = config
        self.num_blocks = count * _BLOCKS_EACH
        shape = (self.num_blocks * _BLOCK_SIZE + 1, config.num_kv_heads, config.head_dim)
        keys, values = _random(*shape, device=device), _random(*shape, device=device, seed=1)
        keys[-1] = values[-1] = 0.0
        self._plain = self.cache = LayerCache(keys, values)
        if narrow is not None:
            self.cache, self._plain = _narrow_cache(keys, values, narrow)
        order = torch.randperm(self.num_blocks, generator=torch.Generator().manual_seed(2))
        self.tables: list[list[int]] = order.view(count, _BLOCKS_EACH).tolist()
        self.query = _random(count, 512, config.num_heads, config.head_dim, device=device, seed=3)

    def attend(
        self, attention: TritonAttention, shares: Sequence[tuple[int, int, int]]
    ) -> list[Tensor]:
        """The rows of each share (sequence, position, tokens); a query depends on its position."""
        spans: list[Span] = []
        rows: list[Tensor] = []
        for index, position, count in shares:
            start = spans[-1].start + spans[-1].num_tokens if spans else 0
            spans.append(Span(start, count, position, self.tables[index]))
            places = torch.arange(position, position + count, device=self.query.device) % 512
            rows.append(self.query[index, places])
        plan = attention.plan(
            spans, num_rows=spans[-1].start + spans[-1].num_tokens, block_size=_BLOCK_SIZE,
            zero_slot=self.num_blocks * _BLOCK_SIZE,
        )  # fmt: skip
        plan.output.fill_(torch.nan)
        attended = attention.attend(torch.cat(rows), self.cache, plan).clone()
        return list(torch.split(attended, [count for *_, count in shares]))

    def expected(self, index: int, position: int, count: int) -> Tensor:
        """Masked softmax attention in double precision."""
        device = self.query.device
        positions = torch.arange(position + count, device=device)
        table = torch.tensor(self.tables[index], device=device)
        slots = table[positions // _BLOCK_SIZE] * _BLOCK_SIZE + positions % _BLOCK_SIZE
        group = self.config.group_size
        cached = (self._plain.keys, self._plain.values)
        keys, values = (each[slots].double().repeat_interleave(group, dim=1) for each in cached)
        query = self.query[index, positions[position:] % 512].double()
        scores = torch.einsum("qhd,khd->hqk", query, keys) * self.config.head_dim**-0.5
        scores.masked_fill_(positions > positions[position:, None], -torch.inf)
        return torch.einsum("hqk,khd->qhd", scores.softmax(-1), values).flatten(1)


def _attention(config: ModelConfig, device: torch.device) -> TritonAttention:
    return TritonAttention(config, numerics="exact", dtype=torch.bfloat16, device=device)


def check_attention(device: torch.device) -> Iterator[Finding]:
    """Decoding, prompts, chunks and verification, alone and together."""
    shares = {
        "decode": [(0, 0, 1), (1, 76, 1), (2, 511, 1), (3, 512, 1), (4, 4100, 1)],
        "prompt": [(0, 0, 300), (1, 0, 17)],
        "chunk": [(0, 700, 260)],
        "verify": [(0, 1020, 5), (1, 30, 3)],
        "mixed": [(0, 0, 129), (1, 1000, 1), (2, 509, 8)],
    }
    forms: tuple[tuple[Numerics, torch.dtype | None], ...] = (
        ("exact", None), ("fast", None), ("exact", torch.int8), ("exact", torch.float8_e4m3fn),
    )  # fmt: skip
    for name, config in SHAPES.items():
        for numerics, narrow in forms:
            contexts = _Contexts(config, 5, device, narrow)
            attention = TritonAttention(
                config, numerics=numerics, dtype=torch.bfloat16, device=device
            )
            for kind, each in shares.items():
                found = torch.cat(contexts.attend(attention, each))
                expected = torch.cat([contexts.expected(*share) for share in each])
                what = f"{name} {kind} {numerics} {narrow or ''}".replace("torch.", "")
                yield Finding(what, error_of(found, expected), _BF16_ERROR)


def check_attention_bits(device: torch.device) -> Iterator[Finding]:
    """A row alone, in a chunk, in a large batch and twice."""
    forms = itertools.product(SHAPES.items(), (None, *_NARROW))
    for (shape, config), narrow in forms:
        name = f"{shape} {narrow or ''}".replace("torch.", "").strip()
        contexts = _Contexts(config, 80, device, narrow)
        attention = _attention(config, device)
        (whole,) = contexts.attend(attention, [(0, 450, 140)])
        again = contexts.attend(attention, [(0, 450, 140)])[0]
        yield Finding(f"{name} twice", num_different(again, whole), 0)
        alone = [contexts.attend(attention, [(0, 450 + i, 1)])[0] for i in range(140)]
        yield Finding(f"{name} token by token", num_different(torch.cat(alone), whole), 0)
        chunks = [contexts.attend(attention, [(0, 450 + i, 28)])[0] for i in range(0, 140, 28)]
        yield Finding(f"{name} chunks of 28", num_different(torch.cat(chunks), whole), 0)
        for size in (2, 40, 80):
            others = [(index, 37 * index % 4000, 1) for index in range(1, size)]
            batched = contexts.attend(attention, [*others, (0, 560, 1)])[-1]
            yield Finding(f"{name} among {size}", num_different(batched, whole[110:111]), 0)


def check_norms(device: torch.device) -> Iterator[Finding]:
    """Addition and norm, with and without quantisation."""
    for name, config in SHAPES.items():
        width = config.hidden_size
        hidden, delta = (_random(100, width, device=device, seed=seed) for seed in (0, 1))
        weight = _random(width, device=device, seed=2)
        found = add_rms_norm(hidden, delta, weight, config.rms_norm_eps)
        yield Finding(f"{name} sum", num_different(found.hidden, hidden + delta), 0)
        summed = (hidden + delta).double()
        expected = F.rms_norm(summed, (width,), weight.double(), config.rms_norm_eps)
        yield Finding(f"{name} norm", error_of(found.normed, expected), _BF16_ERROR)
        few = add_rms_norm(hidden[:3].clone(), delta[:3].clone(), weight, config.rms_norm_eps)
        yield Finding(f"{name} bits", num_different(few.normed, found.normed[:3]), 0)
        for dtype, limit in _NARROW.items():
            quantised = add_rms_norm(hidden, delta, weight, config.rms_norm_eps, quantised=dtype)
            assert quantised.scales is not None
            restored = quantised.normed.float() * quantised.scales[:, None]
            yield Finding(f"{name} {dtype}", error_of(restored, expected), limit)


def check_activation(device: torch.device) -> Iterator[Finding]:
    """The gated activation, with and without quantisation."""
    for name, config in SHAPES.items():
        x = _random(70, 2 * config.intermediate_size, device=device) * 3
        found, expected = silu_and_multiply(x), plain_silu_and_multiply(x.double())
        yield Finding(name, error_of(found, expected), _BF16_ERROR)
        for dtype, limit in _NARROW.items():
            quantised = silu_and_multiply_quantised(x, dtype)
            restored = quantised.values.float() * quantised.scales[:, None]
            yield Finding(f"{name} {dtype}", error_of(restored, expected), limit)
            apart = quantise_rows(found, dtype)
            different = num_different(quantised.values.float(), apart.values.float())
            yield Finding(f"{name} {dtype} fused", different, 0)
            plain = found.float() / apart.scales[:, None]
            wrong = num_different(apart.values.float(), _narrowed(plain, dtype))
            # Of a quotient on the border between two numbers, either is right.
            yield Finding(f"{name} {dtype} rounding", wrong / plain.numel(), 5e-3)


def check_rotation(device: torch.device) -> Iterator[Finding]:
    """Norms of heads, rotary embedding, keys and values into the cache."""
    for name, config in SHAPES.items():
        rows, num_slots = 50, 400
        num_all = config.num_heads + 2 * config.num_kv_heads
        heads = _random(rows, num_all, config.head_dim, device=device)
        num_normed = config.num_heads + config.num_kv_heads
        qk_norm = _random(num_normed, config.head_dim, device=device, seed=1)
        norms = qk_norm if config.qk_norm else None
        positions = torch.arange(rows, device=device) * 31
        rotation = RotaryEmbedding(config, device)(positions)
        slots = torch.randperm(num_slots, device=device)[: rows - 3]
        shape = (num_slots + 1, config.num_kv_heads, config.head_dim)
        caches = [
            LayerCache(*torch.zeros(2, *shape, dtype=torch.bfloat16, device=device))
            for _ in range(2)
        ]
        plain = PlainOperations(config).rotate_and_store(heads, norms, rotation, slots, caches[0])
        query = TritonOperations(config).rotate_and_store(heads, norms, rotation, slots, caches[1])
        yield Finding(f"{name} queries", error_of(query, plain[:, : config.num_heads]), _BF16_ERROR)
        yield Finding(f"{name} keys", error_of(caches[1].keys, caches[0].keys), _BF16_ERROR)
        yield Finding(f"{name} values", num_different(caches[1].values, caches[0].values), 0)
        for dtype, limit in _NARROW.items():
            narrow = LayerCache(
                *(torch.zeros(shape, dtype=torch.int8, device=device).view(dtype) for _ in "kv"),
                *(torch.zeros(shape[:2], device=device) for _ in "kv"),
            )
            TritonOperations(config).rotate_and_store(heads, norms, rotation, slots, narrow)
            assert narrow.key_scales is not None
            assert narrow.value_scales is not None
            keys = narrow.keys.float() * narrow.key_scales[:, :, None]
            values = narrow.values.float() * narrow.value_scales[:, :, None]
            yield Finding(f"{name} keys {dtype}", error_of(keys, caches[0].keys), limit)
            yield Finding(f"{name} values {dtype}", error_of(values, caches[0].values), limit)


def check_products(device: torch.device) -> Iterator[Finding]:
    """Products of 8 bits against float64: one row's bits, whatever the number of rows."""
    for dtype, (product, limit) in _PRODUCTS.items():
        for name, config in SHAPES.items():
            hidden, inner = config.hidden_size, config.intermediate_size
            heads = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
            for columns, depth in ((heads, hidden), (2 * inner, hidden), (hidden, inner)):
                weight = quantise_rows(_random(columns, depth, device=device), dtype)
                bias = _random(columns, device=device, seed=1)
                x = quantise_rows(_random(_ROW_COUNTS[-1], depth, device=device, seed=2), dtype)
                sums = x.values.double() @ weight.values.double().t()
                exact = sums * x.scales[:, None].double() * weight.scales.double() + bias.double()
                whole = product(x, *weight, bias, torch.float32)
                what = f"{name} {depth} to {columns} {dtype}".replace("torch.", "")
                yield Finding(what, error_of(whole, exact), limit)
                different = 0.0
                for count in _ROW_COUNTS:
                    for _ in range(3):
                        some = QuantisedRows(x.values[:count], x.scales[:count])
                        found = product(some, *weight, bias, torch.float32)
                        different += num_different(found, whole[:count])
                yield Finding(f"{what} bits", different, 0)


def check_sampling(device: torch.device) -> Iterator[Finding]:
    """The kernels' tokens against the plain sampler's on the same device."""
    for vocab_size in (4096, 151936):
        logits = _random(64, vocab_size, device=device).float() * 3
        kinds = (
            SamplingParams(0, 9, temperature=0.0),
            SamplingParams(1, 9, temperature=0.7),
            SamplingParams(2, 9, top_k=40),
            SamplingParams(3, 9, top_p=0.9),
            SamplingParams(4, 9, top_p=0.95, top_k=50, temperature=1.5),
            SamplingParams(5, 9, min_p=0.05),
        )
        rows = [SamplingRow(kinds[i % len(kinds)], list(range(i + 2)), 1) for i in range(64)]
        tokens = []
        for has_kernels in (True, False):
            sampler = Sampler(vocab_size, device)
            sampler._has_kernels = has_kernels
            sampled = sampler.sample(logits.clone(), rows)
            tokens.append(torch.tensor([each.token_id for each in sampled]))
        yield Finding(f"{vocab_size} tokens", num_different(*tokens), 0)


KERNEL_CHECKS: Final[dict[str, Check]] = {
    "attention": check_attention,
    "attention bits": check_attention_bits,
    "norms": check_norms,
    "activation": check_activation,
    "rotation": check_rotation,
    "products": check_products,
    "sampling": check_sampling,
}
