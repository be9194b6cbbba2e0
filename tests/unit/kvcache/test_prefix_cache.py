from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from understudy.runtime.kvcache.prefix_cache import PrefixCache, Tail, extend_keys, root_key

ROOT = root_key("tenant", "")
BLOCK_SIZE = 4


def keys_of(tokens: list[int], root: bytes = ROOT) -> list[bytes]:
    keys: list[bytes] = []
    num_blocks = len(tokens) // BLOCK_SIZE
    extend_keys(keys, root, tokens, block_size=BLOCK_SIZE, num_blocks=num_blocks)
    return keys


def keep(cache: PrefixCache, tokens: list[int], blocks: list[int]) -> list[bytes]:
    """Let ``blocks`` hold the full blocks of ``tokens``."""
    keys = keys_of(tokens)
    for index, block in enumerate(blocks):
        parent = keys[index - 1] if index else ROOT
        content = tokens[index * BLOCK_SIZE : (index + 1) * BLOCK_SIZE]
        assert cache.keep(block, parent, content, keys[index])
    return keys


def rest(cache: PrefixCache, blocks: list[int]) -> None:
    for block in reversed(blocks):
        cache.rest(block)


@given(tokens=st.lists(st.integers(0, 3), min_size=8, max_size=16), place=st.integers(0, 7))
def test_a_key_stands_for_everything_before_it(tokens: list[int], place: int) -> None:
    changed = list(tokens)
    changed[place] += 1
    same = place // BLOCK_SIZE
    assert keys_of(changed)[:same] == keys_of(tokens)[:same]
    assert not set(keys_of(changed)[same:]) & set(keys_of(tokens)[same:])


def test_tenants_and_salts_share_nothing_however_they_are_put_together() -> None:
    roots = {root_key(*owners) for owners in (("ab", "c"), ("a", "bc"), ("abc", ""), ("", "abc"))}
    assert len(roots) == 4


def test_keys_are_extended_from_where_they_end() -> None:
    tokens = list(range(12))
    keys = keys_of(tokens[:8])
    extend_keys(keys, ROOT, tokens, block_size=BLOCK_SIZE, num_blocks=3)
    assert keys == keys_of(tokens)


def test_a_prefix_is_found_up_to_its_first_block_that_is_not_here() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, list(range(8)), [5, 3])
    assert cache.match(keys_of([*range(8), 9, 9, 9, 9])) == [5, 3]
    assert cache.match(keys_of([0, 1, 2, 3, 9, 9, 9, 9])) == [5]
    assert cache.match(keys_of([9, 9, 9, 9])) == []


def test_a_tail_is_the_block_with_the_most_of_the_next_tokens() -> None:
    cache = PrefixCache(num_blocks=8)
    cache.keep(1, ROOT, [1, 2, 9, 9])
    cache.keep(2, ROOT, [1, 2, 3])
    assert cache.match_tail(ROOT, [1, 2, 3, 4], excluding=()) == Tail(2, 3)
    assert cache.match_tail(ROOT, [1, 2, 3, 4], excluding={2}) == Tail(1, 2)
    assert cache.match_tail(ROOT, [7], excluding=()) is None


def test_a_block_with_the_content_of_another_is_not_kept() -> None:
    cache = PrefixCache(num_blocks=8)
    (key,) = keep(cache, [1, 2, 3, 4], [0])
    assert not cache.keep(1, ROOT, [1, 2, 3, 4], key)
    assert not cache.holds(1)


def test_leaves_go_before_their_roots() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, list(range(12)), [0, 1, 2])
    rest(cache, [0, 1, 2])
    assert [cache.evict() for _ in range(3)] == [2, 1, 0]
    assert len(cache) == 0


def test_who_rests_longest_goes_first() -> None:
    cache = PrefixCache(num_blocks=8)
    for block in (2, 0, 1):
        keep(cache, [block] * 4, [block])
        cache.rest(block)
    cache.wake(2)
    cache.rest(2)
    assert [cache.evict() for _ in range(3)] == [0, 1, 2]


def test_who_came_back_outlives_a_flood_of_those_who_never_do() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, [0] * 4, [0])
    cache.hit(0)
    cache.rest(0)
    for token in range(1, 4):
        keep(cache, [token] * 4, [token])
        cache.rest(token)
        assert cache.evict() == token
    cache_survivors = cache.match(keys_of([0] * 4))
    assert cache_survivors == [0]


def test_nobody_outlives_the_flood_for_ever() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, [0] * 4, [0])
    cache.hit(0)
    cache.rest(0)
    for token in range(1, 100):
        keep(cache, [token] * 4, [1])
        cache.rest(1)
        if cache.evict() == 0:
            return
    pytest.fail("it is still here")


def test_an_owned_block_is_not_evicted() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, list(range(8)), [0, 1])
    rest(cache, [0, 1])
    cache.wake(1)
    assert cache.num_idle_blocks == 1
    assert cache.evict() == 0


def test_the_order_of_eviction_does_not_grow_with_every_use() -> None:
    cache = PrefixCache(num_blocks=8)
    keep(cache, [1, 2, 3, 4], [0])
    for _ in range(1000):
        cache.rest(0)
        cache.wake(0)
    cache.rest(0)
    assert len(cache._order) <= 100
    cache.check_integrity()
    assert cache.evict() == 0


def test_a_reset_forgets_everything_and_gives_what_nobody_owns() -> None:
    cache = PrefixCache(num_blocks=8)
    keys = keep(cache, list(range(8)), [0, 1])
    cache.rest(1)
    assert cache.reset() == [1]
    assert cache.match(keys) == []
    cache.check_integrity()
