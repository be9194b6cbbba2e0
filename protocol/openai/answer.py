"""What both completion endpoints answer with: their common fields, and chunks of a stream.

A stream is server-sent events (WHATWG HTML, section 9.2). Each chunk's event has an id that says
how far the client is when it has read the event: see ``stream_ids``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec

from understudy.protocol.errors import (
    InternalError,
    InvalidRequest,
    RequestError,
    Unavailable,
)
from understudy.protocol.openai.deltas import Delta
from understudy.protocol.openai.logprobs import TokenLogprob
from understudy.protocol.openai.stream_ids import EventIds
from understudy.protocol.request import FinishReason

KEEP_ALIVE: Final = b": keep-alive\n"
"""A comment. No empty line follows: behind an event with an id, the OpenAI client would take that
for an event without data, and fail."""
DONE: Final = b"data: [DONE]\n\n"

_ENCODER: Final = msgspec.json.Encoder()
_encode = _ENCODER.encode


@dataclass(frozen=True, slots=True)
class Answer:
    """One choice, complete."""

    index: int
    text: str
    num_tokens: int
    finish_reason: str
    logprobs: Sequence[TokenLogprob] | None
    deltas: Sequence[Delta] = ()
    """What the text means, piece by piece; of an answer that is not taken apart none."""
    num_reasoning_tokens: int = 0
    num_cached_tokens: int = 0
    stop_string: str | None = None
    """What it ended at, if at one that the client gave."""
    request_id: int = 0
    """Names the calls: see ``call_id``."""
    token_ids: Sequence[int] = ()


class Heading(NamedTuple):
    """What every object of one answer says first."""

    answer_id: str
    created: int
    """Seconds since 1970."""
    model: str
    system_fingerprint: str = ""
    """Changes when what computes answers changes, and with it perhaps what the same seed gives."""
    repeated: bytes = b""
    """What the answer says again of its request, in its endpoint's JSON."""
    has_short_ids: bool = False
    """Whether calls of tools have the names that Mistral's templates take."""

    def fields(self, kind: str) -> dict[str, Any]:
        """The heading as the first fields of an object."""
        fields = {
            "id": self.answer_id,
            "object": kind,
            "created": self.created,
            "model": self.model,
        }
        if self.system_fingerprint:
            fields["system_fingerprint"] = self.system_fingerprint
        return fields

    def opening(self, kind: str) -> bytes:
        """The heading as the beginning of a JSON object, up to the next field's name."""
        return _encode(self.fields(kind))[:-1] + b","


def system_fingerprint(numerics: Sequence[str]) -> str:
    """A short name for the classes of numerics among which a request may be computed."""
    if not numerics:
        return ""
    return "fp_" + hashlib.sha256("\n".join(sorted(numerics)).encode()).hexdigest()[:12]


def usage(
    num_prompt_tokens: int,
    num_completion_tokens: int,
    *,
    num_cached_tokens: int,
    num_reasoning_tokens: int = 0,
) -> dict[str, Any]:
    """What an answer cost, in tokens; ``num_cached_tokens`` of the prompt were computed before."""
    counts: dict[str, Any] = {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": num_completion_tokens,
        "total_tokens": num_prompt_tokens + num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": num_cached_tokens},
    }
    if num_reasoning_tokens:
        counts["completion_tokens_details"] = {"reasoning_tokens": num_reasoning_tokens}
    return counts


def finish_reason_or_error(finish: FinishReason) -> str | RequestError:
    """OpenAI's word for an end, or the error that it is told as."""
    match finish:
        case FinishReason.STOP:
            return "stop"
        case FinishReason.LENGTH:
            return "length"
        case FinishReason.CANCELLED:
            return Unavailable("the request was cancelled by the server")
        case FinishReason.DEADLINE:
            return "deadline"
        case FinishReason.ERROR:
            return InternalError("the system could not go on with the request")
        case FinishReason.REFUSED:
            return InvalidRequest("the grammar has become too expensive to follow")


def error_event(error: RequestError) -> bytes:
    """The event that ends a stream which cannot go on."""
    return b"data: " + _encode(error.body()) + b"\n\n"


def engine_comment(engine: str, index: int) -> bytes:
    """Tells people, not programs, which engine makes what follows of choice ``index``."""
    return f": engine {engine} choice {index}\n".encode("ascii", errors="replace")


class ChunkEncoder:
    """Turns the deltas of one choice into events, without building a dictionary for each.

    All that stays the same from chunk to chunk is encoded once; for a token, only the text is::

        id: 3f2a….7 ␤ data: {"id":…,"choices":[{"index":0,"delta":{"content":"text"},"logprobs":…
        ╰ event id ╯╰───────────────── start ────────────────────╯╰─ later ─╯     ╰ end_of_text …

    Args:
        event_ids: Names the events of the stream.
        index: The choice's.
        opening: The chunk up to where the text's own field begins.
        first: That field's beginning in the first chunk.
        later: The same in all further chunks.
        end_of_text: What closes the field's object, if it has one.
        shape_logprobs: Gives the value of the ``logprobs`` field.
        has_usage: Whether each chunk has a ``usage`` field, null unless given.
    """

    __slots__ = (
        "_after",
        "_before",
        "_end_of_text",
        "_event_ids",
        "_first",
        "_has_usage",
        "_index",
        "_later",
        "_shape_logprobs",
        "_start",
    )

    def __init__(
        self,
        event_ids: EventIds,
        index: int,
        opening: bytes,
        *,
        first: bytes,
        later: bytes,
        end_of_text: bytes,
        shape_logprobs: Callable[[Sequence[TokenLogprob] | None], dict[str, Any] | None],
        has_usage: bool,
    ) -> None:
        self._event_ids = event_ids
        self._index = index
        self._start = b"\ndata: " + opening
        self._first = first
        self._later = later
        self._end_of_text = end_of_text
        self._shape_logprobs = shape_logprobs
        self._has_usage = has_usage
        self._before = self._start + later
        self._after = self._ending(None, None, None)

    def encode(self, position: int, text: str) -> bytes:
        """A chunk of nothing but text, and not the first: the path of nearly every token."""
        event_id = self._event_ids.line(self._index, position)
        return b"".join((event_id, self._before, _encode(text), self._after))

    def encode_any(
        self,
        position: int,
        text: str,
        *,
        is_first: bool,
        finish_reason: str | None = None,
        logprobs: Sequence[TokenLogprob] | None = None,
        usage: dict[str, Any] | None = None,
    ) -> bytes:
        """A chunk with whatever there is to say."""
        field = self._first if is_first else self._later
        ending = self._ending(finish_reason, logprobs, usage)
        event_id = self._event_ids.line(self._index, position)
        return b"".join((event_id, self._start, field, _encode(text), ending))

    def _ending(
        self,
        finish_reason: str | None,
        logprobs: Sequence[TokenLogprob] | None,
        usage: dict[str, Any] | None,
    ) -> bytes:
        """Everything behind the text."""
        parts = [
            self._end_of_text,
            b',"logprobs":',
            _encode(self._shape_logprobs(logprobs)),
            b',"finish_reason":',
            _encode(finish_reason),
            b"}]",
        ]
        if self._has_usage:
            parts += [b',"usage":', _encode(usage)]
        parts.append(b"}\n\n")
        return b"".join(parts)


def usage_event(heading: Heading, kind: str, counts: dict[str, Any]) -> bytes:
    """The last chunk of a stream that was asked for its usage: it has no choices."""
    chunk = {**heading.fields(kind), "choices": [], "usage": counts}
    return b"data: " + _encode(chunk) + b"\n\n"
