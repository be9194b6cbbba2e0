"""A message as it grows: its blocks, its events, and the object that it comes to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from understudy.protocol.anthropic.messages import error_body
from understudy.protocol.errors import RequestError
from understudy.protocol.openai.answer import Answer, Heading
from understudy.protocol.openai.deltas import (
    ArgumentsDelta,
    CallDelta,
    ContentDelta,
    Delta,
    ReasoningDelta,
    call_id,
)
from understudy.protocol.openai.logprobs import TokenLogprob
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.openai.streamed import Told

_encode = msgspec.json.Encoder().encode

_STOP_REASONS: Final = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "deadline": "max_tokens",  # cut off: there is no word for why
}


class MessageEncoder:
    """Builds one message, and its events. See ``DeltaEncoder``.

    Args:
        heading: The message's id.
        event_ids: Not used: events have no ids in this interface.
        index: Not used: a message is one answer.
        request_id: Names its calls.
        has_usage: Not used: usage is always told.
        reports_usage: Not used.
        is_joined: Not used: these streams cannot be joined.
    """

    def __init__(
        self,
        heading: Heading,
        event_ids: EventIds | None = None,  # noqa: ARG002 - as every endpoint's
        index: int = 0,  # noqa: ARG002
        *,
        request_id: int,
        has_usage: bool = False,  # noqa: ARG002
        reports_usage: bool = False,  # noqa: ARG002
        is_joined: bool = False,  # noqa: ARG002
    ) -> None:
        self._heading = heading
        self._request_id = request_id
        self._events: list[bytes] = []
        self._blocks: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._is_open = False

    def opening(self, told: Told) -> bytes:
        """See ``DeltaEncoder``."""
        self._event("message_start", message=self.message(told))
        return self._take_events()

    def encode(
        self,
        deltas: Sequence[Delta],
        told: Told,
        *,
        logprobs: Sequence[TokenLogprob] | None,  # noqa: ARG002 - not in this interface
    ) -> bytes:
        """See ``DeltaEncoder``."""
        for delta in deltas:
            self._add(delta)
        if told.finish_reason is not None:
            self._end_block()
            self._event("message_delta", delta=_stop(told), usage=_usage(told))
            self._event("message_stop")
        return self._take_events()

    def error(self, error: RequestError) -> bytes:
        """See ``DeltaEncoder``."""
        return b"event: error\ndata: " + _encode(error_body(error)) + b"\n\n"

    def message(self, told: Told) -> dict[str, Any]:
        """The message's object, as far as it is."""
        return {
            "id": self._heading.answer_id,
            "type": "message",
            "role": "assistant",
            "model": self._heading.model,
            "content": self._blocks,
            **_stop(told),
            "usage": _usage(told),
        }

    def _add(self, delta: Delta) -> None:
        match delta:
            case ContentDelta(text):
                self._begin({"type": "text", "text": ""})
                self._add_text("text_delta", "text", text)
            case ReasoningDelta(text):
                self._begin({"type": "thinking", "thinking": "", "signature": ""})
                self._add_text("thinking_delta", "thinking", text)
            case CallDelta(number, name):
                self._end_block()
                is_short = self._heading.has_short_ids
                identifier = call_id(self._request_id, number, is_short=is_short)
                self._begin({"type": "tool_use", "id": identifier, "name": name, "input": {}})
            case ArgumentsDelta(_, text):
                self._add_text("input_json_delta", "partial_json", text)

    def _begin(self, block: dict[str, Any]) -> None:
        """Begin a block, unless one of this kind is under way."""
        if self._is_open and self._blocks[-1]["type"] == block["type"]:
            return
        self._end_block()
        self._is_open = True
        self._texts = []
        self._blocks.append(block)
        self._event("content_block_start", index=len(self._blocks) - 1, content_block=block)

    def _add_text(self, kind: str, field: str, text: str) -> None:
        self._texts.append(text)
        delta = {"type": kind, field: text}
        self._event("content_block_delta", index=len(self._blocks) - 1, delta=delta)

    def _end_block(self) -> None:
        """End the block that is under way, if there is one."""
        if not self._is_open:
            return
        self._is_open = False
        block, text = self._blocks[-1], "".join(self._texts)
        match block["type"]:
            case "tool_use":
                block["input"] = _arguments(text)
            case kind:
                block["thinking" if kind == "thinking" else "text"] = text
        self._event("content_block_stop", index=len(self._blocks) - 1)

    def _event(self, kind: str, **fields: Any) -> None:
        data = _encode({"type": kind, **fields})
        self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))

    def _take_events(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)


def message_object(
    heading: Heading, answers: Sequence[Answer], *, num_prompt_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    [answer] = answers
    encoder = MessageEncoder(heading, request_id=answer.request_id)
    told = Told(
        num_prompt_tokens,
        answer.num_tokens,
        num_cached_tokens,
        answer.num_reasoning_tokens,
        answer.finish_reason,
        answer.stop_string,
    )
    encoder.encode(answer.deltas, told, logprobs=None)
    return encoder.message(told)


def _stop(told: Told) -> dict[str, Any]:
    """Why it ended. A call counts for more than the stop string behind it."""
    if told.finish_reason == "stop" and told.stop_string is not None:
        return {"stop_reason": "stop_sequence", "stop_sequence": told.stop_string}
    reason = None if told.finish_reason is None else _STOP_REASONS[told.finish_reason]
    return {"stop_reason": reason, "stop_sequence": None}


def _usage(told: Told) -> dict[str, int]:
    return {
        "input_tokens": told.num_prompt_tokens - told.num_cached_tokens,
        "output_tokens": told.num_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": told.num_cached_tokens,
    }


def _arguments(text: str) -> dict[str, Any]:
    """A call's arguments; those that were cut off, or are no object, are none."""
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return {}
