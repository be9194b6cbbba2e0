"""Which engine probably has which prefixes in its cache: those that it was given last.

Engines do not tell what they keep. But what an engine was given it has computed, and what it was
given last it gives up last, so a list of the latest, as long as its cache, is near the truth. A
wrong guess costs time and nothing else.

Prefixes are named as in the engines' caches, by chained keys, but in coarser pieces: a shorter
match is not worth a detour.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from understudy.protocol.request import Request
from understudy.runtime.kvcache.prefix_cache import extend_keys, root_key

PIECE_TOKENS: Final = 64


def prefix_keys(request: Request, output: Sequence[int] = ()) -> list[bytes]:
    """The keys of all whole pieces of a request's tokens."""
    tokens = [*request.prompt, *output]
    root = root_key(request.tenant, request.cache_salt)
    keys: list[bytes] = []
    num_pieces = len(tokens) // PIECE_TOKENS
    extend_keys(keys, root, tokens, block_size=PIECE_TOKENS, num_blocks=num_pieces)
    return keys


class PrefixIndex:
    """The latest prefixes of each engine, by its identity."""

    def __init__(self) -> None:
        self._engines: dict[str, OrderedDict[bytes, None]] = {}

    def knows(self, engine: str) -> bool:
        """Whether anything was noted of an engine."""
        return engine in self._engines

    def num_cached_tokens(self, engine: str, keys: Sequence[bytes]) -> int:
        """How many of a request's first tokens an engine probably has."""
        known = self._engines.get(engine)
        if not known:
            return 0
        num_pieces = 0
        for key in keys:
            if key not in known:
                break
            num_pieces += 1
        return num_pieces * PIECE_TOKENS

    def note(self, engine: str, keys: Sequence[bytes], *, tokens_max: int) -> None:
        """An engine, whose cache holds ``tokens_max``, computes what these keys stand for."""
        known = self._engines.setdefault(engine, OrderedDict())
        # The first piece last: a leaf is given up before its root.
        for key in reversed(keys):
            known[key] = None
            known.move_to_end(key)
        while len(known) * PIECE_TOKENS > tokens_max:
            known.popitem(last=False)

    def forget(self, engine: str) -> None:
        """An engine is gone, and its cache with it."""
        self._engines.pop(engine, None)
