"""Log probabilities in OpenAI's two shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from understudy.protocol.request import TokenLogprobs

LEAST_LOGPROB: Final = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class TokenLogprob(NamedTuple):
    """One output token, or an alternative to it."""

    spelling: bytes
    """Perhaps only a part of a character."""
    logprob: float
    top: tuple[TokenLogprob, ...] = ()
    """The likeliest tokens at this position, best first."""
    offset: int = 0
    """Where the token starts in the answer's text, in characters."""
    is_first: bool = False
    """Whether it begins a prompt: nothing is before it that it could be likely behind."""

    @property
    def text(self) -> str:
        """The spelling, with U+FFFD where it is no whole character."""
        return self.spelling.decode(errors="replace")

    @property
    def key(self) -> str:
        """A name that keeps apart tokens that are different parts of characters."""
        try:
            return self.spelling.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.spelling)


def spell_logprobs(
    token_id: int, logprobs: TokenLogprobs, *, offset: int, spell: Callable[[int], bytes]
) -> TokenLogprob:
    """An engine's ids and numbers in terms of what ``spell`` says the ids spell."""
    top = tuple(
        TokenLogprob(spell(other_id), max(logprob, LEAST_LOGPROB))
        for other_id, logprob in logprobs.top
    )
    return TokenLogprob(spell(token_id), max(logprobs.chosen, LEAST_LOGPROB), top, offset)


def behind_first(entries: Sequence[TokenLogprob], spelling: bytes, text: str) -> list[TokenLogprob]:
    """The entries of an answer that says its prompt again, whose first token is not among them."""
    moved = [entry._replace(offset=entry.offset + len(text)) for entry in entries]
    return [TokenLogprob(spelling, 0.0, is_first=True), *moved]


def chat_logprobs(entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """The shape of chat completions; ``None`` if the request did not ask."""
    if entries is None:
        return None
    content = [
        {**_chat_entry(entry), "top_logprobs": [_chat_entry(other) for other in entry.top]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(entries: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
    """The shape of completions. The chosen token is among the top ones whatever its rank."""
    if entries is None:
        return None
    return {
        "tokens": [entry.key for entry in entries],
        "token_logprobs": [None if entry.is_first else entry.logprob for entry in entries],
        "top_logprobs": [
            None if entry.is_first else {other.key: other.logprob for other in (*entry.top, entry)}
            for entry in entries
        ],
        "text_offset": [entry.offset for entry in entries],
    }


def _chat_entry(entry: TokenLogprob) -> dict[str, Any]:
    return {"token": entry.text, "logprob": entry.logprob, "bytes": list(entry.spelling)}
