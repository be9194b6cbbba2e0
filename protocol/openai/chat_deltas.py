"""Chunks of a chat completion whose text has a meaning: reasoning, content, calls of tools."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from understudy.protocol.errors import RequestError
from understudy.protocol.openai.answer import Heading, error_event, usage
from understudy.protocol.openai.chat import CHUNK_KIND, chat_chunk_encoder
from understudy.protocol.openai.deltas import (
    ArgumentsDelta,
    CallDelta,
    ContentDelta,
    Delta,
    ReasoningDelta,
    call_id,
)
from understudy.protocol.openai.logprobs import TokenLogprob, chat_logprobs
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.openai.streamed import Told

_encode = msgspec.json.Encoder().encode


class ChatDeltaEncoder:
    """Turns what is new of one choice into one chunk. See ``DeltaEncoder``.

    All that is told at once is one chunk, since a chunk's id says what its reader has.

    Args:
        heading: What every chunk says first.
        event_ids: Names the events of the stream.
        index: The choice's.
        request_id: Names its calls.
        has_usage: Whether each chunk has a ``usage`` field, null unless ``reports_usage``.
        reports_usage: Whether each chunk says what the answer has cost so far.
        is_joined: Whether the client has the choice's beginning.
    """

    def __init__(
        self,
        heading: Heading,
        event_ids: EventIds,
        index: int,
        *,
        request_id: int,
        has_usage: bool,
        reports_usage: bool,
        is_joined: bool,
    ) -> None:
        self._event_ids = event_ids
        self._index = index
        self._opening = heading.fields(CHUNK_KIND)
        self._request_id = request_id
        self._has_short_ids = heading.has_short_ids
        self._has_usage = has_usage
        self._reports_usage = reports_usage
        self._has_role = is_joined
        self._plain = chat_chunk_encoder(heading, event_ids, index, has_usage=has_usage)
        self._before = b"\ndata: " + heading.opening(CHUNK_KIND)
        self._before += b'"choices":[{"index":%d,"delta":{"reasoning":' % index
        self._after = b'},"logprobs":null,"finish_reason":null}]'
        self._after += b',"usage":null}\n\n' if has_usage else b"}\n\n"

    def opening(self, told: Told) -> bytes:  # noqa: ARG002
        """See ``DeltaEncoder``: a chat completion begins with its first token."""
        return b""

    def encode(
        self, deltas: Sequence[Delta], told: Told, *, logprobs: Sequence[TokenLogprob] | None
    ) -> bytes:
        """See ``DeltaEncoder``."""
        if not (logprobs or told.finish_reason or self._reports_usage):
            if not deltas:
                return b""
            if self._has_role and len(deltas) == 1:
                [delta] = deltas
                if isinstance(delta, ContentDelta):
                    return self._plain.encode(told.num_tokens, delta.text)
                if isinstance(delta, ReasoningDelta):
                    return self._encode_reasoning(told.num_tokens, delta.text)
        elif not (deltas or logprobs or told.finish_reason):
            return b""
        choice = {
            "index": self._index,
            "delta": self._delta(deltas),
            "logprobs": chat_logprobs(logprobs or None),
            "finish_reason": told.finish_reason,
        }
        chunk: dict[str, Any] = {**self._opening, "choices": [choice]}
        if self._has_usage:
            chunk["usage"] = None
        if self._reports_usage:
            chunk["usage"] = usage(
                told.num_prompt_tokens,
                told.num_tokens,
                num_cached_tokens=told.num_cached_tokens,
                num_reasoning_tokens=told.num_reasoning_tokens,
            )
        event_id = self._event_ids.line(self._index, told.num_tokens)
        return b"".join((event_id, b"\ndata: ", _encode(chunk), b"\n\n"))

    def _encode_reasoning(self, position: int, text: str) -> bytes:
        """A chunk of nothing but thoughts: the path of nearly every token of a model in thought."""
        event_id = self._event_ids.line(self._index, position)
        shown = _encode(text)
        return b"".join(
            (event_id, self._before, shown, b',"reasoning_content":', shown, self._after)
        )

    def error(self, error: RequestError) -> bytes:
        """See ``DeltaEncoder``."""
        return error_event(error)

    def _delta(self, deltas: Sequence[Delta]) -> dict[str, Any]:
        content: list[str] = []
        reasoning: list[str] = []
        calls: dict[int, dict[str, Any]] = {}
        for delta in deltas:
            match delta:
                case ContentDelta(text):
                    content.append(text)
                case ReasoningDelta(text):
                    reasoning.append(text)
                case CallDelta(index, name):
                    calls[index] = {
                        "index": index,
                        "id": call_id(self._request_id, index, is_short=self._has_short_ids),
                        "type": "function",
                        "function": {"name": name, "arguments": ""},
                    }
                case ArgumentsDelta(index, text):
                    call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                    call["function"]["arguments"] += text
        shown: dict[str, Any] = {}
        if not self._has_role:
            self._has_role = True
            shown["role"] = "assistant"
            if not (reasoning or calls):
                shown["content"] = ""
        if reasoning:
            shown["reasoning"] = shown["reasoning_content"] = "".join(reasoning)
        if content:
            shown["content"] = "".join(content)
        if calls:
            shown["tool_calls"] = list(calls.values())
        return shown
