"""The attention kernel against masked softmax attention, and the promise about its bits."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from understudy.runtime.model.kernels.paged_attention import (
    SPLIT_KEYS,
    SplitBuffers,
    Tiles,
    paged_attention,
)
from understudy.runtime.model.kernels.quantisation import NARROW_MAX

BLOCK_SIZE = 16
HEAD_DIM = 32
CPU = torch.device("cpu")


class Context(NamedTuple):
    """Sequences with keys and values of their own in a cache that is otherwise poison."""

    query: Tensor
    keys: Tensor
    values: Tensor
    block_tables: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


def context_of(
    lengths: list[int], *, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype
) -> Context:
    """``query`` has a row for every position of every sequence, ``[sequences, positions, …]``."""
    blocks_each = -(-max(lengths) // BLOCK_SIZE)
    num_slots = len(lengths) * blocks_each * BLOCK_SIZE
    keys = torch.full((num_slots + 1, kv_heads, head_dim), torch.nan)
    values = torch.full_like(keys, torch.inf)
    keys[-1] = values[-1] = 0.0
    generator = torch.Generator().manual_seed(1)
    tables = torch.randperm(len(lengths) * blocks_each, generator=generator)
    tables = tables.view(len(lengths), blocks_each).to(torch.int32)
    query = torch.randn(len(lengths), max(lengths), heads, head_dim, generator=generator)
    for table, length in zip(tables, lengths, strict=True):
        slots = slots_of(table, length)
        for cached in (keys, values):
            cached[slots] = torch.randn(length, kv_heads, head_dim, generator=generator)
    return Context(query.to(dtype), keys.to(dtype), values.to(dtype), tables)


def in_8_bits(context: Context, dtype: torch.dtype) -> tuple[Context, Context]:
    """The same context with a cache of 8 bits, and with the numbers that are left in it."""
    largest = NARROW_MAX[dtype]
    narrow, wide = [], []
    for cached in (context.keys, context.values):
        scales = cached.abs().amax(dim=2, keepdim=True) / largest
        scaled = cached / torch.where(scales == 0, 1.0, scales)
        values = (scaled.round() if dtype == torch.int8 else scaled).nan_to_num().to(dtype)
        narrow += [values, scales.squeeze(2)]
        wide.append(values.float() * scales)
    keys, key_scales, values, value_scales = narrow
    return (
        context._replace(
            keys=keys, values=values, key_scales=key_scales, value_scales=value_scales
        ),
        context._replace(keys=wide[0], values=wide[1]),
    )


def slots_of(table: Tensor, length: int) -> Tensor:
    positions = torch.arange(length)
    return table[positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE


def attend(
    context: Context, shares: list[tuple[int, int, int]], *, tile_rows: int, is_split: bool
) -> list[Tensor]:
    """Attend for shares (sequence, position, tokens); the rows of each."""
    heads, head_dim = context.query.shape[2:]
    group = heads // context.keys.shape[1]
    rows = [context.query[index, start : start + count] for index, start, count in shares]
    starts = [sum(count for *_, count in shares[:at]) for at in range(len(shares))]
    pieces = [
        (at, first)
        for at, (*_, count) in enumerate(shares)
        for first in range(0, count * group, tile_rows)
    ]

    def tensor(numbers: list[int]) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    longest = max(start + count for _, start, count in shares)
    tiles = Tiles(
        tensor([at for at, _ in pieces]),
        tensor([first for _, first in pieces]),
        tensor(starts),
        tensor([count for *_, count in shares]),
        tensor([start for _, start, _ in shares]),
        context.block_tables[[index for index, *_ in shares]],
        tile_rows,
        -(-longest // SPLIT_KEYS) if is_split else 0,
    )
    query = torch.cat(rows)
    output = torch.full_like(query, torch.nan)
    splits = SplitBuffers.empty(
        num_rows=len(query), num_heads=heads, num_splits=tiles.num_splits,
        head_dim=head_dim, device=CPU,
    )  # fmt: skip
    for buffer in splits:
        buffer.fill_(torch.nan)
    paged_attention(
        query, context.keys, context.values, tiles, output, splits,
        block_size=BLOCK_SIZE, scale=head_dim**-0.5,
        key_scales=context.key_scales, value_scales=context.value_scales,
    )  # fmt: skip
    return list(torch.split(output, [count for *_, count in shares]))


def expected(context: Context, index: int, position: int, num_tokens: int) -> Tensor:
    slots = slots_of(context.block_tables[index], position + num_tokens)
    query = context.query[index, position : position + num_tokens].double()
    group = query.shape[1] // context.keys.shape[1]
    keys = context.keys[slots].double().repeat_interleave(group, dim=1)
    values = context.values[slots].double().repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", query, keys) * query.shape[-1] ** -0.5
    hidden = torch.arange(len(slots)) > torch.arange(position, len(slots))[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "is_split"),
    [(4, 2, 32, True), (7, 1, 16, False), (2, 2, 12, True), (4, 1, 64, False)],
)
def test_it_is_masked_softmax_attention(
    heads: int, kv_heads: int, head_dim: int, is_split: bool
) -> None:
    context = context_of(
        [20, 530, 9], heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=torch.float32
    )
    shares = [(0, 0, 20), (1, 529, 1), (2, 3, 5)]
    found = attend(context, shares, tile_rows=64, is_split=is_split)
    for rows, share in zip(found, shares, strict=True):
        torch.testing.assert_close(rows.double(), expected(context, *share), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(("head_dim", "is_split"), [(32, True), (12, False)])
def test_a_cache_of_8_bits_is_read_with_its_scales(
    dtype: torch.dtype, head_dim: int, is_split: bool
) -> None:
    context, wide = in_8_bits(
        context_of([20, 530], heads=4, kv_heads=2, head_dim=head_dim, dtype=torch.float32), dtype
    )
    shares = [(0, 0, 20), (1, 529, 1)]
    found = attend(context, shares, tile_rows=16, is_split=is_split)
    for rows, share in zip(found, shares, strict=True):
        torch.testing.assert_close(rows.double(), expected(wide, *share), atol=2e-5, rtol=2e-5)
    # A row alone, by the other way, has the same bits.
    (alone,) = attend(context, [(0, 19, 1)], tile_rows=16, is_split=not is_split)
    assert torch.equal(alone[0], found[0][19])


def test_it_is_close_in_half_precision() -> None:
    # The interpreter cannot multiply bfloat16.
    context = context_of([200], heads=4, kv_heads=2, head_dim=32, dtype=torch.float16)
    for position, num_tokens in ((199, 1), (130, 20)):
        (rows,) = attend(context, [(0, position, num_tokens)], tile_rows=16, is_split=True)
        torch.testing.assert_close(
            rows.double(), expected(context, 0, position, num_tokens), atol=1e-2, rtol=2e-2
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_rows_bits_depend_on_nothing_but_its_context(dtype: torch.dtype) -> None:
    length = 524
    context = context_of([length, 30], heads=4, kv_heads=1, head_dim=HEAD_DIM, dtype=dtype)
    start = 500
    (whole,) = attend(context, [(0, start, length - start)], tile_rows=16, is_split=False)
    for position in (511, 512):
        for is_split in (True, False):
            (alone,) = attend(context, [(0, position, 1)], tile_rows=16, is_split=is_split)
            assert torch.equal(alone[0], whole[position - start])
    shares = [(1, 11, 19), (0, 509, 7), (1, 29, 1)]
    for is_split in (True, False):
        _, some, _ = attend(context, shares, tile_rows=16, is_split=is_split)
        assert torch.equal(some, whole[9:16])


def test_padding_is_left_alone() -> None:
    context = context_of([20, 20], heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)
    tensor = torch.tensor
    for num_splits in (0, 1):
        tiles = Tiles(
            tensor([0, 1]), tensor([0, 0]), tensor([0, 1]), tensor([1, 0]), tensor([19, 0]),
            context.block_tables, 16, num_splits,
        )  # fmt: skip
        query = context.query[:, 19].contiguous()
        output = torch.full_like(query, 7.0)
        splits = SplitBuffers.empty(num_rows=2, num_heads=4, num_splits=1, head_dim=32, device=CPU)
        paged_attention(
            query, context.keys, context.values, tiles, output, splits,
            block_size=BLOCK_SIZE, scale=32**-0.5,
        )  # fmt: skip
        assert (output[1] == 7.0).all()
        torch.testing.assert_close(
            output[0].double(), expected(context, 0, 19, 1)[0], atol=2e-5, rtol=2e-5
        )
