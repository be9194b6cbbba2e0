from __future__ import annotations

from understudy.protocol.request import Request, SamplingParams
from understudy.runtime.control.prefix_index import PIECE_TOKENS, PrefixIndex, prefix_keys


def keys_of(*pieces: int, tenant: str = "", salt: str = "") -> list[bytes]:
    prompt = tuple(piece for piece in pieces for _ in range(PIECE_TOKENS))
    params = SamplingParams(seed=0, max_tokens=1)
    return prefix_keys(Request(1, 1, prompt, params, tenant=tenant, cache_salt=salt))


def test_a_match_ends_with_the_first_piece_that_is_not_there() -> None:
    index = PrefixIndex()
    index.note("e", keys_of(1, 2, 3), tokens_max=1 << 20)
    assert index.num_cached_tokens("e", keys_of(1, 2, 4)) == 2 * PIECE_TOKENS
    assert index.num_cached_tokens("e", keys_of(4, 2, 3)) == 0
    assert index.num_cached_tokens("other", keys_of(1, 2, 3)) == 0


def test_tenants_and_salts_have_keys_of_their_own() -> None:
    assert not set(keys_of(1, 2)) & set(keys_of(1, 2, tenant="t"))
    assert not set(keys_of(1, 2)) & set(keys_of(1, 2, salt="s"))


def test_output_counts_like_a_prompt() -> None:
    params = SamplingParams(seed=0, max_tokens=1)
    half = (1,) * (PIECE_TOKENS // 2)
    assert prefix_keys(Request(1, 1, half, params), half) == keys_of(1)


def test_what_was_given_first_is_forgotten_first_and_leaves_before_roots() -> None:
    index = PrefixIndex()
    for piece in (1, 2):
        index.note("e", keys_of(piece, 9), tokens_max=3 * PIECE_TOKENS)
    assert index.num_cached_tokens("e", keys_of(1, 9)) == PIECE_TOKENS
    assert index.num_cached_tokens("e", keys_of(2, 9)) == 2 * PIECE_TOKENS


def test_what_is_used_again_is_young_again() -> None:
    index = PrefixIndex()
    for piece in (1, 2, 1, 3):
        index.note("e", keys_of(piece), tokens_max=2 * PIECE_TOKENS)
    assert index.num_cached_tokens("e", keys_of(1)) == PIECE_TOKENS
    assert index.num_cached_tokens("e", keys_of(2)) == 0


def test_an_engine_can_be_forgotten() -> None:
    index = PrefixIndex()
    index.note("e", keys_of(1), tokens_max=1 << 20)
    assert index.knows("e")
    index.forget("e")
    assert not index.knows("e")
    assert index.num_cached_tokens("e", keys_of(1)) == 0
