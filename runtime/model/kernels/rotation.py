"""From the fused projection to the cache: norms of heads, rotary embedding, keys and values stored.

One pass over ``[rows, (heads + 2 · kv_heads) · head_dim]``; only queries are written out. In a
cache of 8 bits each key and value, of one token and head, has a scale of its own.
"""

import triton
import triton.language as tl
from torch import Tensor

from understudy.runtime.model.kernels.quantisation import (
    magnitudes,
    narrowed,
    scale_and_factor,
)
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.rope import Rotation

_HEADS_EACH = 8
"""Heads of one program."""


def rotate_and_store(
    heads: Tensor,
    qk_norm: Tensor | None,
    eps: float,
    rotation: Rotation,
    slots: Tensor,
    cache: LayerCache,
) -> Tensor:
    """Rotate queries and keys, store keys and values, return queries.

    Args:
        heads: ``[rows, heads + 2 · kv_heads, head_dim]``: queries, keys, values.
        qk_norm: Weights of norms that come first, ``[heads + kv_heads, head_dim]``.
        eps: Of those norms.
        rotation: ``[rows, 1, head_dim]`` each.
        slots: Where each row is kept, ``[rows]`` or fewer; padding has none or -1.
        cache: The layer's.

    Returns:
        ``[rows, heads, head_dim]``, of the same dtype.
    """
    rows, num_all, head_dim = heads.shape
    num_kv_heads = cache.keys.shape[1]
    num_heads = num_all - 2 * num_kv_heads
    query = heads.new_empty((rows, num_heads, head_dim))
    is_narrow = cache.key_scales is not None
    _rotate_kernel[(rows, triton.cdiv(num_all, _HEADS_EACH))](
        heads,
        heads if qk_norm is None else qk_norm,
        rotation.cosines,
        rotation.sines,
        slots,
        query,
        cache.keys,
        cache.values,
        cache.keys if cache.key_scales is None else cache.key_scales,
        cache.values if cache.value_scales is None else cache.value_scales,
        len(slots),
        eps,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        half=head_dim // 2,
        padded_half=triton.next_power_of_2(head_dim // 2),
        heads_each=_HEADS_EACH,
        has_norm=qk_norm is not None,
        is_narrow=is_narrow,
        num_warps=4,
    )
    return query


@triton.jit(do_not_specialize=["num_slots"], do_not_specialize_on_alignment=["slots"])
def _rotate_kernel(
    heads,
    qk_norm,
    cosines,
    sines,
    slots,
    query,
    keys,
    values,
    key_scales,
    value_scales,
    num_slots,
    eps,
    num_heads: tl.constexpr,
    num_kv_heads: tl.constexpr,
    half: tl.constexpr,
    padded_half: tl.constexpr,
    heads_each: tl.constexpr,
    has_norm: tl.constexpr,
    is_narrow: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * heads_each + tl.arange(0, heads_each)
    column = tl.arange(0, padded_half)
    is_column = (column < half)[None, :]
    is_rotated = (head < num_heads + num_kv_heads)[:, None]
    mask = (head < num_heads + 2 * num_kv_heads)[:, None] & is_column
    places = head[:, None] * (2 * half) + column[None, :]

    source = heads + row * ((num_heads + 2 * num_kv_heads) * 2 * half)
    first = tl.load(source + places, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(source + places + half, mask=mask, other=0.0).to(tl.float32)
    plain_first, plain_second = first, second
    if has_norm:
        # Rounded where the plain functions round: behind the norm, and behind its weight.
        dtype = heads.dtype.element_ty
        mean = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * half)
        factor = tl.rsqrt(mean + eps)[:, None]
        norm_mask = is_rotated & is_column
        first_weight = tl.load(qk_norm + places, mask=norm_mask, other=0.0).to(tl.float32)
        second_weight = tl.load(qk_norm + places + half, mask=norm_mask, other=0.0).to(tl.float32)
        first = ((first * factor).to(dtype).to(tl.float32) * first_weight).to(dtype)
        second = ((second * factor).to(dtype).to(tl.float32) * second_weight).to(dtype)
        first, second = first.to(tl.float32), second.to(tl.float32)
    angles = row * (2 * half) + column
    cosine = tl.load(cosines + angles, mask=column < half, other=0.0)[None, :]
    # The second half has the sign of a rotation; the first one's is its negative.
    sine = tl.load(sines + angles + half, mask=column < half, other=0.0)[None, :]
    turned_first = tl.where(is_rotated, first * cosine - second * sine, plain_first)
    turned_second = tl.where(is_rotated, second * cosine + first * sine, plain_second)

    dtype = query.dtype.element_ty
    target = query + row * (num_heads * 2 * half)
    query_mask = (head < num_heads)[:, None] & is_column
    tl.store(target + places, turned_first.to(dtype), mask=query_mask)
    tl.store(target + places + half, turned_second.to(dtype), mask=query_mask)
    if row < num_slots:
        slot = tl.load(slots + row).to(tl.int64)
        if slot >= 0:
            _store_kept(
                keys, values, key_scales, value_scales, turned_first, turned_second, slot, head,
                column, num_heads, num_kv_heads, half, is_narrow,
            )  # fmt: skip


@triton.jit
def _store_kept(
    keys, values, key_scales, value_scales, first, second, slot, head, column,
    num_heads: tl.constexpr, num_kv_heads: tl.constexpr, half: tl.constexpr,
    is_narrow: tl.constexpr,
):  # fmt: skip
    """Store those of some heads that are keys or values, both halves of each."""
    is_key = (head >= num_heads) & (head < num_heads + num_kv_heads)
    is_value = (head >= num_heads + num_kv_heads) & (head < num_heads + 2 * num_kv_heads)
    kept: tl.constexpr = keys.dtype.element_ty
    place = slot * num_kv_heads + head - num_heads
    if is_narrow:
        largest = tl.maximum(magnitudes(first), magnitudes(second))
        scale, factor = scale_and_factor(tl.max(largest, 1), kept)
        first, second = first * factor[:, None], second * factor[:, None]
        tl.store(key_scales + place, scale, mask=is_key)
        tl.store(value_scales + place - num_kv_heads, scale, mask=is_value)
        first, second = narrowed(first, kept), narrowed(second, kept)
    else:
        first, second = first.to(kept), second.to(kept)
    stored = place[:, None] * (2 * half) + column[None, :]
    is_column = (column < half)[None, :]
    tl.store(keys + stored, first, mask=is_key[:, None] & is_column)
    tl.store(keys + stored + half, second, mask=is_key[:, None] & is_column)
    stored -= num_kv_heads * 2 * half
    tl.store(values + stored, first, mask=is_value[:, None] & is_column)
    tl.store(values + stored + half, second, mask=is_value[:, None] & is_column)
