"""What a tenant has used, as it is told, kept and added up."""

from __future__ import annotations

from typing import NamedTuple


class DayUsage(NamedTuple):
    """What a tenant used in one day; of requests that have ended."""

    day: int
    """Days since 1970, UTC."""
    requests: int
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt tokens, those that did not have to be computed."""
    output_tokens: int
    kv_token_s: float
    """Tokens in the KV cache, times the seconds that they were there."""
