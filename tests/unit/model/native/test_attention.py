"""The attention kernel against the oracle of plain attention, and against itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.unit.model.native.kernels import compiled, needs_native
from tests.unit.model.test_attention import BLOCK_SIZE, ZERO_SLOT, Case, config_of
from understudy.runtime.model.attention import Span
from understudy.runtime.model.kv_cache import LayerCache
from understudy.runtime.model.native.attention import NativeAttention

pytestmark = needs_native

HEADS = [(4, 4, 16), (14, 2, 64), (8, 1, 80), (6, 2, 128), (64, 1, 16), (3, 1, 256)]
SHARES = st.tuples(
    st.integers(0, 20) | st.integers(100, 140) | st.integers(500, 900),
    st.integers(1, 3) | st.integers(1, 200),
)


def attend(case: Case, spans: list[Span] | None = None) -> Tensor:
    library = compiled()
    assert library is not None
    attention = NativeAttention(library, case.config)
    # The kernel takes what the projection gives: queries, keys and values side by side.
    heads = torch.cat((case.heads, torch.full_like(case.heads, torch.nan)), dim=1)
    heads = heads[:, : case.config.num_heads + 2 * case.config.num_kv_heads].contiguous()
    plan = attention.plan(
        spans or case.spans, num_rows=case.num_rows, block_size=BLOCK_SIZE, zero_slot=ZERO_SLOT
    )
    return attention.attend(heads, case.cache, plan)


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize(
    "shares",
    [[(0, 1)], [(0, 300)], [(127, 1), (128, 1), (129, 2)], [(700, 1), (0, 40), (500, 130)]],
    ids=str,
)
def test_attention_is_that_of_the_oracle(
    heads: tuple[int, int, int], shares: list[tuple[int, int]]
) -> None:
    case = Case.random(config_of(*heads), shares)
    torch.testing.assert_close(attend(case).double(), case.expected(), atol=1e-5, rtol=1e-4)


@given(shares=st.lists(SHARES, min_size=1, max_size=4))
@settings(max_examples=25)
def test_attention_is_that_of_the_oracle_whatever_the_spans(
    shares: list[tuple[int, int]],
) -> None:
    case = Case.random(config_of(14, 2, 64), shares)
    torch.testing.assert_close(attend(case).double(), case.expected(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_a_cache_of_8_bits_is_read_by_its_scales(heads: tuple[int, int, int]) -> None:
    case = Case.random(config_of(*heads), [(700, 1), (0, 40), (500, 130)])
    narrow, restored = [], []
    for tensor in (case.cache.keys, case.cache.values):
        is_there = tensor.isfinite().all(dim=2, keepdim=True)
        scales = tensor.where(is_there, 0.0).abs().amax(dim=2, keepdim=True) / 127.0
        codes = (tensor.where(is_there, 0.0) / scales.clamp(min=1e-9)).round().to(torch.int8)
        narrow.append((codes, scales.squeeze(2).where(is_there.squeeze(2), torch.nan)))
        restored.append((codes * scales).where(is_there, torch.nan))
    (keys, key_scales), (values, value_scales) = narrow
    case.cache = LayerCache(*restored)
    expected = case.expected()
    case.cache = LayerCache(keys, values, key_scales.contiguous(), value_scales.contiguous())
    torch.testing.assert_close(attend(case).double(), expected, atol=1e-5, rtol=1e-4)


@given(data=st.data())
@settings(max_examples=25)
def test_a_row_has_the_same_bits_however_its_span_is_cut(data: st.DataObject) -> None:
    case = Case.random(config_of(14, 2, 64), [data.draw(SHARES), data.draw(SHARES)])
    whole = attend(case)
    pieces = []
    for span in case.spans:
        done = 0
        while done < span.num_tokens:
            size = min(data.draw(st.integers(1, 90)), span.num_tokens - done)
            pieces.append(Span(span.start + done, size, span.position + done, span.block_table))
            done += size
    assert torch.equal(attend(case, data.draw(st.permutations(pieces))), whole)
