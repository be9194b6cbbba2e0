"""A response as it grows: its output items, its events, and the object that it comes to.

Each piece of text is an event of its own, numbered from the beginning of the response, and pieces
do not depend on how tokens came. So the numbers are the same from whichever gateway, and a client
that has heard of event n is told of n + 1 next. What is answered in one piece is built by the same
steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec

from understudy.protocol.errors import DeadlineExceeded, RequestError
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
from understudy.protocol.openai.responses import kept_response
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.openai.streamed import Told

_encode = msgspec.json.Encoder().encode

STATUSES: Final = {
    None: "in_progress",
    "stop": "completed",
    "tool_calls": "completed",
    "length": "incomplete",
    "deadline": "incomplete",
    "cancelled": "cancelled",
}
"""By what an answer ended with."""
_INCOMPLETE: Final = {"length": "max_output_tokens", "deadline": "deadline"}
"""Why an answer was cut off, by what it ended with."""
_LAST_EVENTS: Final = {
    "completed": "response.completed",
    "incomplete": "response.incomplete",
    "cancelled": "response.incomplete",
}


class ResponseEncoder:
    """Builds one response, and its events. See ``DeltaEncoder``.

    Args:
        heading: The response's id, and what it repeats of its request.
        event_ids: Not used: events are numbered by themselves.
        index: Not used: a response is one answer.
        request_id: Names its calls.
        starting_after: The last event that the client has; -1: none.
        has_usage: Not used: the last event always has it.
        reports_usage: Not used.
        is_joined: Not used: ``starting_after`` says it.
    """

    def __init__(
        self,
        heading: Heading,
        event_ids: EventIds | None = None,  # noqa: ARG002 - as every endpoint's
        index: int = 0,  # noqa: ARG002
        *,
        request_id: int,
        starting_after: int = -1,
        has_usage: bool = False,  # noqa: ARG002
        reports_usage: bool = False,  # noqa: ARG002
        is_joined: bool = False,  # noqa: ARG002
    ) -> None:
        self._heading = heading
        self._kept = kept_response(heading.repeated)
        self._request_id = request_id
        self._starting_after = starting_after
        self._sequence_number = 0
        self._events: list[bytes] = []
        self._output: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._num_calls = 0
        self._status = "queued" if self._kept.is_background else "in_progress"
        self._told = Told(0, 0, 0)

    @property
    def num_events(self) -> int:
        """Events so far, told or not."""
        return self._sequence_number

    def opening(self, told: Told) -> bytes:
        """See ``DeltaEncoder``."""
        self._told = told
        self._event("response.created", response=self.response())
        self._status = "in_progress"
        self._event("response.in_progress", response=self.response())
        return self._take_events()

    def encode(
        self,
        deltas: Sequence[Delta],
        told: Told,
        *,
        logprobs: Sequence[TokenLogprob] | None,  # noqa: ARG002 - not among what is asked for
    ) -> bytes:
        """See ``DeltaEncoder``."""
        self._told = told
        for delta in deltas:
            self._add(delta)
        if told.finish_reason is not None:
            self._end_item(is_last=True)
            self._status = STATUSES[told.finish_reason]
            self._event(_LAST_EVENTS[self._status], response=self.response())
        return self._take_events()

    def error(self, error: RequestError) -> bytes:
        """See ``DeltaEncoder``."""
        self._starting_after = -1
        self._event("error", code=error.code, message=error.message, param=error.param)
        return self._take_events()

    def response(self) -> dict[str, Any]:
        """The response's object, as far as it is."""
        reason = _INCOMPLETE.get(self._told.finish_reason or "")
        has_ended = self._status not in {"queued", "in_progress"}
        output = [dict(item) for item in self._output]
        if self._open_item() is not None:
            output[-1] |= self._content("".join(self._texts))
        return {
            "id": self._heading.answer_id,
            "object": "response",
            "created_at": self._heading.created,
            "status": self._status,
            "error": None,
            "incomplete_details": None if reason is None else {"reason": reason},
            "model": self._heading.model,
            "output": output,
            "usage": self._usage() if has_ended else None,
            **self._kept.fields,
        }

    def _usage(self) -> dict[str, Any]:
        told = self._told
        return {
            "input_tokens": told.num_prompt_tokens,
            "input_tokens_details": {"cached_tokens": told.num_cached_tokens},
            "output_tokens": told.num_tokens,
            "output_tokens_details": {"reasoning_tokens": told.num_reasoning_tokens},
            "total_tokens": told.num_prompt_tokens + told.num_tokens,
        }

    def _add(self, delta: Delta) -> None:
        match delta:
            case ContentDelta(text):
                self._begin("message", {"role": "assistant", "content": []})
                self._add_text("response.output_text.delta", text, logprobs=[])
            case ReasoningDelta(text):
                self._begin("reasoning", {"summary": [], "content": []})
                self._add_text("response.reasoning_text.delta", text)
            case CallDelta(number, name):
                is_short = self._heading.has_short_ids
                name_of_call = call_id(self._request_id, number, is_short=is_short)
                self._end_item()
                self._begin(
                    "function_call", {"call_id": name_of_call, "name": name, "arguments": ""}
                )
            case ArgumentsDelta(_, text):
                self._texts.append(text)
                self._item_event("response.function_call_arguments.delta", delta=text)

    def _begin(self, kind: str, fields: dict[str, Any]) -> None:
        """Begin an item, unless one of this kind is under way."""
        item = self._open_item()
        if item is not None:
            if item["type"] == kind:
                return
            self._end_item()
        prefix = {"message": "msg", "reasoning": "rs", "function_call": "fc"}[kind]
        group = self._heading.answer_id.rpartition("_")[2]
        item_id = f"{prefix}_{group}{len(self._output):04x}"
        self._output.append({"id": item_id, "type": kind, "status": "in_progress", **fields})
        self._texts = []
        self._event(
            "response.output_item.added",
            output_index=len(self._output) - 1,
            item=dict(self._output[-1]),
        )
        if kind != "function_call":
            self._item_event("response.content_part.added", content_index=0, part=self._part(""))

    def _add_text(self, kind: str, text: str, **fields: Any) -> None:
        self._texts.append(text)
        self._item_event(kind, content_index=0, delta=text, **fields)

    def _part(self, text: str) -> dict[str, Any]:
        if self._output[-1]["type"] == "reasoning":
            return {"type": "reasoning_text", "text": text}
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _content(self, text: str) -> dict[str, Any]:
        """What the last item holds, if this is its text."""
        if self._output[-1]["type"] == "function_call":
            return {"arguments": text}
        return {"content": [self._part(text)]}

    def _open_item(self) -> dict[str, Any] | None:
        item = self._output[-1] if self._output else None
        return item if item is not None and item["status"] == "in_progress" else None

    def _end_item(self, *, is_last: bool = False) -> None:
        """End the item that is under way, if there is one."""
        item = self._open_item()
        if item is None:
            return
        text = "".join(self._texts)
        reason = self._told.finish_reason
        is_cut = is_last and reason not in {"stop", "tool_calls"}
        item |= self._content(text)
        if item["type"] == "function_call":
            self._item_event(
                "response.function_call_arguments.done", name=item["name"], arguments=text
            )
        else:
            part = self._part(text)
            if item["type"] == "message":
                self._item_event(
                    "response.output_text.done", content_index=0, text=text, logprobs=[]
                )
            else:
                self._item_event("response.reasoning_text.done", content_index=0, text=text)
            self._item_event("response.content_part.done", content_index=0, part=part)
        item["status"] = "incomplete" if is_cut else "completed"
        self._event(
            "response.output_item.done", output_index=len(self._output) - 1, item=dict(item)
        )

    def _item_event(self, kind: str, **fields: Any) -> None:
        index = len(self._output) - 1
        self._event(kind, item_id=self._output[-1]["id"], output_index=index, **fields)

    def _event(self, kind: str, **fields: Any) -> None:
        number = self._sequence_number
        self._sequence_number += 1
        if number > self._starting_after:
            data = _encode({"type": kind, "sequence_number": number, **fields})
            self._events.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), data))

    def _take_events(self) -> bytes:
        events, self._events = self._events, []
        return b"".join(events)


def response_object(
    heading: Heading, answers: Sequence[Answer], *, num_prompt_tokens: int, num_cached_tokens: int
) -> dict[str, Any]:
    """The answer to a request that does not stream."""
    [answer] = answers
    encoder = ResponseEncoder(heading, request_id=answer.request_id)
    told = Told(
        num_prompt_tokens,
        answer.num_tokens,
        num_cached_tokens,
        answer.num_reasoning_tokens,
        answer.finish_reason,
    )
    encoder.encode(answer.deltas, told, logprobs=None)
    return encoder.response()


def failed_response(heading: Heading, error: RequestError) -> dict[str, Any]:
    """The object of a response that could not go on."""
    response = ResponseEncoder(heading, request_id=0).response()
    is_late = isinstance(error, DeadlineExceeded)
    code = error.code if is_late else "server_error"
    shown = {"code": code, "message": error.message}
    return {**response, "status": "failed", "error": shown}
