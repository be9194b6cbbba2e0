"""Attention over the paged KV cache: one kernel for prompts, decoding and verification.

Query heads that share a key-value head are rows of one product, as in ``attention``; a *tile* is
some of a sequence's ``tokens · group`` rows. A tile's context is cut into *splits* of a fixed size,
from the first token on::

    context   ├ split 0: 512 keys ┤├ split 1: 512 keys ┤├ split 2: the rest ┤
    each      maximum, sum, weighted values, from nothing, 64 keys after the other
    joined    ((split 0 ∘ split 1) ∘ split 2), always in this order

A few long sequences fill a GPU only if their splits are computed by many programs and joined
by a second kernel; many sequences, or prompts, keep it busy with one program a tile that joins its
splits itself. Both join the same numbers by the same instructions, so the bits of a row depend on
its context alone: not on the batch, not on how its prompt was cut, not on which way was taken.

Keys and values of 8 bits have a scale for each token and head. They are widened to the queries'
dtype, which is exact; scores are multiplied with the keys' scales, and weights with the values'.

Online softmax: Milakov and Gimelshein, arXiv:1805.02867; splits: Dao et al., "Flash-Decoding".
"""

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT_KEYS: Final = 512
"""Keys of a split. Changing it changes bits."""
_TILE_KEYS: Final = 64
_NUM_STAGES: Final = 3
_WIDE_TILE: Final = 64 * 128 * 2
"""From so many bytes of queries on, a tile's sums would not fit in the registers of four warps."""
_LOG2_E: Final = 1.4426950408889634
_JOINED_ROWS: Final = 4
_PARTS_OF_A_PLAN: Final = (
    "tile_sequences",
    "tile_first_rows",
    "starts",
    "num_tokens_of",
    "positions",
)
_DIMS_MIN: Final = 16
"""The least that a matrix instruction multiplies."""


class Tiles(NamedTuple):
    """A step's tiles and the sequences they belong to; all int32, on the device."""

    sequences: Tensor
    """Whose rows each tile has, ``[tiles]``."""
    first_rows: Tensor
    """A tile's first row among its sequence's ``tokens · group``, ``[tiles]``."""
    starts: Tensor
    """Each sequence's first row in the flat batch, ``[sequences]``."""
    num_tokens: Tensor
    """How many rows it has there, ``[sequences]``; a sequence of none is padding."""
    positions: Tensor
    """The position of its first token, ``[sequences]``."""
    block_tables: Tensor
    """``[sequences, blocks]``."""
    rows: int
    """Rows of a tile: 16, 32, 64 or 128."""
    num_splits: int
    """Splits of the longest context if each gets a program of its own; 0 if a program joins."""


class SplitBuffers(NamedTuple):
    """What programs leave for the kernel that joins, float32."""

    values: Tensor
    """``[rows, heads, splits, head_dim]``."""
    peaks: Tensor
    """``[rows, heads, splits]``."""
    sums: Tensor
    """``[rows, heads, splits]``."""

    @classmethod
    def empty(
        cls, *, num_rows: int, num_heads: int, num_splits: int, head_dim: int, device: torch.device
    ) -> "SplitBuffers":
        """Room for so many rows."""
        shape = (num_rows, num_heads, max(num_splits, 1))
        values = torch.empty((*shape, head_dim), dtype=torch.float32, device=device)
        peaks, sums = torch.empty((2, *shape), dtype=torch.float32, device=device)
        return cls(values, peaks, sums)


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tiles,
    output: Tensor,
    splits: SplitBuffers | None,
    *,
    block_size: int,
    scale: float,
    key_scales: Tensor | None = None,
    value_scales: Tensor | None = None,
) -> None:
    """Attend to a cache that holds the step's own keys and values already.

    Args:
        query: ``[rows, heads, head_dim]``, of the cache's dtype unless that has 8 bits.
        keys: One layer's, ``[slots + 1, kv_heads, head_dim]``; the last slot is all zero.
        values: The same.
        tiles: The step's.
        output: ``[rows, heads, head_dim]``; rows of no sequence are left alone.
        splits: Wanted if ``tiles.num_splits``.
        block_size: Slots of a block.
        scale: Multiplies the scores.
        key_scales: Of keys of 8 bits, ``[slots + 1, kv_heads]``, float32.
        value_scales: Of values of 8 bits.
    """
    num_heads, head_dim = query.shape[1:]
    num_kv_heads = keys.shape[1]
    group = num_heads // num_kv_heads
    assert query.stride(2) == query.stride(1) // head_dim == 1, "a token's heads are contiguous"
    partial = splits or SplitBuffers(output, output, output)
    grid = (len(tiles.sequences), num_kv_heads, max(tiles.num_splits, 1))
    _attend_kernel[grid](
        *(query, keys, values),
        keys if key_scales is None else key_scales,
        values if value_scales is None else value_scales,
        output,
        *partial,
        *tiles[:6],
        *(tiles.block_tables.stride(0), query.stride(0)),
        len(keys) - 1,
        scale * _LOG2_E,
        max(tiles.num_splits, 1),
        num_kv_heads=num_kv_heads,
        group=group,
        head_dim=head_dim,
        dims=_padded(head_dim),
        block_size=block_size,
        tile_rows=tiles.rows,
        tile_keys=_TILE_KEYS,
        split_keys=SPLIT_KEYS,
        is_split=tiles.num_splits > 0,
        is_narrow=key_scales is not None,
        num_stages=_num_stages(keys.dtype),
        num_warps=_num_warps(tiles.rows, head_dim, query.dtype),
    )
    if tiles.num_splits:
        _join_kernel[(len(tiles.sequences), num_kv_heads, tiles.rows // _JOINED_ROWS)](
            output,
            *partial,
            *(*tiles[:5], tiles.num_splits),
            num_kv_heads=num_kv_heads,
            group=group,
            head_dim=head_dim,
            dims=_padded(head_dim),
            joined_rows=_JOINED_ROWS,
            split_keys=SPLIT_KEYS,
            num_warps=1,
        )


def _num_warps(tile_rows: int, head_dim: int, dtype: torch.dtype) -> int:
    return 8 if tile_rows * _padded(head_dim) * dtype.itemsize >= _WIDE_TILE else 4


def _num_stages(dtype: torch.dtype) -> int:
    """How many tiles of keys and values are under way: shared memory holds few of float32."""
    return _NUM_STAGES if dtype.itemsize <= 2 else 1


def _padded(head_dim: int) -> int:
    return max(_DIMS_MIN, int(triton.next_power_of_2(head_dim)))


@triton.jit
def _join(
    peak,
    total,
    joined,
    split_peak,
    split_total,
    split_joined,
    rows: tl.constexpr,
    dims: tl.constexpr,
):
    """Take one more split in.

    Multiply-adds are spelled out, so that whoever joins does it by the same instructions, whatever
    the compiler would have fused by itself.
    """
    new_peak = tl.maximum(peak, split_peak)
    safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
    keep = tl.exp2(peak - safe_peak)
    take = tl.exp2(split_peak - safe_peak)
    takes = tl.broadcast_to(take[:, None], [rows, dims])
    total = tl.fma(split_total, take, total * keep)
    joined = tl.fma(split_joined, takes, joined * keep[:, None])
    return new_peak, total, joined


@triton.jit
def _attend_to_split(
    q, keys, values, key_scales, value_scales, table, start, stop, num_keys, seen_until, kv_head,
    zero_slot, scale,
    num_kv_heads: tl.constexpr, head_dim: tl.constexpr, dims: tl.constexpr,
    block_size: tl.constexpr, tile_rows: tl.constexpr, tile_keys: tl.constexpr,
    num_stages: tl.constexpr, is_narrow: tl.constexpr,
):  # fmt: skip
    """A tile's maximum, sum and weighted values over the keys from start to stop."""
    column = tl.arange(0, dims)
    peak = tl.full([tile_rows], float("-inf"), tl.float32)
    total = tl.zeros([tile_rows], tl.float32)
    joined = tl.zeros([tile_rows, dims], tl.float32)
    for offset in tl.range(start, stop, tile_keys, num_stages=num_stages):
        key_positions = offset + tl.arange(0, tile_keys)
        is_key = key_positions < num_keys
        blocks = tl.load(table + key_positions // block_size, mask=is_key, other=0)
        slots = blocks.to(tl.int64) * block_size + key_positions % block_size
        # Beyond the context a block may hold anything; the zero slot is zero for ever.
        slots = tl.where(is_key, slots, zero_slot)
        cached = slots * num_kv_heads + kv_head
        places = cached[:, None] * head_dim + column[None, :]
        if dims == head_dim:
            k = tl.load(keys + places)
            v = tl.load(values + places)
        else:
            k = tl.load(keys + places, mask=(column < head_dim)[None, :], other=0.0)
            v = tl.load(values + places, mask=(column < head_dim)[None, :], other=0.0)
        if is_narrow:
            k, v = k.to(q.dtype), v.to(q.dtype)
            factors = tl.load(key_scales + cached) * scale
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * factors[None, :]
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="tf32x3") * scale
        seen = key_positions[None, :] <= seen_until[:, None]
        scores = tl.where(seen, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        safe_peak = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp2(scores - safe_peak[:, None])
        keep = tl.exp2(peak - safe_peak)
        total = total * keep + tl.sum(weights, 1)
        if is_narrow:
            weights = weights * tl.load(value_scales + cached)[None, :]
        joined = tl.dot(weights.to(v.dtype), v, joined * keep[:, None], input_precision="tf32x3")
        peak = new_peak
    return peak, total, joined


# Steps differ in these, and parts of one tensor in where they begin; none is worth a program of its
# own, compiled while requests wait.
@triton.jit(
    do_not_specialize=["table_stride", "zero_slot", "num_splits"],
    do_not_specialize_on_alignment=[*_PARTS_OF_A_PLAN, "block_tables"],
)
def _attend_kernel(
    query, keys, values, key_scales, value_scales, output,
    split_values, split_peaks, split_sums,
    tile_sequences, tile_first_rows, starts, num_tokens_of, positions, block_tables,
    table_stride, query_stride, zero_slot, scale, num_splits,
    num_kv_heads: tl.constexpr, group: tl.constexpr, head_dim: tl.constexpr, dims: tl.constexpr,
    block_size: tl.constexpr, tile_rows: tl.constexpr, tile_keys: tl.constexpr,
    split_keys: tl.constexpr, is_split: tl.constexpr, num_stages: tl.constexpr,
    is_narrow: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    sequence = tl.load(tile_sequences + tl.program_id(0))
    first_row = tl.load(tile_first_rows + tl.program_id(0))
    num_tokens = tl.load(num_tokens_of + sequence)
    if first_row >= num_tokens * group:
        return
    position = tl.load(positions + sequence)
    last_token = tl.minimum((first_row + tile_rows - 1) // group, num_tokens - 1)
    num_keys = position + last_token + 1
    rows = first_row + tl.arange(0, tile_rows)
    is_row = rows < num_tokens * group
    tokens = rows // group
    heads = kv_head * group + rows % group
    seen_until = position + tl.minimum(tokens, num_tokens - 1)
    flat_rows = (tl.load(starts + sequence) + tokens).to(tl.int64)
    places = flat_rows * (num_kv_heads * group) + heads
    column = tl.arange(0, dims)
    mask = is_row[:, None] & (column < head_dim)[None, :]
    sources = (flat_rows * query_stride + heads * head_dim)[:, None] + column[None, :]
    q = tl.load(query + sources, mask=mask, other=0.0)
    table = block_tables + sequence.to(tl.int64) * table_stride
    if is_split:
        start = tl.program_id(2) * split_keys
        if start >= num_keys:
            return
        peak, total, joined = _attend_to_split(
            q, keys, values, key_scales, value_scales, table,
            start, tl.minimum(start + split_keys, num_keys), num_keys,
            seen_until, kv_head, zero_slot, scale,
            num_kv_heads, head_dim, dims, block_size, tile_rows, tile_keys, num_stages,
            is_narrow,
        )  # fmt: skip
        places = places * num_splits + tl.program_id(2)
        tl.store(split_peaks + places, peak, mask=is_row)
        tl.store(split_sums + places, total, mask=is_row)
        tl.store(split_values + places[:, None] * head_dim + column[None, :], joined, mask=mask)
    else:
        peak = tl.full([tile_rows], float("-inf"), tl.float32)
        total = tl.zeros([tile_rows], tl.float32)
        joined = tl.zeros([tile_rows, dims], tl.float32)
        for start in range(0, num_keys, split_keys):
            split_peak, split_total, split_joined = _attend_to_split(
                q, keys, values, key_scales, value_scales, table,
                start, tl.minimum(start + split_keys, num_keys), num_keys,
                seen_until, kv_head, zero_slot, scale,
                num_kv_heads, head_dim, dims, block_size, tile_rows, tile_keys, num_stages,
                is_narrow,
            )  # fmt: skip
            peak, total, joined = _join(
                peak, total, joined, split_peak, split_total, split_joined, tile_rows, dims
            )
        # A row of padding has no weights.
        attended = joined / tl.where(total > 0.0, total, 1.0)[:, None]
        attended = attended.to(output.dtype.element_ty)
        tl.store(output + places[:, None] * head_dim + column[None, :], attended, mask=mask)


@triton.jit(do_not_specialize=["num_splits"], do_not_specialize_on_alignment=_PARTS_OF_A_PLAN)
def _join_kernel(
    output,
    split_values,
    split_peaks,
    split_sums,
    tile_sequences,
    tile_first_rows,
    starts,
    num_tokens_of,
    positions,
    num_splits,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    head_dim: tl.constexpr,
    dims: tl.constexpr,
    joined_rows: tl.constexpr,
    split_keys: tl.constexpr,
):
    sequence = tl.load(tile_sequences + tl.program_id(0))
    first_row = tl.load(tile_first_rows + tl.program_id(0)) + tl.program_id(2) * joined_rows
    num_rows = tl.load(num_tokens_of + sequence) * group
    if first_row >= num_rows:
        return
    rows = first_row + tl.arange(0, joined_rows)
    is_row = rows < num_rows
    last_row = tl.minimum(first_row + joined_rows, num_rows) - 1
    # Splits behind a row's own position were filled for its neighbours' sake; they add nothing.
    num_keys = tl.load(positions + sequence) + last_row // group + 1
    heads = tl.program_id(1) * group + rows % group
    flat_rows = (tl.load(starts + sequence) + rows // group).to(tl.int64)
    column = tl.arange(0, dims)
    mask = is_row[:, None] & (column < head_dim)[None, :]

    places = flat_rows * (num_kv_heads * group) + heads
    peak = tl.full([joined_rows], float("-inf"), tl.float32)
    total = tl.zeros([joined_rows], tl.float32)
    joined = tl.zeros([joined_rows, dims], tl.float32)
    for split in range((num_keys + split_keys - 1) // split_keys):
        parts = places * num_splits + split
        split_peak = tl.load(split_peaks + parts, mask=is_row, other=float("-inf"))
        split_total = tl.load(split_sums + parts, mask=is_row, other=0.0)
        split_places = parts[:, None] * head_dim + column[None, :]
        split_joined = tl.load(split_values + split_places, mask=mask, other=0.0)
        peak, total, joined = _join(
            peak, total, joined, split_peak, split_total, split_joined, joined_rows, dims
        )
    total = tl.where(total > 0.0, total, 1.0)
    tl.store(
        output + places[:, None] * head_dim + column[None, :],
        (joined / total[:, None]).to(output.dtype.element_ty),
        mask=mask,
    )
